"""The method: diffusion process, samplers, network, prototypes, metrics. Exact answers wherever there is one."""
import copy
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import protodiffusion as pd

CPU = torch.device("cpu")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def close(a, b, atol=1e-6, rtol=1e-5):
    return torch.allclose(torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64), rtol, atol)


def exact_alpha_bars(T):
    """float64, written out as a loop."""
    abar, values = 1.0, []
    for i in range(T):
        abar *= 1 - (1e-4 + (0.02 - 1e-4) * i / (T - 1)) * 1000 / T
        values.append(abar)
    return torch.tensor(values, dtype=torch.float64)


# ---- process ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("T", [50, 1000, 4000])
def test_alpha_bars_are_the_product_of_one_minus_beta_scaled_by_T(T):
    abar = pd.alpha_bars(T)
    assert abar.shape == (T,) and abar.dtype == torch.float32
    assert close(abar, exact_alpha_bars(T), atol=1e-7), "alpha_bars: betas linear 1e-4 .. 0.02, times 1000 / T"
    assert close(abar[0], 1 - 0.1 / T) and 1e-5 < abar[-1] < 1e-4 or T < 1000


def test_alpha_bars_refuse_a_beta_of_one():
    with pytest.raises(pd.Stop):
        pd.alpha_bars(20)                                     # 0.02 * 1000 / 20 = 1
    assert (pd.alpha_bars(21) > 0).all()


@pytest.mark.parametrize("t", [0, 100, 500, 999])
def test_noised_images_have_the_mean_and_spread_of_the_forward_process(t):
    abar, x0 = pd.alpha_bars(1000), torch.tensor([0.8, -0.5, 0.1]).view(1, 3, 1, 1).expand(20_000, 3, 1, 1)
    xt = pd.add_noise(x0, torch.full((20_000,), t), torch.randn(x0.shape, generator=seeded(t)), abar)[:, :, 0, 0]
    a = float(exact_alpha_bars(1000)[t])
    tolerance = 5 * math.sqrt((1 - a) / 20_000)               # five standard errors of a mean; of a std it is fewer
    assert (xt.mean(0) - math.sqrt(a) * x0[0, :, 0, 0]).abs().max() < tolerance, "add_noise: mean sqrt(abar) x0"
    assert (xt.std(0) - math.sqrt(1 - a)).abs().max() < tolerance, "add_noise: std sqrt(1 - abar)"


def test_every_image_is_noised_at_its_own_level():
    abar, t = pd.alpha_bars(100), torch.tensor([3, 70])
    xt = pd.add_noise(torch.ones(2, 1, 2, 2), t, torch.zeros(2, 1, 2, 2), abar)
    assert close(xt[:, 0, 0, 0], abar[t].sqrt())


def test_noise_loss_is_the_mean_squared_error_over_all_elements():
    abar, t, seen = pd.alpha_bars(100), torch.tensor([5, 60]), {}
    x0, eps = (torch.randn(2, 3, 4, 4, generator=seeded(s)) for s in (0, 1))

    def model(*args):
        seen["args"] = args
        return eps + torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
    loss = pd.noise_loss(model, x0, "condition", t, eps, abar)
    assert close(loss, (1 + 9) / 2), "noise_loss: mean over batch, channels and pixels"
    assert close(seen["args"][0], pd.add_noise(x0, t, eps, abar)) and seen["args"][1:] == (t, "condition")
    one_pixel = eps.clone()
    one_pixel[0, 0, 0, 0] += 96 ** 0.5
    assert close(pd.noise_loss(lambda *_: one_pixel, x0, None, t, eps, abar), 1.0)


# ---- samplers ---------------------------------------------------------------------------------------------------

def gaussian_noise(abar, mu, sigma):
    """The best noise predictor there is if the data are N(mu, sigma), x [B, 1, 1, D]: it follows from the score."""
    def predict(x, t):
        a, eye = abar[t[0]], torch.eye(len(mu), dtype=mu.dtype)
        inverse = torch.linalg.inv(a * sigma + (1 - a) * eye)
        return (1 - a).sqrt() * (x - a.sqrt() * mu) @ inverse
    return predict


def gaussian_data():
    mu = torch.tensor([0.5, -0.3, 2.0], dtype=torch.float64)
    root = torch.tensor([[0.6, 0.0, 0.0], [0.3, 0.4, 0.0], [-0.5, 0.2, 1.2]], dtype=torch.float64)
    return mu, root @ root.T


@pytest.mark.parametrize("sampler, eta, steps", [("ddim", 0.0, 500), ("ddim", 1.0, 1000), ("ddpm", 0.0, 1000), ("dpmpp", 0.0, 100)])
def test_samplers_recover_the_mean_and_covariance_of_a_gaussian(sampler, eta, steps):
    mu, sigma = gaussian_data()
    abar, N = exact_alpha_bars(1000), 4000
    xT = torch.randn(N, 1, 1, 3, generator=seeded(1), dtype=torch.float64)
    x = pd.sample(gaussian_noise(abar, mu, sigma), xT, abar, steps, sampler, eta, clip=False, generator=seeded(2)).view(N, 3)
    scale = sigma.diagonal().sqrt()
    # Five standard errors, 5 / sqrt(N) for a mean and sqrt(2) as much for a variance, and 1 % for finite steps.
    assert ((x.mean(0) - mu) / scale).abs().max() < 5 / N ** 0.5 + 0.01, f"{sampler}: mean {x.mean(0)}"
    error = (torch.cov(x.T) - sigma) / scale / scale[:, None]
    assert error.abs().max() < 5 * (2 / N) ** 0.5 + 0.01, f"{sampler}: covariance is off by {error}"


def ode_errors(sampler, doublings, at, s=0.5, mu=0.3, T=16_000):
    """Largest error at level T / at - 1, against the exact solution: the probability flow of a Gaussian is affine."""
    abar = exact_alpha_bars(T)
    xT = torch.linspace(-2, 2, 5, dtype=torch.float64).view(5, 1, 1, 1)
    predict = gaussian_noise(abar, torch.tensor([mu], dtype=torch.float64), torch.tensor([[s * s]], dtype=torch.float64))

    def width(a):
        return (a * s * s + 1 - a) ** 0.5
    z, errors = (xT - abar[-1].sqrt() * mu) / width(abar[-1]), []
    for steps in doublings:
        trace = []
        x = pd.sample(predict, xT, abar, steps, sampler, clip=False, trace=trace)
        if at:
            (t, x), a = trace[steps - steps // at], abar[T // at - 1]
            assert t == T // at - 1
        else:
            a = torch.ones(())                                # the clean image
        errors.append((x - a.sqrt() * mu - width(a) * z).abs().max().item())
    return errors
