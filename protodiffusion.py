"""ProtoDiffusion: a class-conditional diffusion model whose class embeddings start as prototypes.

Paper: Baykal, Karagoz, Binhuraib, Unal, "ProtoDiffusion: Classifier-Free Diffusion Guidance with
Prototype Learning", ACML 2023, arXiv 2307.01924. Stage 1: Yang et al., CVPR 2018, arXiv 1805.03438.

The idea. A class-conditional diffusion model looks its class up in a table of embeddings, and that
table usually starts as noise. Here a small classifier first learns a prototype for each class: a
point in its feature space that the images of the class lie close to. The prototypes become the rows
of the table, so the denoiser knows from its first step which classes are alike. The table then
stays as it is ("frozen") or trains on ("unfrozen"); "random" is the paper's baseline.

    stage 1   image ──> ResNet f(x) ──> nearest prototype = class      DCE loss + prototype loss
                                             │
    stage 2               table of prototypes [C, D] ──> MLP ─┐ (zero vector: no class)
              noise level t ──> sinusoids ──> MLP ──────────(+)──> every residual block
              noisy image xt ────────────────────────────────────> U-Net ──> predicted noise

    python protodiffusion.py                            # built-in shapes, minutes on a CPU
    python protodiffusion.py --dataset cifar10          # the paper's data

"choice:" marks where the paper is silent or we differ, "# exercise" functions to write again from
their docstrings. To change stage 1, look at dce_loss and prototype_loss; how the class enters, at
ProtoDiffusion.denoise; noise levels, at alpha_bars; a sampler, at sample; data, at load_dataset."""
import argparse
import contextlib
import csv
import dataclasses
import datetime
import glob
import hashlib
import io
import json
import math
import os
import re
import sys
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from matplotlib import font_manager, style
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import nn
from torchvision.transforms import v2

SCRIPT = Path(__file__).stem
RANK = int(os.environ.get("RANK", 0))           # torchrun numbers its processes
WORLD = int(os.environ.get("WORLD_SIZE", 1))    # and says how many there are

# ---- Settings ------------------------------------------------------------------------------------

Sets = Literal["shapes", "shapes-40", "shapes-160", "folder", "cifar10", "stl10", "tiny-imagenet"]

@dataclasses.dataclass
class Config:
    """Every setting is a flag; its comment is its help."""
    dataset: Sets = "shapes"        # the images: built-in shapes, a folder, or a published set
    image_size: int = 16            # side of the images, pixels
    # prototypes (stage 1)
    prototypes: Literal["random", "frozen", "unfrozen"] = "unfrozen"    # how the class table starts
    start: Literal["means", "random"] = "means"     # of prototypes: class means, or N(0, 0.01)
    scale: Literal["rms", "raw"] = "rms"    # prototypes at the RMS of a random table, or as learned
    prototype_dim: int = 64         # D, numbers in a prototype
    prototypes_per_class: int = 1   # K, prototypes for each class
    learner_steps: int = 400        # steps of stage 1, of 128 images each
    learner_width: int = 16         # channels of its first layers; 64: ResNet-18
    imagenet: bool = False          # start stage 1 (of width 64) from ImageNet weights (paper)
    # network and process (stage 2)
    channels: int = 48              # channels of the U-Net's first level, a multiple of 4
    multipliers: str = "1,1"        # channel factor of each level of the U-Net
    blocks: int = 1                 # residual blocks for each level
    attention: int = 8              # self-attention at sides up to this; the middle has it
    dropout: float = 0.0            # dropout in residual blocks
    timesteps: int = 1000           # T, number of noise levels
    weight_decay: float = 1e-4      # weight decay of AdamW
    # training: from here on --resume may change settings
    steps: int = 3600               # optimiser steps
    batch_size: int = 32            # images for each step, over all processes
    lr: float = 2e-3                # peak learning rate
    warmup: float = 0.05            # fraction of steps in which the learning rate rises
    null_prob: float = 0.1          # probability of training without the class
    mirror: bool = False            # show half of the training images flipped left to right
    save_every: int = 100           # steps between checkpoints, and rows of log.csv
    eval_every: int = 0             # steps between measurements while training; 0: none
    compile: bool = False           # torch.compile the training step
    # measuring: from here on --evaluate may, too
    data_dir: str = "data"          # where data lie or are downloaded to; for folder: your images
    judge_steps: int = 400          # steps of the judge, a classifier that measures samples
    judge_width: int = 16           # channels of its first layers; 64: ResNet-18
    inception: str = "off"          # weights for FID, IS and KID: a file, or download
    # sampling: from here on --sample may, too
    num_samples: int = 1000         # images to sample, and to measure on
    guidance: float = 1.0           # w; 0 is the conditional model, more gives less variety
    sampler: Literal["ddim", "ddpm", "dpmpp"] = "ddpm"      # ddpm suits short trainings
    sample_steps: int = 20          # steps from noise to image
    sample_batch: int = 250         # images sampled at a time
    seed: int = 0                   # seed of the training and of samples
    device: str = "auto"            # auto, cuda, cuda:1, mps or cpu
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"                # mixed precision

    # The paper's D, batch, rate, warm-up. choice (paper's): DDPM's U-Net (64 x 1,2,4,4, attention
    # in all), 100,000 steps (1,500 epochs), 20 dpmpp steps (50 ddim), guidance 0.3 (1.8).
    PHOTOGRAPHS = dict(
        image_size=32, mirror=True, prototype_dim=128, learner_steps=8000, learner_width=64,
        channels=128, multipliers="1,2,2,2", blocks=2, attention=16, dropout=0.1, steps=100_000,
        batch_size=256, lr=5e-4, save_every=1000, num_samples=10_000, guidance=0.3, sampler="dpmpp",
        judge_steps=8000, judge_width=64, inception="download")
    LARGER = {**PHOTOGRAPHS, "image_size": 64, "multipliers": "1,1,2,2,2"}
    PRESETS = {"shapes": {}, "shapes-40": {}, "shapes-160": {}, "folder": PHOTOGRAPHS,
               "cifar10": PHOTOGRAPHS, "stl10": LARGER, "tiny-imagenet": LARGER}
    TASKS = dict(resume="steps", evaluate="data_dir", sample="num_samples")     # may change from
    labelled = True                 # the data must have classes

    def build(self, known):
        """The untrained network. known: what a run knows of its data, see new_run."""
        return ProtoDiffusion(UNet(known["shape"][0], self), self, len(known["classes"]))

# ---- Prototypes, stage 1: convolutional prototype learning (Yang et al. 2018) --------------------

class PrototypeLearner(nn.Sequential):
    """Images [B, channels, side, side] in [-1, 1] -> f(x) [B, D]. prototypes [C, K, D], C classes.
    choice: Linear, ReLU, Linear on ResNet-18's pooled features (paper: on its 1000 outputs)."""
    def __init__(self, cfg, channels, classes):
        width = 8 * cfg.learner_width                   # of resnet's pooled features
        D = cfg.prototype_dim
        super().__init__(resnet(channels, cfg.image_size, cfg.learner_width, cfg.imagenet),
                         nn.Linear(width, width), nn.ReLU(), nn.Linear(width, D))
        self.prototypes = nn.Parameter(0.1 * torch.randn(classes, cfg.prototypes_per_class, D))

def squared_distances(z, prototypes):
    """d = ||z - m||^2 in float32: z [B, D], prototypes [C, K, D] -> [B, C, K]."""
    return (z.float()[:, None, None] - prototypes.float()).square().sum(-1)

# exercise
def dce_loss(d, y, gamma=2.0):
    """Distance-based cross-entropy (Yang et al. 2018, eq. 6-8): d [B, C, K], labels y [B] -> mean.
    p = softmax(-gamma d) over all C K prototypes. A class has the sum of its prototypes' p, and the
    loss is -log p(y), computed in logarithms, since p of a far class is 0 in float32."""
    log_p = F.log_softmax(-gamma * d.flatten(1), dim=1).view_as(d)
    return F.nll_loss(log_p.logsumexp(-1), y)

# exercise
def prototype_loss(d, y):
    """Squared distance to the nearest prototype of the own class, mean over B (Yang et al., eq. 9).
    d [B, C, K]: squared distances to the K prototypes of each class; y [B]: labels."""
    return d.amin(-1).gather(1, y[:, None]).mean()

@torch.no_grad()
def start_at_class_means(learner, data, device):
    """Centre the untrained features of `data`, and set the prototypes [C, K, D] to their class
    means; several of a class lie around it. choice: so classes that look alike start close."""
    z = features_of(learner, data.images, device).to(device)                # [N, D]
    learner[-1].bias -= z.mean(0)
    z -= z.mean(0)
    for label, own in enumerate(learner.prototypes):    # [K, D]
        own.mul_(0.1 * (len(own) > 1)).add_(z[data.labels == label].mean(0))

def learn_prototypes(data, cfg, device):
    """Stage 1 -> a PrototypeLearner, trained on `data`. From a random start prototypes hardly move:
    images come to them, and all classes end up about as far apart."""
    torch.manual_seed(cfg.seed)
    learner = placed(PrototypeLearner(cfg, data.images.shape[1], len(data.classes)), device)
    if cfg.start == "means":
        start_at_class_means(learner, data, device)
    def loss(z, y):
        d = squared_distances(z, learner.prototypes)
        return dce_loss(d, y) + 0.01 * prototype_loss(d, y)     # choice: the weight
    return fit(learner, data.images, data.labels, loss, cfg.learner_steps, cfg, cfg.seed)

def class_table(prototypes, scale):
    """Prototypes [C, K, D] -> the class table [C K, D].
    choice: "rms" scales all by one factor to RMS 1, as of N(0, 1): the norm alone has an effect."""
    table = prototypes.flatten(0, 1)
    return table / table.square().mean().sqrt() if scale == "rms" else table

# ---- Prototypes, stage 2: the conditioned denoiser -----------------------------------------------

class ProtoDiffusion(nn.Module):
    """Predicts noise: MLP(row of the class table) is added to the time embedding. row [B] is the
    number of the row, or -1 for no class: then zeros are added in place of the MLP's output.
    (With padding_idx=0 for "no class", as is often written, class 0 would never be trained.)"""
    def __init__(self, unet, cfg, classes):
        super().__init__()
        D = cfg.prototype_dim
        E = unet.emb_dim
        blank = torch.zeros(classes * cfg.prototypes_per_class, D)      # `begin` fills the table
        self.unet = unet
        self.table = nn.Embedding.from_pretrained(blank, freeze=cfg.prototypes == "frozen")
        self.mlp = nn.Sequential(nn.Linear(D, E), nn.SiLU(), nn.Linear(E, E))

    def denoise(self, xt, t, row):
        """xt [B, channels, H, W], t [B] in 0..T-1, row [B] -> the predicted noise, like xt."""
        has_class = (row >= 0)[:, None]
        added = self.mlp(self.table(row.clamp(min=0))) * has_class          # [B, E]
        return self.unet(xt, t, added)

    def forward(self, batch, abar, cfg):
        """The noise loss of a Batch (see Training); row: batch.target, or -1 at rate null_prob."""
        row = torch.where(batch.chance < cfg.null_prob, -1, batch.target)
        return {"loss": noise_loss(self.denoise, batch.x0, row, batch.t, batch.eps, abar)}

    def param_groups(self):
        """Groups whose gradients are clipped apart. A frozen table has no gradient."""
        network = [*self.unet.parameters(), *self.mlp.parameters()]
        return [dict(params=network), dict(params=[self.table.weight])]

    def begin(self, cfg, sets, folder, device):
        """Before step 0: stage 1, the table -> dict for run.known: figures (numbers); targets [N],
        each training image's row: of its class's nearest prototype, for "random" of the first."""
        labels = sets[0].labels
        first = labels * cfg.prototypes_per_class
        if cfg.prototypes == "random":
            torch.manual_seed(seed_of(cfg.seed, "random table"))
            self.table.weight.data.normal_()
            return dict(targets=first, figures={})
        learner = learn_prototypes(sets[0], cfg, device)
        prototypes = learner.prototypes.cpu()                               # [C, K, D]
        self.table.weight.data = class_table(prototypes, cfg.scale)
        z = features_of(learner, sets[0].images, device)                    # [N, D]
        nearest = (z[:, None] - prototypes[labels]).square().sum(-1).argmin(1)
        figures = draw_prototypes(folder / "prototypes.png", learner, sets[1], device)
        return dict(targets=first + nearest, figures=figures)

    def quality(self, cfg, run, sets):
        """Samples of all classes -> the judge's figures, as --eval-every logs, images, labels."""
        rows = evenly(run.known["targets"], cfg.num_samples)
        labels = rows // cfg.prototypes_per_class
        images = generate(cfg, run, rows)
        return judge_images(cfg, run, sets, images, labels), images, labels

# ---- Diffusion: process, loss, guidance, samplers; all in float32 but the network ----------------

def alpha_bars(T):
    """abar [T], float32: the cumulative product of 1 - beta (DDPM, section 4). Betas are linear,
    1e-4 to 0.02, times 1000 / T, which keeps the course of abar. Raises Stop if one reaches 1."""
    betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * 1000 / T
    check(betas.max() < 1, "there are too few noise levels, a beta would reach 1: take 21 or more")
    return (1 - betas).cumprod(0).float()

# exercise
def add_noise(x0, t, eps, abar):
    """xt = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps (DDPM eq. 4). x0, eps, xt [B, C, H, W]; t [B]."""
    a = abar[t][:, None, None, None]
    return a.sqrt() * x0 + (1 - a).sqrt() * eps

# exercise
def noise_loss(model, x0, condition, t, eps, abar):
    """Squared error of the predicted noise, mean over all elements (DDPM eq. 14), in float32.
    The prediction is model(xt, t, condition) for the xt of add_noise, perhaps in 16 bits."""
    predicted = model(add_noise(x0, t, eps, abar), t, condition)
    return F.mse_loss(predicted.float(), eps)

# exercise
def guided_noise(model, x, t, condition, null, w):
    """Guidance (Ho & Salimans 2022, eq. 6): (1 + w) eps(x, c) - w eps(x, null), [B, C, H, W].
    Both halves, c first, go through the network as one batch; w = 0 needs one pass, of the plain
    batch. condition: as the model takes it, e.g. rows [B]; null: that of no class. In float32."""
    if w == 0:
        return model(x, t, condition).float()
    both = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([condition, null]))
    given, free = both.float().chunk(2)
    return (1 + w) * given - w * free

def sample_times(T, steps):
    """Noise levels of `steps` steps, T - 1 first: round(T - i T / steps) - 1 (trailing spacing)."""
    return [round(T - i * T / steps) - 1 for i in range(steps)]

# exercise
def ddim_step(x0, eps, a, a_next, eta=0.0, noise=None):
    """From abar a to a_next, by predictions x0, eps [B, C, H, W] (Song et al. 2021, eq. 12).
    sqrt(a_next) x0 + sqrt(1 - a_next - sigma^2) eps + sigma noise, with (eq. 16) sigma =
    eta sqrt((1 - a_next) / (1 - a)) sqrt(1 - a / a_next); a < a_next are 0-d. Where rounding makes
    1 - a_next - sigma^2 negative, 0 is taken. eta = 0 needs no noise; eta = 1, the sampler "ddpm",
    draws from q(x_next | x, x0) (DDPM eq. 6-7, beta is 1 - a / a_next, x is in x0 and eps)."""
    sigma = eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)).sqrt()
    mean = a_next.sqrt() * x0 + (1 - a_next - sigma ** 2).clamp(min=0).sqrt() * eps
    return mean if eta == 0 else mean + sigma * noise

# exercise
def dpmpp_step(x, x0, a, a_next, x0_before=None, a_before=None):
    """DPM-Solver++(2M) (Lu et al. 2022, alg. 2), with lambda = log(sqrt(a) / sqrt(1 - a)).
    x_next = sqrt((1 - a_next) / (1 - a)) x - sqrt(a_next) (exp(-h) - 1) D; h: the rise of lambda.
    First order: D = x0. Second: D = (1 + 1 / (2r)) x0 - x0_before / (2r), with
    r = (lambda - lambda_before) / h. The first step (no x0_before) and the last (a_next = 1, where
    lambda is infinite) are of first order."""
    def half_log_snr(a):                                # lambda
        return 0.5 * (a.log() - (1 - a).log())
    h = half_log_snr(a_next) - half_log_snr(a)
    D = x0                                              # the image that the step aims at, as in Lu
    if x0_before is not None and a_next < 1:
        r = (half_log_snr(a) - half_log_snr(a_before)) / h
        D = (1 + 1 / (2 * r)) * x0 - x0_before / (2 * r)
    return ((1 - a_next) / (1 - a)).sqrt() * x - a_next.sqrt() * torch.expm1(-h) * D

@torch.no_grad()
def sample(predict, xT, abar, steps=20, sampler="dpmpp", clip=True, generator=None):
    """From noise to images, a loop for all samplers: xT ~ N(0, I) [B, C, H, W] -> x0 [B, C, H, W].
    predict(x, t [B]) -> noise [B, C, H, W], float32, is called once a step. clip: clamp the
    predicted image to [-1, 1] and derive the noise from it again. generator: of the noise that
    "ddpm" adds."""
    x = xT
    before = ()                                         # x0 and abar of the step before, for dpmpp
    times = sample_times(len(abar), steps)
    abars = [*abar.cpu()[times], torch.ones(())]        # on the CPU: a_next < 1 needs no GPU sync
    for t, a, a_next in zip(times, abars, abars[1:]):
        eps = predict(x, torch.full((len(x),), t, device=x.device))
        x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()      # DDPM eq. 4, solved for x0
        if clip:
            x0 = x0.clamp(-1, 1)
            eps = (x - a.sqrt() * x0) / (1 - a).sqrt()
        if sampler == "ddpm":
            noise = torch.randn(x.shape, generator=generator, device=x.device)
            x = ddim_step(x0, eps, a, a_next, 1.0, noise)
        elif sampler == "ddim":
            x = ddim_step(x0, eps, a, a_next)
        else:
            x = dpmpp_step(x, x0, a, a_next, *before)
            before = (x0, a)
    return x

def generate(cfg, run, conditions):
    """An image for each condition (int64 [N], -1: none) -> uint8 [N, C, H, W] on the CPU. run has
    model, known, device. The same cfg.seed and sample_batch give the same images."""
    gen = torch.Generator(run.device)
    images = []
    for i, given in enumerate(conditions.to(run.device).split(cfg.sample_batch)):
        gen.manual_seed(seed_of(cfg.seed, "sampling", i))
        xT = torch.randn(len(given), *run.known["shape"], generator=gen, device=run.device)
        def predict(x, t):
            with autocast(run.device, cfg.amp):
                return guided_noise(run.model.denoise, x, t, given, -torch.ones_like(given),
                                    cfg.guidance)
        x0 = sample(predict, xT, alpha_bars(cfg.timesteps), cfg.sample_steps, cfg.sampler,
                    generator=gen)
        check(x0.isfinite().all(), "the samples are not numbers: try --amp off, or a lower --lr")
        images.append(to_uint8(x0))
    return torch.cat(images)

# ---- U-Net (Ho et al. 2020, DDPM) ----------------------------------------------------------------

def time_embedding(t, dim):
    """Sinusoids of the noise level (Vaswani et al. 2017, section 3.5): t [B] -> [B, dim]."""
    frequency = torch.exp(-math.log(10_000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angle = t.float()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)

def group_norm(channels):
    """At least 4 channels a group: alone, one would lose its mean, perhaps the colour."""
    return nn.GroupNorm(math.gcd(32, channels // 4), channels)

def zeroed(layer):
    """The layer with its weights at zero: a block that it closes starts as its skip alone."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer

class ResBlock(nn.Module):
    """x [B, c_in, H, W], emb [B, E] -> [B, c_out, H, W]."""
    def __init__(self, c_in, c_out, emb_dim, dropout):
        super().__init__()
        self.norm1 = group_norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(emb_dim, c_out)
        self.norm2 = group_norm(c_out)
        self.conv2 = zeroed(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.emb(F.silu(emb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.skip(x) + h

class Attention(nn.Module):
    """Self-attention over the pixels of x [B, C, H, W], in heads of 64 channels, or one head."""
    def __init__(self, channels):
        super().__init__()
        self.heads = channels // 64 if channels % 64 == 0 else 1
        self.norm = group_norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zeroed(nn.Linear(channels, channels))

    def forward(self, x):
        pixels = self.norm(x).flatten(2).transpose(1, 2)        # [B, HW, C]
        qkv = self.qkv(pixels).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                    # each [B, heads, HW, C / heads]
        h = F.scaled_dot_product_attention(q, k, v)
        h = self.out(h.transpose(1, 2).flatten(2))              # [B, HW, C]
        return x + h.transpose(1, 2).reshape(x.shape)

class Stage(nn.ModuleList):
    """Blocks one after the other, of which the residual ones are given emb."""
    def forward(self, x, emb):
        for block in self:
            x = block(x, emb) if isinstance(block, ResBlock) else block(x)
        return x

class UNet(nn.Module):
    """Noise predictor: x [B, C, S, S], t [B] in 0..T-1, condition [B, emb_dim] -> [B, C, S, S]. The
    condition is added to the time embedding. before_middle: of features. The output starts at 0."""
    def __init__(self, image_channels, cfg):
        super().__init__()
        c = cfg.channels                                # of the features so far
        E = self.emb_dim = 4 * c
        self.time_mlp = nn.Sequential(nn.Linear(c, E), nn.SiLU(), nn.Linear(E, E))
        widths = [c * int(factor) for factor in cfg.multipliers.split(",")]
        def block(c_in, c_out, level):
            attend = [Attention(c_out)] if cfg.image_size >> level <= cfg.attention else []
            return Stage([ResBlock(c_in, c_out, E, cfg.dropout), *attend])
        self.down = nn.ModuleList()
        skips = []                                      # channels of the skip connections
        c_in = image_channels                           # that enter a level: the image's, later c
        for level, width in enumerate(widths):          # all levels but the first halve the image
            self.down.append(Stage([nn.Conv2d(c_in, c, 3, stride=1 + (level > 0), padding=1)]))
            skips.append(c)
            for _ in range(cfg.blocks):
                self.down.append(block(c, width, level))
                c = width
                skips.append(c)
            c_in = c
        self.middle = Stage([ResBlock(c, c, E, cfg.dropout), Attention(c),
                             ResBlock(c, c, E, cfg.dropout)])
        self.up = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(cfg.blocks + 1):
                self.up.append(block(c + skips.pop(), width, level))
                c = width
            if level > 0:
                self.up[-1].extend([nn.Upsample(scale_factor=2), nn.Conv2d(c, c, 3, padding=1)])
        last = zeroed(nn.Conv2d(c, image_channels, 3, padding=1))
        self.last = nn.Sequential(group_norm(c), nn.SiLU(), last)

    def forward(self, x, t, condition=0.0, before_middle=nn.Identity()):
        emb = self.time_mlp(time_embedding(t, self.emb_dim // 4)) + condition
        skips = []
        for stage in self.down:
            x = stage(x, emb)
            skips.append(x)
        x = self.middle(before_middle(x), emb)          # [B, c, s, s], the smallest
        for stage in self.up:
            x = stage(torch.cat([x, skips.pop()], dim=1), emb)
        return self.last(x)

# ---- Training: the loop; the model brings its losses as model.forward ---------------------------

class Batch(NamedTuple):
    """What a training step sees of B images."""
    x0: torch.Tensor                # clean images [B, C, H, W] in [-1, 1]
    target: torch.Tensor            # what begin gave for each image, [B]
    t: torch.Tensor                 # noise levels [B], uniform over 0..T-1
    eps: torch.Tensor               # noise [B, C, H, W]
    chance: torch.Tensor            # uniform in 0..1, [B]: says if a condition is hidden

def random_batch(cfg, images, targets, step, device):
    """The share of a step's Batch that is this process's. All draws follow from the seed and the
    step, so no random state is saved; dropout's alone depend on the number of processes."""
    B = cfg.batch_size
    gen = torch.Generator(device).manual_seed(seed_of(cfg.seed, "noise", step))
    t = torch.randint(cfg.timesteps, (B,), generator=gen, device=device)
    eps = torch.randn(B, *images.shape[1:], generator=gen, device=device)
    flip, chance = torch.rand(2, B, generator=gen, device=device)
    index = random_index(len(images), B, cfg.seed, "images", step)
    torch.manual_seed(seed_of(cfg.seed, "dropout", step, RANK))
    share = slice(RANK * B // WORLD, (RANK + 1) * B // WORLD)
    x0 = scaled(images, index[share], device)
    x0 = torch.where(flip[share, None, None, None] < 0.5 * cfg.mirror, x0.flip(-1), x0)
    return Batch(x0, targets[index[share]].to(device), t[share], eps[share], chance[share])

def learning_rate(step, cfg):
    """Linear warm-up over the fraction cfg.warmup of training, then half a cosine down to zero."""
    rising = max(1, round(cfg.warmup * cfg.steps))
    if step < rising:
        return cfg.lr * (step + 1) / rising
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, cfg.steps - rising)))

@torch.no_grad()
def update_average(average, model, n):
    """Moving average of weights and buffers after update n, decay min(0.9999, (1 + n) / (10 + n)).
    choice: samples come from it; the paper's code has no average. Integer buffers are copied."""
    decay = min(0.9999, (1 + n) / (10 + n))
    torch._foreach_lerp_([*average.parameters()], [*model.parameters()], 1 - decay)
    for a, m in zip(average.buffers(), model.buffers()):
        a.copy_(a.lerp(m, 1 - decay) if a.is_floating_point() else m)

def train(cfg, sets, folder, device):
    """Go on from the checkpoint in `folder` (a new run's is of step 0) to step cfg.steps. It may be
    stopped at any moment. Raises Stop if the images have changed, or if the training diverges."""
    run = load_run(folder, device)                      # its model is the moving average
    known = run.known
    same_images(run, sets)
    check(run.step <= cfg.steps, f"the run has {run.step} steps: --steps cannot be less")
    if RANK == 0:
        save(vars(cfg), folder / "config.json")
    images = place_images(sets[0].images, device)
    abar = alpha_bars(cfg.timesteps).to(device)
    model = placed(cfg.build(known), device)
    optimizer = torch.optim.AdamW(model.param_groups(), betas=(0.9, 0.95),  # choice: 0.95
                                  weight_decay=cfg.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype(device, cfg.amp) is torch.float16)
    parts = dict(model=model, average=run.model, optimizer=optimizer, scaler=scaler)
    for name, part in parts.items():
        if run.state.get(name):                         # at step 0 there is no optimiser's
            part.load_state_dict(run.state[name])
    net = nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model
    forward = torch.compile(net, dynamic=False) if cfg.compile else net
    history = []                                        # losses since the last row of the log
    start = time.perf_counter() - (run.log[-1]["seconds"] if run.log else known["seconds"])
    for step in range(run.step, cfg.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, cfg)
        batch = random_batch(cfg, images, known["targets"], step, device)
        with autocast(device, cfg.amp):
            losses = forward(batch, abar, cfg)
        scaler.scale(losses["loss"]).backward()
        scaler.unscale_(optimizer)
        norms = [nn.utils.clip_grad_norm_(group["params"], 1.0)     # choice
                 for group in optimizer.param_groups]
        optimizer.found_inf = (~sum(norms).isfinite()).float()      # fused AdamW skips if it is 1
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        update_average(run.model, model, step)
        history.append(losses)

        # What follows is bookkeeping: the log, measuring, the checkpoint.
        now = step + 1
        measured = cfg.eval_every > 0 and (now == cfg.steps or now % cfg.eval_every == 0)
        if not measured and now < cfg.steps and now % cfg.save_every > 0:
            continue
        row = dict(step=now, **mean_losses(history))
        history = []
        finite = math.isfinite(row["loss"]) and all(p.isfinite().all() for p in model.parameters())
        check(finite, "the training diverged: go on from before by "
              f'python {__file__} --resume "{folder}" --lr {cfg.lr / 4:g}, or --amp off')
        row["seconds"] = time.perf_counter() - start
        left = (cfg.steps - now) * (row["seconds"] - known["seconds"]) / now / 60
        progress(f"step {now}/{cfg.steps}  loss {row['loss']:.4f}  {left:.1f} min left", "\n")
        run.log.append(row)
        if RANK == 0:
            if measured:
                row.update(run.model.quality(cfg, run, sets)[0])
            write_csv(folder / "log.csv", run.log)
            save_checkpoint(folder, now, known, run.log, parts)
        start = time.perf_counter() - row["seconds"]

# ---- Equipment: you can stop reading here --------------------------------------------------------

class Stop(Exception):
    """A fault that the person at the keyboard can put right: one sentence, and exit status 2."""

def check(ok, sentence):
    """Raises Stop with the sentence if something is not as it must be."""
    if not ok:
        raise Stop(sentence)

def progress(text, end="\r"):
    """A line, which the next one overwrites if it ends with a return: those only on a terminal."""
    if RANK == 0 and (end == "\n" or sys.stdout.isatty()):
        print(f"{text:79}", end=end, flush=True)

# ---- Data: every set becomes one uint8 tensor ----------------------------------------------------

SHAPES = "circle square triangle diamond plus cross ring crescent bar star".split()
SHAPE_ATTRIBUTES = ("warm hue", "bright background", "large", "left of centre", "dot")
FINE = {"shapes": 0, "shapes-40": 2, "shapes-160": 4}   # attributes that split the classes, named
SHAPE_WORDS = (("cool", "warm"), ("dark", "bright"), ("small", "large"), ("right", "left"))
SHAPE_SPLITS = {"train": (20_000, 0), "test": (4_000, 1), "judge": (20_000, 12)}    # images, seed

@dataclasses.dataclass
class Dataset:
    """images uint8 [N, C, H, W]; labels int64 [N], 0 without classes; attributes bool [N, A]."""
    images: torch.Tensor
    labels: torch.Tensor
    classes: list
    attributes: torch.Tensor | None = None
    attribute_names: tuple = ()

def signed_distances(x, y):
    """Signed distance, negative inside, of points x, y to each of SHAPES, of radius about 1."""
    radius = torch.hypot(x, y)
    half = math.sqrt(0.5)
    def box(x, y, width, height):
        return torch.maximum(x.abs() - width, y.abs() - height)
    def plus(x, y):
        return torch.minimum(box(x, y, 0.95, 0.28), box(x, y, 0.28, 0.95))
    yield radius - 0.85                                                     # circle
    yield box(x, y, 0.78, 0.78)                                             # square
    yield torch.maximum(-y, x.abs() * math.sqrt(0.75) + y / 2) - 0.52       # triangle; y is upwards
    yield (x.abs() + y.abs() - 1) * half                                    # diamond
    yield plus(x, y)
    yield plus((x + y) * half, (x - y) * half)                              # cross
    yield (radius - 0.68).abs() - 0.24                                      # ring
    yield torch.maximum(radius - 0.95, 0.72 - torch.hypot(x - 0.48, y))     # crescent
    yield box(x, y, 1.0, 0.26)                                              # bar
    # Star: fold the plane into ten wedges, where the outline runs from (1, 0) to an inner corner.
    angle = math.pi / 5 - (torch.atan2(x, y).remainder(math.tau / 5) - math.pi / 5).abs()
    u = 0.42 * math.cos(math.pi / 5) - 1
    v = 0.42 * math.sin(math.pi / 5)
    yield (v * (radius * angle.cos() - 1) - u * radius * angle.sin()) / math.hypot(u, v)

def make_shapes(n, size=16, seed=0, bias=0.5, fine=0):
    """n antialiased coloured figures on grey, [n, 3, size, size]; 10 classes, 5 known attributes.
    fine: the first so many attributes split the classes: at 2, "bright warm circle" is one of 40.
    bias: P(the corner dot is there just if the hue is warm); 0.5: independent. Both are halves."""
    gen = torch.Generator().manual_seed(seed)
    def uniform(low, high):
        return low + (high - low) * torch.rand(n, 1, 1, 1, generator=gen)
    def paint(image, distance, colour):                 # distance: in halves of the image
        ink = (0.5 - distance * size / 2).clamp(0, 1)   # share of a pixel that is covered
        return image * (1 - ink) + colour * ink
    labels = torch.randint(len(SHAPES), (n,), generator=gen)
    warm, bright, large, left = torch.rand(4, n, 1, 1, 1, generator=gen) < 0.5
    dot = warm ^ (uniform(0, 1) >= bias)
    radius = torch.where(large, uniform(0.80, 0.88), uniform(0.58, 0.66))
    centre_x = uniform(0.05, 0.18) * torch.where(left, -1, 1)
    centre_y = uniform(-0.15, 0.15)
    turn = uniform(-0.15, 0.15)                         # radians
    grey = torch.where(bright, uniform(0.6, 0.85), uniform(0.05, 0.3))
    hue = 6 * torch.where(warm, uniform(-0.07, 0.15), uniform(0.42, 0.74))  # reds or greens
    k = (hue + torch.tensor([5.0, 3.0, 1.0]).view(3, 1, 1)).remainder(6)    # HSV to RGB
    colour = uniform(0.8, 1) * (1 - uniform(0.8, 1) * torch.minimum(k, 4 - k).clamp(0, 1))
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    right = (axis - centre_x) / radius                  # [n, 1, 1, W]
    up = (centre_y - axis[:, None]) / radius            # [n, 1, H, 1]
    x = turn.cos() * right + turn.sin() * up            # [n, 1, H, W]
    y = turn.cos() * up - turn.sin() * right
    distance = x
    for label, other in enumerate(signed_distances(x, y)):
        distance = torch.where(labels.view(n, 1, 1, 1) == label, other, distance)
    spot = torch.hypot(axis + 0.76, axis[:, None] + 0.76) - 0.16        # in the upper left corner
    images = paint(grey, distance * radius, colour)
    images = paint(images, torch.where(dot, spot, 9), ~bright)
    attributes = torch.stack([warm, bright, large, left, dot], 1).flatten(1)
    images = (images * 255).round().to(torch.uint8)
    classes = SHAPES
    for words, has in zip(SHAPE_WORDS[:fine], attributes.T):
        labels = 2 * labels + has
        classes = [f"{word} {name}" for name in classes for word in words]
    return Dataset(images, labels, classes, attributes, SHAPE_ATTRIBUTES)

def open_cifar10(root, train):
    """A published set, downloaded if need be -> items (image or file, label), names of classes."""
    data = torchvision.datasets.CIFAR10(root, train, download=True)
    return data, data.classes

def open_stl10(root, train):
    """choice: the 5,000 training images alone; ProtoDiffusion's paper adds 8,000 test images."""
    data = torchvision.datasets.STL10(root, "train" if train else "test", download=True)
    return data, data.classes

def open_tiny_imagenet(root, train):
    """choice: a tenth of the training images is held out, for the test images have no labels."""
    folder = root / "tiny-imagenet-200"
    if not folder.is_dir():                             # unpacked elsewhere: here it is whole
        torchvision.datasets.utils.download_and_extract_archive(
            "http://cs231n.stanford.edu/tiny-imagenet-200.zip", root, root / "unpacking",
            md5="90528d7ca1a48142e341f4ef8d21d0de")
        os.renames(root / "unpacking" / folder.name, folder)
    words = dict(line.split("\t") for line in (folder / "words.txt").read_text().splitlines())
    data = torchvision.datasets.ImageFolder(folder / "train")               # <class>/images/*.JPEG
    return split_off(data.samples, train), [words[name].split(",")[0] for name in data.classes]

def split_off(items, train):
    """A fixed random split of items (image, label): of each class a tenth is held out, the second
    of every ten, so none of a single one."""
    seen = {}                                           # images of each class so far
    chosen = []
    for i in some_of(len(items)).tolist():
        label = items[i][1]
        seen[label] = seen.get(label, 0) + 1
        if (seen[label] % 10 == 2) != train:
            chosen.append(items[i])
    return chosen

ENDINGS = (".png .jpg .jpeg .jpe .jfif .gif .bmp .tif .tiff .webp .avif .heic .heif .jp2 "
           ".ppm .pgm .pbm .pnm").split()
SERVICE = {*"@eaDir #recycle @Recycle $RECYCLE.BIN __MACOSX lost+found".split()}     # of systems
# A class is not called as a part is, in whatever case: Test, training, train2017, seg_train, testA.
CLASS = (r"(?!(?i:(\w+_)?(train|test|val|valid|eval|dev)(ing|ation|uation)?[-_. ]?"
         r"(set|data|split|images?|\d+|[ab])?)$)[^/\ud800-\udfff]+")
LAYOUTS = ("()()", f"()({CLASS})", "(train|test|val)()", f"(train|test|val)/({CLASS})")
LAYOUT = ("wanted are <class>/*.png, or train/<class>/*.png with or without test/ and val/; or, "
          "without classes, *.png or train/*.png; no other depth, no class called as a part is")

def open_folder(root, train):
    """A folder of images as in LAYOUT -> items (file, label), names of classes. What is in test/ or
    val/ is held out, or else a tenth. Hidden files are skipped, links are followed."""
    depths = [glob.glob("*/" * depth + "*", root_dir=root) for depth in range(6)]
    files = [file for file in sorted(map(Path, sum(depths, [])))
             if not SERVICE & {*file.parts}
             and (file.suffix.lower() in ENDINGS or len(file.parts) == 6)]
    check(files, f"there is no folder {root}, or no image in it: {LAYOUT}")
    folders = [unicodedata.normalize("NFC", "/".join(file.parts[:-1])) for file in files]
    layouts = [[re.fullmatch(layout, folder) for folder in folders] for layout in LAYOUTS]
    found = max(layouts, key=lambda fits: sum(map(bool, fits)))     # the layout of most files
    for file, fits in zip(files, found):
        check(fits, f"{root / file} is in the wrong place: {LAYOUT}")
    parts = [fits[1] or "train" for fits in found]
    names = [fits[2] for fits in found]
    classes = sorted({*names})
    pairs = {*zip(parts, names)}
    for part in {"train", *parts}:
        for name in classes:
            check((part, name) in pairs, f"{root / part} has no images{' of ' * bool(name)}{name}")
    items = [(root / file, classes.index(name)) for file, name in zip(files, names)]
    if {*parts} == {"train"}:
        items = split_off(items, train)
    else:
        items = [item for item, part in zip(items, parts) if (part == "train") == train]
    return items, [*filter(None, classes)]

data_sets = {"folder": open_folder, "cifar10": open_cifar10, "stl10": open_stl10,
             "tiny-imagenet": open_tiny_imagenet}

def decode(image, size, mode="RGB"):
    """An image or image file -> uint8 [3, size, size], or [1, size, size] of mode "L", luminance:
    shorter side scaled, centre kept, transparency on white. Raises Stop for more than 8 bits."""
    if not isinstance(image, Image.Image):
        image = Image.open(image)
        check(image.mode[0] not in "IF" and ";16" not in str(image.tile),
              "more than 8 bits: convert it to 8 bits first")
        with contextlib.suppress(Exception):            # damaged notes of a camera turn nothing
            image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    image = ImageOps.fit(image.convert(mode), (size, size), Image.Resampling.LANCZOS)
    return v2.functional.pil_to_tensor(image)

def decode_all(items, size, mode="RGB"):
    """Items (image or file, label) -> uint8 [N, C, size, size], labels. Stop names bad files."""
    images = torch.empty(len(items), len(mode), size, size, dtype=torch.uint8)
    labels = torch.empty(len(items), dtype=torch.int64)
    faults = []
    def fetch(i):
        image, labels[i] = items[i]
        try:
            images[i] = decode(image, size, mode)
        except Exception as error:
            faults.append(f"{image} ({error})")
    with ThreadPoolExecutor() as pool:
        for i, _ in enumerate(pool.map(fetch, range(len(items)))):
            progress(f"decoding: {i + 1}/{len(items)}")
    check(not faults, f"these images cannot be read: {'; '.join(sorted(faults))}")
    return images, labels

def load_dataset(name, split="train", image_size=None, data_dir="data"):
    """A data set in memory, decoded once and cached beside the data in prototype-*.pt -> Dataset.
    name: a key of Config.PRESETS; split: train or test; image_size: pixels (None: the preset's)."""
    check(name in Config.PRESETS and split in SHAPE_SPLITS, f"there is no {split} of {name}")
    size = image_size or Config.PRESETS[name].get("image_size", Config.image_size)
    if name in FINE:
        n, seed = SHAPE_SPLITS[split]
        return make_shapes(n, size, seed, fine=FINE[name])
    root = Path(data_dir)
    try:
        items, classes = data_sets[name](root, split == "train")
        key = [*classes]
        if isinstance(items, list):                     # of files, which may change
            key += [f"{str(file)!a} {os.stat(file).st_size} {os.stat(file).st_mtime_ns}"
                    for file, _ in items]
    except (OSError, RuntimeError) as error:
        raise Stop(f"{name} in {root}: {error}; check --data-dir and the network") from None
    path = root / f"prototype-{name}-{split}-{size}.pt"
    images, labels = cached(path, key, lambda: decode_all(items, size))
    return Dataset(images, labels, classes)

def load_sets(cfg):
    """The training set and the held-out set of a run; of one channel if all images are grey."""
    sets = [load_dataset(cfg.dataset, split, cfg.image_size, cfg.data_dir)
            for split in ("train", "test")]
    check(sets[0].classes or not cfg.labelled, f"the images have no classes: {LAYOUT}")
    check(len(sets[0].images) > 1 and len(sets[1].images), f"{cfg.data_dir} has too few images")
    if all((data.images == data.images[:, :1]).all() for data in sets):
        for data in sets:
            data.images = data.images[:, :1].clone()
    progress(f"{cfg.dataset}: {len(sets[0].images):,} images to train on, {len(sets[1].images):,} "
             f"held out; {len(sets[0].classes)} classes, {sets[0].images.shape[1]} channels", "\n")
    return sets

def place_images(images, device):
    """uint8 images where batches are drawn from: the device, if they fill less than half of it."""
    too_large = device.type == "cuda" and images.nbytes > torch.cuda.mem_get_info(device)[0] / 2
    return images if too_large else images.to(device)

def scaled(images, index, device):
    """uint8 images[index] -> float32 [B, C, H, W] in [-1, 1] on the device."""
    return images[index.to(images.device)].to(device).float() / 127.5 - 1

def to_uint8(x):
    """[-1, 1] -> 0..255, rounded, on the CPU."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()

def fingerprint(*tensors):
    """A short text that tells these tensors from others."""
    return hashlib.sha1(b"".join(tensor.numpy() for tensor in tensors)).hexdigest()

def evenly(targets, n):
    """n rows, in the proportions of targets [N]: the sorted targets, read at n even spacings."""
    return targets.sort().values[((torch.arange(n) + 0.5) / n * len(targets)).long()]

def some_of(N, n=None):
    """The numbers of n of N things, or of all, in a random order that is always the same."""
    return torch.randperm(N, generator=torch.Generator().manual_seed(0))[:n]

# ---- Classifiers, such as the judge of samples ---------------------------------------------------

def resnet(channels, side, width=64, imagenet=False):
    """torchvision's ResNet-18 without its last layer: [B, channels, side, side] -> [B, 8 width]."""
    net = torchvision.models.resnet18(weights="DEFAULT" if imagenet else None)
    if width != 64:                                     # torchvision fixes the width: rebuild
        net.inplanes = width
        net.bn1 = nn.BatchNorm2d(width)
        for i, stride in enumerate((1, 2, 2, 2)):
            layer = net._make_layer(torchvision.models.resnet.BasicBlock, width << i, 2, stride)
            setattr(net, f"layer{i + 1}", layer)
    kernel = 7
    if side <= 64:                                      # choice: small images stay large at first
        kernel = 3
        net.maxpool = nn.Identity()
    net.conv1 = nn.Conv2d(channels, width, kernel, kernel // 3, kernel // 2, bias=False)
    net.fc = nn.Identity()
    return net

def fit(net, images, targets, loss, steps, cfg, seed):
    """Train a classifier by loss(net(x), target), 128 images a step -> the net, in eval mode."""
    device = next(net.parameters()).device
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps + 1)
    images = place_images(images, device)
    side = images.shape[-1]
    augment = nn.Sequential(                            # it does the same to all images of a step
        v2.RandomHorizontalFlip(0.5 * cfg.mirror),
        v2.RandomCrop(side, padding=side // 8, padding_mode="reflect"))
    net.train()
    for step in range(steps):
        torch.manual_seed(seed_of(seed, "augmentation", step))
        index = random_index(len(images), 128, seed, "images", step)
        with autocast(device, "off" if cfg.amp == "fp16" else cfg.amp):
            output = net(augment(scaled(images, index, device)))
        optimizer.zero_grad()
        loss(output.float(), targets[index].to(device)).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress(f"classifier: step {step + 1}/{steps}")
    return net.eval().requires_grad_(False)

@torch.no_grad()
def features_of(net, images, device, size=500):
    """net(x) in float32 on the CPU for all uint8 images [N, C, H, W], as x in [-1, 1]."""
    parts = torch.arange(len(images)).tensor_split(math.ceil(len(images) / size))
    return torch.cat([net(scaled(images, part, device)).float().cpu() for part in parts])

def load_judge(cfg, data, device):
    """The judge: a classifier trained on real images, apart from any run, and kept beside the data
    -> the network, features and last layer; moments of its features of the training images."""
    torch.manual_seed(seed_of("judge"))
    features = resnet(*data.images.shape[1:3], cfg.judge_width)
    net = placed(nn.Sequential(features, nn.Linear(8 * cfg.judge_width, len(data.classes))), device)
    def make():
        real = load_dataset(cfg.dataset, "judge", cfg.image_size) if cfg.dataset in FINE else data
        fit(net, real.images, real.labels, F.cross_entropy, cfg.judge_steps, cfg, "judge")
        return net.state_dict(), moments(features_of(features, data.images, device))
    name = f"prototype-judge-{cfg.dataset}-{cfg.image_size}-{cfg.judge_width}-{cfg.judge_steps}.pt"
    key = [cfg.mirror, fingerprint(data.images, data.labels)]
    weights, real = cached(Path(cfg.data_dir, name), key, make)
    net.load_state_dict(weights)
    return net.eval().requires_grad_(False), real

def judge_images(cfg, run, sets, images, labels):
    """uint8 images and the labels they should have -> accuracy and Frechet distance, as a dict.
    The distance is to the training images, in the features of this one classifier: not FID."""
    net, real = load_judge(cfg, sets[0], run.device)
    z = features_of(net[0], images, run.device)
    found = net[1].cpu()(z).argmax(1)
    return dict(accuracy=(found == labels).float().mean().item(),
                frechet=frechet_distance(*moments(z), *real))

# ---- Metrics: FID, IS and KID with the 2015 Inception network ------------------------------------

def moments(features):
    """features [N, D] -> mean [D] and covariance [D, D], float64."""
    z = features.double()
    return z.mean(0), torch.cov(z.T, correction=min(1, len(z) - 1))

# exercise
def frechet_distance(mu1, sigma1, mu2, sigma2):
    """||mu1 - mu2||^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al. 2017, eq. 6), float64.
    The trace of the root is the sum of the roots of the eigenvalues of S1^(1/2) S2 S1^(1/2), which
    is symmetric. Eigenvalues and results that rounding makes negative count as 0. mu [D], sigma
    [D, D] -> number."""
    values, vectors = torch.linalg.eigh(sigma1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ sigma2 @ root).clamp(min=0).sqrt().sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross
    return max(0.0, distance.item())

def inception_score(logits, splits=10):
    """exp(mean KL(p(y|x) || p(y))) (Salimans et al. 2016): logits [N, L] -> mean, std of splits."""
    scores = []
    for part in logits[some_of(len(logits))].double().tensor_split(min(splits, len(logits))):
        log_p = part.log_softmax(1)
        log_mean = log_p.logsumexp(0) - math.log(len(part))
        scores.append((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp().item())
    return np.mean(scores), np.std(scores)

def kernel_distance(x, y, subsets=100, size=1000):
    """KID (Binkowski et al. 2018): unbiased squared MMD with the kernel (a.b / D + 1)^3.
    x, y: features [N, D] -> mean, std over subsets of `size` features of each, or all there are."""
    gen = torch.Generator().manual_seed(0)
    n = min(size, len(x), len(y))
    distances = []
    for _ in range(subsets):
        both = torch.cat([f[torch.randperm(len(f), generator=gen)[:n]] for f in (x, y)]).double()
        k = ((both @ both.T / x.shape[1] + 1) ** 3).fill_diagonal_(0)       # without k(a, a)
        within = (k[:n, :n].sum() + k[n:, n:].sum()) / (n * (n - 1))
        distances.append((within - 2 * k[:n, n:].mean()).item())
    return np.mean(distances), np.std(distances)

def fid_inception():
    """The Inception network of published FIDs, without weights: torchvision's with 1008 outputs.
    The average pools of the A, C and first E blocks leave the padding out, which dividing by the
    pooled ones does; the last E block pools by maximum."""
    net = torchvision.models.inception_v3(weights=None, num_classes=1008, aux_logits=False,
                                          init_weights=False)
    def without_padding(module, pooled):
        return pooled[0] / F.avg_pool2d(torch.ones_like(pooled[0][:1, :1]), 3, stride=1, padding=1)
    for name in "5b 5c 5d 6b 6c 6d 6e 7b".split():
        getattr(net, f"Mixed_{name}").branch_pool.register_forward_pre_hook(without_padding)
    seen = []
    net.Mixed_7c.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    net.Mixed_7c.branch_pool.register_forward_pre_hook(
        lambda module, args: F.max_pool2d(seen.pop(), 3, 1, padding=1))
    return net.eval().requires_grad_(False)

def inception_features(net, images, device):
    """uint8 [N, C, H, W] -> features [N, 2048] as in pytorch-fid, logits without bias [N, 1008]."""
    head = net.fc
    net.fc = nn.Identity()
    def enlarged(x):
        x = x.expand(-1, 3, -1, -1)
        return net(F.interpolate(x, (299, 299), mode="bilinear", align_corners=False))
    features = features_of(enlarged, images, device, 100)
    net.fc = head
    return features, features @ head.weight.T.cpu()

def load_inception(name):
    """The network for --inception -> None if off, or without a network. Stop names a bad file."""
    if name == "off":
        return None
    net = fid_inception()
    try:
        if name == "download":
            weights = torch.hub.load_state_dict_from_url(
                "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                "pt_inception-2015-12-05-6726825d.pth", check_hash=True)
        else:
            weights = torch.load(name, map_location="cpu")
        net.load_state_dict(weights)
    except Exception:
        check(name == "download", f"--inception {name} is no file with the weights of Inception")
        return None
    return net

def inception_metrics(cfg, samples, real, device):
    """FID, IS, KID of uint8 samples against all training images; {} without weights, and a line."""
    net = load_inception(cfg.inception)
    if net is None:
        print("FID, IS, KID: not computed; ask with --inception download, or FILE")
        return {}
    key = [fingerprint(real), fingerprint(*net.state_dict().values())]
    net.to(device)
    def make():
        features, _ = inception_features(net, real, device)
        return moments(features), features[some_of(len(features), 10_000)]
    path = Path(cfg.data_dir, f"prototype-inception-{cfg.dataset}-{cfg.image_size}.pt")
    reference, some = cached(path, key, make)
    features, logits = inception_features(net, samples, device)
    fid = frechet_distance(*moments(features), *reference)
    values = [fid, *kernel_distance(features, some), *inception_score(logits)]
    n = f"{len(samples) / 1000:g}k"                     # of fewer than 50k: another number
    return dict(zip(f"fid_{n} kid_{n} kid_{n}_std is_{n} is_{n}_std".split(), values))

# ---- Pictures ------------------------------------------------------------------------------------

@contextlib.contextmanager
def drawing(path, width, height):
    """A figure in inches, saved at the end, in matplotlib's own style. A $ begins no formula."""
    with style.context(["default", {"text.parse_math": False}]):
        fig = Figure(figsize=(width, height), layout="constrained")
        yield fig
        fig.savefig(path, dpi=120, bbox_inches="tight")

def drawable(names):
    """Names for a picture: one that the font cannot draw becomes its number, and a line says so."""
    font = font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap()
    shown = [name if {*map(ord, name)} <= {*font} else str(i) for i, name in enumerate(names)]
    if shown != [*names]:
        print("pictures have numbers for names that the font cannot draw")
    return shown

def draw_grid(path, images, rows, title, columns=(), size=0.55):
    """uint8 images [R * n, C, H, W], `size` inches each, as R named rows of n, named columns."""
    n = len(images) // len(rows)
    centres = (np.arange(max(n, len(rows))) + 0.5) * (images.shape[-1] + 1)
    tiles = torchvision.utils.make_grid(images, n, padding=1, pad_value=255)
    with drawing(path, 2 + size * n, 0.7 + size * len(rows)) as fig:
        axes = fig.subplots()
        axes.imshow(tiles.permute(1, 2, 0))
        axes.set_yticks(centres[:len(rows)], rows)
        axes.set_xticks(centres[:len(columns)], columns, fontsize="x-small")
        axes.set_title(title)

def draw_curves(path, groups):
    """Runs (group -> list of metrics.json) over steps and over seconds, with those before training:
    the loss and what was measured while training, a line a run, a colour a group."""
    first = next(iter(groups.values()))[0]["log"][-1]
    names = [name for name in "loss accuracy frechet leak".split() if name in first]
    with drawing(path, 4 * len(names), 6) as fig:
        for x, line in zip(("step", "seconds"), fig.subplots(2, len(names), squeeze=False)):
            for name, axes in zip(names, line):
                axes.set(title=name, xlabel=x)
                for i, (group, runs) in enumerate(groups.items()):
                    axes.plot([], color=f"C{i}", label=group)
                    for run in runs:
                        rows = [row for row in run["log"] if name in row]
                        axes.plot([row[x] for row in rows], [row[name] for row in rows], ".-",
                                  color=f"C{i}")
        fig.legend(*axes.get_legend_handles_labels(), loc="outside upper center")

def draw_prototypes(path, learner, data, device):
    """Stage 1 on held-out data: prototypes.png, with 40 names at most, and figures as a dict."""
    z = features_of(learner, data.images, device)                           # [N, D]
    K = learner.prototypes.shape[1]
    prototypes = learner.prototypes.flatten(0, 1).cpu()                     # [C K, D]
    found = torch.cdist(z, prototypes).argmin(1) // K
    accuracy = (found == data.labels).float().mean().item()
    plane = torch.linalg.eigh(moments(z)[1]).eigenvectors[:, -2:].float()   # principal components
    stars = prototypes @ plane
    with drawing(path, 8, 7) as fig:
        axes = fig.subplots()
        axes.set_title(f"prototypes (stars), held-out images ({accuracy:.1%} recognised): PCA")
        axes.scatter(*(z @ plane).T, s=2, c=data.labels, cmap="tab20")
        axes.plot(*stars.T, "k*", markersize=14)
        for c, name in enumerate(drawable(data.classes[:40])):
            centre = (z[data.labels == c].mean(0) @ plane).nan_to_num()     # of no image: 0
            axes.annotate(name, stars[K * c], centre, arrowprops=dict(arrowstyle="-"))
    return dict(stage1_accuracy=accuracy, prototype_norm=prototypes.norm(dim=1).mean().item(),
                prototype_distance=torch.cdist(prototypes, prototypes).mean().item())

# ---- Devices and random numbers ------------------------------------------------------------------

def find_device(name):
    """auto, cuda, cuda:1, mps or cpu -> torch.device, ready. Raises Stop if it is not there."""
    if name == "auto":
        here = torch.accelerator.is_available()
        name = torch.accelerator.current_accelerator().type if here else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.zeros(1, device=name).device
    except Exception:
        raise Stop(f"--device {name} is not there: try auto, or cpu") from None
    torch.backends.cudnn.benchmark = True
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:                                               # plain products are fastest on a CPU
        torch.backends.cuda.enable_flash_sdp(False)     # the CPU's too, in spite of its name
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    return device

def placed(net, device):
    """The network on the device. On a CPU bfloat16 is up to 40 times slower in channels_last."""
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    return net.to(device, memory_format=layout)

def amp_dtype(device, amp):
    """--amp -> torch.bfloat16, float16 or None. auto: bfloat16 where the hardware has it."""
    if amp == "auto" and device.type == "cuda":
        amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if amp == "auto" and device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        amp = "bf16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)

def autocast(device, amp):
    """Mixed precision for the networks."""
    dtype = amp_dtype(device, amp)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)

def seed_of(*key):
    """One 32-bit seed from the seed of the run, a purpose in words, and numbers like the step."""
    return int(hashlib.sha1(repr(key).encode()).hexdigest()[:8], 16)

def random_index(N, n, *key):
    """Which n of N images a step sees, [n]. choice: with replacement. It follows from the key."""
    return torch.randint(N, (n,), generator=torch.Generator().manual_seed(seed_of(*key)))

# ---- Files: a run is a folder --------------------------------------------------------------------

def save(content, path):
    """Write a file, all or nothing: a kill leaves the old one or the new one. A .json file has null
    for what is not finite, as JSON has no such numbers; any other is torch.save's."""
    data = io.BytesIO()                                 # on a full disk torch.save hides the fault
    if path.suffix == ".json":
        content = json.loads(json.dumps(content), parse_constant=lambda name: None)
        data.write(json.dumps(content, indent=1).encode())
    else:
        torch.save(content, data)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(data.getbuffer())
        file.flush()
        os.fsync(file)                                  # else a power cut could leave it empty
    os.replace(temporary, path)

def load(path):
    """What `save` wrote. Raises Stop if the file is missing or damaged."""
    try:
        if path.suffix == ".json":
            return dict(json.loads(path.read_bytes()))
        return torch.load(path, map_location="cpu")
    except Exception as error:
        raise Stop(f"{path} is missing or damaged ({type(error).__name__})") from None

def cached(path, key, make):
    """What make() returns, kept in `path`, if one can write there, until the key is another."""
    saved = load(path) if path.exists() else {}
    if saved.get("key") != key:
        saved = dict(key=key, content=make())
        with contextlib.suppress(OSError):
            save(saved, path)
    return saved["content"]

def new_folder(wanted, otherwise):
    """Make and print the folder `wanted`, or one named by the time. Nothing is written over."""
    folder = wanted or Path(f"{otherwise}-{datetime.datetime.now():%m%d-%H%M%S-%f}")
    folder.mkdir(parents=True)
    print(folder)
    return folder

def save_checkpoint(folder, step, known, log, parts):
    """checkpoint.pt. parts: name -> module, optimiser or scaler."""
    states = {name: part.state_dict() for name, part in parts.items()}
    save(dict(step=step, known=known, log=log, **states), folder / "checkpoint.pt")

def load_run(folder, device="auto"):
    """A run: config, model (the average, in eval mode), known, step, log, device, state (all)."""
    folder = Path(folder)
    device = find_device(device)
    cfg = read_config(folder)
    state = load(folder / "checkpoint.pt")
    model = placed(cfg.build(state["known"]), device).eval().requires_grad_(False)
    try:
        model.load_state_dict(state["average"])
    except RuntimeError:
        raise Stop(f"{folder}: config.json is of another network than checkpoint.pt") from None
    return SimpleNamespace(**{**state, "model": model}, state=state, config=cfg, device=device)

def same_images(run, sets):
    """The sets. Raises Stop if they are not those that the run began with."""
    same = run.known["images"] == fingerprint(sets[0].images, sets[0].labels)
    check(same or run.config.dataset in FINE,
          "the training images have changed since the run began: restore them, or start a new run")
    return sets

def mean_losses(history):
    """Means of losses, dicts of scalars, over steps and processes -> dict. Waits for the device."""
    means = torch.stack([torch.stack([*losses.values()]).detach() for losses in history]).mean(0)
    if WORLD > 1:
        dist.all_reduce(means)
    return dict(zip(history[0], (means / WORLD).tolist()))

def write_csv(path, rows):
    """Rows (dicts) as a CSV file; its header has all their keys; what a row lacks stays empty."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row))
        writer.writeheader()
        writer.writerows(rows)

# ---- Tasks: train, sample, evaluate, compare -----------------------------------------------------

def new_run(cfg, sets, folder, device):
    """All that comes before training: config.json, and the checkpoint of step 0. known: shape,
    classes, fingerprint of the images, seconds that this took, and what model.begin returns."""
    start = time.perf_counter()
    save(vars(cfg), folder / "config.json")
    data = sets[0]
    known = dict(shape=data.images.shape[1:], classes=data.classes,
                 images=fingerprint(data.images, data.labels))
    torch.manual_seed(cfg.seed)                         # the same network whatever the prototypes
    model = cfg.build(known)
    known.update(model.begin(cfg, sets, folder, device))
    known["seconds"] = time.perf_counter() - start
    save_checkpoint(folder, 0, known, [], dict(model=model, average=model))

def train_run(cfg, given, load_data=load_sets):
    """Start, or go on with, the run given.resume; maybe as one of several processes -> its sets."""
    device = find_device(cfg.device)
    if WORLD > 1:                                       # the others wait while the first decodes
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))
    if RANK == 0:
        sets = load_data(cfg)                           # faults show before a folder is made
        given.resume = given.resume or new_folder(given.out, f"runs/{SCRIPT}-{cfg.dataset}")
        if not {"checkpoint.pt", "log.csv"} & {*os.listdir(given.resume)}:
            new_run(cfg, sets, given.resume, device)
    shared = [given.resume]
    if WORLD > 1:
        dist.broadcast_object_list(shared)
    if RANK > 0:
        sets = load_data(cfg)
    train(cfg, sets, shared[0], device)
    if WORLD > 1:
        dist.destroy_process_group()
    return sets

def save_samples(folder, images, labels, names, title):
    """samples.npz, for the guided-diffusion evaluator: arr_0 uint8 [N, H, W, C], arr_1 labels [N];
    and classes, their names. samples.png: of the first 20 labels, a row of up to 10 images each."""
    np.savez(folder / "samples.npz", arr_0=images.permute(0, 2, 3, 1), arr_1=labels, classes=names)
    shown = drawable(names)
    present = labels.unique()[:20].tolist()
    rows = [images[labels == label][:10] for label in present]
    tiles = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=255).flatten(0, 1)
    draw_grid(folder / "samples.png", tiles, [shown[label] for label in present], title)

def evaluate_classes(cfg, run, sets, folder):
    """Samples, pictures and metrics.json of a trained run, in `folder`."""
    figures, images, labels = run.model.quality(cfg, run, sets)
    save_samples(folder, images, labels, sets[0].classes,
                 f"{cfg.prototypes} prototypes, step {run.step}, guidance {cfg.guidance}")
    some = some_of(len(sets[1].images), cfg.num_samples)        # for the distance depends on it
    real = judge_images(cfg, run, sets, sets[1].images[some], sets[1].labels[some])
    figures.update({f"real_{name}": value for name, value in real.items()})
    figures.update(inception_metrics(cfg, images, sets[0].images, run.device))
    write_metrics(cfg, run, figures, folder)

def write_metrics(cfg, run, figures, folder):
    """metrics.json: figures, also printed, with settings, machine and log; and curves.png."""
    machine = f"{os.cpu_count()} CPU cores"
    if run.device.type == "cuda":
        machine = torch.cuda.get_device_name(run.device)
    figures.update(run.known["figures"], seconds_before=run.known["seconds"],
                   seconds=run.log[-1]["seconds"])
    metrics = dict(script=SCRIPT, step=run.step, machine=f"{machine}, torch {torch.__version__}",
                   classes=run.known["classes"], settings=vars(cfg), log=run.log, **figures)
    save(metrics, folder / "metrics.json")
    draw_curves(folder / "curves.png", {folder.name: [metrics]})
    for name, value in figures.items():
        print(f"  {name:40} {value:,.4g}")
    print(f"{folder}: {cfg.num_samples} samples, on {machine}; frechet is no FID")

T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)     # Student's t, 97.5 %

def compare(folders, out):
    """Finished runs (comparisons are passed over) -> comparison.png, and comparison.csv, printed:
    of runs that differ only in their seed the mean of each figure, half of its 95 % interval."""
    runs = []
    for folder in dict.fromkeys(map(Path.resolve, folders)):
        if not (folder / "comparison.csv").exists():
            runs.append(load(folder / "metrics.json"))
            check({*runs[-1].get("settings", [])} == {*vars(Config())},
                  f"{folder} is of another script or version")
    check(runs, "--compare takes folders of finished runs of this script")
    differ = [name for name in vars(Config())
              if name != "seed" and len({run["settings"][name] for run in runs}) > 1]
    groups = {}
    for run in runs:
        group = ", ".join(f"{name} {run['settings'][name]}" for name in differ)
        groups.setdefault(group or "all runs", []).append(run)
    folder = new_folder(out, "runs/comparison")
    table = []
    for figure in dict.fromkeys(name for run in runs for name in run
                                if isinstance(run[name], (int, float))):
        for group, members in groups.items():
            values = np.array([run.get(figure) for run in members], float)          # None is NaN
            n = len(values)
            half = T_95[min(n - 2, 8)] * values.std(ddof=1) / n ** 0.5 if n > 1 else math.nan
            table.append(dict(figure=figure, group=group, runs=n, mean=values.mean(), half=half))
            print(f"{figure:20} {group:40} {values.mean():12,.5g} +- {half:.2g} ({n} runs)")
    write_csv(folder / "comparison.csv", table)
    draw_curves(folder / "comparison.png", groups)

# ---- Command line --------------------------------------------------------------------------------

def user_path(text):
    """A path of the command line, in which ~ is the home folder."""
    return Path(os.path.expanduser(text))

def settings_parser():
    """A parser with a flag for every setting, and for the tasks, each with an earlier run."""
    source = Path(__file__).read_text(encoding="utf-8")         # python -OO drops docstrings
    helps = dict(re.findall(r"^    (\w+): .*?# (.+)$", source, re.MULTILINE))
    parser = argparse.ArgumentParser(description=source.split("\n")[0][3:], allow_abbrev=False)
    for f in dataclasses.fields(Config):
        options = dict(type=type(f.default), choices=get_args(f.type) or None)
        if f.type is bool:
            options = dict(action=argparse.BooleanOptionalAction)
        parser.add_argument("--" + f.name.replace("_", "-"), **options,
                            help=f"{helps[f.name]} [{f.default}]")
    parser.add_argument("--out", type=user_path, help="a new folder for what is made")
    tasks = parser.add_mutually_exclusive_group()
    for task in Config.TASKS:
        tasks.add_argument(f"--{task}", metavar="RUN", type=user_path, help="an earlier run")
    tasks.add_argument("--compare", type=user_path, nargs="+", help="a table of finished runs")
    return parser

def without_effect(given, names, where):
    """Raises Stop if one of these flags was given: it has no effect there."""
    for name in names:
        check(getattr(given, name) is None, f"--{name.replace('_', '-')} has no effect {where}")

def check_settings(cfg):
    """Raises Stop for impossible values -> cfg. A default above 0 of whole numbers means >= 1."""
    for f in dataclasses.fields(Config):
        value = getattr(cfg, f.name)
        kind = (int, float) if f.type is float else type(f.default)
        fits = isinstance(value, kind) and value in (get_args(f.type) or [value])
        least = f.type is int and f.default > 0
        most = 1 if f.name in "dropout warmup null_prob hide bias".split() else sys.maxsize
        check(fits and (kind is str or least <= value <= most), f"{f.name} cannot be {value}")
    check(re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", cfg.multipliers) and cfg.channels % 4 == 0
          and cfg.image_size % 2 ** cfg.multipliers.count(",") == 0,
          "--multipliers are like 1,2,2; --image-size divides by 2 at every comma, --channels by 4")
    check(cfg.batch_size % WORLD == 0, "--batch-size does not divide by the number of processes")
    check(cfg.sample_steps <= cfg.timesteps, "--sample-steps cannot be more than --timesteps")
    alpha_bars(cfg.timesteps)                           # raises Stop if they are too few
    return cfg

def read_config(folder):
    """The settings of a run. Raises Stop if they are impossible, or of another script."""
    saved = load(folder / "config.json")
    check(saved.keys() == vars(Config()).keys(), f"{folder} is a run of another script or version")
    return check_settings(Config(**saved))

def read_settings(given):
    """Defaults, the data set's preset or an earlier run's settings, the flags, each over the former
    -> cfg, task, that run's folder. Raises Stop for flags that the task has no use for."""
    names = [*vars(Config())]
    task = next((name for name in Config.TASKS if getattr(given, name)), "train")
    folder = getattr(given, task, None)
    saved = vars(read_config(folder)) if folder else Config.PRESETS[given.dataset or "shapes"]
    flags = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
    cfg = check_settings(Config(**{**saved, **flags}))
    cfg.data_dir = os.path.abspath(user_path(cfg.data_dir))     # the run may go on elsewhere
    cfg.inception = str(user_path(cfg.inception))
    fixed = names[:names.index(Config.TASKS[task])] if folder else []
    for name in flags.keys() & fixed:
        check(flags[name] == saved[name],
              f"--{task} cannot change {name}, which is {saved[name]} in this run")
    if task == "resume":
        without_effect(given, ["out"], "with --resume, which goes on in the run's folder")
    if cfg.dataset in FINE:
        without_effect(given, ["data_dir"], "with shapes, which are made in memory")
    if "inception" not in fixed:
        load_inception(cfg.inception)                   # a fault shows before the work
    return cfg, task, folder

def protodiffusion(given):
    """Do what the command line asks for."""
    if given.compare:
        without_effect(given, [*vars(Config()), "labels"], "with --compare")
        return compare(given.compare, given.out)
    cfg, task, folder = read_settings(given)
    if task != "sample":
        without_effect(given, ["labels"], "without --sample")
    if cfg.prototypes == "random":
        unused = "start scale prototypes_per_class learner_steps learner_width imagenet".split()
        without_effect(given, unused, "with --prototypes random")
    check(cfg.prototype_dim > 1 and (not cfg.imagenet or cfg.learner_width == 64),
          "--prototype-dim must be 2 or more, and --imagenet takes --learner-width 64")
    check(cfg.null_prob > 0 or cfg.guidance == 0, "--null-prob 0 leaves no guidance: --guidance 0")
    if task in ("train", "resume"):
        sets = train_run(cfg, given)
        if RANK == 0:
            evaluate_classes(cfg, load_run(given.resume, cfg.device), sets, given.resume)
        return
    run = load_run(folder, cfg.device)
    check(run.step > 0, f"{folder} is not trained yet: --resume it first")
    if task == "evaluate":
        sets = same_images(run, load_sets(cfg))
        evaluate_classes(cfg, run, sets, new_folder(given.out, folder / task))
        return
    classes = run.known["classes"]
    wanted = classes if given.labels is None else given.labels.split(",")
    check({*wanted} <= {*classes}, f"--labels takes names of {', '.join(classes)}")
    chosen = torch.tensor([name in wanted for name in classes])             # [C]
    targets = run.known["targets"]
    rows = evenly(targets[chosen[targets // cfg.prototypes_per_class]], cfg.num_samples)
    out = new_folder(given.out, folder / task)
    save_samples(out, generate(cfg, run, rows), rows // cfg.prototypes_per_class, classes,
                 f"step {run.step}, guidance {cfg.guidance}")

def main(argv=None):
    """The command line -> exit status: 2 after one sentence about what a person can put right, 130
    after Ctrl-C. A fault of this program shows its traceback."""
    parser = settings_parser()
    parser.add_argument("--labels", help="--sample: classes, like circle,star; without it all")
    given = parser.parse_args(argv)
    try:
        protodiffusion(given)
        return 0
    except KeyboardInterrupt:
        advice = f'; go on with: python {__file__} --resume "{given.resume}"'
        print(f"\ninterrupted{advice * bool(given.resume)}", file=sys.stderr)
        return 130
    except (Stop, OSError) as error:
        fault = error
    except (RuntimeError, MemoryError) as error:
        if not re.search("allocate|overflow|MemoryError", repr(error)):
            raise
        fault = "memory ran out: lower --batch-size, --sample-batch or --image-size"
    print(f"\n{SCRIPT}: {fault}", file=sys.stderr)
    return 2

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")            # a file on Windows lacks many letters
    sys.exit(main())
