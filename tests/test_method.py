"""The method: diffusion process, samplers, network, prototypes, metrics. Exact answers wherever there is one."""
import dataclasses
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import protodiffusion as pd
from conftest import CPU, awake, checkpoint, close, config, normal, same, seeded

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
    assert close(pd.alpha_bars(T), exact_alpha_bars(T), atol=1e-7) and pd.alpha_bars(T).dtype == torch.float32
    assert (pd.alpha_bars(21) > 0).all()
    with pytest.raises(pd.Stop):
        pd.alpha_bars(20)                                     # 0.02 * 1000 / 20 = 1

def test_every_image_is_noised_at_its_own_level():
    x0, eps, t = normal(3, 2, 2, 2), normal(3, 2, 2, 2, seed=1), torch.tensor([999, 0, 300])
    xt = pd.add_noise(x0, t, eps, pd.alpha_bars(1000))
    for i, a in enumerate(exact_alpha_bars(1000)[t]):
        assert close(xt[i], a.sqrt() * x0[i] + (1 - a).sqrt() * eps[i])

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

def ode_errors(sampler, doublings, s=0.5, mu=0.3, T=16_000):
    """Largest error at level T / 4 - 1, against the exact solution: the probability flow of a Gaussian is affine."""
    abar, seen, errors = exact_alpha_bars(T), {}, []
    noise = gaussian_noise(abar, *torch.tensor([[[mu]], [[s * s]]], dtype=torch.float64))

    def predict(x, t):
        seen[t[0].item()] = x
        return noise(x, t)

    def width(a):
        return (a * s * s + 1 - a) ** 0.5
    xT = torch.linspace(-2, 2, 5, dtype=torch.float64).view(5, 1, 1, 1)
    z, a = (xT - abar[-1].sqrt() * mu) / width(abar[-1]), abar[T // 4 - 1]
    for steps in doublings:
        pd.sample(predict, xT, abar, steps, sampler, clip=False)
        errors.append((seen.pop(T // 4 - 1) - a.sqrt() * mu - width(a) * z).abs().max().item())
    return errors

def test_ddim_is_first_order_and_dpmpp_second_on_the_probability_flow():
    for sampler, low, high in (("ddim", 1.9, 2.1), ("dpmpp", 3.7, 4.7)):
        for a, b in itertools.pairwise(ode_errors(sampler, [128, 256, 512])):
            assert low < a / b < high, f"{sampler}: twice the steps, error {a} and then {b}"

def test_sample_times_trail_from_the_noisiest_level_and_never_repeat():
    for T, steps in ((1000, 1), (1000, 20), (1000, 999), (1000, 1000), (50, 37), (21, 21)):
        times = pd.sample_times(T, steps)
        gaps = [a - b for a, b in itertools.pairwise([*times, -1])]
        assert len(times) == steps and times[0] == T - 1
        assert min(gaps) > 0 and all(abs(gap - T / steps) < 1.01 for gap in gaps), "spacing T / steps"

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
    assert pd.ResBlock(8, 8, 16, 0.0)(x, emb).equal(x) and pd.Attention(8)(x).equal(x)

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
            assert close(layer(x)[b], expected, 1e-4, 1e-4), "Attention: softmax(Q K^T / sqrt(d)) V"

# ---- training ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n, decay", [(0, 0.1), (5, 0.4), (10**6, 0.9999)])
def test_update_average_decays_weights_and_buffers_by_the_formula(n, decay):
    average, model = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    for net, value in ((average, 1), (model, 3)):
        for tensor in net.state_dict().values():
            tensor.fill_(value)
    pd.update_average(average, model, n)
    for name, value in average.state_dict().items():
        expected = 3 if name == "num_batches_tracked" else decay * 1 + (1 - decay) * 3
        assert close(value, torch.full(value.shape, expected), rtol=1e-7), f"{name}: whole numbers are copied"

def test_batches_hold_what_their_index_says_half_of_them_mirrored(monkeypatch):
    cfg = pd.Config(batch_size=400, timesteps=50, mirror=True)
    images, targets, shares = torch.arange(24).view(12, 1, 1, 2).to(torch.uint8), torch.arange(12), []
    batch = pd.random_batch(cfg, images, targets, 3, CPU)
    shown = ((batch.x0 + 1) * 127.5).round()[:, 0, 0]
    assert (shown.amin(1) == 2 * batch.target).all(), "each image comes with its own target"
    assert 150 < (shown[:, 0] > shown[:, 1]).sum() < 250 and batch.x0.abs().max() <= 1
    assert set(batch.t.tolist()) == set(range(50)) and abs(batch.eps.std() - 1) < 0.15
    assert 0 <= batch.chance.min() and batch.chance.max() < 1 and abs(batch.chance.mean() - 0.5) < 0.08
    assert not pd.random_batch(cfg, images, targets, 4, CPU).target.equal(batch.target), "nor are two steps alike"
    plain = pd.random_batch(dataclasses.replace(cfg, mirror=False), images, targets, 3, CPU)
    assert plain.eps.equal(batch.eps) and plain.x0.equal(pd.scaled(images, plain.target, CPU))
    monkeypatch.setattr(pd, "WORLD", 4)
    for rank in range(4):
        monkeypatch.setattr(pd, "RANK", rank)
        shares.append(pd.random_batch(cfg, images, targets, 3, CPU))
    assert all(torch.cat(parts).equal(whole) for parts, whole in zip(zip(*shares), batch)), "of four processes"

class Given(nn.Module):
    """A model whose two groups of parameters have gradients as `now` says."""
    now = (0.0, 0.0)

    def __init__(self):
        super().__init__()
        self.parts = nn.ParameterList(torch.zeros(4) for _ in range(2))
        for i, part in enumerate(self.parts):
            part.register_hook(lambda gradient, i=i: gradient * self.now[i])

    def forward(self, batch, abar, cfg):
        return {"loss": sum(part.sum() for part in self.parts)}

    def param_groups(self):
        return [dict(params=[part]) for part in self.parts]

    def begin(self, cfg, sets, folder, device):
        return dict(targets=sets[0].labels, figures={})

@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_a_step_clips_groups_apart_and_leaves_out_a_gradient_that_is_no_number(tmp_path, monkeypatch, amp):
    monkeypatch.setattr(pd.Config, "build", lambda cfg, known: Given())
    cfg, sets = config(pd, amp=amp), [pd.make_shapes(20, 16)]
    pd.new_run(cfg, sets, tmp_path, CPU)

    def after(steps, *gradients):
        monkeypatch.setattr(Given, "now", gradients)
        pd.train(dataclasses.replace(cfg, steps=steps), sets, tmp_path, CPU)
        return checkpoint(tmp_path)
    first = after(1, 50.0, 0.25)                              # of norms 100 and 0.5
    large, small = (first["optimizer"]["state"][i]["exp_avg"] for i in range(2))
    assert close(large, torch.full((4,), 0.05)), "a tenth of a gradient of norm 1"
    assert close(small, torch.full((4,), 0.025)), "the large one does not make the small one smaller"
    for steps, bad in ((2, math.nan), (3, math.inf)):
        found = after(steps, bad, 1.0)
        assert same(found["model"], first["model"]), "the other group does not move, either"
        assert same(found["optimizer"]["state"], first["optimizer"]["state"]) and found["step"] == steps
    assert amp == "off" or found["scaler"]["scale"] == first["scaler"]["scale"] / 4
    assert not same(after(4, 1.0, 1.0)["model"], first["model"]), "and it goes on"

# ---- prototypes -------------------------------------------------------------------------------------------------

DISTANCES = torch.tensor([[[1.0, 0.3], [0.2, 2.0], [0.9, 0.8]],
                          [[0.1, 0.4], [0.6, 0.7], [1.5, 0.05]]], dtype=torch.float64)     # 2 images, 3 classes, K 2

def test_prototypes_start_at_or_around_class_means_of_untrained_features_centred(monkeypatch):
    losses, data = [], pd.make_shapes(501, 16, seed=1)        # features are computed of 500 at a time
    monkeypatch.setattr(pd, "fit", lambda net, images, labels, loss, *how: losses.append(loss) or net)
    one, two, noise = (pd.learn_prototypes(data, config(pd, prototypes_per_class=K, start=start), CPU)
                       for K, start in ((1, "means"), (2, "means"), (2, "random")))
    for learner, around in ((one, 0), (two, 0.1 * noise.prototypes)):
        z = pd.features_of(learner, data.images, CPU)
        means = torch.stack([z[data.labels == label].mean(0) for label in range(10)])[:, None]
        assert close(z.mean(0), torch.zeros(8), atol=1e-5) and z.std() > 1e-3
        assert close((learner.prototypes - around).detach(), means.expand_as(learner.prototypes), atol=1e-5)
    assert noise.prototypes.std().item() == pytest.approx(0.1, rel=0.2)
    d, y = pd.squared_distances(z[:4], noise.prototypes).detach(), torch.tensor([1, 0, 9, 3])
    assert close(losses[2](z[:4], y).detach(), pd.dce_loss(d, y) + 0.01 * pd.prototype_loss(d, y))

class Means(nn.Module):
    """A PrototypeLearner whose features are the means of the channels."""
    def __init__(self, prototypes=None):
        super().__init__()
        self.prototypes = prototypes

    def forward(self, x):
        return x.mean((2, 3))

def test_an_image_is_given_the_row_of_the_nearest_prototype_of_its_own_class(tmp_path, monkeypatch):
    images = torch.tensor([0, 255, 0, 255], dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 16, 16)    # z: -1 or 1
    sets = [pd.Dataset(images, torch.tensor([0, 0, 1, 1]), ["a", "b"]), "held out"]
    prototypes = torch.tensor([[-0.9, 0.2], [0.8, -1.0]])[:, :, None].expand(2, 2, 3)
    monkeypatch.setattr(pd, "learn_prototypes", lambda *given: Means(prototypes))
    monkeypatch.setattr(pd, "draw_prototypes", lambda path, learner, data, device: {data: 1.0})
    monkeypatch.setattr(pd, "generate", lambda cfg, run, rows: rows)
    monkeypatch.setattr(pd, "judge_images", lambda cfg, run, sets, images, labels: (images.tolist(), labels.tolist()))
    for start, expected in (("unfrozen", [0, 1, 3, 2]), ("random", [0, 0, 2, 2])):
        cfg = config(pd, prototypes=start, prototypes_per_class=2, prototype_dim=3, num_samples=4, scale="raw")
        model = cfg.build(dict(shape=[3, 16, 16], classes=["a", "b"]))
        known = model.begin(cfg, sets, tmp_path, CPU)
        assert known["targets"].tolist() == expected and model.table.weight.std() > 0.4
        assert model.table.weight.equal(prototypes.flatten(0, 1)) == (start == "unfrozen") == bool(known["figures"])
        rows, labels = model.quality(cfg, SimpleNamespace(known=known), sets)[0]
        assert rows == sorted(expected) and labels == [0, 0, 1, 1], "two rows are of one class"

def test_class_table_keeps_directions_and_sets_the_rms_of_a_random_table():
    prototypes = normal(3, 2, 8) * 5 + 1
    raw, rms = pd.class_table(prototypes, "raw"), pd.class_table(prototypes, "rms")
    assert raw.equal(prototypes.reshape(6, 8)) and raw[3].equal(prototypes[1, 1]), "row class * K + k"
    assert close(rms.square().mean(), 1), "rms: root mean square 1"
    assert close(rms, raw / raw.square().mean().sqrt()), "one factor for all rows: their relative norms stay"

def test_a_classifier_sees_images_shifted_by_an_eighth_and_mirrored():
    image, seen = torch.randint(256, (1, 1, 16, 16), generator=seeded()).to(torch.uint8), set()
    padded = F.pad(image / 127.5 - 1, (2, 2, 2, 2), mode="reflect")[0, 0]
    moves = {(i, j, flip): (padded.flip(1) if flip else padded)[i:i + 16, j:j + 16]
             for i in range(5) for j in range(5) for flip in (False, True)}

    class Spy(nn.Linear):
        def forward(self, x):
            seen.update(name for name, move in moves.items() if close(x[0, 0], move))
            return x.mean() * self.weight
    net = pd.fit(Spy(1, 1), image, torch.zeros(1), lambda z, y: z.sum(), 150, config(pd, mirror=True), 0)
    assert len(seen) > 35 and {flip for *_, flip in seen} == {False, True}
    assert not net.training and not net.weight.requires_grad

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
    with torch.no_grad():
        model.table.weight.mul_(-50).add_(7)
        model.mlp[2].bias.add_(3)
        after, plain = model.denoise(x, t, row), model.unet(x, t)
    for found in (before.detach(), after):
        assert close(found[:2], plain[:2], 1e-5), "row -1: the zero vector after the MLP"
    assert not close(after[2:], before[2:].detach(), 1e-3) and not close(after[2:], plain[2:], 1e-3)

def test_unfrozen_prototypes_train_at_every_step_and_frozen_ones_stay(tmp_path, monkeypatch):
    tables, starts, update = [], [], pd.update_average
    monkeypatch.setattr(pd, "update_average", lambda average, model, n: (
        update(average, model, n), tables.append(model.table.weight.detach().clone())))
    for prototypes in ("unfrozen", "frozen", "random"):
        cfg, folder = config(pd, prototypes=prototypes, steps=4, save_every=9), tmp_path / prototypes
        sets = pd.load_sets(cfg)
        pd.new_run(cfg, sets, folder, CPU)
        start = checkpoint(folder)["model"]
        pd.train(cfg, sets, folder, CPU)
        end = checkpoint(folder)
        steps = itertools.pairwise([start.pop("table.weight"), *tables[-4:]])
        assert [not a.equal(b) for a, b in steps] == [prototypes != "frozen"] * 4
        assert not any(value.equal(end["model"][name]) for name, value in start.items()), "all else trains"
        assert [group["lr"] for group in end["optimizer"]["param_groups"]] == [pd.learning_rate(3, cfg)] * 2
        starts.append(start)
    assert same(starts[0], starts[1]) and same(starts[0], starts[2]), "the same network whatever the prototypes"

def test_the_class_is_hidden_where_chance_is_below_null_prob():
    (model, cfg, eps, t), rows = small_model(), []
    model.denoise = lambda xt, t, row: rows.append(row.tolist()) or torch.zeros_like(xt)
    batch = pd.Batch(torch.zeros_like(eps), torch.arange(4), t, eps, torch.tensor([0.19, 0.21, 0, 0.99]))
    for null_prob in (0.2, 0.0, 1.0):
        losses = model(batch, pd.alpha_bars(1000), dataclasses.replace(cfg, null_prob=null_prob))
        assert close(losses["loss"], eps.square().mean())
    assert rows == [[-1, 1, -1, 3], [0, 1, 2, 3], [-1] * 4]

# ---- metrics ----------------------------------------------------------------------------------------------------

def test_frechet_distance_where_covariances_do_not_commute():
    one, two = normal(2, 4, 4, dtype=torch.float64)
    s1, s2, mu = one @ one.T, two @ two.T, torch.arange(4.0).double()
    root = torch.linalg.eigvals(s1 @ s2).sqrt().real.sum()    # similar to the symmetric product: the same eigenvalues
    expected = (14 + s1.trace() + s2.trace() - 2 * root).item()
    assert pd.frechet_distance(0 * mu, s1, mu, s2) == pytest.approx(expected)

def test_judge_images_counts_what_is_recognised_and_measures_from_the_real_moments(monkeypatch):
    images = torch.zeros(4, 3, 2, 2, dtype=torch.uint8)
    for i, channel in enumerate((0, 0, 1, 1)):
        images[i, channel] = 255
    judge = nn.Sequential(Means(), nn.Identity())             # features in [-1, 1]
    real = torch.full((3,), -1.0).double(), torch.zeros(3, 3).double()
    monkeypatch.setattr(pd, "load_judge", lambda cfg, data, device: (judge, real) if data == "train" else None)
    run, labels = SimpleNamespace(device=CPU), torch.tensor([0, 1, 1, 1])
    found = pd.judge_images(config(pd), run, ["train", "test"], images, labels)
    # means (0, 0, -1): squared distance 2 to the real mean; variances (4/3, 4/3, 0) against none
    assert found["accuracy"] == 0.75 and close(found["frechet"], 2 + 8 / 3, 1e-5)

def test_the_distance_of_real_images_is_of_as_many_as_samples(tmp_path, monkeypatch):
    test, judged = pd.Dataset(torch.arange(9), torch.arange(9) * 10, ["a"]), []
    monkeypatch.setattr(pd, "judge_images", lambda cfg, run, sets, *given: judged.extend(given) or dict(frechet=2.0))
    monkeypatch.setattr(pd, "save_samples", lambda *given: None)
    monkeypatch.setattr(pd, "write_metrics", lambda cfg, run, figures, folder: judged.append(figures))
    run = SimpleNamespace(model=SimpleNamespace(quality=lambda *given: (dict(frechet=1.0), 0, 0)), step=6, device=CPU)
    pd.evaluate_classes(config(pd, num_samples=5), run, [test, test], tmp_path)
    images, labels, figures = judged
    assert figures == dict(frechet=1.0, real_frechet=2.0) and labels.equal(images * 10)
    assert len({*images.tolist()}) == 5 and images.tolist() != sorted(images.tolist()), "any five"

def test_figures_of_prototypes_are_of_all_classes_and_the_picture_names_forty_at_their_images(tmp_path, monkeypatch):
    images, labels, figures = torch.zeros(45, 3, 2, 2, dtype=torch.uint8), torch.arange(45), []
    images[:, 0] = 5 * labels.view(45, 1, 1)                  # features lie on a line, as far apart as classes
    labels[3] = 2                                             # class 3 has no image
    z = images.float().mean((2, 3)) / 127.5 - 1
    data = pd.Dataset(images, labels, [f"class {c}" for c in range(45)])
    monkeypatch.setattr(pd.Figure, "savefig", lambda figure, *a, **k: figures.append(figure))
    found = pd.draw_prototypes(tmp_path / "p.png", Means(z[:, None].expand(45, 2, 3)), data, CPU)
    apart = 5 / 127.5 * (45 - 1 / 45) / 3                     # the mean of |i - j| over n numbers is (n - 1 / n) / 3
    assert close([*found.values()], [44 / 45, z.norm(dim=1).mean(), apart])
    axes = figures[0].axes[0]
    points = torch.from_numpy(axes.collections[0].get_offsets().data.copy()).float()
    names = {text.get_text(): torch.tensor(text.xyann).float() for text in axes.texts}
    assert [*names] == data.classes[:40] and names["class 3"].isfinite().all()
    assert all(close(names[f"class {c}"], points[labels == c].mean(0), 1e-4) for c in (0, 2, 39))

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
        self.fc = nn.Linear(3, 4)

    def forward(self, x):
        return self.fc(x.mean((2, 3)))

def test_inception_metrics_compare_with_all_real_images_and_are_named_by_their_number(tmp_path, monkeypatch, capsys):
    torch.save(StandIn().state_dict(), tmp_path / "weights.pth")
    monkeypatch.setattr(pd, "fid_inception", StandIn)
    cfg = config(pd, data_dir=tmp_path, inception=str(tmp_path / "weights.pth"))
    real = torch.randint(256, (30, 1, 4, 4), generator=seeded()).to(torch.uint8)            # grey
    equal, darker, again = (pd.inception_metrics(cfg, *images, CPU)
                            for images in ((real, real), (real // 2, real), (real, real // 2)))
    assert list(equal) == ["fid_0.03k", "kid_0.03k", "kid_0.03k_std", "is_0.03k", "is_0.03k_std"]
    assert abs(equal["fid_0.03k"]) < 1e-5 and equal["kid_0.03k"] < 0.01 and equal["is_0.03k"] > 1
    z, other = (images.expand(-1, 3, -1, -1).float().mean((2, 3)) / 127.5 - 1 for images in (real, real // 2))
    assert close(darker["fid_0.03k"], pd.frechet_distance(*pd.moments(other), *pd.moments(z)), 1e-5)
    assert close(again["fid_0.03k"], darker["fid_0.03k"], 1e-5), "other real images are measured anew"
    assert pd.inception_metrics(dataclasses.replace(cfg, inception="off"), real, real, CPU) == {}
    assert "not computed" in capsys.readouterr().out
    with pytest.raises(pd.Stop, match="nowhere.pth"):
        pd.load_inception("nowhere.pth")
