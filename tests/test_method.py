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
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    return a.shape == b.shape and torch.allclose(a, b, rtol, atol)


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


@pytest.mark.parametrize("sampler, eta, steps", [
    ("ddim", 0.0, 500), ("ddim", 1.0, 1000), ("ddpm", 0.0, 1000), ("dpmpp", 0.0, 100)])
def test_samplers_recover_the_mean_and_covariance_of_a_gaussian(sampler, eta, steps):
    mu, sigma = gaussian_data()
    abar, N = exact_alpha_bars(1000), 4000
    xT = torch.randn(N, 1, 1, 3, generator=seeded(1), dtype=torch.float64)
    predict = gaussian_noise(abar, mu, sigma)
    x = pd.sample(predict, xT, abar, steps, sampler, eta, clip=False, generator=seeded(2)).view(N, 3)
    scale = sigma.diagonal().sqrt()
    # Five standard errors, 5 / sqrt(N) for a mean and sqrt(2) as much for a variance, and 1 % for finite steps.
    assert ((x.mean(0) - mu) / scale).abs().max() < 5 / N ** 0.5 + 0.01, f"{sampler}: mean {x.mean(0)}"
    error = (torch.cov(x.T) - sigma) / scale / scale[:, None]
    assert error.abs().max() < 5 * (2 / N) ** 0.5 + 0.01, f"{sampler}: covariance is off by {error}"


def ode_errors(sampler, doublings, at, s=0.5, mu=0.3, T=16_000):
    """Largest error at level T / at - 1, against the exact solution: the probability flow of a Gaussian is affine."""
    abar = exact_alpha_bars(T)
    xT = torch.linspace(-2, 2, 5, dtype=torch.float64).view(5, 1, 1, 1)
    predict = gaussian_noise(abar, *torch.tensor([[[mu]], [[s * s]]], dtype=torch.float64))

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


@pytest.mark.parametrize("at", [2, 8])
def test_ddim_is_first_order_and_dpmpp_second_on_the_probability_flow(at):
    ddim, dpmpp = (ode_errors(sampler, [128, 256, 512], at) for sampler in ("ddim", "dpmpp"))
    for a, b in itertools.pairwise(ddim):
        assert 1.9 < a / b < 2.1, f"ddim: twice the steps should halve the error: {ddim}"
    for a, b in itertools.pairwise(dpmpp):
        assert 3.7 < a / b < 4.7, f"dpmpp: twice the steps should quarter the error, else it is not 2M: {dpmpp}"


def test_samplers_reach_the_exact_clean_image():
    # The last step jumps to abar = 1, infinitely far in lambda, and is first order for dpmpp too. So its error at the
    # clean image falls like 1 / steps in the end, but from a far lower start than ddim's.
    ddim, dpmpp = ode_errors("ddim", [64, 512], 0), ode_errors("dpmpp", [64, 512], 0)
    assert 7 < ddim[0] / ddim[1] < 9, f"ddim: first order: {ddim}"
    assert dpmpp[0] < 0.002 and dpmpp[1] < 1e-4 and dpmpp[1] < ddim[1] / 20, f"dpmpp: {dpmpp}"


def step_inputs():
    x0, eps, noise = (torch.randn(4, 2, 3, 3, generator=seeded(i), dtype=torch.float64) for i in range(3))
    a, a_next = torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    return a.sqrt() * x0 + (1 - a).sqrt() * eps, x0, eps, noise, a, a_next


def test_ddpm_step_is_ddim_step_at_eta_one():
    x, x0, eps, noise, a, a_next = step_inputs()
    assert close(pd.ddpm_step(x, x0, a, a_next, noise), pd.ddim_step(x, x0, eps, a, a_next, 1.0, noise), 1e-12, 1e-12)


def test_ddpm_step_is_the_gaussian_posterior():
    x, x0, _, noise, a, a_next = step_inputs()
    # Bayes: x_next ~ N(sqrt(a_next) x0, 1 - a_next) and x | x_next ~ N(r x_next, 1 - r^2), r^2 = a / a_next.
    r2 = a / a_next
    precision = 1 / (1 - a_next) + r2 / (1 - r2)
    mean = (a_next.sqrt() * x0 / (1 - a_next) + r2.sqrt() * x / (1 - r2)) / precision
    assert close(pd.ddpm_step(x, x0, a, a_next, noise), mean + noise / precision.sqrt(), 1e-12, 1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_step_weighs_image_prediction_and_noise(eta):
    x, _, _, _, a, a_next = step_inputs()
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    image, eps, noise = (pd.ddim_step(x, *given[:2], a, a_next, eta, given[2]).flatten()[0]
                         for given in ((one, zero, zero), (zero, one, zero), (zero, zero, one)))
    assert close(image, a_next.sqrt(), 1e-12, 1e-12), "sqrt(a_next) x0"
    assert close(noise, eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)).sqrt(), 1e-12, 1e-12), "sigma, eq. 16"
    assert close(eps ** 2 + noise ** 2, 1 - a_next, 1e-12, 1e-12), "what there is of both is the variance 1 - a_next"
    last = pd.ddim_step(x, one, one, a, torch.ones_like(a), eta, zero)
    assert close(last, one, 1e-12, 1e-12), "the last step, to abar = 1, gives the predicted image"
    assert eta or pd.ddim_step(x, one, zero, a, a_next).equal(a_next.sqrt() * one), "eta = 0 is given no noise"


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


SAMPLERS = [("ddim", 0.0), ("ddim", 0.5), ("ddim", 1.0), ("ddpm", 0.0), ("dpmpp", 0.0)]


@pytest.mark.parametrize("sampler, eta", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_every_sampler_lands_on_a_one_point_data_set(sampler, eta, steps):
    abar, point = pd.alpha_bars(50), torch.linspace(-0.9, 0.9, 12).view(1, 3, 2, 2)

    def predict(x, t):
        a = abar[t][:, None, None, None]
        return (x - a.sqrt() * point) / (1 - a).sqrt()
    xT = torch.randn(3, 3, 2, 2, generator=seeded())
    x = pd.sample(predict, xT, abar, steps, sampler, eta, generator=seeded(1))
    # float32 divides by sqrt(abar) = 0.006 at the first level, which leaves some 1e-5.
    assert close(x, point.expand_as(x), atol=1e-4), f"{sampler} missed by {(x - point).abs().max()}"


@pytest.mark.parametrize("T, steps", [(1000, 1), (1000, 20), (1000, 999), (1000, 1000), (50, 37), (21, 21)])
def test_sample_times_trail_from_the_noisiest_level_and_never_repeat(T, steps):
    times = pd.sample_times(T, steps)
    assert len(times) == steps and times[0] == T - 1 and times[-1] >= 0
    assert all(a > b for a, b in itertools.pairwise(times))
    gaps = [a - b for a, b in zip(times, [*times[1:], -1])]
    assert all(abs(gap - T / steps) < 1.01 for gap in gaps), "spacing T / steps, down to T / steps - 1"
    assert steps < T or times == list(range(T - 1, -1, -1))


def test_sample_times_of_a_thousand_in_four():
    assert pd.sample_times(1000, 4) == [999, 749, 499, 249]


@pytest.mark.parametrize("sampler, eta", SAMPLERS)
def test_a_seeded_sampler_repeats_and_only_the_noisy_ones_depend_on_the_seed(sampler, eta):
    abar, xT = pd.alpha_bars(100), torch.randn(2, 1, 4, 4, generator=seeded())
    a, b, c = (pd.sample(lambda x, t: 0.9 * x, xT, abar, 5, sampler, eta, False, seeded(seed)) for seed in (1, 1, 2))
    assert a.equal(b) and a.equal(c) == (sampler != "ddpm" and eta == 0)


@pytest.mark.parametrize("sampler, eta", SAMPLERS)
def test_clipped_samples_stay_in_range_and_trace_gets_every_step(sampler, eta):
    abar, xT, trace = pd.alpha_bars(100), torch.randn(2, 3, 4, 4, generator=seeded()), []
    wild = lambda x, t: 5 * torch.sin(7 * x)
    x = pd.sample(wild, xT, abar, 6, sampler, eta, generator=seeded(1), trace=trace)
    assert x.abs().max() <= 1 + 1e-6
    assert [t for t, _ in trace] == pd.sample_times(100, 6) and trace[0][1].equal(xT)
    assert all(x.shape == xT.shape for _, x in trace) and not trace[1][1].equal(xT)
    assert pd.sample(wild, xT, abar, 6, sampler, eta, clip=False, generator=seeded(1)).abs().max() > 1.5


def test_clipping_derives_the_noise_from_the_clipped_image():
    abar, trace = pd.alpha_bars(100), []
    xT = torch.full((1, 1, 1, 1), 0.5)
    pd.sample(lambda x, t: torch.full_like(x, -9.0), xT, abar, 2, "ddim", trace=trace)     # predicts far more than 1
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
    model, x = Recorder(), torch.randn(3, 1, 2, 2, generator=seeded())
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

def awake(net, seed=0):
    """Every weight and bias at random, so that nothing starts at zero."""
    gen = seeded(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=gen) * 0.2 + (0.5 if p.dim() == 1 else 0))
    return net


@pytest.mark.parametrize("channels, side, width, multipliers, blocks, attention", [
    (1, 8, 8, (1, 2), 1, 4), (3, 16, 8, (1, 2, 2), 1, 8), (3, 8, 16, (1,), 2, 0), (1, 12, 12, (2, 1, 3), 2, 6),
    (3, 10, 4, (1, 2), 1, 10)])
def test_unet_keeps_the_shape_starts_at_zero_and_reads_all(channels, side, width, multipliers, blocks, attention):
    net = pd.UNet(channels, side, width, multipliers, blocks, attention, 0.0).eval()
    x, t, condition = torch.randn(2, channels, side, side), torch.tensor([0, 900]), torch.randn(2, net.emb_dim)
    assert net(x, t).shape == x.shape and (net(x, t, condition) == 0).all(), "UNet: the output starts at zero"
    awake(net)
    out = net(x, t, condition)
    assert (out - net(x, t)).abs().max() > 1e-4, "UNet: the condition does not reach the output"
    assert (out - net(x, t.flip(0), condition)).abs().max() > 1e-4, "UNet: the time does not reach the output"
    assert close(net(x, t, torch.zeros_like(condition)), net(x, t)), "UNet: a zero condition is no condition"
    assert close(net(x[1:], t[1:], condition[1:]), out[1:], 1e-4, 1e-4), "UNet: images of a batch must not mix"


def test_unet_attends_at_small_levels_and_in_the_middle():
    sides = []
    net = pd.UNet(3, 16, 8, (1, 1, 1), 1, 8, 0.0)
    for module in net.modules():
        if isinstance(module, pd.Attention):
            module.register_forward_pre_hook(lambda m, args: sides.append(args[0].shape[-1]))
    net(torch.zeros(1, 3, 16, 16), torch.tensor([1]))
    assert sides == [8, 4, 4, 4, 4, 8, 8]                     # down, middle, up with one block more


def test_time_embedding_by_hand():
    expected = [[0, 0, 1, 1], [math.sin(3), math.sin(0.03), math.cos(3), math.cos(0.03)]]
    assert close(pd.time_embedding(torch.tensor([0, 3]), 4), expected)


def test_resblock_and_attention_start_as_the_identity():
    x, emb = torch.randn(2, 8, 4, 4), torch.randn(2, 16)
    assert pd.ResBlock(8, 8, 16, 0.0)(x, emb).equal(x) and pd.Attention(8)(x, emb).equal(x)


@pytest.mark.parametrize("channels, heads", [(8, 1), (96, 1), (64, 1), (128, 2), (192, 3)])
def test_attention_is_softmax_of_scaled_products_in_heads_of_64(channels, heads):
    layer, x = awake(pd.Attention(channels), 3), torch.randn(2, channels, 3, 5, generator=seeded(4))
    assert layer.heads == heads
    d, h = channels // heads, layer.norm(x)
    with torch.no_grad():
        for b in range(2):
            q, k, v = (h[b].flatten(1).T @ layer.qkv.weight.T + layer.qkv.bias).split(channels, 1)      # [HW, C] each
            parts = [slice(i * d, i * d + d) for i in range(heads)]
            mixed = [(q[:, s] @ k[:, s].T / math.sqrt(d)).softmax(1) @ v[:, s] for s in parts]
            out = torch.cat(mixed, 1) @ layer.out.weight.T + layer.out.bias
            expected = x[b] + out.T.reshape(channels, 3, 5)
            assert close(layer(x, None)[b], expected, 1e-4, 1e-4), "Attention: softmax(Q K^T / sqrt(d)) V"


@pytest.mark.parametrize("channels", [4, 8, 12, 16, 20, 32, 48, 64, 96, 128, 256, 384])
def test_group_norm_never_takes_a_channel_alone(channels):
    norm = pd.group_norm(channels)
    assert channels // norm.num_groups >= 4 and norm.num_groups <= 32
    assert norm.num_groups == 32 or channels not in (128, 256, 384)


@pytest.mark.parametrize("name, low, high", [("shapes", 0.5, 1.5), ("cifar10", 35, 40)])
def test_presets_have_the_size_they_should(name, low, high):
    cfg = pd.Config(**{**pd.Config.PRESETS[name], "dataset": name})
    with torch.device("meta"):
        shape = [3, cfg.image_size, cfg.image_size]
        net = cfg.build({"shape": shape, "table": torch.randn(10, cfg.prototype_dim)})
    millions = sum(p.numel() for p in net.parameters()) / 1e6
    assert low < millions < high, f"{name}: {millions:.2f} M parameters"


# ---- training ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n, decay", [(0, 0.1), (5, 0.4), (10**6, 0.9999)])
def test_update_average_decays_by_the_formula(n, decay):
    average, model = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    for net, value in ((average, 1.0), (model, 3.0)):
        for tensor in (net.weight.data, net.bias.data, net.running_mean, net.running_var):
            tensor.fill_(value)
        net.num_batches_tracked.fill_(int(value))
    pd.update_average(average, model, n)
    expected = decay * 1 + (1 - decay) * 3
    for name in ("weight", "bias", "running_mean", "running_var"):
        value = getattr(average, name).detach()
        assert close(value, torch.full((3,), expected), rtol=1e-7), f"{name} after update {n}"
    assert average.num_batches_tracked.item() == 3, "whole-number buffers are copied"
    assert (model.weight == 3).all(), "the model itself must not move"


def test_learning_rate_rises_to_its_peak_and_falls_to_nothing():
    cfg = pd.Config(steps=100, warmup=0.1, lr=0.02)
    rates = [pd.learning_rate(step, cfg) for step in range(100)]
    assert close(rates[0], 0.002) and close(rates[9], 0.02) and close(rates[10], 0.02) and max(rates) <= 0.02
    assert close(rates[55], 0.01) and 0 < rates[99] < 1e-5
    assert all(a < b for a, b in itertools.pairwise(rates[:10])), "rises"
    assert all(a > b for a, b in itertools.pairwise(rates[10:])), "falls"
    assert close(pd.learning_rate(0, pd.Config(steps=100, warmup=0.0, lr=0.02)), 0.02)
    assert pd.learning_rate(99, pd.Config(steps=100, warmup=1.0, lr=0.02)) == 0.02


def test_random_index_is_uniform_and_follows_from_its_key_alone():
    images = torch.zeros(10, 1)
    index = pd.random_index(images, 20_000, 7, 3, 0)
    assert ((torch.bincount(index, minlength=10) - 2000).abs() < 5 * 2000 ** 0.5).all(), "every image as often"
    torch.manual_seed(1)                                      # a resumed run starts anywhere, after anything
    assert pd.random_index(images, 20_000, 7, 3, 0).equal(index)
    for key in ((7, 3, 1), (8, 3, 0)):
        assert not pd.random_index(images, 20_000, *key).equal(index), "another step or seed draws others"


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
    assert torch.autograd.gradcheck(lambda d: pd.dce_loss(d, y), d)


def test_prototype_loss_pulls_only_the_nearest_prototype_of_the_own_class():
    d, y = DISTANCES.clone().requires_grad_(), torch.tensor([0, 2])
    loss = pd.prototype_loss(d, y)
    assert close(loss.detach(), (0.3 + 0.05) / 2)
    loss.backward()
    expected = torch.zeros_like(d)
    expected[0, 0, 1] = expected[1, 2, 1] = 0.5
    assert d.grad.equal(expected)


def test_prototypes_move_by_the_gradient_of_both_losses():
    gen = seeded(5)
    z, prototypes = torch.randn(4, 3, generator=gen), torch.randn(3, 2, 3, generator=gen).requires_grad_()
    y, step = torch.tensor([0, 2, 1, 2]), 1e-2

    def loss(m):
        d = pd.squared_distances(z, m)
        return pd.dce_loss(d, y) + pd.prototype_loss(d, y)
    loss(prototypes).backward()
    for index in itertools.product(range(3), range(2), range(3)):
        nudge = torch.zeros_like(prototypes)
        nudge[index] = step
        with torch.no_grad():
            slope = (loss(prototypes + nudge) - loss(prototypes - nudge)) / (2 * step)
        assert abs(slope - prototypes.grad[index]) < 2e-3 * max(1, abs(slope)), f"finite difference at {index}"


def test_nearest_prototypes_by_hand_and_beyond_one_chunk():
    prototypes = torch.tensor([[[0.0], [10.0]], [[4.0], [6.0]], [[20.0], [5.2]]])
    z = torch.tensor([[1.0], [9.0], [4.5], [5.3], [15.5]]).repeat(500, 1)
    classes, nearest = pd.nearest_prototypes(z, prototypes)
    assert classes.tolist() == [0, 0, 1, 2, 2] * 500
    assert nearest.tolist() == [[0, 0, 1], [1, 1, 1], [0, 0, 1], [1, 1, 1], [1, 1, 0]] * 500


def test_class_table_keeps_directions_and_sets_the_rms_of_a_random_table():
    prototypes = torch.randn(3, 2, 8, generator=seeded()) * 5 + 1
    raw, rms = pd.class_table(prototypes, "raw"), pd.class_table(prototypes, "rms")
    assert raw.equal(prototypes.reshape(6, 8)) and raw[3].equal(prototypes[1, 1]), "row class * K + k"
    assert close(rms.square().mean(), 1), "rms: root mean square 1"
    assert close(rms, raw / raw.square().mean().sqrt()), "one factor for all rows: their relative norms stay"
    assert not pd.class_table(nn.Parameter(prototypes), "rms").requires_grad


def test_rows_for_draws_prototypes_by_their_frequency():
    labels = torch.tensor([0, 1, 2]).repeat(4000)
    rows = pd.rows_for(torch.tensor([[0.25, 0.75], [1.0, 0.0], [0.5, 0.5]]), labels, 3)
    assert (rows // 2).equal(labels), "row = class * K + k"
    share = [(rows[labels == c] % 2).float().mean().item() for c in range(3)]
    assert abs(share[0] - 0.75) < 0.035 and share[1] == 0 and abs(share[2] - 0.5) < 0.04      # five standard errors
    assert rows.equal(pd.rows_for(torch.tensor([[0.25, 0.75], [1.0, 0.0], [0.5, 0.5]]), labels, 3))
    assert pd.rows_for(torch.ones(3, 1), labels, 0).equal(labels)


@pytest.mark.parametrize("channels, side, width, first_side", [
    (1, 8, 8, 8), (3, 64, 8, 64), (3, 96, 8, 24), (3, 16, 64, 16), (1, 72, 64, 18)])
def test_learner_has_features_of_the_asked_size(channels, side, width, first_side):
    learner, seen = pd.PrototypeLearner(channels, side, 3, 5, 2, width).eval(), []
    learner.net.layer1.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    with torch.no_grad():
        assert learner(torch.zeros(2, channels, side, side)).shape == (2, 5)
    assert learner.prototypes.shape == (3, 2, 5) and learner.prototypes.requires_grad
    assert seen == [(2, width, first_side, first_side)], "the stem keeps small images large"


def test_augmentation_shifts_by_whole_pixels_and_mirrors_the_edges():
    image = torch.arange(256.0).view(1, 1, 16, 16) / 255
    padded = torch.from_numpy(np.pad(image[0, 0].numpy(), 2, mode="symmetric"))
    moves = {(i, j): padded[i:i + 16, j:j + 16] for i in range(5) for j in range(5)}       # up to 16 / 8 = 2 pixels
    seen = set()
    for out in pd.shifted(image.expand(300, 1, 16, 16), seeded())[:, 0]:
        found = [m for m, expected in moves.items() if close(out, expected)]
        assert len(found) == 1, "shifted: not one of the 25 moves"
        seen.add(found[0])
    assert len(seen) == 25


def test_learner_learns_two_easy_classes():
    gen = seeded(9)
    labels = torch.randint(2, (256,), generator=gen)
    noise = torch.randint(60, (256, 3, 8, 8), generator=gen)
    images = (noise + 100 + 60 * F.one_hot(labels * 2, 3)[:, :, None, None]).to(torch.uint8)          # red or blue
    data = pd.Dataset(images, labels, ["red", "blue"])
    cfg = pd.Config(prototype_dim=4, prototypes_per_class=2, learner_steps=40, learner_width=8, imagenet=False,
                    mirror=True, amp="off", log_every=1000)
    learner = pd.learn_prototypes(data, cfg, CPU)
    assert not learner.training and not any(p.requires_grad for p in learner.parameters())
    classes, _ = pd.nearest_prototypes(pd.features_of(learner, images, CPU), learner.prototypes)
    accuracy = (classes == labels).float().mean().item()
    assert accuracy > 0.97, f"stage 1 tells red from blue in only {accuracy:.0%}"
    assert learner.prototypes.shape == (2, 2, 4)


# ---- the conditional model --------------------------------------------------------------------------------------

def small_model(trainable=True, rows=3):
    unet = awake(pd.UNet(3, 8, 8, (1, 2), 1, 4, 0.0))
    model = pd.ProtoDiffusion(unet, torch.randn(rows, 6, generator=seeded(1)), trainable)
    awake(model.mlp, 2)
    return model


def model_inputs(n=4):
    return torch.randn(n, 3, 8, 8, generator=seeded(3)), torch.arange(n) * 200


def test_no_class_contributes_nothing_whatever_the_table_holds():
    model, (x, t), row = small_model(), model_inputs(), torch.tensor([-1, -1, 0, 2])
    before = model(x, t, row).detach()
    assert close(before[:2], model.unet(x[:2], t[:2]).detach(), 1e-5), "row -1: the zero vector after the MLP"
    assert not close(before[2:], model.unet(x[2:], t[2:]).detach(), 1e-3)
    with torch.no_grad():
        model.table.weight.mul_(-50).add_(7)
        model.mlp[2].bias.add_(3)
        after = model(x, t, row)
    assert close(after[:2], before[:2], 1e-5) and not close(after[2:], before[2:], 1e-3)


def test_every_class_even_class_0_receives_a_gradient_and_no_class_gives_none():
    model, (x, t) = small_model(), model_inputs()
    model(x, t, torch.tensor([0, 1, -1, -1])).square().mean().backward()
    norms = model.table.weight.grad.norm(dim=1)
    assert norms[0] > 0 and norms[1] > 0 and norms[2] == 0, f"gradients of the table's rows: {norms}"
    model.zero_grad()
    model(x, t, torch.full((4,), -1)).square().mean().backward()
    assert (model.table.weight.grad == 0).all(), "row -1 trains no row of the table"


def test_the_model_copies_its_table():
    table = torch.zeros(3, 6)
    model = pd.ProtoDiffusion(pd.UNet(3, 8, 8, (1,), 1, 0, 0.0), table, True)
    with torch.no_grad():
        model.table.weight.add_(1)
    assert (table == 0).all()


TINY = dict(image_size=8, channels=8, multipliers="1", blocks=1, attention=0, dropout=0.0, prototype_dim=6)


@pytest.mark.parametrize("prototypes", ["random", "frozen", "unfrozen"])
def test_frozen_tables_stay_and_others_train(prototypes):
    cfg = pd.Config(**TINY, prototypes=prototypes, prototype_lr=0.25, unfreeze_at=0.3, steps=100)
    model = cfg.build({"shape": [3, 8, 8], "table": torch.randn(3, 6, generator=seeded(1))})
    awake(model.unet)
    groups, before = model.param_groups(cfg), copy.deepcopy(model.state_dict())
    assert (groups[0]["factor"], groups[0]["start"]) == (1.0, 0)
    grouped = [p for group in groups for p in group["params"]]
    wanted = [p for p in model.parameters() if p.requires_grad]
    assert len(grouped) == len(wanted) and {id(p) for p in grouped} == {id(p) for p in wanted}, "every weight once"
    if prototypes != "frozen":
        assert groups[1]["params"][0] is model.table.weight
        wanted = (0.25, 30) if prototypes == "unfrozen" else (1.0, 0)                    # the baseline trains as always
        assert (groups[1]["factor"], groups[1]["start"]) == wanted
    optimizer = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.1)
    for _ in range(2):
        x, t = model_inputs(3)
        optimizer.zero_grad()
        model(x, t, torch.arange(3)).square().mean().backward()
        optimizer.step()
    after = model.state_dict()
    assert after["table.weight"].equal(before["table.weight"]) == (prototypes == "frozen")
    for name in ("mlp.0.weight", "unet.first.weight"):
        assert not after[name].equal(before[name]), f"{name} does not train"


@pytest.mark.parametrize("prototypes, moves_at", [("unfrozen", [3, 4]), ("frozen", [])])
def test_unfrozen_prototypes_move_from_the_asked_step_on(tmp_path, prototypes, moves_at):
    cfg = pd.Config(**TINY, prototypes=prototypes, prototype_lr=1.0, unfreeze_at=0.5, steps=4, batch_size=8,
                    accumulate=1, warmup=0.0, lr=0.01, weight_decay=0.1, timesteps=50, null_prob=0.0, eval_every=1,
                    log_every=100, save_every=100, mirror=False, amp="off", compile=False, seed=0)
    table, tables = torch.randn(2, 6, generator=seeded()), []
    model = cfg.build({"shape": [3, 8, 8], "table": table})
    awake(model.unet)
    images = torch.randint(256, (16, 3, 8, 8), generator=seeded(1)).to(torch.uint8)
    pd.train(cfg, model, images, torch.arange(16) % 2, lambda *a: pd.protodiffusion_loss(cfg, *a), tmp_path, {}, CPU,
             lambda average: tables.append(average.table.weight.clone()) or {})
    moved = [step for step, (a, b) in enumerate(itertools.pairwise([table, *tables]), 1) if not a.equal(b)]
    assert moved == moves_at, "train: a group's rate is zero before its start"


def test_the_class_is_hidden_where_chance_is_below_null_prob():
    rows = []

    def net(xt, t, row):
        rows.append(row)
        return torch.zeros_like(xt)
    eps = torch.randn(4, 3, 8, 8, generator=seeded())
    batch = SimpleNamespace(x0=torch.zeros_like(eps), t=torch.tensor([1, 2, 3, 4]), eps=eps,
                            target=torch.tensor([0, 1, 2, 3]), chance=torch.tensor([0.19, 0.21, 0.0, 0.99]))
    losses = pd.protodiffusion_loss(pd.Config(null_prob=0.2), net, batch, pd.alpha_bars(50))
    assert rows[0].tolist() == [-1, 1, -1, 3] and close(losses["loss"], eps.square().mean())
    pd.protodiffusion_loss(pd.Config(null_prob=0.0), net, batch, pd.alpha_bars(50))
    pd.protodiffusion_loss(pd.Config(null_prob=1.0), net, batch, pd.alpha_bars(50))
    assert rows[1].tolist() == [0, 1, 2, 3] and rows[2].tolist() == [-1] * 4


# ---- metrics ----------------------------------------------------------------------------------------------------

def random_covariance(seed, n=4, rank=4):
    root = torch.randn(n, rank, generator=seeded(seed), dtype=torch.float64)
    return root @ root.T


def test_moments_are_those_of_numpy():
    features = torch.randn(50, 4, generator=seeded()) * 3 + 1
    mu, sigma = pd.moments(features)
    assert mu.dtype == sigma.dtype == torch.float64
    array = features.double().numpy()
    assert close(mu, array.mean(0)) and close(sigma, np.cov(array, rowvar=False))
    assert (pd.moments(features[:1])[1] == 0).all(), "one image has no spread, and is no error"


def test_frechet_distance_of_known_gaussians():
    eye, zero = torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    shift = torch.tensor([3.0, 0.0, 4.0], dtype=torch.float64)
    assert pd.frechet_distance(zero, eye, shift, eye) == pytest.approx(25)
    a, b = torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64), torch.tensor([16.0, 1.0, 9.0], dtype=torch.float64)
    assert pd.frechet_distance(zero, a.diag(), zero, b.diag()) == pytest.approx(3 ** 2 + 1 ** 2 + 0)
    assert pd.frechet_distance(zero, a.diag(), shift, b.diag()) == pytest.approx(35)


def test_frechet_distance_where_covariances_do_not_commute():
    s1, s2, zero = random_covariance(1), random_covariance(2), torch.zeros(4, dtype=torch.float64)
    assert not close(s1 @ s2, s2 @ s1, 1e-3)
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
    judge = SimpleNamespace(embed=lambda x: x.mean((2, 3)), classify=lambda z: z.argmax(1),        # in [-1, 1]
                            real=(torch.full((3,), -1.0).double(), torch.zeros(3, 3).double()))
    found = pd.judge_images(judge, images, torch.tensor([0, 1, 1, 1]), CPU)
    assert found["accuracy"] == 0.75
    # means (0, 0, -1): squared distance 2 to the real mean; variances (4/3, 4/3, 0) against none
    assert close(found["frechet"], 2 + 8 / 3, 1e-5)


def test_inception_score_of_known_predictions():
    same = torch.randn(1, 7, generator=seeded()).expand(40, 7)
    assert pd.inception_score(same)[0] == pytest.approx(1)
    sure = 200.0 * F.one_hot(torch.arange(5).repeat_interleave(200), 5)
    assert pd.inception_score(sure, splits=1) == (pytest.approx(5), 0)
    mean, std = pd.inception_score(sure, splits=10)
    assert 4.6 < mean < 5 and 0 < std < 0.3, "the splits are shuffled, or each would hold only one class"


def test_inception_score_by_hand():
    p = [[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]]
    q = [sum(column) / 2 for column in zip(*p)]
    divergence = sum(a * math.log(a / b) for row in p for a, b in zip(row, q)) / 2
    logits = torch.tensor(p).log() + torch.tensor([[5.0], [-3.0]])
    assert pd.inception_score(logits, splits=1)[0] == pytest.approx(math.exp(divergence), rel=1e-5)


def test_kernel_distance_by_an_explicit_double_loop():
    x, y = torch.randn(5, 3, generator=seeded(1)).double(), torch.randn(5, 3, generator=seeded(2)).double() + 1

    def kernel(a, b):
        return (sum(p * q for p, q in zip(a.tolist(), b.tolist())) / 3 + 1) ** 3
    pairs = list(itertools.permutations(range(5), 2))         # without i = j
    within = sum(kernel(f[i], f[j]) for f in (x, y) for i, j in pairs) / len(pairs)
    expected = within - 2 * sum(kernel(a, b) for a in x for b in y) / 25
    assert pd.kernel_distance(x, y, subsets=3) == (pytest.approx(expected), pytest.approx(0, abs=1e-9))


def test_kernel_distance_is_unbiased():
    values = [pd.kernel_distance(*torch.randn(2, 20, 4, generator=seeded(s)), subsets=1)[0] for s in range(300)]
    values = torch.tensor(values)
    assert values.mean().abs() < 5 * values.std() / 300 ** 0.5, "one distribution: 0 on average"
    assert values.min() < 0 < values.max(), "an unbiased estimate of zero is negative at times"


def test_kernel_distance_draws_subsets():
    x, y = torch.randn(2, 200, 4, generator=seeded())
    mean, std = pd.kernel_distance(x, y + 2, subsets=8, size=50)
    assert mean > 1 and std > 0


@pytest.fixture(scope="module")
def inception():
    return pd.fid_inception()


def reaching_the_pool(net, name, x):
    """What the convolution of the block's pooling branch gets."""
    block, seen = getattr(net, name), []
    handle = block.branch_pool.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    block(x)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("name, channels", [
    ("Mixed_5b", 192), ("Mixed_5c", 256), ("Mixed_5d", 288), ("Mixed_6b", 768), ("Mixed_6c", 768), ("Mixed_6d", 768),
    ("Mixed_6e", 768), ("Mixed_7b", 1280)])
def test_fid_inception_leaves_the_padding_out_of_its_average_pools(inception, name, channels):
    assert close(reaching_the_pool(inception, name, torch.ones(1, channels, 5, 5)), torch.ones(1, channels, 5, 5)), \
        f"{name}: the corners average padding in"
    x = torch.randn(2, channels, 5, 6, generator=seeded())
    expected = F.avg_pool2d(x, 3, 1, padding=1, count_include_pad=False)
    assert close(reaching_the_pool(inception, name, x), expected, 1e-5), f"{name}: average of the pixels that exist"


def test_fid_inception_pools_its_last_block_by_maximum(inception):
    for seed in (0, 1):                                       # twice: nothing may be left over from the call before
        x = torch.randn(1, 2048, 5, 5, generator=seeded(seed)) - 5
        assert reaching_the_pool(inception, "Mixed_7c", x).equal(F.max_pool2d(x, 3, 1, padding=1))


def test_fid_inception_has_1008_outputs_and_no_trace_of_training(inception):
    assert inception(torch.zeros(1, 3, 80, 80)).shape == (1, 1008)
    assert inception.fc.weight.shape == (1008, 2048) and inception.AuxLogits is None and not inception.transform_input
    assert not inception.training and not any(p.requires_grad for p in inception.parameters())


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


def test_inception_features_come_in_order_for_many_images():
    images = torch.arange(0, 250, 2).to(torch.uint8).view(125, 1, 1, 1).expand(125, 1, 2, 2)
    net = StandIn()
    features, _ = pd.inception_features(net, images, CPU)
    assert features.shape == (125, 3) and close(features[:, 0], torch.arange(0, 250, 2) / 127.5 - 1, 1e-5)
