"""ProtoDiffusion: a class-conditional diffusion model whose class embeddings start as prototypes.

Paper: Baykal, Karagoz, Binhuraib, Unal, "ProtoDiffusion: Classifier-Free Diffusion Guidance with
Prototype Learning", ACML 2023, arXiv 2307.01924. Stage 1: Yang et al., CVPR 2018, arXiv 1805.03438.

The idea. A class-conditional diffusion model looks its class up in a table of embeddings, and that
table usually starts as noise. Here a small classifier first learns a prototype for each class: a
point in its feature space that the images of the class lie close to. The prototypes become the rows
of the table, so the denoiser knows from its first step which classes are alike. The table then
stays as it is ("frozen") or trains on ("unfrozen"); "random" is the usual table, the paper's
baseline. The paper reports equal quality in about half the training time.

Does it help? Ten figures of shapes are learned as fast without. Of 160 fine classes 35 % of samples
are recognised after 1,600 steps, with a random table 8 % (README). Prototypes must tell who is
alike (permuted: 3 %), as they do from class means, and be as long as random rows (raw: 9 %).

    stage 1   image ──> ResNet f(x) ──> nearest prototype = class      DCE loss + prototype loss
                                             │
    stage 2               table of prototypes [C, D] ──> MLP ─┐ (zero vector: no class)
              noise level t ──> sinusoids ──> MLP ──────────(+)──> every residual block
              noisy image xt ────────────────────────────────────> U-Net ──> predicted noise

    python protodiffusion.py                            # built-in shapes, five minutes on a CPU
    python protodiffusion.py --dataset cifar10          # the paper's experiment
    python protodiffusion.py --compare runs/A runs/B    # finished runs: a table and a figure

Comments marked "choice:" say where the paper is silent or we differ; "# exercise" marks functions
to write again from their docstrings. To change the losses of stage 1, look at dce_loss and
prototype_loss; how the class enters, at ProtoDiffusion.denoise; the noise schedule, at alpha_bars;
a sampler, at sample; the optimiser, at train and learning_rate; a data set, at load_dataset.
"""
import argparse
import contextlib
import csv
import dataclasses
import datetime
import errno
import hashlib
import inspect
import json
import math
import os
import re
import shlex
import signal
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, NamedTuple, get_args

import matplotlib
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import nn
from torchvision.transforms import v2

SCRIPT = Path(__file__).stem
TORCHRUN = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE")]    # under torchrun two numbers
RANK, WORLD = map(int, TORCHRUN if all(str(n).isdecimal() for n in TORCHRUN) else (0, 1))

# ---- Settings ------------------------------------------------------------------------------------

Sets = Literal["shapes", "shapes-40", "shapes-160", "folder", "cifar10", "stl10", "tiny-imagenet"]

@dataclasses.dataclass
class Config:
    """Every setting is a flag; its comment is its help."""
    dataset: Sets = "shapes"        # the images: built-in shapes, a folder, or a published set
    data_dir: str = "data"          # where data lie or are downloaded to; for folder: your images
    image_size: int = 16            # side of the images, pixels
    images_per_class: int = 0       # training images of each class; 0: all
    # prototypes (stage 1)
    prototypes: Literal["random", "frozen", "unfrozen"] = "unfrozen"    # how the class table starts
    start: Literal["means", "random"] = "means"     # of prototypes: class means, or N(0, 0.01)
    permuted: bool = False          # a control: rows go to other classes, whose likes they are not
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
    attention: int = 8              # self-attention at levels of at most this side, pixels
    dropout: float = 0.0            # dropout in residual blocks
    timesteps: int = 1000           # T, number of noise levels
    weight_decay: float = 1e-4      # weight decay of AdamW
    # training: a resumed run may change these and all below
    steps: int = 3600               # optimiser steps
    batch_size: int = 32            # images for each step, over all processes and passes
    accumulate: int = 1             # passes that split a step's images, to save memory
    lr: float = 2e-3                # peak learning rate
    warmup: float = 0.05            # fraction of steps in which the learning rate rises
    null_prob: float = 0.1          # probability of training without the class
    mirror: bool = False            # show half of the training images flipped left to right
    seed: int = 0                   # seed of everything random
    save_every: int = 100           # steps between checkpoints, and rows of log.csv
    eval_every: int = 0             # steps between measurements while training; 0: none
    device: str = "auto"            # auto, cuda, cuda:1, mps or cpu
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"                # mixed precision
    compile: bool = False           # torch.compile the training step
    # sampling and measuring
    num_samples: int = 1000         # images to sample, and to measure on
    guidance: float = 1.0           # w; 0 is the conditional model, more gives less variety
    sampler: Literal["ddim", "ddpm", "dpmpp"] = "ddpm"      # ddpm suits short trainings
    sample_steps: int = 20          # steps from noise to image
    sample_batch: int = 250         # images sampled at a time
    judge_steps: int = 400          # steps of the judge, a classifier that measures samples
    judge_width: int = 16           # channels of its first layers; 64: ResNet-18
    inception: str = "off"          # weights for FID, IS and KID: a file, or download

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

def learn_prototypes(data, cfg, device):
    """Stage 1 -> a PrototypeLearner that was trained on `data`, a Dataset. From a random start
    prototypes hardly move: images come to them, and all classes end up about as far apart."""
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
    table = prototypes.detach().flatten(0, 1)
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
        gen = torch.Generator().manual_seed(seed_of(cfg.seed, "random table"))
        if cfg.prototypes == "random":
            self.table.weight.data.normal_(generator=gen)
            return dict(targets=first, figures={})
        learner = learn_prototypes(sets[0], cfg, device)
        prototypes = learner.prototypes.cpu()
        table = class_table(prototypes, cfg.scale)
        if cfg.permuted:
            table = table[torch.randperm(len(table), generator=gen)]
        self.table.weight.data = table
        z = features_of(learner, sets[0].images, device)
        nearest = nearest_prototypes(z, prototypes).indices.gather(1, labels[:, None])[:, 0]
        figures = draw_prototypes(folder / "prototypes.png", learner, sets[1], device)
        return dict(targets=first + nearest, figures=figures)

    def quality(self, cfg, run, sets):
        """What --eval-every logs: the judge's figures for samples of all classes, as a dict."""
        rows = evenly(run.known["targets"], cfg.num_samples)
        labels = rows // cfg.prototypes_per_class
        judge = load_judge(cfg, sets[2], run.device)
        return judge_images(judge, generate(cfg, run, rows), labels, run.device)

# ---- Diffusion: process, loss, guidance, samplers; all in float32 but the network ----------------

def alpha_bars(T):
    """abar [T], float32: the cumulative product of 1 - beta (DDPM, section 4).
    Betas are linear from 1e-4 to 0.02 at T = 1000; for another T they are scaled by 1000 / T, which
    keeps the course of abar. Raises Stop if a beta would reach 1."""
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

def generate(cfg, run, conditions, trace=None):
    """An image for each condition (int64 [N], -1: none) -> uint8 [N, C, H, W] on the CPU.
    run: has model, known, device. The same cfg.seed and sample_batch give the same images. trace: a
    list that gets (t, x) of every step. Raises Stop if the images are not numbers."""
    abar = alpha_bars(cfg.timesteps)
    gen = torch.Generator(run.device)
    images = []
    for i, given in enumerate(conditions.to(run.device).split(cfg.sample_batch)):
        gen.manual_seed(seed_of(cfg.seed, "sampling", i))
        xT = torch.randn(len(given), *run.known["shape"], generator=gen, device=run.device)
        null = torch.full_like(given, -1)
        def predict(x, t):
            if trace is not None:
                trace.append((t[0].item(), x))
            with autocast(run.device, cfg.amp):
                return guided_noise(run.model.denoise, x, t, given, null, cfg.guidance)
        x0 = sample(predict, xT, abar, cfg.sample_steps, cfg.sampler, generator=gen)
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
    """The layer with its weights at zero: the block that it closes starts as its skip alone."""
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
    """Self-attention over the pixels of x [B, C, H, W], in heads of 64 or one. emb is not used."""
    def __init__(self, channels):
        super().__init__()
        self.heads = channels // 64 if channels % 64 == 0 else 1
        self.norm = group_norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zeroed(nn.Linear(channels, channels))

    def forward(self, x, emb):
        pixels = self.norm(x).flatten(2).transpose(1, 2)        # [B, HW, C]
        qkv = self.qkv(pixels).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                    # each [B, heads, HW, C / heads]
        h = F.scaled_dot_product_attention(q, k, v)
        h = self.out(h.transpose(1, 2).flatten(2))              # [B, HW, C]
        return x + h.transpose(1, 2).reshape(x.shape)

class Stage(nn.ModuleList):
    """Blocks one after the other. ResBlock and Attention are given emb; Attention ignores it."""
    def forward(self, x, emb):
        for block in self:
            x = block(x, emb) if isinstance(block, (ResBlock, Attention)) else block(x)
        return x

class UNet(nn.Module):
    """Noise predictor: x [B, C, S, S], t [B] in 0..T-1, condition [B, emb_dim] -> [B, C, S, S].
    The condition is added to the time embedding, which every residual block reads. The output
    starts at zero."""
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
        c_in = image_channels                           # that enter the level: the image's, then c
        for level, width in enumerate(widths):          # all levels but the first halve the image
            self.down.append(Stage([nn.Conv2d(c_in, c, 3, stride=1 + (level > 0), padding=1)]))
            skips.append(c)
            for _ in range(cfg.blocks):
                self.down.append(block(c, width, level))
                c = width
                skips.append(c)
            c_in = c
        self.middle_width = c
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

    def embed(self, t):
        """The embedding of noise levels t [B] -> [B, emb_dim]."""
        return self.time_mlp(time_embedding(t, self.emb_dim // 4))

    def encode(self, x, emb):
        """x [B, C, S, S], emb [B, E] -> features [B, c, s, s], list of skip connections."""
        skips = []
        for stage in self.down:
            x = stage(x, emb)
            skips.append(x)
        return x, skips

    def decode(self, x, skips, emb):
        """Features before the middle, and skip connections -> [B, C, S, S]."""
        x = self.middle(x, emb)
        for stage in self.up:
            x = stage(torch.cat([x, skips.pop()], dim=1), emb)
        return self.last(x)

    def forward(self, x, t, condition=0.0):
        emb = self.embed(t) + condition
        return self.decode(*self.encode(x, emb), emb)

# ---- Training: the loop; the model brings its losses as model.forward ---------------------------

class Batch(NamedTuple):
    """What a training step sees of B images."""
    x0: torch.Tensor                # clean images [B, C, H, W] in [-1, 1]
    target: torch.Tensor            # what begin gave for each image, [B]
    t: torch.Tensor                 # noise levels [B], uniform over 0..T-1
    eps: torch.Tensor               # noise [B, C, H, W]
    chance: torch.Tensor            # uniform in 0..1, [B]: says if a condition is hidden

def random_batches(cfg, images, targets, step, device):
    """The batches of a step for this process, one for each of cfg.accumulate passes.
    The draws for all B images come from (seed, step); each process and pass takes its share. So no
    random state is saved; only the model's draws and batch statistics depend on the split."""
    B = cfg.batch_size
    gen = torch.Generator(device).manual_seed(seed_of(cfg.seed, "noise", step))
    t = torch.randint(cfg.timesteps, (B,), generator=gen, device=device)
    eps = torch.randn(B, *images.shape[1:], generator=gen, device=device)
    flip, chance = torch.rand(2, B, generator=gen, device=device)
    index = random_index(len(images), B, cfg.seed, "images", step)
    torch.manual_seed(seed_of(cfg.seed, "dropout", step, RANK))
    size = B // (WORLD * cfg.accumulate)
    for i in range(RANK * cfg.accumulate, (RANK + 1) * cfg.accumulate):
        part = slice(i * size, (i + 1) * size)
        x0 = scaled(images, index[part], device)
        x0 = torch.where(flip[part, None, None, None] < 0.5 * cfg.mirror, x0.flip(-1), x0)
        yield Batch(x0, targets[index[part]].to(device), t[part], eps[part], chance[part])

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

def safe_step(optimizer, scaler):
    """Clip each group's gradient at norm 1 (choice); update, or skip if not finite -> 1.0 if so.
    It stays on the device (no sync): fused AdamW reads found_inf, and skips where that is 1."""
    scaler.unscale_(optimizer)
    norms = [nn.utils.clip_grad_norm_(group["params"], 1.0) for group in optimizer.param_groups]
    bad = (~sum(norms).isfinite()).float()              # a frozen group's norm is 0, on the CPU
    optimizer.found_inf = bad
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return bad

def train(cfg, sets, folder, device):
    """Go on from the checkpoint in `folder` to step cfg.steps; that of a new run is of step 0.
    Leaves checkpoint.pt and log.csv, whose seconds are those of training alone. Raises Stop if the
    images changed or training diverges, KeyboardInterrupt after Ctrl-C, when the step is saved."""
    run = load_run(folder, device)                      # its model is the moving average
    known = run.known
    check(known["images"] == fingerprint(sets[0].images, sets[0].labels),
          "the training images have changed since the run began: restore them, or start a new run")
    if RANK == 0:
        save_json(vars(cfg), folder / "config.json")
    print_new_steps(run, cfg)
    images = place_images(sets[0].images, device)
    abar = alpha_bars(cfg.timesteps).to(device)
    model = placed(cfg.build(known), device)
    optimizer = torch.optim.AdamW(model.param_groups(), betas=(0.9, 0.95),  # choice: 0.95
                                  weight_decay=cfg.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype(device, cfg.amp) is torch.float16)
    parts = dict(model=model, average=run.model, optimizer=optimizer, scaler=scaler)
    restore(parts, run.state)
    net = nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model
    forward = torch.compile(net, dynamic=False) if cfg.compile else net
    history = []                                        # losses since the last row of the log
    skipped = torch.tensor([run.log["skipped"], 0.0], device=device)    # steps, in all and in a row
    saved_step = run.step
    with interruptible() as interrupts:
        for step in range(run.step, cfg.steps):
            clock = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, cfg)
            for i, batch in enumerate(random_batches(cfg, images, known["targets"], step, device)):
                net.require_backward_grad_sync = i == cfg.accumulate - 1    # sync once a step
                with autocast(device, cfg.amp):
                    losses = forward(batch, abar, cfg)
                scaler.scale(losses["loss"] / cfg.accumulate).backward()
                history.append(losses)
            bad = safe_step(optimizer, scaler)
            update_average(run.model, model, step)

            # What follows is bookkeeping: the log, measuring, the checkpoint.
            skipped = torch.stack([skipped[0] + bad, (skipped[1] + 1) * bad])
            now = step + 1
            last = now == cfg.steps
            stopping = in_any_process(interrupts != [], device)
            measured = cfg.eval_every > 0 and (last or now % cfg.eval_every == 0)
            saved = last or stopping or measured or now % cfg.save_every == 0
            row = mean_losses(history) if saved else {}
            if not cfg.compile or step > run.step:      # not the step that compiles
                run.log["seconds"] += time.perf_counter() - clock
            if not saved:
                continue
            history = []
            left = (cfg.steps - now) * run.log["seconds"] / now / 60
            progress(f"step {now}/{cfg.steps}  loss {row['loss']:.4f}  {left:.1f} min left", "\n")
            check(skipped[1] <= 30 and is_sound(model, batch, abar, cfg), "the training diverged: "
                  f"--resume it from step {saved_step}, whose weights are good, at a lower --lr or "
                  "with --amp off")
            run.log["skipped"] = skipped[0].item()
            row.update(step=now, lr=learning_rate(step, cfg), seconds=run.log["seconds"],
                       skipped=run.log["skipped"])
            run.log["rows"].append(row)
            if RANK == 0:
                if measured:
                    row.update(run.model.quality(cfg, run, sets))
                write_csv(folder / "log.csv", run.log["rows"])
                save_checkpoint(folder, now, known, run.log, parts)
            saved_step = now
            if stopping:
                raise KeyboardInterrupt(*interrupts[:1])

# ---- Equipment: you can stop reading here --------------------------------------------------------

# ---- Errors --------------------------------------------------------------------------------------

class Stop(Exception):
    """A fault that the person at the keyboard can put right: one sentence, and exit status 2."""

def check(ok, sentence):
    """Raises Stop with the sentence if something is not as it must be."""
    if not ok:
        raise Stop(sentence)

def reason(error):
    """The first line of what an error says. A disk that is full is called so."""
    if isinstance(error.__context__, OSError):          # torch.save hides the error of the file
        error = error.__context__
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    return "the disk is full" if full else (str(error) or type(error).__name__).split("\n")[0]

@contextlib.contextmanager
def explained(sentence):
    """Any error inside becomes Stop: the sentence, and the first line of the error."""
    try:
        yield
    except Exception as error:
        raise Stop(f"{sentence} ({reason(error)})") from None

# ---- Data: every set becomes one uint8 tensor ----------------------------------------------------

SHAPES = "circle square triangle diamond plus cross ring crescent bar star".split()
SHAPE_ATTRIBUTES = ("warm hue", "bright background", "large", "left of centre", "dot")
FINE = {"shapes": 0, "shapes-40": 2, "shapes-160": 4}   # attributes that split the classes, named
SHAPE_WORDS = (("cool", "warm"), ("dark", "bright"), ("small", "large"), ("right", "left"))
SHAPE_SPLITS = {"train": (20_000, 0), "test": (4_000, 1), "judge": (20_000, 12)}    # images, seed

@dataclasses.dataclass
class Dataset:
    """images uint8 [N, C, H, W]; labels int64 [N] or None; attributes bool [N, A] or None.
    span: lowest and highest value of files of more than 8 bits, which became 0 and 255, if any.
    left_out: files that are not among the images, and why. str(data) says what was found."""
    images: torch.Tensor
    labels: torch.Tensor | None
    classes: list
    attributes: torch.Tensor | None = None
    attribute_names: tuple | list = ()
    span: tuple | None = None
    left_out: str = ""

    def __str__(self):
        count = len(self.classes)
        names = ", ".join(self.classes[:10]) + (count > 10) * ", ..."
        grey = (self.images == self.images[:, :1]).all()
        return (f"{len(self.images):,} images of {count or 'no'} classes ({names}), in "
                f"{['colour', 'grey'][grey]}; left out: {self.left_out or 'nothing'}")

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
    bias: probability that an image has its corner dot exactly if its hue is warm. Both stay at one
    half; at 0.5 they are independent. Another seed gives other images."""
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
    if not folder.is_dir():
        torchvision.datasets.utils.download_and_extract_archive(
            "http://cs231n.stanford.edu/tiny-imagenet-200.zip", root,
            md5="90528d7ca1a48142e341f4ef8d21d0de")
    words = dict(line.split("\t") for line in (folder / "words.txt").read_text().splitlines())
    items, classes, *_ = open_folder(folder / "train", train)               # <class>/images/*.JPEG
    return items, [words[name].split(",")[0] for name in classes]

def seeded_split(items, train):
    """A fixed random split of what comes without one, items (image, label): a tenth of each class
    is held out, and at least one image of a class that has two."""
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(0)).tolist()
    groups = {}
    for i in order:
        groups.setdefault(items[i][1], []).append(i)
    held_out = set()
    for group in groups.values():
        held_out.update(group[:min(len(group) - 1, max(1, round(len(group) / 10)))])
    check(held_out, "no class has two images, of which one could be held out: bring more")
    return [item for i, item in enumerate(items) if (i in held_out) != train]

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
PARTS = dict(train="train", training="train", test="test", testing="test", val="val", valid="val",
             validation="val")                          # names of folders, in whatever case

def find_images(folder, left_out, above=()):
    """All images below a folder, in order, also through links. What is no image is counted in
    left_out: other files, what is hidden, runs/, environments, links that lead back (above)."""
    endings = [end for end, name in Image.registered_extensions().items() if name in FORMATS]
    above = (*above, folder.resolve())
    found = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            left_out["hidden"] += 1
        elif path.is_dir():
            back = any(one.is_relative_to(path.resolve()) for one in above)
            environment = (path / "pyvenv.cfg").exists() or (path / "conda-meta").exists()
            if back or environment or path.name == "runs":
                left_out[f"{path.name}/"] += 1
            else:
                found += find_images(path, left_out, above)
        elif path.suffix.lower() in endings:
            found.append(path)
        elif not path.name.startswith("prototype-"):    # our caches
            left_out[path.suffix or "without ending"] += 1
    return found

def readable(path):
    """A path as text that can be printed and saved, also if it is not UTF-8."""
    return str(path).encode(errors="backslashreplace").decode()

def stamp(image, span=None):
    """A text that tells a file, as it is now, from others. Images in memory are not told apart."""
    there = isinstance(image, Path) and image.exists()
    changed = image.stat().st_mtime_ns if there else ""
    return f"{readable(image)} {changed} {span}"

def open_folder(root, train):
    """A folder of images -> items (file, label), classes, what was left out, all files.
    It holds <class>/*, or images without classes, or train/ with or without test/ or val/ (or
    their other names) that hold the same. Without test/ and val/, a tenth is held out. A folder
    that holds nothing but one folder of folders is passed through."""
    left_out = Counter()
    files = find_images(root, left_out)
    below = [readable(file.relative_to(root)).split(os.sep) for file in files]
    folders = sorted({"/".join(path[:-1]) or "." for path in below})
    wanted = (f"images are in {', '.join(folders[:20]) or 'no folder'}: give train/<class>/*, with "
              "or without test/ or val/, and nothing else; or <class>/*; or images alone")
    def unwrapped(below):
        while (len({path[0] for path in below}) == 1 and min(map(len, below)) > 2
               and below[0][0].lower() not in PARTS):
            below = [path[1:] for path in below]
        return below
    below = unwrapped(below)
    parts = [PARTS.get(path[0].lower()) for path in below]
    if None not in parts or any(part and path[2:] for part, path in zip(parts, below)):
        check("train" in parts and None not in parts, wanted)
        below = unwrapped([path[1:] for path in below])
    else:
        parts = ["train"] * len(files)                  # to be split
    other = max({"train", "val", "test"} & {*parts}, key=("train", "val", "test").index)
    rows = [(file, path[0] if path[1:] else "", part)
            for file, path, part in zip(files, below, parts) if part in ("train", other)]
    left_out.update(part for part in parts if part not in ("train", other))
    classes = sorted({name for _, name, part in rows if part == "train"})
    label = {name: i for i, name in enumerate(classes)}
    check({name for _, name, _ in rows} == {*classes}, wanted)
    check("" not in classes or len(classes) == 1, wanted)
    mine = "train" if train else other
    items = [(file, label[name]) for file, name, part in rows if part == mine]
    if other == "train":
        items = seeded_split(items, train)
    return items, [name for name in classes if name], left_out, files

data_sets = {"folder": open_folder, "cifar10": open_cifar10, "stl10": open_stl10,
             "tiny-imagenet": open_tiny_imagenet}

def deep_values(image):
    """The values of an image of one channel of more than 8 bits (16, 32, floats); else None.
    NaN becomes the lowest value, an infinite one the lowest or highest that is finite."""
    if image.mode[0] not in "IF":
        return None
    values = np.asarray(image, np.float64)
    finite = values[np.isfinite(values)]
    return np.nan_to_num(values, nan=finite.min()).clip(finite.min(), finite.max())

def value_range(files):
    """The lowest and the highest of all deep values in image files; None if there are none."""
    found = []
    for file in files:
        with contextlib.suppress(Exception), Image.open(file) as image:     # decode tells of faults
            values = deep_values(image)
            found += [values.min().item(), values.max().item()]
    return (min(found), max(found)) if found else None

def decode(image, size, span=None):
    """An image or image file -> uint8 RGB [3, size, size]: shorter side scaled, centre kept,
    transparency on white. span: the deep values that become 0 and 255, or else the image's own."""
    with explained(f"{image} does not decode as an image"):
        if not isinstance(image, Image.Image):
            image = Image.open(image)
            with contextlib.suppress(Exception):        # damaged notes of a camera turn nothing
                image = ImageOps.exif_transpose(image)
        values = deep_values(image)
        if values is not None:
            low, high = span or (values.min(), values.max())
            values = (values - low) / max(high - low, 1e-12) * 255
            image = Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
        return torchvision.transforms.functional.pil_to_tensor(image)

def decode_all(items, size, span, old):
    """Items (image or file, label) -> dict of images, labels, stamps, faults (sentences).
    old: what this gave another time, or None. What it has is not decoded again."""
    with explained("the images do not fit into memory: lower --image-size"):
        images = torch.zeros(len(items), 3, size, size, dtype=torch.uint8)
    labels = torch.zeros(len(items), dtype=torch.int64)
    known = dict(zip(old["stamps"], old["images"])) if old and "stamps" in old else {}
    stamps = [""] * len(items)
    faults = []
    def fetch(i):
        image, labels[i] = items[i]
        mark = stamp(image, span)
        try:
            images[i] = known[mark] if mark in known else decode(image, size, span)
            stamps[i] = mark
        except Stop as fault:
            faults.append(str(fault))
    with ThreadPoolExecutor() as pool:
        for i, _ in enumerate(pool.map(fetch, range(len(items)))):
            progress(f"decoding: {i + 1}/{len(items)}")
    return dict(images=images, labels=labels, stamps=stamps, faults=faults)

def load_dataset(name, split="train", image_size=None, data_dir="data"):
    """A data set in memory, decoded once and cached beside the data in prototype-*.pt -> Dataset.
    name: a key of Config.PRESETS; split: train or test; image_size: pixels (None: the preset's).
    Raises Stop for an unknown name, missing data, no network; and naming all unreadable images."""
    check(name in Config.PRESETS and split in SHAPE_SPLITS,
          f"no split {split} of {name}: choose train or test of {', '.join(Config.PRESETS)}")
    size = image_size or Config.PRESETS[name].get("image_size", Config.image_size)
    if name in FINE:
        n, seed = SHAPE_SPLITS[split]
        return make_shapes(n, size, seed, fine=FINE[name])
    root = Path(data_dir)
    def open_set():
        with explained(f"{name} cannot be read in {root}: check --data-dir and the network"):
            return data_sets[name](root, split == "train")
    key = [name]
    extra = {}
    if name == "folder":                                # its files may change
        items, classes, left_out, files = open_set()
        span = cached(root / "prototype-folder-range.pt", [stamp(file) for file in files],
                      lambda old: value_range(files))
        key = [*classes, *(stamp(file, span) for file, _ in items)]
        extra = dict(span=span, left_out=", ".join(f"{n} {what}" for what, n in left_out.items()))
    def make(old):
        items, classes, *_ = open_set()
        made = decode_all(items, size, extra.get("span"), old)
        key.extend(made["faults"])                      # not in the next key: tried again
        return dict(classes=classes, **made)
    found = cached(root / f"prototype-{name}-{split}-{size}.pt", key, make)
    check(not found["faults"], f"replace or take away: {'; '.join(sorted(found['faults']))}")
    labels = found["labels"] if found["classes"] else None
    return Dataset(found["images"], labels, found["classes"], **extra)

def load_sets(cfg):
    """The training set and the held-out set of a run; of one channel if all images are grey."""
    sets = [load_dataset(cfg.dataset, split, cfg.image_size, cfg.data_dir)
            for split in ("train", "test")]
    check(sets[0].classes or not cfg.labelled, "the images have no classes: use train/<class>/*")
    progress(f"{cfg.dataset}: {sets[0]}; and {len(sets[1].images):,} held-out images", "\n")
    if all((data.images == data.images[:, :1]).all() for data in sets):
        for data in sets:
            data.images = data.images[:, :1].clone()
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
    """A short text that tells these tensors (None: left out) from others."""
    text = hashlib.sha1()
    for tensor in tensors:
        if tensor is not None:
            text.update(tensor.numpy())
    return text.hexdigest()

def evenly(targets, n):
    """n rows, in the proportions of targets [N]: the sorted targets, read at n even spacings."""
    return targets.sort().values[((torch.arange(n) + 0.5) / n * len(targets)).long()]

def nearest_prototypes(z, prototypes):
    """z [N, D], prototypes [C, K, D] -> each class's nearest: distance (no square), k, [N, C]."""
    return torch.cdist(z, prototypes.flatten(0, 1)).view(len(z), *prototypes.shape[:2]).min(-1)

@torch.no_grad()
def start_at_class_means(learner, data, device):
    """Centre the untrained features of `data`, and set the prototypes [C, K, D] to their class
    means; K of a class to those of K parts of its images. choice: so classes that look alike start
    close. An odd image is left out, since batch norm cannot take a last batch of one."""
    n = len(data.images) // 2 * 2 or 1
    z = features_of(learner, data.images[:n], device).to(device)            # [N, D]
    learner[-1].bias -= z.mean(0)
    z -= z.mean(0)
    for label, own in enumerate(learner.prototypes):    # [K, D]
        parts = z[data.labels[:n] == label].tensor_split(len(own))
        own.copy_(torch.stack([part.mean(0) for part in parts]).nan_to_num())       # of no image: 0

def load_classes(cfg):
    """load_sets, with the first --images-per-class of each class in training -> training set,
    held-out set, and the whole training set, of which the judge learns."""
    whole, test = load_sets(cfg)
    few = whole
    if cfg.images_per_class:
        index = torch.cat([(whole.labels == c).nonzero()[:cfg.images_per_class, 0]
                           for c in range(len(whole.classes))])
        few = dataclasses.replace(whole, images=whole.images[index], labels=whole.labels[index])
    return few, test, whole

# ---- Classifiers, such as the judge of samples ---------------------------------------------------

def resnet(channels, side, width=64, imagenet=False):
    """torchvision's ResNet-18 without its last layer: [B, channels, side, side] -> [B, 8 width]."""
    check(not imagenet or width == 64, "--imagenet has weights of width 64: add --learner-width 64")
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
def features_of(net, images, device):
    """net(x) in float32 on the CPU for all uint8 images [N, C, H, W], as x in [-1, 1]."""
    parts = torch.arange(len(images)).split(500)
    return torch.cat([net(scaled(images, part, device)).float().cpu() for part in parts])

def load_judge(cfg, data, device):
    """The judge: a classifier trained on real images, apart from any run, and kept beside the data.
    Returns its features, its last layer, and the moments of its features of the training images."""
    torch.manual_seed(seed_of("judge"))
    features = resnet(*data.images.shape[1:3], cfg.judge_width)
    net = placed(nn.Sequential(features, nn.Linear(8 * cfg.judge_width, len(data.classes))), device)
    def make(old):
        real = data
        if cfg.dataset in FINE:                         # there are as many more as one likes
            real = load_dataset(cfg.dataset, "judge", cfg.image_size)
        fit(net, real.images, real.labels, F.cross_entropy, cfg.judge_steps, cfg, "judge")
        z = features_of(features, data.images, device)
        return dict(net=net.state_dict(), moments=moments(z))
    name = f"prototype-judge-{cfg.dataset}-{cfg.image_size}-{cfg.judge_width}-{cfg.judge_steps}.pt"
    key = [fingerprint(data.images, data.labels), cfg.mirror]
    saved = cached(Path(cfg.data_dir, name), key, make)
    net.load_state_dict(saved["net"])
    return SimpleNamespace(features=features.eval(), last=net[1].cpu(), moments=saved["moments"])

def as_many(data, n):
    """n images of a set, or all, and their labels: the distance depends on how many it sees."""
    index = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))[:n]
    return data.images[index], data.labels[index]

@torch.no_grad()
def judge_images(judge, images, labels, device):
    """uint8 images and the labels they should have -> accuracy and Frechet distance, as a dict.
    The distance is to the training images, in the features of this one classifier: not FID."""
    z = features_of(judge.features, images, device)
    right = (judge.last(z).argmax(1) == labels).float().mean().item()
    return dict(accuracy=right, frechet=frechet_distance(*moments(z), *judge.moments))

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
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(0))
    scores = []
    for part in logits[order].double().tensor_split(min(splits, len(logits))):
        log_p = part.log_softmax(1)
        log_mean = log_p.logsumexp(0) - math.log(len(part))
        scores.append((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp().item())
    return np.mean(scores).item(), np.std(scores).item()

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
    return np.mean(distances).item(), np.std(distances).item()

def fid_inception():
    """The Inception network of published FIDs, without weights: torchvision's with 1008 outputs.
    The average pools of the A, C and first E blocks leave the padding out, which dividing by the
    pooled ones does; the last E block pools by maximum."""
    net = torchvision.models.inception_v3(weights=None, num_classes=1008, aux_logits=False,
                                          init_weights=False)
    def without_padding(module, pooled):
        return pooled[0] / F.avg_pool2d(torch.ones_like(pooled[0][:1, :1]), 3, stride=1, padding=1)
    for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
        getattr(net, f"Mixed_{name}").branch_pool.register_forward_pre_hook(without_padding)
    seen = []
    net.Mixed_7c.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    net.Mixed_7c.branch_pool.register_forward_pre_hook(
        lambda module, args: F.max_pool2d(seen.pop(), 3, 1, padding=1))
    return net.eval().requires_grad_(False)

@torch.no_grad()
def inception_features(net, images, device):
    """uint8 [N, C, H, W] -> features [N, 2048] as in pytorch-fid, logits without bias [N, 1008]."""
    head = net.fc
    net.fc = nn.Identity()
    features = []
    for part in images.split(100):
        x = part.to(device).expand(-1, 3, -1, -1).float() / 255
        x = F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False)
        features.append(net(2 * x - 1).cpu())
    net.fc = head
    features = torch.cat(features)
    return features, features @ head.weight.T.cpu()

INCEPTION = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
             "pt_inception-2015-12-05-6726825d.pth")

def inception_metrics(cfg, samples, real, device):
    """FID, IS, KID of uint8 samples against all training images; {} without weights, and a line."""
    try:
        with explained("FID, IS, KID: not computed; ask with --inception download, or FILE"):
            check(cfg.inception != "off", "now off")
            net = fid_inception()
            if cfg.inception == "download":
                weights = torch.hub.load_state_dict_from_url(INCEPTION, check_hash=True)
            else:
                weights = torch.load(cfg.inception)
            net.load_state_dict(weights)
    except Stop as error:
        progress(str(error), "\n")
        return {}
    net.to(device)
    def make(old):
        features, _ = inception_features(net, real, device)
        some = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:10_000]
        return dict(moments=moments(features), features=features[some])
    path = Path(cfg.data_dir, f"prototype-inception-{cfg.dataset}-{cfg.image_size}.pt")
    weights = torch.cat([w.flatten().float() for w in net.state_dict().values()]).cpu()
    reference = cached(path, [fingerprint(real), fingerprint(weights)], make)
    features, logits = inception_features(net, samples, device)
    fid = frechet_distance(*moments(features), *reference["moments"])
    values = [fid, *kernel_distance(features, reference["features"]), *inception_score(logits)]
    n = "" if len(samples) >= 50_000 else f"_{len(samples) / 1000:g}k"      # fewer: another number
    names = [f"fid{n}", f"kid{n}", f"kid{n}_std", f"is{n}", f"is{n}_std"]
    return {name: x for name, x in zip(names, values) if not math.isnan(x)}     # KID of one image

# ---- Pictures ------------------------------------------------------------------------------------

@contextlib.contextmanager
def drawing(path, width, height):
    """A figure of that many inches, saved to path at the end. A $ in a text begins no formula."""
    with matplotlib.rc_context({"text.parse_math": False}):
        fig = Figure(figsize=(width, height), layout="constrained")
        yield fig
        fig.savefig(path, dpi=120)

def draw_grid(path, images, rows, title, columns=(), size=0.55):
    """uint8 images [R * n, C, H, W], `size` inches each, as R named rows of n, named columns."""
    n = len(images) // len(rows)
    centres = (np.arange(max(n, len(rows))) + 0.5) * (images.shape[-1] + 1)
    tiles = torchvision.utils.make_grid(images, n, padding=1, pad_value=255)
    left = max(1.5, 0.3 + 0.1 * max(map(len, rows)))    # inches for their names
    with drawing(path, left + size * n, 0.7 + size * len(rows)) as fig:
        axes = fig.subplots()
        axes.imshow(tiles.permute(1, 2, 0), interpolation="nearest")
        axes.set_yticks(centres[:len(rows)], rows)
        axes.set_xticks(centres[:len(columns)], columns, fontsize="small")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        fig.suptitle(title, fontsize="medium", wrap="$" not in title)    # else a formula

def draw_samples(path, images, labels, names, title):
    """samples.png: a row for each label that occurs (the first 20), of up to 10 images."""
    present = labels.unique().tolist()[:20]
    tiles = images.new_full((len(present), 10, *images.shape[1:]), 255)
    for row, label in zip(tiles, present):
        some = images[labels == label][:10]
        row[:len(some)] = some
    draw_grid(path, tiles.flatten(0, 1), [names[label] for label in present], title)

def draw_denoising(path, cfg, run, conditions, names):
    """denoising.png: an image for each condition [N], with its name, on its way from noise."""
    trace = []
    final = generate(dataclasses.replace(cfg, sample_batch=len(names)), run, conditions, trace)
    chosen = [trace[i] for i in np.linspace(0, len(trace) - 1, 8).round().astype(int)]
    tiles = torch.stack([*(to_uint8(x) for _, x in chosen), final], 1).flatten(0, 1)
    title = f"{cfg.sample_steps} {cfg.sampler} steps from noise to a sample (t: noise level)"
    draw_grid(path, tiles, names, title, [*(f"t={t}" for t, _ in chosen), "sample"])

def draw_curves(path, groups, names):
    """Columns of the logs of runs (group -> list of metrics.json) over steps, and over all seconds.
    A group of several runs gets its mean at the end, with the 95 % interval."""
    with drawing(path, 3 * len(names), 6) as fig:
        for name, (steps, clock) in zip(names, fig.subplots(2, len(names), squeeze=False).T):
            for i, (group, runs) in enumerate(groups.items()):
                for run in runs:
                    rows = [row for row in run["log"] if name in row]
                    values = [row[name] for row in rows]
                    seconds = [run["seconds_before"] + row["seconds"] for row in rows]
                    steps.plot([row["step"] for row in rows], values, ".-", color=f"C{i}")
                    clock.plot(seconds, values, ".-", color=f"C{i}")
                if len(runs) > 1:
                    mean, half = mean_interval([run["log"][-1].get(name, math.nan) for run in runs])
                    steps.errorbar(runs[0]["step"], mean, half, fmt="o", capsize=6, color=f"C{i}")
                clock.plot([], [], color=f"C{i}", label=group)
            steps.set(title=name, xlabel="training step")
            clock.set_xlabel("seconds, with all before training")
        fig.legend(*clock.get_legend_handles_labels(), loc="outside upper center")

def draw_prototypes(path, learner, data, device, most=40):
    """Stage 1 on held-out data: prototypes.png, of so many classes, and figures as a dict."""
    z = features_of(learner, data.images, device)
    found = nearest_prototypes(z, learner.prototypes.cpu()).values.argmin(1)
    accuracy = (found == data.labels).float().mean().item()
    prototypes = learner.prototypes[:most].cpu()        # [C, K, D]
    flat = prototypes.flatten(0, 1)
    apart = torch.cdist(flat, flat)
    plane = torch.linalg.eigh(moments(z)[1]).eigenvectors[:, -2:].float()   # principal components
    with drawing(path, 12, 5.5) as fig:
        matrix, map = fig.subplots(1, 2)
        fig.colorbar(matrix.imshow(apart))
        matrix.set_title("distances between prototypes")
        ticks = range(0, len(flat), prototypes.shape[1])
        size = min(10, 200 / len(prototypes))           # of letters
        matrix.set_xticks(ticks, data.classes[:most], rotation=90, fontsize=size)
        matrix.set_yticks(ticks, data.classes[:most], fontsize=size)
        map.set_title(f"prototypes (stars), held-out images ({accuracy:.1%} recognised)")
        map.scatter(*(z @ plane).T, s=1, c=data.labels, cmap="tab10")
        for c, stars in enumerate(prototypes @ plane):
            map.plot(*stars.T, "k*", markersize=12)
            if len(prototypes) <= 20:                   # more would hide one another
                own = z[data.labels == c] @ plane       # none, if no such image is held out
                centre = own.mean(0) if len(own) else stars[0]
                map.annotate(data.classes[c], stars[0], centre, ha="center", fontsize=size,
                             arrowprops=dict(arrowstyle="-"))
    return dict(stage1_accuracy=accuracy, prototype_norm=flat.norm(dim=1).mean().item(),
                prototype_distance=apart.mean().item())

# ---- Devices and random numbers ------------------------------------------------------------------

def find_device(name):
    """auto, cuda, cuda:1, mps or cpu -> torch.device, ready. Raises Stop if it is not there."""
    if name == "auto":
        found = torch.accelerator.is_available()
        name = torch.accelerator.current_accelerator().type if found else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    with explained(f"--device {name} is not there: try cpu"):
        device = torch.zeros(1, device=name).device
    torch.backends.cudnn.benchmark = True
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if device.type == "cpu":                            # plain products are fastest here
        torch.backends.cuda.enable_flash_sdp(False)     # the CPU's too, in spite of its name
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    return device

def placed(net, device):
    """The network on the device. On a CPU bfloat16 is up to 40 times slower in channels_last."""
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    return net.to(device, memory_format=layout)

def amp_dtype(device, amp):
    """--amp -> torch.bfloat16, float16 or None. auto: bfloat16 where the hardware has it."""
    if amp == "auto" and device.type == "cuda":         # cards before capability 8 emulate bfloat16
        amp = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    if amp == "auto" and device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        amp = "bf16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)

def autocast(device, amp):
    """Mixed precision for the networks."""
    dtype = amp_dtype(device, amp)
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)

def seed_of(*key):
    """One 32-bit seed from the seed of the run, a purpose in words, and numbers like the step."""
    return int(hashlib.sha1(repr(key).encode()).hexdigest()[:8], 16)

def random_index(N, n, *key):
    """Which n of N images a step sees, [n]. choice: with replacement. It follows from the key."""
    return torch.randint(N, (n,), generator=torch.Generator().manual_seed(seed_of(*key)))

# ---- Files: a run is a folder --------------------------------------------------------------------

@contextlib.contextmanager
def replacing(path):
    """Yields a temporary neighbour of the file `path`, open for bytes, which takes its place at the
    end: a kill leaves the old file or the new one. Raises Stop if it cannot be written."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    with explained(f"{path} cannot be written"):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                yield file
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

def save_safely(content, path):
    """torch.save, all or nothing."""
    with replacing(path) as file:
        torch.save(content, file)

def save_json(content, path):
    """A .json file, all or nothing."""
    with replacing(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())

def read_json(path):
    """The dict in a run's .json file. Raises Stop if there is none."""
    with explained(f"{path.parent} is not the folder of a run: its {path.name} cannot be read"):
        return dict(json.loads(path.read_text(encoding="utf-8")))

def cached(path, key, make):
    """What make(old) returns, kept in `path` for the next time that the key is the same.
    old: what was kept for another key, or None."""
    old = None
    with contextlib.suppress(Exception):                # there is none, or not a whole one
        saved = torch.load(path, map_location="cpu")
        old = saved["content"]
        if saved["key"] == key:
            return old
    content = make(old)
    try:
        save_safely(dict(key=key, content=content), path)
    except Stop as error:
        progress(f"note: {error}; it will be made again next time", end="\n")
    return content

def new_folder(wanted):
    """Make the folder `wanted`, or the first of wanted-2, -3, ... that is not there. What is there
    is left alone, even if empty: so two runs that start together never share a folder."""
    folder = Path(wanted)
    number = 1
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1
            folder = Path(f"{Path(wanted)}-{number}")

def save_checkpoint(folder, step, known, log, parts):
    """checkpoint.pt. parts: name -> module, optimiser or scaler."""
    states = {name: part.state_dict() for name, part in parts.items()}
    state = dict(script=SCRIPT, step=step, known=known, log=log, **states)
    save_safely(state, folder / "checkpoint.pt")

def load_checkpoint(folder):
    """checkpoint.pt, on the CPU. Raises Stop if it is missing, damaged or of another script."""
    with explained(f"{folder} has no checkpoint.pt of this script, --resume it first"):
        state = torch.load(folder / "checkpoint.pt", map_location="cpu")
        check(state["script"] == SCRIPT, f"it is of {state['script']}.py")
        return state

def restore(parts, state):
    """Load the state of each part (name -> module, optimiser, scaler) that has one at this step."""
    with explained("checkpoint.pt holds another network than config.json beside it describes"):
        for name, part in parts.items():
            if state.get(name):
                part.load_state_dict(state[name])

def load_run(folder, device="auto"):
    """A run: config, model (the average, in eval mode), known, step, log, device, whole state."""
    folder = Path(folder)
    device = find_device(device)
    cfg = Config(**read_json(folder / "config.json"))
    state = load_checkpoint(folder)
    model = placed(cfg.build(state["known"]), device).eval().requires_grad_(False)
    restore(dict(average=model), state)
    return SimpleNamespace(config=cfg, model=model, device=device, known=state["known"],
                           step=state["step"], log=state["log"], state=state)

def mean_losses(history):
    """Means of losses, dicts of scalars, over steps and processes -> dict. Waits for the device."""
    means = torch.stack([torch.stack([*losses.values()]).detach() for losses in history]).mean(0)
    if WORLD > 1:
        dist.all_reduce(means)
    return dict(zip(history[0], (means / WORLD).tolist()))

@torch.no_grad()
def is_sound(model, batch, abar, cfg):
    """May these weights be saved? Their noise loss, in float32, should not be far above 1, which
    predicting zeros has. All of torchrun's processes get the same answer."""
    losses = model.eval()(batch, abar, cfg)
    model.train()
    noise = losses.get("diffusion", losses["loss"])
    return not in_any_process(not noise <= 10, noise.device)

def write_csv(path, rows):
    """Rows (dicts) as a CSV file; its header has all their keys; what a row lacks stays empty."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row))
        writer.writeheader()
        writer.writerows(rows)

def print_new_steps(run, cfg):
    """What --resume does if the number of steps is another one."""
    if run.step >= cfg.steps:
        progress(f"step {run.step} of {cfg.steps}: there is nothing left to train", "\n")
    elif run.step and cfg.steps != run.config.steps:
        rate = learning_rate(run.step, run.config)
        progress(f"for {cfg.steps} steps in all, the learning rate goes from {rate:.2g} to "
                 f"{learning_rate(run.step, cfg):.2g}, and then on down to 0", "\n")

def progress(text, end="\r"):
    """A line, which the next one overwrites if it ends with a return: those only on a terminal."""
    if RANK == 0 and (end == "\n" or sys.stdout.isatty()):
        print(f"{text:79}", end=end, flush=True)

@contextlib.contextmanager
def on_signals(handler):
    """Inside, Ctrl-C and SIGTERM call handler(number, frame); not in a thread, which may not."""
    before = {}
    with contextlib.suppress(ValueError):
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)

def interrupt(number, frame):
    """Stop at once: a KeyboardInterrupt that knows its signal."""
    raise KeyboardInterrupt(number)

@contextlib.contextmanager
def interruptible():
    """Yields a list that gets the numbers of such signals, so that a step can end first. A second
    one stops at once, but not under torchrun, which sends each of them twice."""
    interrupts = []
    def note(number, frame):
        if interrupts and WORLD == 1:
            interrupt(number, frame)
        interrupts.append(number)
    with on_signals(note):
        yield interrupts

def in_any_process(flag, device):
    """Is the flag set in one of torchrun's processes? All of them get the same answer."""
    if WORLD == 1:
        return flag
    total = torch.tensor(float(flag), device=device)
    dist.all_reduce(total)
    return total.item() > 0

# ---- Tasks: train, sample, evaluate, compare -----------------------------------------------------

def new_run(cfg, sets, folder, device):
    """All that comes before training: config.json, and the checkpoint of step 0.
    known: shape, classes and span (see Dataset) of the images, their fingerprint, seconds that this
    took, and what model.begin returns: targets [N], figures, and what the method needs."""
    start = time.perf_counter()
    save_json(vars(cfg), folder / "config.json")
    images = sets[0].images
    known = dict(shape=images.shape[1:], classes=sets[0].classes, span=sets[0].span,
                 images=fingerprint(images, sets[0].labels))
    torch.manual_seed(cfg.seed)                         # the same network whatever the prototypes
    model = cfg.build(known)
    known.update(model.begin(cfg, sets, folder, device))
    known["seconds"] = time.perf_counter() - start
    log = dict(rows=[], seconds=0.0, skipped=0.0)
    save_checkpoint(folder, 0, known, log, dict(model=model, average=model))

def train_run(cfg, given, device, load=load_sets):
    """Start or go on with a run, alone or as one of torchrun's processes -> folder, data sets."""
    if WORLD > 1:                                       # the others wait while the first decodes
        backend = "nccl" if device.type == "cuda" else "gloo"
        with explained("torchrun's processes do not find each other"):
            dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))
    if RANK == 0:
        sets = load(cfg)                                # faults show before a folder is made
        given.folder = given.task[1] or new_folder(given.out or f"runs/{SCRIPT}-{cfg.dataset}")
        progress(f"{given.folder}, on {device}", "\n")
        if not (given.folder / "checkpoint.pt").exists():
            new_run(cfg, sets, given.folder, device)
    if WORLD > 1:
        shared = [given.folder]
        with explained("the first process has stopped"):
            dist.broadcast_object_list(shared)
        given.folder = shared[0]
    if RANK > 0:
        sets = load(cfg)
    train(cfg, sets, given.folder, device)
    if WORLD > 1:
        dist.destroy_process_group()
    return given.folder, sets

def asked_labels(text, classes):
    """Text like 0,3 or circle,"a, b" -> class numbers; all if empty. Numbers count from 0, but if a
    class is called by a number they are names. Raises Stop for any other."""
    numbers = {} if any(name.isdecimal() for name in classes) else map(str, range(len(classes)))
    label = {word: i for names in (numbers, classes) for i, word in enumerate(names)}
    with explained(f"'{text}': give 0 to {len(classes) - 1}, or of {', '.join(classes[:20])}"):
        words = next(csv.reader([readable(text)], skipinitialspace=True)) if text else classes
        return [label[word] for word in words]

def sample_classes(cfg, run, rows, folder):
    """Samples for rows of the table [N] -> uint8 [N, C, H, W]; samples.png, samples.npz.
    samples.npz, for the guided-diffusion evaluator: arr_0 uint8 [N, H, W, C], arr_1 labels; and
    classes, their names."""
    images = generate(cfg, run, rows)
    labels = rows // cfg.prototypes_per_class
    np.savez(folder / "samples.npz", arr_0=images.permute(0, 2, 3, 1), arr_1=labels,
             classes=run.known["classes"])
    title = f"{cfg.prototypes} prototypes, step {run.step}, guidance {cfg.guidance}, {cfg.sampler}"
    draw_samples(folder / "samples.png", images, labels, run.known["classes"], title)
    return images

def evaluate_classes(cfg, run, sets, folder):
    """Samples, pictures and metrics.json of a trained run, in `folder`."""
    K = cfg.prototypes_per_class
    figures = {}
    try:
        start = time.perf_counter()
        rows = evenly(run.known["targets"], cfg.num_samples)
        images = sample_classes(cfg, run, rows, folder)
        figures["seconds_sampling"] = time.perf_counter() - start
        names = run.known["classes"][:10]
        draw_denoising(folder / "denoising.png", cfg, run, K * torch.arange(len(names)), names)
        judge = load_judge(cfg, sets[2], run.device)
        figures.update(judge_images(judge, images, rows // K, run.device))
        real = judge_images(judge, *as_many(sets[1], cfg.num_samples), run.device)
        figures.update({f"real_{name}": value for name, value in real.items()})
        figures.update(inception_metrics(cfg, images, sets[2].images, run.device))
    finally:                                            # whatever fails, keep what was measured
        write_metrics(cfg, run, figures, folder)

def write_metrics(cfg, run, figures, folder):
    """metrics.json: figures, also printed, with settings, machine and log; and curves.png."""
    machine = f"{os.cpu_count()} CPU cores"
    if run.device.type == "cuda":
        machine = torch.cuda.get_device_name(run.device)
    figures.update(run.known["figures"], seconds_before=run.known["seconds"],
                   seconds_training=run.log["seconds"],
                   parameters=sum(p.numel() for p in run.model.parameters()))
    metrics = dict(script=SCRIPT, step=run.step, machine=machine, torch=torch.__version__,
                   classes=run.known["classes"], settings=vars(cfg), log=run.log["rows"], **figures)
    save_json(metrics, folder / "metrics.json")
    if run.log["rows"]:
        names = [n for n in run.log["rows"][-1] if n not in ("step", "seconds", "lr", "skipped")]
        draw_curves(folder / "curves.png", {folder.name: [metrics]}, names)
    for name, value in figures.items():
        print(f"  {name:40} {value:,.4g}")
    print(f"{folder}: {cfg.num_samples} samples, on {machine}; frechet is no FID")

# Student's t at 97.5 % for 1 to 9 degrees of freedom; the last serves for more, on the safe side.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

def mean_interval(values):
    """Mean of n values, and half its 95 % interval by Student's t; NaN for one value."""
    n = len(values)
    if n == 1:
        return values[0], math.nan
    return np.mean(values), T_95[min(n - 2, 8)] * np.std(values, ddof=1) / math.sqrt(n)

def compare(folders, out):
    """Finished runs: a table of all figures, printed and in comparison.csv; and comparison.png.
    Runs that differ only in their seed are a group, named by the settings in which groups
    differ."""
    runs = []
    for folder in folders:
        run = read_json(Path(folder, "metrics.json"))
        trained = run.get("script") == SCRIPT and run.get("log")
        check(trained, f"{folder} is not a trained run of this version of {SCRIPT}.py")
        runs.append(run)
    differ = [name for name, value in runs[0]["settings"].items()
              if name not in ("seed", "data_dir", "device", "save_every", "eval_every")
              and any(run["settings"].get(name) != value for run in runs)]
    groups = {}
    for run in runs:
        group = ", ".join(f"{name} {run['settings'].get(name)}" for name in differ)
        groups.setdefault(group or "all runs", []).append(run)
    table = []
    for figure in dict.fromkeys(name for run in runs for name in run
                                if isinstance(run[name], (int, float))):
        for group, members in groups.items():
            mean, half = mean_interval([run.get(figure, math.nan) for run in members])
            table.append(dict(figure=figure, group=group, runs=len(members), mean=mean, half=half))
            print(f"{figure:20} {group:40} {mean:12,.5g} +- {half:.2g} ({len(members)})")
    folder = new_folder(out or "runs/comparison")
    write_csv(folder / "comparison.csv", table)
    measured = [name for name in runs[0]["log"][-1] if name in runs[0] and name != "step"]
    draw_curves(folder / "comparison.png", groups, ["loss", *measured])
    print(f"{folder}: mean, half of the 95 % interval, and number of runs")

# ---- Command line --------------------------------------------------------------------------------

def settings_parser(*tasks):
    """A parser with a flag for every setting, and for tasks, each with an earlier run's folder."""
    helps = dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(Config), re.MULTILINE))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    for f in dataclasses.fields(Config):
        options = dict(type=type(f.default), choices=get_args(f.type) or None)
        if f.type is bool:
            options = dict(action=argparse.BooleanOptionalAction)
        parser.add_argument(f"--{f.name.replace('_', '-')}", default=argparse.SUPPRESS,
                            help=f"{helps.get(f.name)} [{f.default}]", **options)
    parser.add_argument("--out", help="folder for what is made; nothing is written over")
    group = parser.add_mutually_exclusive_group()
    for task in tasks:
        group.add_argument(f"--{task}", dest="task", metavar="RUN", help=f"{task} an earlier run",
                           type=lambda folder, task=task: (task, Path(folder)))
    group.add_argument("--compare", metavar="RUN", nargs="+", help="a table of finished runs")
    parser.set_defaults(task=("train", None), folder=None)
    return parser

def read_settings(given):
    """Defaults, the data set's preset, an earlier run's settings, the flags, each over the former.
    Raises Stop for impossible values. Whole numbers with a default above 0 must be at least 1."""
    defaults = vars(Config())
    names = [*defaults]
    flags = {name: value for name, value in vars(given).items() if name in defaults}
    task, earlier = given.task
    check(WORLD == 1 or task in ("train", "resume"), f"--{task} works in one process")
    check(RANK < WORLD and (WORLD > 1 or TORCHRUN in ([None, None], ["0", "1"])), "RANK and "
          f"WORLD_SIZE are {TORCHRUN} and not as torchrun sets them: unset them, or use torchrun")
    saved = read_json(earlier / "config.json") if earlier else {}
    with explained(f"{earlier} is of another version of this script"):
        preset = Config.PRESETS[{**defaults, **saved, **flags}["dataset"]]
        cfg = Config(**{**preset, **saved, **flags})
    cfg.data_dir = os.path.abspath(cfg.data_dir)        # where the run goes on may be elsewhere
    for name, value in vars(cfg).items():
        flag = f"--{name.replace('_', '-')} {value}"
        if not isinstance(value, str):
            least = min(1, defaults[name]) if type(value) is int and name != "attention" else 0
            check(value >= least, f"{flag} must be at least {least}")
        if saved and names.index(name) < names.index("steps") and name != "data_dir":
            wanted = saved.get(name)
            check(value == wanted, f"{flag}: the run has {wanted}, start a new one")
    check(re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", cfg.multipliers) and cfg.channels % 4 == 0
          and cfg.image_size % 2 ** cfg.multipliers.count(",") == 0, "give --multipliers like "
          "1,2,2,2, --image-size divisible by 2 at every comma, --channels divisible by 4")
    check(cfg.batch_size % (WORLD * cfg.accumulate) == 0,
          "--batch-size does not divide by the processes times the passes (--accumulate)")
    alpha_bars(cfg.timesteps)                           # raises Stop if they are too few
    check(cfg.sample_steps <= cfg.timesteps, "--sample-steps cannot be more than --timesteps")
    for name in ("dropout", "warmup", "null_prob", "hide", "bias", "emphasis"):
        check(getattr(cfg, name, 0) <= 1, f"--{name.replace('_', '-')} cannot be more than 1")
    return cfg

def exit_status(task, given):
    """Run task(given) -> 0; 2 after one sentence for what a person can put right; 130 for Ctrl-C,
    143 for SIGTERM."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):       # a notebook's
            stream.reconfigure(errors="backslashreplace")
    try:
        with on_signals(interrupt):
            task(given)
            print(end="", flush=True)
        return 0
    except KeyboardInterrupt as stop:
        advice = ""
        if given.folder:
            command = ["python", __file__, "--resume", given.folder.as_posix()]
            advice = f"; go on with: {shlex.join(command)}"
        print(f"\ninterrupted{advice}", file=sys.stderr)
        return 128 + (stop.args or [signal.SIGINT])[0]
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        fault = "stopped, for what should read the output (| head) has ended"
    except Stop as error:
        fault = error
    except OSError as error:
        fault = reason(error)
    except (RuntimeError, MemoryError) as error:
        module = type(error).__module__
        fault = "memory ran out: lower --batch-size, --sample-batch or raise --accumulate"
        if RANK > 0:
            fault = f"stopped with another process ({reason(error)})"
        elif module.startswith(("torch._inductor", "torch._dynamo")):
            fault = f"leave out --compile, which does not work here ({reason(error)})"
        elif isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise
    with contextlib.suppress(BrokenPipeError):
        print(f"\n{SCRIPT}: {fault}", file=sys.stderr)
    return 2

def protodiffusion(given):
    """Do what the command line asks for."""
    if given.compare:
        return compare(given.compare, given.out)
    cfg = read_settings(given)
    task, folder = given.task
    if task in ("train", "resume"):
        folder, sets = train_run(cfg, given, find_device(cfg.device), load_classes)
        if RANK == 0:
            evaluate_classes(cfg, load_run(folder, cfg.device), sets, folder)
        return
    run = load_run(folder, cfg.device)
    if task == "evaluate":
        out = new_folder(given.out or folder / "evaluation")
        evaluate_classes(cfg, run, load_classes(cfg), out)
    else:
        targets = run.known["targets"]
        labels = asked_labels(given.labels, run.known["classes"])
        own = torch.isin(targets // cfg.prototypes_per_class, torch.tensor(labels))
        rows = evenly(targets[own], cfg.num_samples)
        sample_classes(cfg, run, rows, new_folder(given.out or folder / "samples"))

def main(argv=None):
    """The command line. Returns the exit status, see exit_status."""
    parser = settings_parser("resume", "sample", "evaluate")
    parser.add_argument("--labels", default="", help="--sample: classes, like 0,3 or circle,star")
    return exit_status(protodiffusion, parser.parse_args(argv))

if __name__ == "__main__":
    sys.exit(main())
