"""Patronus: what patronus.py does not share with the other scripts. Exact answers wherever there is one."""
import dataclasses
import functools
import itertools
import math
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from PIL import Image

import patronus as pt
from conftest import (CPU, args, awake, checkpoint, close, config, contents, flags, metrics, normal, refused, same,
                      seeded)

EXPLAINED = {"explanation.json", *(f"{name}.png" for name in "reconstruction variations interpolation extrapolation "
                                   "prototypes consistency where when denoising".split())}
MEASURED = {"metrics.json", "samples.png", "samples.npz", "curves.png", "diagnosis.png"}
BASIC = {"config.json", "log.csv", "checkpoint.pt"}
LEAK = {"leak", "leak_low", "leak_high", "attribute_moved", "watched_moved"}
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

def planted():
    """Traits b and a (in 3 of 10 images), independent: s_0..2 tell a, s_3..5 tell b, s_6..7 nothing -> s, images."""
    a, b = torch.rand(200, generator=seeded(1)) < 0.3, torch.rand(200, generator=seeded(2)) < 0.5
    s = 0.4 + 0.025 * normal(200, 8).clamp(-2, 2)
    s[:, :3] += torch.where(a, 0.3, -0.3)[:, None]
    s[:, 3:6] += torch.where(b, 0.3, -0.3)[:, None]
    data = pt.Dataset(pt.to_uint8(pixels(s)), None, [], torch.stack([b, a], 1), ("b", "a"))
    return data.images.float().flatten(1)[:, :8] / 127.5 - 1, data                  # s as rounded

def reader(columns, images):
    """A judge that reads P of trait i from the brightness of a pixel."""
    return SimpleNamespace(features=lambda x: x.flatten(1), moments=pt.moments(images.flatten(1) / 127.5 - 1),
                           last=lambda z: ((z[:, columns] + 1) / 2).logit(1e-6))

@pytest.fixture(scope="module", autouse=True)
def quick():
    """Pictures are blank files: test_runs.py looks at whole ones. Data made here pass torchvision's checksums."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda fig, path, **k: Image.new("L", (2, 2)).save(path))
        for module in (torchvision.datasets.celeba, torchvision.datasets.mnist):
            patch.setattr(module, "check_integrity", lambda *a: True)
        yield

@pytest.fixture(scope="module")
def done(quick, tmp_path_factory):
    """A finished run, which tests only read."""
    folder = tmp_path_factory.mktemp("patronus") / "run"
    assert pt.main(words(out=folder)) == 0
    return folder

def test_activation_by_hand():
    d = torch.tensor([0.0, 1.0, 3.0, 1e6], dtype=torch.float64)
    assert close(pt.activation(d), [math.log(1e4), math.log(2 / 1.0001), math.log(4 / 3.0001), 1e-6], atol=1e-9)

def test_patch_distances_by_an_explicit_loop():
    z, p = normal(2, 3, 2, 4), normal(5, 3, seed=1)
    found = pt.patch_distances(z, p)
    assert found.shape == (2, 5, 2, 4)
    for b, j, y, x in itertools.product(range(2), range(5), range(2), range(4)):
        assert found[b, j, y, x].item() == pytest.approx((z[b, :, y, x] - p[j]).square().sum().item(), rel=1e-4)

def test_patch_distances_are_never_negative_and_float32_under_autocast():
    z = normal(4, 64, 3, 3) * 30
    p = z.permute(0, 2, 3, 1).reshape(-1, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found, half = pt.patch_distances(z, p), pt.patch_distances(z.bfloat16(), p)
    assert found.min() == 0 and found.dtype == half.dtype == torch.float32
    assert found.equal(pt.patch_distances(z, p)), "not computed in bfloat16"

def positive(net):
    """The network with weights above 0, so that every ReLU passes."""
    for p in net.parameters():
        p.data.abs_().add_(0.01)
    return net

@pytest.mark.parametrize("side, patch", [(16, 3), (16, 4), (16, 5), (16, 7), (16, 16), (32, 9), (32, 15), (32, 21),
                                         (128, 5), (128, 61)])
def test_every_patch_is_where_the_gradient_is_and_inside_the_image(side, patch):
    net, x = positive(pt.patch_encoder(1, side, 2, patch)), torch.rand(1, 1, side, side).requires_grad_()
    start, size, step = pt.receptive_field(net)
    z = net(x)[0, 0]
    assert (start, size) == (0, patch) and 0 <= side - (step * (len(z) - 1) + size) < step, "as many as fit"
    for i, j in {(0, 0), (len(z) // 2, len(z) // 3), (len(z) - 1, len(z) - 1)}:
        gradient, = torch.autograd.grad(z[i, j], x, retain_graph=True)
        y, left = step * i, step * j
        expected = torch.zeros(side, side, dtype=torch.bool)
        expected[y:y + size, left:left + size] = True
        assert expected.equal(gradient[0, 0] != 0)

@pytest.mark.parametrize("side, patch", [(16, 5), (16, 16), (32, 15), (64, 7), (128, 61)])
def test_prototypes_of_images_see_all_that_patches_see(side, patch):
    model = network(side, patch=patch, learns=True)
    x = torch.rand(1, 3, side, side, generator=seeded()).requires_grad_()
    positive(model.encoder), positive(model.whole)
    whole = model.whole(model.encoder(x))
    seen = torch.autograd.grad(whole.sum(), x)[0][0].ne(0)
    used = 1 - pt.receptive_field(model.encoder)[2]
    assert whole.shape[2:] == (1, 1) and seen[:, :used, :used].all(), "steps may leave out the last rows and columns"
    maps = model.maps(x)[0]
    assert maps.shape[0] == 8 and maps[4:].equal(maps[4:, :1, :1].expand_as(maps[4:])), "one value, at every patch"
    assert close(maps[4:, 0, 0], pt.activation(pt.patch_distances(whole, model.prototypes[4:]))[0, :, 0, 0], 1e-4)
    assert close(maps[:4], pt.activation(pt.patch_distances(model.encoder(x), model.prototypes[:4]))[0], 1e-4)

def test_receptive_field_of_padded_layers_by_hand():
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 3, 2, padding=1), torch.nn.Conv2d(1, 1, 5, 3, padding=2))
    assert pt.receptive_field(net) == (-1 - 2 * 2, 3 + 4 * 2, 6)

def test_the_papers_kernels_follow_from_its_patches():
    for side, patch, kernels, step in ((32, 15, [3] * 4, 2), (224, 61, [5] * 5, 4), (16, 5, [5, 1, 1, 1], 2),
                                       (32, 10, [10, 1, 1, 1], 2), (128, 15, [15, 1, 1, 1, 1], 4)):
        net = pt.patch_encoder(3, side, 9, patch)
        assert [conv.kernel_size[0] for conv in net[::2]] == kernels and pt.receptive_field(net) == (0, patch, step)
        assert all(conv.padding == (0, 0) and abs(conv.weight.std() - 0.1) < 0.02 for conv in net[::2])

def test_best_patches_are_the_corners_of_planted_patches_framed_just_outside():
    run, images, chosen = run_of(network(32, patch=15)), noise_images(10, 3, 32, 32) // 2, [3] * 8 + [2, 6]
    z = run.model.encoder(images[[1, 8]].float() / 127.5 - 1)
    run.model.prototypes[3], run.model.prototypes[2] = z[0, :, 4, 7], z[1, :, 0, 8]
    s = pt.activations(run, images)
    assert s[1, 3] > 9 and s[8, 2] > 9 and s[:, :4].median() < 3, "of the closest patch"
    assert pt.best_patches(run, images, chosen)[[1, 8]].tolist() == [[2 * 4, 2 * 7], [0, 16]]
    framed = pt.framed(run, images, chosen)
    y, x = (framed[1, 0] == 255).nonzero().T
    assert (y.min(), y.max(), x.min(), x.max()) == (7, 23, 13, 29), "around 15 pixels from (8, 14) on"
    assert (framed[9, 0] == 255).sum() == 4 * 31, "of an image the border"

def test_heat_lies_in_the_middle_of_patches_and_covers_the_image():
    run, maps = run_of(network(patch=5)), torch.zeros(2, 6, 6)
    maps[0, 0, 0], maps[1, 2, 5] = 1, 1
    heat = pt.heat_maps(run, torch.zeros(2, 3, 16, 16), maps)
    assert heat.shape == (2, 3, 16, 16) and set(heat.unique().tolist()) == {0, 255}
    corner, side = (part[0].nonzero() for part in heat)
    assert corner.amax(0).tolist() == [2, 2] and corner.amin(0).tolist() == [0, 0] and len(corner) == 9
    assert side.amin(0).tolist() == [5, 11] and side.amax(0).tolist() == [6, 15], "step 2, and on to the border"

def test_penalties_and_weights_of_levels_by_hand():
    angle = math.acos(0.9)                                    # to the nearest; neither length nor sign counts
    p = torch.tensor([[2, 0, 0], [-3 * math.cos(angle), 3 * math.sin(angle), 0], [0, 0, 5.0]])
    assert close(pt.distinctness_loss(p), 0.1 * 2 / 3), "1 - |cos| = 0.1, twice"
    s, r = torch.tensor([[1.0, 2, 0, 7], [2, 4, 1, 7], [3, 6, 0, 7], [4, 8, 1, 7]]), 1 / math.sqrt(5)
    assert close(pt.correlation(s), [[1, 1, r, 0], [1, 1, r, 0], [r, r, 1, 0], [0, 0, 0, 0]])
    assert close(pt.decorrelation_loss(s), 2 * (1 + 0.2 + 0.2) / 12)
    abar = torch.tensor([1.0, 0.25, 0.01, 1e-5])
    assert close(pt.level_weights(abar, 0.5), torch.tensor([1.0, 2, 10, 50]) / 15.75)

def test_the_loss_is_told_s_of_the_clean_image_and_weighs_levels_and_penalties_and_no_label():
    model, data, abar = network(), batch(), pt.alpha_bars(1000)
    cfg = settings(distinctness=3.0, decorrelation=0.5, emphasis=0.5, sketch=2.0)
    s, found = model.encode(data.x0), model(data, abar, cfg)
    eps = model.denoise(pt.add_noise(data.x0, data.t, data.eps, abar), data.t, s)
    errors, weights = (eps - data.eps).square().mean((1, 2, 3)), (1 / abar.sqrt()).clamp(max=50)
    penalties = 3 * pt.distinctness_loss(model.prototypes) + 0.5 * pt.decorrelation_loss(s)
    penalties += 2 * (model.draw(s) - data.x0).square().mean()
    assert list(found)[0] == "loss" and close(found["diffusion"], errors.mean(), 1e-5) and penalties > 0.01
    assert close(found["loss"], (errors * weights[data.t]).mean() / weights.mean() + penalties, 1e-4)
    assert same(found, model(data._replace(target=data.target + 1), abar, cfg))

def test_the_noise_loss_trains_all_parts_jointly_but_the_latent_model():
    model, plain = network(learns=True), torch.full((8, 3, 16, 16), -1.0)
    for data in (batch(), batch(1), batch(8)._replace(x0=plain)):                 # s may not vary
        model(data, pt.alpha_bars(1000), settings())["loss"].backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    reached = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    expected = dict(encoder=0, whole=0, prototypes=0, mlp=1, sketch=1, unet=1)                     # clipped apart
    groups = {id(p): i for i, group in enumerate(model.param_groups()) for p in group["params"]}
    assert all(groups.get(id(p)) == expected.get(name.split(".")[0]) for name, p in model.named_parameters())
    assert reached == set(expected)

def test_the_denoiser_reads_the_sketch_beside_xt_and_the_papers_has_none():
    for side in (16, 32):
        model, seen = network(side), []
        model.unet.down[0][0].register_forward_pre_hook(lambda module, given: seen.append(given[0]))
        s, xt = 5 * torch.rand(2, 8, generator=seeded()), normal(2, 3, side, side)
        model.denoise(xt, torch.tensor([3, 900]), s)
        assert seen[0].shape == (2, 6, side, side) and seen[0][:, :3].equal(xt)
        assert close(seen[0][:, 3:], model.draw(s), 1e-5)
        assert not model.draw(s)[0].allclose(model.draw(s)[1])
    paper, changed = network(sketch=0.0), network()
    assert paper.sketch is None and paper.unet.down[0][0].in_channels == 3
    assert "sketch" not in paper(batch(), pt.alpha_bars(1000), settings(sketch=0.0))
    changed.sketch[4].bias += 1
    assert close(changed.draw(s), network().draw(s) + 1, atol=1e-5)
    found = [net(batch(), pt.alpha_bars(1000), settings(hide=0.0))["sketch"] for net in (network(), changed)]
    assert found[0] != found[1]

def test_activations_are_standardised_and_hidden_one_by_one_in_training_alone():
    model, seen, drawn, data = network(), [], [], batch(64)
    model.mean[:], model.std[:] = torch.arange(8), 2
    model.mlp.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    model.sketch.register_forward_pre_hook(lambda module, given: drawn.append(given[0]))
    s = model.encode(data.x0)
    model.train()(data, pt.alpha_bars(1000), settings(hide=0.25))
    model.denoise(data.x0, data.t, s)
    told, hidden = (s - torch.arange(8)) / 2, seen[0] == 0
    assert close(seen[1], told, 1e-5) and close(drawn[2], told, 1e-5), "in sampling nothing is hidden"
    assert drawn[0].equal(seen[0]) and drawn[1].equal(seen[0]), "told, and drawn for the loss: the same are hidden"
    assert 0.15 < hidden.float().mean() < 0.35 and 0 < hidden[0].sum() < 8
    assert close(seen[0], torch.where(hidden, 0, told / 0.75), atol=1e-5)

def test_prototypes_start_at_patches_of_real_images_where_activations_tell_them_apart():
    data = dataclasses.replace(pt.load_dataset("shapes", "train", 16), labels=None, attributes=None)
    model, again, other, uniform = models = [network() for _ in range(4)]
    for start, changes in zip(models, ({}, {}, dict(seed=1), dict(start="uniform"))):
        known = start.begin(settings(**changes), [data, data], None, CPU)
        assert known["targets"].shape == (200,) and not known["targets"].any()
    assert same(model.state_dict(), again.state_dict()) and not model.prototypes.equal(other.prototypes)
    assert same(uniform.state_dict(), network().state_dict()) and uniform.prototypes.std() > 0.2, "U(0, 1)"
    seen = data.images[pt.random_index(200, 200, 0, "start")]
    z = model.encoder(seen.float() / 127.5 - 1)
    for layers, x, prototypes in ((model.encoder, seen.float() / 127.5 - 1, model.prototypes[:4]),
                                  (model.whole, z, model.prototypes[4:])):
        for i in range(1, len(layers) - 2, 2):
            std, mean = torch.std_mean(layers[:i](x), (0, 2, 3))
            assert close(mean, 0 * mean, atol=1e-3) and close(std, 0 * std + 1, 1e-3), "every channel of every layer"
        std, mean = torch.std_mean(layers[:-1](x), (0, 2, 3))
        assert close(std, std[:1].expand_as(std), 1e-3) and close(mean, 0 * mean, atol=1e-3), "before the last ReLU"
        assert layers(x).transpose(0, 1).flatten(1).var(1).sum().item() == pytest.approx(1, rel=1e-3)
        assert (pt.patch_distances(layers(x), prototypes).amin((0, 2, 3)) < 1e-4).all(), "real patches, real images"
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
    assert close(found.mean(0), s.mean(0), atol=0.08) and found[:, 2].std() < 0.01
    assert close(found.std(0)[:2], s.std(0)[:2], rtol=0.2), found.std(0)
    assert torch.corrcoef(found[:, :2].T)[0, 1].item() == pytest.approx(0.8, abs=0.1)
    run.model.latent.std.fill_(20)
    wide, other = (pt.draw_activations(dataclasses.replace(cfg, seed=seed), run, 200) for seed in (0, 1))
    assert wide.min() == 0 and wide.max().item() == pytest.approx(-math.log(1e-4)) and not wide.equal(other)

def test_the_latent_model_is_trained_once_for_each_step_and_the_same_after_a_kill(done, tmp_path, monkeypatch, capsys):
    cfg = pt.load_run(done, "cpu").config
    sets = pt.load_traits(cfg)
    pt.new_run(cfg, sets, tmp_path, CPU)
    pt.train(cfg, sets, tmp_path, CPU)
    refused(pt, capsys, flags(sample=tmp_path, out=tmp_path / "s"), "--resume")
    with monkeypatch.context() as patch:
        patch.setattr(pt, "train_latent", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pt.finish_run(cfg, sets, tmp_path)
        pt.finish_run(cfg, sets, done)                        # it has one
    pt.finish_run(cfg, sets, tmp_path)
    assert same(checkpoint(tmp_path)["average"], checkpoint(done)["average"])
    pt.train(dataclasses.replace(cfg, steps=7), sets, tmp_path, CPU)
    run = pt.finish_run(cfg, sets, tmp_path)                  # more steps, another latent model
    assert close(run.model.latent.mean, pt.activations(run, sets[0].images).mean(0), 1e-4)

def test_inversion_at_one_step_and_the_order_of_levels():
    abar, x, called = pt.alpha_bars(100), normal(2, 1, 2, 2), []

    def predict(x, t):
        called.append(t.tolist())
        return 0.5 * x + 1
    a, found = abar[-1], pt.invert(predict, x, abar, 4)
    assert close(pt.invert(predict, x, abar, 1), a.sqrt() * x + (1 - a).sqrt() * (0.5 * x + 1))
    assert called.pop() == [99, 99]
    assert [t[0] for t in called] == [24, 24, 49, 74], "the lowest for the clean image, then each current level"
    for a, b in itertools.pairwise([torch.ones(()), *abar[[24, 49, 74, 99]]]):
        eps = 0.5 * x + 1
        x = b.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b).sqrt() * eps
    assert close(found, x, atol=1e-5)

def test_an_image_comes_back_from_its_s_and_inverted_noise():
    images, run, errors = noise_images(3, 1, 4, 4) // 2 + 60, run_of(Painter(4, sd=0.6)), []
    for steps in (50, 100):
        cfg = settings(invert_steps=steps, sample_batch=2, sample_steps=50, sampler="ddpm")
        errors.append((pt.reconstruct(cfg, run, images) - images.float()).abs().max() / 127.5)
    assert errors[1] < 0.1 and 1.5 < errors[0] / errors[1] < 2.5, "first order"

def test_from_a_level_inversion_and_the_way_back_take_a_share_of_the_steps_and_end_at_the_image():
    asked, images = [], noise_images(3, 1, 4, 4) // 2 + 60
    model = Painter(4, sd=0.6)

    def denoise(x, t, s):
        asked.append(t[0].item())
        return model.denoise(x, t, s)
    run = run_of(SimpleNamespace(encode=model.encode, denoise=denoise))
    cfg = settings(invert_steps=100)
    s, noisy = pt.invert_images(cfg, run, images, 300)
    assert len(asked) == 30 and max(asked) < 299 and pt.levels_below(cfg, 300)[0].equal(pt.alpha_bars(1000)[:300])
    back = pt.render(cfg, run, s, noisy, level=300)
    assert len(asked) == 60 and max(asked) == 299 and (back - images.float()).abs().max() < 13
    _, xT = pt.invert_images(cfg, run, images)
    assert noisy.std() < xT.std() and pt.levels_below(cfg)[1] == 100

def test_rendering_follows_from_the_seed_batch_by_batch_or_from_inverted_noise_by_plain_ddim(monkeypatch):
    run, s = run_of(SimpleNamespace(denoise=lambda x, t, s: 0.9 * x + s[:, :, None, None])), torch.zeros(6, 1)
    cfg, xT, asked = settings(sample_batch=3, sample_steps=4, invert_steps=5, sampler="ddpm"), normal(6, 1, 4, 4), []
    one, two, other = (pt.render(dataclasses.replace(cfg, seed=seed), run, s) for seed in (0, 0, 1))
    assert one.equal(two) and not one.equal(other) and one.shape == (6, 1, 4, 4) and one.dtype == torch.uint8
    assert not any(a.equal(b) for a, b in itertools.combinations(one, 2)), "every image its own noise"
    monkeypatch.setattr(pt, "sample", lambda predict, x, abar, *how, **more: asked.append(how + (more,)) or x)
    assert pt.render(cfg, run, s, xT).equal(pt.to_uint8(xT)) and asked == [(5, "ddim", dict(clip=False))] * 2

def test_spherical_interpolation_by_hand():
    share, third = torch.linspace(0, 1, 7), math.pi / 3
    a, b = torch.tensor([[3.0, 0, 0], [3 * math.cos(third), 0, 3 * math.sin(third)]]).view(2, 3, 1, 1)
    expected = torch.stack([3 * (share * third).cos(), 0 * share, 3 * (share * third).sin()], 1)
    assert close(pt.spherical(a, b, share), expected[:, :, None, None], atol=1e-5)

def test_spherical_interpolation_between_parallel_noise_is_linear():
    a = normal(1, 4, 4)
    assert close(pt.spherical(a, a, torch.linspace(0, 1, 5)), a.expand(5, 1, 4, 4), atol=1e-3)
    assert close(pt.spherical(a, 1.5 * a, torch.tensor([0.25]))[0], 1.125 * a, atol=1e-3)

def test_interpolation_is_linear_in_s_and_spherical_in_the_noise():
    run, cfg, pair, share = run_of(Painter(4)), settings(invert_steps=1), noise_images(2, 1, 4, 4), torch.arange(5) / 4
    pt.interpolate(cfg, run, pair, n=5)
    s, xT = pt.invert_images(cfg, run, pair)
    assert close(run.model.told[1], s[0] + share[:, None] * (s[1] - s[0]), atol=1e-5)
    assert close(run.model.noise[1], pt.spherical(*xT, share), atol=1e-5)

def test_company_is_the_regression_on_the_chosen_and_follows_within_the_range():
    s = normal(50, 4).abs()
    s[:, 1], s[:, 3] = 2 * s[:, 0] + 0.1, 1
    assert close(pt.company(s, [3]), torch.zeros(1, 4)), "what never varies moves nothing"
    s[:, 3] = s[:, 0] - 3 * s[:, 2]
    assert close(pt.company(s, [0, 2]), [[1, 2, 0, 1], [0, 0, 1, -3]], atol=1e-4)
    assert close(torch.tensor([1.0, 2]) @ pt.company(s, [0, 1])[:, :2], [1, 2], atol=1e-4), "two that say the same"
    s, two, x = torch.tensor([[1.0, 2, 3], [2, 0, 9]]), torch.tensor([[2.0], [1.0]]), torch.linspace(0, 1, 9)
    follow = pt.set_activations(s, [0], two, torch.stack([x, 0.5 * x, 7 - 4 * x], 1))
    assert close(follow, [[2, 2.5, 0], [1, 0, -math.log(1e-4)]], atol=1e-4) and s[0, 0] == 1
    assert close(pt.set_activations(s, [0, 1], torch.tensor([[2.0, 4]])), [[2, 4, 3], [2, 4, 9]])

S_ALL = torch.tensor([[0.5, 0.7, 0], [0.9, 0.6, 0], [0.6, 0.2, 0], [0.4, 0.55, 0]])         # the last never varies

def test_a_prototype_is_raised_alone_or_with_its_company_from_the_images_own_noise():
    images, cfg, (alone, along, moved) = noise_images(2, 1, 4, 4), settings(invert_steps=1), (Painter(3) for _ in "abc")
    pt.raise_prototypes(cfg, run_of(alone), images, [1, 0], S_ALL, follow=False)
    edited, again = pt.raise_prototypes(cfg, run_of(along), images, [1, 0], S_ALL)
    pt.move(cfg, run_of(moved), images[:1], 2, torch.tensor([0.0, 7]))
    s, xT = pt.invert_images(cfg, run_of(Painter(3)), images)
    told, slope = along.told[1], np.polyfit(S_ALL[:, 0], S_ALL[:, 1], 1)[0]
    assert close(alone.told[1], [*s.tolist(), *([x, 0.7, z] for x, _, z in s), *([0.9, y, z] for _, y, z in s)])
    assert alone.noise[1].equal(xT.repeat(3, 1, 1, 1)) and alone.noise[1].equal(along.noise[1])
    assert told[:2].equal(s) and close(told[4:, 1], (s[:, 1] + slope * (0.9 - s[:, 0])).clamp(min=0), atol=1e-5)
    assert edited.shape == (3, 2, 1, 4, 4) and close(again.flatten(0, 1), told.clamp(-1, 1), atol=0.01)
    assert close(moved.told[1], [[*s[0, :2], 0], [*s[0, :2], 7]]) and moved.noise[1].equal(xT[[0, 0]])

@pytest.mark.parametrize("factor, share", [(1, 1), (-1, 0), (0, 0), (torch.tensor([1.0, 0, 0]), 0.5)])
def test_raised_share_counts_the_pairs_that_respond(factor, share):
    run = run_of(Painter(3, lambda s, t: pixels(s * factor)))
    images = pt.to_uint8(pixels(torch.tensor([[-0.5, 0.3], [0.2, -0.1], [0.0, 0.1]])))
    for follow in (False, True):
        assert pt.raised_share(settings(pairs=5), run, S_ALL, images, follow) == share

def test_emergence_reads_the_image_predicted_at_every_step_of_ddim():
    s, run = normal(3, 2) / 3, run_of(Painter(2, lambda s, t: pixels(s * (1 - t / 1000)[:, None])))
    times, images = pt.emergence(settings(sampler="ddpm", sample_batch=2), run, s, steps=10)
    assert times == pt.sample_times(1000, 10)
    assert images.equal(torch.stack([pt.to_uint8(pixels(s * (1 - t / 1000))) for t in times]))
    run = run_of(Painter(2, sd=0.6))
    one, two = (pt.emergence(settings(sampler=name), run, s, steps=10)[1] for name in ("ddim", "ddpm"))
    assert one.equal(two), "whatever the sampler"

def test_emerged_at_by_hand():
    for course, at in (([0, 0.5, 0.95, 0.91, 1], 2), ([0, 0.95, 0.5, 0.92, 1], 3), ([1, 1.2, 0.95, 1.1, 1], 0),
                       ([0, 0.9, 1.8, 1.8, 2], 2)):           # where 90 % of the end are reached for good
        assert pt.emerged_at(torch.tensor([course]).T).tolist() == [at]

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

def test_movers_are_the_best_for_a_without_the_best_for_b(monkeypatch):
    table = torch.tensor([[0.9, 0.99], [0.05, 0.5], [0.8, 0.5], [0.85, 0.2], [0.7, 0.1], [0.3, 0.5], [0.6, 0.4]])
    known = torch.rand(9, 4, generator=seeded()) < 0.5
    monkeypatch.setattr(pt, "single_aurocs", lambda s, given: table if given.equal(known[:, [3, 1]]) else None)
    assert pt.choose_movers(None, known, 3, 1) == [1, 2, 5], "0, 3 and 4 tell b, either way round; 1 and 5 tell not a"
    table[1, 0] = math.nan
    assert pt.choose_movers(None, known, 3, 1) == [2, 5, 6], "an activation without AUROC tells nothing"

@pytest.mark.parametrize("leak", [0, 1, -0.5])
def test_a_planted_leak_is_found_with_movers_at_the_opposite_and_their_company(leak):
    def picture(s, t):                                        # pixel 0 shows a; pixel 1 b, and as much as `leak` of a
        a, b = (part.mean(1) - 0.4 for part in (s[:, :3], s[:, 3:6]))
        return pixels(torch.stack([a, b / 2 + leak * a], 1))
    (s, data), model = planted(), Painter(8, picture)
    found, seen = pt.diagnose(settings(sampler="ddim", attribute="a", watch="b"), run_of(model),
                              reader([1, 0], data.images), data, most=150)
    assert sorted(seen.movers) == [0, 1, 2] and set(found) == LEAK
    assert leak - 0.1 < found["leak_low"] < found["leak_high"] < leak + 0.1
    assert (found["leak"], found["attribute_moved"]) == pytest.approx((leak, 0.3), abs=0.02), "P by half of 0.6"
    before, _, after, _ = model.told                          # two steps each
    assert model.noise[0].equal(model.noise[2]) and before.shape == (150, 8), "the same random noise"
    a, centred = data.attributes[:, 1], (s - s.mean(0)).numpy()
    has = a[[(s == row).all(1).nonzero()[0, 0].item() for row in before]]
    opposite = torch.where(has[:, None], s[~a].mean(0), s[a].mean(0))[:, :3]
    slopes = torch.from_numpy(np.linalg.lstsq(centred[:, :3], centred[:, 3:], rcond=None)[0])       # [3, 5]
    follow = before[:, 3:] + (opposite - before[:, :3]) @ slopes
    assert close(after[:, :3], opposite, atol=1e-5) and close(after[:, 3:], follow.clamp(min=0), atol=1e-3)

def test_auroc_by_hand():
    yes = torch.tensor([False, False, True, True])
    for score, expected in (([1, 2, 3, 4], 1), ([4, 3, 2, 1], 0), ([1, 3, 2, 4], 0.75), ([1, 2, 2, 3], 0.875)):
        assert pt.auroc(torch.tensor(score), yes) == pytest.approx(expected), "a tie is half"
    assert all(math.isnan(pt.auroc(torch.arange(3.0), torch.full((3,), only))) for only in (True, False))

def test_auroc_by_counting_pairs():
    score = torch.randint(12, (60,), generator=seeded()).float()
    yes = torch.rand(60, generator=seeded(1)) < 0.4
    a = np.mean([(a > b).item() + (a == b).item() / 2 for a in score[yes] for b in score[~yes]])
    both = pt.single_aurocs(torch.stack([score, -score, score ** 2], 1), torch.stack([yes, ~yes], 1))
    assert pt.auroc(score, yes) == pytest.approx(a) and close(both, [[a, 1 - a], [1 - a, a], [a, 1 - a]])

def test_logistic_aurocs_tell_what_is_told_and_are_of_images_held_out():
    s, known = 5 + 0.01 * normal(120, 150), torch.rand(120, 3, generator=seeded(1)) < 0.5
    found = pt.logistic_aurocs(s, known)                      # noise, of which there is enough to fit the rest
    assert found.shape == (3,) and (found < 0.65).all() and (found > 0.35).all()
    two = torch.stack([s[:, 0], s[:, 0] + 0.05 * known[:, 2], torch.ones(120)], 1)
    assert pt.logistic_aurocs(two, known)[2] > 0.9, "the difference of two"

def test_mutual_information_and_disentanglement_by_hand():
    a, b, flat = torch.arange(8) < 4, torch.arange(8) % 4 < 2, torch.zeros(8)
    known, c = torch.stack([a, b], 1), torch.tensor([1, 1, 1, 0, 0, 0, 0, 1]).bool()
    assert pt.mutual_information(a, b) == pytest.approx(0, abs=1e-12)
    assert pt.mutual_information(a, a) == pt.mutual_information(a, ~a) == pytest.approx(math.log(2))
    assert pt.mutual_information(a, c) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert pt.disentanglement(torch.stack([a.float(), -b.float(), flat], 1), known) == (1.0, 2), "inverted counts too"
    assert pt.disentanglement(torch.stack([a.float(), 1 - a.float(), flat], 1), known) == (0.0, 1), "two tell the same"
    for ones, expected in ((2, (0.25, 1)), (1, (0, 0))):      # AUROC of a: 0.75, which is enough, and 0.625
        assert pt.disentanglement(torch.stack([torch.arange(8) < ones, flat], 1), known[:, :1]) == expected
    for agree, expected in ((15, (0.5, 2)), (16, (0, 0)), (4, (0, 0))):             # of 20: 0.19 of the entropy, 0.28
        both = torch.stack([torch.arange(40) < 20, (torch.arange(40) < 20) ^ (torch.arange(40) % 20 >= agree)], 1)
        assert pt.disentanglement(both.float(), both) == pytest.approx(expected), "traits that tell each other"

def test_prototypes_are_live_dead_or_duplicates_of_live_ones():
    x = torch.linalg.qr(torch.cat([torch.ones(100, 1), normal(100, 4)], 1))[0][:, 1:]               # of mean 0
    turned = {angle: math.cos(angle) * x[:, 0] + math.sin(angle) * x[:, 1] for angle in (0, 0.28, 0.56, 0.75)}
    columns = [turned[0], turned[0.28], turned[0.56], -turned[0], 0.1 * turned[0.75], 0 * x[:, 0], 0.04 * x[:, 2],
               0.06 * x[:, 3]]                                # cosines 0.96, 0.85; a twentieth of the liveliest: 0.05
    live, dead = pt.prototype_state(5 + torch.stack(columns, 1))
    assert live.nonzero().flatten().tolist() == [0, 2, 7], "a duplicate of a duplicate alone lives"
    assert dead.nonzero().flatten().tolist() == [5, 6]

def test_prototypes_are_shown_that_tell_different_things():
    x = torch.linalg.qr(torch.cat([torch.ones(100, 1), normal(100, 3)], 1))[0][:, 1:]
    columns = [x[:, 0], 3 * x[:, 0] + 1.5 * x[:, 1], 2 * x[:, 0] + 2 * x[:, 1], 0 * x[:, 0], x[:, 2], x[:, 1] + x[:, 2]]
    s = 5 + torch.stack(columns, 1)
    assert pt.diverse(s, 3) == [1, 4, 5], "varies most; correlation 0 with it; then 0.32 and 0.71"
    assert pt.diverse(s, 9) == [1, 4, 5, 0, 2], "0.89 before 0.95; live ones alone, each once"

def test_fashion_mnist_is_one_channel_padded_to_32(tmp_path):
    folder, images = tmp_path / "FashionMNIST" / "raw", noise_images(8, 28, 28)
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 2051, 8, 28, 28) + bytes(images.view(-1)))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 2049, 8) + bytes([9, 0, 3, 4] * 2))
    train, _ = pt.load_traits(settings(dataset="fashion-mnist", data_dir=tmp_path, image_size=32, watch="Coat"))
    assert pt.traits(train)[0].int().argmax(1).tolist() == [9, 0, 3, 4] * 2
    assert train.images.equal(F.pad(images, (2, 2, 2, 2))[:, None])

def test_celeba_has_forty_attributes_and_no_classes(tmp_path, capsys):
    refused(pt, capsys, words(dataset="celeba", data_dir=tmp_path, out=tmp_path / "run"), tmp_path, "img_align_celeba")
    folder, names, titles = tmp_path / "celeba", [f"{i + 1:06}.jpg" for i in range(14)], [f"T{i}" for i in range(40)]
    known, parts = torch.rand(14, 40, generator=seeded()) < 0.5, [0, 0, 0, 0, 1, *[2] * 9]          # 1 is validation
    (folder / "img_align_celeba").mkdir(parents=True)
    for i, name in enumerate(names):
        Image.new("RGB", (178, 218), (15 * i, 200, 30)).save(folder / "img_align_celeba" / name)
    signs = [" ".join(" 1" if x else "-1" for x in row) for row in known]
    for file, head, values in (
            ("list_attr_celeba", f"14\n{' '.join(titles)} \n", signs), ("list_eval_partition", "", parts),
            ("identity_CelebA", "", parts), ("list_bbox_celeba", "14\n1\n", parts),
            ("list_landmarks_align_celeba", "14\n1\n", parts)):
        (folder / f"{file}.txt").write_text(head + "".join(f"{name} {x}\n" for name, x in zip(names, values)))
    sets = pt.load_traits(settings(dataset="celeba", data_dir=tmp_path, attribute="T3", watch="T8"))
    for data, of in zip(sets, (slice(0, 4), slice(5, 14))):
        assert data.attributes.equal(known[of]) and data.attribute_names == titles and data.labels is None
        assert close(data.images[:, 0].float().mean((1, 2)), 15 * torch.arange(14.0)[of], atol=4)

def test_traits_are_attributes_else_classes_and_the_first_and_last_are_diagnosed():
    data = pt.Dataset(torch.zeros(3, 1, 4, 4), torch.tensor([2, 0, 1]), ["x", "y", "z"])
    assert same(pt.traits(data), (torch.eye(3)[[2, 0, 1]].bool(), list("xyz")))
    assert [pt.watched_traits(settings(attribute=a), data) for a in ("", "y")] == [[0, 2], [1, 2]]
    marked = dataclasses.replace(data, attributes=torch.ones(3, 2).bool(), attribute_names=("p", "q"))
    assert pt.traits(marked)[1] == ["p", "q"] and pt.traits(dataclasses.replace(data, classes=["x"]))[1] == []
    assert pt.judged(marked)[0].int().tolist() == [[1, 1, 0, 0, 1], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0]]
    assert pt.judged(dataclasses.replace(marked, labels=None, classes=[]))[0].shape == (3, 2)

def test_a_trait_is_kept_if_p_is_on_its_side_and_a_class_if_it_is_the_likeliest():
    P = torch.tensor([[0.9, 0.4, 0.1, 0.3], [0.2, 0.6, 0.7, 0.8], [0.9, 0.1, 0.2, 0.1], [0.1, 0.9, 0.2, 0.8]])
    known = torch.tensor([[1, 0, 0, 1], [1, 0, 1, 0], [1, 0, 1, 0], [0, 1, 0, 0]]).bool()       # one trait, 3 classes
    judge = SimpleNamespace(features=lambda x: x.flatten(1), moments=pt.moments(normal(4, 4)), last=lambda z: P.logit())
    found = pt.kept_traits(judge, noise_images(4, 1, 2, 2), known, ["t"], CPU)
    assert found["kept_t"] == 0.75 and found["kept_class"] == 0.5 and len(found) == 3, "right: the third and fourth"
    assert "kept_class" not in pt.kept_traits(judge, noise_images(4, 1, 2, 2), known, list("tabc"), CPU)

def test_a_planted_correlation_is_in_the_training_images_alone_and_not_in_the_judges(tmp_path, monkeypatch):
    seen, cfg, plain = [], settings(bias=0.95, data_dir=tmp_path), pt.load_traits(settings())
    monkeypatch.setattr(pt, "fit", lambda net, images, targets, *a: seen.append((images, targets)) or net.eval())
    (biased, test), own = pt.load_traits(cfg), pt.load_dataset("shapes", "judge", 16)
    warm, dot = biased.attributes[:, [0, 4]].T
    assert 0.9 < (warm == dot).float().mean() < 1 and len(warm) == 200 and test.images.equal(plain[1].images)
    _, judge = (pt.load_trait_judge(cfg, biased, CPU) for _ in range(2))
    assert len(seen) == 1 and seen[0][0].equal(own.images) and seen[0][1][:, :5].equal(own.attributes.float())
    assert seen[0][1][:, 5:].equal(F.one_hot(own.labels, 10).float()), "and the class"
    (P, distance), (_, other) = (pt.judge_traits(judge, data.images, CPU) for data in (own, biased))
    assert P.shape == (200, 15) and 0 < P.min() and P.max() < 1 and abs(distance) < 1e-6 < other
    pt.load_trait_judge(dataclasses.replace(cfg, dataset="folder"), biased, CPU)
    assert seen[1][0] is biased.images, "else it learns from the training images"

def test_a_run_leaves_its_pictures_samples_and_every_figure(done):
    assert set(contents(done)) == BASIC | EXPLAINED | MEASURED
    found, run, data = metrics(done), pt.load_run(done, "cpu"), pt.load_dataset("shapes", "test", 16)
    assert set(found) >= LEAK | set("auroc tad tad_traits correlation reconstruction_error raised raised_alone frechet "
                                    "kept_dot real_kept_dot real_frechet unconditional_frechet seconds_latent".split())
    s = pt.activations(run, data.images)
    assert found["auroc_dot"] == pytest.approx(pt.logistic_aurocs(s, data.attributes)[4].item(), abs=1e-3)
    judge, known = pt.load_trait_judge(run.config, pt.load_dataset("shapes", "train", 16), CPU), pt.judged(data)[0]
    index = pt.shuffled(60, 20, 0, "held-out images")
    real = pt.kept_traits(judge, data.images[index], known[index], data.attribute_names, CPU)
    assert found["real_frechet"] == pytest.approx(real["frechet"]), "of as many images as samples"
    assert found["duplicates"] == 8 - found["live"] - found["dead"] and found["live"] == pt.prototype_state(s)[0].sum()
    with np.load(done / "samples.npz") as saved:
        assert close(saved["s"], pt.draw_activations(run.config, run, 20), 1e-4)
        images = pt.render(run.config, run, torch.from_numpy(saved["s"])).permute(0, 2, 3, 1)
        assert close(saved["arr_0"], images, atol=1)

def test_explaining_shows_what_it_says(done, tmp_path, monkeypatch):
    kept, run, images = {}, pt.load_run(done, "cpu"), pt.load_dataset("shapes", "test", 16).images
    for name in ("draw_grid", "draw_when"):
        monkeypatch.setattr(pt, name, lambda path, *given, **k: kept.update({path.stem: given}))
    assert pt.main(flags(explain=done, out=tmp_path / "e")) == 0 and len(kept) == len(EXPLAINED) - 1
    s = pt.activations(run, images)
    chosen = [int(name.removeprefix("no. ")) for name in kept["prototypes"][1]]
    assert chosen == pt.diverse(s, 8) and len(kept["variations"][0]) == 80
    sketch = pt.to_uint8(run.model.draw(run.model.encode(kept["variations"][0][:8].float() / 127.5 - 1)))
    assert kept["variations"][1][:2] == ["real", "sketch"] and close(kept["variations"][0][8:16], sketch, atol=1)
    raised, again = pt.raise_prototypes(run.config, run, kept["variations"][0][:8], chosen, s)
    for i, (row, j) in enumerate(zip(kept["prototypes"][0].split(8), chosen), 1):
        most = max(range(8), key=lambda n: (again[i, n, j] - again[0, n, j]).item())
        assert row[:2].equal(pt.framed(run, raised[[0, i], most], [j] * 2)), "before and raised"
        assert row[2:].equal(pt.framed(run, images[s[:, j].topk(6).indices], [j] * 6)), "real patches"
    local = [f"no. {j}" for j in chosen if j < run.model.local]
    assert kept["where"][1] == ["real", *local] and len(kept["where"][0]) == 8 + 8 * len(local) > 8, "whole images have no place"
    assert all(rows.min() == 0 and rows.max() > 253 for rows in kept["where"][0][8:].split(8)), "from its least to its largest"
    assert list(kept["when"][-1]) == list(pt.SHAPE_ATTRIBUTES)

def test_evaluating_and_diagnosing_again(done, tmp_path):
    assert pt.main(flags(evaluate=done, out=tmp_path / "m")) == 0
    assert set(contents(tmp_path / "m")) == MEASURED and set(metrics(tmp_path / "m")) == set(metrics(done))
    assert pt.main(flags(diagnose=done, attribute="large", watch="warm hue", out=tmp_path / "d")) == 0
    assert set(contents(tmp_path / "d")) == {"metrics.json", "curves.png", "diagnosis.png"}
    assert metrics(tmp_path / "d")["settings"]["attribute"] == "large" and LEAK < set(metrics(tmp_path / "d"))

def test_editing_sets_activations_of_an_image(done, tmp_path, capsys):
    image, run, out = pt.load_dataset("shapes", "test", 16).images[3:4], pt.load_run(done, "cpu"), tmp_path / "e"
    torchvision.utils.save_image(image / 255, tmp_path / "image.png")
    edit = flags(model=done, edit=tmp_path / "image.png", out=out)
    assert pt.main([*edit, "--set=2=3.5, 0=0"]) == 0 and set(contents(out)) == {"edit.png", "edited.png"}
    s, xT = pt.invert_images(run.config, run, image)
    assert f"s_2: {s[0, 2]:.2f}, set to 3.50" in capsys.readouterr().out
    s[0, 2], s[0, 0] = 3.5, 0
    assert close(pt.decode(out / "edited.png", 16), pt.render(run.config, run, s, xT)[0], atol=1)
    assert pt.main([*edit[:-1], str(tmp_path / "middle"), "--set=2=3.5,0=0", "--from=400"]) == 0
    s, xT = pt.invert_images(run.config, run, image, 400)
    s[0, 2], s[0, 0] = 3.5, 0
    expected = pt.render(run.config, run, s, xT, level=400)[0]
    assert close(pt.decode(tmp_path / "middle" / "edited.png", 16), expected, atol=1)
    for bad in ("0", "1001"):
        refused(pt, capsys, [*edit, "--set=2=1", f"--from={bad}"], "--from")
    for bad in ("", "2=much", "8=1", "-1=2", "1.5=2", "2=nan"):
        refused(pt, capsys, [*edit, f"--set={bad}"], "--set", "0 to 7")
    for bad in (dict(model=done), dict(edit=tmp_path / "image.png", set="1=2"), dict(explain=done, edit="image.png")):
        refused(pt, capsys, flags(**bad), "--edit", "--model")

def test_images_without_traits_are_enough_and_grey_ones_stay_grey(tmp_path, capsys):
    root, out = tmp_path / "pictures", tmp_path / "run"
    root.mkdir()
    for i, image in enumerate(noise_images(90, 16, 16).numpy()):
        Image.fromarray(image).save(root / f"{i}.png")
    folder = dict(dataset="folder", data_dir=root, steps=2, eval_every=1)
    refused(pt, capsys, words(**folder, out=out, bias=0.9), "--bias", "shapes")
    assert pt.main(words(**folder, out=out)) == 0
    assert set(contents(out)) == BASIC | EXPLAINED | MEASURED - {"diagnosis.png"}
    assert {"live", "raised"} < set(metrics(out)) and not {"auroc", "tad", "frechet", *LEAK} & set(metrics(out))
    refused(pt, capsys, flags(diagnose=out, out=tmp_path / "d"), "no two traits")
    Image.new("RGB", (20, 30), (200, 100, 30)).save(tmp_path / "colour.png")
    assert pt.main([*flags(model=out, edit=tmp_path / "colour.png", out=tmp_path / "e"), "--set=1=2"]) == 0

@pytest.mark.parametrize("changes, named", [
    (dict(image_size=8), "--image-size"), (dict(num_prototypes=5), "--num-prototypes"), (dict(bias=1.5), "--bias"),
    (dict(invert_steps=1001), "--invert-steps"), (dict(attribute="hat"), "warm hue"), (dict(watch="warm hue"), "dot")])
def test_a_setting_that_cannot_be_is_named_and_makes_no_folder(tmp_path, capsys, changes, named):
    refused(pt, capsys, words(out=tmp_path / "run", **changes), named)
    assert not list(tmp_path.iterdir())

