"""Patronus: what patronus.py does not share with the other scripts. Exact answers wherever there is one."""
import dataclasses
import functools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import patronus as pt
from conftest import (CPU, args, awake, checkpoint, close, config, contents, flags, metrics, normal, refused, same,
                      samples, seeded)
from test_pdm import faces

EXPLAINED = {f"{name}.png" for name in ("reconstruction", "variations", "interpolation", "extrapolation", "prototypes",
                                        "consistency", "where", "when")}
MEASURED = {"metrics.json", "samples.png", "samples.npz", "curves.png", "diagnosis.png"}
settings = functools.partial(config, pt, multipliers="1,2", global_prototypes=0.5)
words = functools.partial(args, pt, multipliers="1,2", global_prototypes=0.5)

def network(side=16, learns=False, **changes):
    """A Patronus in which nothing starts at zero: 4 prototypes of patches, 4 of images, but for changes."""
    torch.manual_seed(0)
    model = settings(image_size=side, dropout=0.0, **changes).build(dict(shape=[3, side, side])).eval()
    awake(model.unet)
    return model if learns else model.requires_grad_(False)

def batch(n=4):
    return pt.Batch(normal(n, 3, 16, 16).clamp(-1, 1), torch.zeros(n).long(),
                    torch.randint(1000, (n,), generator=seeded()), normal(n, 3, 16, 16, seed=1), torch.zeros(n))

def noise_images(*shape):
    return torch.randint(256, shape, generator=seeded(), dtype=torch.uint8)

def pixels(s):
    """s [B, m <= 16] as the first m pixels of black images [B, 1, 4, 4]."""
    return F.pad(s, (0, 16 - s.shape[1]), value=-1).view(-1, 1, 4, 4)

class Painter:
    """The exact model of images N(picture(s, t), sd^2) [B, 1, 4, 4], whose s are the first m pixels. It notes all."""
    def __init__(self, m, picture=lambda s, t: pixels(s), sd=0.0):
        self.m, self.picture, self.sd, self.told, self.noise = m, picture, sd, [], []

    def denoise(self, x, t, s):
        self.told.append(s)
        self.noise.append(x)
        a = pt.alpha_bars(1000)[t][:, None, None, None]
        return (1 - a).sqrt() * (x - a.sqrt() * self.picture(s, t)) / (self.sd ** 2 * a + 1 - a)

    def encode(self, x):
        return x.flatten(1)[:, :self.m]

def run_of(model):
    return SimpleNamespace(model=model, known=dict(shape=(1, 4, 4)), device=CPU)

def planted(together=0.0):
    """Traits b and a (in 3 of 10), the same in a share of images: s_0..2 tell a, s_3..5 tell b -> s, images."""
    a, b = torch.rand(200, generator=seeded(1)) < 0.3, torch.rand(200, generator=seeded(2)) < 0.5
    b = torch.where(torch.rand(200, generator=seeded(3)) < together, a, b)
    s = 0.4 + 0.025 * normal(200, 8).clamp(-2, 2)
    s[:, :3] += torch.where(a, 0.3, -0.3)[:, None]
    s[:, 3:6] += torch.where(b, 0.3, -0.3)[:, None]
    data = pt.Dataset(pt.to_uint8(pixels(s)), torch.zeros(200).long(), [], torch.stack([b, a], 1), ("b", "a"))
    return data.images.float().flatten(1)[:, :8] / 127.5 - 1, data                  # s as rounded

def reader(columns, images):
    """A judge that reads P of trait i from the brightness of a pixel."""
    last = torch.nn.Identity()
    last.forward = lambda z: ((z[:, columns] + 1) / 2).logit(1e-6)
    return (torch.nn.Flatten(), last), pt.moments(images.flatten(1) / 127.5 - 1)

@pytest.fixture(scope="module", autouse=True)
def done(tmp_path_factory):
    """A finished run, which tests only read. In it and in them pictures are empty files."""
    folder = tmp_path_factory.mktemp("patronus") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pt.Figure, "savefig", lambda figure, path, **how: path.touch())
        assert pt.main(words(out=folder)) == 0
        yield folder

def test_patch_distances_are_squared_never_negative_and_float32_under_autocast():
    z = normal(4, 64, 3, 3) * 30
    p = z.permute(0, 2, 3, 1).reshape(-1, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found = pt.patch_distances(z, p)
    assert close(found, (z[:, None] - p[:, :, None, None]).square().sum(2), atol=0.1) and found.min() == 0
    assert found.dtype == torch.float32 and found.equal(pt.patch_distances(z, p)), "not computed in bfloat16"

def positive(net):
    for p in net.parameters():
        p.data.abs_().add_(0.01)                               # so that every ReLU passes
    return net

@pytest.mark.parametrize("side, patch", [(16, 4), (16, 5), (16, 16), (32, 15), (32, 21), (128, 5), (128, 61)])
def test_every_patch_is_where_the_gradient_is_and_inside_the_image(side, patch):
    net, x = positive(pt.patch_encoder(1, side, 2, patch)), torch.rand(1, 1, side, side).requires_grad_()
    start, size, step = pt.receptive_field(net)
    z = net(x)[0, 0]
    assert (start, size) == (0, patch) and 0 <= side - (step * (len(z) - 1) + size) < step, "as many as fit"
    for i, j in {(0, 0), (len(z) // 2, len(z) // 3), (len(z) - 1, len(z) - 1)}:
        gradient, = torch.autograd.grad(z[i, j], x, retain_graph=True)
        expected = torch.zeros(side, side, dtype=torch.bool)
        expected[step * i:step * i + size, step * j:step * j + size] = True
        assert expected.equal(gradient[0, 0] != 0)

@pytest.mark.parametrize("side, patch", [(16, 5), (16, 16), (32, 15), (64, 7), (128, 61)])
def test_prototypes_of_images_see_all_that_patches_see(side, patch):
    model, x = network(side, patch=patch, learns=True), torch.rand(1, 3, side, side).requires_grad_()
    whole = positive(model.whole)(positive(model.encoder)(x))
    seen = torch.autograd.grad(whole.sum(), x)[0][0].ne(0)
    used = 1 - pt.receptive_field(model.encoder)[2]           # steps may leave out the last rows and columns
    assert whole.shape[2:] == (1, 1) and seen[:, :used, :used].all()
    maps, last = model.maps(x)[0], pt.activation(pt.patch_distances(whole, model.prototypes[4:]))[0]
    assert close(maps[4:].detach(), last.detach().expand_as(maps[4:]), 1e-4), "one value, at every patch"

@pytest.mark.parametrize("side, patch, kernels, step", [
    (32, 15, [3] * 4, 2), (224, 61, [5] * 5, 4), (16, 5, [5, 1, 1, 1], 2), (128, 15, [15, 1, 1, 1, 1], 4)])
def test_the_papers_kernels_follow_from_its_patches(side, patch, kernels, step):
    net = pt.patch_encoder(3, side, 9, patch)
    assert [conv.kernel_size[0] for conv in net[::2]] == kernels and pt.receptive_field(net) == (0, patch, step)
    assert all(conv.padding == (0, 0) and abs(conv.weight.std() - 0.1) < 0.02 for conv in net[::2])

def test_best_patches_are_the_corners_of_planted_patches_framed_just_outside():
    run, images, chosen = run_of(network(32, patch=15)), noise_images(10, 3, 32, 32) // 2, [3] * 8 + [2, 6]
    z = run.model.encoder(images[[1, 8]].float() / 127.5 - 1)
    run.model.prototypes[3], run.model.prototypes[2] = z[0, :, 4, 7], z[1, :, 0, 8]
    assert pt.best_patches(run, images, chosen)[[1, 8]].tolist() == [[2 * 4, 2 * 7], [0, 16]]
    framed = pt.framed(run, images, chosen)[:, 0] == 255
    y, x = framed[1].nonzero().T
    assert (y.min(), y.max(), x.min(), x.max()) == (7, 23, 13, 29), "around 15 pixels from (8, 14) on"
    assert framed[9].sum() == 4 * 31, "of an image the border"

def test_heat_lies_in_the_middle_of_patches_and_covers_the_image():
    run, maps = run_of(network(patch=5)), torch.zeros(2, 6, 6)
    maps[0, 0, 0], maps[1, 2, 5] = 1, 1
    corner, side = (image[0].nonzero() for image in pt.heat_maps(run, torch.zeros(2, 3, 16, 16), maps))
    assert corner.amax(0).tolist() == [2, 2] and corner.amin(0).tolist() == [0, 0] and len(corner) == 9
    assert side.amin(0).tolist() == [5, 11] and side.amax(0).tolist() == [6, 15], "step 2, and on to the border"

def test_the_loss_is_told_s_of_the_clean_image_and_weighs_levels_and_the_sketch():
    model, data, abar = network(num_prototypes=6, prototype_dim=3), batch(), pt.alpha_bars(1000)
    s, found = model.encode(data.x0), model(data, abar, settings(emphasis=0.5, sketch=2.0))
    eps = model.denoise(pt.add_noise(data.x0, data.t, data.eps, abar), data.t, s)
    errors, weights = (eps - data.eps).square().mean((1, 2, 3)), (1 / abar.sqrt()).clamp(max=50)
    sketch = (model.draw(s) - data.x0).square().mean()
    assert close(found["diffusion"], errors.mean(), 1e-5) and close(found["sketch"], sketch, 1e-5)
    assert "sketch" not in network(sketch=0.0)(data, abar, settings(sketch=0.0)), "the paper has none"
    assert close(found["loss"], (errors * weights[data.t]).mean() / weights.mean() + 2 * sketch, 1e-4)

def test_the_noise_loss_trains_all_parts_jointly_but_the_latent_model():
    model = network(learns=True)
    model(batch(), pt.alpha_bars(1000), settings())["loss"].backward()
    groups = {id(p): i for i, group in enumerate(model.param_groups()) for p in group["params"]}
    expected = dict(encoder=0, whole=0, prototypes=0, mlp=1, sketch=1, unet=1)              # clipped apart
    reached = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert all(groups.get(id(p)) == expected.get(name.split(".")[0]) for name, p in model.named_parameters())
    assert reached == set(expected)

@pytest.mark.parametrize("side", [16, 32])
def test_what_the_denoiser_is_told_and_reads_and_what_is_hidden_in_training_alone(side):
    model, seen = network(side), {"mlp": [], "sketch": [], "unet": []}
    for name, inputs in seen.items():
        model.get_submodule(name).register_forward_pre_hook(lambda module, given, to=inputs: to.append(given[0]))
    model.mean[:], model.std[:] = torch.arange(8), 2
    x0 = normal(64, 3, side, side)
    told, data = (model.encode(x0) - torch.arange(8)) / 2, batch(64)._replace(x0=x0, eps=x0)
    model.train()(data, pt.alpha_bars(1000), settings(hide=0.25))
    model.denoise(x0, data.t, model.encode(x0))
    given = seen["mlp"][0]
    assert 0.15 < (given == 0).float().mean() < 0.35 and close(seen["mlp"][1], told, 1e-5)
    assert close(given, torch.where(given == 0, 0, told / 0.75), atol=1e-5), "hidden one by one"
    assert seen["sketch"][0].equal(given) and seen["sketch"][1].equal(given), "drawn, and its loss taken, from the same"
    assert close(seen["unet"][1], torch.cat([x0, model.draw(model.encode(x0))], 1), 1e-5), "beside xt"

def test_prototypes_start_at_patches_of_real_images_where_activations_tell_them_apart():
    data, model, uniform = pt.load_dataset("shapes", "train", 16), network(), network()
    for start, changes in ((model, {}), (uniform, dict(start="uniform"))):
        assert start.begin(settings(**changes), [data, data], None, CPU)["targets"].tolist() == [0] * 200
    assert same(uniform.state_dict(), network().state_dict()) and uniform.prototypes.std() > 0.2, "U(0, 1)"
    seen = data.images[pt.random_index(200, 200, 0, "start")]
    x = seen.float() / 127.5 - 1
    for layers, prototypes in ((model.encoder, model.prototypes[:4]), (model.whole, model.prototypes[4:])):
        for i in range(1, len(layers) - 2, 2):
            std, mean = torch.std_mean(layers[:i](x), (0, 2, 3))
            assert close(mean, 0 * mean, atol=1e-3) and close(std, 0 * std + 1, 1e-3), "every channel of every layer"
        x = layers(x)
        assert x.transpose(0, 1).flatten(1).var(1).sum().item() == pytest.approx(1, rel=1e-3)
        assert (pt.patch_distances(x, prototypes).amin((0, 2, 3)) < 1e-4).all(), "real patches, real images"
    s = pt.activations(run_of(model), seen)
    assert close(model.mean, s.mean(0), 1e-4) and close(model.std, s.std(0), 1e-4) and s.std(0).min() > 0.4
    z = torch.cat([0.01 * normal(400, 2), torch.tensor([[9.0, 0], [0, 9], [7, 7]])])
    assert all((pt.spread_points(z, 4, seed).norm(dim=1) > 5).sum() == 3 for seed in range(5)), "far apart"

def test_the_latent_model_draws_possible_activations_from_their_distribution():
    a, b = normal(2, 2000)
    s = torch.stack([3 + 0.3 * a, 5 + 0.5 * (0.8 * a + 0.6 * b), torch.full_like(a, 4.0)], 1)
    cfg = settings(latent_steps=600, latent_width=64, latent_timesteps=100, num_prototypes=3)
    run = run_of(SimpleNamespace(latent=pt.train_latent(s, cfg, CPU)))
    found = pt.draw_activations(cfg, run, 2000)
    assert close(found.mean(0), s.mean(0), atol=0.08) and close(found.std(0)[:2], s.std(0)[:2], rtol=0.2)
    assert torch.corrcoef(found[:, :2].T)[0, 1].item() == pytest.approx(0.8, abs=0.1) and found[:, 2].std() < 0.01
    run.model.latent.std.fill_(20)
    wide = pt.draw_activations(cfg, run, 200)
    assert wide.min() == 0 and wide.max().item() == pytest.approx(-math.log(1e-4))

def test_the_latent_model_is_trained_once_and_the_same_after_a_kill(done, tmp_path, monkeypatch, capsys):
    cfg = pt.load_run(done, "cpu").config
    sets = pt.load_traits(cfg)
    pt.new_run(cfg, sets, tmp_path, CPU)
    pt.train(cfg, sets, tmp_path, CPU)
    refused(pt, capsys, flags(sample=tmp_path, out=tmp_path / "s"), "--resume")
    with monkeypatch.context() as patch:
        patch.setattr(pt, "train_latent", lambda *a: 1 / 0)
        pytest.raises(ZeroDivisionError, pt.finish_run, cfg, sets, tmp_path)
        pt.finish_run(cfg, sets, done)                        # it has one
    pt.finish_run(cfg, sets, tmp_path)
    assert same(checkpoint(tmp_path)["average"], checkpoint(done)["average"])

def test_an_image_comes_back_from_its_s_and_inverted_noise():
    images, run, errors = noise_images(3, 1, 4, 4) // 2 + 60, run_of(Painter(4, sd=0.6)), []
    for steps in (50, 100):
        cfg = settings(invert_steps=steps, sample_batch=2, sample_steps=50, sampler="ddpm")
        errors.append((pt.reconstruct(cfg, run, images) - images.float()).abs().max() / 127.5)
    assert errors[1] < 0.1 and 1.5 < errors[0] / errors[1] < 2.5, "first order"

def test_inversion_asks_at_the_lowest_level_for_the_clean_image_and_then_at_each_current_one():
    abar, x, asked = pt.alpha_bars(100), normal(2, 1, 2, 2), []
    found = pt.invert(lambda x, t: asked.append(t.tolist()) or 0.5 * x + 1, x, abar, 2)
    assert asked == [[49, 49], [49, 49]]
    for a, b in ((torch.ones(()), abar[49]), (abar[49], abar[99])):
        eps = 0.5 * x + 1
        x = b.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b).sqrt() * eps
    assert close(found, x, atol=1e-5)

def test_interpolation_is_linear_in_s_and_spherical_in_the_noise():
    run, cfg, pair, share = run_of(Painter(4)), settings(invert_steps=1), noise_images(2, 1, 4, 4), torch.arange(5) / 4
    pt.interpolate(cfg, run, pair, n=5)
    s, xT = pt.invert_images(cfg, run, pair)
    assert close(run.model.told[1], s[0] + share[:, None] * (s[1] - s[0]), atol=1e-5)
    assert close(run.model.noise[1], pt.spherical(*xT, share), atol=1e-5)

def test_company_is_the_regression_on_the_chosen_and_follows_within_the_range():
    s = normal(50, 4).abs()
    s[:, 1], s[:, 3] = 2 * s[:, 0] + 0.1, s[:, 0] - 3 * s[:, 2]
    assert close(pt.company(s, [0, 2]), [[1, 2, 0, 1], [0, 0, 1, -3]], atol=1e-4)
    assert close(torch.tensor([1.0, 2]) @ pt.company(s, [0, 1])[:, :2], [1, 2], atol=1e-4), "two that say the same"
    s, two, x = torch.tensor([[1.0, 2, 3], [2, 0, 9]]), torch.tensor([[2.0], [1.0]]), torch.linspace(0, 1, 9)
    follow = pt.set_activations(s, [0], two, torch.stack([x, 0.5 * x, 7 - 4 * x], 1))
    assert close(follow, [[2, 2.5, 0], [1, 0, -math.log(1e-4)]], atol=1e-4) and s[0, 0] == 1

S_ALL = torch.tensor([[0.5, 0.7, 0], [0.9, 0.6, 0], [0.6, 0.2, 0], [0.4, 0.55, 0]])         # the last never varies

def test_a_prototype_is_raised_alone_or_with_its_company_from_the_images_own_noise():
    images, cfg, alone, along = noise_images(2, 1, 4, 4), settings(invert_steps=1), Painter(3), Painter(3)
    pt.raise_prototypes(cfg, run_of(alone), images, [1, 0], S_ALL, follow=False)
    pt.raise_prototypes(cfg, run_of(along), images, [1, 0], S_ALL)
    s, xT = pt.invert_images(cfg, run_of(Painter(3)), images)
    assert close(alone.told[1], [*s.tolist(), *([x, 0.7, z] for x, _, z in s), *([0.9, y, z] for _, y, z in s)])
    assert alone.noise[1].equal(xT.repeat(3, 1, 1, 1)) and alone.noise[1].equal(along.noise[1])
    told, slope = along.told[1], np.polyfit(S_ALL[:, 0], S_ALL[:, 1], 1)[0]
    assert told[:2].equal(s) and close(told[4:, 1], (s[:, 1] + slope * (0.9 - s[:, 0])).clamp(min=0), atol=1e-5)

@pytest.mark.parametrize("factor, share", [(1, 1), (-1, 0), (0, 0), (torch.tensor([1.0, 0, 0]), 0.5)])
def test_raised_share_counts_the_pairs_that_respond(factor, share):
    run, s = run_of(Painter(3, lambda s, t: pixels(s * factor))), torch.tensor([[-0.5, 0.3], [0.2, -0.1], [0.0, 0.1]])
    for follow in (False, True):
        assert pt.raised_share(settings(pairs=5), run, S_ALL, pt.to_uint8(pixels(s)), follow) == share

def test_emergence_reads_the_image_predicted_at_every_step_of_ddim_whatever_the_sampler():
    s, run = normal(3, 2) / 3, run_of(Painter(2, lambda s, t: pixels(s * (1 - t / 1000)[:, None])))
    times, images = pt.emergence(settings(sample_batch=2), run, s, steps=10)
    assert times == pt.sample_times(1000, 10)
    assert images.equal(torch.stack([pt.to_uint8(pixels(s * (1 - t / 1000))) for t in times]))
    one, two = (pt.emergence(settings(sampler=x), run_of(Painter(2, sd=0.6)), s, 10)[1] for x in ("ddim", "ddpm"))
    assert one.equal(two)

def test_switch_tells_a_until_the_level_and_b_below():
    run, s_a, s_b = run_of(Painter(2)), normal(3, 2) / 9, normal(3, 2, seed=1) / 9
    images = pt.switch(settings(sample_steps=4, sampler="ddim"), run, s_a, s_b, 499)
    assert [s.equal(s_a) for s in run.model.told] == [True, True, True, False], "at t = 999, 749, 499 and 249"
    assert run.model.told[3].equal(s_b) and images.equal(pt.to_uint8(pixels(s_b)))

def test_figures_and_switch_of_a_model_that_shows_every_trait_or_none(monkeypatch):
    (s, data), cfg = planted(), settings(num_samples=200, sample_steps=10, sampler="ddim")
    run, blind = (run_of(Painter(8, lambda s, t, k=k: pixels(k * (s - 0.4) + k - 1))) for k in (1, 0))
    monkeypatch.setattr(pt, "load_trait_judge", lambda *a: reader([3, 0], pt.to_uint8(pixels(s - 0.4))))
    found, told = pt.measure_traits(cfg, run, [data, data])
    assert found["kept_a"] == found["kept_b"] == 1 and abs(found["frechet"]) < 1e-3 and len(told) == 200
    curve = ([*range(0, 1001, 100)], [0] + [1] * 10)          # told last at t = 99
    assert pt.switch_curves(cfg, run, [data, data]) == dict(b=curve, a=curve)
    found, _ = pt.measure_traits(cfg, blind, [data, data])
    assert found["kept_a"] == pytest.approx(1 - data.attributes[:, 1].double().mean().item()) and found["frechet"] > 0.1
    assert found["attribute_moved"] == 0 and math.isnan(found["leak"]), "a move without any effect has no leak"

@pytest.mark.parametrize("leak, together", [(0, 0), (1, 0), (-0.5, 0), (0, 0.9), (1, 0.9)])
def test_a_planted_leak_is_found_with_movers_at_the_opposite_and_their_company(leak, together):
    def picture(s, t):                                        # pixel 0 shows a; pixel 1 b, and as much as `leak` of a
        a, b = (part.mean(1) - 0.4 for part in (s[:, :3], s[:, 3:6]))
        return pixels(torch.stack([a, b / 2 + leak * a], 1))
    (s, data), model = planted(together), Painter(8, picture)
    found, seen = pt.diagnose(settings(sampler="ddim", attribute="a", watch="b"), run_of(model),
                              reader([1, 0], data.images), data, most=150)
    assert sorted(seen.movers) == [0, 1, 2] and leak - 0.1 < found["leak_low"] < found["leak_high"] < leak + 0.1
    assert (found["leak"], found["attribute_moved"]) == pytest.approx((leak, 0.3), abs=0.02), "P by half of 0.6"
    before, _, after, _ = model.told                          # two steps each
    assert model.noise[0].equal(model.noise[2]) and len(before) == 150, "the same random noise"
    b, a = data.attributes.T
    within = s - torch.stack([s[~b].mean(0), s[b].mean(0)])[b.long()]
    has = a[[(s == row).all(1).nonzero()[0, 0].item() for row in before]]
    opposite = torch.where(has[:, None], s[~a].mean(0), s[a].mean(0))
    expected = pt.set_activations(before, seen.movers, opposite[:, seen.movers], within)
    assert close(after, expected, atol=1e-3) and not close(after[:, 3:], before[:, 3:], atol=1e-3)

def test_logistic_aurocs_tell_what_is_told_and_are_of_images_held_out():
    s, known = 5 + 0.01 * normal(120, 150), torch.rand(120, 3, generator=seeded(1)) < 0.5
    assert (pt.logistic_aurocs(s, known) - 0.5).abs().max() < 0.15, "noise, of which there is enough to fit the rest"
    two = torch.stack([s[:, 0], s[:, 0] + 0.05 * known[:, 2], torch.ones(120)], 1)
    assert pt.logistic_aurocs(two, known)[2] > 0.9, "the difference of two"

def test_mutual_information_disentanglement_and_movers_by_hand():
    a, b, flat = torch.arange(8) < 4, torch.arange(8) % 4 < 2, torch.zeros(8)
    known, c = torch.stack([a, b], 1), torch.tensor([1, 1, 1, 0, 0, 0, 0, 1]).bool()
    assert pt.mutual_information(a, c) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert pt.disentanglement(torch.stack([a.float(), -b.float(), flat], 1), known) == (1.0, 2), "inverted counts too"
    for ones, expected in ((2, (0.25, 1)), (1, (0, 0))):      # AUROC of a: 0.75, which is enough, and 0.625
        assert pt.disentanglement(torch.stack([torch.arange(8) < ones, flat], 1), known[:, :1]) == expected
    for agree, expected in ((15, (0.5, 2)), (16, (0, 0))):    # of 20: 0.19 of the entropy, 0.28
        both = torch.stack([torch.arange(40) < 20, (torch.arange(40) < 20) ^ (torch.arange(40) % 20 >= agree)], 1)
        assert pt.disentanglement(both.float(), both) == pytest.approx(expected), "traits that tell each other"
    s = torch.stack([2.0 * a + b, -1.0 * c, flat], 1)         # of a all, half, nothing; of b half, half, nothing
    assert pt.choose_movers(s, known, 0, 1, n=1) == [1], "which tells b is left out"

def test_prototypes_are_live_dead_or_duplicates_and_those_shown_tell_different_things():
    x = torch.linalg.qr(torch.cat([torch.ones(100, 1), normal(100, 4)], 1))[0][:, 1:]               # of mean 0
    turned = [math.cos(angle) * x[:, 0] + math.sin(angle) * x[:, 1] for angle in (0, 0.28, 0.56)]   # cosines 0.96, 0.85
    columns = [*turned, -x[:, 0], 0 * x[:, 0], 0.04 * x[:, 2], 0.06 * x[:, 3]]
    live, dead = pt.prototype_state(5 + torch.stack(columns, 1))
    assert live.nonzero().flatten().tolist() == [0, 2, 6], "a duplicate of a duplicate alone lives"
    assert dead.nonzero().flatten().tolist() == [4, 5], "below a twentieth of the liveliest"
    columns = [x[:, 0], 3 * x[:, 0] + 1.5 * x[:, 1], 2 * x[:, 0] + 2 * x[:, 1], 0 * x[:, 0], x[:, 2], x[:, 1] + x[:, 2]]
    s = 5 + torch.stack(columns, 1)
    assert pt.diverse(s, 3) == [1, 4, 5], "varies most; correlation 0 with it; then 0.32 and 0.71"
    assert pt.diverse(s, 9) == [1, 4, 5, 0, 2], "0.89 before 0.95; live ones alone, each once"

def test_celeba_has_forty_attributes_and_no_classes(tmp_path, monkeypatch):
    known = faces(tmp_path, monkeypatch)
    sets = pt.load_traits(settings(dataset="celeba", data_dir=tmp_path, attribute="T3", watch="T8"))
    for data, part in zip(sets, (slice(0, 4), slice(5, 14))):
        assert data.attributes.equal(known[part]) and data.attribute_names[19:22] == ["T19", "Male", "T21"]
        assert data.classes == [] and close(data.images[:, 0].float().mean((1, 2)), 15 * torch.arange(14.0)[part], 4)

def test_traits_are_attributes_else_classes_and_the_first_and_last_are_diagnosed():
    data = pt.Dataset(torch.zeros(3, 1, 4, 4), torch.tensor([2, 0, 1]), ["x", "y", "z"])
    assert same(pt.traits(data), (torch.eye(3)[[2, 0, 1]].bool(), list("xyz")))
    assert [pt.watched_traits(settings(attribute=a), data) for a in ("", "y")] == [[0, 2], [1, 2]]
    marked = dataclasses.replace(data, attributes=torch.ones(3, 2).bool(), attribute_names=("p", "q"))
    assert pt.judged(marked)[0].int().tolist() == [[1, 1, 0, 0, 1], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0]]
    assert pt.judged(marked)[1] == ["p", "q"] and pt.traits(dataclasses.replace(data, classes=["x"]))[1] == []

def test_a_trait_is_kept_if_p_is_on_its_side_and_a_class_if_it_is_the_likeliest():
    P = torch.tensor([[0.9, 0.4, 0.1, 0.3], [0.2, 0.6, 0.7, 0.8], [0.9, 0.1, 0.2, 0.1], [0.1, 0.9, 0.2, 0.8]])
    known = torch.tensor([[1, 0, 0, 1], [1, 0, 1, 0], [1, 0, 1, 0], [0, 1, 0, 0]]).bool()       # one trait, 3 classes
    images = pt.to_uint8(2 * P - 1).view(4, 1, 2, 2)
    found = pt.kept_traits(reader([0, 1, 2, 3], images), images, known, ["t"], CPU)
    assert found["kept_t"] == 0.75 and found["kept_class"] == 0.5 and len(found) == 3, "right: the third and fourth"

def test_a_planted_correlation_is_in_the_training_images_alone_and_not_in_the_judges(tmp_path, monkeypatch):
    seen, cfg, plain = [], settings(bias=0.95, data_dir=tmp_path), pt.load_traits(settings())
    monkeypatch.setattr(pt, "fit", lambda net, *given: seen.extend(given) or net.eval())
    (biased, test), own = pt.load_traits(cfg), pt.load_dataset("shapes", "judge", 16)
    warm, dot = biased.attributes[:, [0, 4]].T
    assert 0.9 < (warm == dot).float().mean() < 1 and len(warm) == 200 and test.images.equal(plain[1].images)
    judge = pt.load_trait_judge(cfg, biased, CPU)
    assert seen[0].equal(own.images), "learnt from images of its own: traits, and the class"
    assert seen[1].equal(torch.cat([own.attributes, F.one_hot(own.labels, 10)], 1).float())
    (P, distance), (_, other) = (pt.judge_traits(judge, data.images, CPU) for data in (own, biased))
    assert P.shape == (200, 15) and 0 < P.min() and P.max() < 1 and abs(distance) < 1e-6 < other

def test_a_run_leaves_its_pictures_samples_and_every_figure(done):
    found, run, data = metrics(done), pt.load_run(done, "cpu"), pt.load_dataset("shapes", "test", 16)
    assert set(found) >= set("auroc tad tad_traits leak leak_low leak_high live dead raised raised_alone frechet "
                             "reconstruction_error kept_dot real_kept_dot unconditional_frechet".split())
    assert set(contents(done)) == EXPLAINED | MEASURED | {"config.json", "log.csv", "checkpoint.pt"}
    s, index = pt.activations(run, data.images), pt.shuffled(60, 20, 0, "held-out images")
    assert found["auroc_dot"] == pytest.approx(pt.logistic_aurocs(s, data.attributes)[4].item(), abs=1e-3)
    _, distance = pt.judge_traits(pt.load_trait_judge(run.config, data, CPU), data.images[index], CPU)
    assert found["real_frechet"] == pytest.approx(distance), "of as many images as samples"
    assert close(samples(done)[1], pt.draw_activations(run.config, run, 20), 1e-4)

def test_explaining_shows_what_it_says(done, tmp_path, monkeypatch):
    kept, run, images = {}, pt.load_run(done, "cpu"), pt.load_dataset("shapes", "test", 16).images
    for name in ("draw_grid", "draw_when"):
        monkeypatch.setattr(pt, name, lambda path, *given, **k: kept.update({path.name: given}))
    assert pt.main(flags(explain=done, out=tmp_path / "e")) == 0 and set(kept) == EXPLAINED
    s, (tiles, names, *_), few = pt.activations(run, images), kept["prototypes.png"], kept["variations.png"][0][:8]
    chosen = pt.diverse(s, 8)
    raised, again = pt.raise_prototypes(run.config, run, few, chosen, s)
    for i, (row, name, j) in enumerate(zip(tiles.split(8), names, chosen, strict=True), 1):
        most = (again[i, :, j] - again[0, :, j]).argmax()
        assert name == f"no. {j}" and row[:2].equal(pt.framed(run, raised[[0, i], most], [j] * 2)), "before and raised"
        assert row[2:].equal(pt.framed(run, images[s[:, j].topk(6).indices], [j] * 6)), "real patches"

def test_diagnosing_again_with_other_traits(done, tmp_path):
    assert pt.main(flags(diagnose=done, attribute="large", watch="warm hue", out=tmp_path / "d")) == 0
    assert set(contents(tmp_path / "d")) == {"metrics.json", "curves.png", "diagnosis.png"}
    assert metrics(tmp_path / "d")["settings"]["attribute"] == "large"

def test_editing_sets_activations_of_an_image(done, tmp_path, capsys):
    image, run, out = pt.load_dataset("shapes", "test", 16).images[3:4], pt.load_run(done, "cpu"), tmp_path / "e"
    Image.fromarray(image[0].permute(1, 2, 0).numpy()).save(tmp_path / "image.png")
    edit = flags(model=done, edit=tmp_path / "image.png", out=out)
    assert pt.main([*edit, "--set=2=3.5,0=0"]) == 0 and set(contents(out)) == {"edit.png", "edited.png"}
    s, xT = pt.invert_images(run.config, run, image)
    assert f"s_2: {s[0, 2]:.2f}, set to 3.50" in capsys.readouterr().out
    s[0, 2], s[0, 0] = 3.5, 0
    assert close(pt.decode(out / "edited.png", 16), pt.render(run.config, run, s, xT)[0], atol=1)

def test_images_without_traits_are_enough_and_grey_ones_are_edited_by_luminance(tmp_path, monkeypatch, capsys):
    root, out, drawn = tmp_path / "pictures", tmp_path / "run", []
    root.mkdir()
    for i, image in enumerate(noise_images(90, 16, 16).numpy()):
        Image.fromarray(image).save(root / f"{i}.png")
    assert pt.main(words(dataset="folder", data_dir=root, steps=2, eval_every=1, out=out)) == 0
    assert {*EXPLAINED, *MEASURED} - {*contents(out)} == {"diagnosis.png"}
    assert {"live", "raised"} < set(metrics(out)) and not {"auroc", "tad", "frechet", "leak"} & set(metrics(out))
    refused(pt, capsys, flags(diagnose=out, out=tmp_path / "d"), "no two held-out traits")
    Image.new("RGB", (20, 30), (200, 100, 30)).save(tmp_path / "colour.png")
    monkeypatch.setattr(pt, "draw_grid", lambda path, tiles, *given: drawn.extend(tiles))
    assert pt.main([*flags(model=out, edit=tmp_path / "colour.png", out=tmp_path / "e"), "--set=1=2"]) == 0
    assert drawn[0].equal(torch.full((1, 16, 16), 122)), "0.299 R + 0.587 G + 0.114 B"

