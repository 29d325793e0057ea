"""Patronus: what patronus.py does not share with the other scripts. Exact answers wherever there is one."""
import dataclasses
import inspect
import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import patronus as pt
from test_method import exact_alpha_bars, gaussian_noise
from test_runs import checkpoint, contents, flags, log, same

CPU = torch.device("cpu")
SETTINGS = dict(
    dataset="shapes", image_size=16, bias=0.5, num_prototypes=8, prototype_dim=8, start="features", encoder_lr=0.1,
    distinctness=0.1, decorrelation=0.1, hide=0.0, emphasis=0.0, channels=8, multipliers="1,2", blocks=1, attention=0,
    dropout=0.1,
    timesteps=1000, steps=6, batch_size=8, accumulate=1, lr=2e-2, warmup=0.05, weight_decay=1e-4, seed=0, save_every=2,
    log_every=2, device="cpu", amp="off", latent_steps=4, latent_width=8, latent_timesteps=21, num_samples=12,
    sampler="dpmpp", sample_steps=2, invert_steps=2, sample_batch=40, pairs=12, inception="off", judge_steps=3,
    judge_width=4, attribute="", watch="")
EXPLAINED = {"reconstruction.png", "variations.png", "interpolation.png", "extrapolation.png", "prototypes.png",
             "consistency.png", "where.png", "when.png", "denoising.png"}
MEASURED = {"metrics.json", "samples.png", "samples.npz"}
BASIC = {"config.json", "log.csv", "checkpoint.pt", "curves.png"} | EXPLAINED | MEASURED
MADE = BASIC | {"diagnosis.png"}
FIGURES = {"moved prototypes", "change of P(attribute)", "change of P(watched)", "leak", "leak, 95 % from",
           "leak, 95 % to"}


def args(**changes):
    return flags(**{**SETTINGS, **changes})


def config(**changes):
    return pt.Config(**{**SETTINGS, **changes})


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


def close(a, b, atol=1e-6, rtol=1e-5):
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    return a.shape == b.shape and torch.allclose(a, b, rtol, atol)


def network(**changes):
    """A Patronus whose weights that start at zero are random, so that something passes."""
    torch.manual_seed(0)
    model = config(**{"dropout": 0.0, **changes}).build(dict(shape=[3, 16, 16])).eval()
    for p in model.unet.parameters():
        if p.dim() > 1 and not p.any():
            nn.init.normal_(p, 0, 0.1, seeded(1))
    return model


def batch(n=4, seed=0):
    return SimpleNamespace(x0=normal(n, 3, 16, 16, seed=seed).clamp(-1, 1), eps=normal(n, 3, 16, 16, seed=seed + 1),
                           t=torch.randint(1000, (n,), generator=seeded(seed)), target=torch.zeros(n).long())


class Painter:
    """A model without weights that denoises to picture(s) [B, 1, 4, 4] at once, and whose s are the first m pixels."""

    def __init__(self, m, picture=None, T=1000):
        self.m, self.abar, self.told, self.noise = m, pt.alpha_bars(T), [], []
        self.picture = picture or (lambda s, t: pixels(s))

    def __call__(self, x, t, s):
        self.told.append((int(t[0]), s))
        self.noise.append(x)
        a = self.abar[t][:, None, None, None]
        return (x - a.sqrt() * self.picture(s, t)) / (1 - a).sqrt()

    def encode(self, x):
        return x.flatten(1)[:, :self.m]


def pixels(s):
    """s [B, m <= 16] as the first m pixels of black images [B, 1, 4, 4]."""
    return F.pad(s, (0, 16 - s.shape[1]), value=-1).view(-1, 1, 4, 4)


def painted(s, known, names):
    return pt.Dataset(pt.to_uint8(pixels(s)), None, [], known, tuple(names))


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """One thread, small sets of shapes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pt, "SHAPE_SPLITS", {"train": (200, 0), "test": (60, 1), "judge": (200, 2)})
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run, which tests only read."""
    folder = tmp_path_factory.mktemp("done") / "run"
    assert pt.main(args(out=folder)) == 0
    return folder


def blank_picture(path, *a, **k):
    Image.new("L", (200, 200)).save(path)


@pytest.fixture
def blank(monkeypatch):
    """Pictures are files, but blank: drawing them takes most of a tiny run."""
    for name in ("draw_panels", "draw_when", "draw_curves", "draw_grid"):
        monkeypatch.setattr(pt, name, blank_picture)


@pytest.fixture
def training_only(monkeypatch):
    for name in ("measure_patronus", "explain_patronus", "train_attribute_judge", "draw_curves"):
        monkeypatch.setattr(pt, name, lambda *a: None)


@pytest.fixture
def drawn(monkeypatch):
    """What the functions that draw are given, by name of the argument; nothing is drawn."""
    kept = {}

    def keep(function):
        def kept_instead(*a):
            kept[function.__name__] = SimpleNamespace(**inspect.signature(function).bind(*a).arguments)
        return kept_instead
    for name in [name for name in dir(pt) if name.startswith("draw_") and name != "draw_activations"]:
        monkeypatch.setattr(pt, name, keep(getattr(pt, name)))
    return kept


@pytest.fixture
def rendered(monkeypatch):
    """What render is asked for; it answers with zeros."""
    asked = []

    def render(model, cfg, s, device, xT=None, shape=None, see=None):
        asked.append(SimpleNamespace(s=s, xT=xT, shape=shape, cfg=cfg))
        return torch.zeros(len(s), *(shape if xT is None else xT.shape[1:]))
    monkeypatch.setattr(pt, "render", render)
    return asked


def pictures(root, n, size=16, grey=False):
    """n images without classes."""
    root.mkdir(parents=True)
    random = np.random.default_rng(0)
    for i in range(n):
        array = random.integers(0, 255, (size, size) if grey else (size, size, 3), dtype=np.uint8)
        Image.fromarray(array).save(root / f"{i}.png")
    return root


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def refused(capsys, arguments, *words):
    """main ends with status 2 and one sentence on stderr that has all the words."""
    capsys.readouterr()
    try:
        status = pt.main([str(a) for a in arguments])
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.strip() and not line.startswith(("usage:", " "))]
    assert status == 2 and len(lines) == 1, captured.err
    assert "Traceback" not in captured.err and lines[0].startswith(("patronus:", "python patronus.py:"))
    for word in words:
        assert str(word) in lines[0], lines[0]


def ends(arguments, *allowed):
    """main ends with one of the allowed statuses, not with a traceback."""
    try:
        status = pt.main([str(a) for a in arguments])
    except Exception as error:
        pytest.fail(f"a traceback: {error!r}")
    assert status in allowed
    return status


# ---- settings ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, size, m", [
    ("cifar10", 32, 100), ("fashion-mnist", 32, 30), ("celeba", 64, 100), ("folder", 32, 100)])
def test_photographs_have_the_papers_size_and_number_of_prototypes(name, size, m):
    cfg = pt.parse_config(["--dataset", name])
    assert (cfg.image_size, cfg.num_prototypes, cfg.prototype_dim, cfg.timesteps) == (size, m, 128, 1000)
    assert (cfg.latent_timesteps, cfg.distinctness, cfg.decorrelation, cfg.bias) == (100, 0, 0, 0.5)


def test_build_makes_what_is_asked():
    model = config(num_prototypes=5, prototype_dim=9, latent_width=12).build(dict(shape=[1, 16, 16]))
    assert model.prototypes.shape == (5, 9) and 0 <= model.prototypes.min() and model.prototypes.max() <= 1
    assert model.prototypes.std() > 0.2, "U(0, 1)"
    assert model.encoder(torch.zeros(2, 1, 16, 16)).shape == (2, 9, 2, 2)
    assert model.latent.mean.shape == (5,) and model.latent.width == 12 and model.unet.first.in_channels == 1


def test_help_lists_every_setting(capsys):
    with pytest.raises(SystemExit) as stop:
        pt.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for field in dataclasses.fields(pt.Config):
        assert f"--{field.name.replace('_', '-')}" in text, field.name


# ---- encoder and activations ------------------------------------------------------------------------------------

def test_activation_by_hand():
    d = torch.tensor([0.0, 1.0, 3.0, 1e6], dtype=torch.float64)
    expected = [math.log(1e4), math.log(2 / 1.0001), math.log(4 / 3.0001), 1e-6]
    assert close(pt.activation(d), expected, atol=1e-9)
    d = torch.tensor([0.0, 0.1, 2.0, 50.0], requires_grad=True)
    pt.activation(d).sum().backward()
    assert close(d.grad, 1 / (d.detach() + 1) - 1 / (d.detach() + 1e-4), rtol=1e-4) and (d.grad < 0).all()


def test_patch_distances_by_an_explicit_loop():
    z, p = normal(2, 3, 2, 4), normal(5, 3, seed=1)
    found = pt.patch_distances(z, p)
    assert found.shape == (2, 5, 2, 4)
    for b, j, y, x in itertools.product(range(2), range(5), range(2), range(4)):
        assert found[b, j, y, x].item() == pytest.approx(sum((z[b, d, y, x] - p[j, d]).item() ** 2 for d in range(3)),
                                                         rel=1e-4)


def test_patch_distances_are_never_negative_and_float32_under_autocast():
    z = normal(4, 64, 3, 3) * 30
    p = z.permute(0, 2, 3, 1).reshape(-1, 64)
    assert pt.patch_distances(z, p).min() == 0
    with torch.autocast("cpu", torch.bfloat16):
        found = pt.patch_distances(z, p)
        half = pt.patch_distances(z.bfloat16(), p)
    assert found.dtype == half.dtype == torch.float32
    assert torch.equal(found, pt.patch_distances(z, p)), "not computed in bfloat16"


def test_encode_is_the_activation_of_the_closest_patch_and_the_maximum_of_the_maps():
    model, x = network(), normal(3, 3, 16, 16)
    maps, s = model.maps(x).detach(), model.encode(x).detach()
    assert maps.shape == (3, 8, 2, 2) and s.shape == (3, 8) and close(maps.amax((2, 3)), s)
    z = model.encoder(x).detach()
    d = (z[:, None] - model.prototypes.detach()[None, :, :, None, None]).square().sum(2)
    assert close(s, torch.log((d + 1) / (d + 1e-4)).flatten(2).amax(2), atol=1e-4)
    model.prototypes.data[2] = z[1, :, 1, 0]
    assert model.encode(x)[1, 2] > 9 and model.maps(x)[1, 2].argmax() == 2, "the patch itself"


def test_patch_encoder_under_128_pixels():
    torch.manual_seed(0)
    net = pt.patch_encoder(3, 32, 128)
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 128, 10, 10) and (net(normal(2, 3, 32, 32)) >= 0).all()
    assert [type(layer).__name__ for layer in net] == ["Conv2d", "ReLU"] * 4
    convs = [layer for layer in net if isinstance(layer, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels) for c in convs] == [(3, 32), (32, 64), (64, 64), (64, 128)]
    assert [(c.kernel_size[0], c.stride[0], c.padding[0]) for c in convs] == [(3, 2, 1), (3, 1, 0), (3, 1, 0),
                                                                             (3, 1, 0)]
    for c in convs[1:]:
        assert abs(c.weight.mean()) < 0.002 and c.weight.std().item() == pytest.approx(0.1, rel=0.02)
    assert pt.receptive_field(net) == (-1, 15, 2)


@pytest.mark.parametrize("side", [128, 224])
def test_patch_encoder_from_128_pixels(side):
    convs = [layer for layer in pt.patch_encoder(1, side, 16) if isinstance(layer, nn.Conv2d)]
    assert [c.out_channels for c in convs] == [32, 64, 64, 128, 16] and convs[0].in_channels == 1
    assert [(c.kernel_size[0], c.stride[0], c.padding[0]) for c in convs] == [(5, 2, 2), (5, 2, 0), (5, 1, 0),
                                                                             (5, 1, 0), (5, 1, 0)]
    assert len(pt.patch_encoder(3, 126, 16)) == 8


@pytest.mark.parametrize("side, at", [(32, [(0, 0), (4, 7), (9, 9)]), (128, [(5, 2)])])
def test_receptive_field_is_where_the_gradient_is(side, at):
    net = pt.patch_encoder(1, side, 2)
    for p in net.parameters():
        p.data.abs_().add_(0.01)                              # so that every ReLU passes
    start, size, step = pt.receptive_field(net)
    x = torch.rand(1, 1, side, side, generator=seeded()).requires_grad_()
    z = net(x)
    for i, j in at:
        grad, = torch.autograd.grad(z[0, 0, i, j], x, retain_graph=True)
        expected = torch.zeros(side, side, dtype=torch.bool)
        y, left = start + step * i, start + step * j
        expected[max(0, y):y + size, max(0, left):left + size] = True
        assert torch.equal(grad[0, 0] != 0, expected)


def test_receptive_field_of_padded_layers_by_hand():
    net = nn.Sequential(nn.Conv2d(1, 1, 3, 2, padding=1), nn.ReLU(), nn.Conv2d(1, 1, 5, 3, padding=2))
    assert pt.receptive_field(net) == (-1 - 2 * 2, 3 + 4 * 2, 6)


@pytest.mark.parametrize("kind", ["uint8", "float"])
def test_best_patches_are_the_corners_of_planted_patches(kind):
    torch.manual_seed(0)
    model = config(image_size=32).build(dict(shape=[3, 32, 32]))
    images = torch.randint(256, (260, 3, 32, 32), generator=seeded(), dtype=torch.uint8)
    x = images.float() / 127.5 - 1
    z = model.encoder(x[[1, 255]])
    model.prototypes.data[3], model.prototypes.data[5] = z[0, :, 4, 7], z[1, :, 0, 9]
    found = pt.best_patches(model, images if kind == "uint8" else x, [5, 3], CPU)
    assert found.shape == (260, 2, 2) and found.dtype == torch.int64
    assert found[1, 1].tolist() == [-1 + 2 * 4, -1 + 2 * 7] and found[255, 0].tolist() == [-1, 17]


# ---- where prototypes start -------------------------------------------------------------------------------------

def test_prototypes_start_at_patches_of_real_images_of_a_known_spread():
    model, images = network(num_prototypes=8), pt.load_dataset("shapes", "train", 16).images
    with torch.no_grad():
        model.begin(images, config(), CPU)
        z = model.encoder(pt.scaled(images, torch.arange(200), CPU))
    assert z.transpose(0, 1).flatten(1).var(1).sum().item() == pytest.approx(pt.SPREAD, rel=0.25)
    nearest = pt.patch_distances(z, model.prototypes.detach()).amin((0, 2, 3))
    assert (nearest < 1e-4).all(), "every prototype is a patch of an image"
    apart = (model.prototypes[:, None] - model.prototypes).detach().norm(dim=-1) + 9 * torch.eye(8)
    assert apart.min() > 0.1, "no two alike"
    s = pt.activations(model, images, CPU)
    assert (s.std(0) > 0.1).all(), "every activation tells images apart"
    assert (s.amax(0) > 8).all(), "and is largest where its patch is"
    assert close(model.mean, s.mean(0), atol=0.3), "of those that the MLP standardises"
    assert (0.4 < model.std / s.std(0)).all() and (model.std / s.std(0) < 2.5).all()


def test_the_mlp_is_told_standardised_activations():
    model, seen = network(), []
    model.mean.copy_(torch.arange(8))
    model.std.fill_(2)
    model.mlp.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    data = batch()
    with torch.no_grad():
        model(data.x0, data.t, torch.ones(4, 8))
        _, s, _ = model(data.x0, data.t, None, data.x0)
    assert close(seen[0], (torch.ones(4, 8) - torch.arange(8)) / 2) and close(s, model.encode(data.x0).detach())
    assert close(seen[1], (s - torch.arange(8)) / 2)


def test_encoder_and_prototypes_learn_at_a_rate_of_their_own():
    model = network()
    rates = {id(p): group["factor"] for group in model.param_groups(config(encoder_lr=0.25)) for p in group["params"]}
    for name, p in model.named_parameters():
        slow = name.startswith(("encoder.", "prototypes"))
        assert name.startswith("latent.") or rates[id(p)] == (0.25 if slow else 1), name


def test_the_start_follows_from_the_seed():
    images = pt.load_dataset("shapes", "train", 16).images
    states = []
    for seed in (0, 0, 1):
        model = network()
        model.begin(images, config(seed=seed), CPU)
        states.append(model.prototypes.detach())
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_spread_points_come_from_all_clusters():
    centres = torch.tensor([[0.0, 0.0], [100.0, 0.0], [0.0, 100.0], [70.0, 70.0]])
    sizes = [400, 1, 3, 2]
    z = torch.cat([c + 0.1 * normal(n, 2, seed=n) for c, n in zip(centres, sizes)])
    for seed in range(5):
        found = pt.spread_points(z, 4, seed)
        assert all((z == point).all(1).any() for point in found), "points of z"
        assert sorted(torch.cdist(found, centres).argmin(1).tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("start", ["features", "uniform"])
def test_a_run_starts_where_it_is_told(tmp_path, monkeypatch, training_only, start):
    monkeypatch.setattr(pt, "train", lambda cfg, model, *a: (model, dict(rows=[])))
    monkeypatch.setattr(pt, "train_latent", lambda latent, *a: latent)
    monkeypatch.setattr(pt, "load_checkpoint", lambda path: {})
    data = pt.load_dataset("shapes", "train", 16)
    model, _, _ = pt.train_patronus(config(start=start), tmp_path, [data, data], CPU)
    best = pt.activations(model, data.images, CPU).amax(0)
    if start == "features":
        assert (best > 5).all(), "at patches, d = 0"
    else:
        torch.manual_seed(0)
        assert same(dict(model.state_dict()), dict(config(start=start).build(dict(shape=[3, 16, 16])).state_dict()))


# ---- penalties --------------------------------------------------------------------------------------------------

def test_distinctness_loss_by_hand():
    angle = math.acos(0.9)
    p = torch.tensor([[2.0, 0, 0], [-3 * math.cos(angle), 3 * math.sin(angle), 0], [0, 0, 5.0]])
    assert close(pt.distinctness_loss(p), 0.1 * 2 / 3), "1 - |cos| = 0.1 twice, 1 once; neither length nor sign counts"
    assert pt.distinctness_loss(torch.eye(4)) == 0
    assert close(pt.distinctness_loss(torch.ones(3, 2)), 0.2)
    four = torch.tensor([[1.0, 0], [math.cos(angle), math.sin(angle)], [math.cos(2 * angle), math.sin(2 * angle)]])
    assert close(pt.distinctness_loss(four), 0.1), "to the nearest, not to all"


def test_correlation_by_hand():
    s = torch.tensor([[1.0, 2, 0, 7], [2, 4, 1, 7], [3, 6, 0, 7], [4, 8, 1, 7]])
    r = 1 / math.sqrt(5)                                      # of 1, 2, 3, 4 with 0, 1, 0, 1
    assert close(pt.correlation(s), [[1, 1, r, 0], [1, 1, r, 0], [r, r, 1, 0], [0, 0, 0, 0]])
    found = pt.correlation(normal(50, 5) * torch.tensor([1, 5, 0.1, 1, 3]) + 4)
    assert close(found, np.corrcoef((normal(50, 5) * torch.tensor([1, 5, 0.1, 1, 3]) + 4).T.numpy()), atol=1e-4)


def test_decorrelation_loss_is_the_mean_square_of_different_pairs():
    s = torch.tensor([[1.0, 2, 0, 7], [2, 4, 1, 7], [3, 6, 0, 7], [4, 8, 1, 7]])
    assert close(pt.decorrelation_loss(s), 2 * (1 + 0.2 + 0.2) / 12)
    assert close(pt.decorrelation_loss(torch.tensor([[1.0, -1], [2, -2]])), 1)


# ---- the network and its loss -----------------------------------------------------------------------------------

def losses_of(model, data, **changes):
    return pt.patronus_loss(config(**changes), model, data, pt.alpha_bars(1000))


def reached(model):
    """Which parts have a gradient that is not zero; all gradients are numbers."""
    parts = {"encoder": model.encoder.parameters(), "prototypes": [model.prototypes], "mlp": model.mlp.parameters(),
             "unet": model.unet.parameters(), "latent": model.latent.parameters()}
    grads = {name: [p.grad for p in ps if p.grad is not None] for name, ps in parts.items()}
    assert all(g.isfinite().all() for found in grads.values() for g in found)
    return {name for name, found in grads.items() if any(g.any() for g in found)}


def test_the_noise_loss_trains_all_parts_jointly_but_the_latent_model():
    model = network()
    losses_of(model, batch())["diffusion"].backward()
    assert reached(model) == {"encoder", "prototypes", "mlp", "unet"}
    assert not any(p.requires_grad for p in model.latent.parameters())
    trained = {id(p) for group in model.param_groups(config()) for p in group["params"]}
    assert trained == {id(p) for name, p in model.named_parameters() if not name.startswith("latent.")}


def test_penalties_reach_what_they_are_about():
    model = network()
    model.prototypes.data[1] = model.prototypes.data[0] * 1.01
    losses_of(model, batch())["distinctness"].backward()
    assert reached(model) == {"prototypes"}
    model.zero_grad()
    losses_of(model, batch())["decorrelation"].backward()
    assert reached(model) == {"encoder", "prototypes"}


def test_the_loss_is_the_noise_loss_with_s_of_the_clean_image_and_weighted_penalties():
    model, data, abar = network(), batch(), pt.alpha_bars(1000)
    with torch.no_grad():
        s = model.encode(data.x0)
        found = losses_of(model, data, distinctness=3.0, decorrelation=0.5, emphasis=0.5)
        plain = losses_of(model, data, distinctness=3.0, decorrelation=0.5, emphasis=0.0)
        eps = model(pt.add_noise(data.x0, data.t, data.eps, abar), data.t, s)
    assert list(found)[0] == "loss" and close(found["diffusion"], F.mse_loss(eps, data.eps), atol=1e-5)
    penalties = 3 * found["distinctness"] + 0.5 * found["decorrelation"]
    assert close(plain["loss"], found["diffusion"] + penalties)
    weights = (1 / abar.sqrt()).clamp(max=50)
    errors = (eps - data.eps).square().mean((1, 2, 3))
    assert close(found["loss"], (errors * weights[data.t]).mean() / weights.mean() + penalties)
    assert close(found["distinctness"], pt.distinctness_loss(model.prototypes.detach()))
    assert close(found["decorrelation"], pt.decorrelation_loss(s))
    assert found["distinctness"] > 0.01 and found["decorrelation"] > 0.01
    assert close(found["spread of s"], s.std(0, correction=0).mean())


def test_level_weights_grow_with_the_noise_and_have_mean_one():
    abar = torch.tensor([1.0, 0.25, 0.01, 1e-5])
    assert close(pt.level_weights(abar, 0.5), torch.tensor([1.0, 2, 10, 50]) / 15.75)
    assert close(pt.level_weights(abar, 0.0), torch.ones(4))


def test_activations_are_hidden_from_the_denoiser_one_by_one_in_training_alone():
    model, seen = network(hide=0.25), []
    model.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x0, t = normal(64, 3, 16, 16).clamp(-1, 1), torch.zeros(64).long()
    with torch.no_grad():
        s = model(x0, t, None, x0)[1]                         # in eval mode
        told = model.train()(x0, t, None, x0)[1]
        model(x0, t, s)                                       # in sampling, whatever the mode
    standardised = (s - model.mean) / model.std
    assert close(told, s) and close(seen[0], standardised) and close(seen[2], standardised)
    hidden = seen[1] == 0
    assert 0.15 < hidden.float().mean() < 0.35 and 0 < hidden[0].sum() < hidden.shape[1]
    assert close(seen[1], torch.where(hidden, 0, standardised / 0.75), atol=1e-5)


def test_s_changes_the_noise_and_is_read_from_the_activations_alone():
    model, data = network(), batch()
    with torch.no_grad():
        s = model.encode(data.x0)
        one, other = model(data.x0, data.t, s), model(data.x0, data.t, s + 1)
        assert (one - other).abs().max() > 1e-4
        noise, told, _ = model(data.x0, data.t, None, data.x0.flip(0))
        assert close(told, s.flip(0)) and close(noise, model(data.x0, data.t, s.flip(0)), atol=1e-5)


def test_an_activation_that_no_image_of_a_batch_varies_leaves_the_gradients_numbers():
    """The closest patch is plain background in all images: s_j is exactly constant, as with FashionMNIST's black."""
    model, data = network(), batch(8)
    data.x0 = torch.full_like(data.x0, -1.0)
    losses_of(model, data, distinctness=0.0, decorrelation=0.0)["loss"].backward()
    assert "unet" in reached(model)


def test_one_image_a_pass_leaves_the_gradients_numbers():
    model = network()
    losses_of(model, batch(1), distinctness=0.0, decorrelation=0.0)["loss"].backward()
    assert "encoder" in reached(model)


def test_no_label_is_seen(tmp_path, training_only):
    data = pt.load_dataset("shapes", "train", 16)
    wrong = dataclasses.replace(data, labels=data.labels.roll(1), attributes=~data.attributes)
    states = []
    for i, d in enumerate((data, wrong)):
        folder = tmp_path / str(i)
        folder.mkdir()
        pt.train_patronus(config(steps=3), folder, [d, d], CPU)
        states.append(checkpoint(folder))
    assert same(states[0]["average"], states[1]["average"]) and same(states[0]["model"], states[1]["model"])


# ---- the latent model -------------------------------------------------------------------------------------------

LATENT = dict(latent_steps=600, latent_width=64, latent_timesteps=100)


def fitted(s, step=7, **changes):
    cfg = config(**{**LATENT, **changes})
    return pt.train_latent(pt.LatentModel(s.shape[1], cfg.latent_width), s, cfg, step, CPU), cfg


@pytest.fixture(scope="module")
def correlated():
    """Activations of two correlated prototypes and one that never varies, and a latent model of them."""
    a, b = normal(2, 2000)
    s = torch.stack([3 + 0.3 * a, 5 + 0.5 * (0.8 * a + 0.6 * b), torch.full_like(a, 4.0)], 1)
    return s, *fitted(s)


def test_the_latent_model_draws_from_the_distribution_of_activations(correlated):
    s, latent, cfg = correlated
    found = pt.draw_activations(latent, cfg, 2000, CPU)
    assert found.shape == (2000, 3) and found.isfinite().all()
    assert close(found.mean(0), s.mean(0), atol=0.08)
    assert close(found.std(0)[:2], s.std(0)[:2], rtol=0.35), found.std(0)
    assert torch.corrcoef(found[:, :2].T)[0, 1].item() == pytest.approx(0.8, abs=0.1)
    assert found[:, 2].std() < 0.4, "one that never varies hardly does"


def test_the_latent_model_keeps_what_s_was_standardised_with(correlated):
    s, latent, _ = correlated
    assert close(latent.mean, s.mean(0)) and close(latent.std, [*s.std(0)[:2], 1])
    assert latent.trained_at == 7 and latent.trained_at.dtype == torch.int64


def test_the_latent_model_keeps_two_kinds_of_images_apart():
    s = torch.where(torch.rand(1000, 1, generator=seeded()) < 0.3, 1.0, 6.0) + 0.1 * normal(1000, 2)
    latent, cfg = fitted(s, latent_steps=600)
    found = pt.draw_activations(latent, cfg, 1000, CPU)
    low = found[:, 0] < 3.5
    assert low.float().mean().item() == pytest.approx(0.3, abs=0.1)
    assert ((found[:, 1] < 3.5) == low).float().mean() > 0.97, "the two activations go together"
    assert ((found - torch.where(low, 1.0, 6.0)[:, None]).abs() < 1).float().mean() > 0.8


def test_the_latent_model_is_fitted_by_the_noise_loss_of_standardised_activations(monkeypatch):
    seen = []

    def loss(model, x0, condition, t, eps, abar):
        seen.append((x0, t, eps))
        return whole(model, x0, condition, t, eps, abar)
    whole = pt.noise_loss
    monkeypatch.setattr(pt, "noise_loss", loss)
    s = 5 + torch.tensor([0.1, 2.0]) * normal(500, 2)
    fitted(s, latent_steps=40, latent_timesteps=21)
    x0, t, eps = (torch.cat(part) for part in zip(*seen))
    assert x0.shape == (40 * 256, 2, 1, 1) and close(x0.mean((0, 2, 3)), [0, 0], atol=0.05)
    assert close(x0.std(0).flatten(), [1, 1], rtol=0.05) and sorted(t.unique().tolist()) == list(range(21))
    assert abs(eps.mean()) < 0.05 and abs(eps.std() - 1) < 0.05 and not torch.equal(seen[0][2], seen[1][2])


def test_the_same_seed_fits_and_draws_the_same():
    s = 3 + normal(100, 2)
    torch.manual_seed(1)
    (one, cfg), _ = fitted(s, latent_steps=3), torch.manual_seed(2)
    (two, _), (other, _) = fitted(s, latent_steps=3), fitted(s, latent_steps=3, seed=1)
    assert same(dict(one.state_dict()), dict(two.state_dict()))
    assert not same(dict(one.state_dict()), dict(other.state_dict()))
    again, _ = fitted(s, latent_steps=3)
    draws = [pt.draw_activations(latent, cfg, 5, CPU) for latent in (one, two, again)]
    assert torch.equal(draws[0], draws[1]) and torch.equal(draws[0], draws[2])
    pt.train_latent(other, s, cfg, 3, CPU)                    # one that was trained before starts afresh
    assert same({**other.state_dict(), "trained_at": 0}, {**one.state_dict(), "trained_at": 0})


def test_drawn_activations_are_possible_ones():
    latent = pt.LatentModel(3, 8)
    latent.mean.fill_(5)
    latent.std.fill_(20)
    found = pt.draw_activations(latent, config(), 200, CPU)
    assert found.min() == 0 and found.max().item() == pytest.approx(-math.log(1e-4)) and found.device == CPU
    latent.mean.copy_(torch.tensor([1.0, 5, 8]))
    latent.std.copy_(torch.tensor([1e-5, 2e-5, 3e-5]))        # an untrained one hardly takes noise away: x 200
    found = pt.draw_activations(latent, config(), 200, CPU)
    assert close(found.mean(0), latent.mean, atol=0.1) and 0 < found.std(0)[0] < found.std(0)[1] < found.std(0)[2]


def test_drawing_goes_through_all_levels_without_clipping(monkeypatch):
    seen = {}

    def sample(predict, xT, abar, steps, sampler, **options):
        seen.update(options, steps=steps, sampler=sampler, levels=len(abar), xT=xT)
        return xT
    monkeypatch.setattr(pt, "sample", sample)
    pt.draw_activations(pt.LatentModel(3, 8), config(latent_timesteps=30), 500, CPU)
    assert (seen["steps"], seen["levels"], seen["sampler"], seen["clip"]) == (30, 30, "ddim", False)
    assert abs(seen["xT"].mean()) < 0.1 and abs(seen["xT"].std() - 1) < 0.1


# ---- inversion and rendering ------------------------------------------------------------------------------------

def test_inversion_follows_the_probability_flow_and_sampling_comes_back_at_first_order():
    mu, sd, abar = torch.tensor([0.3, -0.2]).double(), torch.tensor([0.5, 1.3]).double(), exact_alpha_bars(1000)
    predict = gaussian_noise(abar, mu, torch.diag(sd ** 2))
    x0 = mu + sd * torch.tensor([[-1.5, 0.4], [0.2, -1.0], [2.0, 0.7]]).double()
    x0, a, back, there = x0.view(3, 1, 1, 2), abar[-1], [], []
    exact = a.sqrt() * mu + (a * sd ** 2 + 1 - a).sqrt() * (x0 - mu) / sd
    for steps in (50, 100, 200):
        xT = pt.invert(predict, x0, abar, steps)
        there.append((xT - exact).abs().max().item())
        back.append((pt.sample(predict, xT, abar, steps, "ddim", clip=False) - x0).abs().max().item())
    for errors in (there, back):
        assert errors[-1] < 0.05 and all(1.6 < one / two < 2.4 for one, two in itertools.pairwise(errors)), errors


def test_inversion_at_one_step_and_the_order_of_levels():
    abar, x0, called = pt.alpha_bars(100), normal(2, 1, 2, 2), []

    def predict(x, t):
        called.append((x, t.tolist()))
        return 0.5 * x + 1
    a = abar[-1]
    assert close(pt.invert(predict, x0, abar, 1), a.sqrt() * x0 + (1 - a).sqrt() * (0.5 * x0 + 1))
    assert called[0][1] == [99, 99] and torch.equal(called[0][0], x0)
    called.clear()
    found = pt.invert(predict, x0, abar, 4)
    assert [t[0] for _, t in called] == [24, 24, 49, 74], "the lowest for the clean image, then each current level"
    x, levels = x0, [torch.ones(()), *abar[[24, 49, 74, 99]]]
    for a, b in itertools.pairwise(levels):
        eps = 0.5 * x + 1
        x = b.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b).sqrt() * eps
    assert close(found, x, atol=1e-5)


def test_inverted_images_are_told_their_own_activations():
    model, images = Painter(4), torch.randint(256, (5, 1, 4, 4), generator=seeded(), dtype=torch.uint8)
    s, xT = pt.invert_images(model, config(invert_steps=3, sample_batch=2), images, CPU)
    assert close(s, (images.float() / 127.5 - 1).flatten(1)[:, :4]) and xT.shape == (5, 1, 4, 4)
    assert [len(told) for _, told in model.told] == [2] * 6 + [1] * 3
    assert torch.equal(torch.cat([model.told[i][1] for i in (0, 3, 6)]), s)


def test_activations_of_float_images_are_clamped_and_equal_those_of_their_pixels():
    model, images = Painter(4), torch.randint(256, (501, 1, 4, 4), generator=seeded(), dtype=torch.uint8)
    x = images.float() / 127.5 - 1
    assert close(pt.activations(model, images, CPU), x.flatten(1)[:, :4])
    assert close(pt.activations(model, x * 3, CPU), (x * 3).flatten(1)[:, :4].clamp(-1, 1))


def test_rendering_from_random_noise_follows_from_the_seed_batch_by_batch():
    def model(x, t, s):
        return 0.3 * x + s[:, :, None, None]
    s = torch.linspace(-0.3, 0.3, 5)[:, None]
    cfg = config(sample_batch=3, sample_steps=4, sampler="ddpm")
    one, two = (pt.render(model, cfg, s, CPU, shape=[1, 4, 4]) for _ in range(2))
    assert torch.equal(one, two) and one.shape == (5, 1, 4, 4) and one.abs().max() <= 1
    assert torch.equal(pt.render(model, cfg, s[:3], CPU, shape=[1, 4, 4]), one[:3])
    assert not torch.equal(pt.render(model, dataclasses.replace(cfg, seed=1), s, CPU, shape=[1, 4, 4]), one)
    zeros = pt.render(lambda x, t, s: 0.9 * x, cfg, torch.zeros(6, 1), CPU, shape=[1, 4, 4])
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(zeros, 2)), "every image its own noise"
    gen = seeded(pt.seed_of(0, 2, 1))
    x = torch.randn(2, 1, 4, 4, generator=gen)
    last = pt.sample(lambda x, t: model(x, t, s[3:]), x, pt.alpha_bars(1000), 4, "ddpm", generator=gen)
    assert torch.equal(one[3:], last), "the second batch, of the last two"


def test_rendering_from_inverted_noise_is_plain_ddim_in_its_own_number_of_steps_and_not_clipped():
    called = []

    def model(x, t, s):
        called.append((t[0].item(), len(x)))
        return torch.zeros_like(x)
    xT = normal(5, 1, 4, 4)
    cfg = config(sample_batch=3, sample_steps=7, invert_steps=4, sampler="ddpm")
    found = pt.render(model, cfg, torch.zeros(5, 2), CPU, xT)
    assert close(found, xT / pt.alpha_bars(1000)[-1].sqrt(), rtol=1e-3) and found.abs().max() > 50
    assert called == [(t, n) for n in (3, 2) for t in (999, 749, 499, 249)]


def test_see_is_shown_every_step():
    s, seen = torch.tensor([[0.5, -0.5], [0.2, 0.1]]), []
    model = Painter(2)
    images = pt.render(model, config(sample_steps=5, sampler="ddim"), s, CPU, shape=[1, 4, 4],
                       see=lambda *given: seen.append(given))
    assert [t for t, _, _ in seen] == pt.sample_times(1000, 5)
    assert all(torch.equal(x, noise) for (_, x, _), noise in zip(seen, model.noise, strict=True))
    assert all(close(x0, pixels(s), atol=1e-2) for _, _, x0 in seen) and close(images, pixels(s), atol=1e-4)


def test_images_that_are_no_numbers_stop_with_advice():
    with pytest.raises(pt.Stop, match="--amp off"):
        pt.render(lambda x, t, s: x * math.nan, config(), torch.zeros(2, 1), CPU, shape=[1, 4, 4])


class Gaussian(Painter):
    """The exact model of images N(picture(s), 0.3^2)."""

    def __call__(self, x, t, s):
        a = self.abar[t][:, None, None, None]
        return (1 - a).sqrt() * (x - a.sqrt() * self.picture(s, t)) / (0.09 * a + 1 - a)


def test_reconstruction_leads_back_through_inverted_noise_and_a_variation_does_not():
    images, errors = torch.randint(60, 190, (3, 1, 4, 4), generator=seeded(), dtype=torch.uint8), []
    real = images.float() / 127.5 - 1
    for steps in (50, 100):
        cfg = config(invert_steps=steps, sample_steps=50)
        errors.append((pt.reconstruct(Gaussian(4), cfg, images, CPU) - real).abs().max().item())
    assert errors[1] < 0.15 and 1.5 < errors[0] / errors[1] < 2.4, f"first order: {errors}"
    varied = pt.vary(Gaussian(4), cfg, images, 5, CPU)
    assert varied.shape == (3, 5, 1, 4, 4) and (varied - real[:, None]).abs().amax((2, 3, 4)).min() > 0.2
    assert close(varied.flatten(2)[..., :4].mean(), real.flatten(1)[:, :4].mean(), atol=0.3)


# ---- interpolate and move ---------------------------------------------------------------------------------------

def test_spherical_interpolation_by_hand():
    a, b = torch.zeros(2, 1, 2, 2)
    a[0, 0, 0], b[0, 1, 1] = 3.0, 3.0
    share = torch.linspace(0, 1, 7)
    found = pt.spherical(a, b, share)
    assert found.shape == (7, 1, 2, 2) and close(found[0], a, atol=1e-5) and close(found[-1], b, atol=1e-5)
    assert close(found.flatten(1).norm(dim=1), [3] * 7, atol=1e-5), "the length is kept"
    assert close(found[:, 0, 1, 1], 3 * (share * math.pi / 2).sin(), atol=1e-5)
    c = torch.tensor([[[0.5, 0, math.sqrt(0.75)]]])           # 60 degrees from the first axis
    half = pt.spherical(torch.tensor([[[1.0, 0, 0]]]), c, torch.tensor([0.5]))
    assert close(half.flatten(), [math.sqrt(0.75), 0, 0.5])


def test_spherical_interpolation_between_parallel_noise_is_linear():
    a = normal(1, 4, 4)
    assert close(pt.spherical(a, a, torch.linspace(0, 1, 5)), a.expand(5, 1, 4, 4), atol=1e-3)
    assert close(pt.spherical(a, 1.5 * a, torch.tensor([0.25]))[0], 1.125 * a, atol=1e-3)


def test_interpolation_begins_and_ends_at_the_reconstructions(rendered):
    model, images = network(), pt.load_dataset("shapes", "test", 16).images[:2]
    pt.interpolate(model, config(), images, CPU, n=5)
    s, xT = pt.invert_images(model, config(), images, CPU)
    asked = rendered[0]
    assert close(asked.s, torch.stack([s[0] + share * (s[1] - s[0]) for share in (0, 0.25, 0.5, 0.75, 1)]), atol=1e-5)
    assert close(asked.xT[[0, -1]], xT, atol=1e-4)
    assert close(asked.xT, pt.spherical(*xT, torch.linspace(0, 1, 5)))


def test_move_sets_one_activation_and_nothing_else(rendered):
    s, xT = normal(4), normal(1, 4, 4)
    pt.move(None, config(), s, xT, 2, [0, 1.5, 7], CPU)
    expected = s.repeat(3, 1)
    expected[:, 2] = torch.tensor([0, 1.5, 7])
    assert torch.equal(rendered[0].s, expected) and torch.equal(rendered[0].xT, xT.expand(3, 1, 4, 4))
    assert not (s == 1.5).any(), "s itself is left alone"


# ---- what, when -------------------------------------------------------------------------------------------------

def test_show_prototype_chooses_the_image_that_responds_most(monkeypatch):
    s, xT, given = torch.tensor([[0.1, 0.2], [0.5, 0.3], [0.2, 0.9]]), normal(3, 1, 4, 4), []
    strength = torch.tensor([0.3, 0.8, 0.4])

    def render(model, cfg, s, device, xT=None):
        given.append((s, xT))
        return pixels(torch.stack([s[:, 0], strength * s[:, 1]], 1))
    monkeypatch.setattr(pt, "render", render)
    monkeypatch.setattr(pt, "best_patches", lambda model, images, chosen, device: (
        torch.tensor([[[3, 5]]]) if chosen == [1] and images.shape == (1, 1, 4, 4) else None))
    image, response, corner = pt.show_prototype(Painter(2), config(), s, xT, 1, 1.0, CPU)
    assert response == pytest.approx(0.8) and close(image, pixels(torch.tensor([[0.5, 0.8]]))[0])
    assert corner.tolist() == [3, 5] and close(given[0][0], [[0.1, 1], [0.5, 1], [0.2, 1]]) and given[0][1] is xT
    assert s[0, 1].item() == pytest.approx(0.2), "s itself is left alone"


def test_emergence_reads_the_predicted_image_of_every_step():
    model = Painter(2, lambda s, t: pixels(s * (1 - t / 1000)[:, None]))
    s = torch.tensor([[0.8, 0.4], [0.2, -0.6], [0.1, 0.5]])
    cfg = config(sampler="ddpm", sample_steps=3, sample_batch=2)
    times, course = pt.emergence(model, cfg, s, CPU, [1, 4, 4], steps=10)
    assert times == pt.sample_times(1000, 10) and course.shape == (10, 3, 2)
    assert close(course, torch.stack([s * (1 - t / 1000) for t in times]), atol=0.02)


def test_emergence_watches_ddim_whatever_the_sampler():
    s = torch.tensor([[0.8, 0.4], [0.2, -0.6]])
    one, other = (pt.emergence(Gaussian(2), config(sampler=name), s, CPU, [1, 4, 4], steps=10)[1]
                  for name in ("ddim", "ddpm"))
    assert torch.equal(one, other)


def test_emergence_asks_for_no_level_that_there_is_not():
    times, course = pt.emergence(Painter(2, T=21), config(timesteps=21), torch.zeros(2, 2), CPU, [1, 4, 4])
    assert min(times) >= 0 and max(times) == 20 and len(times) == len(course), "fewer levels than steps"


def test_emerged_at_by_hand():
    courses = torch.tensor([
        [0.0, 0.5, 0.95, 0.91, 1.0],                          # passes 90 % in step 2 and stays
        [0.0, 0.95, 0.5, 0.92, 1.0],                          # dips afterwards: from step 3 on
        [1.0, 1.2, 0.95, 1.1, 1.0],                           # never below
        [0.0, 0.0, 0.0, 0.8, 1.0],                            # only at the end
        [0.0, 0.0, 0.0, 0.0, 0.0],                            # nothing ever
        [0.0, 0.9, 1.8, 1.8, 2.0]]).T                         # of its own end, 2
    assert pt.emerged_at(courses).tolist() == [2, 3, 0, 4, 0, 2]
    assert pt.emerged_at(courses, 0.5).tolist() == [1, 1, 0, 3, 0, 2]
    assert pt.emerged_at(courses.view(5, 2, 3)).tolist() == [[2, 3, 0], [4, 0, 2]]


@pytest.mark.parametrize("at", [0, 8, 30])
def test_switch_tells_a_until_the_level_and_b_below(at):
    model, s_a, s_b = Painter(2, T=30), torch.tensor([[0.5, 0.1], [0.3, 0.2]]), torch.tensor([[-0.5, 0.0], [0.6, 0.4]])
    cfg = config(timesteps=30, sample_steps=30, sampler="ddim")
    images = pt.switch(model, cfg, s_a, s_b, at, CPU, [1, 4, 4])
    assert [t for t, _ in model.told] == list(range(29, -1, -1))
    assert all(torch.equal(s, s_a if t >= at else s_b) for t, s in model.told)
    assert close(images, pixels(s_a if at == 0 else s_b), atol=1e-3)


def reader(columns):
    """A judge that reads P of trait i from the brightness of a pixel."""
    return SimpleNamespace(embed=lambda x: x.flatten(1), probabilities=lambda z: (z[:, columns] + 1) / 2)


def test_switch_curves_count_the_traits_that_are_bs_among_those_that_differ():
    known = torch.rand(50, 2, generator=seeded()) < 0.5
    known[:, 1] = True                                        # in which no pair differs
    data = painted(torch.where(known, 0.6, -0.6), known, "ab")
    model = Painter(2, lambda s, t: pixels(s))
    curves = pt.switch_curves(config(sample_steps=10, sampler="ddim"), model, reader([0, 1]), data, CPU)
    at, share = curves["a"]                                   # told last at t = 99
    assert at == [0, 100, 200, 300, 400, 500, 600, 700, 800, 900, 1000] and share == [0] + [1] * 10
    assert all(math.isnan(x) for x in curves["b"][1])


# ---- diagnosis --------------------------------------------------------------------------------------------------

def test_movers_are_the_best_for_a_without_the_best_for_b(monkeypatch):
    table = torch.tensor([[0.9, 0.99], [0.05, 0.5], [0.8, 0.5], [0.85, 0.2], [0.7, 0.1], [0.3, 0.5], [0.6, 0.4]])
    known = torch.rand(9, 4, generator=seeded()) < 0.5

    def aurocs(s, given):
        assert torch.equal(given, known[:, [3, 1]])
        return table
    monkeypatch.setattr(pt, "single_aurocs", aurocs)
    assert pt.choose_movers(None, known, 3, 1) == [1, 2, 5], "0, 3 and 4 tell b, either way round; 1 and 5 tell not a"
    assert pt.choose_movers(None, known, 3, 1, n=1) == [1]
    table[1, 0] = math.nan
    assert pt.choose_movers(None, known, 3, 1) == [2, 5, 6], "an activation without AUROC tells nothing"


def traits_and_activations(n=200):
    """Traits a (in 3 of 10 images) and b, independent: s_0..2 tell a, s_3..5 tell b, s_6..7 nothing."""
    a, b = torch.rand(n, generator=seeded(1)) < 0.3, torch.rand(n, generator=seeded(2)) < 0.5
    s = 0.4 + 0.025 * normal(n, 8).clamp(-2, 2)
    s[:, :3] += torch.where(a, 0.3, -0.3)[:, None]
    s[:, 3:6] += torch.where(b, 0.3, -0.3)[:, None]
    return s, torch.stack([b, a], 1)


@pytest.mark.parametrize("leak", [0, 1, 0.5, -1])
def test_a_planted_leak_is_found(leak):
    s, known = traits_and_activations()
    data = painted(s, known, ["b", "a"])

    def picture(s, t):                                        # pixel 0 shows a; pixel 1 shows b, and the leak of a
        a, b = ((part.mean(1) - 0.4) * 4 / 3 for part in (s[:, :3], s[:, 3:6]))
        return pixels(torch.stack([a, b / 2 + leak * a / 2], 1))
    model = Painter(8, picture)
    found, seen = pt.diagnose(model, config(sampler="ddim"), reader([1, 0]), data, 1, 0, CPU, most=150)
    assert sorted(found["moved prototypes"]) == [0, 1, 2] and set(found) == FIGURES
    assert found["leak"] == pytest.approx(leak / 2, abs=0.01)
    assert found["leak, 95 % from"] - 0.01 <= found["leak"] <= found["leak, 95 % to"] + 0.01
    assert found["change of P(attribute)"] == pytest.approx(0.4, abs=0.03), "from 0.4 to -0.4 or back, P by half of it"
    assert found["change of P(watched)"] == pytest.approx(leak * 0.2, abs=0.02)
    change = seen.p_after - seen.p_before
    assert len(seen.has) == len(change) == 150 and 0.2 < seen.has.float().mean() < 0.4
    assert (change[seen.has, 0] < -0.2).all() and (change[~seen.has, 0] > 0.2).all(), "to the opposite, both ways"
    assert torch.equal(pt.to_uint8(pixels(torch.zeros(1, 8)))[0, 0].shape and seen.before[:, 0, 0, 0] > 127, seen.has)


def test_movers_go_to_the_mean_of_the_opposite_with_their_company_from_the_same_noise():
    s, known = traits_and_activations()
    data, model = painted(s, known, ["b", "a"]), Painter(8)
    _, seen = pt.diagnose(model, config(sample_batch=60), reader([3, 0]), data, 1, 0, CPU, most=100)
    s = data.images.float().flatten(1)[:, :8] / 127.5 - 1     # as rounded
    told = [torch.cat([model.told[i][1] for i in calls]) for calls in ((0, 2), (4, 6))]     # two batches of two steps
    first, second = (torch.cat([model.noise[i] for i in calls]) for calls in ((0, 2), (4, 6)))
    assert torch.equal(first, second) and len(first) == 100, "the same random noise, which holds neither trait"
    a, centred = known[:, 1], (s - s.mean(0)).numpy()
    expected = torch.where(seen.has[:, None], s[~a].mean(0), s[a].mean(0))[:, :3]
    assert close(told[1][:, :3], expected, atol=1e-5)
    slopes = torch.from_numpy(np.linalg.lstsq(centred[:, :3], centred[:, 3:], rcond=None)[0])       # [3, 5]
    follow = told[0][:, 3:] + (expected - told[0][:, :3]) @ slopes
    assert close(told[1][:, 3:], follow.clamp(min=0), atol=1e-3)
    assert not close(told[1][:, 3:], told[0][:, 3:], atol=1e-2)
    assert all((s == row).all(1).any() for row in told[0]), "held-out images"


def test_a_move_without_any_effect_has_no_leak_and_no_traceback():
    s, known = traits_and_activations()
    model = Painter(8, lambda s, t: pixels(torch.zeros(len(s), 8)))
    try:
        found, _ = pt.diagnose(model, config(), reader([1, 0]), painted(s, known, ["b", "a"]), 1, 0, CPU)
    except (pt.Stop, ZeroDivisionError) as error:
        assert isinstance(error, pt.Stop), "as of a run that has just begun, whose network is blind to s"
    else:
        assert found["change of P(attribute)"] == 0 and not abs(found["leak"]) > 0


def test_mean_interval_by_hand():
    mean, low, high = pt.mean_interval([0.1, 0.2, 0.3])
    assert (mean, low, high) == pytest.approx((0.2, 0.2 - 4.303 * 0.1 / math.sqrt(3), 0.2 + 4.303 * 0.1 / math.sqrt(3)))


# ---- what s knows -----------------------------------------------------------------------------------------------

def test_auroc_by_hand():
    yes = torch.tensor([False, False, True, True])
    assert pt.auroc(torch.tensor([1.0, 2, 3, 4]), yes) == 1 and pt.auroc(torch.tensor([4.0, 3, 2, 1]), yes) == 0
    assert pt.auroc(torch.tensor([1.0, 3, 2, 4]), yes) == 0.75 and pt.auroc(torch.zeros(4), yes) == 0.5
    assert pt.auroc(torch.tensor([1.0, 2, 2, 3]), yes) == pytest.approx(3.5 / 4), "a tie is half"
    for only in (True, False):
        assert math.isnan(pt.auroc(torch.arange(3.0), torch.full((3,), only)))


def test_auroc_by_counting_pairs():
    score = torch.randint(12, (60,), generator=seeded()).float()
    yes = torch.rand(60, generator=seeded(1)) < 0.4
    pairs = [(a > b).float() + (a == b).float() / 2 for a in score[yes] for b in score[~yes]]
    assert pt.auroc(score, yes) == pytest.approx((sum(pairs) / len(pairs)).item())
    both = pt.single_aurocs(torch.stack([score, -score, score ** 2], 1), torch.stack([yes, ~yes], 1))
    a = pt.auroc(score, yes)
    assert close(both, [[a, 1 - a], [1 - a, a], [a, 1 - a]])


def test_logistic_aurocs_of_what_is_told_and_what_is_not():
    known = torch.rand(200, 2, generator=seeded()) < 0.5
    s = torch.stack([5 + 0.01 * (known[:, 0] + 0.1 * normal(200)), normal(200, seed=1), torch.ones(200)], 1)
    found = pt.logistic_aurocs(s, known)
    assert found[0] > 0.999 and 0.35 < found[1] < 0.65


def test_logistic_aurocs_are_of_images_held_out():
    s, known = normal(120, 150), torch.rand(120, 3, generator=seeded(1)) < 0.5
    found = pt.logistic_aurocs(s, known)
    assert (found < 0.65).all() and (found > 0.35).all(), "noise, of which there is enough to fit the rest"


def test_logistic_aurocs_are_those_of_a_ridge_found_by_newton():
    s, known = 3 + 2 * normal(90, 12), torch.rand(90, 1, generator=seeded(1)) < 0.4
    s[:, 0] += known[:, 0] * 2.0
    order, expected = torch.randperm(90, generator=seeded(0)), []
    for fold in order.chunk(5):
        rest = torch.tensor([i for i in order.tolist() if i not in fold.tolist()])
        x = torch.cat([(s - s[rest].mean(0)) / s[rest].std(0), torch.ones(90, 1)], 1).double()
        w, decay = torch.zeros(13, dtype=torch.float64), torch.diag(torch.tensor([1.0] * 12 + [0.0]).double())
        for _ in range(20):
            p = (x[rest] @ w).sigmoid()
            gradient = x[rest].T @ (p - known[rest, 0].double()) + decay @ w
            w = w - torch.linalg.solve(x[rest].T @ (x[rest] * (p * (1 - p))[:, None]) + decay, gradient)
        expected.append(pt.auroc(x[fold] @ w, known[fold, 0]))
    assert pt.logistic_aurocs(s, known).item() == pytest.approx(np.mean(expected), abs=1e-6)


def test_mutual_information_by_hand():
    a, b = torch.tensor([1, 1, 0, 0]).bool(), torch.tensor([1, 0, 1, 0]).bool()
    assert pt.mutual_information(a, b) == pytest.approx(0, abs=1e-12)
    assert pt.mutual_information(a, a) == pt.mutual_information(a, ~a) == pytest.approx(math.log(2))
    c, d = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0]).bool(), torch.tensor([1, 1, 1, 0, 0, 0, 0, 1]).bool()
    assert pt.mutual_information(c, d) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    e = torch.tensor([1, 0, 0, 0]).bool()
    assert pt.mutual_information(e, e) == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))
    assert pt.mutual_information(torch.ones(4).bool(), a) == pytest.approx(0, abs=1e-12)


def test_disentanglement_by_hand():
    a, b = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0]).bool(), torch.tensor([1, 1, 0, 0, 1, 1, 0, 0]).bool()
    known, flat = torch.stack([a, b], 1), torch.zeros(8)
    assert pt.disentanglement(torch.stack([a.float(), -b.float(), flat], 1), known) == (1.0, 2), "inverted counts too"
    assert pt.disentanglement(torch.stack([a.float(), 1 - a.float(), flat], 1), known) == (0.0, 1), "two tell the same"
    half = torch.tensor([1.0, 1, 0, 0, 0, 0, 0, 0])           # AUROC of a: 0.75, and of b
    assert pt.disentanglement(torch.stack([half, flat], 1), known[:, :1]) == (0.25, 1), "0.75 is enough"
    less = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0])
    assert pt.disentanglement(torch.stack([less, flat], 1), known[:, :1]) == (0.0, 0)
    constant = torch.ones(8, 1).bool()
    assert pt.disentanglement(torch.stack([a.float(), flat], 1), constant) == (0.0, 0)


@pytest.mark.parametrize("agree, captured", [(15, 2), (16, 0), (20, 0), (4, 0), (5, 2)])
def test_traits_that_tell_each_other_are_left_out_of_tad(agree, captured):
    a = torch.tensor([1] * 20 + [0] * 20).bool()              # shared over own: 0.19 at 15 of 20, 0.28 at 16
    b = torch.tensor(([1] * agree + [0] * (20 - agree)) + ([0] * agree + [1] * (20 - agree))).bool()
    s = torch.stack([a.float(), b.float()], 1)
    total, found = pt.disentanglement(s, torch.stack([a, b], 1))
    other = max(agree, 20 - agree) / 20                       # AUROC of either for the other
    assert found == captured and total == pytest.approx(captured * (1 - other))


def test_prototypes_are_live_dead_or_duplicates_of_live_ones():
    basis = torch.linalg.qr(torch.cat([torch.ones(100, 1), normal(100, 5)], 1))[0][:, 1:].T * 10      # mean 0
    def turned(degrees):
        return math.cos(math.radians(degrees)) * basis[0] + math.sin(math.radians(degrees)) * basis[1]
    columns = dict(first=turned(0), twin=4 + 0.1 * turned(10), opposite=-turned(0), constant=torch.full((100,), 6.0),
                   faint=0.04 * basis[2], copy_of_faint=0.04 * basis[2], second=turned(30), of_second=turned(40),
                   other=0.06 * basis[3])                     # a twentieth of the liveliest is 0.05
    live, dead, duplicates = pt.prototype_state(5 + torch.stack(list(columns.values()), 1) / 10)
    assert [name for name, alive in zip(columns, live) if alive] == ["first", "second", "other"]
    assert (dead, duplicates) == (3, 3)


def test_a_duplicate_of_a_duplicate_alone_lives():
    basis = torch.linalg.qr(torch.cat([torch.ones(100, 1), normal(100, 2)], 1))[0][:, 1:].T * 10
    s = torch.stack([math.cos(a) * basis[0] + math.sin(a) * basis[1] for a in (0, 0.28, 0.56)], 1)
    live, dead, duplicates = pt.prototype_state(s)            # cosines 0.961 and 0.847
    assert live.tolist() == [True, False, True] and (dead, duplicates) == (0, 1)


def raising(picture, pairs=5):
    """Raised prototypes 0 and 1 of 3, the last of which is dead; largest values 0.9 and 0.7."""
    s_all = torch.tensor([[0.5, 0.7, 0], [0.9, 0.6, 0], [0.6, 0.2, 0], [0.4, 0.55, 0]])
    images = pt.to_uint8(pixels(torch.tensor([[-0.5, 0.3, 0.1], [0.2, -0.1, 0.1], [0.0, 0.1, 0.1], [0.1, 0.2, 0.1]])))
    return pt.raised_prototypes(Painter(3, picture), config(pairs=pairs), s_all, images, CPU)


def test_raised_prototypes_that_respond():
    assert raising(lambda s, t: pixels(s)) == (1.0, 1.0, 6), "two live ones on three images, for at least 5 pairs"
    assert raising(lambda s, t: pixels(torch.zeros(len(s), 3))) == (0.0, 0.0, 6), "nothing changes"
    assert raising(lambda s, t: pixels(-s)) == (0.0, 0.0, 6), "the wrong way"
    assert raising(lambda s, t: pixels(s * torch.tensor([1.0, 0, 0]))) == (0.5, 0.5, 6)
    assert raising(lambda s, t: pixels(s), pairs=1000) == (1.0, 1.0, 8), "no more than there are images"


def test_every_image_is_raised_from_its_own_noise_alone_and_with_company(rendered):
    raising(None)
    plain, alone, accompanied = rendered
    assert torch.equal(alone.xT, plain.xT.repeat(2, 1, 1, 1)) and not torch.equal(plain.xT[0], plain.xT[1])
    assert torch.equal(accompanied.xT, alone.xT)
    expected = plain.s.repeat(2, 1)
    expected[:3, 0], expected[3:, 1] = 0.9, 0.7
    assert torch.equal(alone.s, expected)
    slopes = np.polyfit([0.5, 0.9, 0.6, 0.4], [0.7, 0.6, 0.2, 0.55], 1)[0]         # of prototype 1 on prototype 0
    following = (plain.s[:, 1] + slopes * (0.9 - plain.s[:, 0])).clamp(min=0)
    assert close(accompanied.s[:3, 1], following, atol=1e-5) and close(accompanied.s[:3, 0], torch.full((3,), 0.9))


def test_prototypes_are_raised_to_their_largest_value_one_at_a_time():
    def picture(s, t):
        top = torch.tensor([0.9, 0.7])
        raised = (s[:, :2] - top).abs() < 1e-5
        return pixels(torch.where(raised & (raised.sum(1, keepdim=True) == 1), 0.5, -0.5))
    assert raising(picture)[0] == 1.0


def test_company_is_the_regression_on_the_chosen():
    s = normal(50, 3).abs()
    s[:, 1] = 2 * s[:, 0] + 0.1
    s = torch.cat([s, torch.ones(50, 1)], 1)
    assert close(pt.company(s, [0])[:, :2], [[1, 2]], atol=1e-5)
    assert close(pt.company(s, [2])[0, 0], np.polyfit(s[:, 2], s[:, 0], 1)[0], atol=1e-5)
    assert close(pt.company(s, [3]), torch.zeros(1, 4)), "what never varies moves nothing"
    s[:, 3] = s[:, 0] - 3 * s[:, 2]
    assert close(pt.company(s, [0, 2]), [[1, 2, 0, 1], [0, 0, 1, -3]], atol=1e-4)
    assert close(torch.tensor([1.0, 2]) @ pt.company(s, [0, 1])[:, :2], [1, 2], atol=1e-4), "two that say the same"


def test_activations_are_set_alone_or_the_others_follow_within_their_range():
    s, slopes = torch.tensor([[1.0, 2, 3], [2, 0, 9]]), torch.tensor([[1.0, 0.5, -4]])
    assert close(pt.set_activations(s, [0], torch.tensor([[2.0]])), [[2, 2, 3], [2, 0, 9]])
    most = -math.log(1e-4)
    assert close(pt.set_activations(s, [0], torch.tensor([[2.0], [1.0]]), slopes), [[2, 2.5, 0], [1, 0, most]])
    both = torch.tensor([[1.0, 0, 2], [0, 1, 0.5]])
    assert close(pt.set_activations(s, [0, 1], torch.tensor([[2.0, 4.0], [1, 1]]), both), [[2, 4, 6], [1, 1, 7.5]])
    assert s[0, 0] == 1, "s itself is left alone"


# ---- data and traits --------------------------------------------------------------------------------------------

def test_a_planted_correlation_is_in_the_training_images_alone():
    plain = pt.load_sets_patronus(config())
    for bias in (0.9, 1.0, 0.0):
        sets = pt.load_sets_patronus(config(bias=bias))
        warm, dot = sets[0].attributes[:, [0, 4]].T
        assert (warm == dot).float().mean().item() == pytest.approx(bias, abs=0.07)
        assert 0.35 < warm.float().mean() < 0.65 and len(warm) == 200
        assert torch.equal(sets[1].images, plain[1].images) and not torch.equal(sets[0].images, plain[0].images)
        assert torch.equal(sets[1].attributes, plain[1].attributes)
        assert torch.equal(sets[0].attributes[:, :4], plain[0].attributes[:, :4])
    warm, dot = plain[1].attributes[:, [0, 4]].T
    assert 0.25 < (warm == dot).float().mean() < 0.75


def test_traits_are_attributes_else_classes():
    data = pt.Dataset(torch.zeros(3, 1, 4, 4), torch.tensor([2, 0, 1]), ["x", "y", "z"])
    known, names = pt.traits(data)
    assert known.tolist() == [[False, False, True], [True, False, False], [False, True, False]] and names == list("xyz")
    marked = dataclasses.replace(data, attributes=torch.ones(3, 2).bool(), attribute_names=("p", "q"))
    assert pt.traits(marked)[0] is marked.attributes and pt.traits(marked)[1] == ["p", "q"]
    assert pt.traits(dataclasses.replace(data, labels=None)) == (None, [])


def test_the_traits_to_diagnose_are_the_first_and_last_or_those_asked_for():
    data = pt.load_dataset("shapes", "test", 16)
    assert pt.watched_traits(config(), data) == [0, 4]
    assert pt.watched_traits(config(attribute="large", watch="bright background"), data) == [2, 1]


def test_the_judge_of_shapes_learns_from_unbiased_images_of_its_own(monkeypatch):
    seen = []

    def fit(net, images, targets, loss_fn, steps, cfg, seed, device):
        seen.append((images, targets, seed))
        return net.eval()
    monkeypatch.setattr(pt, "fit", fit)
    biased = pt.load_sets_patronus(config(bias=1.0))[0]
    judge = pt.train_attribute_judge(config(bias=1.0), biased, CPU)
    own = pt.load_dataset("shapes", "judge", 16)
    images, targets, seed = seen[0]
    assert torch.equal(images, own.images) and torch.equal(targets, own.attributes.float()) and seed > 2**31
    with torch.no_grad():
        p = judge.probabilities(pt.features_of(judge.embed, images[:4], CPU))
    assert p.shape == (4, 5) and 0 < p.min() and p.max() < 1
    assert close(judge.real[0], pt.features_of(judge.embed, biased.images, CPU).double().mean(0), atol=1e-5)


# ---- pictures ---------------------------------------------------------------------------------------------------

def opens(path):
    with Image.open(path) as image:
        image.load()
        return min(image.size) > 100


def test_a_panel_frames_the_patch_on_the_pixels_it_covers():
    figure = pt.Figure()
    axes = figure.subplots()
    image = torch.zeros(1, 16, 16)
    pt.panel(image, torch.tensor([-1, 7]), 15, "text")(axes)
    for frame in axes.patches:
        assert (frame.get_x(), frame.get_y(), frame.get_width(), frame.get_height()) == (6.5, -1.5, 15, 15)
    assert len(axes.patches) == 2 and axes.get_xlabel() == "text"
    assert (np.asarray(axes.images[0].get_array()) == 128).all(), "float 0 is mid-grey"


def test_when_without_traits_and_panels_of_several_lengths_are_drawn(tmp_path):
    pt.draw_when(tmp_path / "when.png", [999, 499], torch.rand(2, 3), [2, 0], torch.tensor([0, 1.0, 1]), None, 1000)
    grey = torch.zeros(1, 8, 8)
    pt.draw_panels(tmp_path / "panels.png", [[pt.panel(grey), None], [pt.panel(grey.byte())]], "title", ["a"], ["b"])
    assert opens(tmp_path / "when.png") and opens(tmp_path / "panels.png")


def leaks(leak, low, high):
    return [{"seed": seed, "leak": leak, "leak, 95 % from": low, "leak, 95 % to": high} for seed in (3, 4, 5)]


@pytest.mark.parametrize("leak, low, high", [(0.4, 0.1, 0.9), (5.0, -1.0, 2.0), (-3.0, -1.0, 2.0)])
def test_leaks_are_drawn_wherever_their_interval_lies(tmp_path, leak, low, high):
    """A bootstrap interval of a ratio need not hold the ratio: where the attribute hardly moved it may miss it."""
    pt.draw_leaks(tmp_path / "comparison.png", {"one": leaks(leak, low, high), "two": leaks(0.1, 0, 0.2)}, "title")
    assert opens(tmp_path / "comparison.png")


def test_explanations_show_what_they_say(done, tmp_path, drawn):
    run, data = pt.load_run(done, "cpu"), pt.load_dataset("shapes", "test", 16)
    model, s_all = run.model, pt.activations(run.model, data.images, CPU)
    live, top = pt.prototype_state(s_all)[0], s_all.amax(0)
    found = pt.explain_patronus(run.config, model, None, data, tmp_path, CPU)
    assert {f"draw_{name.removesuffix('.png')}" for name in EXPLAINED} - set(drawn) == {
        "draw_prototypes", "draw_denoising"}
    assert found["switch"] is None and set(found["emerged at t"]) == set(live.nonzero().flatten().tolist())
    chosen = [int(name.removeprefix("prototype ")) for name in drawn["draw_prototypes_seen"].names]
    assert 0 < len(chosen) == min(8, live.sum()) and all(live[chosen])
    assert s_all.std(0)[chosen].tolist() == sorted(s_all.std(0)[live].tolist(), reverse=True)[:8]

    seen = drawn["draw_prototypes_seen"]
    for j, images, boxes in zip(chosen, seen.real, seen.real_boxes):
        assert close(pt.activations(model, images, CPU)[:, j], s_all[:, j].sort(descending=True).values[:6], atol=1e-4)
        assert torch.equal(boxes, pt.best_patches(model, images, [j], CPU)[:, 0])
    for j, image, box in zip(chosen, seen.shown, seen.boxes):
        assert torch.equal(box, pt.best_patches(model, image[None], [j], CPU)[0, 0])
    assert seen.size == 15

    where = drawn["draw_where"]
    assert close(where.maps.amax((2, 3)), pt.activations(model, where.real, CPU)[:, chosen[:6]], atol=1e-4)
    assert where.extent == (5, 9, 9, 5), "two patches of 15 pixels from -1 on, two pixels apart: middles at 6 and 8"
    for row, j in zip(drawn["draw_extrapolation"].values, chosen):
        assert row == pytest.approx([share * top[j].item() for share in (0, 0.25, 0.5, 0.75, 1, 1.5)])
    assert drawn["draw_reconstruction"].real.shape == drawn["draw_reconstruction"].inverted.shape == (8, 3, 16, 16)
    assert drawn["draw_variations"].varied.shape == (5, 8, 3, 16, 16)
    noise = pt.invert_images(model, run.config, drawn["draw_reconstruction"].real, CPU)
    for k, j in enumerate(chosen[:6]):                        # each image from its own noise, the others following
        slopes = pt.company(s_all, [j])
        shown = pt.show_prototype(model, run.config, *noise, j, top[j].item(), CPU, slopes)[0]
        assert close(seen.shown[k], shown, atol=1e-3)
        for i in (1, 4):
            one = pt.move(model, run.config, noise[0][i], noise[1][i], j, [top[j].item()], CPU, slopes)
            assert close(drawn["draw_consistency"].raised[i][k], one[0], atol=1e-3)
        wide = drawn["draw_extrapolation"]
        course = pt.move(model, run.config, noise[0][0], noise[1][0], j, wide.values[k], CPU, slopes)
        assert close(wide.courses[k], course, atol=1e-3)
    between = drawn["draw_interpolation"]
    assert between.pairs.shape == (3, 2, 3, 16, 16) and between.courses.shape == (3, 9, 3, 16, 16)
    back, whole = drawn["draw_reconstruction"].inverted, between.courses[:, [0, -1]]
    assert close(whole, back[:6].view(3, 2, 3, 16, 16), atol=0.02), "courses end at the reconstructions"
    when = drawn["draw_when"]
    reached = [when.emerged[j].item() for j in when.order]
    assert reached == sorted(reached) and when.course.shape == (50, 8) and when.curves is None
    assert len(drawn["draw_denoising_seen"].steps) == 9


# ---- whole runs -------------------------------------------------------------------------------------------------

def test_a_run_leaves_every_file_and_nothing_else(done):
    assert set(contents(done)) == MADE
    assert all(opens(done / name) for name in MADE if name.endswith(".png"))
    saved = json.loads((done / "config.json").read_text(encoding="utf-8"))
    assert {k: saved[k] for k in SETTINGS} == SETTINGS
    assert not {"out", "resume", "sample", "evaluate", "explain", "diagnose", "model", "edit", "set"} & set(saved)
    rows = log(done)
    assert list(rows[0]) == ["step", "loss", "diffusion", "distinctness", "decorrelation", "spread of s",
                             "learning rate", "images/s", "seconds", "skipped steps"]
    assert [row["step"] for row in rows] == ["2", "4", "6"] and {row["skipped steps"] for row in rows} == {"0"}
    for row in rows:
        assert float(row["loss"]) == pytest.approx(
            float(row["diffusion"]) + 0.1 * float(row["distinctness"]) + 0.1 * float(row["decorrelation"]), rel=1e-4)
        assert float(row["spread of s"]) > 0.01
    assert float(rows[0]["diffusion"]) == pytest.approx(1, abs=0.3)


def test_the_checkpoint_holds_the_latent_model(done):
    state = checkpoint(done)
    assert state["script"] == "patronus" and state["step"] == 6 and state["average"]["latent.trained_at"] == 6
    assert state["extra"] == {"shape": [3, 16, 16], "classes": list(pt.SHAPES), "images": 200}
    assert state["log"]["latent seconds"] > 0
    run = pt.load_run(done, "cpu")
    s = pt.activations(run.model, pt.load_dataset("shapes", "train", 16).images, CPU)
    assert close(run.model.latent.mean, s.mean(0), atol=1e-3), "of the average's activations of training images"
    drawn = pt.draw_activations(run.model.latent, run.config, 20, CPU)
    assert drawn.shape == (20, 8) and 0 <= drawn.min() and drawn.max() <= 9.2104


def test_samples_npz_holds_images_and_what_they_were_told(done):
    with np.load(done / "samples.npz") as saved:
        assert saved.files == ["arr_0", "s"]
        images, s = saved["arr_0"], saved["s"]
    assert images.shape == (12, 16, 16, 3) and images.dtype == np.uint8 and s.shape == (12, 8)
    run = pt.load_run(done, "cpu")
    drawn = pt.draw_activations(run.model.latent, run.config, 12, CPU)
    assert close(s, drawn, atol=1e-5)
    again = pt.to_uint8(pt.render(run.model, run.config, drawn, CPU, shape=[3, 16, 16])).permute(0, 2, 3, 1)
    assert np.abs(images.astype(int) - again.numpy()).max() <= 1


def test_metrics_json_has_every_figure(done):
    found = metrics(done)
    results = found["results"]
    assert found["training_images"] == 200 and found["settings"]["steps"] == 6
    assert set(found["seconds"]) == {"training", "latent model", "sampling"}
    names = list(pt.SHAPE_ATTRIBUTES)
    for name in ("AUROC of s", "agreement, same s and random noise", "agreement, real held-out images"):
        assert list(results[name]) == names and all(0 <= value <= 1 for value in results[name].values())
    run, data = pt.load_run(done, "cpu"), pt.load_dataset("shapes", "test", 16)
    s = pt.activations(run.model, data.images, CPU)
    assert list(results["AUROC of s"].values()) == pytest.approx(pt.logistic_aurocs(s, data.attributes).tolist(),
                                                                 abs=1e-3)
    assert results["mean AUROC"] == pytest.approx(np.mean(list(results["AUROC of s"].values())))
    assert results["mean AUROC of the local ones"] == pytest.approx(
        np.mean([results["AUROC of s"][name] for name in ("warm hue", "bright background", "dot")]))
    assert (results["TAD"], results["traits captured (TAD)"]) == pytest.approx(
        pt.disentanglement(s, data.attributes), abs=1e-3)
    live, dead, duplicates = pt.prototype_state(s)
    assert (results["live prototypes"], results["dead prototypes"], results["duplicate prototypes"]) == (
        live.sum(), dead, duplicates) and live.sum() + dead + duplicates == 8
    assert 0 <= results["raised prototypes that respond"] <= 1 and results["raised pairs"] >= 12
    assert results["root mean squared correlation of s"] == pytest.approx(pt.decorrelation_loss(s).sqrt().item(),
                                                                          abs=1e-4)
    assert 0 < results["reconstruction, mean absolute error"] < 2
    assert set(results["diagnosis"]) == {"attribute", "watched"} | FIGURES
    assert (results["diagnosis"]["attribute"], results["diagnosis"]["watched"]) == ("warm hue", "dot")
    for kind in ("unconditional", "conditional"):
        assert results[f"inception, {kind}"] == {} and results[f"Frechet distance (not FID), {kind}"] >= -1e-6


def test_agreement_and_figures_of_a_model_that_knows_all(tmp_path, monkeypatch):
    known = torch.rand(30, 2, generator=seeded()) < 0.5
    data, kept = painted(torch.where(known, 0.6, -0.6), known, "ab"), {}
    judge = reader([0, 1])
    judge.real = pt.moments(pt.features_of(judge.embed, data.images, CPU))
    answers = dict(sample_patronus=data.images, diagnose_patronus={}, raised_prototypes=(0.5, 0.25, 8),
                   reconstruct=torch.ones(12, 1, 4, 4))
    for name, answer in answers.items():
        monkeypatch.setattr(pt, name, lambda *a, answer=answer: answer)
    monkeypatch.setattr(pt, "save_safely", lambda content, path: kept.update(content["results"]))
    cfg = config(dataset="folder", num_samples=12)
    pt.measure_patronus(cfg, Painter(2), {"shape": [1, 4, 4]}, dict(seconds=1.0), [data, data], judge, tmp_path, CPU)
    for name in ("AUROC of s", "agreement, same s and random noise", "agreement, real held-out images"):
        assert kept[name] == {"a": 1, "b": 1}, "every picture shows the traits of the image that s is of"
    assert (kept["raised prototypes that respond, alone"], kept["raised prototypes that respond"]) == (0.5, 0.25)
    assert kept["traits captured (TAD)"] == 2
    assert kept["Frechet distance (not FID), unconditional"] == pytest.approx(0, abs=1e-6)
    assert kept["Frechet distance (not FID), conditional"] > 1e-6


def test_sampling_again_from_a_run(done, tmp_path):
    before = contents(done)
    for name, seed in (("a", 0), ("b", 5)):
        assert pt.main(flags(sample=done, num_samples=7, seed=seed, out=tmp_path / name)) == 0
        assert set(contents(tmp_path / name)) == {"samples.npz", "samples.png"}
    a, b = (np.load(tmp_path / name / "samples.npz") for name in "ab")
    assert a["arr_0"].shape == (7, 16, 16, 3) and (a["s"] != b["s"]).any() and contents(done) == before


def test_explaining_evaluating_and_diagnosing_again(done, tmp_path, capsys, blank):
    before = contents(done)
    assert pt.main(flags(explain=done, out=tmp_path / "e")) == 0
    assert set(contents(tmp_path / "e")) == EXPLAINED | {"explanation.json"}
    told = json.loads((tmp_path / "e" / "explanation.json").read_text())
    assert set(told) == {"emerged at t", "switch"} and list(told["switch"]) == list(pt.SHAPE_ATTRIBUTES)
    assert pt.main(flags(evaluate=done, out=tmp_path / "m")) == 0
    assert set(contents(tmp_path / "m")) == MEASURED | {"diagnosis.png"}
    one, two = metrics(done)["results"], metrics(tmp_path / "m")["results"]
    assert set(one) == set(two)
    assert one["diagnosis"]["moved prototypes"] == two["diagnosis"]["moved prototypes"]
    assert one["AUROC of s"] == pytest.approx(two["AUROC of s"], abs=1e-3)
    capsys.readouterr()
    assert pt.main(flags(diagnose=done, attribute="large", watch="warm hue", out=tmp_path / "d")) == 0
    assert set(contents(tmp_path / "d")) == {"diagnosis.json", "diagnosis.png"}
    found, printed = json.loads((tmp_path / "d" / "diagnosis.json").read_text()), capsys.readouterr().out
    assert (found["attribute"], found["watched"]) == ("large", "warm hue") and set(found) > FIGURES
    assert all(name in printed for name in FIGURES) and contents(done) == before


def test_editing_an_image(done, tmp_path, capsys):
    data, out = pt.load_dataset("shapes", "test", 16), tmp_path / "e"
    Image.fromarray(data.images[3].permute(1, 2, 0).numpy()).save(tmp_path / "image.png")
    words = flags(model=done, edit=tmp_path / "image.png", set="2=3.5, 0=0", out=out)
    assert pt.main(words) == 0
    assert set(contents(out)) == {"edit.png", "edited.png"} and opens(out / "edit.png")
    run, printed = pt.load_run(done, "cpu"), capsys.readouterr().out
    s, xT = pt.invert_images(run.model, run.config, data.images[3:4], CPU)
    assert f"s_2: {s[0, 2]:.2f}, asked 3.50" in printed and f"s_0: {s[0, 0]:.2f}, asked 0.00" in printed
    s[0, 2], s[0, 0] = 3.5, 0
    expected = pt.to_uint8(pt.render(run.model, run.config, s, CPU, xT))[0].permute(1, 2, 0).numpy()
    with Image.open(out / "edited.png") as image:
        assert np.abs(np.array(image).astype(int) - expected).max() <= 1


# ---- going on after an interruption -----------------------------------------------------------------------------

def interrupt_at(patch, step):
    """The run stops dead in this step, after the weights have moved; nothing is saved on the way out."""
    whole = pt.update_average

    def update(average, model, n):
        if n == step and isinstance(model, pt.Patronus):
            raise KeyboardInterrupt
        whole(average, model, n)
    patch.setattr(pt, "update_average", update)


def stop_dead(*a):
    raise KeyboardInterrupt


def assert_same_run(one, other):
    a, b = checkpoint(one), checkpoint(other)
    assert a["step"] == b["step"]
    for part in ("model", "average", "optimizer"):
        assert same(a[part], b[part]), part
    clock = {"images/s", "seconds"}
    rows = [[{k: v for k, v in row.items() if k not in clock} for row in log(folder)] for folder in (one, other)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("start", ["features", "uniform"])
def test_a_run_that_goes_on_is_bit_for_bit_the_one_that_never_stopped(tmp_path, capsys, training_only, start):
    settings = dict(dropout=0.3, steps=7, log_every=1, accumulate=2, start=start)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert pt.main(args(out=whole, **settings)) == 0
    for step in (1, 3, 6):
        with pytest.MonkeyPatch.context() as patch:
            interrupt_at(patch, step)
            assert pt.main(args(out=broken, **settings) if step == 1 else flags(resume=broken)) == 130
        assert f'--resume "{broken}"' in capsys.readouterr().err
        assert checkpoint(broken)["step"] == step // 2 * 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pt, "train_latent", stop_dead)          # all steps taken, no latent model yet
        assert pt.main(flags(resume=broken)) == 130
    assert checkpoint(broken)["average"]["latent.trained_at"] == -1
    assert pt.main(flags(resume=broken)) == 0
    assert_same_run(whole, broken)
    assert checkpoint(broken)["average"]["latent.trained_at"] == 7


def test_more_steps_train_the_latent_model_again(tmp_path, training_only):
    out, whole = tmp_path / "run", tmp_path / "whole"
    assert pt.main(args(out=out, steps=4, warmup=0.0, lr=0.0)) == 0
    first, before = checkpoint(out)["average"], contents(out)
    assert pt.main(flags(resume=out)) == 0                    # nothing to do
    assert contents(out)["checkpoint.pt"] == before["checkpoint.pt"]
    assert pt.main(flags(resume=out, steps=6, lr=1e-2)) == 0
    second = checkpoint(out)["average"]
    assert first["latent.trained_at"] == 4 and second["latent.trained_at"] == 6
    assert not same(first["latent.mean"], second["latent.mean"])
    run, data = pt.load_run(out, "cpu"), pt.load_dataset("shapes", "train", 16)
    assert close(second["latent.mean"], pt.activations(run.model, data.images, CPU).mean(0), atol=1e-3)
    assert pt.main(args(out=whole, steps=2)) == 0 and checkpoint(whole)["step"] == 2


def test_images_that_changed_since_are_not_trained_on(done, tmp_path, monkeypatch, capsys, training_only):
    out = copied(done, tmp_path)
    monkeypatch.setitem(pt.SHAPE_SPLITS, "train", (199, 0))
    refused(capsys, flags(resume=out, steps=8), "have changed")


def copied(done, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.json", "checkpoint.pt", "log.csv"):
        (folder / name).write_bytes((done / name).read_bytes())
    return folder


@pytest.fixture
def stopped(done, tmp_path):
    """A run that was stopped before its latent model."""
    folder = copied(done, tmp_path)
    state = checkpoint(folder)
    state["average"]["latent.trained_at"].fill_(-1)
    torch.save(state, folder / "checkpoint.pt")
    return folder


@pytest.fixture
def begun(tmp_path):
    """A run stopped in its first step: its U-Net's output is still zero."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 0)
        assert pt.main(args(out=tmp_path / "begun")) == 130
    return tmp_path / "begun"


def test_a_run_that_has_just_begun_can_be_diagnosed_or_says_why_not(begun, tmp_path, blank):
    ends(flags(diagnose=begun, out=tmp_path / "d"), 0, 2)


# ---- the comparison ---------------------------------------------------------------------------------------------

def test_a_comparison_runs_three_seeds_of_three_variants_and_goes_on_where_it_stopped(
        tmp_path, capsys, monkeypatch, blank):
    out, names = tmp_path / "compare", ["unbiased", "bias 0.9", "bias 0.9, decorrelated"]
    diagnosed = []

    def diagnose(model, cfg, judge, data, a, b, device):
        diagnosed.append((cfg.seed, cfg.bias, cfg.decorrelation))
        if len(diagnosed) == 5:
            raise KeyboardInterrupt
        leak = [0.0, 0.5, 0.2][(len(diagnosed) - 1) % 3] if len(diagnosed) > 5 else 0.0
        return {"moved prototypes": [0], "change of P(attribute)": 0.5, "change of P(watched)": leak / 2, "leak": leak,
                "leak, 95 % from": leak - 0.1, "leak, 95 % to": leak + 0.1}, None
    monkeypatch.setattr(pt, "diagnose", diagnose)
    monkeypatch.setattr(pt, "draw_diagnosis", blank_picture)
    small = dict(steps=2, bias=0.9, decorrelation=0.3, seed=4)
    assert pt.main([*args(out=out, **small), "--compare"]) == 130
    assert f'--resume "{out}"' in capsys.readouterr().err
    before = {name: data for name, data in contents(out).items() if name.endswith("checkpoint.pt")}
    assert len(before) == 5
    diagnosed[:] = [None] * 5                                 # from here on leaks are 0.2, 0, 0.5, 0.2, ...
    assert pt.main(flags(resume=out)) == 0
    assert diagnosed[5:] == [(seed, *pair) for seed in (4, 5, 6) for pair in ((0.5, 0), (0.9, 0), (0.9, 0.3))]
    after = contents(out)
    assert all(after[name] == data for name, data in before.items()), "what had ended is not trained again"
    result, table = json.loads((out / "comparison.json").read_text()), capsys.readouterr().out
    assert list(result["runs"]) == list(result["table"]) == names and opens(out / "comparison.png")
    for name, leak, difference in zip(names, (0.2, 0.0, 0.5), (0, -0.2, 0.3)):
        assert [run["seed"] for run in result["runs"][name]] == [4, 5, 6] and name in table
        assert result["table"][name]["leak, mean"] == pytest.approx(leak)
        assert result["table"][name]["difference from unbiased"] == pytest.approx([difference] * 3)
    parts = {name.split("/")[0] for name in after if "/" in name.replace("\\", "/")}
    assert len(parts) == 9
    for part in parts:
        saved = json.loads((out / part / "config.json").read_text())
        assert saved["compare"] is False
        assert {f"{part}/{name}" for name in ("checkpoint.pt", "log.csv", "diagnosis.png")} <= set(after)
    biased = pt.load_run(out / "bias-0.9-decorrelated-seed-5", "cpu").config
    assert (biased.bias, biased.decorrelation, biased.seed, biased.steps) == (0.9, 0.3, 5, 2)
    refused(capsys, flags(sample=out), "inside a comparison")


def test_a_comparison_plants_0_95_and_weighs_little_unless_told(tmp_path, monkeypatch, blank):
    seen = []

    def train(cfg, *a, **k):
        seen.append((cfg.bias, cfg.decorrelation))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return None, None, dict(seconds=0.0)
    monkeypatch.setattr(pt, "train_patronus", train)
    monkeypatch.setattr(pt, "diagnose_patronus", lambda *a: {"leak": 0.0})
    assert pt.main([*args(out=tmp_path / "c", decorrelation=0), "--compare"]) == 130
    assert seen == [(0.5, 0), (0.95, 0), (0.95, 0.002)]


# ---- folders ----------------------------------------------------------------------------------------------------

def test_images_without_classes_are_enough(tmp_path, capsys, blank):
    root, out = pictures(tmp_path / "pictures", 90), tmp_path / "run"
    assert pt.main(args(out=out, dataset="folder", data_dir=root, steps=2)) == 0
    assert set(contents(out)) == BASIC
    results = metrics(out)["results"]
    assert not any("AUROC" in name or "agreement" in name or "TAD" in name or "Frechet" in name for name in results)
    assert "diagnosis" not in results and 0 <= results["raised prototypes that respond"] <= 1
    before = contents(tmp_path)
    refused(capsys, flags(diagnose=out, out=tmp_path / "d"), "no attributes or classes")
    assert contents(tmp_path) == before and not (tmp_path / "d").exists()


@pytest.mark.parametrize("n", [30, 4])
def test_few_images_are_enough_or_refused_at_once(tmp_path, blank, n):
    """A tenth of them is held out: three images, or one."""
    root, out = pictures(tmp_path / "pictures", n), tmp_path / "run"
    status = ends(args(out=out, dataset="folder", data_dir=root, steps=2), 0, 2)
    assert set(contents(out)) == BASIC if status == 0 else not out.exists()


def test_classes_are_traits_and_grey_images_stay_grey(tmp_path, blank):
    for name in ("ant", "bee", "cat"):
        for part, n in (("train", 10), ("test", 5)):
            pictures(tmp_path / "p" / part / name, n, grey=True)
    out = tmp_path / "run"
    assert pt.main(args(out=out, dataset="folder", data_dir=tmp_path / "p", steps=2)) == 0
    assert set(contents(out)) == MADE and checkpoint(out)["extra"]["shape"] == [1, 16, 16]
    results = metrics(out)["results"]
    assert list(results["AUROC of s"]) == ["ant", "bee", "cat"] and "mean AUROC of the local ones" not in results
    assert (results["diagnosis"]["attribute"], results["diagnosis"]["watched"]) == ("ant", "cat")
    with np.load(out / "samples.npz") as saved:
        assert saved["arr_0"].shape == (12, 16, 16, 1)
    Image.new("RGB", (20, 30), (200, 100, 30)).save(tmp_path / "colour.png")
    words = flags(model=out, edit=tmp_path / "colour.png", set="1=2", out=tmp_path / "e")
    assert pt.main(words) == 0 and set(contents(tmp_path / "e")) == {"edit.png", "edited.png"}


def test_one_class_is_as_good_as_none_or_refused_at_once(tmp_path, blank):
    pictures(tmp_path / "p" / "only", 70)
    out = tmp_path / "run"
    status = ends(args(out=out, dataset="folder", data_dir=tmp_path / "p", steps=2), 0, 2)
    assert (out / "metrics.json").exists() if status == 0 else not out.exists()


@pytest.mark.parametrize("m", [2, 3])
def test_few_prototypes_run_or_are_refused_at_once(tmp_path, blank, m):
    status = ends(args(out=tmp_path / "run", num_prototypes=m, steps=2), 0, 2)
    assert (tmp_path / "run" / "metrics.json").exists() if status == 0 else not (tmp_path / "run").exists()


# ---- what goes wrong: exit status 2, one sentence ---------------------------------------------------------------

@pytest.mark.parametrize("changes, words", [
    (dict(image_size=8), ["--image-size 8", "16"]),
    (dict(num_prototypes=1), ["--num-prototypes 1"]),
    (dict(prototype_dim=0), ["--prototype-dim 0"]),
    (dict(bias=1.5), ["--bias 1.5"]),
    (dict(start="zero"), ["--start", "uniform"]),
    (dict(distinctness=-1), ["--distinctness"]),
    (dict(decorrelation="nan"), ["--decorrelation"]),
    (dict(latent_timesteps=20), ["--latent-timesteps 20"]),
    (dict(timesteps=30, invert_steps=31, sample_steps=2), ["--invert-steps 31", "--timesteps 30"]),
    (dict(attribute="hat"), ["hat", "warm hue"]),
    (dict(attribute="dot"), ["--attribute", "--watch", "dot"]),
    (dict(watch="warm hue"), ["warm hue"]),
    (dict(set="1=2"), ["--edit", "--model"]),
    (dict(edit="image.png"), ["--edit", "--model"])])
def test_a_setting_that_cannot_be_is_named_and_makes_no_folder(tmp_path, capsys, changes, words):
    refused(capsys, args(out=tmp_path / "run", **changes), *words)
    assert not list(tmp_path.iterdir())


def test_bias_and_comparison_are_for_shapes_alone(tmp_path, capsys):
    root = pictures(tmp_path / "pictures", 20)
    folder = dict(out=tmp_path / "run", dataset="folder", data_dir=root)
    refused(capsys, args(**folder, bias=0.9), "--bias", "folder")
    refused(capsys, [*args(**folder), "--compare"], "--compare", "shapes")
    refused(capsys, args(out=tmp_path / "run", attribute="fur", dataset="shapes"), "fur")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words, expected", [
    ("", ["--set"]), ("2", ["--set 2", "no number"]), ("2=", ["no number"]), ("2=much", ["2=much", "no number"]),
    ("8=1", ["--set 8=1", "0 to 7"]), ("x=1", ["x=1", "0 to 7"]), ("-1=2", ["-1=2", "0 to 7"]),
    ("1.5=2", ["1.5=2"]), ("2=nan", ["--set"]), ("1=inf", ["--set"]), ("1=2,,2=3", ["0 to 7"])])
def test_activations_to_set_must_be_prototypes_and_numbers(done, tmp_path, capsys, words, expected):
    Image.new("RGB", (16, 16)).save(tmp_path / "image.png")
    before = contents(done)
    arguments = [*flags(model=done, edit=tmp_path / "image.png", out=tmp_path / "e"), f"--set={words}"]
    refused(capsys, arguments, *expected)
    assert not (tmp_path / "e").exists() and contents(done) == before


def test_an_image_to_edit_must_be_one(done, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"no image")
    for name in ("missing.png", "broken.png"):
        refused(capsys, flags(model=done, edit=tmp_path / name, set="1=2", out=tmp_path / "e"), name)
    refused(capsys, flags(model=done, out=tmp_path / "e"), "--edit", "--set")
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize("what", ["sample", "evaluate", "explain", "diagnose", "resume", "model"])
def test_a_folder_that_is_no_run_is_named(tmp_path, capsys, what):
    more = dict(edit=tmp_path / "image.png", set="1=2") if what == "model" else {}
    Image.new("RGB", (16, 16)).save(tmp_path / "image.png")
    refused(capsys, flags(**{what: tmp_path / "nothing"}, **more), "nothing", "config.json")
    assert [p.name for p in tmp_path.iterdir()] == ["image.png"]


@pytest.mark.parametrize("what", ["sample", "evaluate"])
def test_a_run_that_has_not_ended_draws_no_activations(stopped, tmp_path, capsys, what):
    before = contents(stopped)
    refused(capsys, flags(**{what: stopped}, out=tmp_path / "s"), "--resume", stopped)
    assert contents(stopped) == before and not (tmp_path / "s").exists()


@pytest.mark.parametrize("what", ["diagnose", "evaluate"])
@pytest.mark.parametrize("changes, words", [
    (dict(attribute="hat"), ["hat", "warm hue"]), (dict(attribute="dot", watch="dot"), ["--attribute", "--watch"])])
def test_traits_that_cannot_be_diagnosed_are_named_before_anything_is_made(
        done, tmp_path, capsys, blank, what, changes, words):
    refused(capsys, flags(**{what: done}, out=tmp_path / "d", **changes), *words)
    assert not list(tmp_path.iterdir())


def test_two_things_at_once_are_refused(done, capsys):
    refused(capsys, flags(sample=done, explain=done), "--sample", "--explain")
    refused(capsys, [*flags(resume=done), "--compare"], "--resume", "--compare")


@pytest.mark.parametrize("name, value", [
    ("num_prototypes", 5), ("prototype_dim", 6), ("bias", 0.9), ("latent_width", 16), ("latent_timesteps", 30),
    ("image_size", 32), ("start", "uniform")])
def test_what_belongs_to_the_run_cannot_change_on_resuming(done, capsys, name, value):
    before = contents(done)
    refused(capsys, flags(resume=done, **{name: value}), f"--{name.replace('_', '-')}", value)
    assert contents(done) == before
