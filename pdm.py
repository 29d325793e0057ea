"""PDM and s-PDM: diffusion models that learn a few prototypes while they train.

Paper: "Prototype-Guided Diffusion: Visual Conditioning without External Memory", arXiv 2508.09922.

The idea. Retrieval-augmented diffusion looks up neighbours in a memory of training features, which
costs space and time. Here a small encoder f_phi maps the clean image to a feature z, and K learned
prototypes e lie in the same space. PDM needs no label and chooses the prototype nearest to z; s-PDM
has one for each class, and the label chooses. Losses draw z and the chosen prototype together and
turn prototypes apart, and the denoiser attends to the chosen one before its middle block. All
trains at once. These losses let all images choose one prototype; so by default (choice, PDM only)
another replaces the contrastive one: an image and two random views of it shall choose alike, all
images together every prototype equally often. Prototypes then mean what views have in common.

    clean image x0 ──> f_phi ──> z ──> nearest of K prototypes e     contrastive + alignment loss
    two views of it ────┘                   │  (s-PDM: the label's)  (PDM: + compactness of e)
                          e + sinusoids(t): the key and the value    (or a learned null)
                                            │
    noisy image xt ──> U-Net down ──> cross-attention ──> middle ──> U-Net up ──> predicted noise

    python pdm.py                                       # built-in shapes, no labels, on a CPU
    python pdm.py --supervised                          # s-PDM; --conditioning none: the baseline
    python pdm.py --views one                           # the paper's losses alone
    python pdm.py --compare runs/A runs/B runs/C        # finished runs: a table and a figure

"choice:" marks where the paper is silent or we differ, "# exercise" functions to write again from
their docstrings. To change what prototypes shall not mean, look at random_view; losses, at
contrastive_loss; their choice, at PDM.learn; how they enter, at PrototypeAttention."""
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
import shutil
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

Sets = Literal["shapes", "folder", "cifar10", "stl10", "eurosat", "tiny-imagenet", "celeba"]

@dataclasses.dataclass
class Config:
    """Every setting is a flag; its comment is its help."""
    dataset: Sets = "shapes"        # the images: built-in shapes, a folder, or a published set
    image_size: int = 16            # side of the images, pixels, 16 or more
    # prototypes
    conditioning: Literal["prototype", "none"] = "prototype"    # what the denoiser is told
    supervised: bool = False        # s-PDM: a prototype for each class, chosen by the label
    num_prototypes: int = 10        # K; s-PDM takes the number of classes
    prototype_dim: int = 64         # D, numbers in a prototype and in a feature, even
    views: Literal["two", "one"] = "two"        # PDM: two in swapped_loss; or the paper's
    forget: str = "place,mirror,hue,light"      # what prototypes shall not mean, see random_view
    view_size: str = "0.8,1.2"      # place: least and largest side of a view, in sides of the image
    # network and process
    channels: int = 48              # channels of the U-Net's first level, a multiple of 4
    multipliers: str = "1,1"        # channel factor of each level of the U-Net
    blocks: int = 1                 # residual blocks for each level
    attention: int = 8              # self-attention at sides up to this; the middle has it
    dropout: float = 0.0            # dropout in residual blocks
    timesteps: int = 1000           # T, number of noise levels
    weight_decay: float = 1e-4      # weight decay of AdamW
    # training: from here on --resume may change settings
    steps: int = 4000               # optimiser steps
    batch_size: int = 32            # images for each step, over all processes
    lr: float = 2e-3                # peak learning rate
    warmup: float = 0.05            # fraction of steps in which the learning rate rises
    alignment: float = 1.0          # alpha, weight of the alignment loss
    compactness: float = 1.0        # beta, weight of the compactness loss (PDM)
    null_prob: float = 0.1          # probability of training without the prototype
    mirror: bool = False            # show half of the training images flipped left to right
    save_every: int = 100           # steps between checkpoints, and rows of log.csv
    eval_every: int = 0             # steps between measurements while training; 0: none
    compile: bool = False           # torch.compile the training step
    # measuring: from here on --evaluate may, too
    data_dir: str = "data"          # where data lie or are downloaded to; or the folder of images
    judge_steps: int = 400          # steps of the judge, a classifier that measures samples
    judge_width: int = 16           # channels of its first layers; 64: ResNet-18
    inception: str = "off"          # weights for FID, IS and KID: a file, or download
    # sampling: from here on --sample may, too
    num_samples: int = 1000         # images to sample, and to measure on
    frequency: Literal["usage", "uniform"] = "usage"    # draw prototypes as training did, or evenly
    guidance: float = 1.0           # w; 0 is the conditional model, more gives less variety
    sampler: Literal["ddim", "ddpm", "dpmpp"] = "ddpm"  # ddpm suits short trainings
    sample_steps: int = 20          # steps from noise to image
    sample_batch: int = 250         # images sampled at a time
    seed: int = 0                   # seed of the training and of samples
    device: str = "auto"            # auto, cuda, cuda:1, mps or cpu
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"                # mixed precision

    # The presets have the paper's K and D. choice (paper's in brackets): T = 1000 (PDM 2000), rate
    # 5e-4 (1e-4), batch 256 (64 a process), attention at sides up to 16, large sets at 64 pixels.
    PHOTOGRAPHS = dict(
        image_size=32, mirror=True, num_prototypes=15, prototype_dim=256, channels=128,
        forget="place,mirror,light,saturation", view_size="0.45,1",
        multipliers="1,2,2,2", blocks=2, attention=16, dropout=0.1, steps=100_000, batch_size=256,
        lr=5e-4, save_every=1000, num_samples=10_000, guidance=0.3, sampler="dpmpp",
        judge_steps=8000, judge_width=64, inception="download")
    LARGER = {**PHOTOGRAPHS, "image_size": 64, "multipliers": "1,1,2,2,2", "num_prototypes": 10}
    PRESETS = {"shapes": {}, "cifar10": PHOTOGRAPHS, "folder": PHOTOGRAPHS, "stl10": LARGER,
               "eurosat": LARGER, "tiny-imagenet": {**LARGER, "num_prototypes": 200},
               "celeba": {**LARGER, "num_prototypes": 2}}
    TASKS = dict(resume="steps", evaluate="data_dir", sample="num_samples")     # may change from

    @property
    def labelled(self):
        """Must the data have classes?"""
        return self.supervised

    def build(self, known):
        """The untrained network. known: what a run knows of its data, see new_run."""
        unet = UNet(known["shape"][0], self)
        if self.conditioning == "none":
            return Unconditional(unet)
        K = len(known["classes"]) if self.supervised else self.num_prototypes
        return PDM(unet, self, known["shape"][0], K)

# ---- Prototypes: features, losses, two views -----------------------------------------------------

def feature_encoder(channels, dim):
    """f_phi, the paper's: images [B, channels, S, S] in [-1, 1], S >= 16 -> features z [B, dim]."""
    def halve(c_in, c_out):
        return nn.Conv2d(c_in, c_out, 4, stride=2, padding=1)
    return nn.Sequential(
        halve(channels, 64), nn.ReLU(),
        halve(64, 128), nn.BatchNorm2d(128), nn.ReLU(),
        halve(128, 256), nn.BatchNorm2d(256), nn.ReLU(),
        halve(256, dim), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def distances(z, prototypes):
    """||z - e||, not squared, in float32: z [B, D], prototypes [K, D] -> [B, K]."""
    return torch.cdist(z.float(), prototypes.float(), compute_mode="donot_use_mm_for_euclid_dist")

# exercise
def contrastive_loss(d, k, tau=1.0):
    """Cross-entropy of softmax(-tau d) against the chosen prototype: d [B, K], k [B] -> mean."""
    return F.cross_entropy(-tau * d, k)

# exercise
def alignment_loss(z, prototypes, k):
    """Squared error between z [B, D] and the chosen prototype, mean; no stop-gradient."""
    return F.mse_loss(z, prototypes[k])

# exercise
def compactness_loss(prototypes):
    """Sum of squared cosines between different prototypes [K, D], 0 to K (K - 1): pushes apart."""
    e = F.normalize(prototypes, dim=1)
    return ((e @ e.T) * (1 - torch.eye(len(e), device=e.device))).square().sum()

def random_view(x, cfg):
    """A random variation of each image x [B, C, S, S] -> the same shape; values may leave [-1, 1].
    A view shall choose as its image, so prototypes hardly mean what views differ in. cfg.forget has
    names of: place, a square inside the image or around it (repeating its edge), its side within
    cfg.view_size; mirror; hue, channels change places, in half of the images also dark and bright;
    light, contrast and brightness; saturation, a fifth grey."""
    B, C, S, _ = x.shape
    def uniform(low, high, n=1):                        # n numbers for each image, [B, 1, 1, n]
        return low + (high - low) * torch.rand(B, 1, 1, n, device=x.device)
    if "place" in cfg.forget:
        grid = F.affine_grid(torch.eye(2, 3, device=x.device)[None], [1, C, S, S], False)
        side = uniform(*map(float, cfg.view_size.split(",")))
        grid = side * grid + (1 - side) * uniform(-1, 1, 2)     # where in x to look, [B, S, S, 2]
        grid = grid.clamp(1 / S - 1, 1 - 1 / S)         # beyond the last pixels: repeat them
        x = F.grid_sample(x, grid, align_corners=False)
    if "mirror" in cfg.forget:
        x = torch.where(uniform(-1, 1) < 0, x.flip(-1), x)
    if "hue" in cfg.forget:
        order = torch.rand(B, C, device=x.device).argsort(1)
        x = x.take_along_dim(order[:, :, None, None], 1) * uniform(-1, 1).sign()
    if "light" in cfg.forget:
        x = x * uniform(0.6, 1.4) + uniform(-0.6, 0.6)
    if "saturation" in cfg.forget:
        x = torch.lerp(x.mean(1, keepdim=True), x, uniform(-0.4, 1.6).clamp(min=0))
    return x

# exercise
@torch.no_grad()
def balanced_assignment(scores, rounds=3):
    """Sinkhorn-Knopp (Cuturi 2013): scores [B, K] -> q [B, K], the share of each image that each
    prototype gets, without a gradient. A round scales the columns of exp(scores) to sums of 1, then
    the rows. Every image is given away whole; in the limit every prototype receives B / K."""
    for _ in range(rounds):
        scores = scores.log_softmax(0).log_softmax(1)
    return scores.exp()

# exercise
def swapped_loss(cosines):
    """choice: each view predicts what others are assigned (SwAV, Caron et al. 2020, eq. 1-2).
    cosines: of each view, [B, K]. Mean over views i != j and images of -sum(q_j log softmax(cos_i /
    0.1)); q: this process's rows of balanced_assignment of in_all_processes(cos / 0.05), which puts
    the rows of all processes below one another in order of RANK."""
    own = slice(RANK * len(cosines[0]), (RANK + 1) * len(cosines[0]))
    q = [balanced_assignment(in_all_processes(cos / 0.05))[own] for cos in cosines]
    pairs = [(cos, other) for i, cos in enumerate(cosines) for other in q[:i] + q[i + 1:]]
    return sum(F.cross_entropy(cos / 0.1, other) for cos, other in pairs) / len(pairs)

# ---- Prototypes: the conditioned denoiser --------------------------------------------------------

class PrototypeAttention(nn.Module):
    """The paper's cross-attention, residual: queries from pixels h [B, C, H, W], keys and values
    from tokens [B, n, D], here one prototype plus time. With n = 1 the softmax is 1: every pixel
    receives the same linear map of the token, and queries get no gradient."""
    def __init__(self, channels, dim, heads=8):
        super().__init__()
        self.heads = math.gcd(heads, channels)
        self.norm = group_norm(channels)
        self.q = nn.Linear(channels, channels)
        self.kv = nn.Linear(dim, 2 * channels)
        self.out = zeroed(nn.Linear(channels, channels))        # choice: starts at zero

    # exercise
    def forward(self, h, tokens):
        """h + out(softmax(q k^T / sqrt(c)) v) -> [B, C, H, W].
        q is of normalised pixels, k and v of tokens; each head has c = C / heads channels."""
        pixels = self.norm(h).flatten(2).transpose(1, 2)                        # [B, HW, C]
        q = self.q(pixels).unflatten(2, (self.heads, -1)).transpose(1, 2)       # [B, heads, HW, c]
        kv = self.kv(tokens).unflatten(2, (2, self.heads, -1))
        k, v = kv.permute(2, 0, 3, 1, 4)                                        # [B, heads, n, c]
        found = F.scaled_dot_product_attention(q, k, v)
        found = self.out(found.transpose(1, 2).flatten(2))                      # [B, HW, C]
        return h + found.transpose(1, 2).reshape(h.shape)

class Unconditional(nn.Module):
    """The baseline: the same U-Net without prototypes. denoise takes k as PDM's does, unused."""
    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def denoise(self, xt, t, k):
        return self.unet(xt, t)

    def forward(self, batch, abar, cfg):
        return {"loss": noise_loss(self.denoise, batch.x0, batch.target, batch.t, batch.eps, abar)}

    def param_groups(self):             # parts whose gradients are clipped apart
        parts = [[*self.parameters(recurse=False)], *([*p.parameters()] for p in self.children())]
        return [dict(params=part) for part in parts if part]

    def begin(self, cfg, sets, folder, device):
        """Before step 0 -> dict for run.known: targets [N], labels or -1; figures (numbers)."""
        unseen = torch.full((len(sets[0].images),), -1)
        return dict(targets=sets[0].labels if cfg.supervised else unseen, figures={})

    def quality(self, cfg, run, sets):
        """Samples -> the judge's figures, as --eval-every logs ({} without classes), images, k."""
        k = draw_conditions(cfg, run)
        images = generate(cfg, run, k)
        if not sets[0].classes:
            return {}, images, k
        figures = judge_images(cfg, run, sets, images, run.model.meaning(run, sets)[k])
        if cfg.conditioning == "none":
            del figures["accuracy"]
        return figures, images, k

    def meaning(self, run, sets):
        """The class that samples of each prototype should have, [K]: that of its real images."""
        return torch.zeros(1, dtype=torch.int64)

class PDM(Unconditional):
    """Predicts noise: a U-Net that attends to prototype k [B] before its middle; k = -1: to null.
    usage [K]: shares of choices, a moving average over 100 passes (of process 0)."""
    def __init__(self, unet, cfg, image_channels, K):
        super().__init__(unet)
        D = cfg.prototype_dim
        self.encoder = feature_encoder(image_channels, D)
        self.attention = PrototypeAttention(cfg.channels * int(cfg.multipliers.split(",")[-1]), D)
        self.prototypes = nn.Parameter(torch.empty(K, D).uniform_(-0.1, 0.1))
        self.null = nn.Parameter(0.1 * torch.randn(D))  # choice: stands for "no prototype"
        self.two_views = cfg.views == "two" and not cfg.supervised
        self.register_buffer("usage", torch.full((K,), 1 / K))

    def denoise(self, xt, t, k):
        """xt [B, C, H, W], t [B] in 0..T-1, k [B] -> the predicted noise, [B, C, H, W]."""
        e = self.normed(self.prototypes, self.prototypes.shape[1] ** 0.5)   # two views: entries ~1
        token = torch.where((k < 0)[:, None], self.null, e[k]) + time_embedding(t, e.shape[1])
        return self.unet(xt, t, before_middle=lambda h: self.attention(h, token[:, None]))

    def normed(self, v, length=1.0):
        """v [N, D]; with two views its rows scaled to this length, so that directions count."""
        return length * F.normalize(v, dim=1) if self.two_views else v

    # exercise
    def learn(self, x0, label, cfg):
        """Choose prototypes for clean images x0 [B, C, S, S] -> k [B], dicts of losses, statistics.
        k = argmin_j ||z - e_j|| with z = f_phi(x0), or the label [B] if given. Losses: contrastive,
        alignment, and without labels compactness. With two views (never of labels) z and e have
        length 1, f_phi sees x0 and the views as one batch; contrastive is swapped_loss of all.
        In training usage first goes 1/100 of the way to the shares of k. Statistics: variance_of_z,
        of the batch (biased), summed over D; of usage usage_perplexity, exp(entropy), 1 to K, and
        dead_prototypes, the number under 1 % of 1 / K. All in float32, autocast switched off."""
        with torch.autocast(x0.device.type, enabled=False):     # float32: BatchNorm would keep inf
            views = [x0, random_view(x0, cfg), random_view(x0, cfg)] if self.two_views else [x0]
            z_views = self.normed(self.encoder(torch.cat(views))).split(len(x0))
            z = z_views[0]
            e = self.normed(self.prototypes)
            d = distances(z, e)
            k = d.argmin(1) if label is None else label
            losses = {"contrastive": swapped_loss([v @ e.T for v in z_views]) if self.two_views else
                      contrastive_loss(d, k),
                      "alignment": alignment_loss(z, e, k)}
            if label is None:
                losses["compactness"] = compactness_loss(e)
        if self.training:
            self.usage.lerp_(F.one_hot(k, len(e)).float().mean(0), 0.01)
        return k, losses, {"variance_of_z": z.detach().var(0, correction=0).sum(),
                           "usage_perplexity": torch.special.entr(self.usage).sum().exp(),
                           "dead_prototypes": (self.usage < 0.01 / len(e)).float().sum()}

    def forward(self, batch, abar, cfg):
        """L_diff + L_con + alpha L_align + beta L_comp; each term; and the statistics of learn.
        The noise loss trains the prototypes attended to; f_phi learns from the other losses."""
        label = batch.target if cfg.supervised else None
        k, losses, statistics = self.learn(batch.x0, label, cfg)
        told = torch.where(batch.chance < cfg.null_prob, -1, k)
        diffusion = noise_loss(self.denoise, batch.x0, told, batch.t, batch.eps, abar)
        loss = diffusion + losses["contrastive"] + cfg.alignment * losses["alignment"]
        loss = loss + cfg.compactness * losses.get("compactness", 0)    # s-PDM has none
        return {"loss": loss, "diffusion": diffusion, **losses, **statistics}

    def choose(self, images, device):
        """uint8 images [N, C, S, S] -> z [N, D], distances [N, K] of prototypes, on the CPU."""
        z = self.normed(features_of(self.encoder, images, device))
        return z, distances(z, self.normed(self.prototypes).cpu())

    def meaning(self, run, sets):
        if run.config.supervised:                       # the label is the prototype
            return torch.arange(len(self.prototypes))
        return crosstable(run, sets[1]).argmax(1)

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

def open_eurosat(root, train):
    """choice: a tenth is held out, for the set comes without a split."""
    if not (root / "eurosat").is_dir():                 # unpacked elsewhere: here it is whole
        shutil.rmtree(root / "unpacking", ignore_errors=True)
        torchvision.datasets.EuroSAT(root / "unpacking", download=True)
        os.renames(root / "unpacking" / "eurosat", root / "eurosat")
    data = torchvision.datasets.EuroSAT(root)
    return split_off(data.samples, train), data.classes

def open_celeba(root, train):
    """Two classes, by the attribute Male. Nothing is downloaded; raises Stop if it is not there."""
    folder = Path(root, "celeba", "img_align_celeba")
    check(folder.is_dir(), f"{folder.parent} must hold img_align_celeba/ and the .txt files of "
          "mmlab.ie.cuhk.edu.hk/projects/CelebA.html")
    data = torchvision.datasets.CelebA(root, "train" if train else "test")
    male = data.attr[:, data.attr_names.index("Male")].tolist()
    return [(folder / name, y) for name, y in zip(data.filename, male)], ["not male", "male"]

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
             "tiny-imagenet": open_tiny_imagenet, "eurosat": open_eurosat, "celeba": open_celeba}

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

# ---- Metrics: do prototypes mean something? ------------------------------------------------------

def contingency(k, labels, K, C):
    """How many images of class c chose prototype k: choices k [N], labels [N] -> float64 [K, C]."""
    return torch.bincount(k * C + labels, minlength=K * C).view(K, C).double()

def purity(table):
    """Share of images that are of their prototype's commonest class: contingency table [K, C]."""
    return (table.amax(1).sum() / table.sum()).item()

def normalised_mutual_information(table):
    """I(prototype; class) / mean of both entropies: contingency table [K, C] -> 0 to 1."""
    p = table / table.sum()
    both = torch.special.entr(p.sum(1)).sum() + torch.special.entr(p.sum(0)).sum()
    shared = both - torch.special.entr(p).sum()
    return (2 * shared / both).item() if both > 0 else 1.0

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

def draw_features(path, z, prototypes, panels):
    """features.png: z [N, D], prototypes [K, D]; panels: (title, group of each z [N], names)."""
    plane = torch.linalg.eigh(moments(z)[1]).eigenvectors[:, -2:].flip(1).float()   # [D, 2]
    stars = prototypes @ plane
    with drawing(path, 6.5 * len(panels), 5.5) as fig:
        for i, (title, groups, names) in enumerate(panels):
            axes = fig.add_subplot(1, len(panels), i + 1)
            axes.scatter(*stars.T, s=400, marker="*", color="white", edgecolor="black")
            dots = axes.scatter(*(z @ plane).T, s=4, alpha=0.5, c=groups % 20, cmap="tab20",
                                vmax=19)
            for number, star in enumerate(stars[:40].tolist()):
                axes.annotate(str(number), star, textcoords="offset points", xytext=(10, 7))
            axes.set(title=title, xlabel="first principal component", ylabel="second")
            if len(names) <= 20:
                axes.legend(dots.legend_elements(num=None)[0], [names[g] for g in groups.unique()],
                            loc="center left", bbox_to_anchor=(1, 0.5))
        fig.suptitle("features z of held-out images (dots) and prototypes (stars, numbered)")

def draw_usage(path, rows, table, classes):
    """usage.png: prototypes in use over the log; the contingency table, by the commonest class."""
    K = len(table)
    order = table.argmax(1).argsort(stable=True)[:40]
    with drawing(path, 13, 4.5) as fig:
        use, matrix = fig.subplots(1, 2)
        steps = [row["step"] for row in rows]
        use.plot(steps, [row["usage_perplexity"] for row in rows], label="perplexity of their use")
        use.plot(steps, [K - row["dead_prototypes"] for row in rows], label="alive")
        use.set(title=f"prototypes in use, of {K}", xlabel="step", ylim=(0, 1.1 * K))
        use.legend()
        shown = table[order, :40]
        fig.colorbar(matrix.imshow(shown, aspect="auto"), ax=matrix, label="held-out images")
        matrix.set(title="which images choose each prototype", ylabel="prototype")
        matrix.set_yticks(range(len(order)), order.tolist(), fontsize="small")
        if len(classes) <= 20:
            matrix.set_xticks(range(len(classes)), classes, rotation=90)

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

def in_all_processes(rows):
    """rows [B, n] of all of torchrun's processes, in order -> [WORLD * B, n], without gradient."""
    if not dist.is_initialized():
        return rows.detach()
    parts = [torch.empty_like(rows) for _ in range(WORLD)]
    dist.all_gather(parts, rows.detach())
    return torch.cat(parts)

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

def condition_names(cfg, run):
    """What to write beside the images of each prototype."""
    if cfg.conditioning == "none":
        return ["no condition"]
    if cfg.supervised:
        return run.known["classes"]
    return [f"prototype {i}" for i in range(cfg.num_prototypes)]

def draw_conditions(cfg, run):
    """cfg.num_samples prototypes to sample from, [N], sorted.
    choice: as often as training chose each of late (paper: uniform)."""
    if cfg.conditioning == "none":
        return torch.zeros(cfg.num_samples, dtype=torch.int64)
    share = run.model.usage.cpu()
    if cfg.frequency == "uniform":
        share = torch.ones_like(share)
    place = (torch.arange(cfg.num_samples) + 0.5) / cfg.num_samples * share.sum()
    return torch.searchsorted(share.cumsum(0), place)

def asked_conditions(cfg, run, given):
    """--sample: prototypes [N], those asked for in turn, or drawn. Raises Stop if not there."""
    names = run.known["classes"] if cfg.supervised else [*map(str, range(cfg.num_prototypes))]
    if given.like:
        mode = "RGB" if run.known["shape"][0] == 3 else "L"
        image, _ = decode_all([(given.like, 0)], cfg.image_size, mode)
        chosen = run.model.choose(image, run.device)[1].argmin(1).tolist()
        print(f"{given.like} chooses prototype {names[chosen[0]]}")
    elif given.prototype is not None:
        words = given.prototype.split(",")
        check({*words} <= {*names}, f"--prototype takes of {', '.join(names)}")
        chosen = [names.index(word) for word in words]
    else:
        return draw_conditions(cfg, run)
    return torch.tensor(chosen)[torch.arange(cfg.num_samples) % len(chosen)]

def crosstable(run, data):
    """How many images of a data set of class c choose prototype k -> [K, C]; no classes: C = 1."""
    k = run.model.choose(data.images, run.device)[1].argmin(1)
    return contingency(k, data.labels, len(run.model.prototypes), len(data.classes) or 1)

def measure_prototypes(cfg, run, sets, folder):
    """Pictures in `folder`, and figures as a dict, of held-out images."""
    prototypes = run.model.normed(run.model.prototypes).cpu()
    z, d_test = run.model.choose(sets[1].images, run.device)
    _, d_train = run.model.choose(sets[0].images, run.device)
    names = drawable(condition_names(cfg, run))
    classes = drawable(sets[1].classes)
    table = crosstable(run, sets[1])
    order = table.argmax(1).argsort(stable=True)[:20]
    rows = [names[k] for k in order]
    if classes and not cfg.supervised:
        pure = table.amax(1) / table.sum(1).clamp(min=1)
        rows = [f"{k}: {pure[k]:.0%} {classes[table[k].argmax()]}" for k in order]
    shown = generate(cfg, run, order.repeat_interleave(6)).unflatten(0, (-1, 6))
    nearest = d_train[:, order].topk(min(6, len(d_train)), 0, largest=False).indices.T
    gap = torch.full_like(shown[:, :1], 255)
    tiles = torch.cat([shown, gap, sets[0].images[nearest]], 1).flatten(0, 1)
    draw_grid(folder / "prototypes.png", tiles, rows,
              "samples of each prototype; right of the gap, the real images nearest to it")
    share = torch.bincount(d_train.argmin(1), minlength=len(prototypes)) / len(d_train)
    figures = dict(alive=(share > 0).sum().item(),
                   usage_perplexity=torch.special.entr(share).sum().exp().item(),
                   variance_of_z=z.var(0, correction=0).sum().item())
    some = some_of(len(z), 3000)
    panels = [("by prototype", d_test.argmin(1)[some], names)]
    if classes:
        panels.append(("by class", sets[1].labels[some], classes))
        figures.update(purity=purity(table), nmi=normalised_mutual_information(table))
    draw_features(folder / "features.png", z[some], prototypes, panels)
    draw_usage(folder / "usage.png", run.log, table, classes)
    return figures

def measure_cost(cfg, run, sets, rounds=5):
    """What prototypes cost beside the U-Net alone: parameters, bytes, seconds a step and a sample.
    Seconds are medians of rounds, in which both networks take turns; samples come at guidance 0."""
    abar = alpha_bars(cfg.timesteps).to(run.device)
    batch = random_batch(cfg, sets[0].images, run.known["targets"], 0, run.device)
    unguided = dataclasses.replace(cfg, guidance=0.0)
    net = copy.deepcopy(run.model).train().requires_grad_(True)
    seconds = []
    for model in (rounds + 2) * [net, Unconditional(net.unet)]:
        made = SimpleNamespace(model=model, known=run.known, device=run.device)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        start = time.perf_counter()
        with autocast(run.device, cfg.amp):
            loss = model(batch, abar, cfg)["loss"]
        loss.backward()
        optimizer.step()
        loss.item()                                     # waits for the device
        trained = time.perf_counter()
        generate(unguided, made, torch.zeros(10, dtype=torch.int64))
        seconds.append([trained - start, (time.perf_counter() - trained) / 10])
    times = np.reshape(seconds, (-1, 2, 2))[2:]         # [rounds, networks, step and sample]
    (step, sample), (plain_step, plain_sample) = np.median(times, axis=0).tolist()
    return dict(parameters=sum(p.numel() for p in net.parameters()),
                unet_parameters=sum(p.numel() for p in net.unet.parameters()),
                prototype_bytes=net.prototypes.nbytes,
                bank_bytes=len(sets[0].images) * net.prototypes[0].nbytes,
                step_seconds=step, step_ratio=step / plain_step,
                sample_seconds=sample, sample_ratio=sample / plain_sample)

def evaluate_pdm(cfg, run, sets, folder):
    """Samples, pictures and metrics.json of a trained run, in `folder`."""
    figures, images, k = run.model.quality(cfg, run, sets)
    save_samples(folder, images, k, condition_names(cfg, run), f"step {run.step}")
    if sets[0].classes:
        some = some_of(len(sets[1].images), cfg.num_samples)    # for the distance depends on it
        real = judge_images(cfg, run, sets, sets[1].images[some], sets[1].labels[some])
        figures.update({f"real_{name}": value for name, value in real.items()})
    if cfg.conditioning == "prototype":
        figures.update(measure_prototypes(cfg, run, sets, folder), **measure_cost(cfg, run, sets))
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

def pdm(given):
    """Do what the command line asks for."""
    asked = ["prototype", "like"]
    if given.compare:
        without_effect(given, [*vars(Config()), *asked], "with --compare")
        return compare(given.compare, given.out)
    cfg, task, folder = read_settings(given)
    of_pdm = ["forget", "view_size", "views", "num_prototypes", "compactness"]
    if task != "sample":
        without_effect(given, asked, "without --sample")
    if given.prototype is not None or given.like:
        without_effect(given, ["frequency"], "for prototypes that are asked for")
    if "place" not in cfg.forget:
        without_effect(given, ["view_size"], "without place in --forget")
    if cfg.views == "one":
        without_effect(given, of_pdm[:2], "with --views one")
    if cfg.supervised:
        without_effect(given, of_pdm, "with --supervised")
    if cfg.conditioning == "none":
        without_effect(given, [*of_pdm, *asked, "supervised", "prototype_dim", "alignment",
                               "null_prob", "frequency", "guidance"], "with --conditioning none")
        cfg.guidance = 0.0
    check(cfg.prototype_dim % 2 == 0 and cfg.image_size >= 16,
          "--prototype-dim must be even, and --image-size at least 16")
    words = "place,mirror,hue,light,saturation"
    check({*cfg.forget.split(",")} <= {*words.split(","), ""}, f"--forget takes some of {words}")
    sides = re.fullmatch(r"(\d*\.?\d+),(\d*\.?\d+)", cfg.view_size)
    check(sides and 0 < float(sides[1]) <= float(sides[2]), "give --view-size like 0.8,1.2")
    check(cfg.null_prob > 0 or cfg.guidance == 0, "--null-prob 0 leaves no guidance: --guidance 0")
    if task in ("train", "resume"):
        sets = train_run(cfg, given)
        if RANK == 0:
            evaluate_pdm(cfg, load_run(given.resume, cfg.device), sets, given.resume)
        return
    run = load_run(folder, cfg.device)
    check(run.step > 0, f"{folder} is not trained yet: --resume it first")
    if task == "evaluate":
        sets = same_images(run, load_sets(cfg))
        evaluate_pdm(cfg, run, sets, new_folder(given.out, folder / task))
        return
    k = asked_conditions(cfg, run, given)
    out = new_folder(given.out, folder / task)
    images = generate(cfg, run, k)
    save_samples(out, images, k, condition_names(cfg, run), f"guidance {cfg.guidance}")

def main(argv=None):
    """The command line -> exit status: 2 after one sentence about what a person can put right, 130
    after Ctrl-C. A fault of this program shows its traceback."""
    parser = settings_parser()
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--prototype", "--labels", help="--sample: like 0,3; s-PDM: circle,star")
    group.add_argument("--like", type=user_path, help="--sample: an image, as whose prototype")
    given = parser.parse_args(argv)
    try:
        pdm(given)
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
