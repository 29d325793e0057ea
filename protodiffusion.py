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
samples come from a moving average of the weights; AdamW's second beta is 0.95, which short runs learned faster with.
"""
import argparse
import contextlib
import copy
import csv
import dataclasses
import functools
import hashlib
import json
import math
import os
import platform
import shlex
import signal
import sys
import threading
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
    """A field of Config. limits: choices; low, high (inclusive); fixed (belongs to the run, a later call keeps it)."""
    return dataclasses.field(default=default, metadata={"help": help, **limits})


@dataclasses.dataclass
class Config:
    """Defaults are those of `shapes`; PRESETS holds what another data set changes; flags have the last word."""
    # data
    dataset: str = setting("shapes", "shapes, cifar10, stl10, fashion-mnist, eurosat, celeba, tiny-imagenet, folder", fixed=True)
    data_dir: str = setting("data", "where data sets lie or are downloaded to; for folder, the folder of images itself")
    image_size: int = setting(16, "side of the images, pixels", low=8, fixed=True)
    train_split: str = setting("train", "images for the diffusion model", choices=("train", "train+test"), fixed=True)
    mirror: bool = setting(False, "show half of the training images flipped left to right")
    # stage 1, prototypes
    prototypes: str = setting("unfrozen", "the class table: noise that trains (the paper's baseline), prototypes that stay, "
                              "or prototypes that train", choices=("random", "frozen", "unfrozen"), fixed=True)
    scale: str = setting("rms", "prototypes at the RMS of a random table, or raw", choices=("rms", "raw"), fixed=True)
    prototype_dim: int = setting(64, "D, length of a prototype", low=1, fixed=True)
    prototypes_per_class: int = setting(1, "K, prototypes a class", low=1, fixed=True)
    learner_steps: int = setting(400, "steps of stage 1, 128 images each", low=1, fixed=True)
    learner_width: int = setting(16, "channels of the learner's first stage; 64 is ResNet-18", low=1, fixed=True)
    imagenet: bool = setting(False, "start the learner (width 64) from ImageNet weights, as the paper does", fixed=True)
    unfreeze_at: float = setting(0.0, "fraction of training before unfrozen prototypes move", low=0, high=1, fixed=True)
    prototype_lr: float = setting(1.0, "learning rate of the class table, as a factor of --lr", low=0, fixed=True)
    # stage 2, network and process
    channels: int = setting(48, "channels of the U-Net's first level, a multiple of 4", low=4, fixed=True)
    multipliers: str = setting("1,1", "channel factor of each level, like 1,2,2,2; empty: by image size", fixed=True)
    blocks: int = setting(1, "residual blocks a level", low=1, fixed=True)
    attention: int = setting(8, "self-attention at levels of at most this side, pixels", low=0, fixed=True)
    dropout: float = setting(0.0, "dropout in residual blocks, probability", low=0, high=0.9, fixed=True)
    timesteps: int = setting(1000, "T, noise levels", low=21, fixed=True)
    null_prob: float = setting(0.1, "probability of training without the class", low=0, high=1)
    # training
    steps: int = setting(4500, "optimiser steps", low=1)
    batch_size: int = setting(32, "images a step, over all processes and passes", low=1)
    accumulate: int = setting(1, "passes that share a step's images: less memory, same result", low=1)
    lr: float = setting(2e-3, "peak learning rate of AdamW", low=0)
    warmup: float = setting(0.05, "fraction of steps in which the rate rises, before half a cosine", low=0, high=1)
    weight_decay: float = setting(1e-4, "weight decay of AdamW", low=0)
    seed: int = setting(0, "what everything random follows from", low=0)
    save_every: int = setting(500, "steps between checkpoints", low=1)
    log_every: int = setting(100, "steps between rows of log.csv", low=1)
    device: str = setting("auto", "auto, cuda, cuda:1, mps or cpu")
    amp: str = setting("auto", "mixed precision of the networks", choices=("auto", "bf16", "fp16", "off"))
    compile: bool = setting(False, "torch.compile the network, for training and for sampling")
    # sampling and metrics
    num_samples: int = setting(1000, "images to sample, and to measure on", low=1)
    labels: str = setting("", "--sample: classes, like 0,3 or circle,star; empty: all in turn")
    guidance: float = setting(1.5, "w; 0 is the conditional model, more trades variety for fidelity", low=-1)
    sampler: str = setting("dpmpp", "the way from noise to image", choices=("ddim", "ddpm", "dpmpp"))
    sample_steps: int = setting(20, "steps from noise to image", low=1)
    sample_batch: int = setting(250, "images sampled at a time", low=1)
    inception: str = setting("auto", "weights for FID, IS, KID: a file, download, off; auto downloads on a GPU")
    eval_every: int = setting(500, "--compare: steps between measurements", low=1)
    # what to do
    compare: bool = setting(False, "train random, frozen and unfrozen: same seed, data order and budget", fixed=True)
    out: str = setting("", "the run's folder; empty: runs/NAME")
    resume: str = setting("", "folder of a run to go on with")
    sample: str = setting("", "folder of a run to sample from")
    evaluate: str = setting("", "folder of a run to measure again")

    # The paper's D, batch, peak rate and warm-up; DDPM's U-Net; guidance low, where Frechet distances are best.
    PHOTOGRAPHS: ClassVar[dict] = dict(
        image_size=32, mirror=True, prototype_dim=128, learner_steps=8000, learner_width=64, channels=128, multipliers="",
        blocks=2, attention=16, dropout=0.1, steps=100_000, batch_size=256, lr=5e-4, save_every=2000, log_every=100,
        num_samples=10_000, guidance=0.3, eval_every=5000)
    PRESETS: ClassVar[dict] = {
        "shapes": {},
        "cifar10": PHOTOGRAPHS,
        "folder": PHOTOGRAPHS,
        "fashion-mnist": {**PHOTOGRAPHS, "mirror": False, "channels": 64, "learner_width": 32},
        "stl10": {**PHOTOGRAPHS, "image_size": 64, "train_split": "train+test"},
        "eurosat": {**PHOTOGRAPHS, "image_size": 64},
        "celeba": {**PHOTOGRAPHS, "image_size": 64},
        "tiny-imagenet": {**PHOTOGRAPHS, "image_size": 64}}

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
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else \
            dict(type=f.type, choices=f.metadata.get("choices")) if "choices" in f.metadata else \
            dict(type=f.type, metavar=f.type.__name__.upper())
        parser.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS,
                            help=f"{f.metadata['help']} [{f.default}]".replace("%", "%%"), **kind)
    given = vars(parser.parse_args(argv))
    earlier, saved = next((given[k] for k in ("resume", "sample", "evaluate") if given.get(k)), None), {}
    if earlier:
        saved = read_config(earlier)
        for name in given:
            if settings[name].metadata.get("fixed") and given[name] != saved.get(name):
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
        raise Stop(f"--batch-size {cfg.batch_size} does not split into {WORLD} processes x {cfg.accumulate} passes (--accumulate)")
    if cfg.sample_steps > cfg.timesteps:
        raise Stop(f"--sample-steps {cfg.sample_steps} cannot be more than the {cfg.timesteps} noise levels, --timesteps")
    level_multipliers(cfg)
    return cfg


def read_config(folder):
    """The settings in a run's config.json as a dict; Stop if there is none."""
    try:
        saved = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        fields = {f.name: f.type for f in dataclasses.fields(Config)}
        return {k: fields[k](v) for k, v in saved.items() if k in fields}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise Stop(f"{folder} is not the folder of a run: its config.json cannot be read ({error})") from None


def level_multipliers(cfg):
    """Channel factors of the U-Net's levels: from the flag, else down to a side of 4 to 7 pixels, (1, 2, 2, 2) for 32."""
    factors = tuple(int(m) if m.strip().isdecimal() else 0 for m in cfg.multipliers.split(",") if m)
    if not factors:
        side, levels = cfg.image_size, 1
        while side % 2 == 0 and side > 7:
            side, levels = side // 2, levels + 1
        factors = (1,) * max(1, levels - 3) + (2,) * min(3, levels - 1)
    if min(factors) < 1 or cfg.image_size % 2 ** (len(factors) - 1) or cfg.channels % 4:
        raise Stop(f"--image-size must be a multiple of {2 ** (len(factors) - 1)}, because a U-Net of {len(factors)} levels halves "
                   "it at every level but the last; --channels a multiple of 4; --multipliers whole numbers like 1,2,2,2")
    return factors


# --------------------------------------------------------------------------------------------------------------------
# 2  Data: every set becomes one uint8 tensor
# --------------------------------------------------------------------------------------------------------------------

SHAPES = ("circle", "square", "triangle", "diamond", "plus", "cross", "ring", "crescent", "bar", "star")
SHAPE_ATTRIBUTES = ("warm hue", "bright background", "large", "left of centre", "dot")
SHAPE_SPLITS = {"train": (20_000, 0), "test": (4_000, 1), "judge": (20_000, 2)}     # images, seed: disjoint


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
    if figure == "star":        # fold the plane into ten equal wedges; the outline there runs from (1, 0) to an inner corner
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
    def paint(image, distance, colour):                       # distance in units of half the image -> pixels -> coverage
        ink = (0.5 - distance * size / 2).clamp(0, 1)
        return image * (1 - ink) + colour * ink
    spot = torch.where(dot, torch.hypot(axis + 0.76, axis[:, None] + 0.76) - 0.16, 9)                 # upper left corner
    images = [paint(paint(grey, distance * radius, colour[..., c:c + 1]), spot, (~bright).float()) for c in range(3)]
    return Dataset((torch.stack(images, 1) * 255).round().to(torch.uint8), labels, list(SHAPES),
                   torch.stack([warm, bright, large, left, dot], 1).flatten(1), SHAPE_ATTRIBUTES)


def seeded_split(n, split, fraction):
    """Indices of a fixed random split, for sets that come without one: `fraction` for test, the rest for train."""
    order, held_out = torch.randperm(n, generator=torch.Generator().manual_seed(0)).tolist(), max(1, round(n * fraction))
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
        raise Stop(f"{top} holds {len(files)} images: --data-dir must name a folder with train/<class>/*, <class>/*, or images")
    classes = [] if any(p.parent == top for p in files) else sorted({p.relative_to(top).parts[0] for p in files})
    if top == root or not (root / "test").is_dir():
        files = [files[i] for i in seeded_split(len(files), split, 0.1)]
    elif split == "test":
        files, base = images_in(root / "test"), root / "test"
    names = [p.relative_to(base).parts[0] for p in files if classes]
    if not files or not set(names) <= set(classes):
        raise Stop(f"{base} must hold images of the classes in {top}, and of no others")
    return files, [classes.index(name) for name in names] if classes else None, classes


def read_published(name, split, root):
    """A published set, downloaded if need be -> images or image files, labels, classes, attributes, attribute names."""
    train, sets = split == "train", torchvision.datasets
    if name == "cifar10":
        data = sets.CIFAR10(root, train, download=True)
        return data.data, data.targets, data.classes, None, ()                            # uint8 [N, 32, 32, 3]
    if name == "stl10":
        data = sets.STL10(root, split, download=True)
        return data.data.transpose(0, 2, 3, 1), data.labels, data.classes, None, ()       # uint8 [N, 96, 96, 3]
    if name == "fashion-mnist":
        data = sets.FashionMNIST(root, train, download=True)
        return np.pad(data.data.numpy(), ((0, 0), (2, 2), (2, 2))), data.targets, data.classes, None, ()
    if name == "eurosat":
        data = sets.EuroSAT(root, download=True)
        files, labels = zip(*(data.samples[i] for i in seeded_split(len(data.samples), split, 0.2)))
        return files, labels, data.classes, None, ()
    if name == "celeba":                                      # its download needs another package: see the message below
        data = sets.CelebA(root, split, target_type="attr")
        names, files = [n for n in data.attr_names if n], [Path(root, "celeba", "img_align_celeba", f) for f in data.filename]
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
    return files, [ids.index(i) for i in owners], [words[i].split(",")[0] for i in ids], None, ()


def decode(item, size):
    """An image file or uint8 array -> uint8 RGB [size, size, 3]: the shorter side is scaled to size, the centre kept."""
    try:
        image = Image.fromarray(item) if isinstance(item, np.ndarray) else ImageOps.exif_transpose(Image.open(item))
        return np.array(ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS))
    except Exception as error:                                # Pillow raises many kinds; all mean the same to the reader
        raise Stop(f"{item} does not decode as an image ({error}): replace it or take it away") from None


def load_dataset(name, split="train", image_size=None, data_dir="data"):
    """A data set in memory, decoded once and cached beside the data in prototype-*.pt.

    name: a key of Config.PRESETS; split: train, test or train+test; image_size: pixels (None: the preset's).
    Returns a Dataset. Raises Stop for an unknown name, missing or unreadable data, no network.
    """
    if name not in Config.PRESETS:
        raise Stop(f"there is no data set '{name}': choose one of {', '.join(Config.PRESETS)}")
    size = image_size or Config.PRESETS[name].get("image_size", Config.image_size)
    if split == "train+test":
        a, b = (load_dataset(name, part, size, data_dir) for part in ("train", "test"))
        tensors = [None if x is None else torch.cat([x, y]) for x, y in
                   ((a.images, b.images), (a.labels, b.labels), (a.attributes, b.attributes))]
        return Dataset(*tensors[:2], a.classes, tensors[2], a.attribute_names)
    if name == "shapes":
        n, seed = SHAPE_SPLITS[split]
        return make_shapes(n, size, seed)
    root, key, attributes, attribute_names = Path(data_dir), [], None, ()
    if name == "folder":
        if not root.is_dir():
            raise Stop(f"there is no folder {root}: --data-dir must name a folder of images")
        items, labels, classes = read_folder(root, split)
        key = [*classes, *(f"{p.relative_to(root)} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in items)]
    cache = root / f"prototype-{name}-{split}-{size}.pt"
    try:
        saved = torch.load(cache, weights_only=True)
        if saved.pop("key") == key:
            return Dataset(**saved)
    except Exception:                                         # there is none, or not a whole one: make it
        pass
    if name != "folder":
        try:
            items, labels, classes, attributes, attribute_names = read_published(name, split, data_dir)
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            advice = "put its img_align_celeba/ and .txt files, from mmlab.ie.cuhk.edu.hk/projects/CelebA.html, in celeba/ there" \
                if name == "celeba" else "check the network, or put the files of the data set there"
            raise Stop(f"{name} cannot be read in {root} ({error}): {advice}") from None
    images = torch.empty(len(items), 3, size, size, dtype=torch.uint8)
    with ThreadPoolExecutor() as pool:
        for i, array in enumerate(pool.map(decode, items, [size] * len(items))):
            images[i] = torch.from_numpy(array).permute(2, 0, 1)
    if (images == images[:, :1]).all():                       # grey throughout
        images = images[:, :1].clone()
    labels = None if labels is None else torch.as_tensor(np.array(labels), dtype=torch.int64)
    data = Dataset(images, labels, list(classes), attributes, attribute_names)
    try:
        save_safely({**vars(data), "key": key}, cache)
    except Stop as error:
        print(f"note: {error}; the images will be decoded again next time")
    return data


def save_safely(content, path):
    """torch.save by way of a temporary neighbour: a kill leaves the old file or the new one, never half of one."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
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

GAMMA, PULL = 2.0, 0.01     # softness of the distance softmax (the paper's); weight of the prototype loss (our choice)


class PrototypeLearner(nn.Module):
    """Convolutional prototype learning (Yang et al. 2018): features f(x) and K prototypes a class in one space.

    Images [B, channels, side, side] in [-1, 1] -> features [B, D]: a ResNet-18 whose first stage has `width` channels,
    its pooled features -> Linear -> ReLU -> Linear(D). Prototypes: [C, K, D].
    """
    def __init__(self, channels, side, classes, dim, per_class=1, width=64, imagenet=False):
        super().__init__()
        net = torchvision.models.resnet18(weights="DEFAULT" if imagenet else None)
        if width != 64:                                       # torchvision fixes the width: build the four stages again
            net.inplanes, net.bn1 = width, nn.BatchNorm2d(width)
            for i, stride in enumerate((1, 2, 2, 2)):
                setattr(net, f"layer{i + 1}", net._make_layer(torchvision.models.resnet.BasicBlock, width << i, 2, stride))
        if side <= 64:                                        # a stem that keeps small images large
            net.conv1, net.maxpool = nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.Identity()
        elif (channels, width) != (3, 64):
            net.conv1 = nn.Conv2d(channels, width, 7, 2, padding=3, bias=False)
        net.fc = nn.Sequential(nn.Linear(8 * width, 8 * width), nn.ReLU(), nn.Linear(8 * width, dim))
        self.net, self.prototypes = net, nn.Parameter(0.1 * torch.randn(classes, per_class, dim))

    def forward(self, x):
        return self.net(x)


def squared_distances(z, prototypes):
    """d = ||z - m||^2 in float32: z [B, D], prototypes [C, K, D] -> [B, C, K]."""
    return (z.float()[:, None, None] - prototypes.float()).square().sum(-1)


def dce_loss(d, y, gamma=GAMMA):
    """Distance-based cross-entropy (Yang et al. 2018, eq. 6-8): distances d [B, C, K], labels y [B] -> mean over B.

    p = softmax(-gamma d) over all C K prototypes; a class has the sum of its prototypes' p; the loss is -log p(y).
    """
    log_p = F.log_softmax(-gamma * d.flatten(1), dim=1).view_as(d)
    return F.nll_loss(log_p.logsumexp(-1), y)


def prototype_loss(d, y):
    """Squared distance to the nearest prototype of the own class (Yang et al. 2018, eq. 9), mean over the batch."""
    return d.amin(-1).gather(1, y[:, None]).mean()


def nearest_prototypes(z, prototypes):
    """z [N, D], prototypes [C, K, D] -> class [N] of the nearest prototype, and nearest of each class [N, C]."""
    d = torch.cat([squared_distances(part, prototypes) for part in z.split(1024)])
    return d.amin(-1).argmin(-1), d.argmin(-1)


def shifted(x, gen):
    """Augmentation: each image of x [B, C, H, W] moved by up to an eighth of its side, edges mirrored."""
    most = x.shape[-1] // 8
    theta = torch.eye(2, 3, device=x.device).repeat(len(x), 1, 1)
    theta[:, :, 2] = torch.randint(-most, most + 1, (len(x), 2), generator=gen, device=x.device) * 2 / x.shape[-1]
    grid = F.affine_grid(theta, x.shape, align_corners=False)
    return F.grid_sample(x, grid, mode="nearest", padding_mode="reflection", align_corners=False)


def learn_prototypes(data, cfg, device, seed):
    """Stage 1: a PrototypeLearner trained on a Dataset for cfg.learner_steps of 128 images, in eval mode."""
    torch.manual_seed(seed)
    try:
        learner = PrototypeLearner(data.images.shape[1], data.images.shape[-1], len(data.classes), cfg.prototype_dim,
                                   cfg.prototypes_per_class, cfg.learner_width, cfg.imagenet)
    except OSError as error:
        raise Stop(f"the ImageNet weights cannot be downloaded ({error}): check the network, or go without --imagenet") from None
    learner.to(device, memory_format=memory_format(device))
    optimizer = torch.optim.AdamW(learner.parameters(), lr=2e-3, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=cfg.learner_steps + 1)
    images, labels, gen = place_images(data.images, device), data.labels.to(device), torch.Generator(device)
    dtype = amp_dtype(device, cfg.amp)
    for step in range(cfg.learner_steps):
        gen.manual_seed(seed_of(seed, 0, step))
        index = batch_index(step, 128, len(images), seed, images.device)
        flip = torch.rand(128, generator=gen, device=device) < 0.5 if cfg.mirror else None
        with autocast(device, None if dtype is torch.float16 else dtype):           # float16 would want a scaler here too
            z = learner(shifted(scaled(images, index, device, flip), gen))
        d, y = squared_distances(z, learner.prototypes), labels[index.to(device)]
        loss = dce_loss(d, y) + PULL * prototype_loss(d, y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % cfg.log_every == 0:
            progress(f"stage 1: step {step + 1}/{cfg.learner_steps}  loss {loss.item():.4f}")
    return learner.eval().requires_grad_(False)


@torch.no_grad()
def features_of(net, images, device):
    """net(x) in float32 on the CPU for all uint8 images [N, C, H, W], as x in [-1, 1]."""
    return torch.cat([net(scaled(images, i, device)).float().cpu() for i in torch.arange(len(images)).split(500)])


def class_table(prototypes, scale):
    """Prototypes [C, K, D] -> rows [C K, D] of the class table; rms: one factor for all, to the RMS 1 of N(0, 1) rows."""
    rows = prototypes.detach().float().cpu().flatten(0, 1)
    return rows / rows.square().mean().sqrt() if scale == "rms" else rows


def rows_for(frequency, labels, seed):
    """Class labels [N] -> table rows [N]: one of the class's K prototypes, drawn by its frequency [C, K] in training."""
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
        table = dict(params=[self.table.weight], factor=cfg.prototype_lr, start=round(cfg.unfreeze_at * cfg.steps))
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
    """32 groups, or fewer of 4 channels: a channel that is normalised alone forgets its mean, and with it the colour."""
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

        def stage(c_in, c_out, level):
            attend = [Attention(c_out)] if side >> level <= attention else []
            return Stage([ResBlock(c_in, c_out, E, dropout), *attend])
        for level, m in enumerate(multipliers):
            if level > 0:
                self.down.append(nn.Conv2d(c, c, 3, stride=2, padding=1))
                skips.append(c)
            for _ in range(blocks):
                self.down.append(stage(c, m * channels, level))
                c = m * channels
                skips.append(c)
        self.middle = Stage([ResBlock(c, c, E, dropout), Attention(c), ResBlock(c, c, E, dropout)])
        for level, m in reversed(list(enumerate(multipliers))):
            for _ in range(blocks + 1):
                self.up.append(stage(c + skips.pop(), m * channels, level))
                c = m * channels
            if level > 0:
                self.up.append(nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(c, c, 3, padding=1)))
        self.last = nn.Sequential(group_norm(c), nn.SiLU(), zeroed(nn.Conv2d(c, image_channels, 3, padding=1)))

    def forward(self, x, t, condition=None):
        emb = self.time_mlp(time_embedding(t, self.channels))                       # [B, E]
        if condition is not None:
            emb = emb + condition
        h = self.first(x)
        skips = [h]
        for layer in self.down:
            h = layer(h, emb) if isinstance(layer, Stage) else layer(h)
            skips.append(h)
        h = self.middle(h, emb)
        for layer in self.up:
            h = layer(torch.cat([h, skips.pop()], dim=1), emb) if isinstance(layer, Stage) else layer(h)
        return self.last(h)


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


def add_noise(x0, t, eps, abar):
    """Forward process xt = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps (DDPM eq. 4). x0, eps, xt [B, C, H, W]; t [B]."""
    a = abar[t][:, None, None, None]
    return a.sqrt() * x0 + (1 - a).sqrt() * eps


def noise_loss(model, x0, condition, t, eps, abar):
    """Squared error of the predicted noise, mean over all elements (DDPM eq. 14). condition: the model's third input."""
    return F.mse_loss(model(add_noise(x0, t, eps, abar), t, condition).float(), eps)


def guided_noise(model, x, t, condition, null, w):
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6): (1 + w) eps(x, c) - w eps(x, null), [B, C, H, W].

    Both halves go through the network as one batch; w = 0 costs one pass of the plain batch.
    """
    if w == 0:
        return model(x, t, condition).float()
    both = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([condition, null])).float()
    given, free = both.chunk(2)
    return (1 + w) * given - w * free


def sample_times(T, steps):
    """The noise levels of a run of 1 <= steps <= T: trailing spacing, round(T - i T / steps) - 1, so T - 1 is the first."""
    return [round(T - i * T / steps) - 1 for i in range(steps)]


def ddim_step(x, x0, eps, a, a_next, eta=0.0, noise=None):
    """Song et al. 2021, eq. 12: x at abar a, with its predictions x0 and eps -> x at abar a_next. eta = 1: ddpm_step."""
    sigma = eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)).sqrt()                # Song eq. 16
    mean = a_next.sqrt() * x0 + (1 - a_next - sigma ** 2).clamp(min=0).sqrt() * eps
    return mean if eta == 0 else mean + sigma * noise


def ddpm_step(x, x0, a, a_next, noise):
    """The posterior q(x_next | x, x0) (DDPM eq. 6-7); on a subsequence of the levels, beta is 1 - a / a_next."""
    beta = 1 - a / a_next
    mean = (a_next.sqrt() * beta * x0 + (a / a_next).sqrt() * (1 - a_next) * x) / (1 - a)
    return mean + ((1 - a_next) / (1 - a) * beta).sqrt() * noise


def dpmpp_step(x, x0, a, a_next, x0_before=None, a_before=None):
    """DPM-Solver++(2M) (Lu et al. 2022, alg. 2); first order without the step before, and to the clean image.

    lambda = log(sqrt(a) / sqrt(1 - a)). The last step (a_next = 1) is infinite in lambda, which leaves no second order.
    """
    def log_snr(a):
        return 0.5 * (a.log() - (1 - a).log())
    h, D = log_snr(a_next) - log_snr(a), x0
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
    levels = [*abar.cpu()[times], torch.ones(())]             # plain numbers: the device never waits for them
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
            x = ddpm_step(x, x0, a, a_next, noise) if sampler == "ddpm" else ddim_step(x, x0, eps, a, a_next, eta, noise)
    return x


def generate(model, cfg, conditions, shape, device, trace=None):
    """One image for each condition (int64 [N], the model's third input, null is -1) -> uint8 [N, C, H, W] on the CPU.

    shape: [C, H, W]. The same cfg.seed gives the same images. Stop if the network gives something that is no number.
    """
    abar, dtype, gen, images = alpha_bars(cfg.timesteps), amp_dtype(device, cfg.amp), torch.Generator(device), []
    network = torch.compile(model) if cfg.compile else model
    for i, given in enumerate(conditions.to(device).split(cfg.sample_batch)):
        gen.manual_seed(seed_of(cfg.seed, 2, i))
        xT = torch.randn(len(given), *shape, generator=gen, device=device).contiguous(memory_format=memory_format(device))

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
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
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
    """One 32-bit seed from whole numbers such as (seed of the run, purpose, step)."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


@functools.lru_cache(maxsize=2)
def epoch_order(n, seed, epoch, device):
    return torch.randperm(n, generator=torch.Generator(device).manual_seed(seed_of(seed, 3, epoch)), device=device)


def batch_index(step, batch_size, n, seed, device):
    """Indices [batch_size] of a step's images: every epoch is a permutation that follows from (seed, epoch) alone."""
    first, pieces = step * batch_size, []
    while first < (step + 1) * batch_size:
        epoch, offset = divmod(first, n)
        pieces.append(epoch_order(n, seed, epoch, device)[offset:offset + (step + 1) * batch_size - first])
        first += len(pieces[-1])
    return torch.cat(pieces)


def random_batches(cfg, images, targets, step, device):
    """The passes of one step, for this process: x0 in [-1, 1], target, t, eps and chance (uniform, one number an image).

    Everything follows from (seed, step), for the whole batch, of which each process and pass takes its rows. So there
    is no random state to save, and any number of processes or passes trains alike.
    """
    B, rows = cfg.batch_size, cfg.batch_size // (WORLD * cfg.accumulate)
    gen = torch.Generator(device).manual_seed(seed_of(cfg.seed, 4, step))
    t = torch.randint(cfg.timesteps, (B,), generator=gen, device=device)
    eps = torch.randn(B, *images.shape[1:], generator=gen, device=device)
    flip, chance = torch.rand(2, B, generator=gen, device=device)
    index = batch_index(step, B, len(images), cfg.seed, images.device)
    torch.manual_seed(seed_of(cfg.seed, 5, step, RANK))       # dropout
    for first in range(RANK * cfg.accumulate * rows, (RANK + 1) * cfg.accumulate * rows, rows):
        part = slice(first, first + rows)
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
    """Yields a list that Ctrl-C or SIGTERM makes non-empty, so that a step can end first; Ctrl-C twice stops at once."""
    asked = []

    def ask(number, frame):
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)
    main_thread = threading.current_thread() is threading.main_thread()
    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM) if main_thread}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def progress(text, end=False):
    """A line that the next one overwrites on a terminal, unless `end`. Only the first process speaks."""
    if RANK == 0:
        live = sys.stdout.isatty()
        print(("\r\033[K" if live else "") + text, end="" if live and not end else "\n", flush=True)


def append_row(path, row):
    """Add a dict to a CSV file, with a header if the file is new."""
    new = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)


def read_rows(path, up_to=math.inf):
    """Rows of a CSV file of numbers, as dicts; rows whose step is beyond `up_to` are taken out of the file."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    kept = [row for row in rows if int(row["step"]) <= up_to]
    if len(kept) < len(rows):
        path.unlink()
        for row in kept:
            append_row(path, row)
    return [{k: float(v) for k, v in row.items()} for row in kept]


def load_checkpoint(path):
    """checkpoint.pt of this script, on the CPU; Stop if it is missing, damaged or of something else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise Stop(f"there is no {path} yet: --resume the run first") from None
    except Exception as error:                                # zip, pickle, storage: many kinds, one meaning
        raise Stop(f"{path} is damaged or no checkpoint ({str(error).splitlines()[0][:80]})") from None
    if not isinstance(state, dict) or state.get("script") != SCRIPT:
        raise Stop(f"{path} is not a checkpoint of {SCRIPT}.py")
    return state


def load_weights(module, weights, path):
    try:
        module.load_state_dict(weights)
    except (RuntimeError, KeyError, TypeError, AttributeError):
        raise Stop(f"{path} holds another network than config.json beside it describes") from None


def load_run(folder, device="auto"):
    """Everything needed to sample from a run: config, model (the average, in eval mode), extra, step, seconds, device."""
    folder, device = Path(folder), find_device(device)
    cfg, state = Config(**read_config(folder)), load_checkpoint(folder / "checkpoint.pt")
    model = cfg.build(state["extra"]).to(device, memory_format=memory_format(device)).eval().requires_grad_(False)
    load_weights(model, state["average"], folder / "checkpoint.pt")
    return SimpleNamespace(config=cfg, model=model, extra=state["extra"], step=state["step"], seconds=state["seconds"],
                           device=device)


def train(cfg, model, images, targets, loss_fn, folder, extra, device, on_eval=None):
    """Train on uint8 images [N, C, H, W] to cfg.steps, on from folder/checkpoint.pt if there is one.

    targets [N]: what loss_fn wants to know of each image. loss_fn(net, batch, abar) -> dict of scalars, "loss" first;
    batch: see random_batches. extra: kept in the checkpoint. on_eval(step, seconds, average) is called every
    cfg.eval_every steps, off the clock. Returns the moving average of the model and the seconds of training.
    """
    abar, dtype = alpha_bars(cfg.timesteps).to(device), amp_dtype(device, cfg.amp)
    images, targets = place_images(images, device), targets.to(device)
    model.to(device, memory_format=memory_format(device)).train()
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.param_groups(cfg), betas=(0.9, 0.95), weight_decay=cfg.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    parts, checkpoint = dict(model=model, average=average, optimizer=optimizer, scaler=scaler), folder / "checkpoint.pt"
    done, seconds = 0, 0.0

    def save(step):
        if RANK == 0:
            states = {name: part.state_dict() for name, part in parts.items()}
            save_safely(dict(script=SCRIPT, step=step, seconds=seconds, extra=extra, **states), checkpoint)
    if checkpoint.exists():
        state = load_checkpoint(checkpoint)
        done, seconds = state["step"], state["seconds"]
        for name, part in parts.items():
            if name != "scaler" or state[name] and scaler.is_enabled():             # --amp may have changed
                load_weights(part, state.pop(name), checkpoint)
    else:
        save(0)
    if RANK == 0:
        read_rows(folder / "log.csv", done)                   # drop what a killed run logged after its last checkpoint
    net = nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model
    forward = torch.compile(net) if cfg.compile else net
    sums, skipped, in_a_row, logged, clock = {}, torch.zeros((), device=device), 0, done, time.perf_counter()

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

            stopping = bool(asked) and WORLD == 1
            if now % cfg.log_every == 0 or now == cfg.steps:
                means = torch.stack([s / (now - logged) / WORLD for s in sums.values()] + [skipped.new_tensor(len(asked))])
                if WORLD > 1:
                    dist.all_reduce(means)
                *values, stop = means.tolist()                # here alone the host waits for the device
                elapsed, clock = time.perf_counter() - clock, time.perf_counter()
                speed, seconds, logged = (now - logged) * cfg.batch_size / elapsed, seconds + elapsed, now
                losses, sums, stopping = dict(zip(sums, values)), {}, stop > 0
                if RANK == 0:
                    append_row(folder / "log.csv", {"step": now, **losses, "learning rate": learning_rate(step, cfg),
                               "images/s": round(speed, 1), "seconds": round(seconds, 2), "skipped steps": int(skipped)})
                progress(f"step {now}/{cfg.steps}  loss {losses['loss']:.4f}  {speed:.0f} images/s  "
                         f"{(cfg.steps - now) * cfg.batch_size / speed / 60:.1f} min left", now == cfg.steps)
                if in_a_row > 30:                             # float16's scaler needs at most 17 to find its scale
                    raise Stop(f"the last {int(in_a_row)} gradients were not finite, and no step was taken: {checkpoint} is "
                               "sound; --resume it with a lower --lr, or with --amp bf16 or off")
            if on_eval and (now % cfg.eval_every == 0 or now == cfg.steps):
                seconds += time.perf_counter() - clock
                on_eval(now, seconds, average)
                clock = time.perf_counter()
            if stopping or now % cfg.save_every == 0 or now == cfg.steps:
                save(now)
            if stopping and now < cfg.steps:
                raise KeyboardInterrupt
    return average, seconds


# --------------------------------------------------------------------------------------------------------------------
# 7  Metrics
# --------------------------------------------------------------------------------------------------------------------

INCEPTION = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"


def moments(features):
    """features [N, D] -> mean [D] and covariance [D, D], float64."""
    return features.double().mean(0), torch.cov(features.double().T, correction=min(1, len(features) - 1))


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """||mu1 - mu2||^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al. 2017, eq. 6), float64.

    The trace of the root is the sum of the roots of the eigenvalues of S1^(1/2) S2 S1^(1/2), which is symmetric.
    """
    values, vectors = torch.linalg.eigh(sigma1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ sigma2 @ root).clamp(min=0).sqrt().sum()
    return ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross).item()


def inception_score(logits, splits=10):
    """exp(mean KL(p(y|x) || p(y))) over shuffled splits (Salimans et al. 2016): logits [N, L] -> mean, std."""
    logits = logits.double()[torch.randperm(len(logits), generator=torch.Generator().manual_seed(0))]
    scores = []
    for part in logits.chunk(splits):
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
    net.Mixed_7c.branch_pool.register_forward_pre_hook(lambda module, pooled: F.max_pool2d(seen.pop(), 3, 1, padding=1))
    return net.eval().requires_grad_(False)


def load_inception(source, device):
    """Settings' `inception` -> the network with weights; None and the reason where there are none to be had."""
    if source == "off" or source == "auto" and device.type == "cpu":
        return None, "ask with --inception download, or --inception FILE"
    try:
        weights = torch.load(source, map_location="cpu", weights_only=True) if source not in ("auto", "download") else \
            torch.hub.load_state_dict_from_url(INCEPTION, map_location="cpu", check_hash=True, weights_only=True)
        net = fid_inception()
        net.load_state_dict(weights)
        return net.to(device), ""
    except Exception as error:                                # no network, no such file, damaged, of another network
        return None, f"no weights from {source}: {str(error).splitlines()[0][:100]}"


@torch.no_grad()
def inception_features(net, images, device):
    """uint8 [N, C, H, W] -> features [N, 2048] and logits without bias [N, 1008] on the CPU; input as in pytorch-fid."""
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
        np.savez(cache, mu=mu, sigma=sigma, features=some)
    mu, sigma, some = (torch.from_numpy(np.load(cache)[name]) for name in ("mu", "sigma", "features"))
    features, logits = inception_features(net, samples, device)
    (kid, kid_std), (score, score_std) = kernel_distance(features, some), inception_score(logits)
    n = "" if len(samples) >= 50_000 else f"-{len(samples) / 1000:g}k"
    return {f"FID{n}": frechet_distance(*moments(features), mu, sigma), f"KID{n}": kid, f"KID{n} (std)": kid_std,
            f"IS{n}": score, f"IS{n} (std)": score_std}


def make_judge(learner, train_set, test_set, device):
    """A PrototypeLearner to measure samples by, with what it makes of real held-out images: accuracy, Frechet floor."""
    real, held_out = (features_of(learner, data.images, device) for data in (train_set, test_set))
    judge = SimpleNamespace(learner=learner, prototypes=learner.prototypes.cpu(), real=moments(real), held_out=held_out)
    right = nearest_prototypes(held_out, judge.prototypes)[0] == test_set.labels
    judge.accuracy, judge.floor = right.float().mean().item(), frechet_distance(*moments(held_out), *judge.real)
    return judge


def judge_samples(judge, samples, labels, device):
    """uint8 samples, labels asked for -> share recognised as such; Frechet distance to the training images.

    That distance lies in the features of this one classifier. It is not FID, and compares only under the same judge.
    """
    z = features_of(judge.learner, samples, device)
    right = nearest_prototypes(z, judge.prototypes)[0] == labels
    return {"accuracy": right.float().mean().item(), "frechet": frechet_distance(*moments(z), *judge.real)}


def train_judge(cfg, train_set, test_set, device):
    """A judge trained apart from the method: on real images alone, with another seed, for shapes on other images."""
    images = load_dataset("shapes", "judge", cfg.image_size) if cfg.dataset == "shapes" else train_set
    judge = make_judge(learn_prototypes(images, cfg, device, seed=10_000), train_set, test_set, device)
    progress(f"judge, a classifier trained apart: recognises {judge.accuracy:.1%} of real held-out images, at Frechet "
             f"distance {judge.floor:.3f} from the training images", end=True)
    return judge


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


def draw_denoising(path, model, cfg, extra, device, columns=9):
    """denoising.png: an image of each of the first ten classes on its way from noise to sample, with t."""
    trace, labels = [], torch.arange(min(10, len(extra["classes"])))
    final = generate(model, cfg, rows_for(extra["frequency"], labels, cfg.seed), extra["shape"], device, trace)
    trace = trace[:len(trace) // -(-len(labels) // cfg.sample_batch)]               # of the first batch
    chosen = [trace[round(i * (len(trace) - 1) / (columns - 2))] for i in range(columns - 1)]
    steps = torch.stack([*(to_uint8(x) for _, x in chosen), final[:len(trace[0][1])]], 1)
    draw_grid(path, steps.flatten(0, 1), [extra["classes"][c] for c in labels[:len(steps)]],
              f"from noise to sample in {cfg.sample_steps} {cfg.sampler} steps (t: noise level, of {cfg.timesteps})",
              [*(f"t={t}" for t, _ in chosen), "sample"])


def draw_curves(path, rows):
    """curves.png: each loss, the learning rate and the speed against the step, from the rows of log.csv."""
    names = [name for name in rows[0] if name not in ("step", "seconds", "skipped steps")]
    fig = Figure(figsize=(4.5 * len(names), 3.5), layout="constrained")
    for axes, name in zip(fig.subplots(1, len(names)), names):
        axes.plot([row["step"] for row in rows], [row[name] for row in rows])
        axes.set(title=name, xlabel="step", yscale="log" if "loss" in name else "linear")
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
    plane = torch.linalg.svd(z - mean, full_matrices=False)[2][:2].T                # PCA: [D, 2]
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


def draw_comparison(path, histories, title):
    """comparison.png: accuracy and Frechet distance of the samples, against steps and against seconds with stage 1."""
    fig = Figure(figsize=(11, 7.5), layout="constrained")
    for i, (axes, x) in enumerate(zip(fig.subplots(2, 2).flat, ("step", "seconds") * 2)):
        for variant, history in histories.items():
            axes.plot([h[x] for h in history], [h[("accuracy", "frechet")[i // 2]] for h in history], ".-", label=variant)
        axes.set(xlabel="training step" if x == "step" else "seconds of training, with stage 1",
                 ylabel=("samples recognised as their class", "Frechet distance (judge's features)")[i // 2],
                 yscale=("linear", "log")[i // 2])
        axes.grid(alpha=0.3)
        axes.legend(title="prototypes")
    fig.suptitle(title)
    fig.savefig(path, dpi=110)


# --------------------------------------------------------------------------------------------------------------------
# 9  Main: train | sample | evaluate | compare
# --------------------------------------------------------------------------------------------------------------------

RUN_FILES = ("config.json", "log.csv", "checkpoint.pt", "metrics.json", "samples.png", "samples.npz", "denoising.png",
             "prototypes.png", "curves.png", "comparison.png", "comparison.json")


def new_folder(wanted):
    """Make `wanted`, or its first neighbour wanted-2, wanted-3, ... that holds none of a run's files."""
    folder, number = Path(wanted), 1
    while any((folder / name).exists() for name in RUN_FILES):
        number += 1
        folder = Path(f"{wanted}-{number}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_json(path, content):
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def write_config(folder, cfg):
    """config.json: the settings, but for what to do and where."""
    settings = dataclasses.asdict(cfg)
    write_json(folder / "config.json", {k: v for k, v in settings.items() if k not in ("out", "resume", "sample", "evaluate")})


def machine(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} cores, {platform.machine()}, {device.type}"


def load_sets(cfg):
    """(images for the diffusion model, training set, test set); under torchrun the first process downloads alone."""
    if RANK > 0:
        dist.barrier()
    sets = [load_dataset(cfg.dataset, split, cfg.image_size, cfg.data_dir) for split in ("train", "test")]
    sets.insert(0, sets[0] if cfg.train_split == "train" else load_dataset(cfg.dataset, cfg.train_split, cfg.image_size, cfg.data_dir))
    if RANK == 0 and WORLD > 1:
        dist.barrier()
    if sets[0].labels is None:
        raise Stop(f"{cfg.data_dir} is a flat folder, and ProtoDiffusion needs classes: sort the images into train/<class>/*")
    if sets[1].images.shape[1] != sets[2].images.shape[1]:
        raise Stop(f"one of train and test in {cfg.data_dir} is grey throughout and the other is not: convert one of them")
    return sets


def stage_one(cfg, sets, device, folder):
    """Learn and report prototypes, make the class table -> extra: all a run must know beside the network's weights."""
    diffusion_set, train_set, test_set = sets
    C, K, rows = len(train_set.classes), cfg.prototypes_per_class, diffusion_set.labels
    extra = dict(shape=list(train_set.images.shape[1:]), classes=train_set.classes, seconds=0.0)
    if cfg.prototypes == "random":
        table = torch.randn(C, cfg.prototype_dim, generator=torch.Generator().manual_seed(seed_of(cfg.seed, 6)))
        return {**extra, "table": table, "rows": rows, "frequency": torch.ones(C, 1)}
    start = time.perf_counter()
    learner = learn_prototypes(train_set, cfg, device, cfg.seed)
    for tensor in learner.state_dict().values() if WORLD > 1 else ():               # GPUs may differ: the first one counts
        dist.broadcast(tensor, 0)
    prototypes = learner.prototypes.cpu()
    if K > 1:
        _, nearest = nearest_prototypes(features_of(learner, diffusion_set.images, device), prototypes)
        rows = rows * K + nearest.gather(1, rows[:, None])[:, 0]
    counts = torch.bincount(rows, minlength=C * K).view(C, K).float()
    counts += counts.sum(1, keepdim=True) == 0                # a class without images: any of its prototypes
    extra["seconds"] = time.perf_counter() - start
    z = features_of(learner, test_set.images, device)
    accuracy = (nearest_prototypes(z, prototypes)[0] == test_set.labels).float().mean().item()
    norms, apart = prototypes.flatten(0, 1).norm(dim=1), F.pdist(prototypes.flatten(0, 1)) if C * K > 1 else torch.zeros(1)
    progress(f"stage 1: {extra['seconds']:.0f} s, classifies {accuracy:.1%} of {len(z)} held-out images; prototypes of norm "
             f"{norms.min():.2f} to {norms.max():.2f}, {apart.min():.2f} to {apart.max():.2f} apart", end=True)
    if RANK == 0:
        draw_prototypes(folder / "prototypes.png", z[:3000], test_set.labels[:3000], prototypes, train_set.classes, accuracy)
    return {**extra, "table": class_table(prototypes, cfg.scale), "rows": rows, "frequency": counts / counts.sum(1, keepdim=True),
            "learner": learner.state_dict(), "report": dict(accuracy=accuracy, norms=norms.tolist(), nearest=apart.min().item())}


def train_run(cfg, folder, sets, device, extra=None, on_eval=None):
    """Both stages (`extra`: stage 1 is done) in `folder`, on from its checkpoint if there is one -> model, extra, seconds."""
    if (folder / "checkpoint.pt").exists():
        extra = load_checkpoint(folder / "checkpoint.pt")["extra"]
    extra = extra or stage_one(cfg, sets, device, folder)
    torch.manual_seed(cfg.seed)                               # the same network start whatever the prototypes
    model = cfg.build(extra)
    loss_fn, on_eval = functools.partial(protodiffusion_loss, cfg), on_eval and functools.partial(on_eval, extra)
    model, seconds = train(cfg, model, sets[0].images, extra["rows"], loss_fn, folder, extra, device, on_eval)
    if RANK == 0:
        draw_curves(folder / "curves.png", read_rows(folder / "log.csv"))
    return model, extra, {"stage 1": round(extra["seconds"], 1), "training": round(seconds, 1)}


def evaluation_labels(labels, n):
    """n class labels in the proportions of `labels`, in order."""
    return labels.sort().values[((torch.arange(n) + 0.5) / n * len(labels)).long()]


def sample_labels(text, classes, n):
    """n labels, taking turns: of "0,3" or "circle,star", of all classes if empty. Stop for one that does not exist."""
    words = [word.strip() for word in text.split(",")] if text else classes
    numbers = [classes.index(word) if word in classes else int(word) if word.isdecimal() else -1 for word in words]
    for word, number in zip(words, numbers):
        if not 0 <= number < len(classes):
            raise Stop(f"--labels {word} is no class: give 0 to {len(classes) - 1}, or names: {', '.join(classes[:20])}")
    return torch.tensor(numbers)[torch.arange(n) % len(numbers)]


def save_samples(folder, images, labels, classes, title):
    """samples.png, and samples.npz as the guided-diffusion evaluator reads it: arr_0 uint8 [N, H, W, C], arr_1 labels."""
    np.savez(folder / "samples.npz", images.permute(0, 2, 3, 1).numpy(), labels.numpy())
    draw_samples(folder / "samples.png", images, labels, classes, title)


def sample_run(cfg, model, extra, labels, folder, device):
    """Samples for class labels [N], saved and drawn in `folder` -> uint8 [N, C, H, W]."""
    images = generate(model, cfg, rows_for(extra["frequency"], labels, cfg.seed), extra["shape"], device)
    save_samples(folder, images, labels, extra["classes"], f"{cfg.dataset}, {cfg.prototypes} prototypes, {cfg.steps} steps; "
                 f"guidance {cfg.guidance}, {cfg.sample_steps} {cfg.sampler} steps, seed {cfg.seed}")
    return images


def measure(cfg, model, extra, seconds, sets, folder, device):
    """Samples, metrics and pictures of a trained model in `folder`."""
    judges = {"judge": train_judge(cfg, *sets[1:], device)}
    if "learner" in extra:
        learner = PrototypeLearner(extra["shape"][0], extra["shape"][-1], len(extra["classes"]), cfg.prototype_dim,
                                   cfg.prototypes_per_class, cfg.learner_width).to(device).eval()
        learner.load_state_dict(extra["learner"])
        judges["learner"] = make_judge(learner.requires_grad_(False), *sets[1:], device)
    start, labels = time.perf_counter(), evaluation_labels(sets[0].labels, cfg.num_samples)
    samples = sample_run(cfg, model, extra, labels, folder, device)
    seconds = {**seconds, "sampling": round(time.perf_counter() - start, 1)}
    draw_denoising(folder / "denoising.png", model, cfg, extra, device)
    results = {}
    for name, judge in judges.items():
        found = judge_samples(judge, samples, labels, device)
        results |= {f"{name}: samples recognised": found["accuracy"], f"{name}: real held-out images recognised": judge.accuracy,
                    f"{name}: Frechet distance, samples (not FID)": found["frechet"],
                    f"{name}: Frechet distance, real held-out images": judge.floor}
    results |= inception_metrics(cfg, samples, sets[0].images, device)
    about = {k: getattr(cfg, k) for k in ("dataset", "prototypes", "scale", "steps", "batch_size", "seed", "num_samples",
                                          "guidance", "sampler", "sample_steps")}
    about |= dict(training_images=len(sets[0].images), parameters=sum(p.numel() for p in model.parameters()),
                  machine=machine(device), torch=torch.__version__, prototype_learner=extra.get("report"))
    write_json(folder / "metrics.json", {**about, "seconds": seconds, "results": results})
    print(f"{cfg.num_samples} samples, guidance {cfg.guidance}, {cfg.sample_steps} {cfg.sampler} steps, seed {cfg.seed}; "
          f"seconds: {', '.join(f'{k} {v:.0f}' for k, v in seconds.items())} ({about['machine']})")
    for name, value in results.items():
        print(f"  {name:48} {value:.4f}")


SWEEP = (0.0, 0.5, 1.0, 1.8, 3.0)       # guidance weights that --compare also measures the trained models at


def first_as_good(history, key, value):
    """First step at which a history of dicts is as good as `value`, else None: accuracy is good high, frechet low."""
    return next((h["step"] for h in history if (h[key] >= value if key == "accuracy" else h[key] <= value)), None)


def compare(cfg, sets, folder, device):
    """random, frozen, unfrozen: one seed, data order, network start and budget -> comparison.json, .png and a table."""
    result, learned = {}, None
    judge, labels = train_judge(cfg, *sets[1:], device), evaluation_labels(sets[0].labels, cfg.num_samples)

    def quality(cfg, model, extra):
        samples = generate(model, cfg, rows_for(extra["frequency"], labels, cfg.seed), extra["shape"], device)
        return judge_samples(judge, samples, labels, device)
    for variant in ("random", "frozen", "unfrozen"):
        one, part = dataclasses.replace(cfg, prototypes=variant, compare=False), folder / variant
        progress(f"--- {variant} prototypes", end=True)
        part.mkdir(exist_ok=True)
        write_config(part, one)
        read_rows(part / "quality.csv", load_checkpoint(part / "checkpoint.pt")["step"] if (part / "checkpoint.pt").exists() else 0)

        def on_eval(extra, step, seconds, model):
            row = {"step": step, "seconds": round(seconds + extra["seconds"], 2), **quality(one, model, extra)}
            append_row(part / "quality.csv", row)
            progress(f"step {step}: {row['accuracy']:.1%} recognised, Frechet distance {row['frechet']:.3f}", end=True)
        model, extra, _ = train_run(one, part, sets, device, learned, on_eval)
        learned = extra if "learner" in extra else None       # frozen and unfrozen share stage 1, and both pay for it
        result[variant] = dict(stage_1_seconds=extra["seconds"], history=read_rows(part / "quality.csv"),
                               guidance={w: quality(dataclasses.replace(one, guidance=w), model, extra) for w in SWEEP})
    base = result["random"]["history"]
    for key, best in (("accuracy", max), ("frechet", min)):
        target = best(h[key] for h in base)
        for r in result.values():
            reached = first_as_good(r["history"], key, target)
            r[f"speed-up by {key}"] = reached and first_as_good(base, key, target) / reached
    title = f"{cfg.dataset}, seed {cfg.seed}, {cfg.num_samples} samples, guidance {cfg.guidance}, prototypes at scale {cfg.scale}"
    write_json(folder / "comparison.json", {**dataclasses.asdict(cfg), "machine": machine(device), "torch": torch.__version__,
               "real images": {"accuracy": judge.accuracy, "frechet": judge.floor}, "variants": result})
    draw_comparison(folder / "comparison.png", {v: r["history"] for v, r in result.items()}, title)
    print(f"\n{title}, {cfg.steps} steps of {cfg.batch_size}; speed-up: steps of the baseline's best / steps to reach it\n"
          f"{'prototypes':12}{'stage 1':>9}{'recognised':>12}{'speed-up':>10}{'Frechet':>9}{'speed-up':>10}   at guidance"
          + "".join(f"{w:>16g}" for w in SWEEP))
    for variant, r in result.items():
        last, ups = r["history"][-1], [f"{r[f'speed-up by {k}'] or math.nan:.2f}" for k in ("accuracy", "frechet")]
        print(f"{variant:12}{r['stage_1_seconds']:>8.0f}s{last['accuracy']:>12.1%}{ups[0]:>10}{last['frechet']:>9.3f}{ups[1]:>10}"
              f"{'':14}" + "".join(f"{q['accuracy']:>8.1%} / {q['frechet']:.2f}" for q in r["guidance"].values()))
    print(f"{'real images':21}{judge.accuracy:>12.1%}{judge.floor:>19.3f}")


def run(cfg):
    """Do what the settings ask for."""
    device = find_device(cfg.device)
    choose_backends(device)
    if cfg.sample or cfg.evaluate:
        source = load_run(cfg.sample or cfg.evaluate, cfg.device)
        labels = sample_labels(cfg.labels, source.extra["classes"], cfg.num_samples)
        folder = new_folder(cfg.out or Path(cfg.sample or cfg.evaluate, "samples" if cfg.sample else "evaluation"))
        if cfg.sample:
            sample_run(cfg, source.model, source.extra, labels, folder, device)
        else:
            seconds = {"stage 1": round(source.extra["seconds"], 1), "training": round(source.seconds, 1)}
            measure(cfg, source.model, source.extra, seconds, load_sets(cfg), folder, device)
        return progress(f"{cfg.num_samples} samples in {folder}", end=True)
    if WORLD > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    sets = load_sets(cfg)                                     # what is wrong with the data shows before a folder is made
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
    cfg = Config()
    try:
        cfg = parse_config(argv)
        run(cfg)
        return 0
    except KeyboardInterrupt:
        training = cfg.out and not (cfg.sample or cfg.evaluate)
        print("\ninterrupted" + f"; go on with: python {SCRIPT}.py --resume {shlex.quote(cfg.out)}" * bool(training), file=sys.stderr)
        return 130
    except Stop as error:
        print(f"\n{SCRIPT}: {error}", file=sys.stderr)
    except OSError as error:
        print(f"\n{SCRIPT}: {error.filename or 'a file'} cannot be read or written ({error.strerror or error}): check the name, "
              "the permissions and the space that is left, or choose another --out", file=sys.stderr)
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "memory" not in str(error):
            raise
        print(f"\n{SCRIPT}: memory ran out: lower --batch-size or --sample-batch, or raise --accumulate", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
