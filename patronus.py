"""Patronus: a diffusion model whose knowledge can be seen, moved and checked, through prototypes of local patterns.

Paper: "Patronus: Interpretable Diffusion Models with Prototypes", arXiv 2503.22782 (ICLR 2026).

The idea. A small convolutional encoder turns the clean image into a map of patch features. Each of m prototypes asks
how close its best patch comes; the m answers, the activations s, are all that the denoiser is told, and encoder,
prototypes and denoiser train together on the noise loss, without labels. So s is what the model knows of the image
beyond noise: which patterns there are. One looks at it (what, where, when), moves it (edit, interpolate, extrapolate),
and checks whether moving one trait drags another along, which is how a planted correlation shows.

    clean image x0 ──> encoder ──> patches z ──> squared distance to m prototypes, minimum over patches ──> s [m]
                                                                                                             │
             noise level t ──> sinusoids ──> MLP ─────────────────────────────────── (+) <── MLP <───────────┘
                                                                                      │
             noisy image xt ────────────────────────────────────────────> every residual block of a U-Net ──> noise

To make images from nothing, a second, small diffusion model draws s, and the first one the image given s.

    python patronus.py                                        # shapes at 32 pixels: train, explain, measure
    python patronus.py --explain runs/NAME                    # what, where, when, consistency, extrapolation, ...
    python patronus.py --diagnose runs/NAME --attribute "warm hue" --watch "dot"

Where the paper is silent, or where we differ (our choices): DDPM's U-Net, AdamW at 2e-3 (shapes) or 5e-4 with warm-up
and cosine for a few minutes, instead of 1e-5 for 300 epochs; encoder and prototypes at 0.3 of that rate; prototypes
start at patches of real images (k-means++) with features scaled to a total variance of 1, where the activation is
steep, and the denoiser sees s standardised by its start (`--start uniform`: none of this, the paper's); the noise
loss counts more at high noise, where brightness is settled (`--emphasis`), and in training half of the activations
are hidden (`--hide`), so that each counts by itself; what s_j is raised to when it is shown or tested: its largest
value on held-out images, while the others follow as they do there (`company`; --edit sets what you ask for and
nothing else); 64 prototypes of length 32 on shapes, and ddpm in 20 steps, whose fresh noise mends what a network of a
few minutes gets wrong (the deterministic samplers leave noise in the images); samples come from a moving average of
the weights; images are drawn with replacement; the latent model is an MLP over standardised s, since the order of
prototypes has no locality for 1-D convolutions, not clipped, sampled by DDIM through all its levels; the step at
which a pattern has emerged: the one after which s_j stays above 90 % of its end; which prototypes live, see
`prototype_state`; the penalty on correlated activations (`--decorrelation`), which the paper leaves open; images of
128 pixels and more take five 5x5 layers, of which the paper gives the strides. AUROC is measured on s itself;
agreement and leak are judged by a classifier trained apart, on real images without a planted bias.
"""
import argparse
import contextlib
import copy
import csv
import dataclasses
import datetime
import functools
import hashlib
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
    image_size: int = setting(32, "side of the images, pixels", low=16, fixed=True)
    mirror: bool = setting(False, "show half of the training images flipped left to right")
    bias: float = setting(0.5, "shapes: P(dot = warm hue) in training; 0.5: independent", low=0, high=1, fixed=True)
    # prototypes
    num_prototypes: int = setting(64, "m, prototypes", low=6, fixed=True)
    prototype_dim: int = setting(32, "D, length of a prototype and of a patch's feature", low=1, fixed=True)
    encoder_lr: float = setting(0.3, "learning rate of encoder and prototypes, as a factor of --lr", low=0, fixed=True)
    start: str = setting("features", "prototypes start at patches of real images, or (the paper) uniform in 0..1",
                         choices=("features", "uniform"), fixed=True)
    distinctness: float = setting(0.0, "weight of the penalty on prototypes that point the same way", low=0)
    decorrelation: float = setting(0.0, "weight of the penalty on activations that are correlated", low=0)
    hide: float = setting(0.5, "probability of training without an activation, each by itself; 0 is the paper's",
                          low=0, high=0.9, fixed=True)
    emphasis: float = setting(0.3, "the noise loss at level t counts abar ** -emphasis times; 0 is the paper's", low=0,
                              high=1)
    # network and process
    channels: int = setting(32, "channels of the U-Net's first level, a multiple of 4", low=4, fixed=True)
    multipliers: str = setting("1,1,2", "channel factor of each level; all but the last halve the image", fixed=True)
    blocks: int = setting(1, "residual blocks a level", low=1, fixed=True)
    attention: int = setting(0, "self-attention at levels of at most this side, pixels; 0: in the middle only", low=0,
                             fixed=True)
    dropout: float = setting(0.0, "dropout in residual blocks, probability", low=0, high=0.9, fixed=True)
    timesteps: int = setting(1000, "T, noise levels", low=21, fixed=True)
    # training
    steps: int = setting(3000, "optimiser steps", low=1)
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
    # latent model
    latent_steps: int = setting(2000, "optimiser steps of the latent model, 256 activation vectors each", low=1)
    latent_width: int = setting(256, "width of the latent model's layers, even", low=2, fixed=True)
    latent_timesteps: int = setting(100, "noise levels of the latent model", low=21, fixed=True)
    # sampling, explaining and measuring
    num_samples: int = setting(500, "images to sample, and to measure on", low=1)
    sampler: str = setting("ddpm", "the way from noise to image", choices=("ddim", "ddpm", "dpmpp"))
    sample_steps: int = setting(20, "steps from noise to image", low=1)
    invert_steps: int = setting(100, "steps from image to noise, and back from there", low=1)
    sample_batch: int = setting(250, "images sampled at a time", low=1)
    pairs: int = setting(120, "(prototype, image) pairs on which raising a prototype is tested", low=1)
    inception: str = setting("auto", "weights for FID, IS, KID: a file, download, off; auto downloads on a GPU")
    judge_steps: int = setting(300, "steps of the judge, a classifier of the attributes trained apart", low=1)
    judge_width: int = setting(16, "channels of the judge's first stage; 64 is ResNet-18", low=1)
    attribute: str = setting("", "diagnosis: the attribute to move; empty: the first one")
    watch: str = setting("", "diagnosis: the attribute that may be dragged along; empty: the last one")
    # what to do
    compare: bool = setting(False, "diagnose: three seeds without bias, with --bias, and with --decorrelation against "
                            "it", fixed=True, task="new")
    out: str = setting("", "the run's folder; empty: runs/NAME", once=True)
    resume: str = setting("", "folder of a run to go on with", once=True, task="run")
    sample: str = setting("", "folder of a run to sample from", once=True, task="run")
    evaluate: str = setting("", "folder of a run to measure again", once=True, task="run")
    explain: str = setting("", "folder of a run whose pictures to draw again", once=True, task="run")
    diagnose: str = setting("", "folder of a run to diagnose: does --attribute drag --watch along?", once=True,
                            task="run")
    model: str = setting("", "folder of the run to --edit with", once=True, task="run")
    edit: str = setting("", "image to edit", once=True)
    set: str = setting("", "--edit: activations to set, like 12=2.5,40=0", once=True)

    # The paper's m and D; DDPM's U-Net with attention in the middle only; batch and rate as in the other scripts.
    PHOTOGRAPHS: ClassVar[dict] = dict(
        mirror=True, num_prototypes=100, prototype_dim=128, judge_steps=8000, judge_width=64, channels=128,
        multipliers="1,2,2,2", blocks=2, dropout=0.1, steps=100_000, batch_size=256, lr=5e-4, sampler="dpmpp",
        latent_steps=40_000, latent_width=1024, save_every=2000, num_samples=10_000)
    LARGER: ClassVar[dict] = {**PHOTOGRAPHS, "image_size": 64, "multipliers": "1,1,2,2,2"}
    PRESETS: ClassVar[dict] = {
        "shapes": {},
        "cifar10": PHOTOGRAPHS,
        "folder": PHOTOGRAPHS,
        "fashion-mnist": {**PHOTOGRAPHS, "mirror": False, "num_prototypes": 30},
        "stl10": LARGER,
        "eurosat": LARGER,
        "celeba": {**LARGER, "attribute": "Blond_Hair", "watch": "Smiling"},
        "tiny-imagenet": LARGER}

    def build(self, extra):
        """The method's network, untrained. extra: what a run knows of its data."""
        unet = UNet(extra["shape"][0], self.image_size, self.channels, level_multipliers(self), self.blocks,
                    self.attention, self.dropout)
        return Patronus(unet, patch_encoder(extra["shape"][0], self.image_size, self.prototype_dim),
                        self.num_prototypes, self.prototype_dim, LatentModel(self.num_prototypes, self.latent_width),
                        self.hide)


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

def patch_encoder(channels, side, dim):
    """Images [B, channels, side, side] in [-1, 1] -> patch features z [B, dim, h, w], h = w (the paper's encoder).

    Under 128 pixels four 3x3 layers, of which a vector sees 15x15 pixels; else five 5x5 layers. Weights N(0, 0.1).
    """
    widths, kernel, strides = ((32, 64, 64, dim), 3, (2, 1, 1, 1)) if side < 128 else \
        ((32, 64, 64, 128, dim), 5, (2, 2, 1, 1, 1))
    layers = []
    for i, (width, stride) in enumerate(zip(widths, strides)):
        layers += [nn.Conv2d(channels, width, kernel, stride, padding=kernel // 2 if i == 0 else 0), nn.ReLU()]
        nn.init.normal_(layers[-2].weight, 0, 0.1)
        channels = width
    return nn.Sequential(*layers)


# exercise
def receptive_field(encoder):
    """start, size, step in pixels: vector i of a row of patches sees pixels start + i * step, ... (`size` of them).

    From kernel, stride and padding of the convolutions (square ones), first to last; start < 0 lies in the padding. For
    images of 32 pixels it is (-1, 15, 2).
    """
    start, size, step = 0, 1, 1
    for layer in encoder:
        if isinstance(layer, nn.Conv2d):
            start -= layer.padding[0] * step
            size += (layer.kernel_size[0] - 1) * step
            step *= layer.stride[0]
    return start, size, step


# exercise
def patch_distances(z, prototypes):
    """||z - p||^2 in float32, at least 0: patches z [B, D, h, w], prototypes [m, D] -> [B, m, h, w].

    As ||z||^2 - 2 z.p + ||p||^2, which needs no [B, m, D, h, w]; rounding may bring it below 0. float32 under autocast.
    """
    with torch.autocast(z.device.type, enabled=False):        # differences of large numbers want their digits
        z, p = z.float(), prototypes.float()
        cross = torch.einsum("bdhw,md->bmhw", z, p)
        return (z.square().sum(1, keepdim=True) - 2 * cross + p.square().sum(1)[:, None, None]).clamp(min=0)


EPSILON = 1e-4


# exercise
def activation(d):
    """s = log((d + 1) / (d + 1e-4)) of a squared distance (ProtoPNet): from 9.2 at d = 0 down to 0."""
    return torch.log((d + 1) / (d + EPSILON))


def distinctness_loss(prototypes):
    """Mean hinge (0.2 - distance to the nearest other)+ of prototypes [m, D], where a distance is 1 - |cosine|."""
    p = F.normalize(prototypes.float(), dim=1)
    apart = 1 - (p @ p.T).abs() + 2 * torch.eye(len(p), device=p.device)            # not oneself
    return (0.2 - apart.amin(1)).clamp(min=0).mean()


def correlation(s):
    """Pearson correlations between columns of s [N, m] -> [m, m]; 0 for a column that does not vary."""
    s = s - s.mean(0)
    s = s / s.square().sum(0).clamp(min=1e-12).sqrt()         # clamped before the root: its gradient at 0 is infinite
    return s.T @ s


def decorrelation_loss(s):
    """Mean squared correlation between different activations over a batch, s [B, m]; the paper leaves it open."""
    r = correlation(s.float())
    return (r * (1 - torch.eye(len(r), device=r.device))).square().sum() / (len(r) * (len(r) - 1))


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


SPREAD = 1.0                            # variance of a patch's features at the start, summed over their D numbers


class Patronus(nn.Module):
    """Noise predictor eps(xt, t, s), conditioned on activations s [B, m]; with x0 on those of the clean image.

    In training: forward(xt, t, None, x0) -> noise, s, penalties. latent: the model that draws s, trained afterwards.
    hide: probability with which the denoiser is not told an activation in training (choice). Prototypes of one pattern
    come and go together; told all of them, always, the denoiser need not listen to any by itself.
    """
    def __init__(self, unet, encoder, m, dim, latent, hide=0.0):
        super().__init__()
        self.unet, self.encoder, self.latent, self.hide = unet, encoder, latent.requires_grad_(False), hide
        self.prototypes = nn.Parameter(torch.rand(m, dim))    # U(0, 1), as in ProtoPNet
        self.mlp = nn.Sequential(nn.Linear(m, unet.emb_dim), nn.SiLU(), nn.Linear(unet.emb_dim, unet.emb_dim))
        self.register_buffer("mean", torch.zeros(m))          # of s at the start: what the MLP sees is standardised
        self.register_buffer("std", torch.ones(m))

    def maps(self, x0):
        """Activation of every prototype by every patch of images [B, C, S, S] -> [B, m, h, w]: where."""
        return activation(patch_distances(self.encoder(x0), self.prototypes))

    def encode(self, x0):
        """Activations by the closest patch, s [B, m], s_j from 0 to 9.2: what."""
        return activation(patch_distances(self.encoder(x0), self.prototypes).amin((2, 3)))

    def forward(self, xt, t, s, x0=None):
        if x0 is None:
            return self.unet(xt, t, self.mlp((s - self.mean) / self.std))
        s = self.encode(x0)
        with torch.autocast(x0.device.type, enabled=False):
            penalties = {"distinctness": distinctness_loss(self.prototypes), "decorrelation": decorrelation_loss(s)}
        told = F.dropout((s - self.mean) / self.std, self.hide, self.training)
        return self.unet(xt, t, self.mlp(told)), s, penalties

    @torch.no_grad()
    def begin(self, images, cfg, device):
        """Start at patches of real images: layers scaled one by one, features to a variance of SPREAD, then k-means++.

        From the paper's start squared distances are in the thousands, where activations are all alike and near 0.
        """
        index = random_index(images, min(500, len(images)), cfg.seed, 8)
        z = scaled(images, index, device)
        for layer in self.to(device).encoder:                 # [N, D, h, w]
            z = layer(z)
            if isinstance(layer, nn.Conv2d):
                size, z = z.std(), z / z.std()
                layer.weight /= size
                layer.bias /= size
        scale = (SPREAD / z.transpose(0, 1).flatten(1).var(1).sum()).sqrt()
        self.encoder[-2].weight *= scale
        self.encoder[-2].bias *= scale
        patches = (z * scale).permute(0, 2, 3, 1).flatten(0, 2)                     # [N h w, D]
        some = torch.randperm(len(patches), generator=torch.Generator().manual_seed(seed_of(cfg.seed, 7)))[:5000]
        self.prototypes.copy_(spread_points(patches.cpu()[some], len(self.prototypes), cfg.seed))
        s = self.encode(scaled(images, index, device))
        self.mean.copy_(s.mean(0))
        self.std.copy_(s.std(0).clamp(min=1e-3))

    def param_groups(self, cfg):
        slow = [*self.encoder.parameters(), self.prototypes]
        rest = [*self.unet.parameters(), *self.mlp.parameters()]
        return [dict(params=slow, factor=cfg.encoder_lr, start=0), dict(params=rest, factor=1.0, start=0)]


def level_weights(abar, emphasis):
    """Weight of the noise loss at each noise level, [T]: abar ** -emphasis, cut off at 50, then of mean 1 (choice).

    At high noise "all is noise" is nearly right, so the plain loss hardly feels a wrong brightness, which is settled
    there, and the denoiser does not learn to take it from s, although s knows it.
    """
    weights = (abar ** -emphasis).clamp(max=50)
    return weights / weights.mean()


def patronus_loss(cfg, net, batch, abar):
    """The noise loss, with s from the clean image: it trains denoiser, encoder and prototypes jointly."""
    eps, s, penalties = net(add_noise(batch.x0, batch.t, batch.eps, abar), batch.t, None, batch.x0)
    errors = (eps.float() - batch.eps).square().mean((1, 2, 3))                     # [B]
    weighted = (errors * level_weights(abar, cfg.emphasis)[batch.t]).mean()
    total = weighted + sum(getattr(cfg, name) * penalty for name, penalty in penalties.items())
    return {"loss": total, "diffusion": errors.mean(), **penalties,
            "spread of s": s.detach().std(0, correction=0).mean()}                  # 0: all images look alike to them


class LatentModel(nn.Module):
    """Noise predictor of the latent diffusion: standardised activations [B, m, 1, 1], t [B] -> [B, m, 1, 1].

    mean, std [m]: what s was standardised with. trained_at: step of the run whose activations it has learned.
    """
    def __init__(self, m, width, layers=4):
        super().__init__()
        self.width, self.first, self.last = width, nn.Linear(m, width), zeroed(nn.Linear(width, m))
        self.time_mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(),
                                                  nn.Linear(width, width)) for _ in range(layers))
        self.register_buffer("mean", torch.zeros(m))
        self.register_buffer("std", torch.ones(m))
        self.register_buffer("trained_at", torch.tensor(-1))

    def forward(self, x, t, condition=None):
        emb, h = self.time_mlp(time_embedding(t, self.width)), self.first(x.flatten(1))
        for layer in self.layers:
            h = h + layer(h + emb)
        return self.last(h).view_as(x)


def train_latent(latent, s, cfg, step, device):
    """Fit the latent model to activations s [N, m] of all training images by the noise loss, in float32 -> itself."""
    latent.mean.copy_(s.mean(0))
    latent.std.copy_(torch.where(s.std(0) > 1e-6, s.std(0), 1))
    s, abar = ((s.to(device) - latent.mean) / latent.std)[:, :, None, None], alpha_bars(cfg.latent_timesteps).to(device)
    torch.manual_seed(seed_of(cfg.seed, 12))
    model, gen = LatentModel(len(latent.mean), latent.width).to(device), torch.Generator(device)
    model.mean.copy_(latent.mean)
    model.std.copy_(latent.std)
    latent.load_state_dict(model.state_dict())                # the average starts where training does
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=cfg.latent_steps + 1)
    for i in range(cfg.latent_steps):
        gen.manual_seed(seed_of(cfg.seed, 10, i))
        x0 = s[random_index(s, 256, cfg.seed, 9, i)]
        t = torch.randint(cfg.latent_timesteps, (256,), generator=gen, device=device)
        eps = torch.randn(x0.shape, generator=gen, device=device)
        noise_loss(model, x0, None, t, eps, abar).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        update_average(latent, model, i)
        if sys.stdout.isatty() and (i + 1) % 100 == 0:
            progress(f"latent model: step {i + 1}/{cfg.latent_steps}")
    latent.trained_at.fill_(step)
    return latent


@torch.no_grad()
def draw_activations(latent, cfg, n, device):
    """n activation vectors from the latent diffusion, [n, m] on the CPU: DDIM through all its levels, not clipped."""
    gen = torch.Generator(device).manual_seed(seed_of(cfg.seed, 11))
    xT = torch.randn(n, len(latent.mean), 1, 1, generator=gen, device=device)
    x = sample(latent, xT, alpha_bars(cfg.latent_timesteps), cfg.latent_timesteps, "ddim", clip=False)
    return (x.flatten(1) * latent.std + latent.mean).clamp(0, -math.log(EPSILON)).cpu()


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
# 5  Diffusion: process, loss, samplers, inversion (float32; only the network runs in mixed precision)
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


def to_uint8(x):
    """[-1, 1] -> 0..255, rounded, on the CPU."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()


# exercise
@torch.no_grad()
def invert(predict, x0, abar, steps):
    """The DDIM ODE upwards (Song et al. 2021, section 4.3): images x0 -> the noise xT that leads back to them.

    The same levels as `sample`, lowest first. A step is that of DDIM: sqrt(a_next) x0 + sqrt(1 - a_next) eps, where x0
    is what x at abar a holds if its noise is eps. eps is predicted at the current x and its t; the clean image, with
    abar = 1 and no t of its own, is told the lowest t.
    """
    times = sample_times(len(abar), steps)[::-1]
    levels, x = [torch.ones(()), *abar.cpu()[times]], x0
    for i, (a, a_next) in enumerate(zip(levels, levels[1:])):
        eps = predict(x, torch.full((len(x),), times[max(0, i - 1)], device=x.device))
        x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
        x = a_next.sqrt() * x0 + (1 - a_next).sqrt() * eps
    return x


def predictor(model, cfg, s, device):
    """predict(x, t) for `sample` and `invert`: the network, in mixed precision, told activations s [N, m]."""
    whole, dtype = len(s) == cfg.sample_batch, amp_dtype(device, cfg.amp)           # else compiling costs more
    network = torch.compile(model, dynamic=False) if cfg.compile and whole else model

    def predict(x, t):
        with autocast(device, dtype):
            return network(x, t, s).float()
    return predict


@torch.no_grad()
def render(model, cfg, s, device, xT=None, shape=None, see=None):
    """Images of activations s [N, m], float32 [N, C, H, W] around [-1, 1], on the CPU. Stop if they are no numbers.

    From random noise (give shape: [C, H, W]), the same for the same cfg.seed, by cfg.sampler in cfg.sample_steps; or
    from inverted noise xT [N, C, H, W], by ddim in cfg.invert_steps, not clipped. see(t, x, x0), if given, is shown
    the noisy and the predicted image of every step (of one batch: N at most cfg.sample_batch).
    """
    abar, gen, images = alpha_bars(cfg.timesteps), torch.Generator(device), []
    for i, given in enumerate(s.to(device).split(cfg.sample_batch)):
        gen.manual_seed(seed_of(cfg.seed, 2, i))
        x = torch.randn(len(given), *shape, generator=gen, device=device) if xT is None else \
            xT[i * cfg.sample_batch:][:len(given)].to(device)
        predict = predictor(model, cfg, given, device)

        def watched(x, t):
            eps = predict(x, t)
            if see is not None:
                a = abar[t[0].item()]
                see(t[0].item(), x, (x - (1 - a).sqrt() * eps) / a.sqrt())
            return eps
        x = x.contiguous(memory_format=memory_format(device))
        x = sample(watched, x, abar, cfg.sample_steps, cfg.sampler, generator=gen) if xT is None else \
            sample(watched, x, abar, cfg.invert_steps, "ddim", clip=False)
        if not x.isfinite().all():
            raise Stop("the images are not numbers: try --amp off, or train again with a lower --lr")
        images.append(x.cpu())
        if sys.stdout.isatty():
            progress(f"sampling {i * cfg.sample_batch + len(given)}/{len(s)}")
    return torch.cat(images)


@torch.no_grad()
def activations(model, images, device):
    """s [N, m] of images on the CPU: uint8 [N, C, H, W], or float in [-1, 1]."""
    if images.dtype == torch.uint8:
        return torch.cat([model.encode(scaled(images, i, device)).cpu() for i in torch.arange(len(images)).split(500)])
    return torch.cat([model.encode(part.to(device).clamp(-1, 1)).cpu() for part in images.split(500)])


def invert_images(model, cfg, images, device):
    """uint8 images [N, C, H, W] -> their activations s [N, m] and the noise xT that leads back to them, on the CPU."""
    s, abar = activations(model, images, device), alpha_bars(cfg.timesteps)
    noise = [invert(predictor(model, cfg, s[i].to(device), device), scaled(images, i, device), abar, cfg.invert_steps)
             for i in torch.arange(len(images)).split(cfg.sample_batch)]
    return s, torch.cat(noise).cpu()


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
# 7  Metrics, and the six abilities: reconstruct, move, what and where, when, edit, diagnose
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


def traits(data):
    """What is known of images: attributes, else classes one by one -> bool [N, A], names; None, [] if neither."""
    if data.attributes is not None:
        return data.attributes, list(data.attribute_names)
    if data.labels is None or len(data.classes) < 2:
        return None, []
    return F.one_hot(data.labels, len(data.classes)).bool(), data.classes


def train_attribute_judge(cfg, train_set, device):
    """A classifier of the traits, trained apart: real images alone, another seed, for shapes other, unbiased images.

    Returns embed, image -> features; probabilities, features -> P [N, A]; real, the moments of its features of the
    training images. The Frechet distance in these features is not FID, and compares only under the same judge.
    """
    data = load_dataset("shapes", "judge", cfg.image_size) if cfg.dataset == "shapes" else train_set
    known, names = traits(data)
    torch.manual_seed(JUDGE_SEED)
    net = nn.Sequential(resnet(*data.images.shape[1:3], cfg.judge_width), nn.Linear(8 * cfg.judge_width, len(names)))
    net = fit(net, data.images, known.float(), F.binary_cross_entropy_with_logits, cfg.judge_steps, cfg, JUDGE_SEED,
              device)
    embed, head = net[0], net[1].cpu()
    return SimpleNamespace(embed=embed, probabilities=lambda z: head(z).sigmoid(),
                           real=moments(features_of(embed, train_set.images, device)))


# exercise
def auroc(score, positive):
    """Area under the ROC curve: P(a positive scores above a negative), ties half; score [N], positive bool [N].

    With P positives, N negatives: (sum of the positives' ranks - P (P + 1) / 2) / (P N), where ranks count all scores
    from 1 upwards and ties share their mean rank. NaN without positives or without negatives.
    """
    _, place, count = score.unique(return_inverse=True, return_counts=True)
    rank = (count.cumsum(0) - (count - 1) / 2).double()[place]                      # 1..N, the mean rank of ties
    P, N = positive.sum().item(), (~positive).sum().item()
    return (rank[positive].sum().item() - P * (P + 1) / 2) / (P * N) if P and N else math.nan


def single_aurocs(s, known):
    """AUROC of every activation alone for every trait: s [N, m], known bool [N, A] -> float64 [m, A]."""
    return torch.tensor([[auroc(column, positive) for positive in known.T] for column in s.T], dtype=torch.float64)


def logistic_aurocs(s, known, folds=5):
    """AUROC of all activations together: s [N, m], known bool [N, A] -> float64 [A], mean over held-out folds.

    Logistic regression on standardised s with the weight decay of C = 1 (sum of losses + ||w||^2 / 2), by L-BFGS.
    """
    order, found = torch.randperm(len(s), generator=torch.Generator().manual_seed(0)), []
    for fold in order.chunk(folds):
        rest = torch.ones(len(s), dtype=torch.bool).index_fill_(0, fold, False)
        x = ((s - s[rest].mean(0)) / s[rest].std(0).clamp(min=1e-6)).double()
        w, bias = (torch.zeros(n, known.shape[1], dtype=torch.float64, requires_grad=True) for n in (s.shape[1], 1))
        optimizer = torch.optim.LBFGS([w, bias], max_iter=100, line_search_fn="strong_wolfe")

        def objective():
            optimizer.zero_grad()
            logits = x[rest] @ w + bias
            loss = F.binary_cross_entropy_with_logits(logits, known[rest].double(), reduction="sum") / rest.sum()
            loss = loss + w.square().sum() / 2 / rest.sum()
            loss.backward()
            return loss
        optimizer.step(objective)
        scores = (x[fold] @ w + bias).detach()
        found.append(torch.tensor([auroc(*pair) for pair in zip(scores.T, known[fold].T)], dtype=torch.float64))
    return torch.stack(found).mean(0)


def mutual_information(a, b):
    """I(a; b) in nats of two bool columns [N]; with itself it is the entropy."""
    joint = torch.bincount(2 * a.long() + b.long(), minlength=4).view(2, 2).double() / len(a)
    entropy = [torch.special.entr(p).sum() for p in (joint.sum(1), joint.sum(0), joint)]
    return (entropy[0] + entropy[1] - entropy[2]).item()


def disentanglement(s, known):
    """TAD (Yeats et al. 2022): s [N, m], known bool [N, A] -> total, number of traits that one activation captures.

    Of each trait that no other tells (mutual information over its own entropy at most 0.2) and whose best single AUROC,
    max(AUC, 1 - AUC), is at least 0.75: best minus second best.
    """
    strength = single_aurocs(s, known)
    strength = torch.maximum(strength, 1 - strength).nan_to_num(0.5)                # [m, A]
    total, captured = 0.0, 0
    for i, a in enumerate(known.T):
        shared = max((mutual_information(a, b) for k, b in enumerate(known.T) if k != i), default=0.0)
        best, second = strength[:, i].topk(2).values.tolist()
        if best >= 0.75 and shared <= 0.2 * mutual_information(a, a):
            total, captured = total + best - second, captured + 1
    return total, captured


def prototype_state(s):
    """Activations of held-out images s [N, m] -> live bool [m], counts of dead and duplicate prototypes (choice).

    Dead: its spread (standard deviation) over images is less than a twentieth of the liveliest one's.
    Duplicate: live, but correlated by over 0.95 (either sign) with a live one before it.
    """
    spread = s.std(0)
    dead, r = spread < 0.05 * spread.max(), correlation(s).abs()
    twin = torch.zeros_like(dead)
    for j in range(len(r)):
        twin[j] = not dead[j] and bool((r[j, :j] > 0.95)[~(dead | twin)[:j]].any())
    return ~(dead | twin), int(dead.sum()), int(twin.sum())


def reconstruct(model, cfg, images, device):
    """uint8 images -> float [N, C, H, W], regenerated from their s and inverted xT: reconstruct."""
    s, xT = invert_images(model, cfg, images, device)
    return render(model, cfg, s, device, xT)


def vary(model, cfg, images, n, device):
    """uint8 images [N, C, H, W] -> [N, n, C, H, W], regenerated from their s and random xT: variations."""
    s = activations(model, images, device).repeat_interleave(n, 0)
    return render(model, cfg, s, device, shape=images.shape[1:]).view(len(images), n, *images.shape[1:])


# exercise
def spherical(a, b, share):
    """Spherical interpolation (Shoemake 1985): noise a, b [C, H, W], share [n] from 0 (a) to 1 (b) -> [n, C, H, W].

    (sin((1 - share) angle) a + sin(share angle) b) / sin(angle), angle: between a and b as two long vectors. Its cosine
    is kept within +-0.9999, where this is as good as linear and nothing is divided by 0.
    """
    angle = torch.acos(F.cosine_similarity(a.flatten(), b.flatten(), dim=0).clamp(-0.9999, 0.9999))
    share = share[:, None, None, None]
    return (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)


def interpolate(model, cfg, pair, device, n=9):
    """Between two uint8 images [2, C, H, W], linear in s and spherical in xT -> [n, C, H, W]."""
    (s, xT), share = invert_images(model, cfg, pair, device), torch.linspace(0, 1, n)
    return render(model, cfg, torch.lerp(s[0], s[1], share[:, None]), device, spherical(*xT, share))


def company(s_all, chosen):
    """How all activations change with the k chosen ones, by linear regression over images s_all [N, m] -> [k, m].

    Prototypes of one pattern come and go together. One of them at another value, and the others not, is an image that
    there is not, and moves little (choice; the paper moves the chosen ones alone).
    """
    covariance = torch.cov(s_all.T)
    return torch.linalg.pinv(covariance[chosen][:, chosen], rtol=1e-3, hermitian=True) @ covariance[chosen]


def set_activations(s, chosen, values, slopes=None):
    """Activations s [N, m] with the k chosen ones at values [N or 1, k]; slopes, of `company`: the others follow."""
    moved = s.clone() if slopes is None else (s + (values - s[:, chosen]) @ slopes).clamp(0, -math.log(EPSILON))
    moved[:, chosen] = values
    return moved


def move(model, cfg, s, xT, j, values, device, slopes=None):
    """One image, s [m] and inverted xT [C, H, W], for each value [n] of its activation j: edit -> [n, C, H, W].

    slopes: of `company` for j, if the others are to follow.
    """
    rows = set_activations(s.repeat(len(values), 1), [j], torch.as_tensor(values)[:, None], slopes)
    return render(model, cfg, rows, device, xT.expand(len(values), *xT.shape))


def best_patches(model, images, chosen, device):
    """uint8 or float images [N, C, S, S], prototypes chosen [k] -> boxes int64 [N, k, 2]: row, column of the corner.

    Of each image the patch that activates the prototype most; `receptive_field` gives its size. It may begin at -1,
    in the padding.
    """
    x = images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images
    maps = torch.cat([model.maps(part.to(device))[:, chosen].cpu() for part in x.split(250)])       # [N, k, h, w]
    best, (start, _, step) = maps.flatten(2).argmax(2), receptive_field(model.encoder)
    return start + step * torch.stack([best // maps.shape[-1], best % maps.shape[-1]], -1)


def show_prototype(model, cfg, s, xT, j, value, device, slopes=None):
    """What is prototype j? Raise s_j of all images s [N, m], xT [N, C, H, W] to value, regenerate.

    slopes: of `company` for j, if the others are to follow.

    Returns the image that then responds most, [C, H, W], its response, and the corner of the patch that does.
    """
    images = render(model, cfg, set_activations(s, [j], torch.tensor([[value]]), slopes), device, xT)
    response = activations(model, images, device)[:, j]
    image = images[response.argmax()]
    return image, response.max().item(), best_patches(model, image[None], [j], device)[0, 0]


def emergence(model, cfg, s, device, shape, steps=50):
    """When: s of the image predicted at every step from random noise -> t [steps], [steps, N, m]."""
    times, seen, steps = [], [], min(steps, cfg.timesteps)
    cfg = dataclasses.replace(cfg, sampler="ddim", sample_steps=steps, sample_batch=len(s), compile=False)

    def see(t, x, x0):
        times.append(t)
        seen.append(activations(model, x0.cpu(), device))
    render(model, cfg, s, device, shape=shape, see=see)
    return times, torch.stack(seen)


def emerged_at(course, share=0.9):
    """The first step from which on s_j stays at `share` of its end or more: course [steps, ...] -> int64 [...]."""
    below = course < share * course[-1]
    last = torch.arange(1, len(course) + 1).view(-1, *[1] * (course.dim() - 1)) * below
    return last.amax(0)


def switch(model, cfg, s_a, s_b, at, device, shape):
    """Conditioned on s_a [N, m] while t >= at, on s_b below: the switch, from random noise -> [N, C, H, W]."""
    def switching(x, t, both):
        return model(x, t, torch.where((t >= at)[:, None], *both.chunk(2, dim=1)))
    return render(switching, dataclasses.replace(cfg, compile=False), torch.cat([s_a, s_b], 1), device, shape=shape)


# exercise
def choose_movers(s, known, a, b, n=3):
    """The n activations with the best single AUROC for trait a, those best for trait b excluded.

    s [N, m], known bool [N, A]; a, b: columns of known -> a list of n numbers, best first. AUC and 1 - AUC tell as
    much, NaN tells nothing, as 0.5 does. Excluded are the n best for b.
    """
    auc = single_aurocs(s, known[:, [a, b]])
    strength = torch.maximum(auc, 1 - auc).nan_to_num(0.5)    # [m, 2]
    order = strength[:, 0].argsort(descending=True).tolist()
    return [j for j in order if j not in strength[:, 1].topk(n).indices.tolist()][:n]


def diagnose(model, cfg, judge, data, a, b, device, most=300):
    """Does trait a drag trait b along? On held-out data -> dict of figures, and images to look at.

    The movers go to their mean over images of the opposite of a, the others follow as they do on these images, which
    are balanced: nothing but the model ties b to a. Image and edited image start from the same random xT.
    leak: mean signed change of P(b) per unit change of P(a), + if b follows a; its interval is a bootstrap of images.
    """
    known, s = traits(data)[0], activations(model, data.images, device)
    movers = choose_movers(s, known, a, b)
    mean = torch.stack([s[~known[:, a]].mean(0), s[known[:, a]].mean(0)])           # without a, with a: [2, m]
    some = torch.randperm(len(s), generator=torch.Generator().manual_seed(seed_of(cfg.seed, 13)))[:most]
    has = known[some, a]
    edited = set_activations(s[some], movers, mean[(~has).long()][:, movers], company(s, movers))
    pictures = [to_uint8(render(model, cfg, part, device, shape=data.images.shape[1:])) for part in (s[some], edited)]
    before, after = (judge.probabilities(features_of(judge.embed, part, device)) for part in pictures)
    change = torch.where(has, -1, 1)[:, None] * (after - before)[:, [a, b]]         # [N, 2]
    draws = torch.randint(len(some), (1000, len(some)), generator=torch.Generator().manual_seed(0))
    leaks = change[draws].mean(1)
    low, high = (leaks[:, 1] / leaks[:, 0]).quantile(torch.tensor([0.025, 0.975])).tolist()
    moved, dragged = change.mean(0).tolist()
    figures = {"moved prototypes": movers, "change of P(attribute)": moved, "change of P(watched)": dragged,
               "leak": dragged / moved if moved else math.nan, "leak, 95 % from": low, "leak, 95 % to": high}
    return figures, SimpleNamespace(before=pictures[0], after=pictures[1], p_before=before[:, [a, b]],
                                    p_after=after[:, [a, b]], has=has)


def raised_prototypes(model, cfg, s_all, images, device):
    """Raise each live prototype to its largest value in s_all [N, m]: share of (prototype, image) pairs that respond.

    A pair responds if the edited image, encoded again, has a larger s_j than the unedited reconstruction has. Returns
    the share with the others as they are, the share with their `company`, and the number of pairs.
    """
    live = prototype_state(s_all)[0].nonzero().flatten()
    n = min(len(images), max(1, -(-cfg.pairs // len(live))))
    s, xT = invert_images(model, cfg, images[:n], device)
    plain, top, shares = activations(model, render(model, cfg, s, device, xT), device), s_all.amax(0), []
    for follow in (lambda j: None, lambda j: company(s_all, [j])):
        rows = torch.stack([set_activations(s, [j], top[[j]], follow(j)) for j in live.tolist()])   # [live, n, m]
        images = render(model, cfg, rows.flatten(0, 1), device, xT.repeat(len(live), 1, 1, 1))
        again = activations(model, images, device)
        up = again.view(len(live), n, -1)[torch.arange(len(live)), :, live] > plain[:, live].T      # [live, n]
        shares.append(up.float().mean().item())
    return *shares, up.numel()


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


COLOURS = matplotlib.colormaps["tab20"].colors


def draw_panels(path, panels, title, rows=(), columns=(), size=1.1):
    """A grid of axes, each drawn by its panel(axes), panels [R][C] (None: empty), with names of rows and columns."""
    R, C = len(panels), max(len(row) for row in panels)
    fig = Figure(figsize=(1.2 + size * C, 0.8 + 1.15 * size * R), layout="constrained")
    for r, row in enumerate(fig.subplots(R, C, squeeze=False)):
        for c, axes in enumerate(row):
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if c < len(panels[r]) and panels[r][c]:
                panels[r][c](axes)
            if c == 0 and r < len(rows):
                axes.set_ylabel(rows[r], rotation=0, ha="right", va="center", fontsize="small")
            if r == 0 and c < len(columns):
                axes.set_title(columns[c], fontsize="small")
    fig.suptitle(title, fontsize="medium", wrap=True)
    fig.savefig(path, dpi=120)


def panel(image, box=None, size=0, text="", heat=None, extent=None):
    """A function that draws an image, uint8 or float [C, H, W], with a framed patch, text below, a heat map over it."""
    image = image if image.dtype == torch.uint8 else to_uint8(image)

    def draw(axes):
        axes.imshow(image.expand(3, -1, -1).permute(1, 2, 0), interpolation="nearest")
        if box is not None:
            y, x = (box - 0.5).tolist()
            for colour, width in (("white", 2.6), ("black", 1.2)):                  # seen on any image
                axes.add_patch(matplotlib.patches.Rectangle((x, y), size, size, fill=False, color=colour,
                                                            linewidth=width))
        if heat is not None:
            axes.imshow(heat, extent=extent, cmap="inferno", alpha=0.65, interpolation="nearest")
        side = image.shape[-1]
        axes.set(xlim=(-1.5, side + 0.5), ylim=(side + 0.5, -1.5))
        axes.set_xlabel(text, fontsize="x-small")
    return draw


def draw_reconstruction(path, real, inverted):
    """reconstruction.png: uint8 images [n, C, H, W] above what s and inverted noise give back, and the error."""
    error = (inverted.clamp(-1, 1) - (real.float() / 127.5 - 1)).abs().mean((1, 2, 3)).tolist()
    draw_panels(path, [[panel(x) for x in real], [panel(x, text=f"{e:.3f}") for x, e in zip(inverted, error)]],
                "Reconstruction: from the activations s and the noise that the sampler run backwards leads to",
                ["held-out image", "reconstruction\n(mean abs. error\non [-1, 1])"])


def draw_variations(path, real, varied):
    """variations.png: uint8 images [n, C, H, W] beside images of the same s from random noise, varied [n, k, ...]."""
    columns = ["real image", *["same s"] * varied.shape[1]]
    draw_panels(path, [[panel(x), *map(panel, row)] for x, row in zip(real, varied)],
                "Variations: the same activations s, other noise. What stays is what s knows; what changes it does not",
                columns=columns)


def draw_interpolation(path, pairs, courses):
    """interpolation.png: pairs of real images [P, 2, C, H, W], and what lies between them, [P, n, C, H, W]."""
    n = courses.shape[1]
    draw_panels(path, [[panel(a), *map(panel, course), panel(b)] for (a, b), course in zip(pairs, courses)],
                "Interpolation: from one image to another, linear in s, spherical in the noise",
                columns=["real A", *(f"{i / (n - 1):.0%}" for i in range(n)), "real B"])


def draw_extrapolation(path, real, courses, names, values):
    """extrapolation.png: a row a prototype: one image, with s_j from 0 past its largest value; courses [k, n, ...]."""
    rows = [[panel(real), *(panel(x, text=f"{v:.2g}") for x, v in zip(course, row))]
            for course, row in zip(courses, values)]
    draw_panels(path, rows, "Extrapolation: s_j (below) from 0 past its largest on real images; others follow", names,
                ["real image", *[""] * (courses.shape[1] - 2), "largest", "x 1.5"])


def draw_prototypes_seen(path, shown, boxes, real, real_boxes, size, names):
    """prototypes.png: what each prototype is. Regenerated images [k, ...] beside the real ones [k, n, ...], framed."""
    rows = [[panel(x, box, size), None, *(panel(r, b, size) for r, b in zip(row, row_boxes))]
            for x, box, row, row_boxes in zip(shown, boxes, real, real_boxes)]
    title = "What: a held-out image with s_j raised and those that come with it (left), and the real patches that "\
            "activate prototype j most"
    draw_panels(path, rows, title, names, ["s_j raised", "", *[f"real no. {i + 1}" for i in range(real.shape[1])]])


def draw_consistency(path, real, raised, boxes, texts, size, names):
    """consistency.png: the same k prototypes raised on n images; raised [n, k, C, H, W], boxes, texts [n][k]."""
    rows = [[panel(x), *(panel(y, b, size, text) for y, b, text in zip(*row))]
            for x, *row in zip(real, raised, boxes, texts)]
    draw_panels(path, rows, "Consistency: does raising a prototype and its company do the same to every image? "
                "(below: s_j encoded again, before > after)", columns=["real image", *names], size=1.3)


def draw_where(path, real, maps, extent, names):
    """where.png: activation maps [N, k, h, w] of k prototypes over each real image [N, C, H, W]."""
    rows = [[panel(x), *(panel(x, heat=heat, extent=extent, text=f"{heat.max():.2g}") for heat in row)]
            for x, row in zip(real, maps)]
    draw_panels(path, rows, "Where: how strongly each patch activates the prototype (below: the largest, which is s_j)",
                columns=["real image", *names], size=1.2)


def draw_denoising_seen(path, steps, names, T):
    """denoising.png: from noise to image. steps: (t, noisy [n, C, H, W], predicted [n, C, H, W]) for each column."""
    rows = [[panel(part[i].clamp(-1, 1)) for _, *parts in steps for part in [parts[k]]]
            for i in range(len(steps[0][1])) for k in (0, 1)]
    draw_panels(path, rows, f"From noise to image: noisy, and the image predicted from that (t: noise level, of {T})",
                [f"{name}, {what}" for name in names for what in ("noisy", "predicted")], [f"t={t}" for t, *_ in steps])


def draw_when(path, times, course, order, emerged, curves, T):
    """when.png: s_j of the predicted image over its end, in the order in which prototypes emerge, and the switch.

    course [steps, m]; order [m]; emerged [m], steps; curves: trait -> (t of the switch, share that is B's), or None.
    """
    fig = Figure(figsize=(15 if curves else 8, 5.5), layout="constrained")
    panels = fig.subplots(1, 2 if curves else 1, squeeze=False).flat
    shown = (course / course[-1].clamp(min=1e-6))[:, order].clamp(0, 1.2).T         # [m, steps]
    picture = panels[0].imshow(shown, aspect="auto", cmap="viridis", interpolation="nearest")
    panels[0].plot([emerged[j] - 0.5 for j in order], range(len(order)), color="white", drawstyle="steps-mid")
    ticks = range(0, len(times), max(1, len(times) // 8))
    panels[0].set_xticks(list(ticks), [times[i] for i in ticks])
    panels[0].set_yticks(range(len(order)), order, fontsize=6)
    panels[0].set(title="prototypes in the order in which they emerge (white: 90 % reached for good)",
                  xlabel="noise level t of denoising, from noise (left) to image", ylabel="prototype")
    fig.colorbar(picture, ax=panels[0], label="s_j of the predicted image / at the end")
    for name, (at, share) in (curves or {}).items():
        panels[1].plot(at, share, ".-", label=name)
    if curves:
        panels[1].invert_xaxis()
        panels[1].set(title="switch: told s of image A until t, then s of B. Whose trait is it in the end?",
                      xlabel=f"t of the switch ({T}: B all along, 0: A all along)", ylabel="share of images with B's",
                      ylim=(0, 1))
        panels[1].legend(title="trait")
        panels[1].grid(alpha=0.3)
    fig.suptitle("When: the course of denoising")
    fig.savefig(path, dpi=110)


def draw_diagnosis(path, figures, seen, a, b, n=8):
    """diagnosis.png: images as they are and edited, with the judge's P(a) and P(b), and the mean changes."""
    rows = []
    for images, p in ((seen.before, seen.p_before), (seen.after, seen.p_after)):
        rows.append([panel(x, text=f"{q[0]:.2f} / {q[1]:.2f}") for x, q in zip(images[:n], p[:n])])

    def bars(axes):
        changes = [figures["change of P(attribute)"], figures["change of P(watched)"]]
        axes.bar([0, 1], changes, color=["grey", "crimson"])
        axes.set(xlim=(-0.7, 1.7), ylim=(-0.25, 1), yticks=[0, 0.5, 1])
        axes.set_xticks([0, 1], [f"P({a})", f"P({b})"], fontsize=6)
        axes.axhline(0, color="black", linewidth=0.5)
        axes.set_title("mean change", fontsize="small")
    rows[0].append(bars)
    text = (f"Diagnosis: prototypes {', '.join(map(str, figures['moved prototypes']))} moved to the opposite of '{a}'. "
            f"Does '{b}' follow?\nleak {figures['leak']:.2f} (95 % {figures['leak, 95 % from']:.2f} to "
            f"{figures['leak, 95 % to']:.2f}); below each image the judge's P({a}) / P({b})")
    draw_panels(path, rows, text, ["as it is", "edited"], size=1.4)


# --------------------------------------------------------------------------------------------------------------------
# 9  Main: train | sample | evaluate | explain | edit | diagnose | compare
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


def load_sets_patronus(cfg):
    """(training set, with the planted bias if there is one, held-out set, without)."""
    if cfg.bias != 0.5 and cfg.dataset != "shapes":
        raise Stop(f"--bias plants a correlation in shapes alone: leave it out with --dataset {cfg.dataset}")
    sets = load_sets(cfg, labelled=False)
    if len(sets[1].images) < 8:
        raise Stop(f"{cfg.data_dir} leaves {len(sets[1].images)} held-out images, and the pictures show 8: add images")
    if cfg.bias != 0.5:
        sets[0] = make_shapes(len(sets[0].images), cfg.image_size, SHAPE_SPLITS["train"][1], cfg.bias)
    return sets


def train_patronus(cfg, folder, sets, device, latent=True):
    """Train in `folder`, on from its checkpoint if there is one; latent: then the latent model -> model, extra, log."""
    images, checkpoint = sets[0].images, folder / "checkpoint.pt"
    extra = dict(shape=list(images.shape[1:]), classes=sets[0].classes, images=len(images))
    torch.manual_seed(cfg.seed)
    model = cfg.build(extra)
    if checkpoint.exists():
        if load_checkpoint(checkpoint)["extra"] != extra:
            raise Stop(f"the training images of {folder} have changed since it began: restore them, or start a new run")
    elif cfg.start == "features":
        model.begin(images, cfg, device)
    nothing = torch.zeros(len(images), dtype=torch.int64)     # no label is seen
    model, log = train(cfg, model, images, nothing, functools.partial(patronus_loss, cfg), folder, extra, device)
    state = load_checkpoint(checkpoint) if RANK == 0 and latent else {}
    if state and model.latent.trained_at != state["step"]:
        start = time.perf_counter()
        train_latent(model.latent, activations(model, images, device).to(device), cfg, state["step"], device)
        log["latent seconds"] = time.perf_counter() - start
        save_safely({**state, "average": model.state_dict(), "log": log}, checkpoint)
    if RANK == 0 and log["rows"]:
        draw_curves(folder / "curves.png", log["rows"])
    return model, extra, log


def sample_patronus(cfg, model, extra, folder, device):
    """Unconditional samples, through the latent model -> uint8 [N, C, H, W], in samples.png and samples.npz.

    samples.npz: arr_0 uint8 [N, H, W, C], what the guided-diffusion evaluator reads; s [N, m], their activations.
    """
    s = draw_activations(model.latent, cfg, cfg.num_samples, device)
    images = to_uint8(render(model, cfg, s, device, shape=extra["shape"]))
    save_safely(dict(arr_0=images.permute(0, 2, 3, 1).numpy(), s=s.numpy()), folder / "samples.npz")
    rows = -(-min(len(images), 100) // 10)
    shown = torch.cat([images[:100], images.new_full((100, *images.shape[1:]), 255)])[:rows * 10]
    draw_grid(folder / "samples.png", shown, [""] * rows, f"{cfg.dataset}, Patronus, {cfg.steps} steps, unconditional; "
              f"{cfg.sample_steps} {cfg.sampler} steps, seed {cfg.seed}")
    return images


def watched_traits(cfg, data):
    """Indices of the traits --attribute and --watch; Stop if the data has none, or not these."""
    known, names = traits(data)
    if not names:
        raise Stop(f"{cfg.dataset} here has no attributes or classes to diagnose")
    pair = (cfg.attribute or names[0], cfg.watch or names[-1])
    for name in pair:
        if name not in names:
            raise Stop(f"there is no attribute '{name}': choose of {', '.join(names[:40])}")
        if len(known[:, names.index(name)].unique()) < 2:
            raise Stop(f"held-out images are all alike in '{name}': give another --attribute or --watch")
    if pair[0] == pair[1]:
        raise Stop(f"--attribute and --watch are both '{pair[0]}': give two different ones")
    return [names.index(name) for name in pair]


def diagnose_patronus(cfg, model, judge, data, folder, device):
    """Diagnosis into diagnosis.png -> dict of figures."""
    (a, b), names = watched_traits(cfg, data), traits(data)[1]
    figures, seen = diagnose(model, cfg, judge, data, a, b, device)
    draw_diagnosis(folder / "diagnosis.png", figures, seen, names[a], names[b])
    return {"attribute": names[a], "watched": names[b], **figures}


def explain_patronus(cfg, model, judge, data, folder, device):
    """Every ability of the paper as a picture in `folder`, on held-out images. judge: None without traits."""
    shape, images, s_all = data.images.shape[1:], data.images, activations(model, data.images, device)
    live, top = prototype_state(s_all)[0], s_all.amax(0)
    chosen = torch.where(live, s_all.std(0), -1).topk(min(8, int(live.sum()))).indices.tolist()     # the liveliest
    names, size = [f"prototype {j}" for j in chosen], receptive_field(model.encoder)[1]
    slopes = {j: company(s_all, [j]) for j in chosen}
    gen = torch.Generator().manual_seed(seed_of(cfg.seed, 14))
    some = images[torch.randperm(len(images), generator=gen)[:64]]                  # data may be sorted
    few = some[:8]
    s, xT = invert_images(model, cfg, few, device)

    inverted = render(model, cfg, s, device, xT)
    draw_reconstruction(folder / "reconstruction.png", few, inverted)
    draw_variations(folder / "variations.png", few[:5], vary(model, cfg, few[:5], 8, device))
    courses = torch.stack([interpolate(model, cfg, few[[i, i + 1]], device) for i in (0, 2, 4)])
    draw_interpolation(folder / "interpolation.png", torch.stack([few[[i, i + 1]] for i in (0, 2, 4)]), courses)

    values = [[share * top[j].item() for share in (0, 0.25, 0.5, 0.75, 1, 1.5)] for j in chosen[:6]]
    courses = torch.stack([move(model, cfg, s[0], xT[0], j, row, device, slopes[j]) for j, row in zip(chosen, values)])
    draw_extrapolation(folder / "extrapolation.png", few[0], courses, names, values)

    shown = [show_prototype(model, cfg, s, xT, j, top[j].item(), device, slopes[j]) for j in chosen]
    most = s_all[:, chosen].topk(6, dim=0).indices.T          # [k, 6]
    real_boxes = torch.stack([best_patches(model, images[row], [j], device)[:, 0] for row, j in zip(most, chosen)])
    draw_prototypes_seen(folder / "prototypes.png", [x for x, *_ in shown], [box for *_, box in shown], images[most],
                         real_boxes, size, names)

    rows = torch.stack([set_activations(s[:5], [j], top[[j]], slopes[j]) for j in chosen[:6]], 1)   # [5, k, m]
    raised = render(model, cfg, rows.flatten(0, 1), device, xT[:5].repeat_interleave(rows.shape[1], 0))
    raised, before = raised.unflatten(0, rows.shape[:2]), activations(model, inverted[:5], device)
    boxes = [[best_patches(model, x[None], [j], device)[0, 0] for x, j in zip(row, chosen)] for row in raised]
    texts = [[f"{before[i, j]:.2g} > {after[j]:.2g}" for after, j in zip(activations(model, row, device), chosen)]
             for i, row in enumerate(raised)]
    draw_consistency(folder / "consistency.png", few[:5], raised, boxes, texts, size, names[:6])

    start, size, step = receptive_field(model.encoder)
    maps = model.maps(scaled(few, torch.arange(5), device)).cpu()[:, chosen[:6]]
    first = start + (size - step) / 2 - 0.5                   # edges of the middles of the patches
    extent = (first, first + step * maps.shape[-1], first + step * maps.shape[-1], first)
    draw_where(folder / "where.png", few[:5], maps, extent, names[:6])

    times, course = emergence(model, cfg, activations(model, some, device), device, shape)
    present = course[-1] >= course[-1].quantile(0.75, dim=0)  # [64, m]: images that have the pattern
    emerged = torch.where(present, emerged_at(course).float(), math.nan).nanmedian(0).values
    mean = (course * present).sum(1) / present.sum(0).clamp(min=1)                  # [steps, m]
    order = sorted(live.nonzero().flatten().tolist(), key=lambda j: emerged[j].item())
    curves = switch_curves(cfg, model, judge, data, device) if judge else None
    draw_when(folder / "when.png", times, mean, order, emerged, curves, cfg.timesteps)

    seen, some_steps = [], dataclasses.replace(cfg, sampler="ddim", sample_steps=9, sample_batch=3, compile=False)
    render(model, some_steps, s[:3], device, shape=shape, see=lambda t, x, x0: seen.append((t, x.cpu(), x0.cpu())))
    draw_denoising_seen(folder / "denoising.png", seen, [f"image {i + 1}" for i in range(3)], cfg.timesteps)
    return {"emerged at t": {j: times[min(int(emerged[j]), len(times) - 1)] for j in order}, "switch": curves}


def switch_curves(cfg, model, judge, data, device, pairs=100):
    """For the first ten traits, over pairs that differ in it: t of the switch, and share of results that have B's."""
    known, names = traits(data)
    gen = torch.Generator().manual_seed(seed_of(cfg.seed, 15))
    a, b = torch.randperm(len(data.images), generator=gen)[:2 * pairs].chunk(2)
    a, b = a[:len(b)], b[:len(a)]
    s_a, s_b = (activations(model, data.images[i], device) for i in (a, b))
    at = [round(share * cfg.timesteps) for share in (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)]
    results = []
    for t in at:
        images = to_uint8(switch(model, cfg, s_a, s_b, t, device, data.images.shape[1:]))
        results.append(judge.probabilities(features_of(judge.embed, images, device)) > 0.5)
    differ = known[a] != known[b]                             # [pairs, A]
    shares = torch.stack([((found == known[b]) & differ).sum(0) / differ.sum(0) for found in results])
    return {name: (at, shares[:, i].tolist()) for i, name in enumerate(names[:10])}


def measure_patronus(cfg, model, extra, log, sets, judge, folder, device):
    """Samples, metrics and the diagnosis of a trained model in `folder`, metrics.json."""
    clock, n, held_out = time.perf_counter(), cfg.num_samples, sets[1]
    order = torch.randperm(len(held_out.images), generator=torch.Generator().manual_seed(seed_of(cfg.seed, 16)))
    order = order[torch.arange(n) % len(order)]               # held-out images to take s from
    samples = {"unconditional": sample_patronus(cfg, model, extra, folder, device)}
    s_all = activations(model, held_out.images, device)
    varied = render(model, cfg, s_all[order], device, shape=extra["shape"])
    samples["conditional"] = to_uint8(varied)
    seconds = {"training": log["seconds"], "latent model": log.get("latent seconds", 0),
               "sampling": time.perf_counter() - clock}
    few = held_out.images[order[:64]]
    inverted = reconstruct(model, cfg, few, device)
    error = (inverted.clamp(-1, 1) - (few.float() / 127.5 - 1)).abs().mean().item()
    alone, accompanied, pairs = raised_prototypes(model, cfg, s_all, few, device)
    live, dead, duplicates = prototype_state(s_all)
    results = {"reconstruction, mean absolute error": error, "raised prototypes that respond": accompanied,
               "raised prototypes that respond, alone": alone, "raised pairs": pairs,
               "live prototypes": int(live.sum()), "dead prototypes": dead, "duplicate prototypes": duplicates,
               "root mean squared correlation of s": decorrelation_loss(s_all).sqrt().item()}
    known, names = traits(held_out)
    if judge:
        def agreement(images, truth):
            said = judge.probabilities(features_of(judge.embed, images, device)) > 0.5
            return dict(zip(names, (said == truth).float().mean(0).tolist()))
        auc, (tad, captured) = logistic_aurocs(s_all, known), disentanglement(s_all, known)
        results |= {"AUROC of s": dict(zip(names, auc.tolist())), "mean AUROC": auc.nanmean().item(),
                    "TAD": tad, "traits captured (TAD)": captured,
                    "agreement, same s and random noise": agreement(samples["conditional"], known[order]),
                    "agreement, real held-out images": agreement(held_out.images, known)}
        if cfg.dataset == "shapes":
            local = [results["AUROC of s"][name] for name in LOCAL_ATTRIBUTES]
            results["mean AUROC of the local ones"] = sum(local) / len(local)
        for kind, images in {**samples, "real held-out images": held_out.images}.items():
            found = moments(features_of(judge.embed, images, device))
            results[f"Frechet distance (not FID), {kind}"] = frechet_distance(*found, *judge.real)
        results["diagnosis"] = diagnose_patronus(cfg, model, judge, held_out, folder, device)
    for kind, images in samples.items():
        results[f"inception, {kind}"] = inception_metrics(cfg, images, sets[0].images, device)
    about = dict(settings=vars(cfg), training_images=len(sets[0].images), machine=machine(device),
                 torch=torch.__version__, seconds=seconds, results=results)
    save_safely(about, folder / "metrics.json")
    print(f"{n} samples, {cfg.sample_steps} {cfg.sampler} steps, seed {cfg.seed}; seconds: "
          f"{', '.join(f'{k} {v:.0f}' for k, v in seconds.items())} ({about['machine']})")
    for name, value in results.items():
        for part, number in (value.items() if isinstance(value, dict) else [("", value)]):
            text = f"{number:,.4g}" if isinstance(number, float) else str(number)
            print(f"  {name + (': ' if part else '') + part:66} {text}")


LOCAL_ATTRIBUTES = ("warm hue", "bright background", "dot")   # of shapes: one patch tells


def edit_patronus(cfg, made, device):
    """--edit: an image with some activations set -> edit.png, and the image itself."""
    changes = {}
    for word in cfg.set.split(",") if cfg.set else []:
        j, _, value = word.partition("=")
        if not j.strip().isdecimal() or int(j) >= cfg.num_prototypes:
            raise Stop(f"--set {word} names no prototype: give 0 to {cfg.num_prototypes - 1}, like 12=2.5")
        try:
            changes[int(j)] = float(value)
        except ValueError:
            raise Stop(f"--set {word} gives no number: give like 12=2.5") from None
    if not changes or not all(math.isfinite(v) for v in changes.values()):
        raise Stop("--set says which activations to change, and to what: like --set 12=2.5,40=0")
    image = torch.from_numpy(decode(Path(cfg.edit), cfg.image_size)).permute(2, 0, 1)[None]
    image = image if made.extra["shape"][0] == 3 else image.float().mean(1, keepdim=True).to(torch.uint8)
    s, xT = invert_images(made.model, cfg, image, device)
    asked = s.clone()
    for j, value in changes.items():
        asked[0, j] = value
    plain, edited = render(made.model, cfg, torch.cat([s, asked]), device, xT.repeat(2, 1, 1, 1))
    after = activations(made.model, torch.stack([plain, edited]), device)
    folder = new_folder(cfg.out or Path(cfg.model, "edit"))
    told = [f"s_{j}: {s[0, j]:.2f}, asked {value:.2f}, now {after[1, j]:.2f}" for j, value in changes.items()]
    draw_panels(folder / "edit.png", [[panel(image[0]), panel(plain), panel(edited)]], "; ".join(told),
                columns=["the image", "reconstruction", "edited"], size=2)
    Image.fromarray(to_uint8(edited).expand(3, -1, -1).permute(1, 2, 0).numpy()).save(folder / "edited.png")
    progress("\n".join([*told, f"{folder}"]), end=True)


def compare_patronus(cfg, folder, device):
    """Three seeds without bias, with it, with the penalty against it: leaks -> comparison.json, .png, a table."""
    planted, penalty = (cfg.bias if cfg.bias != 0.5 else 0.95), cfg.decorrelation or 0.002
    variants = {"unbiased": dict(bias=0.5, decorrelation=0.0),
                f"bias {planted:g}": dict(bias=planted, decorrelation=0.0),
                f"bias {planted:g}, decorrelated": dict(bias=planted, decorrelation=penalty)}
    judge, rows = None, {name: [] for name in variants}
    for seed in range(cfg.seed, cfg.seed + 3):
        for name, changes in variants.items():
            one = dataclasses.replace(cfg, compare=False, seed=seed, **changes)
            part = folder / f"{name.replace(' ', '-').replace(',', '')}-seed-{seed}"
            part.mkdir(exist_ok=True)
            write_config(part, one)
            sets = load_sets_patronus(one)
            judge = judge or train_attribute_judge(cfg, sets[0], device)
            model, _, log = train_patronus(one, part, sets, device, latent=False)
            found = diagnose_patronus(one, model, judge, sets[1], part, device)
            rows[name].append({"seed": seed, "seconds": log["seconds"], **found})
            progress(f"{name}, seed {seed}: leak {found['leak']:.3f}", end=True)
    first = rows["unbiased"]
    table = {name: {"leak, mean": float(np.mean([r["leak"] for r in found])),
                    "difference from unbiased": mean_interval([r["leak"] - u["leak"] for r, u in zip(found, first)])}
             for name, found in rows.items()}
    save_safely({"settings": vars(cfg), "machine": machine(device), "torch": torch.__version__, "runs": rows,
                 "table": table}, folder / "comparison.json")
    title = (f"does '{first[0]['attribute']}' drag '{first[0]['watched']}' along? {cfg.dataset}, {cfg.steps} steps of "
             f"{cfg.batch_size}, seeds {cfg.seed} to {cfg.seed + 2}")
    draw_leaks(folder / "comparison.png", rows, title)
    row = "{:26}{:>24}{:>9}{:>34}{:>14}".format
    print(f"\n{title}\n" + row("", "leak by seed", "mean", "over unbiased (95 % of a t-interval)", "attribute moved"))
    for name, found in rows.items():
        difference, low, high = table[name]["difference from unbiased"]
        print(row(name, " ".join(f"{r['leak']:.3f}" for r in found), f"{table[name]['leak, mean']:.3f}",
                  f"{difference:.3f} ({low:.3f} to {high:.3f})" if name != "unbiased" else "",
                  f"{np.mean([r['change of P(attribute)'] for r in found]):.2f}"))


def mean_interval(values):
    """Mean of three paired differences, and its 95 % interval by Student's t with two degrees of freedom (4.303)."""
    half = 4.303 * np.std(values, ddof=1) / math.sqrt(3)
    return [float(np.mean(values)), float(np.mean(values) - half), float(np.mean(values) + half)]


def draw_leaks(path, rows, title):
    """comparison.png: the leak of every run, a column a variant, a colour a seed."""
    fig = Figure(figsize=(8, 4.5), layout="constrained")
    axes = fig.subplots()
    for i, found in enumerate(rows.values()):
        for r in found:
            low, high = max(0, r["leak"] - r["leak, 95 % from"]), max(0, r["leak, 95 % to"] - r["leak"])
            axes.errorbar(i + 0.1 * (r["seed"] - found[1]["seed"]), r["leak"], [[low], [high]], fmt="o",
                          color=COLOURS[2 * (r["seed"] % 10)], label=f"seed {r['seed']}" if i == 0 else None)
    axes.axhline(0, color="black", linewidth=0.5)
    axes.set_xticks(range(len(rows)), rows)
    axes.set(title=title, ylabel="leak: change of P(watched) per change of P(attribute)")
    axes.title.set_fontsize("medium")
    axes.legend()
    fig.savefig(path, dpi=110)


def run_patronus(cfg):
    """Do what the settings ask for."""
    if cfg.invert_steps > cfg.timesteps:
        raise Stop(f"--invert-steps {cfg.invert_steps} cannot be more than --timesteps {cfg.timesteps}")
    if bool(cfg.edit) != bool(cfg.model) or cfg.set and not cfg.edit:
        raise Stop("--edit image.png, --model runs/NAME and --set 12=2.5 belong together")
    device = find_device(cfg.device)
    choose_backends(device)
    earlier = cfg.sample or cfg.evaluate or cfg.explain or cfg.diagnose or cfg.model
    if earlier:
        made = load_run(earlier, cfg.device)
        cfg.steps = made.step                                 # so far
        if made.model.latent.trained_at < 0 and (cfg.sample or cfg.evaluate):
            raise Stop(f"{earlier} has not ended, and cannot draw activations yet: --resume it first")
        if cfg.edit:
            return edit_patronus(cfg, made, device)
        what = "evaluation" if cfg.evaluate else "explanation" if cfg.explain else "diagnosis"
        if cfg.sample:
            folder = new_folder(cfg.out or Path(earlier, "samples"))
            sample_patronus(cfg, made.model, made.extra, folder, device)
            return progress(f"{cfg.num_samples} samples in {folder}", end=True)
        sets = load_sets_patronus(cfg)
        if cfg.diagnose or cfg.evaluate and traits(sets[1])[1]:
            watched_traits(cfg, sets[1])
        judge = train_attribute_judge(cfg, sets[0], device) if traits(sets[0])[1] else None
        folder = new_folder(cfg.out or Path(earlier, what))
        if cfg.evaluate:
            measure_patronus(cfg, made.model, made.extra, made.log, sets, judge, folder, device)
        elif cfg.explain:
            save_safely(explain_patronus(cfg, made.model, judge, sets[1], folder, device), folder / "explanation.json")
        else:
            found = diagnose_patronus(cfg, made.model, judge, sets[1], folder, device)
            save_safely(found, folder / "diagnosis.json")
            print("\n".join(f"  {name:26} {value:.3f}" if isinstance(value, float) else f"  {name:26} {value}"
                            for name, value in found.items()))
        return progress(f"{what} in {folder}", end=True)
    if cfg.compare and cfg.dataset != "shapes":
        raise Stop("--compare plants a correlation, which only shapes can: leave out --dataset")
    if WORLD > 1:
        patience = datetime.timedelta(hours=2)                # the others wait while the first downloads and decodes
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
    sets = load_sets_patronus(cfg)                            # faults of the data show before a folder is made
    if traits(sets[1])[1]:
        watched_traits(cfg, sets[1])
    if RANK == 0:
        kind = "-compare" if cfg.compare else f"-bias-{cfg.bias:g}" if cfg.bias != 0.5 else ""
        name = f"runs/{SCRIPT}-{cfg.dataset}{kind}"
        cfg.out = cfg.resume or str(new_folder(cfg.out or name))
        write_config(Path(cfg.out), cfg)
    if WORLD > 1:
        names = [cfg.out]
        dist.broadcast_object_list(names)
        cfg.out = names[0]
    progress(f"{cfg.out}: {cfg.dataset}, {machine(device)}", end=True)
    folder = Path(cfg.out)
    if cfg.compare:
        compare_patronus(cfg, folder, device)
    else:
        model, extra, log = train_patronus(cfg, folder, sets, device)
        if RANK == 0:
            judge = train_attribute_judge(cfg, sets[0], device) if traits(sets[0])[1] else None
            explain_patronus(cfg, model, judge, sets[1], folder, device)
            measure_patronus(cfg, model, extra, log, sets, judge, folder, device)
            print(f"{folder}; more samples: python {SCRIPT}.py --sample {folder}")
    if WORLD > 1:
        dist.destroy_process_group()


def main(argv=None):
    """The command line. Returns the exit status: 0; 2 for what one sentence explains; 130 after Ctrl-C."""
    cfg = None
    try:
        cfg = parse_config(argv)
        run_patronus(cfg)
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
