"""PDM and s-PDM: diffusion models that learn a few prototypes while they train, and denoise towards the one that fits.

Paper: "Prototype-Guided Diffusion: Visual Conditioning without External Memory", arXiv 2508.09922.

The idea. Retrieval-augmented diffusion keeps a memory of training features and looks neighbours up, which costs memory
and time. Here a small convolutional encoder maps the clean image to a feature z, and K learned prototypes share that
space: z chooses its nearest prototype, a contrastive and an alignment loss draw the two together, and the denoiser
attends to the chosen prototype before its middle block. All of it trains at once with the noise loss, without a label.
s-PDM lets the label choose instead, a prototype a class. To sample, a prototype is drawn as often as training used it.

    clean image x0 ──> f_phi ──> z ──> nearest of K prototypes e (s-PDM: the label's)     contrastive + alignment loss
                                             │                                            (+ compactness of e: PDM)
                                  e + sinusoids(t): the key and the value  (or a learned vector: no prototype)
                                             │
    noisy image xt ──> U-Net down ──> cross-attention ──> middle ──> U-Net up ──> predicted noise

With one key the softmax over keys is 1 for every query: what is added is a linear map of the prototype, the same at
every pixel. `--attend all` lets the noisy features attend over all K prototypes, which is the alignment that the paper
describes.

    python pdm.py                                  # shapes, K prototypes, no labels used
    python pdm.py --supervised                     # s-PDM
    python pdm.py --compare                        # no conditioning, PDM, s-PDM: one table, one figure

Where the paper is silent, or where we differ (our choices): features start with mean zero and prototypes at their
centres by k-means, begun by k-means++ (s-PDM: at the mean feature of their class); a learned vector stands
for "no prototype" with probability 0.1, which makes guidance possible (`--null-prob 0 --guidance 0` is the paper's);
prototypes are drawn by their use in this epoch and the one before, not uniformly; T = 1000 for both variants; `--attend
all`, its bias towards the chosen prototype, and `--revive`; samples come from a moving average of the weights; AdamW's
second beta is 0.95; images are drawn with replacement; the attention starts at zero; f_phi runs in float32. The presets
take attention at all sides up to 16, rate 5e-4, batch 256, 100,000 steps and 20 steps of DPM-Solver++, to compare with
the other scripts (the paper: 1e-4, 64 a process, 500 epochs); STL-10 and CelebA come at 64 pixels, CelebA whole. On
`shapes` K is 4, because of ten prototypes only four stay alive: warm or cool on bright or dark. On photographs these
losses let a single prototype win, at any rate or tau that we tried; `--encoder-lr 0 --tau 0` keeps most of them.
"""
import argparse
import contextlib
import copy
import csv
import dataclasses
import datetime
import functools
import hashlib
import itertools
import json
import math
import os
import platform
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import matplotlib
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import nn
from torchvision.datasets.folder import IMG_EXTENSIONS

SCRIPT = Path(__file__).stem
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))      # set by torchrun


class Stop(Exception):
    """What only the person at the keyboard can put right: one sentence, and exit status 2."""


# --------------------------------------------------------------------------------------------------------------------
# 1  Settings: the dataclass is the documentation, the command line and config.json
# --------------------------------------------------------------------------------------------------------------------

def setting(default, help, **limits):
    """A field of Config. limits: choices; low, high (inclusive); fixed (an earlier run's cannot be changed).

    once: not kept in config.json. task: what to do, one at a time, in the folder of an earlier "run" or a "new" one.
    """
    return dataclasses.field(default=default, metadata={"help": help, **limits})


@dataclasses.dataclass
class Config:
    """Defaults are those of `shapes`; PRESETS holds what another data set changes; flags have the last word."""
    # data
    dataset: str = setting("shapes", "shapes, cifar10, stl10, fashion-mnist, eurosat, celeba, tiny-imagenet or folder",
                           fixed=True)
    data_dir: str = setting("data", "where data sets lie or are downloaded to; for folder, the folder of images itself")
    image_size: int = setting(16, "side of the images, pixels", low=16, fixed=True)
    mirror: bool = setting(False, "show half of the training images flipped left to right")
    # prototypes
    conditioning: str = setting("prototype", "what the denoiser is told: the chosen prototype, or none (the baseline)",
                                choices=("prototype", "none"), fixed=True)
    supervised: bool = setting(False, "s-PDM: a prototype a class, chosen by the label", fixed=True)
    num_prototypes: int = setting(4, "K; s-PDM takes the number of classes", low=1, fixed=True)
    prototype_dim: int = setting(64, "D, length of a prototype and of a feature, even", low=2, fixed=True)
    attend: str = setting("one", "the denoiser attends to the chosen prototype, or to all with a bias towards it",
                          choices=("one", "all"), fixed=True)
    start: str = setting("features", "prototypes start at features of real images, or (the paper) uniform in +-0.1",
                         choices=("features", "uniform"), fixed=True)
    encoder_lr: float = setting(1.0, "learning rate of f_phi, as a factor of --lr; 0: it stays as it starts", low=0,
                                fixed=True)
    revive: bool = setting(False, "after each epoch, move prototypes that no image chose to images far from any")
    tau: float = setting(1.0, "sharpness of the contrastive loss", low=0)
    alignment: float = setting(1.0, "alpha, weight of the alignment loss", low=0)
    compactness: float = setting(1.0, "beta, weight of the compactness loss (PDM)", low=0)
    # network and process
    channels: int = setting(48, "channels of the U-Net's first level, a multiple of 4", low=4, fixed=True)
    multipliers: str = setting("1,1", "channel factor of each level; all but the last halve the image", fixed=True)
    blocks: int = setting(1, "residual blocks a level", low=1, fixed=True)
    attention: int = setting(8, "self-attention at levels of at most this side, pixels", low=0, fixed=True)
    dropout: float = setting(0.0, "dropout in residual blocks, probability", low=0, high=0.9, fixed=True)
    timesteps: int = setting(1000, "T, noise levels", low=21, fixed=True)
    null_prob: float = setting(0.1, "probability of training without the prototype", low=0, high=1)
    # training
    steps: int = setting(3600, "optimiser steps", low=1)
    batch_size: int = setting(32, "images a step, over all processes and passes", low=1)
    accumulate: int = setting(1, "passes that share a step's images, for less memory", low=1)
    lr: float = setting(2e-3, "peak learning rate of AdamW", low=0)
    warmup: float = setting(0.05, "fraction of steps in which the rate rises, before half a cosine", low=0, high=1)
    weight_decay: float = setting(1e-4, "weight decay of AdamW", low=0)
    seed: int = setting(0, "what everything random follows from", low=0, high=2**31)
    save_every: int = setting(500, "steps between checkpoints", low=1)
    log_every: int = setting(100, "steps between rows of log.csv", low=1)
    device: str = setting("auto", "auto, cuda, cuda:1, mps or cpu")
    amp: str = setting("auto", "mixed precision of the networks", choices=("auto", "bf16", "fp16", "off"))
    compile: bool = setting(False, "torch.compile the network, for training and for whole batches of samples")
    # sampling and metrics
    num_samples: int = setting(1000, "images to sample, and to measure on", low=1)
    prototype: int = setting(-1, "--sample: from this prototype alone; -1: all", low=-1, once=True)
    like: str = setting("", "--sample: from the prototype that this image chooses", once=True)
    labels: str = setting("", "--sample of s-PDM: classes, like 0,3 or circle,star; empty: all in turn", once=True)
    frequency: str = setting("usage", "prototypes are drawn as often as images chose them, or uniformly (paper's code)",
                             choices=("usage", "uniform"))
    guidance: float = setting(1.0, "w; 0 is the conditional model, more trades variety for fidelity", low=-1)
    sampler: str = setting("ddpm", "the way from noise to image", choices=("ddim", "ddpm", "dpmpp"))
    sample_steps: int = setting(20, "steps from noise to image", low=1)
    sample_batch: int = setting(250, "images sampled at a time", low=1)
    inception: str = setting("auto", "weights for FID, IS, KID: a file, download, off; auto downloads on a GPU")
    judge_steps: int = setting(400, "steps of the judge, a classifier trained apart that measures samples", low=1)
    judge_width: int = setting(16, "channels of the judge's first stage; 64 is ResNet-18", low=1)
    eval_every: int = setting(500, "--compare: steps between measurements", low=1)
    # what to do
    compare: bool = setting(False, "train without conditioning, PDM and s-PDM: same seed and budget", fixed=True,
                            task="new")
    out: str = setting("", "the run's folder; empty: runs/NAME", once=True)
    resume: str = setting("", "folder of a run to go on with", once=True, task="run")
    sample: str = setting("", "folder of a run to sample from", once=True, task="run")
    evaluate: str = setting("", "folder of a run to measure again", once=True, task="run")

    # shapes: of 10 prototypes 4 stay alive, warm or cool on bright or dark, whatever their start and rate: so K is 4.
    # Else the paper's K and D, DDPM's U-Net, and batch, rate, guidance and sampler as in the other scripts.
    PHOTOGRAPHS: ClassVar[dict] = dict(
        image_size=32, mirror=True, num_prototypes=15, prototype_dim=256, judge_steps=8000, judge_width=64,
        channels=128, multipliers="1,2,2,2", blocks=2, attention=16, dropout=0.1, steps=100_000, batch_size=256,
        lr=5e-4, save_every=2000, num_samples=10_000, guidance=0.3, sampler="dpmpp", eval_every=5000)
    LARGER: ClassVar[dict] = {**PHOTOGRAPHS, "image_size": 64, "multipliers": "1,1,2,2,2", "num_prototypes": 10}
    PRESETS: ClassVar[dict] = {
        "shapes": {},
        "cifar10": PHOTOGRAPHS,
        "folder": PHOTOGRAPHS,
        "fashion-mnist": {**PHOTOGRAPHS, "mirror": False, "num_prototypes": 10},
        "stl10": LARGER,
        "eurosat": LARGER,
        "celeba": {**LARGER, "num_prototypes": 2},
        "tiny-imagenet": {**LARGER, "num_prototypes": 200}}

    def build(self, extra):
        """The method's network, untrained. extra: what a run knows of its data."""
        unet = UNet(extra["shape"][0], self.image_size, self.channels, level_multipliers(self), self.blocks,
                    self.attention, self.dropout)
        if self.conditioning == "none":
            return Unconditional(unet)
        K = len(extra["classes"]) if self.supervised else self.num_prototypes
        return PDM(unet, extra["shape"][0], level_multipliers(self)[-1] * self.channels, K, self.prototype_dim,
                   self.attend == "all", extra["images"], self.tau, self.revive)


def parse_config(argv=None):
    """Command line -> Config: defaults, then the data set's preset, then an earlier run's settings, then the flags."""
    parser = argparse.ArgumentParser(prog=f"python {SCRIPT}.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    settings = {f.name: f for f in dataclasses.fields(Config)}
    for name, f in settings.items():
        choices = f.metadata.get("choices")
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else \
            dict(type=f.type, choices=choices, metavar=None if choices else f.type.__name__.upper())
        parser.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS,
                            help=f"{f.metadata['help']} [{f.default}]".replace("%", "%%"), **kind)
    given = vars(parser.parse_args(argv))
    asked = [name for name in settings if "task" in settings[name].metadata and given.get(name)]
    if len(asked) > 1 or WORLD > 1 and asked not in ([], ["resume"]):
        raise Stop(f"--{' and --'.join(asked)} cannot be done together, or by several processes")
    earlier = asked and settings[asked[0]].metadata["task"] == "run" and given[asked[0]]
    saved = read_config(earlier) if earlier else {}
    for name in given:
        if earlier and settings[name].metadata.get("fixed") and given[name] != saved.get(name):
            raise Stop(f"{earlier} was made with --{name.replace('_', '-')} {saved.get(name)}: "
                       f"for {given[name]} start a new run")
    dataset = given.get("dataset", saved.get("dataset", Config.dataset))
    if dataset not in Config.PRESETS:
        raise Stop(f"there is no data set '{dataset}': choose one of {', '.join(Config.PRESETS)}")
    cfg = Config(**{**Config.PRESETS[dataset], **saved, **given})
    for name, f in settings.items():
        low, high = f.metadata.get("low", -math.inf), f.metadata.get("high", math.inf)
        if f.type in (int, float) and not low <= getattr(cfg, name) <= high:
            raise Stop(f"--{name.replace('_', '-')} {getattr(cfg, name)} must be between {low} and {high}")
    if cfg.batch_size % (WORLD * cfg.accumulate):
        raise Stop(f"--batch-size {cfg.batch_size} does not split into {WORLD} processes x {cfg.accumulate} passes "
                   "(--accumulate)")
    if cfg.sample_steps > cfg.timesteps:
        raise Stop(f"--sample-steps {cfg.sample_steps} cannot be more than --timesteps {cfg.timesteps}")
    level_multipliers(cfg)
    return cfg


def read_config(folder):
    """The settings in a run's config.json as a dict; Stop if there is none."""
    try:
        saved = dict(json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")))
        return {f.name: f.type(saved[f.name]) for f in dataclasses.fields(Config) if f.name in saved}
    except (OSError, ValueError, TypeError) as error:
        raise Stop(f"{folder} is not the folder of a run: its config.json cannot be read ({error})") from None


def level_multipliers(cfg):
    """Channel factors of the U-Net's levels from the flag; Stop if they are none, or the images cannot be halved."""
    factors = [int(m) if m.isdecimal() else 0 for m in cfg.multipliers.split(",")]
    if min(factors) < 1 or cfg.image_size % 2 ** (len(factors) - 1) or cfg.channels % 4:
        raise Stop(f"--image-size {cfg.image_size} must divide by 2 at every level but the last of --multipliers "
                   f"{cfg.multipliers} (whole numbers like 1,2,2,2), and --channels {cfg.channels} by 4")
    return factors


# --------------------------------------------------------------------------------------------------------------------
# 2  Data: every set becomes one uint8 tensor
# --------------------------------------------------------------------------------------------------------------------

SHAPES = ("circle", "square", "triangle", "diamond", "plus", "cross", "ring", "crescent", "bar", "star")
SHAPE_ATTRIBUTES = ("warm hue", "bright background", "large", "left of centre", "dot")
SHAPE_SPLITS = {"train": (20_000, 0), "test": (4_000, 1), "judge": (20_000, 12)}     # images, seed; judge: train_judge


@dataclasses.dataclass
class Dataset:
    """images: uint8 [N, C, H, W]; labels: int64 [N] or None; attributes: bool [N, A] or None."""
    images: torch.Tensor
    labels: torch.Tensor | None
    classes: list
    attributes: torch.Tensor | None = None
    attribute_names: tuple = ()


def signed_distance(figure, x, y):
    """Signed distance, negative inside, from points x, y (y upwards) to one of SHAPES with a radius of about 1."""
    radius, half, height = torch.hypot(x, y), math.sqrt(0.5), math.sqrt(0.75)
    def box(x, y, width, height):
        return torch.maximum(x.abs() - width, y.abs() - height)
    def plus(x, y):
        return torch.minimum(box(x, y, 0.95, 0.28), box(x, y, 0.28, 0.95))
    if figure == "star":        # fold the plane into ten wedges; the outline there runs from (1, 0) to an inner corner
        angle = math.pi / 5 - (torch.atan2(x, y).remainder(math.tau / 5) - math.pi / 5).abs()       # 0 at a tip
        u, v = radius * angle.cos() - 1, radius * angle.sin()
        edge = (0.42 * math.cos(math.pi / 5) - 1, 0.42 * math.sin(math.pi / 5))
        return (edge[1] * u - edge[0] * v) / math.hypot(*edge)
    return {"circle": lambda: radius - 0.85,
            "square": lambda: box(x, y, 0.78, 0.78),
            "triangle": lambda: torch.maximum(-y, x.abs() * height + y / 2) - 0.52,
            "diamond": lambda: (x.abs() + y.abs() - 1) * half,
            "plus": lambda: plus(x, y),
            "cross": lambda: plus((x + y) * half, (x - y) * half),
            "ring": lambda: (radius - 0.68).abs() - 0.24,
            "crescent": lambda: torch.maximum(radius - 0.95, 0.72 - torch.hypot(x - 0.48, y)),
            "bar": lambda: box(x, y, 1.0, 0.26)}[figure]()


def make_shapes(n, size=16, seed=0, bias=0.5):
    """n antialiased coloured figures on grey, [n, 3, size, size], with 10 classes and 5 known attributes.

    bias: probability that an image has its corner dot exactly if its hue is warm, both staying at one half each:
    0.5 is independence, more plants a correlation. Another seed gives other images.
    """
    gen = torch.Generator().manual_seed(seed)
    def uniform(low, high):
        return low + (high - low) * torch.rand(n, 1, 1, generator=gen)                                # [n, 1, 1]
    labels = torch.randint(len(SHAPES), (n,), generator=gen)
    warm, bright, large, left = torch.rand(4, n, 1, 1, generator=gen) < 0.5
    dot = warm ^ (uniform(0, 1) >= bias)
    radius = torch.where(large, uniform(0.80, 0.88), uniform(0.58, 0.66))
    centre_x, centre_y = uniform(0.05, 0.18) * torch.where(left, -1, 1), uniform(-0.15, 0.15)
    turn, grey = uniform(-0.15, 0.15), torch.where(bright, uniform(0.6, 0.85), uniform(0.05, 0.3))  # radians; 0 to 1
    hue = 6 * torch.where(warm, uniform(-0.07, 0.15), uniform(0.42, 0.74))          # pink to yellow; green to violet
    k = (hue + torch.tensor([5.0, 3.0, 1.0])).remainder(6)                          # HSV to RGB, [n, 1, 3]
    colour = uniform(0.8, 1) * (1 - uniform(0.8, 1) * torch.minimum(k, 4 - k).clamp(0, 1))

    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    x, y = (axis - centre_x) / radius, (centre_y - axis[:, None]) / radius          # [n, 1, W], [n, H, 1]
    x, y = turn.cos() * x + turn.sin() * y, turn.cos() * y - turn.sin() * x         # [n, H, W]
    distance = torch.empty(n, size, size)
    for label, figure in enumerate(SHAPES):
        distance[labels == label] = signed_distance(figure, x[labels == label], y[labels == label])
    def paint(image, distance, colour):                       # distance, in halves of the image -> coverage of a pixel
        ink = (0.5 - distance * size / 2).clamp(0, 1)
        return image * (1 - ink) + colour * ink
    spot = torch.where(dot, torch.hypot(axis + 0.76, axis[:, None] + 0.76) - 0.16, 9)               # upper left corner
    images = [paint(paint(grey, distance * radius, colour[..., c:c + 1]), spot, (~bright).float()) for c in range(3)]
    return Dataset((torch.stack(images, 1) * 255).round().to(torch.uint8), labels, list(SHAPES),
                   torch.stack([warm, bright, large, left, dot], 1).flatten(1), SHAPE_ATTRIBUTES)


def seeded_split(n, split, fraction):
    """Indices of a fixed random split, for sets that come without one: `fraction` for test, the rest for train."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).tolist()
    held_out = max(1, round(n * fraction))
    return sorted(order[:held_out] if split == "test" else order[held_out:])


def read_folder(root, split):
    """DIR/train/<class>/* with or without DIR/test, DIR/<class>/*, or a flat DIR -> image files, labels, class names.

    Without DIR/test a tenth of the images, always the same, is the test split. A flat folder has no labels (None).
    """
    def images_in(folder):
        files = (p for p in sorted(folder.rglob("*")) if p.suffix.lower() in IMG_EXTENSIONS)
        return [p for p in files if not any(part.startswith(".") for part in p.relative_to(folder).parts)]
    top = root / "train" if (root / "train").is_dir() else root
    files, base = images_in(top), top
    if len(files) < 2:
        raise Stop(f"{top} holds {len(files)} images: --data-dir must name a folder with train/<class>/*, <class>/* "
                   "or images")
    loose = [p for p in files if p.parent == top]
    if loose and len(loose) < len(files):
        raise Stop(f"{top} holds images, like {loose[0].name}, beside folders of images: move them")
    classes = [] if loose else sorted({p.relative_to(top).parts[0] for p in files})
    if top == root or not (root / "test").is_dir():
        files = [files[i] for i in seeded_split(len(files), split, 0.1)]
    elif split == "test":
        files, base = images_in(root / "test"), root / "test"
    names = [p.relative_to(base).parts[0] for p in files if classes]
    if not files or not set(names) <= set(classes):
        raise Stop(f"{base} must hold images of the classes in {top}, and of no others")
    return files, [classes.index(name) for name in names] if classes else None, classes


def read_published(name, split, root):
    """A published set, downloaded if need be -> images or files, labels, classes (and attributes, their names)."""
    train, sets = split == "train", torchvision.datasets
    if name == "cifar10":
        data = sets.CIFAR10(root, train, download=True)
        return data.data, data.targets, data.classes                                      # uint8 [N, 32, 32, 3]
    if name == "stl10":
        data = sets.STL10(root, split, download=True)
        return data.data.transpose(0, 2, 3, 1), data.labels, data.classes                 # uint8 [N, 96, 96, 3]
    if name == "fashion-mnist":
        data = sets.FashionMNIST(root, train, download=True)
        return np.pad(data.data.numpy(), ((0, 0), (2, 2), (2, 2))), data.targets, data.classes
    if name == "eurosat":
        data = sets.EuroSAT(root, download=True)
        files, labels = zip(*(data.samples[i] for i in seeded_split(len(data.samples), split, 0.2)))
        return files, labels, data.classes
    if name == "celeba":                                      # its download needs another package: unpacked by hand
        data = sets.CelebA(root, split, target_type="attr")
        names, folder = [n for n in data.attr_names if n], Path(root, "celeba", "img_align_celeba")
        files = [folder / f for f in data.filename]
        return files, data.attr[:, names.index("Male")], ["not male", "male"], data.attr.bool(), tuple(names)
    folder = Path(root, "tiny-imagenet-200")
    if not folder.is_dir():
        sets.utils.download_and_extract_archive("http://cs231n.stanford.edu/tiny-imagenet-200.zip", root,
                                                md5="90528d7ca1a48142e341f4ef8d21d0de")
    ids, lines = (folder / "wnids.txt").read_text().split(), (folder / "words.txt").read_text().splitlines()
    words = dict(line.split("\t") for line in lines)
    if train:
        files = sorted((folder / "train").glob("*/images/*.JPEG"))
        owners = [f.parts[-3] for f in files]
    else:
        lines = [line.split("\t") for line in (folder / "val" / "val_annotations.txt").read_text().splitlines()]
        files, owners = [folder / "val" / "images" / line[0] for line in lines], [line[1] for line in lines]
    return files, [ids.index(i) for i in owners], [words[i].split(",")[0] for i in ids]


def decode(item, size):
    """An image file or uint8 array -> uint8 RGB [size, size, 3]: the shorter side scaled to size, the centre kept."""
    try:
        image = Image.fromarray(item) if isinstance(item, np.ndarray) else ImageOps.exif_transpose(Image.open(item))
        return np.array(ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS))
    except Exception as error:                                # Pillow raises many kinds, all of one meaning
        raise Stop(f"{item} does not decode as an image ({error}): replace it or take it away") from None


def load_dataset(name, split="train", image_size=None, data_dir="data"):
    """A data set in memory, decoded once and cached beside the data in prototype-*.pt.

    name: a key of Config.PRESETS; split: train or test; image_size: pixels (None: the preset's).
    Returns a Dataset. Raises Stop for an unknown name, missing or unreadable data, no network.
    """
    if name not in Config.PRESETS:
        raise Stop(f"there is no data set '{name}': choose one of {', '.join(Config.PRESETS)}")
    if split not in (SHAPE_SPLITS if name == "shapes" else ("train", "test")):
        raise Stop(f"{name} has no split '{split}': choose train or test")
    size = image_size or Config.PRESETS[name].get("image_size", Config.image_size)
    if name == "shapes":
        n, seed = SHAPE_SPLITS[split]
        return make_shapes(n, size, seed)
    root, key, attributes = Path(data_dir), [], ()
    if name == "folder":
        if not root.is_dir():
            raise Stop(f"there is no folder {root}: --data-dir must name a folder of images")
        items, labels, classes = read_folder(root, split)
        key = [*classes, *(f"{p.relative_to(root)} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in items)]
    cache = root / f"prototype-{name}-{split}-{size}.pt"
    with contextlib.suppress(Exception):                      # there is none, or not a whole one: make it
        saved = torch.load(cache, weights_only=True)
        if saved.pop("key") == key:
            return Dataset(**saved)
    if name != "folder":
        try:
            items, labels, classes, *attributes = read_published(name, split, data_dir)
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            advice = "put its img_align_celeba/ and .txt files, from mmlab.ie.cuhk.edu.hk/projects/CelebA.html, in " \
                "celeba/ there" if name == "celeba" else "check the network, or put the files of the data set there"
            raise Stop(f"{name} cannot be read in {root} ({error}): {advice}") from None
    images = torch.empty(len(items), 3, size, size, dtype=torch.uint8)
    with ThreadPoolExecutor() as pool:
        for i, array in enumerate(pool.map(decode, items, [size] * len(items))):
            images[i] = torch.from_numpy(array).permute(2, 0, 1)
    if (images == images[:, :1]).all():                       # grey throughout
        images = images[:, :1].clone()
    labels = None if labels is None else torch.as_tensor(np.array(labels), dtype=torch.int64)
    data = Dataset(images, labels, list(classes), *attributes)
    try:
        save_safely({**vars(data), "key": key}, cache)
    except Stop as error:
        print(f"note: {error}; the images will be decoded again next time")
    return data


def save_safely(content, path):
    """Write .json, .npz or .pt by way of a temporary neighbour: a kill leaves the old file or the new, never half."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        if path.suffix == ".json":
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        elif path.suffix == ".npz":
            with open(temporary, "wb") as file:
                np.savez(file, **content)
        else:
            torch.save(content, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:                  # no permission, no space
        temporary.unlink(missing_ok=True)
        raise Stop(f"{path} cannot be written ({error})") from None


def place_images(images, device):
    """uint8 images where batches are drawn from: on the device if they fill less than half of its free memory."""
    too_large = device.type == "cuda" and images.nbytes > torch.cuda.mem_get_info(device)[0] / 2
    return images if too_large else images.to(device)


def scaled(images, index, device, flip=None):
    """uint8 images[index] -> float32 [B, C, H, W] in [-1, 1] on the device; flip: bool [B], which to mirror."""
    x = images[index]
    if x.device.type == "cpu" and device.type == "cuda":
        x = x.pin_memory()
    x = x.to(device, non_blocking=True).float() / 127.5 - 1
    return x if flip is None else torch.where(flip[:, None, None, None], x.flip(-1), x)


# --------------------------------------------------------------------------------------------------------------------
# 3  Prototypes: the section that differs between the three scripts
# --------------------------------------------------------------------------------------------------------------------

def feature_encoder(channels, dim):
    """f_phi, the paper's feature encoder: images [B, channels, S, S] in [-1, 1], S >= 16 -> features z [B, dim]."""
    def halve(c_in, c_out):
        return nn.Conv2d(c_in, c_out, 4, stride=2, padding=1)
    return nn.Sequential(halve(channels, 64), nn.ReLU(), halve(64, 128), nn.BatchNorm2d(128), nn.ReLU(),
                         halve(128, 256), nn.BatchNorm2d(256), nn.ReLU(), halve(256, dim),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten())


def distances(z, prototypes):
    """||z - e||, not squared, in float32: z [B, D], prototypes [K, D] -> [B, K]."""
    return torch.cdist(z.float(), prototypes.float(), compute_mode="donot_use_mm_for_euclid_dist")


# exercise
def contrastive_loss(d, k, tau):
    """Cross-entropy of softmax(-tau d) against the chosen prototype: distances d [B, K], k [B] -> mean over B."""
    return F.cross_entropy(-tau * d, k)


# exercise
def alignment_loss(z, prototypes, k):
    """Squared error between z [B, D] and the chosen prototype, mean over elements; it moves both, no stop-gradient."""
    return F.mse_loss(z, prototypes[k])


# exercise
def compactness_loss(prototypes):
    """Sum of squared cosines between different prototypes [K, D]: 0 if orthogonal, at most K (K - 1)."""
    e = F.normalize(prototypes, dim=1)
    return ((e @ e.T) * (1 - torch.eye(len(e), device=e.device))).square().sum()


@torch.no_grad()
def spread_points(z, n, seed):
    """k-means++ (Arthur & Vassilvitskii 2007): n of the points z [N, D], each drawn by squared distance -> [n, D]."""
    gen = torch.Generator().manual_seed(seed_of(seed, 7))
    z = z.float().cpu()
    chosen = [torch.randint(len(z), (), generator=gen)]
    nearest = (z - z[chosen[0]]).square().sum(1)
    while len(chosen) < n:
        chosen.append(torch.multinomial(nearest + 1e-12, 1, generator=gen)[0])
        nearest = torch.minimum(nearest, (z - z[chosen[-1]]).square().sum(1))
    return z[torch.stack(chosen)]


@torch.no_grad()
def k_means(z, n, seed, restarts=20, rounds=20):
    """The best of some runs of k-means (Lloyd 1982) on points z [N, D], started by k-means++ -> n centres [n, D]."""
    best, least = None, math.inf
    for restart in range(restarts):
        centres = spread_points(z, n, seed + restart)
        for _ in range(rounds):
            d = distances(z, centres)
            member = F.one_hot(d.argmin(1), n).float()                              # [N, n]
            size = member.sum(0)[:, None]
            centres = torch.where(size > 0, member.T @ z / size.clamp(min=1), centres)
        if (error := distances(z, centres).amin(1).square().sum().item()) < least:
            best, least = centres, error
    return best


class PrototypeAttention(nn.Module):
    """The paper's cross-attention: pixels h [B, C, H, W] ask, tokens [B, n, D] answer; 8 heads, residual.

    bias [B, n]: added to the logits. With n = 1 the softmax is 1 whatever the pixel holds: a linear map of the token,
    the same everywhere; the queries then receive no gradient.
    """
    def __init__(self, channels, dim, heads=8):
        super().__init__()
        self.heads = math.gcd(heads, channels)
        self.norm, self.q = group_norm(channels), nn.Linear(channels, channels)
        self.kv, self.out = nn.Linear(dim, 2 * channels), zeroed(nn.Linear(channels, channels))

    # exercise
    def forward(self, h, tokens, bias=None):
        """h + out(softmax(q k^T / sqrt(c) + bias) v) -> [B, C, H, W]; q from normalised pixels, (k, v) = kv(tokens).

        Each head has its own c = C / heads channels of q, k and v; out mixes what all of them found.
        """
        B, C, H, W = h.shape
        q = self.q(self.norm(h).flatten(2).transpose(1, 2)).view(B, H * W, self.heads, -1).transpose(1, 2)
        k, v = self.kv(tokens).view(B, -1, 2, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)   # [B, heads, n, c]
        mask = None if bias is None else bias[:, None, None].to(q.dtype)            # [B, 1, 1, n]
        given = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).reshape(B, H * W, C)
        return h + self.out(given).transpose(1, 2).reshape(B, C, H, W)


class PDM(nn.Module):
    """Noise predictor eps(xt, t, k): a U-Net that attends to prototype k before its middle block; k = -1: to none.

    In training also the clean image: forward(xt, t, label, x0, hidden) -> noise, losses. The label [B] chooses the
    prototype (s-PDM); with label None the nearest to f_phi(x0) is chosen (PDM). hidden, bool [B]: denoise without it.
    counts, usage [K]: how often a prototype was chosen in this epoch so far, and in the whole one before (epoch: as
    many images as there are; with several processes, those of the first).
    """
    def __init__(self, unet, image_channels, channels, K, dim, attend_all=False, images=1, tau=1.0, revive=False):
        super().__init__()
        self.unet, self.images, self.tau, self.revive = unet, images, tau, revive
        self.encoder, self.attention = feature_encoder(image_channels, dim), PrototypeAttention(channels, dim)
        self.prototypes = nn.Parameter(torch.empty(K, dim).uniform_(-0.1, 0.1))
        self.null = nn.Parameter(0.1 * torch.randn(dim))      # stands for "no prototype"
        self.bias = nn.Parameter(torch.ones(())) if attend_all else None
        self.register_buffer("counts", torch.zeros(K, dtype=torch.int64))
        self.register_buffer("usage", torch.zeros(K, dtype=torch.int64))

    def denoise(self, xt, t, k):
        emb = self.unet.time_mlp(time_embedding(t, self.unet.channels))
        h, skips = self.unet.encode(xt, emb)
        chosen, bias = k[:, None], None                       # keys: the chosen prototype alone, [B, 1]
        if self.bias is not None:                             # or all, [B, K], with a bias towards the chosen
            chosen = torch.arange(len(self.prototypes), device=k.device).expand(len(k), -1)
            bias = self.bias * (chosen == k[:, None])
        tokens = torch.where((k < 0)[:, None, None], self.null, self.prototypes[chosen])            # [B, n, D]
        tokens = tokens + time_embedding(t, tokens.shape[-1])[:, None]
        return self.unet.decode(self.attention(h, tokens, bias), skips, emb)

    @torch.no_grad()
    def count(self, k):
        """Count the choices k [B]; when the epoch is full, begin the next."""
        full = self.counts.sum() >= self.images
        self.usage.copy_(torch.where(full, self.counts, self.usage))
        chosen = (k[:, None] == torch.arange(len(self.counts), device=k.device)).sum(0)             # no host sync
        self.counts.copy_(torch.where(full, 0, self.counts) + chosen)

    @torch.no_grad()
    def move_dead(self, z):
        """At the end of an epoch: prototypes that no image chose move to the images of this batch farthest from any."""
        dead = (self.counts.sum() >= self.images) & (self.counts == 0)              # [K]
        far = distances(z, self.prototypes).amin(1).argsort(descending=True)        # [B]
        place = z[far[(dead.cumsum(0) - 1).clamp(0, len(z) - 1)]]                   # the first dead takes the farthest
        self.prototypes.copy_(torch.where(dead[:, None], place, self.prototypes))

    # exercise
    def learn(self, x0, label):
        """Choose prototypes for clean images x0 [B, C, S, S] -> k [B], the prototype losses, and statistics to log.

        k = argmin_k ||z - e_k||, z = f_phi(x0), or the label; `count` it. Losses by name: contrastive, alignment,
        without labels also compactness; all of this in float32 under autocast too. With --revive and no labels dead
        prototypes move first. Statistics: "variance of z", over the batch (divided by B) and summed over D; "usage
        perplexity", exp of the entropy of the shares that prototypes have of counts + usage; "dead prototypes", of
        share 0.
        """
        with torch.autocast(x0.device.type, enabled=False):   # float16 could overflow, and BatchNorm would remember
            z = self.encoder(x0)
            if self.revive and label is None:
                self.move_dead(z)
            d = distances(z, self.prototypes)
            k = d.argmin(1) if label is None else label
            self.count(k)
            losses = {"contrastive": contrastive_loss(d, k, self.tau),
                      "alignment": alignment_loss(z, self.prototypes, k)}
            if label is None:
                losses["compactness"] = compactness_loss(self.prototypes)
        share = (self.counts + self.usage) / (self.counts + self.usage).sum()       # of the last one or two epochs
        return k, losses, {"variance of z": z.detach().var(0, correction=0).sum(),
                           "usage perplexity": torch.special.entr(share).sum().exp(),
                           "dead prototypes": (share == 0).sum().float()}

    def forward(self, xt, t, k, x0=None, hidden=None):
        if x0 is None:
            return self.denoise(xt, t, k)
        k, losses, statistics = self.learn(x0, k)
        return self.denoise(xt, t, torch.where(hidden, -1, k)), losses, statistics

    def param_groups(self, cfg):
        rest = [p for name, p in self.named_parameters() if not name.startswith("encoder.")]
        return [dict(params=rest, factor=1.0, start=0),
                dict(params=list(self.encoder.parameters()), factor=cfg.encoder_lr, start=0)]

    @torch.no_grad()
    def begin(self, images, labels, cfg, device):
        """Start the prototypes at centres of features of real images, or (labels given) at the mean of each class.

        The bias of the last layer first moves the mean of the features to zero: else all prototypes point one way, and
        the compactness loss tears them from their images at once.
        """
        index = random_index(images, min(2000, len(images)), cfg.seed, 8)
        z = self.to(device).train().encoder(scaled(images, index, device)).float()
        last = [layer for layer in self.encoder if isinstance(layer, nn.Conv2d)][-1]
        last.bias -= z.mean(0)
        z = (z - z.mean(0)).cpu()
        if labels is None:
            start = k_means(z, len(self.prototypes), cfg.seed)
        else:
            member = F.one_hot(labels[index].cpu(), len(self.prototypes)).float()   # [N, K]
            start = member.T @ z / member.sum(0)[:, None].clamp(min=1)
        self.prototypes.copy_(start)

    @torch.no_grad()
    def choose(self, images, device):
        """uint8 images [N, C, S, S] -> features z [N, D] and the nearest prototype k [N], on the CPU, in eval mode."""
        z = features_of(self.encoder, images, device)
        return z, torch.cat([distances(part, self.prototypes.cpu()).argmin(1) for part in z.split(1000)])


class Unconditional(nn.Module):
    """The baseline: the same U-Net, told nothing. k is taken and left alone."""
    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, xt, t, k):
        return self.unet(xt, t)

    def param_groups(self, cfg):
        return [dict(params=list(self.parameters()), factor=1.0, start=0)]


def pdm_loss(cfg, net, batch, abar):
    """L_diff + L_con + alpha L_align + beta L_comp, the whole loss; each also on its own, and the statistics of learn.

    The noise loss reaches prototypes through the chosen row; f_phi receives gradients from the prototype losses alone.
    """
    if cfg.conditioning == "none":
        return {"loss": noise_loss(net, batch.x0, batch.target, batch.t, batch.eps, abar)}
    label, hidden = batch.target if cfg.supervised else None, batch.chance < cfg.null_prob
    eps, losses, statistics = net(add_noise(batch.x0, batch.t, batch.eps, abar), batch.t, label, batch.x0, hidden)
    diffusion = F.mse_loss(eps.float(), batch.eps)
    weights = {"contrastive": 1.0, "alignment": cfg.alignment, "compactness": cfg.compactness}
    total = diffusion + sum(weights[name] * loss for name, loss in losses.items())
    return {"loss": total, "diffusion": diffusion, **losses, **statistics}


def contingency(k, labels, K, C):
    """How many images of class c have prototype k: choices k [N], labels [N] -> float64 [K, C]."""
    return torch.bincount(k * C + labels, minlength=K * C).view(K, C).double()


def purity(table):
    """Share of images that belong to the commonest class of their prototype: contingency table [K, C] -> 0 to 1."""
    return (table.amax(1).sum() / table.sum()).item()


def normalised_mutual_information(table):
    """I(prototype; class) over the mean of both entropies: contingency table [K, C] -> 0 (independent) to 1."""
    p = table / table.sum()
    rows, columns = torch.special.entr(p.sum(1)).sum(), torch.special.entr(p.sum(0)).sum()
    shared = rows + columns - torch.special.entr(p).sum()
    return (2 * shared / (rows + columns)).item() if rows + columns > 0 else 1.0


def resemblance(z, k, most=2000):
    """Mean distance between features z [N, D] of one prototype, over that between prototypes: k [N] -> ratio.

    Below 1, images of one prototype are more alike than images of different ones. NaN where one kind has no pairs.
    """
    some = torch.randperm(len(z), generator=torch.Generator().manual_seed(0))[:most]
    z, k = z[some], k[some]
    d, same = torch.cdist(z, z), k[:, None] == k
    other = ~torch.eye(len(z), dtype=torch.bool)
    return (d[same & other].mean() / d[~same].mean()).item()


# --------------------------------------------------------------------------------------------------------------------
# 4  U-Net (Ho et al. 2020, DDPM)
# --------------------------------------------------------------------------------------------------------------------

def time_embedding(t, dim):
    """Sinusoids of the noise level (Vaswani et al. 2017, section 3.5): t [B] -> [B, dim], dim even."""
    frequency = torch.exp(-math.log(10_000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angle = t.float()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def group_norm(channels):
    """32 groups, or fewer, of at least 4 channels: a channel normalised alone forgets its mean, the colour."""
    return nn.GroupNorm(math.gcd(32, channels // 4), channels)


def zeroed(layer):
    """The layer with its weights at zero: the block that it closes starts as the identity."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ResBlock(nn.Module):
    """x [B, c_in, H, W], emb [B, E] -> [B, c_out, H, W]."""
    def __init__(self, c_in, c_out, emb_dim, dropout):
        super().__init__()
        self.norm1, self.conv1 = group_norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(emb_dim, c_out)
        self.norm2, self.conv2 = group_norm(c_out), zeroed(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.emb(F.silu(emb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.skip(x) + h


class Attention(nn.Module):
    """Self-attention over the pixels of x [B, C, H, W], in heads of 64 channels (one head if C is no multiple)."""
    def __init__(self, channels):
        super().__init__()
        self.heads = channels // 64 if channels % 64 == 0 else 1
        self.norm, self.qkv = group_norm(channels), nn.Linear(channels, 3 * channels)
        self.out = zeroed(nn.Linear(channels, channels))

    def forward(self, x, emb):
        B, C, H, W = x.shape
        pixels = self.norm(x).flatten(2).transpose(1, 2)                            # [B, HW, C]
        qkv = self.qkv(pixels).view(B, H * W, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                        # each [B, heads, HW, C / heads]
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, H * W, C)
        return x + self.out(h).transpose(1, 2).reshape(B, C, H, W)


class Stage(nn.ModuleList):
    """Blocks one after the other, each of which sees the embedding."""
    def forward(self, x, emb):
        for block in self:
            x = block(x, emb)
        return x


class UNet(nn.Module):
    """DDPM's noise predictor: x [B, C, S, S], t [B] in 0..T-1, condition [B, emb_dim] or None -> [B, C, S, S].

    The condition is added to the time embedding, which every residual block reads. Attention at levels whose side is
    at most `attention`, and in the middle. S must be divisible by 2 ** (levels - 1). The output starts at zero.
    """
    def __init__(self, image_channels, side, channels, multipliers, blocks, attention, dropout):
        super().__init__()
        self.channels, self.emb_dim, E = channels, 4 * channels, 4 * channels
        self.time_mlp = nn.Sequential(nn.Linear(channels, E), nn.SiLU(), nn.Linear(E, E))
        self.first = nn.Conv2d(image_channels, channels, 3, padding=1)
        self.down, self.up, skips, c = nn.ModuleList(), nn.ModuleList(), [channels], channels

        def level_block(c_in, c_out, level):
            attend = [Attention(c_out)] if side >> level <= attention else []
            return Stage([ResBlock(c_in, c_out, E, dropout), *attend])
        for level, m in enumerate(multipliers):
            if level > 0:
                self.down.append(nn.Conv2d(c, c, 3, stride=2, padding=1))
                skips.append(c)
            for _ in range(blocks):
                self.down.append(level_block(c, m * channels, level))
                c = m * channels
                skips.append(c)
        self.middle = Stage([ResBlock(c, c, E, dropout), Attention(c), ResBlock(c, c, E, dropout)])
        for level, m in reversed(list(enumerate(multipliers))):
            for _ in range(blocks + 1):
                self.up.append(level_block(c + skips.pop(), m * channels, level))
                c = m * channels
            if level > 0:
                self.up.append(nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(c, c, 3, padding=1)))
        self.last = nn.Sequential(group_norm(c), nn.SiLU(), zeroed(nn.Conv2d(c, image_channels, 3, padding=1)))

    def encode(self, x, emb):
        """x [B, C, S, S], emb [B, E] -> features before the middle, [B, c, s, s], and those that skip it."""
        h = self.first(x)
        skips = [h]
        for layer in self.down:
            h = layer(h, emb) if isinstance(layer, Stage) else layer(h)
            skips.append(h)
        return h, skips

    def decode(self, h, skips, emb):
        h = self.middle(h, emb)
        for layer in self.up:
            h = layer(torch.cat([h, skips.pop()], dim=1), emb) if isinstance(layer, Stage) else layer(h)
        return self.last(h)

    def forward(self, x, t, condition=None):
        emb = self.time_mlp(time_embedding(t, self.channels))                       # [B, E]
        emb = emb if condition is None else emb + condition
        return self.decode(*self.encode(x, emb), emb)


# --------------------------------------------------------------------------------------------------------------------
# 5  Diffusion: process, loss, guidance, samplers (float32; only the network runs in mixed precision)
# --------------------------------------------------------------------------------------------------------------------

def alpha_bars(T):
    """abar [T], float32: cumulative product of 1 - beta, betas linear from 1e-4 to 0.02 at T = 1000 (DDPM, section 4).

    Another T scales the betas by 1000 / T, which keeps abar's course. Stop if a beta would reach 1.
    """
    betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * 1000 / T
    if betas.max() >= 1:
        raise Stop(f"--timesteps {T} are too few, a noise variance would reach 1: take 21 or more")
    return (1 - betas).cumprod(0).float()


# exercise
def add_noise(x0, t, eps, abar):
    """Forward process xt = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps (DDPM eq. 4). x0, eps, xt [B, C, H, W]; t [B]."""
    a = abar[t][:, None, None, None]
    return a.sqrt() * x0 + (1 - a).sqrt() * eps


# exercise
def noise_loss(model, x0, condition, t, eps, abar):
    """Squared error of the predicted noise, mean over all elements (DDPM eq. 14), in float32.

    The prediction is model(xt, t, condition), of add_noise's xt; in mixed precision it may come in 16 bits.
    """
    return F.mse_loss(model(add_noise(x0, t, eps, abar), t, condition).float(), eps)


# exercise
def guided_noise(model, x, t, condition, null, w):
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6): (1 + w) eps(x, c) - w eps(x, null), [B, C, H, W].

    Both halves, c first, go through the network as one batch; w = 0 costs one pass of the plain batch. float32.
    """
    if w == 0:
        return model(x, t, condition).float()
    both = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([condition, null])).float()
    given, free = both.chunk(2)
    return (1 + w) * given - w * free


def sample_times(T, steps):
    """The noise levels of a run of 1 <= steps <= T: trailing spacing, round(T - i T / steps) - 1, T - 1 first."""
    return [round(T - i * T / steps) - 1 for i in range(steps)]


# exercise
def ddim_step(x, x0, eps, a, a_next, eta=0.0, noise=None):
    """Song et al. 2021, eq. 12: x at abar a, with predictions x0 and eps -> x at abar a_next. eta = 1: ddpm_step.

    sqrt(a_next) x0 + sqrt(1 - a_next - sigma^2) eps + sigma noise, where sigma = eta sqrt((1 - a_next) / (1 - a))
    sqrt(1 - a / a_next) (eq. 16). Rounding may bring what is under the second root below 0. eta = 0 needs no noise.
    """
    sigma = eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)).sqrt()                # Song eq. 16
    mean = a_next.sqrt() * x0 + (1 - a_next - sigma ** 2).clamp(min=0).sqrt() * eps
    return mean if eta == 0 else mean + sigma * noise


def ddpm_step(x, x0, a, a_next, noise):
    """The posterior q(x_next | x, x0) (DDPM eq. 6-7); on a subsequence of the levels, beta is 1 - a / a_next."""
    beta = 1 - a / a_next
    mean = (a_next.sqrt() * beta * x0 + (a / a_next).sqrt() * (1 - a_next) * x) / (1 - a)
    return mean + ((1 - a_next) / (1 - a) * beta).sqrt() * noise


# exercise
def dpmpp_step(x, x0, a, a_next, x0_before=None, a_before=None):
    """DPM-Solver++(2M) (Lu et al. 2022, alg. 2); first order without the step before, and to the clean image.

    lambda = log(sqrt(a) / sqrt(1 - a)). The last step (a_next = 1) is infinite in lambda, which leaves no second order.
    With h = lambda_next - lambda: sqrt((1 - a_next) / (1 - a)) x - sqrt(a_next) (exp(-h) - 1) D. First order: D = x0;
    second: D = (1 + 1 / 2r) x0 - x0_before / 2r, where r = (lambda - lambda_before) / h.
    """
    def log_snr(a):
        return 0.5 * (a.log() - (1 - a).log())
    h, D = log_snr(a_next) - log_snr(a), x0                   # D: the image that the step aims at, as in Lu
    if x0_before is not None and a_next < 1:
        r = (log_snr(a) - log_snr(a_before)) / h
        D = (1 + 1 / (2 * r)) * x0 - x0_before / (2 * r)
    return ((1 - a_next) / (1 - a)).sqrt() * x - a_next.sqrt() * torch.expm1(-h) * D


@torch.no_grad()
def sample(predict, xT, abar, steps=20, sampler="dpmpp", eta=0.0, clip=True, generator=None, trace=None):
    """From noise to images, one loop for all samplers: xT ~ N(0, I) [B, C, H, W] -> x0 [B, C, H, W].

    predict(x, t [B]) -> noise [B, C, H, W], float32. clip: clamp the predicted image to [-1, 1] and derive the noise
    from it again. generator: of the noise that ddpm, and ddim with eta > 0, add. trace: a list, gets (t, x) per step.
    """
    x, times, before = xT, sample_times(len(abar), steps), ()
    levels = [*abar.cpu()[times], torch.ones(())]             # on the CPU: nobody waits for the device
    for t, a, a_next in zip(times, levels, levels[1:]):
        if trace is not None:
            trace.append((t, x))
        eps = predict(x, torch.full((len(x),), t, device=x.device))
        x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()            # DDPM eq. 4, solved for x0
        if clip:
            x0 = x0.clamp(-1, 1)
            eps = (x - a.sqrt() * x0) / (1 - a).sqrt()
        noise = torch.randn(x.shape, generator=generator, device=x.device) if sampler == "ddpm" or eta > 0 else None
        if sampler == "dpmpp":
            x, before = dpmpp_step(x, x0, a, a_next, *before), (x0, a)
        else:
            x = ddpm_step(x, x0, a, a_next, noise) if sampler == "ddpm" else \
                ddim_step(x, x0, eps, a, a_next, eta, noise)
    return x


def generate(model, cfg, conditions, shape, device, trace=None):
    """One image for each condition (int64 [N], the model's third input, null is -1) -> uint8 [N, C, H, W] on the CPU.

    shape: [C, H, W]. The same cfg.seed and sample_batch give the same images. Stop if
    they are no numbers.
    """
    abar, dtype, gen, images = alpha_bars(cfg.timesteps), amp_dtype(device, cfg.amp), torch.Generator(device), []
    compiled = torch.compile(model, dynamic=False) if cfg.compile else model
    for i, given in enumerate(conditions.to(device).split(cfg.sample_batch)):
        network = compiled if len(given) == cfg.sample_batch else model             # else compiling costs more
        gen.manual_seed(seed_of(cfg.seed, 2, i))
        xT = torch.randn(len(given), *shape, generator=gen, device=device)
        xT = xT.contiguous(memory_format=memory_format(device))

        def predict(x, t):
            with autocast(device, dtype):
                return guided_noise(network, x, t, given, torch.full_like(given, -1), cfg.guidance)
        x0 = sample(predict, xT, abar, cfg.sample_steps, cfg.sampler, generator=gen, trace=trace)
        if not x0.isfinite().all():
            raise Stop("the samples are not numbers: sample with --amp off, or train again with a lower --lr")
        images.append(to_uint8(x0))
        if sys.stdout.isatty():
            progress(f"sampling {i * cfg.sample_batch + len(given)}/{len(conditions)}")
    return torch.cat(images)


def to_uint8(x):
    """[-1, 1] -> 0..255, rounded, on the CPU."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()


# --------------------------------------------------------------------------------------------------------------------
# 6  Training: one flat loop for every method; the method is its loss
# --------------------------------------------------------------------------------------------------------------------

def find_device(name):
    """auto, cuda, cuda:1, mps or cpu -> torch.device with its index; Stop if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and WORLD > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise Stop(f"--device {name} is not there ({str(error).splitlines()[0]}): try cpu, or auto") from None


def choose_backends(device):
    """Switches that hold for the whole process. On a CPU, attention over small images is fastest as plain products."""
    torch.backends.cudnn.benchmark = True
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if device.type == "cpu":
        torch.backends.cuda.enable_flash_sdp(False)           # the CPU's too, in spite of its name
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)


def memory_format(device):
    """channels_last for a GPU's convolutions; on a CPU, bfloat16 group norm was up to 40 times slower in it."""
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def amp_dtype(device, amp):
    """bfloat16, float16 or None (float32). auto: bfloat16 where the hardware computes it, else float16 on CUDA."""
    if amp == "auto" and device.type == "cuda":
        amp = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"      # older cards emulate bf16
    elif amp == "auto":
        amp = "bf16" if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported() else "off"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]


def autocast(device, dtype):
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


def seed_of(*key):
    """One 32-bit seed from whole numbers: (seed of the run, purpose, step).

    Purposes: 0 a classifier's augmentation, 1 prototypes to sample from, 2 sampling, 3 images, 4 noise, 5 dropout;
    starts: 6 a random table, 7 k-means, 8 its images.
    """
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def random_index(images, n, *key):
    """Which n of the images a step sees, [n], with replacement; it follows from `key`, the seed and the step, alone."""
    gen = torch.Generator().manual_seed(seed_of(*key))        # on the CPU: the same wherever the images lie
    return torch.randint(len(images), (n,), generator=gen).to(images.device, non_blocking=True)


def random_batches(cfg, images, targets, step, device):
    """The passes of one step, for this process: x0 in [-1, 1], target, t, eps and chance (uniform, one an image).

    Everything follows from (seed, step), for the whole batch, of which each process and pass takes its rows. So there
    is no random state to save, and any number of processes or passes trains alike.
    """
    B, per_pass = cfg.batch_size, cfg.batch_size // (WORLD * cfg.accumulate)
    gen = torch.Generator(device).manual_seed(seed_of(cfg.seed, 4, step))
    t = torch.randint(cfg.timesteps, (B,), generator=gen, device=device)
    eps = torch.randn(B, *images.shape[1:], generator=gen, device=device)
    flip, chance = torch.rand(2, B, generator=gen, device=device)
    index = random_index(images, B, cfg.seed, 3, step)
    torch.manual_seed(seed_of(cfg.seed, 5, step, RANK))       # dropout
    for i in range(RANK * cfg.accumulate, (RANK + 1) * cfg.accumulate):
        part = slice(i * per_pass, (i + 1) * per_pass)
        x0 = scaled(images, index[part], device, flip[part] < 0.5 if cfg.mirror else None)
        yield SimpleNamespace(x0=x0.contiguous(memory_format=memory_format(device)), t=t[part], eps=eps[part],
                              target=targets[index[part].to(device)], chance=chance[part])


def learning_rate(step, cfg):
    """Linear warm-up over the fraction cfg.warmup of training, then half a cosine down to zero."""
    rising = max(1, round(cfg.warmup * cfg.steps))
    if step < rising:
        return cfg.lr * (step + 1) / rising
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, cfg.steps - rising)))


@torch.no_grad()
def update_average(average, model, n):
    """Exponential moving average of weights and buffers after update n = 0, 1, ...: decay min(0.9999, (1+n) / (10+n)).

    Choice: none of the three papers' code averages; samples come from the average. Whole-number buffers are copied.
    """
    decay = min(0.9999, (1 + n) / (10 + n))
    pairs = list(zip([*average.parameters(), *average.buffers()], [*model.parameters(), *model.buffers()]))
    floats = [(a, m) for a, m in pairs if a.is_floating_point()]
    torch._foreach_lerp_([a for a, _ in floats], [m for _, m in floats], 1 - decay)
    for a, m in pairs:
        if not a.is_floating_point():
            a.copy_(m)


def safe_step(optimizer, scaler):
    """Clip the gradient at norm 1 and update, but not with a gradient that is not finite. Returns 1.0 if so, else 0.0.

    The answer stays on the device, which nobody waits for: where found_inf is 1, fused AdamW leaves all as it is.
    """
    scaler.unscale_(optimizer)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.found_inf = bad = (~nn.utils.clip_grad_norm_(params, 1.0).isfinite()).float()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return bad


@contextlib.contextmanager
def interruptible():
    """Yields a list that Ctrl-C makes non-empty, so that a step can end first; Ctrl-C twice stops at once."""
    asked, before = [], signal.getsignal(signal.SIGINT)

    def ask(*_):
        asked.append(True)
        signal.signal(signal.SIGINT, before)
    signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def progress(text, end=False):
    """A line that the next one overwrites on a terminal, unless `end`. Only the first process speaks."""
    if RANK == 0:
        live = sys.stdout.isatty()
        print(("\r\033[K" if live else "") + text, end="" if live and not end else "\n", flush=True)


def write_csv(path, rows):
    """Rows (dicts with the same keys) as a CSV file with a header."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def load_checkpoint(path):
    """checkpoint.pt of this script, on the CPU; Stop if it is missing, damaged or of something else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise Stop(f"there is no {path}: --resume the run first, or name a run inside a comparison") from None
    except Exception as error:                                # zip, pickle, storage: many kinds, one meaning
        raise Stop(f"{path} is damaged or no checkpoint ({str(error).splitlines()[0][:80]})") from None
    needed = {"step", "log", "extra", "average"}
    if not isinstance(state, dict) or state.get("script") != SCRIPT or not needed <= set(state):
        raise Stop(f"{path} is not a checkpoint of {SCRIPT}.py")
    return state


def load_weights(part, state, path):
    """part.load_state_dict(state), or Stop."""
    try:
        part.load_state_dict(state)
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError):
        raise Stop(f"{path} holds another network than config.json beside it describes") from None


def restore(parts, path):
    """Load the state of each part (name -> module, optimiser, scaler) from a checkpoint -> its step and log."""
    state = load_checkpoint(path)
    for name, part in parts.items():
        if state[name]:                                       # a scaler that was off has none
            load_weights(part, state[name], path)
    return state["step"], state["log"]


def load_run(folder, device="auto"):
    """Everything needed to sample from a run: config, model (the average, in eval mode), extra, step, log, device."""
    folder, device = Path(folder), find_device(device)
    cfg, state = Config(**read_config(folder)), load_checkpoint(folder / "checkpoint.pt")
    model = cfg.build(state["extra"]).to(device, memory_format=memory_format(device)).eval().requires_grad_(False)
    load_weights(model, state["average"], folder / "checkpoint.pt")
    return SimpleNamespace(config=cfg, model=model, extra=state["extra"], step=state["step"], log=state["log"],
                           device=device)


def train(cfg, model, images, targets, loss_fn, folder, extra, device, on_eval=None):
    """Train on uint8 images [N, C, H, W] to cfg.steps, on from folder/checkpoint.pt if there is one.

    targets [N]: what loss_fn wants to know of each image. loss_fn(net, batch, abar) -> dict of scalars, "loss" first;
    batch: see random_batches. extra: kept in the checkpoint. on_eval(average) -> dict: called every cfg.eval_every
    steps. Returns the model's moving average, and the log: seconds (no compiling, measuring, saving), rows, evals.
    """
    abar, dtype = alpha_bars(cfg.timesteps).to(device), amp_dtype(device, cfg.amp)
    images, targets = place_images(images, device), targets.to(device)
    model.to(device, memory_format=memory_format(device)).train()
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.param_groups(cfg), betas=(0.9, 0.95), weight_decay=cfg.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    parts = dict(model=model, average=average, optimizer=optimizer, scaler=scaler)
    checkpoint, done, log = folder / "checkpoint.pt", 0, dict(seconds=0.0, skipped=0, rows=[], evals=[])

    def read_clock():                                         # zero: when a clock of training alone would have begun
        log["skipped"] = int(skipped)                         # the host waits for the device
        log["seconds"] = time.perf_counter() - zero

    def save(step):
        if RANK == 0:
            states = {name: part.state_dict() for name, part in parts.items()}
            save_safely(dict(script=SCRIPT, step=step, log=log, extra=extra, **states), checkpoint)
    if checkpoint.exists():
        done, log = restore(parts, checkpoint)
        for group, asked in zip(optimizer.param_groups, model.param_groups(cfg)):           # what may have changed
            group.update(factor=asked["factor"], start=asked["start"], weight_decay=cfg.weight_decay)
    net = nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model
    forward = torch.compile(net, dynamic=False) if cfg.compile else net
    skipped, in_a_row = torch.tensor(float(log["skipped"]), device=device), 0
    if not done:
        save(0)
    sums, logged, start, zero = {}, done, log["seconds"], time.perf_counter() - log["seconds"]
    with interruptible() as asked:
        for step in range(done, cfg.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, cfg) * group["factor"] * (step >= group["start"])
            for i, batch in enumerate(random_batches(cfg, images, targets, step, device)):
                net.require_backward_grad_sync = i == cfg.accumulate - 1            # processes exchange gradients once
                with autocast(device, dtype):
                    losses = loss_fn(forward, batch, abar)
                scaler.scale(losses["loss"] / cfg.accumulate).backward()
                for name, value in losses.items():
                    sums[name] = sums.get(name, 0) + value.detach() / cfg.accumulate
            bad = safe_step(optimizer, scaler)
            update_average(average, model, step)
            skipped, in_a_row, now = skipped + bad, (in_a_row + 1) * bad, step + 1
            if cfg.compile and step == done:
                zero = time.perf_counter() - log["seconds"]   # compiling is over

            if now % cfg.log_every == 0 or now == cfg.steps:
                means = torch.stack(list(sums.values())) / (now - logged) / WORLD
                if WORLD > 1:
                    dist.all_reduce(means)
                losses = dict(zip(sums, means.tolist()))
                read_clock()
                speed = (now - logged) * cfg.batch_size / (log["seconds"] - start)
                sums, logged, start = {}, now, log["seconds"]
                log["rows"].append({"step": now, **losses, "learning rate": learning_rate(step, cfg),
                                    "images/s": speed, "seconds": log["seconds"], "skipped steps": log["skipped"]})
                if RANK == 0:
                    write_csv(folder / "log.csv", log["rows"])
                progress(f"step {now}/{cfg.steps}  loss {losses['loss']:.4f}  {speed:.0f} images/s  "
                         f"{(cfg.steps - now) * cfg.batch_size / speed / 60:.1f} min left", now == cfg.steps)
                if in_a_row > 30:                             # float16's scaler needs at most 17 to find its scale
                    raise Stop(f"the last {int(in_a_row)} gradients were not finite, and no step was taken: "
                               f"{checkpoint} is sound; --resume it with a lower --lr, or with --amp bf16 or off")
            if on_eval and (now % cfg.eval_every == 0 or now == cfg.steps):
                read_clock()
                log["evals"].append({"step": now, "seconds": log["seconds"], **on_eval(average)})
                zero = time.perf_counter() - log["seconds"]
            stop = asked and WORLD == 1 and now < cfg.steps
            if stop or now % cfg.save_every == 0 or now == cfg.steps:
                read_clock()
                save(now)
                zero = time.perf_counter() - log["seconds"]
            if stop:
                raise KeyboardInterrupt
    return average, log


# --------------------------------------------------------------------------------------------------------------------
# 7  Metrics
# --------------------------------------------------------------------------------------------------------------------

INCEPTION = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
             "pt_inception-2015-12-05-6726825d.pth")


def moments(features):
    """features [N, D] -> mean [D] and covariance [D, D], float64."""
    return features.double().mean(0), torch.cov(features.double().T, correction=min(1, len(features) - 1))


# exercise
def frechet_distance(mu1, sigma1, mu2, sigma2):
    """||mu1 - mu2||^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al. 2017, eq. 6), float64.

    The trace of the root is the sum of the roots of the eigenvalues of S1^(1/2) S2 S1^(1/2), which is symmetric. What
    rounding brings below 0 counts as 0. mu [D], sigma [D, D] -> a Python number.
    """
    values, vectors = torch.linalg.eigh(sigma1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ sigma2 @ root).clamp(min=0).sqrt().sum()
    return ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross).item()


def inception_score(logits, splits=10):
    """exp(mean KL(p(y|x) || p(y))) over shuffled splits (Salimans et al. 2016): logits [N, L] -> mean, std."""
    logits = logits.double()[torch.randperm(len(logits), generator=torch.Generator().manual_seed(0))]
    scores = []
    for part in logits.tensor_split(splits):
        log_p = part.log_softmax(1)
        log_mean = log_p.logsumexp(0) - math.log(len(part))
        scores.append((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp())
    return torch.stack(scores).mean().item(), torch.stack(scores).std(correction=0).item()


def kernel_distance(x, y, subsets=100, size=1000):
    """KID (Binkowski et al. 2018): unbiased squared MMD with the kernel (a.b / D + 1)^3, mean and std over subsets.

    x, y: features [N, D]. Subsets have `size` features of each, or as many as there are.
    """
    gen, size, distances = torch.Generator().manual_seed(0), min(size, len(x), len(y)), []
    for _ in range(subsets):
        a, b = (f[torch.randperm(len(f), generator=gen)[:size]].double() for f in (x, y))
        kaa, kbb, kab = ((p @ q.T / x.shape[1] + 1) ** 3 for p, q in ((a, a), (b, b), (a, b)))
        within = sum((k.sum() - k.trace()) / (size * (size - 1)) for k in (kaa, kbb))     # without k(a, a) itself
        distances.append(within - 2 * kab.mean())
    return torch.stack(distances).mean().item(), torch.stack(distances).std(correction=0).item()


def fid_inception():
    """The Inception network of published FIDs, without weights: torchvision's with 1008 outputs and four other pools.

    The average pools of the A, C and first E blocks leave the padding out, which dividing by the pooled ones does; the
    last E block pools by maximum.
    """
    net = torchvision.models.inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7b"):
        getattr(net, name).branch_pool.register_forward_pre_hook(
            lambda module, pooled: pooled[0] / F.avg_pool2d(torch.ones_like(pooled[0][:1, :1]), 3, stride=1, padding=1))
    seen = []
    net.Mixed_7c.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    net.Mixed_7c.branch_pool.register_forward_pre_hook(lambda module, args: F.max_pool2d(seen.pop(), 3, 1, padding=1))
    return net.eval().requires_grad_(False)


def load_inception(source, device):
    """Settings' `inception` -> the network with weights; None and the reason where there are none to be had."""
    if source == "off" or source == "auto" and device.type == "cpu":
        return None, "ask with --inception download, or --inception FILE"
    try:
        options = dict(map_location="cpu", weights_only=True)
        weights = torch.load(source, **options) if source not in ("auto", "download") else \
            torch.hub.load_state_dict_from_url(INCEPTION, check_hash=True, **options)
        net = fid_inception()
        net.load_state_dict(weights)
        return net.to(device), ""
    except Exception as error:                                # no network, no such file, damaged, of another network
        return None, f"no weights from {source}: {str(error).splitlines()[0][:100]}"


@torch.no_grad()
def inception_features(net, images, device):
    """uint8 [N, C, H, W] -> features [N, 2048], logits without bias [N, 1008], on the CPU; input as in pytorch-fid."""
    features, head = [], net.fc
    net.fc = nn.Identity()
    for part in images.split(100):
        x = part.to(device).expand(-1, 3, -1, -1).float() / 255
        features.append(net(2 * F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False) - 1).cpu())
    net.fc, features = head, torch.cat(features)
    return features, features @ head.weight.T.cpu()


def inception_metrics(cfg, samples, real, device):
    """FID, IS, KID of uint8 samples against all training images `real`; one line and {} where there are no weights.

    The reference (mu, sigma, 10,000 features for KID) is cached beside the data. Under 50,000 samples: FID-10k.
    """
    device = torch.device("cpu") if device.type == "mps" else device                # for float64
    net, reason = load_inception(cfg.inception, device)
    if net is None:
        print(f"FID, IS, KID: not computed ({reason})")
        return {}
    cache = Path(cfg.data_dir, f"inception-{cfg.dataset}-{hashlib.sha1(real.numpy()).hexdigest()[:12]}.npz")
    if not cache.exists():
        features, _ = inception_features(net, real, device)
        mu, sigma = moments(features)
        some = features[torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:10_000]]
        cache.parent.mkdir(parents=True, exist_ok=True)
        save_safely(dict(mu=mu, sigma=sigma, features=some), cache)
    mu, sigma, some = (torch.from_numpy(np.load(cache)[name]) for name in ("mu", "sigma", "features"))
    features, logits = inception_features(net, samples, device)
    (kid, kid_std), (score, score_std) = kernel_distance(features, some), inception_score(logits)
    n = "" if len(samples) >= 50_000 else f"-{len(samples) / 1000:g}k"
    return {f"FID{n}": frechet_distance(*moments(features), mu, sigma), f"KID{n}": kid, f"KID{n} (std)": kid_std,
            f"IS{n}": score, f"IS{n} (std)": score_std}


def resnet(channels, side, width=64, imagenet=False):
    """torchvision's ResNet-18 for images [B, channels, side, side], its first stage `width` channels wide; fc: none."""
    if imagenet and width != 64:
        raise Stop("ImageNet weights (--imagenet) are of width 64: add --learner-width 64")
    net = torchvision.models.resnet18(weights="DEFAULT" if imagenet else None)
    if width != 64:                                           # torchvision fixes the width: build the four stages again
        net.inplanes, net.bn1, block = width, nn.BatchNorm2d(width), torchvision.models.resnet.BasicBlock
        for i, stride in enumerate((1, 2, 2, 2)):
            setattr(net, f"layer{i + 1}", net._make_layer(block, width << i, 2, stride))
    if side <= 64:                                            # a stem that keeps small images large
        net.conv1, net.maxpool = nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.Identity()
    elif (channels, width) != (3, 64):
        net.conv1 = nn.Conv2d(channels, width, 7, 2, padding=3, bias=False)
    net.fc = nn.Identity()
    return net


def shifted(x, gen):
    """Augmentation: each image of x [B, C, H, W] moved by up to an eighth of its side, edges mirrored."""
    most = x.shape[-1] // 8
    theta = torch.eye(2, 3, device=x.device).repeat(len(x), 1, 1)
    theta[:, :, 2] = torch.randint(-most, most + 1, (len(x), 2), generator=gen, device=x.device) * 2 / x.shape[-1]
    grid = F.affine_grid(theta, x.shape, align_corners=False)
    return F.grid_sample(x, grid, mode="nearest", padding_mode="reflection", align_corners=False)


def fit(net, images, targets, loss_fn, steps, cfg, seed, device):
    """Train a classifier on uint8 images [N, C, H, W] by loss_fn(net(x), target), 128 a step -> net, in eval mode."""
    net.to(device, memory_format=memory_format(device)).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps + 1)
    images, targets, gen = place_images(images, device), targets.to(device), torch.Generator(device)
    dtype = amp_dtype(device, cfg.amp)
    for step in range(steps):
        gen.manual_seed(seed_of(seed, 0, step))
        index = random_index(images, 128, seed, 3, step)
        flip = torch.rand(128, generator=gen, device=device) < 0.5 if cfg.mirror else None
        with autocast(device, None if dtype is torch.float16 else dtype):           # float16 would want a scaler
            output = net(shifted(scaled(images, index, device, flip), gen))
        loss = loss_fn(output.float(), targets[index.to(device)])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % cfg.log_every == 0:
            progress(f"classifier: step {step + 1}/{steps}  loss {loss.item():.4f}")
    return net.eval().requires_grad_(False)


@torch.no_grad()
def features_of(net, images, device):
    """net(x) in float32 on the CPU for all uint8 images [N, C, H, W], as x in [-1, 1]."""
    return torch.cat([net(scaled(images, i, device)).float().cpu() for i in torch.arange(len(images)).split(500)])


JUDGE_SEED = 2**31 + 20_000             # no run's: --seed ends below


def train_judge(cfg, train_set, device):
    """A classifier trained apart from the method: real images alone, another seed, for shapes other images.

    Returns what judge_images wants: embed, image -> features; classify, features -> class; real, the moments of its
    features of the training images.
    """
    data = load_dataset("shapes", "judge", cfg.image_size) if cfg.dataset == "shapes" else train_set
    torch.manual_seed(JUDGE_SEED)
    net = resnet(*data.images.shape[1:3], cfg.judge_width)
    net = nn.Sequential(net, nn.Linear(8 * cfg.judge_width, len(data.classes)))
    embed, head = fit(net, data.images, data.labels, F.cross_entropy, cfg.judge_steps, cfg, JUDGE_SEED, device)
    return SimpleNamespace(embed=embed, classify=lambda z: head.cpu()(z).argmax(1),
                           real=moments(features_of(embed, train_set.images, device)))


def judge_images(judge, images, labels, device):
    """uint8 images, labels asked for -> accuracy of a judge on them, and Frechet distance to its training images.

    The distance lies in the features of this one classifier: it is not FID, and compares only under the same judge.
    """
    z = features_of(judge.embed, images, device)
    return {"accuracy": (judge.classify(z) == labels).float().mean().item(),
            "frechet": frechet_distance(*moments(z), *judge.real)}


# --------------------------------------------------------------------------------------------------------------------
# 8  Pictures
# --------------------------------------------------------------------------------------------------------------------

def draw_grid(path, images, rows, title, columns=()):
    """uint8 images [R * n, C, H, W] as R rows of n, with names for the rows and, if given, the columns."""
    n, step = len(images) // len(rows), images.shape[-1] + 1
    tiles = torchvision.utils.make_grid(images, nrow=n, padding=1, pad_value=255).permute(1, 2, 0)
    fig = Figure(figsize=(1.5 + 0.55 * n, 0.7 + 0.55 * len(rows)), layout="constrained")
    axes = fig.subplots()
    axes.imshow(tiles, interpolation="nearest")
    axes.set_yticks([(i + 0.5) * step for i in range(len(rows))], rows)
    axes.set_xticks([(i + 0.5) * step for i in range(len(columns))], columns, fontsize="small")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    fig.suptitle(title, fontsize="medium", wrap=True)
    fig.savefig(path, dpi=130)


def draw_samples(path, images, labels, classes, title, columns=10):
    """samples.png: a row for each class that occurs (the first 20), of up to `columns` images."""
    present = labels.unique().tolist()[:20]
    columns = min(columns, max((labels == c).sum().item() for c in present))
    rows = [images[labels == c][:columns] for c in present]
    rows = [torch.cat([row, row.new_full((columns - len(row), *row.shape[1:]), 255)]) for row in rows]
    draw_grid(path, torch.cat(rows), [classes[c] for c in present], title)


def draw_denoising(path, model, cfg, conditions, names, shape, device, columns=9):
    """denoising.png: one image for each condition [N], with its name, on its way from noise to sample, with t."""
    trace, one_batch = [], dataclasses.replace(cfg, sample_batch=len(conditions), compile=False)
    final = generate(model, one_batch, conditions, shape, device, trace)
    chosen = [trace[round(i * (len(trace) - 1) / (columns - 2))] for i in range(columns - 1)]
    steps = torch.stack([*(to_uint8(x) for _, x in chosen), final], 1).flatten(0, 1)
    draw_grid(path, steps, names, f"from noise to sample in {cfg.sample_steps} {cfg.sampler} steps "
              f"(t: noise level, of {cfg.timesteps})", [*(f"t={t}" for t, _ in chosen), "sample"])


def draw_curves(path, rows):
    """curves.png: every column of log.csv against the step."""
    names = [name for name in rows[0] if name not in ("step", "seconds")]
    columns = min(4, len(names))
    fig = Figure(figsize=(4 * columns, 3 * -(-len(names) // columns)), layout="constrained")
    for axes, name in zip(fig.subplots(-(-len(names) // columns), columns, squeeze=False).flat, names):
        axes.plot([row["step"] for row in rows], [row[name] for row in rows])
        axes.set(title=name, xlabel="step", yscale="log" if name == "loss" else "linear")
        axes.grid(alpha=0.3)
    fig.savefig(path, dpi=110)


def nearest_images(z, prototypes, n):
    """Features z [N, D], prototypes [K, D] -> indices [K, n] of the (up to) n features closest to each."""
    return torch.cdist(prototypes, z).topk(min(n, len(z)), largest=False).indices


def draw_beside_real(path, samples, real, names):
    """prototypes.png: for each of K prototypes, samples [K, n, C, H, W] beside the real images closest to it."""
    gap = samples.new_full((len(samples), 1, *samples.shape[2:]), 255)
    row, n = torch.cat([samples, gap, real], 1), samples.shape[1]
    columns = [""] * row.shape[1]
    columns[n // 2], columns[n + 1 + real.shape[1] // 2] = "samples of the prototype", "real images closest to it"
    draw_grid(path, row.flatten(0, 1), names, "what each prototype stands for", columns)


COLOURS = matplotlib.colormaps["tab20"].colors


def draw_features(path, z, k, prototypes, labels, classes):
    """features.png: features z [N, D] in two dimensions, coloured by prototype k [N], and by class if labelled."""
    plane = torch.linalg.eigh(moments(z)[1]).eigenvectors[:, -2:].flip(1).float()   # PCA: [D, 2]
    points, stars = (z - z.mean(0)) @ plane, (prototypes - z.mean(0)) @ plane
    panels = [("prototype", k, [str(i) for i in range(len(prototypes))])]
    panels += [("class", labels, classes)] if labels is not None else []
    fig = Figure(figsize=(6.5 * len(panels), 5.5), layout="constrained")
    for axes, (what, groups, names) in zip(fig.subplots(1, len(panels), squeeze=False).flat, panels):
        axes.scatter(*stars.T, s=400, marker="*", color="white", edgecolor="black")              # below the dots, which
        for i in groups.unique().tolist():                                          # may all lie on a prototype
            axes.scatter(*points[groups == i].T, s=4, alpha=0.5, color=COLOURS[i % 20], label=names[i])
        for i, star in enumerate(stars[:40].tolist()):
            axes.annotate(str(i), star, textcoords="offset points", xytext=(10, 7))
        axes.set(title=f"coloured by {what}", xlabel="first principal component", ylabel="second")
        if groups.max() < 20:
            axes.legend(title=what, markerscale=3, fontsize="small")
    fig.suptitle("features z of held-out images (dots) and prototypes (stars, numbered)")
    fig.savefig(path, dpi=110)


def draw_usage(path, rows, table, classes):
    """usage.png: use over training, from log.csv's rows, and who chose each prototype: contingency table [K, C]."""
    fig = Figure(figsize=(15, 4), layout="constrained")
    perplexity, variance, bars = fig.subplots(1, 3)
    steps = [row["step"] for row in rows]
    perplexity.plot(steps, [row["usage perplexity"] for row in rows], label="perplexity: how many share the work")
    perplexity.plot(steps, [len(table) - row["dead prototypes"] for row in rows], label="alive: chosen by some image")
    perplexity.axhline(len(table), color="grey", linestyle=":", label="K")
    perplexity.set(title="prototypes in use", xlabel="step", ylim=(0, 1.1 * len(table)))
    perplexity.legend(loc="lower right")
    variance.plot(steps, [row["variance of z"] for row in rows])
    variance.set(title="variance of z (0: features have collapsed)", xlabel="step", yscale="log")
    below, many = torch.zeros(len(table)), table.shape[1] > 1
    for c, count in enumerate(table.T.float()):
        bars.bar(range(len(table)), count, bottom=below, color=COLOURS[c % 20], label=classes[c] if many else None)
        below = below + count
    bars.set(title="held-out images that chose each prototype" + ", by class" * many, xlabel="prototype")
    if 1 < len(classes) <= 20:
        bars.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1))
    fig.savefig(path, dpi=110)


def draw_comparison(path, histories, measures, title):
    """comparison.png: measures, {key: (name, scale)}, of each variant's samples against steps and against seconds."""
    clocks = (("step", "training step"), ("seconds", "seconds of training, with stage 1 where there is one"))
    fig = Figure(figsize=(11, 3.75 * len(measures)), layout="constrained")
    panels = fig.subplots(len(measures), 2, squeeze=False).flat
    for axes, ((key, (name, scale)), (x, clock)) in zip(panels, itertools.product(measures.items(), clocks)):
        for variant, history in histories.items():
            axes.plot([h[x] for h in history if key in h], [h[key] for h in history if key in h], ".-", label=variant)
        axes.set(xlabel=clock, ylabel=name, yscale=scale)
        axes.grid(alpha=0.3)
        axes.legend()
    fig.suptitle(title)
    fig.savefig(path, dpi=110)


# --------------------------------------------------------------------------------------------------------------------
# 9  Main: train | sample | evaluate | compare
# --------------------------------------------------------------------------------------------------------------------

def new_folder(wanted):
    """Make `wanted`, or its first neighbour wanted-2, wanted-3, ... that is empty: nothing is ever written over."""
    folder, number = Path(wanted), 1
    while folder.exists() and any(folder.iterdir()):
        number += 1
        folder = Path(f"{wanted}-{number}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_config(folder, cfg):
    """config.json: the settings, but for what to do and where."""
    kept = [f.name for f in dataclasses.fields(cfg) if not f.metadata.get("once")]
    save_safely({name: getattr(cfg, name) for name in kept}, folder / "config.json")


def machine(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} cores, {platform.machine()}, {device.type}"


def load_sets(cfg, labelled):
    """(training set, test set); under torchrun the first process downloads alone. labelled: Stop without labels."""
    if RANK > 0:
        dist.barrier()
    sets = [load_dataset(cfg.dataset, split, cfg.image_size, cfg.data_dir) for split in ("train", "test")]
    if RANK == 0 and WORLD > 1:
        dist.barrier()
    if labelled and sets[0].labels is None:
        raise Stop(f"{cfg.data_dir} is a flat folder, and what you ask for needs classes: use train/<class>/*")
    if sets[0].images.shape[1] != sets[1].images.shape[1]:
        raise Stop(f"one of train and test in {cfg.data_dir} is grey throughout, the other is not: convert one of them")
    return sets


def train_pdm(cfg, folder, sets, device, on_eval=None):
    """Train in `folder`, on from its checkpoint if there is one -> model, extra, log."""
    data = sets[0]
    targets = data.labels if cfg.supervised else torch.zeros(len(data.images), dtype=torch.int64)   # PDM sees no label
    extra = dict(shape=list(data.images.shape[1:]), classes=data.classes, images=len(data.images))
    torch.manual_seed(cfg.seed)
    model, loss_fn = cfg.build(extra), functools.partial(pdm_loss, cfg)
    if (folder / "checkpoint.pt").exists():
        if load_checkpoint(folder / "checkpoint.pt")["extra"] != extra:
            raise Stop(f"the training images of {folder} have changed since it began: restore them, or start a new run")
    elif cfg.conditioning == "prototype" and cfg.start == "features":
        model.begin(data.images, data.labels if cfg.supervised else None, cfg, device)
    on_eval = on_eval and functools.partial(on_eval, cfg, extra)
    model, log = train(cfg, model, data.images, targets, loss_fn, folder, extra, device, on_eval)
    if RANK == 0 and log["rows"]:
        draw_curves(folder / "curves.png", log["rows"])
    return model, extra, log


def variant_name(cfg):
    return "unconditional" if cfg.conditioning == "none" else "s-PDM" if cfg.supervised else "PDM"


def draw_conditions(cfg, model, n):
    """n prototypes to sample from, in order: as often as images chose them in training, or each as often."""
    if cfg.conditioning == "none":
        return torch.zeros(n, dtype=torch.int64)
    share = (model.counts + model.usage).cpu().float()
    share = torch.ones_like(share) if cfg.frequency == "uniform" or share.sum() == 0 else share
    gen = torch.Generator().manual_seed(seed_of(cfg.seed, 1))
    return torch.multinomial(share, n, replacement=True, generator=gen).sort().values


def evaluation_labels(labels, n):
    """n class labels in the proportions of `labels`, in order."""
    return labels.sort().values[((torch.arange(n) + 0.5) / n * len(labels)).long()]


def sample_labels(text, classes, n):
    """n labels, taking turns: of "0,3" or "circle,star", of all classes if empty. Stop for one that is none."""
    words = [word.strip() for word in text.split(",")] if text else classes
    numbers = [classes.index(word) if word in classes else int(word) if word.isdecimal() else -1 for word in words]
    for word, number in zip(words, numbers):
        if not 0 <= number < len(classes):
            raise Stop(f"--labels {word} is no class: give 0 to {len(classes) - 1}, or of {', '.join(classes[:20])}")
    return torch.tensor(numbers)[torch.arange(n) % len(numbers)]


def asked_conditions(cfg, model, extra, device):
    """--sample: the prototypes asked for by --prototype, --like, --labels, or drawn. Stop for one that is not there."""
    n, K = cfg.num_samples, len(extra["classes"]) if cfg.supervised else cfg.num_prototypes
    if cfg.conditioning == "none" and (cfg.prototype >= 0 or cfg.like or cfg.labels):
        raise Stop("this run knows no prototypes (--conditioning none): leave out --prototype, --like and --labels")
    if cfg.labels and not cfg.supervised:
        raise Stop("this run never saw a label, so --labels means nothing to it: choose by --prototype or --like")
    if (cfg.prototype >= 0) + bool(cfg.like) + bool(cfg.labels) > 1:
        raise Stop("--prototype, --like and --labels each choose what to sample: give one of them")
    if cfg.prototype >= K:
        raise Stop(f"--prototype {cfg.prototype} is not there: give 0 to {K - 1}")
    if cfg.like:
        image = torch.from_numpy(decode(Path(cfg.like), cfg.image_size)).permute(2, 0, 1)[None]
        image = image if extra["shape"][0] == 3 else image.float().mean(1, keepdim=True).to(torch.uint8)
        chosen = model.choose(image, device)[1].item()
        progress(f"{cfg.like} chooses prototype {chosen}", end=True)
        return torch.full((n,), chosen)
    if cfg.prototype >= 0:
        return torch.full((n,), cfg.prototype)
    return sample_labels(cfg.labels, extra["classes"], n) if cfg.supervised else draw_conditions(cfg, model, n)


def condition_names(cfg, extra):
    """What to write beside a row of images of each prototype."""
    if cfg.conditioning == "none":
        return ["no condition"]
    return extra["classes"] if cfg.supervised else [f"prototype {i}" for i in range(cfg.num_prototypes)]


def sample_pdm(cfg, model, extra, conditions, folder, device):
    """Samples for prototypes [N] -> uint8 [N, C, H, W], drawn in samples.png (a row a prototype), kept in samples.npz.

    samples.npz is what the guided-diffusion evaluator reads: arr_0 uint8 [N, H, W, C], arr_1 the prototypes.
    """
    images = generate(model, cfg, conditions, extra["shape"], device)
    save_safely(dict(arr_0=images.permute(0, 2, 3, 1).numpy(), arr_1=conditions.numpy()), folder / "samples.npz")
    draw_samples(folder / "samples.png", images, conditions, condition_names(cfg, extra),
                 f"{cfg.dataset}, {variant_name(cfg)}, {cfg.steps} steps; guidance {cfg.guidance}, {cfg.sample_steps} "
                 f"{cfg.sampler} steps, seed {cfg.seed}")
    return images


def measure_cost(cfg, model, extra, sets, device, rounds=9):
    """What conditioning costs, against the same U-Net told nothing: parameters, bytes, seconds a step and an image.

    Seconds are medians over rounds, in which the two take turns. Images are sampled at guidance 0: one pass for both.
    """
    targets = sets[0].labels if cfg.supervised else torch.zeros(len(sets[0].images), dtype=torch.int64)
    batch = next(random_batches(cfg, sets[0].images, targets.to(device), 0, device))
    abar, conditions, works = alpha_bars(cfg.timesteps).to(device), torch.zeros(50, dtype=torch.int64), {}
    for name in ("conditioned", "unconditioned"):
        one = dataclasses.replace(cfg, guidance=0.0, compile=False)
        one = one if name == "conditioned" else dataclasses.replace(one, conditioning="none")
        net = one.build(extra).to(device, memory_format=memory_format(device)).train()
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.0, fused=True)
        scaler, average = torch.amp.GradScaler(device.type, enabled=False), copy.deepcopy(net)

        def step(one=one, net=net, optimizer=optimizer, scaler=scaler, average=average):
            with autocast(device, amp_dtype(device, cfg.amp)):
                loss = pdm_loss(one, net, batch, abar)["loss"]
            loss.backward()
            bad = safe_step(optimizer, scaler)
            update_average(average, net, 0)
            return bad.item()                                 # waits for the device
        works["a training step", name] = step
        works["a sampled image", name] = functools.partial(generate, net, one, conditions, extra["shape"], device)
    times = {key: [] for key in works}
    for _ in range(rounds + 2):
        for key, work in works.items():
            start = time.perf_counter()
            work()
            times[key].append((time.perf_counter() - start) / (len(conditions) if "image" in key[0] else 1))
    seconds = {key: float(np.median(found[2:])) for key, found in times.items()}                    # 2 to warm up
    cost = {"parameters": sum(p.numel() for p in model.parameters()),
            "parameters of the U-Net": sum(p.numel() for p in model.unet.parameters()),
            "bytes of prototypes": model.prototypes.nbytes,
            "bytes of a bank of every training feature": len(sets[0].images) * model.prototypes[0].nbytes}
    for kind in ("a training step", "a sampled image"):
        cost[f"seconds of {kind}"] = given = seconds[kind, "conditioned"]
        cost[f"seconds of {kind}, unconditioned"] = seconds[kind, "unconditioned"]
        cost[f"seconds of {kind}, ratio"] = given / seconds[kind, "unconditioned"]
    return cost


def measure_prototypes(cfg, model, extra, log, samples, conditions, sets, folder, device):
    """Do prototypes mean something? Pictures in `folder`, and a dict of figures on training and held-out images."""
    K, labels = len(model.prototypes), sets[1].labels
    (z_train, k_train), (z_test, k_test) = (model.choose(data.images, device) for data in sets)
    z_samples, k_samples = model.choose(samples, device)
    names = condition_names(cfg, extra)[:20]
    shown = generate(model, cfg, torch.arange(len(names)).repeat_interleave(6), extra["shape"], device)
    closest = sets[0].images[nearest_images(z_train, model.prototypes.cpu(), 6)]    # [K, up to 6, C, H, W]
    shown = shown.view(len(names), 6, *shown.shape[1:])
    draw_beside_real(folder / "prototypes.png", shown, closest[:len(names)], names)
    some = torch.randperm(len(z_test), generator=torch.Generator().manual_seed(0))[:3000]          # sets may be sorted
    draw_features(folder / "features.png", z_test[some], k_test[some], model.prototypes.cpu(),
                  None if labels is None else labels[some], sets[1].classes)
    classes = sets[1].classes if labels is not None else ["image"]
    table = contingency(k_test, torch.zeros_like(k_test) if labels is None else labels, K, len(classes))
    if log["rows"]:
        draw_usage(folder / "usage.png", log["rows"], table, classes)
    share = torch.bincount(k_train, minlength=K) / len(k_train)
    found = {"prototypes alive (nearest to some training image)": (share > 0).float().mean().item(),
             "usage perplexity, training images": torch.special.entr(share).sum().exp().item(),
             "variance of z, held-out images": z_test.var(0, correction=0).sum().item(),
             "distance of samples within / between prototypes": resemblance(z_samples, conditions),
             "distance of real images within / between prototypes": resemblance(z_test, k_test),
             "samples that choose the prototype they came from": (k_samples == conditions).float().mean().item()}
    if labels is not None:
        found["purity, held-out images"] = purity(table)
        found["NMI, held-out images"] = normalised_mutual_information(table)
    return found


def make_judges(cfg, model, sets, device):
    """What measures samples: a classifier trained apart if there are labels, and the run's own feature encoder."""
    judges = {"a classifier trained apart": train_judge(cfg, sets[0], device)} if sets[0].labels is not None else {}
    if cfg.conditioning == "prototype":
        judges["the run's own f_phi"] = SimpleNamespace(
            embed=model.encoder, classify=lambda z: distances(z, model.prototypes.cpu()).argmin(1),
            real=moments(features_of(model.encoder, sets[0].images, device)))
    return judges


def measure_pdm(cfg, model, extra, log, sets, folder, device):
    """Samples, metrics and pictures of a trained model in `folder`."""
    n, start = cfg.num_samples, time.perf_counter()
    conditions = evaluation_labels(sets[0].labels, n) if cfg.supervised else draw_conditions(cfg, model, n)
    samples = sample_pdm(cfg, model, extra, conditions, folder, device)
    seconds = {"training": log["seconds"], "sampling": time.perf_counter() - start}
    names = condition_names(cfg, extra)[:10]
    draw_denoising(folder / "denoising.png", model, cfg, torch.arange(len(names)), names, extra["shape"], device)
    results = {}
    for name, judge in make_judges(cfg, model, sets, device).items():
        results[name] = {"samples": judge_images(judge, samples, conditions, device)}
        if sets[1].labels is not None:
            results[name]["real held-out images"] = judge_images(judge, sets[1].images, sets[1].labels, device)
        for found in results[name].values() if not cfg.supervised else ():
            found.pop("accuracy")                             # prototypes are no classes but in s-PDM
    about = dict(settings=vars(cfg), training_images=len(sets[0].images), machine=machine(device),
                 torch=torch.__version__, seconds=seconds, results=results)
    if cfg.conditioning == "prototype":
        about["prototypes"] = measure_prototypes(cfg, model, extra, log, samples, conditions, sets, folder, device)
        about["cost"] = measure_cost(cfg, model, extra, sets, device)
        if about["prototypes"]["usage perplexity, training images"] < min(2, len(model.prototypes)) / 1.3:
            print("note: nearly all images choose one prototype, which no loss forbids: see features.png; with "
                  "--encoder-lr 0 --tau 0 prototypes stay apart as in k-means, or try fewer of them")
    print(f"{n} samples, guidance {cfg.guidance}, {cfg.sample_steps} {cfg.sampler} steps, seed {cfg.seed}; seconds: "
          f"{', '.join(f'{k} {v:.0f}' for k, v in seconds.items())} ({about['machine']})")
    for name, found in results.items():
        for kind, value in found.items():
            right = f", {value['accuracy']:.1%} recognised" if "accuracy" in value else ""
            print(f"{name}, {kind}: Frechet distance {value['frechet']:.4f} (not FID){right}")
    results["inception"] = inception_metrics(cfg, samples, sets[0].images, device)
    for part in (results["inception"], about.get("prototypes", {}), about.get("cost", {})):
        for name, value in part.items():
            print(f"  {name:58} {value:,.4g}" if isinstance(value, float) else f"  {name:58} {value:,}")
    save_safely(about, folder / "metrics.json")


def compare_pdm(cfg, sets, folder, device):
    """No conditioning, PDM, s-PDM: one seed, data order and budget -> comparison.json, .png and a table."""
    judge, variants = train_judge(cfg, sets[0], device), {}

    def quality(one, extra, model):
        n = cfg.num_samples
        conditions = evaluation_labels(sets[0].labels, n) if one.supervised else draw_conditions(one, model, n)
        found = judge_images(judge, generate(model, one, conditions, extra["shape"], device), conditions, device)
        right = f", {found['accuracy']:.1%} recognised" if one.supervised else ""
        progress(f"{variant_name(one)}: Frechet distance {found['frechet']:.3f}{right}", end=True)
        return found if one.supervised else {"frechet": found["frechet"]}
    for changes in (dict(conditioning="none", guidance=0.0), dict(), dict(supervised=True)):
        one = dataclasses.replace(cfg, compare=False, conditioning="prototype", supervised=False)
        one = dataclasses.replace(one, **changes)
        part = folder / variant_name(one)
        part.mkdir(exist_ok=True)
        write_config(part, one)
        model, extra, log = train_pdm(one, part, sets, device, quality)
        unguided = quality(dataclasses.replace(one, guidance=0.0), extra, model)
        variants[variant_name(one)] = {"history": log["evals"], "guidance 0": unguided}
    held_out = judge_images(judge, sets[1].images, sets[1].labels, device)
    title = (f"{cfg.dataset}, seed {cfg.seed}, {cfg.steps} steps of {cfg.batch_size}, {cfg.num_samples} samples, "
             f"guidance {cfg.guidance}")
    save_safely({"settings": vars(cfg), "machine": machine(device), "torch": torch.__version__,
                 "real held-out images": held_out, "variants": variants}, folder / "comparison.json")
    measures = {"frechet": ("Frechet distance, judge's features (not FID)", "log")}
    draw_comparison(folder / "comparison.png", {name: v["history"] for name, v in variants.items()}, measures, title)
    row = "{:16}{:>10}{:>11}{:>20}{:>13}".format
    print(f"\n{title}\n" + row("", "seconds", "Frechet", "Frechet, guidance 0", "recognised"))
    for name, v in variants.items():
        last = v["history"][-1]
        print(row(name, f"{last['seconds']:.0f}", f"{last['frechet']:.3f}", f"{v['guidance 0']['frechet']:.3f}",
                  f"{last['accuracy']:.1%}" if "accuracy" in last else ""))
    print(row("real images", "", f"{held_out['frechet']:.3f}", "", f"{held_out['accuracy']:.1%}"))


def run_pdm(cfg):
    """Do what the settings ask for."""
    if cfg.prototype_dim % 2 or cfg.revive and WORLD > 1:
        raise Stop("--prototype-dim must be even, and --revive works in one process only")
    if cfg.supervised and cfg.conditioning == "none":
        raise Stop("--supervised chooses prototypes by label, and --conditioning none has none: leave one of them out")
    if cfg.null_prob == 0 and cfg.guidance != 0 and cfg.conditioning == "prototype":
        raise Stop("--null-prob 0 leaves nothing to guide away from: add --guidance 0")
    cfg.guidance = 0.0 if cfg.conditioning == "none" else cfg.guidance
    device = find_device(cfg.device)
    choose_backends(device)
    labelled = cfg.supervised or cfg.compare
    if cfg.sample or cfg.evaluate:
        made = load_run(cfg.sample or cfg.evaluate, cfg.device)
        cfg.steps = made.step                                 # so far
        if cfg.sample:
            conditions = asked_conditions(cfg, made.model, made.extra, device)
            folder = new_folder(cfg.out or Path(cfg.sample, "samples"))
            sample_pdm(cfg, made.model, made.extra, conditions, folder, device)
        else:
            sets = load_sets(cfg, labelled)
            folder = new_folder(cfg.out or Path(cfg.evaluate, "evaluation"))
            measure_pdm(cfg, made.model, made.extra, made.log, sets, folder, device)
        return progress(f"{cfg.num_samples} samples in {folder}", end=True)
    if WORLD > 1:
        patience = datetime.timedelta(hours=2)                # the others wait while the first downloads and decodes
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
    sets = load_sets(cfg, labelled)                           # faults of the data show before a folder is made
    if RANK == 0:
        name = f"runs/{SCRIPT}-{cfg.dataset}" + ("-compare" if cfg.compare else "-" + variant_name(cfg))
        cfg.out = cfg.resume or str(new_folder(cfg.out or name))
        write_config(Path(cfg.out), cfg)
    if WORLD > 1:
        names = [cfg.out]
        dist.broadcast_object_list(names)
        cfg.out = names[0]
    progress(f"{cfg.out}: {cfg.dataset}, {machine(device)}", end=True)
    folder = Path(cfg.out)
    if cfg.compare:
        compare_pdm(cfg, sets, folder, device)
    else:
        trained = train_pdm(cfg, folder, sets, device)
        if RANK == 0:
            measure_pdm(cfg, *trained, sets, folder, device)
            print(f"{folder}; more samples: python {SCRIPT}.py --sample {folder}")
    if WORLD > 1:
        dist.destroy_process_group()


def main(argv=None):
    """The command line. Returns the exit status: 0; 2 for what one sentence explains; 130 after Ctrl-C."""
    cfg = None
    try:
        cfg = parse_config(argv)
        run_pdm(cfg)
        return 0
    except KeyboardInterrupt:
        training = cfg and cfg.out and Path(cfg.out, "config.json").exists()
        advice = f'; go on with: python {SCRIPT}.py --resume "{cfg.out}"' if training else ""
        print(f"\ninterrupted{advice}", file=sys.stderr)
        return 130
    except Stop as error:
        print(f"\n{SCRIPT}: {error}", file=sys.stderr)
    except OSError as error:
        print(f"\n{SCRIPT}: {error.filename or 'a file'} cannot be read or written ({error.strerror or error}): check "
              "the name, the permissions and the space that is left, or choose another --out", file=sys.stderr)
    except (RuntimeError, MemoryError) as error:
        said = ("out of memory", "not enough memory", "allocate memory")            # CUDA and MPS; CPUs
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in said):
            raise
        print(f"\n{SCRIPT}: memory ran out: lower --batch-size, --sample-batch or raise --accumulate", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
