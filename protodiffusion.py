"""ProtoDiffusion: a class-conditional diffusion model whose class embeddings start from learned prototypes.

Paper: Baykal, Karagoz, Binhuraib, Unal, "ProtoDiffusion: Classifier-Free Diffusion Guidance with Prototype
Learning", ACML 2023, arXiv 2307.01924. Stage 1 follows Yang et al., CVPR 2018, arXiv 1805.03438.

The idea. A classifier-free-guided diffusion model looks its class up in a table of embeddings, and that table
usually starts as noise. Here a small classifier first learns one prototype a class: the point of its feature
space to which the images of that class are close. The prototypes become the rows of the table, so the denoiser
knows from its first step which classes are alike. The table then stays `frozen`, or trains on (`unfrozen`);
`random` is the usual table and the paper's baseline. The paper reports equal quality in about half the time.

    stage 1   image ──> ResNet f(x) ──> nearest prototype = class        DCE + prototype loss
                                             │
    stage 2                        table of prototypes [C, D] ──> MLP ─┐ (or the zero vector: no class)
              noise level t ──> sinusoids ──> MLP ────────────────── (+)──> every residual block
              noisy image xt ─────────────────────────────────────────────> U-Net ──> predicted noise

    python protodiffusion.py                          # built-in shapes: learn, train, sample, evaluate, draw
    python protodiffusion.py --dataset cifar10        # the paper's experiment
    python protodiffusion.py --compare                # random, frozen, unfrozen: one table, one figure

Where the paper is silent, or where we differ (our choices): the classifier's pooled features replace ImageNet's
1000-way head, with a 3x3 stem for small images, and Linear-ReLU-Linear leads from there to D numbers; prototypes are
rescaled to the RMS of the random table, because the norm of an embedding alone changes quality (`--scale raw` keeps
the learner's); the prototype loss has the weight 0.01; several prototypes a class are drawn by their frequency;
samples come from a moving average of the weights; AdamW's second beta is 0.95; images are drawn with replacement;
STL-10 trains on its 5,000 training images (the paper adds the 8,000 test images, which then cannot test stage 1). The
presets take DDPM's U-Net, 100,000 steps, 20 steps of DPM-Solver++ and a low guidance, where Frechet distances are best;
the paper takes 64 x (1, 2, 4, 4) channels, 1,500 epochs, 50 of DDIM and 1.8.
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
    image_size: int = setting(16, "side of the images, pixels", low=8, fixed=True)
    mirror: bool = setting(False, "show half of the training images flipped left to right")
    # stage 1, prototypes
    prototypes: str = setting("unfrozen", "the class table: noise that trains (the paper's baseline), prototypes that "
                              "stay, or prototypes that train", choices=("random", "frozen", "unfrozen"), fixed=True)
    scale: str = setting("rms", "prototypes at the RMS of a random table, or raw", choices=("rms", "raw"), fixed=True)
    prototype_dim: int = setting(64, "D, length of a prototype", low=2, fixed=True)
    prototypes_per_class: int = setting(1, "K, prototypes a class", low=1, fixed=True)
    learner_steps: int = setting(400, "steps of stage 1, 128 images each", low=1, fixed=True)
    learner_width: int = setting(16, "channels of the learner's first stage; 64 is ResNet-18", low=1, fixed=True)
    judge_steps: int = setting(400, "the same for the judge, a classifier trained apart that measures samples", low=1)
    judge_width: int = setting(16, "and its width", low=1)
    imagenet: bool = setting(False, "start the learner (width 64) from ImageNet weights, as the paper does", fixed=True)
    unfreeze_at: float = setting(0.0, "fraction of training before prototypes move", low=0, high=1, fixed=True)
    prototype_lr: float = setting(1.0, "learning rate of the class table, as a factor of --lr", low=0, fixed=True)
    # stage 2, network and process
    channels: int = setting(48, "channels of the U-Net's first level, a multiple of 4", low=4, fixed=True)
    multipliers: str = setting("1,1", "channel factor of each level; all but the last halve the image", fixed=True)
    blocks: int = setting(1, "residual blocks a level", low=1, fixed=True)
    attention: int = setting(8, "self-attention at levels of at most this side, pixels", low=0, fixed=True)
    dropout: float = setting(0.0, "dropout in residual blocks, probability", low=0, high=0.9, fixed=True)
    timesteps: int = setting(1000, "T, noise levels", low=21, fixed=True)
    null_prob: float = setting(0.1, "probability of training without the class", low=0, high=1)
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
    labels: str = setting("", "--sample: classes, like 0,3 or circle,star; empty: all in turn", once=True)
    guidance: float = setting(1.0, "w; 0 is the conditional model, more trades variety for fidelity", low=-1)
    sampler: str = setting("ddpm", "the way from noise to image", choices=("ddim", "ddpm", "dpmpp"))
    sample_steps: int = setting(20, "steps from noise to image", low=1)
    sample_batch: int = setting(250, "images sampled at a time", low=1)
    inception: str = setting("auto", "weights for FID, IS, KID: a file, download, off; auto downloads on a GPU")
    eval_every: int = setting(500, "--compare: steps between measurements", low=1)
    # what to do
    compare: bool = setting(False, "train random, frozen and unfrozen: same seed, data order and budget", fixed=True,
                            task="new")
    out: str = setting("", "the run's folder; empty: runs/NAME", once=True)
    resume: str = setting("", "folder of a run to go on with", once=True, task="run")
    sample: str = setting("", "folder of a run to sample from", once=True, task="run")
    evaluate: str = setting("", "folder of a run to measure again", once=True, task="run")

    # The paper's D, batch, peak rate and warm-up; DDPM's U-Net; guidance low, where Frechet distances are best. On
    # shapes ddpm is ahead of dpmpp, for its fresh noise mends the errors of a short training; on photographs it is not.
    PHOTOGRAPHS: ClassVar[dict] = dict(
        image_size=32, mirror=True, prototype_dim=128, learner_steps=8000, learner_width=64, judge_steps=8000,
        judge_width=64, channels=128, multipliers="1,2,2,2", blocks=2, attention=16, dropout=0.1, steps=100_000,
        batch_size=256, lr=5e-4, save_every=2000, num_samples=10_000, guidance=0.3, sampler="dpmpp", eval_every=5000)
    LARGER: ClassVar[dict] = {**PHOTOGRAPHS, "image_size": 64, "multipliers": "1,1,2,2,2"}
    PRESETS: ClassVar[dict] = {
        "shapes": {},
        "cifar10": PHOTOGRAPHS,
        "folder": PHOTOGRAPHS,
        "fashion-mnist": {**PHOTOGRAPHS, "mirror": False},
        "stl10": LARGER,
        "eurosat": LARGER,
        "celeba": LARGER,
        "tiny-imagenet": LARGER}

    def build(self, extra):
        """The method's network, untrained. extra: what a run knows of its data and prototypes, see stage_one."""
        unet = UNet(extra["shape"][0], self.image_size, self.channels, level_multipliers(self), self.blocks,
                    self.attention, self.dropout)
        return ProtoDiffusion(unet, extra["table"], trainable=self.prototypes != "frozen")


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

GAMMA, PULL = 2.0, 0.01     # sharpness of the distance softmax (the paper's); weight of the prototype loss (our choice)


class PrototypeLearner(nn.Module):
    """Convolutional prototype learning (Yang et al. 2018): features f(x) and K prototypes a class in one space.

    Images [B, channels, side, side] in [-1, 1] -> features [B, D]: a ResNet-18's pooled features -> Linear -> ReLU ->
    Linear(D). Prototypes: [C, K, D].
    """
    def __init__(self, channels, side, classes, dim, per_class=1, width=64, imagenet=False):
        super().__init__()
        self.net, c = resnet(channels, side, width, imagenet), 8 * width
        self.net.fc = nn.Sequential(nn.Linear(c, c), nn.ReLU(), nn.Linear(c, dim))
        self.prototypes = nn.Parameter(0.1 * torch.randn(classes, per_class, dim))

    def forward(self, x):
        return self.net(x)


def squared_distances(z, prototypes):
    """d = ||z - m||^2 in float32: z [B, D], prototypes [C, K, D] -> [B, C, K]."""
    return (z.float()[:, None, None] - prototypes.float()).square().sum(-1)


# exercise
def dce_loss(d, y, gamma=GAMMA):
    """Distance-based cross-entropy (Yang et al. 2018, eq. 6-8): distances d [B, C, K], labels y [B] -> mean over B.

    p = softmax(-gamma d) over all C K prototypes; a class has the sum of its prototypes' p; the loss is -log p(y).
    """
    log_p = F.log_softmax(-gamma * d.flatten(1), dim=1).view_as(d)
    return F.nll_loss(log_p.logsumexp(-1), y)


# exercise
def prototype_loss(d, y):
    """Squared distance to the nearest prototype of the own class (Yang et al. 2018, eq. 9): mean over the batch.

    d [B, C, K] holds squared distances to the K prototypes of each class, y [B] the labels.
    """
    return d.amin(-1).gather(1, y[:, None]).mean()


def nearest_prototypes(z, prototypes):
    """z [N, D], prototypes [C, K, D] -> class [N] of the nearest prototype, and nearest of each class [N, C]."""
    d = torch.cat([squared_distances(part, prototypes) for part in z.split(1024)])
    return d.amin(-1).argmin(-1), d.argmin(-1)


def learn_prototypes(data, cfg, device):
    """Stage 1: a PrototypeLearner trained on a Dataset, in eval mode."""
    torch.manual_seed(cfg.seed)
    try:
        learner = PrototypeLearner(data.images.shape[1], data.images.shape[-1], len(data.classes), cfg.prototype_dim,
                                   cfg.prototypes_per_class, cfg.learner_width, cfg.imagenet)
    except OSError as error:
        raise Stop(f"the ImageNet weights cannot be downloaded ({error}): try without --imagenet") from None

    def loss_fn(z, y):
        d = squared_distances(z, learner.prototypes)
        return dce_loss(d, y) + PULL * prototype_loss(d, y)
    return fit(learner, data.images, data.labels, loss_fn, cfg.learner_steps, cfg, cfg.seed, device)


def class_table(prototypes, scale):
    """Prototypes [C, K, D] -> rows [C K, D] of the class table; rms: scaled by one factor to RMS 1, that of N(0, 1)."""
    rows = prototypes.detach().float().cpu().flatten(0, 1)
    return rows / rows.square().mean().sqrt() if scale == "rms" else rows


def rows_for(frequency, labels, seed):
    """Class labels [N] -> table rows [N]: one of the class's K prototypes, by its frequency [C, K] in training."""
    k = torch.multinomial(frequency[labels], 1, generator=torch.Generator().manual_seed(seed_of(seed, 1)))[:, 0]
    return labels * frequency.shape[1] + k


class ProtoDiffusion(nn.Module):
    """Noise predictor eps(xt, t, row): a U-Net with row `row` of the class table added beside the time embedding.

    xt [B, C, H, W]; t [B] in 0..T-1; row [B]: of the table, or -1 for no class. Then the contribution is the zero
    vector *after* the MLP, so that no row has to stand for "no class" (padding_idx=0 would leave class 0 untrained).
    """
    def __init__(self, unet, table, trainable):
        super().__init__()
        self.unet, E = unet, unet.emb_dim
        self.table = nn.Embedding.from_pretrained(table.clone(), freeze=not trainable)
        self.mlp = nn.Sequential(nn.Linear(table.shape[1], E), nn.SiLU(), nn.Linear(E, E))

    def forward(self, xt, t, row):
        condition = self.mlp(self.table(row.clamp(min=0))) * (row >= 0)[:, None]    # [B, E]
        return self.unet(xt, t, condition)

    def param_groups(self, cfg):
        """For the optimiser: the table learns at lr * prototype_lr, from the fraction unfreeze_at of training on."""
        factor, start = (cfg.prototype_lr, cfg.unfreeze_at) if cfg.prototypes == "unfrozen" else (1.0, 0.0)
        table = dict(params=[self.table.weight], factor=factor, start=round(start * cfg.steps))
        groups = [dict(params=[*self.unet.parameters(), *self.mlp.parameters()], factor=1.0, start=0), table]
        return groups if self.table.weight.requires_grad else groups[:1]


def protodiffusion_loss(cfg, net, batch, abar):
    """The noise loss given the class's row of the table, which is hidden with probability cfg.null_prob."""
    row = torch.where(batch.chance < cfg.null_prob, -1, batch.target)
    return {"loss": noise_loss(net, batch.x0, row, batch.t, batch.eps, abar)}


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


def draw_prototypes(path, z, labels, prototypes, classes, accuracy):
    """prototypes.png: distances between prototypes [C, K, D], and features z [N, D] by class in two dimensions."""
    fig = Figure(figsize=(12, 5.5), layout="constrained")
    left, right = fig.subplots(1, 2)
    flat, owner = prototypes.flatten(0, 1), [c for c in range(len(classes)) for _ in range(prototypes.shape[1])]
    fig.colorbar(left.imshow(torch.cdist(flat, flat)), ax=left, label="distance")
    left.set_title("distance between prototypes: dark pairs look alike to the learner")
    mean, named = z.mean(0), len(flat) <= 40
    plane = torch.linalg.eigh(moments(z)[1]).eigenvectors[:, -2:].flip(1).float()   # PCA: [D, 2]
    points, stars, colour = (z - mean) @ plane, (flat - mean) @ plane, [f"C{c % 10}" for c in range(len(classes))]
    right.scatter(*points.T, s=4, alpha=0.4, c=[colour[c] for c in labels])
    right.scatter(*stars.T, s=220, marker="*", edgecolor="black", c=[colour[c] for c in owner])
    right.set(title="features of held-out images (dots) and prototypes (stars)", xlabel="first principal component",
              ylabel="second")
    if named:
        left.set_xticks(range(len(flat)), [classes[c] for c in owner], rotation=90)
        left.set_yticks(range(len(flat)), [classes[c] for c in owner])
        for c, star in zip(owner, stars.tolist()):
            right.annotate(classes[c], star, textcoords="offset points", xytext=(8, 6))
    fig.suptitle(f"stage 1: the prototype learner classifies {accuracy:.1%} of held-out images")
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


def load_learner(cfg, extra, device):
    """The prototype learner of a run from its checkpoint's extra, in eval mode."""
    learner = PrototypeLearner(extra["shape"][0], cfg.image_size, len(extra["classes"]), cfg.prototype_dim,
                               cfg.prototypes_per_class, cfg.learner_width).to(device).eval().requires_grad_(False)
    learner.load_state_dict(extra["learner"])
    return learner


def stage_one(cfg, sets, device, folder):
    """Learn and report prototypes, make the class table -> extra: all a run must know beside the network's weights.

    rows [N]: each training image's row of the table; frequency [C, K]: how often a class's prototypes are nearest.
    """
    train_set, test_set = sets
    C, K, rows = len(train_set.classes), cfg.prototypes_per_class, train_set.labels
    extra = dict(shape=list(train_set.images.shape[1:]), classes=train_set.classes, seconds=0.0)
    if cfg.prototypes == "random":
        table = torch.randn(C, cfg.prototype_dim, generator=torch.Generator().manual_seed(seed_of(cfg.seed, 6)))
        return {**extra, "table": table, "rows": rows, "frequency": torch.ones(C, 1)}
    start = time.perf_counter()
    learner = learn_prototypes(train_set, cfg, device)
    for tensor in learner.state_dict().values() if WORLD > 1 else ():               # GPUs may differ: the first counts
        dist.broadcast(tensor, 0)
    prototypes = learner.prototypes.cpu()
    if K > 1:
        _, nearest = nearest_prototypes(features_of(learner, train_set.images, device), prototypes)
        rows = rows * K + nearest.gather(1, rows[:, None])[:, 0]
    counts = torch.bincount(rows, minlength=C * K).view(C, K).float()
    counts += counts.sum(1, keepdim=True) == 0                # a class without images: any of its prototypes
    extra["seconds"] = time.perf_counter() - start
    z = features_of(learner, test_set.images, device)
    accuracy = (nearest_prototypes(z, prototypes)[0] == test_set.labels).float().mean().item()
    flat = prototypes.flatten(0, 1)
    norms, apart = flat.norm(dim=1), F.pdist(flat) if len(flat) > 1 else torch.zeros(1)
    progress(f"stage 1: {extra['seconds']:.0f} s, classifies {accuracy:.1%} of {len(z)} held-out images; prototypes of "
             f"norm {norms.min():.2f} to {norms.max():.2f}, {apart.min():.2f} to {apart.max():.2f} apart", end=True)
    if RANK == 0:
        labels = test_set.labels[:3000]
        draw_prototypes(folder / "prototypes.png", z[:3000], labels, prototypes, train_set.classes, accuracy)
    report = dict(accuracy=accuracy, norms=norms.tolist(), nearest=apart.min().item())
    return {**extra, "table": class_table(prototypes, cfg.scale), "rows": rows, "learner": learner.state_dict(),
            "frequency": counts / counts.sum(1, keepdim=True), "report": report}


def train_run(cfg, folder, sets, device, extra=None, on_eval=None):
    """Both stages (`extra`: stage 1 is done) in `folder`, on from its checkpoint if any -> model, extra, log."""
    if (folder / "checkpoint.pt").exists():
        extra = load_checkpoint(folder / "checkpoint.pt")["extra"]
        if not sets[0].labels.equal(extra["rows"] // extra["frequency"].shape[1]):
            raise Stop(f"the training images of {folder} have changed since it began: restore them, or start a new run")
    extra = extra or stage_one(cfg, sets, device, folder)
    torch.manual_seed(cfg.seed)                               # the same network start whatever the prototypes
    model, loss_fn = cfg.build(extra), functools.partial(protodiffusion_loss, cfg)
    on_eval = on_eval and functools.partial(on_eval, cfg, extra)
    model, log = train(cfg, model, sets[0].images, extra["rows"], loss_fn, folder, extra, device, on_eval)
    if RANK == 0 and log["rows"]:
        draw_curves(folder / "curves.png", log["rows"])
    return model, extra, log


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


def sample_run(cfg, model, extra, labels, folder, device):
    """Samples for class labels [N] -> uint8 [N, C, H, W], drawn in samples.png (a row a class), kept in samples.npz.

    samples.npz is what the guided-diffusion evaluator reads: arr_0 uint8 [N, H, W, C], arr_1 labels.
    """
    images = generate(model, cfg, rows_for(extra["frequency"], labels, cfg.seed), extra["shape"], device)
    save_safely(dict(arr_0=images.permute(0, 2, 3, 1).numpy(), arr_1=labels.numpy()), folder / "samples.npz")
    draw_samples(folder / "samples.png", images, labels, extra["classes"],
                 f"{cfg.dataset}, {cfg.prototypes} prototypes, {cfg.steps} steps; guidance {cfg.guidance}, "
                 f"{cfg.sample_steps} {cfg.sampler} steps, seed {cfg.seed}")
    return images


def measure(cfg, model, extra, log, sets, folder, device):
    """Samples, metrics and pictures of a trained model in `folder`."""
    start, labels = time.perf_counter(), evaluation_labels(sets[0].labels, cfg.num_samples)
    samples = sample_run(cfg, model, extra, labels, folder, device)
    seconds = {"stage 1": extra["seconds"], "training": log["seconds"], "sampling": time.perf_counter() - start}
    names = extra["classes"][:10]
    rows = rows_for(extra["frequency"], torch.arange(len(names)), cfg.seed)
    draw_denoising(folder / "denoising.png", model, cfg, rows, names, extra["shape"], device)
    judges = {"a classifier trained apart": train_judge(cfg, sets[0], device)}
    if "learner" in extra:
        learner = load_learner(cfg, extra, device)
        judges["the run's own prototype learner"] = SimpleNamespace(
            embed=learner, classify=lambda z: nearest_prototypes(z, learner.prototypes.cpu())[0],
            real=moments(features_of(learner, sets[0].images, device)))
    results = {name: {"samples": judge_images(judge, samples, labels, device),
                      "real held-out images": judge_images(judge, sets[1].images, sets[1].labels, device)}
               for name, judge in judges.items()}
    about = dict(settings=vars(cfg), training_images=len(sets[0].images), machine=machine(device),
                 torch=torch.__version__, parameters=sum(p.numel() for p in model.parameters()))
    print(f"{cfg.num_samples} samples, guidance {cfg.guidance}, {cfg.sample_steps} {cfg.sampler} steps, seed "
          f"{cfg.seed}; seconds: {', '.join(f'{k} {v:.0f}' for k, v in seconds.items())} ({about['machine']})")
    for name, found in results.items():
        print(f"{name}:")
        for kind, value in found.items():
            print(f"  {kind:22} {value['accuracy']:7.1%} recognised, Frechet distance {value['frechet']:.4f} (not FID)")
    results["inception"] = inception_metrics(cfg, samples, sets[0].images, device)
    for name, value in results["inception"].items():
        print(f"{name}: {value:.4f}")
    about |= {"stage 1": extra.get("report"), "seconds": seconds, "results": results}
    save_safely(about, folder / "metrics.json")


SWEEP = (0.0, 0.5, 1.0, 1.8, 3.0)       # guidance weights that --compare also measures the trained models at
MEASURES = {"accuracy": ("samples recognised as their class", "linear"),
            "frechet": ("Frechet distance, judge's features (not FID)", "log")}


def first_as_good(history, key, value):
    """First step at which a history of dicts is as good as `value`, else None: accuracy is good high, frechet low."""
    return next((h["step"] for h in history if (h[key] >= value if key == "accuracy" else h[key] <= value)), None)


def compare(cfg, sets, folder, device):
    """random, frozen, unfrozen: one seed, data order, network start and budget -> comparison.json, .png and a table."""
    judge, labels = train_judge(cfg, sets[0], device), evaluation_labels(sets[0].labels, cfg.num_samples)
    variants, learned = {}, None

    def quality(cfg, extra, model):
        samples = generate(model, cfg, rows_for(extra["frequency"], labels, cfg.seed), extra["shape"], device)
        found = judge_images(judge, samples, labels, device)
        progress(f"guidance {cfg.guidance:g}: {found['accuracy']:.1%} recognised, Frechet distance "
                 f"{found['frechet']:.3f}", end=True)
        return found
    for variant in ("random", "frozen", "unfrozen"):
        one, part = dataclasses.replace(cfg, prototypes=variant, compare=False), folder / variant
        progress(f"--- {variant} prototypes", end=True)
        part.mkdir(exist_ok=True)
        write_config(part, one)
        model, extra, log = train_run(one, part, sets, device, learned, quality)
        learned = extra if "learner" in extra else None       # by frozen, for unfrozen too; both pay for stage 1
        history = [{**row, "seconds": row["seconds"] + extra["seconds"]} for row in log["evals"]]
        sweep = {w: quality(dataclasses.replace(one, guidance=w), extra, model) for w in SWEEP}
        variants[variant] = {"stage 1 seconds": extra["seconds"], "history": history, "guidance": sweep}
    base = variants["random"]["history"]
    for v in variants.values():                               # steps of the baseline's best / steps to reach it
        for key, best in (("accuracy", max), ("frechet", min)):
            target = best(h[key] for h in base)
            reached = first_as_good(v["history"], key, target)
            v[f"speed-up by {key}"] = reached and first_as_good(base, key, target) / reached
    title = (f"{cfg.dataset}, seed {cfg.seed}, {cfg.steps} steps of {cfg.batch_size}, {cfg.num_samples} samples, "
             f"guidance {cfg.guidance}, prototypes at scale {cfg.scale}")
    held_out = judge_images(judge, sets[1].images, sets[1].labels, device)
    save_safely({"settings": vars(cfg), "machine": machine(device), "torch": torch.__version__,
                 "real held-out images": held_out, "variants": variants}, folder / "comparison.json")
    draw_comparison(folder / "comparison.png", {name: v["history"] for name, v in variants.items()}, MEASURES, title)
    print_comparison(title, variants, held_out)


def print_comparison(title, variants, held_out):
    """The table of --compare. Speed-up: steps that the baseline needs for its best / steps to reach that."""
    row = "{:14}{:>9}{:>12}{:>10}{:>9}{:>10}   {}".format
    guidance = "".join(f"{f'at guidance {w:g}':>17}" for w in SWEEP)
    print(f"\n{title}\n" + row("prototypes", "stage 1", "recognised", "speed-up", "Frechet", "speed-up", guidance))
    for name, v in variants.items():
        last, ups = v["history"][-1], [v[f"speed-up by {key}"] or math.nan for key in ("accuracy", "frechet")]
        guidance = "".join(f"{q['accuracy']:>9.1%} / {q['frechet']:.3f}" for q in v["guidance"].values())
        print(row(name, f"{v['stage 1 seconds']:.0f} s", f"{last['accuracy']:.1%}", f"{ups[0]:.2f}",
                  f"{last['frechet']:.3f}", f"{ups[1]:.2f}", guidance))
    print(row("real images", "", f"{held_out['accuracy']:.1%}", "", f"{held_out['frechet']:.3f}", "", ""))


def run(cfg):
    """Do what the settings ask for."""
    device = find_device(cfg.device)
    choose_backends(device)
    earlier = cfg.sample or cfg.evaluate
    if earlier:
        made = load_run(earlier, cfg.device)
        cfg.steps = made.step                                 # so far
        labels = sample_labels(cfg.labels, made.extra["classes"], cfg.num_samples)
        folder = new_folder(cfg.out or Path(earlier, "samples" if cfg.sample else "evaluation"))
        if cfg.sample:
            sample_run(cfg, made.model, made.extra, labels, folder, device)
        else:
            measure(cfg, made.model, made.extra, made.log, load_sets(cfg, labelled=True), folder, device)
        return progress(f"{cfg.num_samples} samples in {folder}", end=True)
    if WORLD > 1:
        patience = datetime.timedelta(hours=2)                # the others wait while the first downloads and decodes
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
    sets = load_sets(cfg, labelled=True)                      # faults of the data show before a folder is made
    if RANK == 0:
        cfg.out = cfg.resume or str(new_folder(cfg.out or f"runs/{SCRIPT}-{cfg.dataset}" + "-compare" * cfg.compare))
        write_config(Path(cfg.out), cfg)
    if WORLD > 1:
        names = [cfg.out]
        dist.broadcast_object_list(names)
        cfg.out = names[0]
    progress(f"{cfg.out}: {cfg.dataset}, {machine(device)}", end=True)
    folder = Path(cfg.out)
    if cfg.compare:
        compare(cfg, sets, folder, device)
    else:
        trained = train_run(cfg, folder, sets, device)
        if RANK == 0:
            measure(cfg, *trained, sets, folder, device)
            print(f"{folder}; more samples: python {SCRIPT}.py --sample {folder}")
    if WORLD > 1:
        dist.destroy_process_group()


def main(argv=None):
    """The command line. Returns the exit status: 0; 2 for what one sentence explains; 130 after Ctrl-C."""
    cfg = None
    try:
        cfg = parse_config(argv)
        run(cfg)
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
