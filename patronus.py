"""Patronus: a diffusion model conditioned on prototypes of local patterns.

Paper: Weng et al., "Patronus: Interpretable Diffusion Models with Prototypes", arXiv 2503.22782.

The idea. A small encoder turns the clean image into a map of patch features z. For each of m
prototypes p, the patch closest to p gives one activation s_j: the closer, the larger. The denoiser
is conditioned on s alone; encoder, prototypes and denoiser learn together, without labels. So s is
all the model is given of x0 beside xt: one looks at it (what, where, when) and changes it (edit,
interpolate). If changing one trait changes another, the model tied them. Ours, above all: some
prototypes see the whole image, and an MLP draws a sketch from s, beside which xt is denoised.

    clean image x0 ──> encoder ──> patches z ──> for each p: least ||z - p||^2 over z ─────> s [m]
                                                                                             │
             noise level t ──> sinusoids ──> MLP ─────────────────────── (+) <── MLP <───────┤
                                                                          │                  │
        noisy image xt ──────> every residual block of a U-Net <──────────┘ ──> noise        │
     beside the sketch <── MLP <─────────────────────────────────────────────────────────────┘

To make new images, a second diffusion model draws s.

    python patronus.py                              # shapes: train, explain, measure
    python patronus.py --bias 0.95 --sketch 0       # plants a correlation, which a sketch breaks
    python patronus.py --edit image.png --model runs/NAME --set 12=2.5      # s_12 becomes 2.5

"choice:" marks where the paper is silent or we differ, "# exercise" functions to write again from
their docstrings. To change what a patch is, look at patch_encoder; how prototypes answer, at
activation; how s enters, at Patronus.denoise; how images are edited, at set_activations."""
import argparse
import contextlib
import copy
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

@dataclasses.dataclass
class Config:
    """Every setting is a flag; its comment is its help."""
    dataset: Literal["shapes", "folder", "fashion-mnist", "cifar10", "celeba"] = "shapes"  # images
    image_size: int = 16            # side of the images, pixels
    bias: float = 0.5               # shapes: P(dot if, and only if, warm); 0.5: independent
    # prototypes
    num_prototypes: int = 96        # m, number of prototypes
    global_prototypes: float = 0.33 # share of prototypes of whole images, not patches; paper: 0
    patch: int = 5                  # side of a patch: a dot fits; paper: 15, from 128 pixels on 61
    prototype_dim: int = 32         # D, numbers in a prototype and in a patch's feature
    start: Literal["features", "uniform"] = "features"  # of prototypes: real patches, or 0..1
    sketch: float = 1.0             # weight of the loss of the sketch drawn from s; paper: 0, none
    hide: float = 0.05              # probability of dropping each activation in training; paper: 0
    emphasis: float = 0.3           # the loss at level t weighs abar_t ** -emphasis; paper: 0
    # network and process
    channels: int = 32              # channels of the U-Net's first level, a multiple of 4
    multipliers: str = "1,1,2"      # channel factor of each level of the U-Net
    blocks: int = 1                 # residual blocks for each level
    attention: int = 0              # self-attention at sides up to this; the middle has it
    dropout: float = 0.0            # dropout in residual blocks
    timesteps: int = 1000           # T, number of noise levels
    latent_width: int = 256         # width of the latent model's layers, even
    latent_timesteps: int = 100     # noise levels of the latent model
    latent_steps: int = 2000        # steps of the latent model, of 256 activation vectors each
    weight_decay: float = 1e-4      # weight decay of AdamW
    # training: from here on --resume may change settings
    steps: int = 5000               # optimiser steps
    batch_size: int = 32            # images for each step, over all processes
    lr: float = 2e-3                # peak learning rate
    warmup: float = 0.05            # fraction of steps in which the learning rate rises
    mirror: bool = False            # show half of the training images flipped left to right
    save_every: int = 100           # steps between checkpoints, and rows of log.csv
    eval_every: int = 0             # steps between measurements while training; 0: none
    compile: bool = False           # torch.compile the training step
    # measuring: from here on --evaluate may, too
    pairs: int = 120                # (prototype, image) pairs: does s_j grow if raised?
    inception: str = "off"          # weights for FID, IS and KID: a file, or download
    # diagnosis: from here on --diagnose may, too
    attribute: str = ""             # diagnosis: the trait to move; empty: the first that varies
    watch: str = ""                 # diagnosis: the trait that may follow; empty: the last
    # explaining: from here on --explain may, too
    data_dir: str = "data"          # where data lie or are downloaded to; the folder of images
    judge_steps: int = 300          # steps of the judge, a classifier of traits trained apart
    judge_width: int = 16           # channels of its first layers; 64: ResNet-18
    # sampling: from here on --sample may, too
    num_samples: int = 500          # images to sample, and to measure on
    sampler: Literal["ddim", "ddpm", "dpmpp"] = "ddpm"  # ddpm suits short trainings
    sample_steps: int = 20          # steps from noise to image
    seed: int = 0                   # seed of the training and of samples
    # editing: from here on --model may, too
    invert_steps: int = 100         # steps of inversion, and again of the way back to the image
    sample_batch: int = 250         # images sampled at a time
    device: str = "auto"            # auto, cuda, cuda:1, mps or cpu
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"                # mixed precision

    # The paper's m and D. choice (the paper's): patches of 5, best of 5, 9, 15 for CIFAR-10 (15);
    # DDPM's widths (64 x 1,2,4,4); 100,000 steps of 256 images at 5e-4 (300 epochs of 128 at 1e-5).
    PHOTOGRAPHS = dict(
        image_size=32, mirror=True, num_prototypes=100, prototype_dim=128, channels=128,
        multipliers="1,2,2,2", blocks=2, dropout=0.1, steps=100_000, batch_size=256, lr=5e-4,
        save_every=1000, latent_width=1024, latent_steps=40_000, num_samples=10_000,
        sampler="dpmpp", judge_steps=8000, judge_width=64, inception="download")
    PRESETS = {
        "shapes": {}, "cifar10": PHOTOGRAPHS, "folder": PHOTOGRAPHS,
        "fashion-mnist": {**PHOTOGRAPHS, "mirror": False, "num_prototypes": 30},
        "celeba": {**PHOTOGRAPHS, "image_size": 64, "patch": 15, "multipliers": "1,1,2,2,2",
                   "attribute": "Blond_Hair", "watch": "Smiling"}}
    TASKS = dict(resume="steps", evaluate="pairs", diagnose="attribute", explain="data_dir",
                 sample="num_samples", model="invert_steps")    # settings from there on may change
    labelled = False                # the data need no classes

    def build(self, known):
        """The untrained network. known: what a run knows of its data: image shape, class names."""
        channels = known["shape"][0]
        return Patronus(UNet(channels, self), self, channels)

# ---- Prototypes: the encoder, the activations, the conditioned denoiser --------------------------

def patch_encoder(channels, side, dim, patch):
    """Images [B, channels, side, side] in [-1, 1] -> features z [B, dim, h, h], one for each patch.
    The paper's: four 3x3 layers, one of stride 2, see 15x15 pixels; from 128 pixels on, five 5x5
    layers see 61x61 (their widths are a choice). Weights N(0, 0.1). choice: no padding, so that all
    patches lie inside; a --patch of another size is seen by the first layer, the rest are 1x1."""
    widths, strides, kernels = (32, 64, 64, dim), (2, 1, 1, 1), (3, 3, 3, 3)
    if side >= 128:
        widths, strides, kernels = (32, 64, 64, 128, dim), (2, 2, 1, 1, 1), (5, 5, 5, 5, 5)
    if patch != (61 if side >= 128 else 15):
        kernels = (patch, 1, 1, 1, 1)
    layers = []
    for width, kernel, stride in zip(widths, kernels, strides):
        layers += [nn.Conv2d(channels, width, kernel, stride), nn.ReLU()]
        nn.init.normal_(layers[-2].weight, 0, 0.1)
        channels = width
    return nn.Sequential(*layers)

def image_encoder(dim, side):
    """Features of patches [B, dim, side, side] -> of the whole image [B, dim, 1, 1]: halved to at
    most 4x4, then one layer sees all. choice: size and place are no pattern of a patch."""
    layers = []
    while side > 4:
        layers += [nn.Conv2d(dim, dim, 3, 2, padding=1), nn.ReLU()]
        side = (side + 1) // 2
    return nn.Sequential(*layers, nn.Conv2d(dim, dim, side), nn.ReLU())

# exercise
def receptive_field(encoder):
    """start, size, step: feature i of a row sees `size` pixels, the first of them start + i * step.
    The three follow from kernel, stride and padding of the convolutions, first to last (Araujo et
    al. 2019). A start below 0 lies in the padding. For a --patch of 15 pixels: (0, 15, 2)."""
    start = 0
    size = 1
    step = 1
    for layer in encoder:
        if isinstance(layer, nn.Conv2d):
            start -= layer.padding[0] * step
            size += (layer.kernel_size[0] - 1) * step
            step *= layer.stride[0]
    return start, size, step

# exercise
def patch_distances(z, prototypes):
    """||z - p||^2 in float32: patches z [B, D, h, w], prototypes [m, D] -> [B, m, h, w].
    Computed as ||z||^2 - 2 z.p + ||p||^2, which avoids a tensor [B, m, D, h, w]. These terms nearly
    cancel: hence float32 with autocast switched off, and 0 for what rounding makes negative."""
    with torch.autocast(z.device.type, enabled=False):
        z = z.float()
        p = prototypes.float()
        cross = torch.einsum("bdhw,md->bmhw", z, p)
        d = z.square().sum(1, keepdim=True) - 2 * cross + p.square().sum(1)[:, None, None]
        return d.clamp(min=0)

# exercise
def activation(d):
    """s = log((d + 1) / (d + 1e-4)) of a squared distance (ProtoPNet): at most 9.2, at d = 0."""
    return torch.log((d + 1) / (d + 1e-4))

LARGEST = math.log(1e4)                 # activation(0)

def level_weights(abar, emphasis):
    """Weights of the noise loss, [T]: abar_t ** -emphasis, at most 50, divided by their mean.
    choice: s decides most where noise is high, but a wrong image hardly raises the loss there."""
    weights = (abar ** -emphasis).clamp(max=50)
    return weights / weights.mean()

class Patronus(nn.Module):
    """Predicts noise from xt, t and s, the activations of x0; mean, std [m]: of s at the start.
    latent: a model of s, trained afterwards (train_latent), hence without a gradient here."""
    def __init__(self, unet, cfg, channels):
        super().__init__()
        m = cfg.num_prototypes
        E = unet.emb_dim
        D = cfg.prototype_dim
        self.unet = unet
        self.encoder = patch_encoder(channels, cfg.image_size, D, cfg.patch)
        _, size, step = receptive_field(self.encoder)
        self.whole = image_encoder(D, (cfg.image_size - size) // step + 1)
        self.prototypes = nn.Parameter(torch.rand(m, D))    # as in ProtoPNet
        self.local = m - round(cfg.global_prototypes * m)   # prototypes below see patches
        self.mlp = nn.Sequential(nn.Linear(m, E), nn.SiLU(), nn.Linear(E, E))
        self.sketch = None
        if cfg.sketch > 0:                              # then the U-Net reads xt and the sketch
            self.sketch = nn.Sequential(
                nn.Linear(m, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(),
                nn.Linear(256, channels * 16 * 16), nn.Unflatten(1, (channels, 16, 16)),
                nn.Upsample((cfg.image_size, cfg.image_size), mode="bilinear"))
            unet.down[0][0] = nn.Conv2d(2 * channels, cfg.channels, 3, padding=1)
        self.register_buffer("mean", torch.zeros(m))
        self.register_buffer("std", torch.ones(m))
        self.latent = LatentModel(cfg).requires_grad_(False)

    def maps(self, x0):
        """The activation of every prototype at every patch, [B, m, h, w]: "where". Those of whole
        images have one activation, which stands at every patch."""
        z = self.encoder(x0)
        d = patch_distances(z, self.prototypes[:self.local])
        whole = patch_distances(self.whole(z), self.prototypes[self.local:])    # [B, m', 1, 1]
        return activation(torch.cat([d, whole.expand(-1, -1, *z.shape[2:])], 1))

    def encode(self, x0):
        """s [B, m]: the largest activation over patches, which is that of the least distance."""
        return self.maps(x0).amax((2, 3))

    def draw(self, s):
        """The sketch: what an MLP draws from s [B, m] alone, in 16x16 pixels -> [B, C, H, W].
        choice: if s only joins the embedding of t, as in the paper, the denoiser keeps colours, and
        neither place nor form. A sketch says what is where; and its loss teaches s more."""
        return self.sketch((s - self.mean) / self.std)

    def denoise(self, xt, t, s):
        """xt [B, C, H, W], t [B] in 0..T-1, s [B, m] -> the predicted noise, [B, C, H, W]."""
        if self.sketch:
            xt = torch.cat([xt, self.draw(s)], 1)
        return self.unet(xt, t, self.mlp((s - self.mean) / self.std))

    def forward(self, batch, abar, cfg):
        """Losses of a Batch, as a dict: they train encoder, prototypes and denoiser together.
        choice: with probability cfg.hide an activation becomes self.mean's, else its distance to it
        grows by 1/(1 - hide). Prototypes vary together; given all, the denoiser ignores some."""
        s = self.encode(batch.x0)
        told = self.mean + F.dropout(s - self.mean, cfg.hide)
        xt = add_noise(batch.x0, batch.t, batch.eps, abar)
        predicted = self.denoise(xt, batch.t, told)
        with torch.autocast(s.device.type, enabled=False):
            errors = (predicted.float() - batch.eps).square().mean((1, 2, 3))     # [B]
            loss = (errors * level_weights(abar, cfg.emphasis)[batch.t]).mean()
            losses = dict(diffusion=errors.mean(), spread_of_s=s.std(0, correction=0).mean())
            if self.sketch:
                losses["sketch"] = F.mse_loss(self.draw(told), batch.x0)
                loss = loss + cfg.sketch * losses["sketch"]
        return dict(loss=loss, **losses)

    def param_groups(self):
        """Groups whose gradients are clipped apart: the encoder's, and the denoiser's."""
        encoder = [*self.encoder.parameters(), *self.whole.parameters(), self.prototypes]
        parts = (self.unet, self.mlp, self.sketch)
        network = [p for part in parts if part for p in part.parameters()]
        return [dict(params=encoder), dict(params=network)]

    @torch.no_grad()
    def begin(self, cfg, sets, folder, device):
        """Start encoder and prototypes from real images -> what the run must remember, as a dict.
        choice: give every channel of the encoder mean 0 and std 1, and the features total variance
        1, then take real ones by k-means++ as prototypes; set mean, std of s. At the paper's start
        distances are such that `activation` is flat and near 0."""
        images = sets[0].images                         # of the training set
        known = dict(targets=torch.zeros(len(images), dtype=torch.int64), figures={})   # no labels
        if cfg.start == "uniform":
            return known
        index = random_index(len(images), min(500, len(images)), cfg.seed, "start")
        x0 = scaled(images, index, device)
        z = standardise(self.to(device).encoder, x0)
        patches = z.permute(0, 2, 3, 1).flatten(0, 2)                       # [N h w, D]
        some = patches[shuffled(len(patches), 5000, cfg.seed, "patches").to(device)]
        whole = standardise(self.whole, z).flatten(1)                       # [N, D]
        local, rest = self.prototypes.tensor_split([self.local])
        local.copy_(spread_points(some.cpu(), len(local), cfg.seed))
        rest.copy_(spread_points(whole.cpu(), len(rest), cfg.seed))
        s = self.encode(x0)
        self.mean.copy_(s.mean(0))
        self.std.copy_(s.std(0).clamp(min=1e-3))
        return known

    def quality(self, cfg, run, sets):
        """Images made from s of held-out ones -> what --eval-every logs, and these images."""
        figures, told = measure_traits(cfg, run, sets)
        return {name: figures[name] for name in ("frechet", "leak") if name in figures}, told

class LatentModel(nn.Module):
    """Noise predictor for standardised activations as images, [B, m, 1, 1], t [B] -> [B, m, 1, 1].
    choice: an MLP, as prototypes have no order for the paper's convolutions. mean, std: of s."""
    def __init__(self, cfg):
        super().__init__()
        m = cfg.num_prototypes
        width = cfg.latent_width
        self.first = nn.Linear(m, width)
        self.time_mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(),
                          nn.Linear(width, width)) for _ in range(4))
        self.last = zeroed(nn.Linear(width, m))
        self.register_buffer("mean", torch.zeros(m))
        self.register_buffer("std", torch.ones(m))

    def forward(self, x, t, condition=None):
        h = self.first(x.flatten(1))
        emb = self.time_mlp(time_embedding(t, h.shape[1]))
        for layer in self.layers:
            h = h + layer(h + emb)
        return self.last(h).view_as(x)

def train_latent(s, cfg, device):
    """Train a LatentModel on activations s [N, m], in float32 -> the average of its weights."""
    torch.manual_seed(seed_of(cfg.seed, "latent model"))
    gen = torch.Generator(device).manual_seed(seed_of(cfg.seed, "latent training"))
    model = LatentModel(cfg).to(device)
    s = s.to(device)
    model.mean.copy_(s.mean(0))
    model.std.copy_(s.std(0).clamp(min=1e-3))
    average = copy.deepcopy(model).requires_grad_(False)
    abar = alpha_bars(cfg.latent_timesteps).to(device)
    lr = 1 / cfg.latent_width                           # choice: Adam's rate goes as 1 / width
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, cfg.latent_steps + 1)
    for step in range(cfg.latent_steps):
        index = torch.randint(len(s), (256,), generator=gen, device=device)
        x0 = ((s[index] - model.mean) / model.std)[:, :, None, None]
        t = torch.randint(cfg.latent_timesteps, (256,), generator=gen, device=device)
        eps = torch.randn(x0.shape, generator=gen, device=device)
        noise_loss(model, x0, None, t, eps, abar).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        update_average(average, model, step)
    return average

def draw_activations(cfg, run, n):
    """n activation vectors of the latent diffusion, [n, m] on the CPU.
    choice: DDIM through all its levels, not clipped, as in diffusion autoencoders."""
    latent = run.model.latent
    gen = torch.Generator(run.device).manual_seed(seed_of(cfg.seed, "drawing activations"))
    xT = torch.randn(n, cfg.num_prototypes, 1, 1, generator=gen, device=run.device)
    abar = alpha_bars(cfg.latent_timesteps)
    x = sample(latent, xT, abar, cfg.latent_timesteps, "ddim", clip=False)
    return (x.flatten(1) * latent.std + latent.mean).clamp(0, LARGEST).cpu()

# ---- Diffusion: process, loss, samplers; all in float32 but the network ----------------

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

# exercise
@torch.no_grad()
def invert(predict, x0, abar, steps):
    """The DDIM ODE upwards (Song et al. 2021, section 4.3): a clean image x0 -> its noise xT.
    It takes the levels of `sample`, lowest first. Each step is eq. 12 with sigma = 0, from abar a
    to a_next < a (where ddim_step's sigma is no number), with eps predicted at the current x and
    its t. The first step starts at abar = 1, which has no t, and uses the lowest; so it asks twice
    at the lowest t, never at T - 1."""
    times = sample_times(len(abar), steps)[::-1]
    levels = [torch.ones(()), *abar.cpu()[times]]
    x = x0
    for t, a, a_next in zip([times[0], *times[:-1]], levels, levels[1:]):
        eps = predict(x, torch.full((len(x),), t, device=x.device))
        clean = (x - (1 - a).sqrt() * eps) / a.sqrt()   # DDPM eq. 4, solved for x0
        x = a_next.sqrt() * clean + (1 - a_next).sqrt() * eps
    return x

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

# ---- Abilities: what the paper does with its prototypes ------------------------------------------
# Images are uint8 [N, C, H, W] on the CPU here, s [N, m]. run has model, known, device. Helpers
# that you have not seen do what their names say, and stand in the equipment.

def activations(run, images):
    """s [N, m] of images, on the CPU."""
    return features_of(run.model.encode, images, run.device)

def predictor(cfg, run, s, denoise=None):
    """predict(x, t) for `sample` and `invert`: the network, in mixed precision, told s [N, m]."""
    def predict(x, t):
        with autocast(run.device, cfg.amp):
            return (denoise or run.model.denoise)(x, t, s).float()
    return predict

def render(cfg, run, s, xT=None, denoise=None):
    """Activations s [N, m] -> images uint8 [N, C, H, W]: by cfg.sampler from noise of cfg.seed, or
    by ddim from inverted noise xT, not clipped. denoise(x, t, s) replaces the model's."""
    abar = alpha_bars(cfg.timesteps)
    gen = torch.Generator(run.device)
    images = []
    for i, part in enumerate(s.to(run.device).split(cfg.sample_batch)):
        predict = predictor(cfg, run, part, denoise)
        if xT is None:
            gen.manual_seed(seed_of(cfg.seed, "sampling", i))
            x = torch.randn(len(part), *run.known["shape"], generator=gen, device=run.device)
            x = sample(predict, x, abar, cfg.sample_steps, cfg.sampler, generator=gen)
        else:
            x = xT.split(cfg.sample_batch)[i].to(run.device)
            x = sample(predict, x, abar, cfg.invert_steps, "ddim", clip=False)
        check(x.isfinite().all(), "images are no numbers: use --amp off, or train at a lower --lr")
        images.append(to_uint8(x))
    return torch.cat(images)

def invert_images(cfg, run, images):
    """Images -> their s [N, m], and the noise xT [N, C, H, W] that leads back to them."""
    s = activations(run, images)
    abar = alpha_bars(cfg.timesteps)
    noise = []
    for part in torch.arange(len(images)).split(cfg.sample_batch):
        predict = predictor(cfg, run, s[part].to(run.device))
        x0 = scaled(images, part, run.device)
        noise.append(invert(predict, x0, abar, cfg.invert_steps).cpu())
    return s, torch.cat(noise)

def reconstruct(cfg, run, images):
    """Images regenerated from their s and inverted noise."""
    return render(cfg, run, *invert_images(cfg, run, images))

def vary(cfg, run, images, n):
    """All N images from their s and random noise, n times over: [n N, C, H, W], copy by copy."""
    return render(cfg, run, activations(run, images).repeat(n, 1))

# exercise
def spherical(a, b, share):
    """Spherical interpolation (Shoemake 1985): noise a, b [C, H, W], share [n] -> [n, C, H, W].
    (sin((1 - share) angle) a + sin(share angle) b) / sin(angle); angle: between a and b as vectors.
    Its cosine is kept within +-0.9999, so that no sine is 0; near 1 this is as good as linear."""
    angle = F.cosine_similarity(a.flatten(), b.flatten(), dim=0).clamp(-0.9999, 0.9999).acos()
    share = share[:, None, None, None]
    return (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)

def interpolate(cfg, run, pair, n=8):
    """n images between two, pair [2, C, H, W]: linear in s, spherical in the noise."""
    s, xT = invert_images(cfg, run, pair)
    share = torch.linspace(0, 1, n)
    return render(cfg, run, torch.lerp(s[0], s[1], share[:, None]), spherical(*xT, share))

def company(s_all, chosen):
    """Slopes [k, m] of all activations on the k chosen ones: linear regression on s_all [N, m], the
    s of held-out images. choice: the paper moves one activation alone, but prototypes of a pattern
    vary together: no real image has one moved alone, and the result then hardly changes."""
    covariance = torch.cov(s_all.T)                     # [m, m]
    inverse = torch.linalg.pinv(covariance[chosen][:, chosen], rtol=1e-3, hermitian=True)
    return inverse @ covariance[chosen]

def set_activations(s, chosen, values, s_all=None):
    """s [N, m] with the k chosen at values [N or 1, k]; given s_all, the rest go by `company`."""
    moved = s.clone()
    if s_all is not None:
        moved = (s + (values - s[:, chosen]) @ company(s_all, chosen)).clamp(0, LARGEST)
    moved[:, chosen] = values
    return moved

def move(cfg, run, image, j, values, s_all):
    """Image [1, C, H, W], n values of its activation j -> edited images [n, C, H, W]."""
    s, xT = invert_images(cfg, run, image)
    rows = set_activations(s.repeat(len(values), 1), [j], values[:, None], s_all)
    return render(cfg, run, rows, xT.repeat(len(values), 1, 1, 1))

def raise_prototypes(cfg, run, images, chosen, s_all, follow=True):
    """What: images [n] with each of k prototypes in turn at its largest value in s_all. follow: the
    others go by `company`; else, as in the paper, they stay. -> images [1 + k, n, C, H, W], of
    which [0] has nothing raised, and the s that encoding these images gives, [1 + k, n, m]."""
    s, xT = invert_images(cfg, run, images)
    others = s_all if follow else None
    rows = [s, *(set_activations(s, [j], s_all[:, j].max().view(1, 1), others) for j in chosen)]
    edited = render(cfg, run, torch.cat(rows), xT.repeat(len(rows), 1, 1, 1))
    again = activations(run, edited)
    return edited.unflatten(0, (len(rows), -1)), again.unflatten(0, (len(rows), -1))

def emergence(cfg, run, s, steps=50):
    """When: x0 as predicted at each ddim step from noise -> t [steps], [steps, N, C, H, W]."""
    abar = alpha_bars(cfg.timesteps)
    times = []
    predicted = []
    def record(x, t, s):
        eps = run.model.denoise(x, t, s).float()
        a = abar[t[0].item()]
        times.append(t[0].item())
        predicted.append(to_uint8((x - (1 - a).sqrt() * eps) / a.sqrt()))
        return eps
    steps = min(steps, cfg.timesteps)
    cfg = dataclasses.replace(cfg, sampler="ddim", sample_steps=steps, sample_batch=len(s))
    render(cfg, run, s, denoise=record)                 # one batch: record runs once a step
    return times, torch.stack(predicted)

def switch(cfg, run, s_a, s_b, at):
    """Images from random noise, given s_a [N, m] while t >= at, and s_b below."""
    def switching(x, t, both):
        first, second = both.chunk(2, dim=1)
        return run.model.denoise(x, t, torch.where((t >= at)[:, None], first, second))
    return render(cfg, run, torch.cat([s_a, s_b], 1), denoise=switching)    # a row is an image's

# exercise
def choose_movers(s, known, a, b, n=3):
    """The n activations with the best single AUROC for trait a, after excluding the n best for b.
    s [N, m], known bool [N, A]; a, b: columns of known -> list of n numbers, best first. For a as
    for b an AUROC below 0.5 counts as 1 - AUROC, an undefined one (NaN) as 0.5, which is chance."""
    auc = single_aurocs(s, known[:, [a, b]])
    strength = torch.maximum(auc, 1 - auc).nan_to_num(0.5)                  # [m, 2]
    order = strength[:, 0].argsort(descending=True).tolist()
    excluded = strength[:, 1].topk(n).indices.tolist()
    return [j for j in order if j not in excluded][:n]

def diagnose(cfg, run, judge, data, most=300):
    """Does cfg.attribute drag cfg.watch along? On held-out data -> figures, and what to look at.
    The movers are set to their mean over images of the opposite class of the attribute; the other
    activations go by `company` within the values of the watched trait, else what is correlated in
    the data would move it. Before and after share their random noise. leak: mean change of P(watch)
    / that of P(attribute), both negated where the attribute is; its 95 % bootstrap interval."""
    a, b = watched_traits(cfg, data)
    known, _ = traits(data)
    s = activations(run, data.images)
    movers = choose_movers(s, known, a, b)
    of_a, of_b = (torch.stack([s[~has].mean(0), s[has].mean(0)]) for has in known[:, [a, b]].T)
    within = s - of_b[known[:, b].long()]               # [N, m]; of_a, of_b: without, with it
    some = shuffled(len(s), min(most, len(s)), cfg.seed, "diagnosis")
    has = known[some, a]
    edited = set_activations(s[some], movers, of_a[(~has).long()][:, movers], within)
    images = [render(cfg, run, s[some]), render(cfg, run, edited)]
    before, after = (judge_traits(judge, part, run.device)[0][:, [a, b]] for part in images)
    change = torch.where(has, -1, 1)[:, None] * (after - before)            # [N, 2]
    draws = torch.randint(len(some), (1000, len(some)), generator=torch.Generator().manual_seed(0))
    drawn = change[draws].mean(1)                       # [1000, 2]
    low, high = (drawn[:, 1] / drawn[:, 0]).quantile(torch.tensor([0.025, 0.975])).tolist()
    moved, dragged = change.mean(0).tolist()
    figures = dict(leak=dragged / moved if moved else math.nan, leak_low=low, leak_high=high,
                   attribute_moved=moved, watched_moved=dragged)
    return figures, SimpleNamespace(images=images, before=before, after=after, movers=movers)

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

def open_fashion_mnist(root, train):
    """Padded from 28 to 32 pixels."""
    data = torchvision.datasets.FashionMNIST(root, train, transform=v2.Pad(2), download=True)
    return data, data.classes

def open_celeba_files(root, train):
    """Faces without classes; load_traits knows their 40 attributes. To be unpacked by hand."""
    folder = root / "celeba" / "img_align_celeba"
    check(folder.is_dir(), f"{folder.parent} must hold img_align_celeba/ and the .txt files of "
          "mmlab.ie.cuhk.edu.hk/projects/CelebA.html")
    data = torchvision.datasets.CelebA(root, "train" if train else "test")
    return [(folder / name, 0) for name in data.filename], []

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

data_sets = {"folder": open_folder, "fashion-mnist": open_fashion_mnist, "cifar10": open_cifar10,
             "celeba": open_celeba_files}

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

def load_traits(cfg):
    """load_sets with CelebA's attributes; and with the planted bias, of the training set alone."""
    sets = load_sets(cfg)
    check(cfg.bias == 0.5 or cfg.dataset == "shapes", "--bias plants a correlation in shapes alone")
    check(len(sets[1].images) >= 8, f"{cfg.data_dir} leaves fewer than 8 held-out images: add some")
    if cfg.bias != 0.5:
        n, seed = SHAPE_SPLITS["train"]
        sets[0] = make_shapes(n, cfg.image_size, seed, cfg.bias)
    if cfg.dataset == "celeba":
        for data, split in zip(sets, ("train", "test")):
            faces = torchvision.datasets.CelebA(cfg.data_dir, split)
            data.attributes = faces.attr.bool()
            data.attribute_names = faces.attr_names[:40]
    watched_traits(cfg, sets[1])                        # raises Stop before training, not after
    return sets

def traits(data):
    """What is known of images: attributes, else the first 40 classes -> bool [N, A], A names."""
    if data.attributes is not None:
        return data.attributes, [*data.attribute_names]
    columns = class_columns(data)[:, :40]
    return columns, data.classes[:columns.shape[1]]

def class_columns(data):
    """Which class images are of: bool [N, C]; C is 0 if there are fewer than two."""
    return data.labels[:, None] == torch.arange(len(data.classes) * (len(data.classes) > 1))

def judged(data):
    """What the judge learns of images, bool [N, A + C], the traits and the classes; A names."""
    known, names = traits(data)
    return torch.cat([known, class_columns(data)], 1), names

def watched_traits(cfg, data):
    """Columns of --attribute and --watch in traits(data), or else of the first and last that vary;
    [] if fewer than two do. Raises Stop if it has no such traits."""
    known, names = traits(data)
    varied = [name for name, column in zip(names, known.T) if len(column.unique()) == 2]
    if len(varied) < 2 and not cfg.attribute + cfg.watch:
        return []
    pair = [cfg.attribute or "".join(varied[:1]), cfg.watch or "".join(varied[-1:])]
    check(pair[0] != pair[1] and set(pair) <= set(varied), f"--attribute {pair[0]} and --watch "
          f"{pair[1]} must be two of: {', '.join(varied)}")
    return [names.index(name) for name in pair]

def shuffled(N, n, *key):
    """n of N things in a random order, each once, or as evenly as can be if n > N. See seed_of."""
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed_of(*key)))
    return order[torch.arange(n) % N]

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

def load_trait_judge(cfg, data, device):
    """The judge: a classifier of traits, trained on real images alone (for shapes others, without
    bias), kept beside the data -> features and last layer; moments of these images' features."""
    real = load_dataset("shapes", "judge", cfg.image_size) if cfg.dataset == "shapes" else data
    known, names = judged(real)
    torch.manual_seed(seed_of("judge"))
    features = resnet(*real.images.shape[1:3], cfg.judge_width)
    net = nn.Sequential(features, nn.Linear(8 * cfg.judge_width, known.shape[1])).to(device)
    def make():
        loss = F.binary_cross_entropy_with_logits
        fit(net, real.images, known.float(), loss, cfg.judge_steps, cfg, "judge")
        return net.state_dict(), moments(features_of(features, real.images, device))
    name = f"prototype-traits-{cfg.dataset}-{cfg.image_size}-{cfg.judge_width}-{cfg.judge_steps}.pt"
    key = [cfg.mirror, names, fingerprint(real.images, known)]
    weights, real_moments = cached(Path(cfg.data_dir, name), key, make)
    net.load_state_dict(weights)
    return net.eval().requires_grad_(False), real_moments

def judge_traits(judge, images, device):
    """uint8 images -> P of all `judged` [N, A + C], Frechet distance (not FID) to the judge's."""
    net, real = judge
    z = features_of(net[0], images, device)
    return net[1].cpu()(z).sigmoid(), frechet_distance(*moments(z), *real)

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

# ---- Metrics: activations and traits -------------------------------------------------------------

# exercise
def auroc(score, positive):
    """P(a positive scores above a negative), ties half: score [N], positive bool [N] -> a number.
    With P positives, N negatives: (sum of the positives' ranks - P (P + 1) / 2) / (P N). Ranks
    count all scores from 1 up, ties share their mean rank (Mann & Whitney 1947). NaN if P N = 0."""
    _, place, count = score.unique(return_inverse=True, return_counts=True)
    rank = (count.cumsum(0) - (count - 1) / 2).double()[place]              # 1..N, the mean of ties
    P = positive.sum().item()
    N = len(score) - P
    if P * N == 0:
        return math.nan
    return (rank[positive].sum().item() - P * (P + 1) / 2) / (P * N)

def single_aurocs(s, known):
    """AUROC of every activation alone for every trait: s [N, m], known [N, A] -> float64 [m, A]."""
    aurocs = [[auroc(s_j, trait) for trait in known.T] for s_j in s.T]
    return torch.tensor(aurocs, dtype=torch.float64)

def logistic_aurocs(s, known, folds=5):
    """AUROC of all activations together, mean over held-out folds: s [N, m], known [N, A] -> [A].
    Logistic regression on standardised s, by L-BFGS: sum of losses + ||w||^2 / 2. In float64."""
    found = []
    for fold in torch.randperm(len(s), generator=torch.Generator().manual_seed(0)).chunk(folds):
        rest = torch.ones(len(s), dtype=torch.bool).index_fill_(0, fold, False)
        x = ((s - s[rest].mean(0)) / s[rest].std(0).clamp(min=1e-6)).double()
        w = torch.zeros(s.shape[1], known.shape[1], dtype=torch.float64, requires_grad=True)
        bias = torch.zeros(known.shape[1], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([w, bias], max_iter=100, line_search_fn="strong_wolfe")
        def objective():
            optimizer.zero_grad()
            logits = x[rest] @ w + bias
            loss = F.binary_cross_entropy_with_logits(logits, known[rest].double(), reduction="sum")
            loss = (loss + w.square().sum() / 2) / rest.sum()
            loss.backward()
            return loss
        optimizer.step(objective)
        scores = (x[fold] @ w + bias).detach()
        found.append([auroc(*pair) for pair in zip(scores.T, known[fold].T)])
    return torch.tensor(found, dtype=torch.float64).mean(0)

def mutual_information(a, b):
    """I(a; b) in nats of two bool columns [N]; with itself it is the entropy."""
    joint = torch.bincount(2 * a.long() + b.long(), minlength=4).view(2, 2).double() / len(a)
    apart = torch.outer(joint.sum(1), joint.sum(0))     # as if they were independent
    return torch.special.xlogy(joint, joint / apart).nansum().item()

def disentanglement(s, known):
    """TAD (Yeats et al. 2022): s [N, m], known bool [N, A] -> total, number of traits captured.
    Best minus second best of max(AUC, 1 - AUC) over single activations, for each trait whose best
    is at least 0.75 and that no other tells: mutual information at most 0.2 of its entropy."""
    strength = single_aurocs(s, known)
    strength = torch.maximum(strength, 1 - strength).nan_to_num(0.5)        # [m, A]
    gaps = []
    for i, a in enumerate(known.T):
        others = [mutual_information(a, b) for k, b in enumerate(known.T) if k != i]
        best, second = strength[:, i].topk(2).values.tolist()
        if best >= 0.75 and max(others, default=0.0) <= 0.2 * mutual_information(a, a):
            gaps.append(best - second)
    return sum(gaps), len(gaps)

@torch.no_grad()
def standardise(layers, x):
    """Scale and shift weights: every channel of each convolution of x [N, C, H, W] gets mean 0 and
    std 1, the features total variance 1 -> these features."""
    for layer in layers:
        x = layer(x)
        if isinstance(layer, nn.Conv2d):
            std, mean = torch.std_mean(x, (0, 2, 3))
            std = std.clamp(min=1e-3)                   # images may all be alike
            layer.weight /= std[:, None, None, None]
            layer.bias.sub_(mean).div_(std)
            x = (x - mean[:, None, None]) / std[:, None, None]
    scale = x.transpose(0, 1).flatten(1).var(1).sum().clamp(min=1e-6).rsqrt()
    for parameter in layers[-2].parameters():           # before the last ReLU
        parameter *= scale
    return x * scale

@torch.no_grad()
def spread_points(z, n, seed):
    """k-means++ (Arthur & Vassilvitskii 2007): n of the points z [N, D], far apart -> [n, D]."""
    gen = torch.Generator().manual_seed(seed_of(seed, "k-means"))
    chosen = [torch.randint(len(z), (), generator=gen)]
    nearest = (z - z[chosen[0]]).square().sum(1)        # squared distance to the nearest, [N]
    while len(chosen) < n:
        chosen.append(torch.multinomial(nearest + 1e-12, 1, generator=gen)[0])
        nearest = torch.minimum(nearest, (z - z[chosen[-1]]).square().sum(1))
    return z[torch.stack(chosen)][:n]

def responses(again, chosen):
    """Does s_j grow when j is raised? bool [k, n]; again: the s of raise_prototypes."""
    return torch.stack([part[:, j] > again[0, :, j] for part, j in zip(again[1:], chosen)])

def raised_share(cfg, run, s_all, images, follow):
    """Share of about cfg.pairs pairs, a live prototype and an image, that respond to raising."""
    live = prototype_state(s_all)[0].nonzero().flatten().tolist()
    n = math.ceil(cfg.pairs / len(live))
    _, again = raise_prototypes(cfg, run, images[:n], live, s_all, follow)
    return responses(again, live).float().mean().item()

def correlation(s):
    """Pearson correlations of the columns of s [N, m] -> [m, m]; 0 where a column does not vary."""
    return torch.corrcoef(s.T).nan_to_num()

def prototype_state(s):
    """Which prototypes are live, and which dead, by s [N, m] of held-out images -> bool [m] both.
    choice: dead is one whose standard deviation is below a twentieth of the largest. Neither is one
    that correlates by over 0.95, either sign, with a live one before it."""
    spread = s.std(0)
    dead = spread < 0.05 * spread.max()
    alike = correlation(s).abs() > 0.95
    live = ~dead
    for j in range(len(live)):
        live[j] &= ~(alike[j, :j] & live[:j]).any()
    return live, dead

def diverse(s, n):
    """Up to n live prototypes, by s [N, m] of images: that which varies most, then each time that
    whose largest correlation with these is least."""
    live, _ = prototype_state(s)
    alike = correlation(s).abs()
    chosen = [torch.where(live, s.std(0), -1).argmax().item()]
    while len(chosen) < min(n, live.sum()):
        nearest = alike[chosen].amax(0).index_fill(0, torch.tensor(chosen), 2)
        chosen.append(torch.where(live, nearest, 2).argmin().item())
    return chosen

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

def best_patches(run, images, chosen):
    """Upper left corner (row, column) of image i's best patch for prototype chosen[i] -> [N, 2]."""
    maps = features_of(run.model.maps, images, run.device)
    maps = maps[torch.arange(len(images)), chosen]                          # [N, h, w]
    start, _, step = receptive_field(run.model.encoder)
    best = torch.unravel_index(maps.flatten(1).argmax(1), maps.shape[1:])
    return start + step * torch.stack(best, 1)

def framed(run, images, chosen):
    """RGB images, with a frame just outside the patch of image i that activates chosen[i] most."""
    size = receptive_field(run.model.encoder)[1]
    corners = best_patches(run, images, chosen).flip(1)                     # x, y
    boxes = torch.cat([corners - 1, corners + size], 1)
    whole = torch.tensor(chosen) >= run.model.local
    boxes[whole] = torch.tensor([0, 0, *images.shape[-2:]])
    boxes = boxes.clamp(0, images.shape[-1] - 1)
    width = max(1, images.shape[-1] // 32)
    draw = torchvision.utils.draw_bounding_boxes
    return torch.stack([draw(image, box[None], colors="red", width=width)
                        for image, box in zip(images, boxes)])

def heat_maps(run, images, maps):
    """Maps [N, h, w] in 0..1 as pictures like the images, each value at the middle of its patch."""
    start, size, step = receptive_field(run.model.encoder)
    first = start + (size - step) // 2
    last = images.shape[-1] - first - step * maps.shape[-1]
    heat = maps.repeat_interleave(step, 1).repeat_interleave(step, 2)
    heat = F.pad(heat[:, None], (first, last, first, last), mode="replicate")
    return (255 * heat).to(torch.uint8).expand_as(images)

def draw_when(path, times, course, order, emerged, curves):
    """when.png: s of predicted images [steps, m]; curves: trait -> (t of switch, share of B's)."""
    with drawing(path, 15, 5.5) as fig:
        left, right = fig.subplots(1, 2)
        shown = (course / course[-1])[:, order].clamp(max=1.2).T
        picture = left.imshow(shown, aspect="auto", interpolation="nearest")
        left.plot(emerged[order] - 0.5, range(len(order)), color="white", drawstyle="steps-mid")
        left.set_xticks(range(0, len(times), 6), times[::6])
        rows = range(0, len(order), math.ceil(len(order) / 30))
        left.set_yticks(rows, [order[i] for i in rows])
        left.set(title="prototypes as they emerge (white: 90 % reached for good)",
                 ylabel="prototype", xlabel="noise level t of denoising, from noise to image")
        fig.colorbar(picture, ax=left, label="s_j of the predicted image / at the end")
        for name, (at, share) in zip(drawable([*curves]), curves.values()):
            right.plot(at, share, ".-", label=f" {name}")   # a legend leaves out names like _x
        right.set(title="switch: told s of image A until t, then s of B. Whose trait is it in the "
                  "end?", xlabel="t of the switch (left: B all along, right: A all along)",
                  ylabel="share of images with B's", ylim=(0, 1))
        right.invert_xaxis()
        if curves:
            right.legend(title="trait")

def draw_diagnosis(path, figures, seen, a, b):
    """diagnosis.png: images as they are and edited, with the judge's view of the traits a and b."""
    columns = []
    for values in torch.stack([seen.before, seen.after], 2)[:10].mul(100).round().tolist():
        columns.append("\n".join(f"{before:.0f}→{after:.0f}" for before, after in values))
    draw_grid(path, torch.cat([part[:10] for part in seen.images]), ["as it is", "edited"],
              f"Does '{b}' follow when prototypes {seen.movers} turn '{a}' to its opposite?\n"
              f"P({a}) moves by {figures['attribute_moved']:.2f}, and P({b}) with it by "
              f"{figures['watched_moved']:.2f}: leak {figures['leak']:.2f} (95 % "
              f"{figures['leak_low']:.2f} to {figures['leak_high']:.2f})\n"
              f"below each image the judge's P({a}) and P({b}) in %", columns, size=0.75)

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

def finish_run(cfg, sets, folder):
    """Trains the latent model of a run at its end, unless that was done -> the run as load_run."""
    run = load_run(folder, cfg.device)
    if run.known.get("latent_step") != run.step:
        start = time.perf_counter()
        s = activations(run, sets[0].images)
        run.model.latent = train_latent(s, cfg, run.device)
        run.known["latent_step"] = run.step
        run.known["figures"]["seconds_latent"] = time.perf_counter() - start
        run.state.update(known=run.known, average=run.model.state_dict())
        save(run.state, folder / "checkpoint.pt")
    return run

def sample_unconditional(cfg, run, folder):
    """Samples through the latent model -> uint8 [N, C, H, W]; samples.png, samples.npz (with s)."""
    s = draw_activations(cfg, run, cfg.num_samples)
    images = render(cfg, run, s)
    np.savez(folder / "samples.npz", arr_0=images.permute(0, 2, 3, 1), s=s)
    rows = min(10, math.ceil(len(images) / 10)) * [""]
    draw_grid(folder / "samples.png", images[:100], rows, f"unconditional, step {run.step}")
    return images

def explain(cfg, run, sets, folder):
    """The abilities of the paper as pictures in `folder`, on held-out images."""
    images = sets[1].images
    s_all = activations(run, images)
    chosen = diverse(s_all, 8)
    names = [f"no. {j}" for j in chosen]
    some = images[shuffled(len(images), 64, cfg.seed, "pictures")]
    few = some[:8]
    def draw(name, rows, row_names, title, columns=()):
        draw_grid(folder / f"{name}.png", torch.cat(rows), row_names, title, columns)
    draw("reconstruction", [few, reconstruct(cfg, run, few)], ["real", "reconstruction"],
         "Reconstruction: from the activations s and inverted noise")
    drawn = []                                          # the paper's model has no sketch
    if run.model.sketch:
        sketch = features_of(lambda x: run.model.draw(run.model.encode(x)), few, run.device)
        drawn = [to_uint8(sketch)]
    draw("variations", [few, *drawn, *vary(cfg, run, few, 8).split(8)],
         ["real", *["sketch"] * len(drawn), *["same s"] * 8],
         "Variations: the same s, other noise.\nWhat stays is what the model takes from s")
    draw("interpolation", [interpolate(cfg, run, pair) for pair in few.split(2)], [""] * 4,
         "Interpolation: from one image to another,\nlinear in s, spherical in the noise")
    share = torch.tensor([0, 0.25, 0.5, 0.75, 1, 1.5])
    courses = [move(cfg, run, few[:1], j, share * s_all[:, j].max(), s_all) for j in chosen]
    draw("extrapolation", courses, names,
         "Extrapolation: s_j from 0\npast its largest on real images (1)", share.tolist())
    raised, again = raise_prototypes(cfg, run, few, chosen, s_all)
    rows = []
    for i, j in enumerate(chosen, 1):
        best = (again[i] - again[0])[:, j].argmax()     # where it rises most
        real = images[s_all[:, j].topk(6).indices]
        rows.append(framed(run, torch.stack([raised[0, best], raised[i, best], *real]), [j] * 8))
    draw("prototypes", rows, names, "What: an image before and after s_j is raised,\n"
         "and the real patches that activate j most", ["before", "raised", *["real"] * 6])
    counts = [f"no. {j}: {n}/8" for j, n in zip(chosen, responses(again, chosen).sum(1).tolist())]
    draw("consistency", [*raised], ["unedited", *counts], "Consistency: does raising do the same\n"
         "to every image? (in how many s_j, encoded again, is larger)")
    local = [j for j in chosen if j < run.model.local]  # of whole images there is one activation
    maps = features_of(run.model.maps, few, run.device)[:, local]
    low = maps.amin((0, 2, 3), keepdim=True)
    maps = (maps - low) / (maps.amax((0, 2, 3), keepdim=True) - low).clamp(min=1e-6)
    draw("where", [few, *(heat_maps(run, few, part) for part in maps.unbind(1))],
         ["real", *(f"no. {j}" for j in local)],
         "Where: the activation by each patch,\nfrom the least to the largest of these images")
    explain_when(cfg, run, sets, some, folder)

def emerged_at(course, share=0.9):
    """course [steps, m] of s -> [m]: the step from which s_j stays >= share of its end (choice)."""
    below = course < share * course[-1]
    return (torch.arange(1, len(course) + 1)[:, None] * below).amax(0)      # 1 + the last below

def explain_when(cfg, run, sets, images, folder):
    """When prototypes emerge: when.png."""
    times, predicted = emergence(cfg, run, activations(run, images))
    course = torch.stack([activations(run, step) for step in predicted])    # [steps, N, m]
    present = course[-1] >= course[-1].quantile(0.75, dim=0)                # they have the pattern
    course = (course * present).sum(1) / present.sum(0)                     # [steps, m]
    emerged = emerged_at(course)
    live, _ = prototype_state(activations(run, sets[1].images))
    order = [j for j in emerged.argsort().tolist() if live[j]]
    curves = switch_curves(cfg, run, sets)
    draw_when(folder / "when.png", times, course, order, emerged, curves)

def switch_curves(cfg, run, sets, pairs=100):
    """For ten traits, over pairs A, B that differ in it: t of the switch, share of B's."""
    known, names = traits(sets[1])
    if not names:
        return {}
    judge = load_trait_judge(cfg, sets[0], run.device)
    n = min(pairs, len(known) // 2)
    a, b = shuffled(len(known), 2 * n, cfg.seed, "switch").chunk(2)
    s = activations(run, sets[1].images)
    differ = known[a] != known[b]                                           # [pairs, A]
    at = [round(i / 10 * cfg.timesteps) for i in range(11)]
    shares = []
    for t in at:
        P, _ = judge_traits(judge, switch(cfg, run, s[a], s[b], t), run.device)
        right = ((P[:, :len(names)] > 0.5) == known[b]) & differ
        shares.append(right.sum(0) / differ.sum(0))
    return {name: (at, share) for name, share in zip(names[:10], torch.stack(shares).T.tolist())}

def named(word, names, values):
    """A figure for each trait, with keys like kept_warm_hue."""
    return {f"{word}_{name}".replace(" ", "_"): x for name, x in zip(names, values.tolist())}

def kept_traits(judge, images, known, names, device):
    """Figures of images that should be as known [N, A + C]: how often they are, and Frechet."""
    P, frechet = judge_traits(judge, images, device)
    A = len(names)
    figures = dict(frechet=frechet, **named("kept", names, ((P > 0.5) == known).float().mean(0)))
    if P.shape[1] > A:
        right = P[:, A:].argmax(1) == known[:, A:].int().argmax(1)
        figures["kept_class"] = right.float().mean().item()
    return figures

def measure_traits(cfg, run, sets, folder=None):
    """Images told s of held-out ones; the diagnosis, to `folder` -> figures if any, the images."""
    data = sets[1]
    known, names = judged(data)
    index = shuffled(len(data.images), cfg.num_samples, cfg.seed, "held-out images")
    told = vary(cfg, run, data.images[index], 1)
    if not names:
        return {}, told
    judge = load_trait_judge(cfg, sets[0], run.device)
    figures = kept_traits(judge, told, known[index], names, run.device)
    real = kept_traits(judge, data.images[index], known[index], names, run.device)
    figures.update({f"real_{name}": x for name, x in real.items()})
    pair = watched_traits(cfg, data)
    if pair:
        leak, seen = diagnose(cfg, run, judge, data)
        figures.update(leak)
        if folder:
            shown = drawable(names)
            draw_diagnosis(folder / "diagnosis.png", leak, seen, *(shown[trait] for trait in pair))
    return figures, told

def prototype_figures(cfg, run, images):
    """What there is to measure without traits, on held-out images."""
    s_all = activations(run, images)
    live, dead = prototype_state(s_all)
    some = images[shuffled(len(images), 64, cfg.seed, "pictures")]
    error = (reconstruct(cfg, run, some).float() - some.float()).abs().mean() / 127.5
    return dict(reconstruction_error=error.item(), live=int(live.sum()), dead=int(dead.sum()),
                raised=raised_share(cfg, run, s_all, some, True),
                raised_alone=raised_share(cfg, run, s_all, some, False))

def evaluate_patronus(cfg, run, sets, folder):
    """Samples, the diagnosis and metrics.json of a finished run, in `folder`."""
    data = sets[1]
    known, names = traits(data)
    samples = sample_unconditional(cfg, run, folder)
    figures, told = measure_traits(cfg, run, sets, folder)
    figures.update(prototype_figures(cfg, run, data.images))
    if names:
        judge = load_trait_judge(cfg, sets[0], run.device)
        figures["unconditional_frechet"] = judge_traits(judge, samples, run.device)[1]
        s = activations(run, data.images)
        auc = logistic_aurocs(s, known)
        tad, captured = disentanglement(s, known)
        figures.update(**named("auroc", names, auc), auroc=auc.nanmean().item(), tad=tad,
                       tad_traits=captured)
    for kind, images in (("", told), ("unconditional_", samples)):
        found = inception_metrics(cfg, images, sets[0].images, run.device)
        figures.update({f"{kind}{name}": x for name, x in found.items()})
    write_metrics(cfg, run, figures, folder)

def edit_image(cfg, run, given):
    """--edit: an image with some activations set -> edit.png, and edited.png alone."""
    pairs = [word.split("=") for word in given.set.split(",")]
    chosen = [int(j) for j, _ in pairs]
    values = torch.tensor([[float(value) for _, value in pairs]])
    mode = "RGB" if run.known["shape"][0] == 3 else "L"
    image, _ = decode_all([(given.edit, 0)], cfg.image_size, mode)
    s, xT = invert_images(cfg, run, image)
    told = torch.cat([s, set_activations(s, chosen, values)])
    images = render(cfg, run, told, xT.repeat(2, 1, 1, 1))
    now = activations(run, images)[1]
    title = "\n".join(f"s_{j}: {s[0, j]:.2f}, set to {x:.2f}, now {now[j]:.2f}"
                      for j, x in zip(chosen, values[0]))
    folder = new_folder(given.out, given.model / "edit")
    rows = ["the image", "reconstruction", "edited"]
    draw_grid(folder / "edit.png", torch.cat([image, images]), rows, title)
    torchvision.utils.save_image(images[1] / 255, folder / "edited.png")
    print(title)

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

def patronus(given):
    """Do what the command line asks for."""
    own = ["edit", "set"]
    if given.compare:
        without_effect(given, [*vars(Config()), *own], "with --compare")
        return compare(given.compare, given.out)
    cfg, task, folder = read_settings(given)
    check(cfg.image_size >= max(16, cfg.patch) and cfg.num_prototypes >= 6,
          "--image-size must be 16 or more, and no less than --patch, --num-prototypes 6 or more")
    check(cfg.invert_steps <= cfg.timesteps and cfg.global_prototypes <= 1
          and cfg.latent_width % 2 == 0, "--invert-steps cannot be above --timesteps, "
          "--global-prototypes above 1, --latent-width odd")
    alpha_bars(cfg.latent_timesteps)                    # raises Stop if they are too few
    unused = dict(sample=["invert_steps"], diagnose=["invert_steps"], explain=["num_samples"])
    without_effect(given, unused.get(task, []), f"with --{task}")
    if task == "model":
        check(given.edit and re.fullmatch(r"\d+=-?\d*\.?\d+(,\d+=-?\d*\.?\d+)*", given.set or ""),
              "give --edit image.png --model runs/NAME --set 12=2.5,40=0")
        for j in re.findall(r"(\d+)=", given.set):
            check(int(j) < cfg.num_prototypes, f"take prototypes 0 to {cfg.num_prototypes - 1}")
    else:
        without_effect(given, own, "without --model")
    if task in ("train", "resume"):
        sets = train_run(cfg, given, load_traits)
        if RANK == 0:
            run = finish_run(cfg, sets, given.resume)
            evaluate_patronus(cfg, run, sets, given.resume)
            explain(cfg, run, sets, given.resume)
        return
    run = load_run(folder, cfg.device)
    check(run.known.get("latent_step") == run.step, f"{folder} has not ended: --resume it first")
    if task == "model":
        return edit_image(cfg, run, given)
    if task == "sample":
        sample_unconditional(cfg, run, new_folder(given.out, folder / task))
        return
    sets = same_images(run, load_traits(cfg))
    check(task != "diagnose" or watched_traits(cfg, sets[1]), "no two held-out traits vary")
    out = new_folder(given.out, folder / task)
    if task == "explain":
        explain(cfg, run, sets, out)
    elif task == "evaluate":
        evaluate_patronus(cfg, run, sets, out)
    else:
        write_metrics(cfg, run, measure_traits(cfg, run, sets, out)[0], out)

def main(argv=None):
    """The command line -> exit status: 2 after one sentence about what a person can put right, 130
    after Ctrl-C. A fault of this program shows its traceback."""
    parser = settings_parser()
    parser.add_argument("--edit", metavar="IMAGE", type=user_path, help="edit it by --model RUN")
    parser.add_argument("--set", help="--edit: activations to set, like 12=2.5,40=0")
    given = parser.parse_args(argv)
    try:
        patronus(given)
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
