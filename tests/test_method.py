"""The method: diffusion process, samplers, network, prototypes, metrics. Exact answers wherever there is one."""
import copy
import dataclasses
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import protodiffusion as pd
from conftest import CPU, awake, checkpoint, close, config, normal, seeded

SAMPLERS = ["ddim", "ddpm", "dpmpp"]

def exact_alpha_bars(T):
    """float64, written out as a loop."""
    abar = 1.0
    values = []
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
    assert (pd.alpha_bars(21) > 0).all()
    with pytest.raises(pd.Stop):
        pd.alpha_bars(20)                                     # 0.02 * 1000 / 20 = 1

@pytest.mark.parametrize("t", [0, 100, 500, 999])
def test_noised_images_have_the_mean_and_spread_of_the_forward_process(t):
    x0 = torch.tensor([0.8, -0.5, 0.1]).view(1, 3, 1, 1).expand(20_000, 3, 1, 1)
    xt = pd.add_noise(x0, torch.full((20_000,), t), normal(20_000, 3, 1, 1, seed=t), pd.alpha_bars(1000))[:, :, 0, 0]
    a = float(exact_alpha_bars(1000)[t])
    tolerance = 5 * math.sqrt((1 - a) / 20_000)               # five standard errors of a mean; of a std it is fewer
    assert (xt.mean(0) - math.sqrt(a) * x0[0, :, 0, 0]).abs().max() < tolerance, "add_noise: mean sqrt(abar) x0"
    assert (xt.std(0) - math.sqrt(1 - a)).abs().max() < tolerance, "add_noise: std sqrt(1 - abar)"

def test_every_image_is_noised_at_its_own_level():
    abar, t = pd.alpha_bars(100), torch.tensor([3, 70])
    xt = pd.add_noise(torch.ones(2, 1, 2, 2), t, torch.zeros(2, 1, 2, 2), abar)
    assert close(xt[:, 0, 0, 0], abar[t].sqrt())

def test_noise_loss_is_the_mean_squared_error_over_all_elements():
    abar, t, seen = pd.alpha_bars(100), torch.tensor([5, 60]), []
    x0, eps = normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1)

    def model(*args):
        seen.extend(args)
        return eps + torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
    assert close(pd.noise_loss(model, x0, "condition", t, eps, abar), 5), "noise_loss: mean over images and pixels"
    assert close(seen[0], pd.add_noise(x0, t, eps, abar)) and seen[1:] == [t, "condition"]
    one_pixel = eps.clone()
    one_pixel[0, 0, 0, 0] += 96 ** 0.5
    assert close(pd.noise_loss(lambda *_: one_pixel, x0, None, t, eps, abar), 1.0)
    assert pd.noise_loss(lambda *_: eps.bfloat16(), x0, None, t, eps, abar).dtype == torch.float32

# ---- samplers ---------------------------------------------------------------------------------------------------

def gaussian_noise(abar, mu, sigma):
    """The best noise predictor there is if the data are N(mu, sigma), x [B, 1, 1, D]: it follows from the score."""
    def predict(x, t):
        a, eye = abar[t[0]], torch.eye(len(mu), dtype=mu.dtype)
        inverse = torch.linalg.inv(a * sigma + (1 - a) * eye)
        return (1 - a).sqrt() * (x - a.sqrt() * mu) @ inverse
    return predict

@pytest.mark.parametrize("sampler, steps", [("ddim", 500), ("ddpm", 1000), ("dpmpp", 100)])
def test_samplers_recover_the_mean_and_covariance_of_a_gaussian(sampler, steps):
    mu = torch.tensor([0.5, -0.3, 2.0], dtype=torch.float64)
    root = torch.tensor([[0.6, 0.0, 0.0], [0.3, 0.4, 0.0], [-0.5, 0.2, 1.2]], dtype=torch.float64)
    sigma, abar, N = root @ root.T, exact_alpha_bars(1000), 4000
    xT = normal(N, 1, 1, 3, seed=1, dtype=torch.float64)
    x = pd.sample(gaussian_noise(abar, mu, sigma), xT, abar, steps, sampler, False, seeded(2)).view(N, 3)
    scale = sigma.diagonal().sqrt()
    # Five standard errors, 5 / sqrt(N) for a mean and sqrt(2) as much for a variance, and 1 % for finite steps.
    assert ((x.mean(0) - mu) / scale).abs().max() < 5 / N ** 0.5 + 0.01, f"{sampler}: mean {x.mean(0)}"
    error = (torch.cov(x.T) - sigma) / scale / scale[:, None]
    assert error.abs().max() < 5 * (2 / N) ** 0.5 + 0.01, f"{sampler}: covariance is off by {error}"

def traced(predict):
    """A noise predictor that notes (t, x) of every step -> it, and the list."""
    trace = []

    def noting(x, t):
        trace.append((t[0].item(), x))
        return predict(x, t)
    return noting, trace

def ode_errors(sampler, doublings, at, s=0.5, mu=0.3, T=16_000):
    """Largest error at level T / at - 1, against the exact solution: the probability flow of a Gaussian is affine."""
    abar = exact_alpha_bars(T)
    xT = torch.linspace(-2, 2, 5, dtype=torch.float64).view(5, 1, 1, 1)
    predict, trace = traced(gaussian_noise(abar, *torch.tensor([[[mu]], [[s * s]]], dtype=torch.float64)))

    def width(a):
        return (a * s * s + 1 - a) ** 0.5
    z, errors = (xT - abar[-1].sqrt() * mu) / width(abar[-1]), []
    for steps in doublings:
        trace.clear()
        x, a = pd.sample(predict, xT, abar, steps, sampler, clip=False), torch.ones(())     # the clean image
        if at:
            (t, x), a = trace[steps - steps // at], abar[T // at - 1]
            assert t == T // at - 1
        errors.append((x - a.sqrt() * mu - width(a) * z).abs().max().item())
    return errors

@pytest.mark.parametrize("at", [2, 8])
def test_ddim_is_first_order_and_dpmpp_second_on_the_probability_flow(at):
    ddim, dpmpp = (ode_errors(sampler, [128, 256, 512], at) for sampler in ("ddim", "dpmpp"))
    for a, b in itertools.pairwise(ddim):
        assert 1.9 < a / b < 2.1, f"ddim: twice the steps should halve the error: {ddim}"
    for a, b in itertools.pairwise(dpmpp):
        assert 3.7 < a / b < 4.7, f"dpmpp: twice the steps should quarter the error, else it is not 2M: {dpmpp}"

def step_inputs():
    x0, eps, noise = (normal(4, 2, 3, 3, seed=i, dtype=torch.float64) for i in range(3))
    a, a_next = torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    return a.sqrt() * x0 + (1 - a).sqrt() * eps, x0, eps, noise, a, a_next

def test_ddpm_step_is_ddim_step_at_eta_one():
    """The posterior of DDPM, eq. 6-7, whose beta between two levels is 1 - a / a_next."""
    x, x0, eps, noise, a, a_next = step_inputs()
    beta = 1 - a / a_next
    mean = (a_next.sqrt() * beta * x0 + (a / a_next).sqrt() * (1 - a_next) * x) / (1 - a)
    ddpm = mean + ((1 - a_next) / (1 - a) * beta).sqrt() * noise
    assert close(ddpm, pd.ddim_step(x0, eps, a, a_next, 1.0, noise), 1e-12, 1e-12)

@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_step_weighs_image_prediction_and_noise(eta):
    x, _, _, _, a, a_next = step_inputs()
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    image, eps, noise = (pd.ddim_step(*given[:2], a, a_next, eta, given[2]).flatten()[0]
                         for given in ((one, zero, zero), (zero, one, zero), (zero, zero, one)))
    assert close(image, a_next.sqrt(), 1e-12, 1e-12), "sqrt(a_next) x0"
    assert close(noise, eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)).sqrt(), 1e-12, 1e-12), "sigma, eq. 16"
    assert close(eps ** 2 + noise ** 2, 1 - a_next, 1e-12, 1e-12), "what there is of both is the variance 1 - a_next"
    last = pd.ddim_step(one, one, a, torch.ones_like(a), eta, zero)
    assert close(last, one, 1e-12, 1e-12), "the last step, to abar = 1, gives the predicted image"
    assert eta or pd.ddim_step(one, zero, a, a_next).equal(a_next.sqrt() * one), "eta = 0 is given no noise"

def test_first_dpmpp_step_is_ddim_and_the_second_uses_the_step_before():
    x, x0, eps, _, a, a_next = step_inputs()
    first = a_next.sqrt() * x0 + (1 - a_next).sqrt() * eps
    assert close(pd.dpmpp_step(x, x0, a, a_next), first, 1e-12, 1e-12)
    before, a_before = x0 - 1, torch.tensor(0.1, dtype=torch.float64)

    def log_snr(a):
        return math.log(math.sqrt(a) / math.sqrt(1 - a))
    h, h_before = log_snr(a_next) - log_snr(a), log_snr(a) - log_snr(a_before)
    gain = a_next.sqrt() * (1 - math.exp(-h)) * h / (2 * h_before)        # times x0 - x0_before = 1
    assert close(pd.dpmpp_step(x, x0, a, a_next, before, a_before), first + gain, 1e-12, 1e-12)
    assert close(pd.dpmpp_step(x, x0, a, torch.ones(()), before, a_before), x0), "the last step gives the prediction"

@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_every_sampler_lands_on_a_one_point_data_set(sampler, steps):
    abar, point = pd.alpha_bars(50), torch.linspace(-0.9, 0.9, 12).view(1, 3, 2, 2)

    def predict(x, t):
        a = abar[t][:, None, None, None]
        return (x - a.sqrt() * point) / (1 - a).sqrt()
    x = pd.sample(predict, normal(3, 3, 2, 2), abar, steps, sampler, generator=seeded(1))
    # float32 divides by sqrt(abar) = 0.006 at the first level, which leaves some 1e-5.
    assert close(x, point.expand_as(x), atol=1e-4), f"{sampler} missed by {(x - point).abs().max()}"

@pytest.mark.parametrize("T, steps", [(1000, 1), (1000, 20), (1000, 999), (1000, 1000), (50, 37), (21, 21)])
def test_sample_times_trail_from_the_noisiest_level_and_never_repeat(T, steps):
    times = pd.sample_times(T, steps)
    assert len(times) == steps and times[0] == T - 1 and times[-1] >= 0
    gaps = [a - b for a, b in zip(times, [*times[1:], -1])]
    assert min(gaps) > 0 and all(abs(gap - T / steps) < 1.01 for gap in gaps), "spacing T / steps, to T / steps - 1"
    assert pd.sample_times(1000, 4) == [999, 749, 499, 249]

@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_repeat_and_stay_in_range_and_the_predictor_sees_every_step(sampler):
    abar, xT = pd.alpha_bars(100), normal(2, 3, 4, 4)
    a, b, c = (pd.sample(lambda x, t: 0.9 * x, xT, abar, 5, sampler, False, seeded(seed)) for seed in (1, 1, 2))
    assert a.equal(b) and a.equal(c) == (sampler != "ddpm"), "only ddpm draws noise"
    wild, trace = traced(lambda x, t: 5 * torch.sin(7 * x))
    assert pd.sample(wild, xT, abar, 6, sampler, generator=seeded(1)).abs().max() <= 1 + 1e-6
    assert [t for t, _ in trace] == pd.sample_times(100, 6) and trace[0][1].equal(xT)
    assert pd.sample(wild, xT, abar, 6, sampler, clip=False, generator=seeded(1)).abs().max() > 1.5

def test_clipping_derives_the_noise_from_the_clipped_image():
    abar = pd.alpha_bars(100)
    far, trace = traced(lambda x, t: torch.full_like(x, -9.0))            # predicts far more than 1
    pd.sample(far, torch.full((1, 1, 1, 1), 0.5), abar, 2, "ddim")
    a, b = abar[99], abar[49]
    assert close(trace[1][1].squeeze(), b.sqrt() + (1 - b).sqrt() * (0.5 - a.sqrt()) / (1 - a).sqrt())

class Recorder:
    """A noise predictor that answers with 10 * its row + x and remembers its calls."""
    def __init__(self):
        self.calls = []

    def __call__(self, x, t, row):
        self.calls.append((x, t, row))
        return 10.0 * row[:, None, None, None] + x

@pytest.mark.parametrize("w", [-1.0, -0.5, 0.5, 3.0])
def test_guidance_extrapolates_from_null_to_class_in_one_doubled_batch(w):
    model, x = Recorder(), normal(3, 1, 2, 2)
    t, row = torch.tensor([4, 5, 6]), torch.tensor([2, 0, 1])
    null = torch.full_like(row, -1)
    eps = pd.guided_noise(model, x, t, row, null, w)
    expected = (1 + w) * 10 * row - w * 10 * null
    assert close(eps - x, expected[:, None, None, None].expand_as(x), 1e-5), "(1 + w) eps(class) - w eps(null)"
    assert len(model.calls) == 1, "both halves go through the network as one batch"
    assert [a.equal(torch.cat(b)) for a, b in zip(model.calls[0], ((x, x), (t, t), (row, null)))] == [True] * 3

def test_no_guidance_is_one_call_of_the_plain_batch():
    model, x, t, row = Recorder(), torch.randn(3, 1, 2, 2), torch.tensor([4, 5, 6]), torch.tensor([2, 0, 1])
    assert pd.guided_noise(model, x, t, row, torch.full_like(row, -1), 0).equal(10.0 * row[:, None, None, None] + x)
    assert len(model.calls) == 1 and all(a is b for a, b in zip(model.calls[0], (x, t, row)))

# ---- U-Net ------------------------------------------------------------------------------------------------------

def unet(channels, side, width, multipliers, blocks, attention):
    return pd.UNet(channels, pd.Config(image_size=side, channels=width, multipliers=multipliers, blocks=blocks,
                                       attention=attention))

@pytest.mark.parametrize("channels, side, width, multipliers, blocks, attention", [
    (1, 8, 8, "1,2", 1, 4), (3, 8, 16, "1", 2, 0), (1, 12, 12, "2,1,3", 2, 6), (3, 10, 4, "1,2", 1, 10)])
def test_unet_keeps_the_shape_starts_at_zero_and_reads_all(channels, side, width, multipliers, blocks, attention):
    net = unet(channels, side, width, multipliers, blocks, attention).eval()
    x, t, condition = torch.randn(2, channels, side, side), torch.tensor([0, 900]), torch.randn(2, net.emb_dim)
    assert net(x, t).shape == x.shape and (net(x, t, condition) == 0).all(), "UNet: the output starts at zero"
    awake(net)
    out = net(x, t, condition)
    assert (out - net(x, t)).abs().max() > 1e-4, "UNet: the condition does not reach the output"
    assert (out - net(x, t.flip(0), condition)).abs().max() > 1e-4, "UNet: the time does not reach the output"
    assert close(net(x, t, torch.zeros_like(condition)), net(x, t)), "UNet: a zero condition is no condition"
    assert close(net(x[1:], t[1:], condition[1:]), out[1:], 1e-4, 1e-4), "UNet: images of a batch must not mix"

def test_unet_attends_at_small_levels_and_in_the_middle():
    sides, net = [], unet(3, 16, 8, "1,1,1", 1, 8)
    for module in net.modules():
        if isinstance(module, pd.Attention):
            module.register_forward_pre_hook(lambda m, args: sides.append(args[0].shape[-1]))
    net(torch.zeros(1, 3, 16, 16), torch.tensor([1]))
    assert sides == [8, 4, 4, 4, 4, 8, 8]                     # down, middle, up with one block more

def test_time_embedding_by_hand_and_blocks_that_start_as_the_identity():
    expected = [[0, 0, 1, 1], [math.sin(3), math.sin(0.03), math.cos(3), math.cos(0.03)]]
    assert close(pd.time_embedding(torch.tensor([0, 3]), 4), expected)
    x, emb = torch.randn(2, 8, 4, 4), torch.randn(2, 16)
    assert pd.ResBlock(8, 8, 16, 0.0)(x, emb).equal(x) and pd.Attention(8)(x, emb).equal(x)

@pytest.mark.parametrize("channels, heads", [(8, 1), (96, 1), (64, 1), (128, 2), (192, 3)])
def test_attention_is_softmax_of_scaled_products_in_heads_of_64(channels, heads):
    layer, x = awake(pd.Attention(channels), 3), normal(2, channels, 3, 5, seed=4)
    d, h = channels // heads, layer.norm(x)
    with torch.no_grad():
        for b in range(2):
            q, k, v = (h[b].flatten(1).T @ layer.qkv.weight.T + layer.qkv.bias).split(channels, 1)      # [HW, C] each
            parts = [slice(i * d, i * d + d) for i in range(heads)]
            mixed = [(q[:, s] @ k[:, s].T / math.sqrt(d)).softmax(1) @ v[:, s] for s in parts]
            out = torch.cat(mixed, 1) @ layer.out.weight.T + layer.out.bias
            expected = x[b] + out.T.reshape(channels, 3, 5)
            assert close(layer(x, None)[b], expected, 1e-4, 1e-4), "Attention: softmax(Q K^T / sqrt(d)) V"

@pytest.mark.parametrize("channels", [4, 8, 12, 20, 48, 64, 96, 128, 384])
def test_group_norm_never_takes_a_channel_alone(channels):
    groups = pd.group_norm(channels).num_groups
    assert channels // groups >= 4 and (groups == 32 or groups < 32 and channels < 128)

# ---- training ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n, decay", [(0, 0.1), (5, 0.4), (10**6, 0.9999)])
def test_update_average_decays_by_the_formula(n, decay):
    average, model = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    for net, value in ((average, 1.0), (model, 3.0)):
        for tensor in (net.weight.data, net.bias.data, net.running_mean, net.running_var):
            tensor.fill_(value)
        net.num_batches_tracked.fill_(int(value))
    pd.update_average(average, model, n)
    expected = torch.full((3,), decay * 1 + (1 - decay) * 3)
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert close(getattr(average, name).detach(), expected, rtol=1e-7), f"{name} after update {n}"
    assert average.num_batches_tracked.item() == 3, "whole-number buffers are copied"
    assert (model.weight == 3).all(), "the model itself must not move"

def test_learning_rate_rises_to_its_peak_and_falls_to_nothing():
    cfg = pd.Config(steps=100, warmup=0.1, lr=0.02)
    rates = [pd.learning_rate(step, cfg) for step in range(100)]
    assert close([rates[i] for i in (0, 9, 10, 55)], [0.002, 0.02, 0.02, 0.01]) and 0 < rates[99] < 1e-5
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert pd.learning_rate(0, pd.Config(steps=100, warmup=0.0, lr=0.02)) == 0.02
    assert pd.learning_rate(99, pd.Config(steps=100, warmup=1.0, lr=0.02)) == 0.02

def test_random_index_is_uniform_and_follows_from_its_key_alone():
    index = pd.random_index(10, 20_000, 7, "images", 0)
    assert ((torch.bincount(index, minlength=10) - 2000).abs() < 5 * 2000 ** 0.5).all(), "every image as often"
    torch.manual_seed(1)                                      # a resumed run starts anywhere, after anything
    assert pd.random_index(10, 20_000, 7, "images", 0).equal(index)
    for key in ((7, "images", 1), (8, "images", 0), (7, "noise", 0)):
        assert not pd.random_index(10, 20_000, *key).equal(index), "another step, seed or purpose draws others"

def test_batches_hold_what_their_index_says_half_of_them_mirrored():
    cfg = pd.Config(batch_size=400, timesteps=50, mirror=True)
    images = torch.arange(24).view(12, 1, 1, 2).to(torch.uint8)
    batch, = pd.random_batches(cfg, images, torch.arange(12), 3, CPU)
    shown = ((batch.x0 + 1) * 127.5).round()[:, 0, 0]
    assert (shown.amin(1) == 2 * batch.target).all(), "each image comes with its own target"
    assert 150 < (shown[:, 0] > shown[:, 1]).sum() < 250 and batch.x0.abs().max() <= 1
    assert set(batch.t.tolist()) == set(range(50)) and abs(batch.eps.std() - 1) < 0.15
    assert 0 <= batch.chance.min() and batch.chance.max() < 1 and abs(batch.chance.mean() - 0.5) < 0.08
    plain, = pd.random_batches(dataclasses.replace(cfg, mirror=False), images, torch.arange(12), 3, CPU)
    assert plain.eps.equal(batch.eps) and plain.x0.equal(pd.scaled(images, plain.target, CPU))
    passes = [*pd.random_batches(dataclasses.replace(cfg, accumulate=4), images, torch.arange(12), 3, CPU)]
    assert all(torch.cat(parts).equal(whole) for parts, whole in zip(zip(*passes), batch)) and len(passes) == 4

def test_a_step_clips_the_gradient_and_leaves_out_one_that_is_no_number():
    weight = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    weight.grad = torch.full((4,), 50.0)                      # of norm 100
    assert pd.safe_step(optimizer, scaler) == 0 and close(weight.detach(), torch.full((4,), -0.1), 1e-5)
    state = copy.deepcopy(optimizer.state[weight])
    assert close(state["exp_avg"], torch.full((4,), 0.05)) and weight.grad is None, "clipped to norm 1"
    for bad in (math.nan, math.inf):
        weight.grad = torch.tensor([1.0, bad, 0.0, 0.0])
        before = weight.detach().clone()
        assert pd.safe_step(optimizer, scaler) == 1 and weight.equal(before)
        assert all(value.equal(optimizer.state[weight][name]) for name, value in state.items())
    scaler, weight.grad = torch.amp.GradScaler("cpu", init_scale=64.0), torch.tensor([1.0, math.inf, 0.0, 0.0])
    scaler.scale(torch.zeros(()))
    assert pd.safe_step(optimizer, scaler) == 1 and weight.equal(before) and scaler.get_scale() == 32

def test_groups_are_clipped_apart_and_left_out_together():
    large, small, frozen = (nn.Parameter(torch.zeros(4)) for _ in range(3))
    optimizer = torch.optim.AdamW([dict(params=[p]) for p in (large, small, frozen)], lr=0.1, fused=True)
    large.grad, small.grad = torch.full((4,), 50.0), torch.full((4,), 0.25)           # of norms 100 and 0.5
    assert pd.safe_step(optimizer, torch.amp.GradScaler("cpu", enabled=False)) == 0
    assert close(optimizer.state[large]["exp_avg"], torch.full((4,), 0.05))
    assert close(optimizer.state[small]["exp_avg"], torch.full((4,), 0.025)), "large does not make small smaller"
    before = [p.detach().clone() for p in (large, small)]
    large.grad, small.grad = torch.full((4,), math.inf), torch.ones(4)
    assert pd.safe_step(optimizer, torch.amp.GradScaler("cpu", enabled=False)) == 1
    assert before[0].equal(large) and before[1].equal(small)

# ---- prototypes -------------------------------------------------------------------------------------------------

def test_squared_distances_by_hand():
    z = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    prototypes = torch.tensor([[[3.0, 4.0], [1.0, 1.0]], [[0.0, 0.0], [1.0, 2.0]]])
    assert close(pd.squared_distances(z, prototypes), [[[25, 2], [0, 5]], [[8, 1], [5, 0]]])
    assert pd.squared_distances(z.bfloat16(), prototypes).dtype == torch.float32

DISTANCES = torch.tensor([[[1.0, 0.3], [0.2, 2.0], [0.9, 0.8]],
                          [[0.1, 0.4], [0.6, 0.7], [1.5, 0.05]]], dtype=torch.float64)     # 2 images, 3 classes, K 2

def test_dce_loss_by_hand_sums_the_prototypes_of_a_class():
    y, gamma = torch.tensor([0, 2]), 2.0
    p = [[math.exp(-gamma * v) for v in image.flatten().tolist()] for image in DISTANCES]
    expected = sum(-math.log(sum(q[2 * c:2 * c + 2]) / sum(q)) for q, c in zip(p, (0, 2))) / 2
    assert close(pd.dce_loss(DISTANCES, y, gamma), expected, 1e-12)
    assert close(pd.dce_loss(DISTANCES, y), expected, 1e-12), "the paper's gamma is 2"
    assert close(pd.dce_loss(torch.zeros(4, 5, 3), torch.tensor([0, 1, 2, 4])), math.log(5)), "all alike: chance"
    assert close(pd.dce_loss(torch.tensor([[[900.0], [0.0]]]), torch.tensor([0])), 1800), "overflow"

def test_dce_gradient_is_the_softmax_minus_the_share_within_the_class():
    d, y, gamma = DISTANCES.clone().requires_grad_(), torch.tensor([0, 2]), 2.0
    pd.dce_loss(d, y, gamma).backward()
    p = (-gamma * DISTANCES.flatten(1)).softmax(1).view(2, 3, 2)
    own = torch.zeros_like(p)
    for b, c in enumerate(y):
        own[b, c] = p[b, c] / p[b, c].sum()
    assert close(d.grad, gamma * (own - p) / 2, 1e-12)

def test_prototype_loss_pulls_only_the_nearest_prototype_of_the_own_class():
    d, y = DISTANCES.clone().requires_grad_(), torch.tensor([0, 2])
    loss = pd.prototype_loss(d, y)
    assert close(loss.detach(), (0.3 + 0.05) / 2)
    loss.backward()
    expected = torch.zeros_like(d)
    expected[0, 0, 1] = expected[1, 2, 1] = 0.5
    assert d.grad.equal(expected)

def test_nearest_prototypes_by_hand():
    prototypes = torch.tensor([[[0.0], [10.0]], [[4.0], [6.0]], [[20.0], [5.2]]])
    distances, nearest = pd.nearest_prototypes(torch.tensor([[1.0], [9.0], [4.5], [5.3], [15.5]]), prototypes)
    assert close(distances, [[1, 3, 4.2], [1, 3, 3.8], [4.5, 0.5, 0.7], [4.7, 0.7, 0.1], [5.5, 9.5, 4.5]], 1e-5)
    assert nearest.tolist() == [[0, 0, 1], [1, 1, 1], [0, 0, 1], [1, 1, 1], [1, 1, 0]]

def test_prototypes_start_at_class_means_of_untrained_features_centred(monkeypatch):
    monkeypatch.setattr(pd, "fit", lambda net, *how: net)
    data, cfg = pd.make_shapes(60, 16, seed=1), config(pd, prototypes_per_class=2)
    data.labels[data.labels == 4] = 3                         # one class has no image
    data.labels[(data.labels == 7).nonzero()[1:]] = 3         # another has one, for two prototypes
    learner = pd.learn_prototypes(data, cfg, CPU)
    z = pd.features_of(learner, data.images, CPU)
    assert close(z.mean(0), torch.zeros(8), atol=1e-5) and z.std() > 1e-3
    for label, own in enumerate(learner.prototypes.detach()):
        mine = z[data.labels == label]
        if label not in (4, 7):
            assert close(own, torch.stack([part.mean(0) for part in mine.chunk(2)]), atol=1e-5) and not own[0].equal(own[1])
    assert not learner.prototypes[4].any() and close(learner.prototypes[7], [[*z[data.labels == 7][0]], [0] * 8], atol=1e-5)
    pd.learn_prototypes(pd.make_shapes(501, 8), config(pd, image_size=8), CPU)      # 500, and one
    other = pd.learn_prototypes(data, config(pd, start="random", prototypes_per_class=2), CPU)
    assert other.prototypes.std().item() == pytest.approx(0.1, rel=0.2)

def test_class_table_keeps_directions_and_sets_the_rms_of_a_random_table():
    prototypes = normal(3, 2, 8) * 5 + 1
    raw, rms = pd.class_table(prototypes, "raw"), pd.class_table(nn.Parameter(prototypes), "rms")
    assert raw.equal(prototypes.reshape(6, 8)) and raw[3].equal(prototypes[1, 1]), "row class * K + k"
    assert close(rms.square().mean(), 1) and not rms.requires_grad, "rms: root mean square 1"
    assert close(rms, raw / raw.square().mean().sqrt()), "one factor for all rows: their relative norms stay"

def test_evenly_takes_rows_as_often_as_they_occur():
    targets = torch.tensor([2, 0, 2, 1, 2, 0, 2, 2])          # 2 of row 0, 1 of row 1, 5 of row 2
    assert pd.evenly(targets, 16).tolist() == [0] * 4 + [1] * 2 + [2] * 10
    assert pd.evenly(targets, 4).tolist() == [0, 2, 2, 2] and pd.evenly(targets, 1).tolist() == [2]

@pytest.mark.parametrize("channels, side, width, first_side", [
    (1, 8, 8, 8), (3, 64, 8, 64), (3, 96, 8, 24), (3, 16, 64, 16), (1, 72, 64, 18)])
def test_classifiers_have_features_of_the_asked_size(channels, side, width, first_side):
    net, seen = pd.resnet(channels, side, width).eval(), []
    net.layer1.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    with torch.no_grad():
        assert net(torch.zeros(2, channels, side, side)).shape == (2, 8 * width)
    assert seen == [(2, width, first_side, first_side)], "the first layers keep small images large"

def test_a_classifier_sees_images_shifted_by_an_eighth_and_mirrored():
    image, seen, targets = torch.randint(256, (1, 1, 16, 16), generator=seeded()).to(torch.uint8), set(), set()
    padded = torch.from_numpy(np.pad(image[0, 0].numpy() / 127.5 - 1, 2, mode="reflect")).float()
    moves = {(i, j, flip): (padded.flip(1) if flip else padded)[i:i + 16, j:j + 16]
             for i in range(5) for j in range(5) for flip in (False, True)}

    class Spy(nn.Linear):
        def forward(self, x):
            seen.update(name for name, move in moves.items() if close(x[0, 0], move))
            return x.mean() * self.weight

    def loss(output, y):
        targets.update(y.tolist())
        return output.sum()
    net = pd.fit(Spy(1, 1), image.expand(9, 1, 16, 16), torch.arange(9), loss, 150, pd.Config(mirror=True), 0)
    assert len(seen) > 35 and {flip for *_, flip in seen} == {False, True}
    assert targets == set(range(9)) and not net.training and not net.weight.requires_grad

# ---- the conditional model --------------------------------------------------------------------------------------

def small_model(**changes):
    cfg = config(pd, image_size=8, attention=4, dropout=0.0, prototype_dim=6, **changes)
    model = cfg.build(dict(shape=[3, 8, 8], classes=["a", "b", "c"])).eval()
    awake(model.unet)
    awake(model.mlp, 2)
    model.table.weight.data = normal(3, 6, seed=1)
    return model, cfg, normal(4, 3, 8, 8, seed=3), torch.arange(4) * 200

def test_no_class_contributes_nothing_whatever_the_table_holds_and_every_class_learns():
    (model, _, x, t), row = small_model(), torch.tensor([-1, -1, 0, 2])
    before = model.denoise(x, t, row)
    before.square().mean().backward()
    assert (model.table.weight.grad.norm(dim=1) > 0).tolist() == [True, False, True], "even class 0"
    before = before.detach()
    assert close(before[:2], model.unet(x[:2], t[:2]).detach(), 1e-5), "row -1: the zero vector after the MLP"
    assert not close(before[2:], model.unet(x[2:], t[2:]).detach(), 1e-3)
    with torch.no_grad():
        model.table.weight.mul_(-50).add_(7)
        model.mlp[2].bias.add_(3)
        after = model.denoise(x, t, row)
    assert close(after[:2], before[:2], 1e-5) and not close(after[2:], before[2:], 1e-3)

@pytest.mark.parametrize("prototypes, moves", [("unfrozen", True), ("frozen", False)])
def test_unfrozen_prototypes_train_at_every_step_and_frozen_ones_stay(tmp_path, monkeypatch, prototypes, moves):
    cfg = config(pd, prototypes=prototypes, steps=4, save_every=9)
    sets, tables, rates, update, step = pd.load_sets(cfg), [], [], pd.update_average, pd.safe_step
    pd.new_run(cfg, sets, tmp_path, CPU)
    start = checkpoint(tmp_path)["model"]

    def note_table(average, model, n):
        tables.append(model.table.weight.detach().clone())
        update(average, model, n)

    def note_rates(optimizer, scaler):
        rates.append([group["lr"] for group in optimizer.param_groups])
        return step(optimizer, scaler)
    monkeypatch.setattr(pd, "update_average", note_table)
    monkeypatch.setattr(pd, "safe_step", note_rates)
    pd.train(cfg, sets, tmp_path, CPU)
    assert rates == [[pd.learning_rate(i, cfg)] * 2 for i in range(4)]
    steps = itertools.pairwise([start["table.weight"], *tables])
    assert [not a.equal(b) for a, b in steps] == [moves] * 4
    still = {name for name, value in checkpoint(tmp_path)["model"].items() if value.equal(start[name])}
    assert still == (set() if moves else {"table.weight"}), "all else trains"

def test_the_class_is_hidden_where_chance_is_below_null_prob():
    (model, cfg, eps, _), rows = small_model(), []

    def denoise(xt, t, row):
        rows.append(row.tolist())
        return torch.zeros_like(xt)
    model.denoise = denoise
    batch = pd.Batch(torch.zeros_like(eps), torch.arange(4), torch.arange(4), eps, torch.tensor([0.19, 0.21, 0, 0.99]))
    for null_prob in (0.2, 0.0, 1.0):
        losses = model(batch, pd.alpha_bars(50), dataclasses.replace(cfg, null_prob=null_prob))
        assert close(losses["loss"], eps.square().mean())
    assert rows == [[-1, 1, -1, 3], [0, 1, 2, 3], [-1] * 4]

# ---- metrics ----------------------------------------------------------------------------------------------------

def random_covariance(seed, n=4, rank=4):
    root = normal(n, rank, seed=seed, dtype=torch.float64)
    return root @ root.T

def test_frechet_distance_of_known_gaussians():
    eye, zero = torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    shift = torch.tensor([3.0, 0.0, 4.0], dtype=torch.float64)
    assert pd.frechet_distance(zero, eye, shift, eye) == pytest.approx(25)
    a, b = torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64), torch.tensor([16.0, 1.0, 9.0], dtype=torch.float64)
    assert pd.frechet_distance(zero, a.diag(), zero, b.diag()) == pytest.approx(3 ** 2 + 1 ** 2 + 0)
    assert pd.frechet_distance(zero, a.diag(), shift, b.diag()) == pytest.approx(35)

def test_frechet_distance_where_covariances_do_not_commute():
    s1, s2, zero = random_covariance(1), random_covariance(2), torch.zeros(4, dtype=torch.float64)
    root = torch.linalg.eigvals(s1 @ s2).sqrt().real.sum()    # similar to the symmetric product: the same eigenvalues
    expected = (s1.trace() + s2.trace() - 2 * root).item()
    assert pd.frechet_distance(zero, s1, zero, s2) == pytest.approx(expected)
    assert pd.frechet_distance(zero, s2, zero, s1) == pytest.approx(expected)

@pytest.mark.parametrize("rank", [1, 2, 4])
def test_frechet_distance_is_zero_for_equals_even_if_rank_deficient(rank):
    mu, sigma = torch.ones(4, dtype=torch.float64), random_covariance(3, rank=rank)
    assert abs(pd.frechet_distance(mu, sigma, mu, sigma)) < 1e-5
    other = pd.frechet_distance(mu, sigma, mu, torch.zeros(4, 4, dtype=torch.float64))
    assert other == pytest.approx(sigma.trace().item()), "a point: the trace remains"

def test_judge_images_counts_what_is_recognised_and_measures_from_the_real_moments():
    images = torch.zeros(4, 3, 2, 2, dtype=torch.uint8)
    for i, channel in enumerate((0, 0, 1, 1)):
        images[i, channel] = 255
    judge = SimpleNamespace(features=lambda x: x.mean((2, 3)), last=nn.Identity(),                # in [-1, 1]
                            moments=(torch.full((3,), -1.0).double(), torch.zeros(3, 3).double()))
    found = pd.judge_images(judge, images, torch.tensor([0, 1, 1, 1]), CPU)
    # means (0, 0, -1): squared distance 2 to the real mean; variances (4/3, 4/3, 0) against none
    assert found["accuracy"] == 0.75 and close(found["frechet"], 2 + 8 / 3, 1e-5)

def test_the_distance_of_real_images_is_of_as_many_as_samples():
    data = SimpleNamespace(images=torch.arange(9), labels=torch.arange(9) * 10)
    images, labels = pd.as_many(data, 5)
    assert len(set(images.tolist())) == 5 and images.tolist() != [0, 1, 2, 3, 4] and labels.equal(images * 10)
    assert sorted(pd.as_many(data, 99)[0].tolist()) == [*range(9)]

def test_the_picture_of_prototypes_has_a_name_at_the_images_of_each_class(tmp_path, monkeypatch):
    class Learner(nn.Module):
        prototypes = normal(3, 1, 3)

        def forward(self, x):
            return x.mean((2, 3))
    images, figures = torch.randint(256, (8, 3, 2, 2), dtype=torch.uint8, generator=seeded()), []
    data = pd.Dataset(images, torch.tensor([0, 0, 1, 1, 0, 1, 1, 0]), ["a", "b", "not there"])
    monkeypatch.setattr(pd.Figure, "savefig", lambda figure, *a, **k: figures.append(figure))
    pd.draw_prototypes(tmp_path / "p.png", Learner(), data, CPU)
    axes = figures[0].axes[1]
    points = torch.from_numpy(axes.collections[0].get_offsets().data.copy()).float()
    names = {text.get_text(): torch.tensor(text.xyann).float() for text in axes.texts}
    assert list(names) == data.classes and names["not there"].isfinite().all()
    assert all(close(names[name], points[data.labels == c].mean(0), 1e-4) for c, name in enumerate("ab"))

def test_inception_score_of_known_predictions():
    assert pd.inception_score(normal(1, 7).expand(40, 7))[0] == pytest.approx(1)
    sure = 200.0 * F.one_hot(torch.arange(5).repeat_interleave(200), 5)
    assert pd.inception_score(sure, splits=1) == (pytest.approx(5), 0)
    mean, std = pd.inception_score(sure, splits=10)
    assert 4.6 < mean < 5 and 0 < std < 0.3, "the splits are shuffled, or each would hold only one class"

def test_kernel_distance_by_an_explicit_double_loop():
    x, y = normal(5, 3, seed=1).double(), normal(5, 3, seed=2).double() + 1

    def kernel(a, b):
        return (sum(p * q for p, q in zip(a.tolist(), b.tolist())) / 3 + 1) ** 3
    pairs = list(itertools.permutations(range(5), 2))         # without i = j
    within = sum(kernel(f[i], f[j]) for f in (x, y) for i, j in pairs) / len(pairs)
    expected = within - 2 * sum(kernel(a, b) for a in x for b in y) / 25
    assert pd.kernel_distance(x, y, subsets=3) == (pytest.approx(expected), pytest.approx(0, abs=1e-9))

class StandIn(nn.Module):
    """An Inception network of a few numbers: its features are the means of the channels."""
    def __init__(self):
        super().__init__()
        self.fc, self.seen = nn.Linear(3, 4), []

    def forward(self, x):
        self.seen.append(x)
        return self.fc(x.mean((2, 3)))

@pytest.mark.parametrize("channels", [1, 3])
def test_inception_features_resize_without_antialias_and_leave_the_bias_out(channels):
    net, images = StandIn(), torch.randint(256, (2, channels, 598, 598), generator=seeded()).to(torch.uint8)
    head = net.fc
    features, logits = pd.inception_features(net, images, CPU)
    expected = F.avg_pool2d(images.expand(2, 3, 598, 598).float(), 2) / 127.5 - 1             # bilinear at one half
    assert close(net.seen[0], expected, 1e-4), "bilinear to 299, no antialias, [-1, 1]"
    assert net.fc is head and features.shape == (2, 3) and close(features, expected.mean((2, 3)), 1e-5)
    assert close(logits, (features @ head.weight.T).detach())

def test_inception_metrics_compare_with_all_real_images_and_are_named_by_their_number(tmp_path, monkeypatch, capsys):
    torch.save(StandIn().state_dict(), tmp_path / "weights.pth")
    monkeypatch.setattr(pd, "fid_inception", StandIn)
    cfg = config(pd, data_dir=tmp_path, inception=str(tmp_path / "weights.pth"))
    real = torch.randint(256, (30, 3, 4, 4), generator=seeded()).to(torch.uint8)
    same, darker = (pd.inception_metrics(cfg, images, real, CPU) for images in (real, real // 2))
    assert list(same) == ["fid_0.03k", "kid_0.03k", "kid_0.03k_std", "is_0.03k", "is_0.03k_std"]
    assert abs(same["fid_0.03k"]) < 1e-5 and same["kid_0.03k"] < 0.01 and same["is_0.03k"] > 1
    z, other = (images.float().mean((2, 3)) / 127.5 - 1 for images in (real, real // 2))
    assert close(darker["fid_0.03k"], pd.frechet_distance(*pd.moments(other), *pd.moments(z)), 1e-6)
    again = pd.inception_metrics(cfg, real, real // 2, CPU)
    assert close(again["fid_0.03k"], darker["fid_0.03k"], 1e-6), "other real images are measured anew"
    for source in ("off", "nowhere.pth"):
        assert pd.inception_metrics(dataclasses.replace(cfg, inception=source), real, real, CPU) == {}
        assert "not computed" in capsys.readouterr().out
