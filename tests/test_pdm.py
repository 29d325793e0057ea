"""PDM and s-PDM: what pdm.py does not share with the other scripts. Exact answers wherever there is one."""
import copy
import dataclasses
import functools
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

import pdm
from test_runs import checkpoint, contents, flags, log, same

CPU = torch.device("cpu")
SETTINGS = dict(
    dataset="shapes", image_size=16, channels=8, multipliers="1,2", blocks=1, attention=8, dropout=0.1, timesteps=1000,
    num_prototypes=4, prototype_dim=8, judge_steps=3, judge_width=4, steps=6, batch_size=8, accumulate=1, lr=2e-3,
    log_every=2, save_every=2, eval_every=3, num_samples=12, sample_steps=2, sampler="dpmpp", guidance=0.5, seed=0,
    amp="off", device="cpu", inception="off")
BASIC = {"config.json", "log.csv", "checkpoint.pt", "metrics.json", "samples.png", "samples.npz", "denoising.png",
         "curves.png"}
MADE = BASIC | {"prototypes.png", "features.png", "usage.png"}


def args(**changes):
    return flags(**{**SETTINGS, **changes})


def config(**changes):
    return pdm.Config(**{**SETTINGS, **changes})


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def close(a, b, atol=1e-6, rtol=1e-5):
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    return a.shape == b.shape and torch.allclose(a, b, rtol, atol)


def variable(values):
    return torch.tensor(values, dtype=torch.float32, requires_grad=True)


def awake(model, seed=0):
    """Weights that start at zero become random, so that something passes."""
    for p in model.parameters():
        if p.dim() > 1 and not p.any():
            nn.init.normal_(p, 0, 0.3, seeded(seed))
    return model


def network(classes=4, **changes):
    torch.manual_seed(0)
    return config(**changes).build(dict(shape=[3, 16, 16], classes=list("abcdefghij"[:classes]), images=100))


def learner(prototypes, **changes):
    """A PDM whose images are their own features: [B, D]."""
    prototypes = torch.tensor(prototypes, dtype=torch.float32)
    model = pdm.PDM(nn.Identity(), 3, 16, *prototypes.shape, **changes)
    model.encoder = nn.Flatten()
    model.prototypes.data.copy_(prototypes)
    return model


def inputs(n=4, seed=1):
    return torch.randn(n, 3, 16, 16, generator=seeded(seed)), torch.randint(1000, (n,), generator=seeded(seed + 1))


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """One thread, small sets of shapes, one timed round."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pdm, "SHAPE_SPLITS", {"train": (200, 0), "test": (60, 1), "judge": (200, 2)})
        patch.setattr(pdm, "measure_cost", functools.partial(pdm.measure_cost, rounds=1))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run of PDM, which tests only read."""
    folder = tmp_path_factory.mktemp("done") / "run"
    assert pdm.main(args(out=folder)) == 0
    return folder


@pytest.fixture(scope="module")
def supervised(tmp_path_factory):
    """A finished run of s-PDM, which tests only read."""
    folder = tmp_path_factory.mktemp("supervised") / "run"
    assert pdm.main([*args(out=folder), "--supervised"]) == 0
    return folder


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    """A finished run without conditioning, which tests only read."""
    folder = tmp_path_factory.mktemp("baseline") / "run"
    assert pdm.main(args(out=folder, conditioning="none")) == 0
    return folder


@pytest.fixture
def training_only(monkeypatch):
    for name in ("measure_pdm", "draw_curves"):
        monkeypatch.setattr(pdm, name, lambda *a: None)


@pytest.fixture
def figures(monkeypatch):
    """What is drawn is kept, not written."""
    kept = []

    class Kept(pdm.Figure):
        def savefig(self, *a, **k):
            kept.append(self)
    monkeypatch.setattr(pdm, "Figure", Kept)
    return kept


def flat_folder(root, n):
    """n images, no classes."""
    root.mkdir()
    random = np.random.default_rng(0)
    for i in range(n):
        Image.fromarray(random.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(root / f"{i}.png")
    return root


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def samples(folder):
    with np.load(folder / "samples.npz") as saved:
        return saved["arr_0"], saved["arr_1"]


def refused(capsys, arguments, *words):
    """main ends with status 2 and one sentence on stderr that has all the words."""
    capsys.readouterr()
    try:
        status = pdm.main([str(a) for a in arguments])
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.strip() and not line.startswith(("usage:", " "))]
    assert status == 2 and len(lines) == 1, captured.err
    assert "Traceback" not in captured.err and lines[0].startswith(("pdm:", "python pdm.py:"))
    for word in words:
        assert str(word) in lines[0], lines[0]


# ---- settings ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, size, K, D", [
    ("shapes", 16, 4, 64), ("cifar10", 32, 15, 256), ("stl10", 64, 10, 256), ("eurosat", 64, 10, 256),
    ("celeba", 64, 2, 256), ("tiny-imagenet", 64, 200, 256), ("fashion-mnist", 32, 10, 256), ("folder", 32, 15, 256)])
def test_every_set_has_its_number_of_prototypes_and_the_weights_of_the_paper(name, size, K, D):
    cfg = pdm.parse_config(["--dataset", name])
    assert (cfg.image_size, cfg.num_prototypes, cfg.prototype_dim) == (size, K, D)
    assert (cfg.tau, cfg.alignment, cfg.compactness, cfg.null_prob, cfg.timesteps) == (1, 1, 1, 0.1, 1000)
    assert (cfg.attend, cfg.start, cfg.frequency, cfg.revive) == ("one", "features", "usage", False)


def test_build_makes_the_asked_prototypes_and_s_pdm_one_a_class():
    assert network().prototypes.shape == (4, 8) and network().bias is None
    assert network(classes=7, supervised=True).prototypes.shape == (7, 8)
    assert network(attend="all").bias.shape == () and isinstance(network(conditioning="none"), pdm.Unconditional)
    model = network(tau=3.0, revive=True)
    assert (model.tau, model.revive, model.images) == (3, True, 100)
    assert model.prototypes.abs().max() <= 0.1 and model.prototypes.std() > 0.03, "the paper's start"


def test_variants_start_with_the_same_unet(monkeypatch):
    monkeypatch.setattr(pdm, "train", lambda cfg, model, *a: (model, dict(rows=[])))
    data = pdm.load_dataset("shapes", "train", 16)
    one, two, three = (pdm.train_pdm(config(**changes), pdm.Path("nowhere"), [data], CPU)[0].unet.state_dict()
                       for changes in ({}, dict(conditioning="none"), dict(supervised=True)))
    assert same(one, two) and same(one, three)


def test_the_encoder_has_its_own_rate(tmp_path, training_only):
    model = network()
    rest, slow = model.param_groups(config(encoder_lr=0.25))
    assert {id(p) for p in slow["params"]} == {id(p) for p in model.encoder.parameters()}
    assert len(rest["params"]) + len(slow["params"]) == len(list(model.parameters()))
    assert (rest["factor"], slow["factor"]) == (1, 0.25)
    assert pdm.main([*args(out=tmp_path / "run", weight_decay=0), "--encoder-lr", "0"]) == 0
    ended = checkpoint(tmp_path / "run")["model"]
    torch.manual_seed(0)
    started = config().build(dict(shape=[3, 16, 16], classes=list("abcdefghij"), images=200))
    data = pdm.load_dataset("shapes", "train", 16)
    started.begin(data.images, None, config(), CPU)
    assert all(torch.equal(p, ended[f"encoder.{name}"]) for name, p in started.encoder.named_parameters())
    assert not torch.equal(started.prototypes, ended["prototypes"])


# ---- features, distances, losses --------------------------------------------------------------------------------

def test_the_encoder_is_four_halving_convolutions_and_a_mean_over_pixels():
    net = pdm.feature_encoder(3, 8)
    kinds = [type(layer).__name__ for layer in net]
    assert kinds == ["Conv2d", "ReLU", "Conv2d", "BatchNorm2d", "ReLU", "Conv2d", "BatchNorm2d", "ReLU", "Conv2d",
                     "AdaptiveAvgPool2d", "Flatten"]
    convs = [layer for layer in net if isinstance(layer, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels) for c in convs] == [(3, 64), (64, 128), (128, 256), (256, 8)]
    assert all((c.kernel_size, c.stride, c.padding) == ((4, 4), (2, 2), (1, 1)) for c in convs)
    x = torch.randn(2, 3, 48, 48, generator=seeded())
    assert net[:9](x).shape == (2, 8, 3, 3) and net(x).shape == (2, 8)


def test_features_are_the_mean_of_the_last_map():
    net, x = pdm.feature_encoder(1, 6).eval(), torch.randn(2, 1, 32, 32, generator=seeded())
    assert close(net(x).detach(), net[:9](x).mean((2, 3)).detach())


def test_distances_are_not_squared():
    z, e = torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([[3.0, 4.0], [0.0, 0.0], [6.0, 8.0]])
    assert close(pdm.distances(z, e), [[5, 0, 10], [0, 5, 5]])


def test_distances_are_exact_far_from_the_origin_and_float32_from_half():
    z, e = torch.full((40, 2), 1000.0), torch.full((40, 2), 1000.0)
    e[:, 1] += 0.0625
    assert (pdm.distances(z, e) == 0.0625).all(), "no product of matrices, which would cancel"
    assert pdm.distances(z.bfloat16(), e.bfloat16()).dtype == torch.float32


def test_contrastive_loss_is_the_cross_entropy_of_negative_distances():
    d, k = torch.tensor([[1.0, 2.0], [3.0, 1.5]]), torch.tensor([0, 1])
    for tau in (1.0, 2.0):
        expected = (math.log(1 + math.exp(-tau)) + math.log(1 + math.exp(-1.5 * tau))) / 2
        assert close(pdm.contrastive_loss(d, k, tau), expected)
    assert close(pdm.contrastive_loss(torch.full((3, 5), 2.0), torch.tensor([0, 3, 4]), 1.0), math.log(5))


def test_contrastive_gradient_draws_z_to_its_prototype_and_pushes_the_others():
    z, e, tau = variable([[0.0, 0.0]]), variable([[3.0, 0.0], [-4.0, 0.0]]), 0.7            # distances 3 and 4
    pdm.contrastive_loss(pdm.distances(z, e), torch.tensor([0]), tau).backward()
    p = 1 / (1 + math.exp(tau))                               # of the other prototype
    assert close(z.grad, [[-2 * tau * p, 0]])
    assert close(e.grad, [[tau * p, 0], [tau * p, 0]]), "downhill: the chosen to z, the other away"


def test_contrastive_gradient_is_a_number_where_z_is_its_prototype():
    z, e = variable([[1.0, 2.0]]), variable([[1.0, 2.0], [4.0, 6.0]])
    pdm.contrastive_loss(pdm.distances(z, e), torch.tensor([0]), 1.0).backward()
    assert z.grad.isfinite().all() and e.grad.isfinite().all()


def test_alignment_loss_is_a_mean_over_elements_that_moves_features_and_prototypes():
    z, e = variable([[1.0, 2.0], [3.0, 4.0]]), variable([[0.0, 0.0], [5.0, 5.0], [1.0, 1.0]])
    loss = pdm.alignment_loss(z, e, torch.tensor([0, 2]))
    loss.backward()
    assert close(loss.detach(), (1 + 4 + 4 + 9) / 4)
    assert close(z.grad, [[0.5, 1], [1, 1.5]]), "2 (z - e) / 4"
    assert close(e.grad, [[-0.5, -1], [0, 0], [-1, -1.5]]), "no stop-gradient"


@pytest.mark.parametrize("rows, expected", [
    ([[2.0, 0, 0], [0, 3, 0], [0, 0, 0.5]], 0),
    ([[1.0, 2, 3]] * 4, 12),                                  # K (K - 1): not normalised by K
    ([[1.0, 2, 3], [-2, -4, -6]], 2),                         # opposite is as bad as equal
    ([[1.0, 0], [1, 1], [0, 1]], 2 * (0.5 + 0 + 0.5)),
    ([[7.0, 1]], 0)])
def test_compactness_loss_is_the_sum_of_squared_cosines_off_the_diagonal(rows, expected):
    rows = torch.tensor(rows)
    assert close(pdm.compactness_loss(rows), expected)
    scale = torch.linspace(0.5, 20, len(rows))[:, None]
    assert close(pdm.compactness_loss(scale * rows), expected), "lengths do not matter"


def test_compactness_gradient_turns_prototypes_apart():
    # rows at angles 0 and 60 degrees, lengths 1 and 2: the loss is 2 cos^2, its derivative by the angle -2 sin(120)
    e = variable([[1.0, 0.0], [1.0, math.sqrt(3)]])
    loss = pdm.compactness_loss(e)
    loss.backward()
    assert close(loss.detach(), 0.5)
    assert close(e.grad, [[0, math.sqrt(3)], [0.75, -math.sqrt(3) / 4]])


# ---- the choice of a prototype ----------------------------------------------------------------------------------

CORNERS = [[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]]


def test_pdm_chooses_the_nearest_prototype_and_s_pdm_the_labels():
    z = torch.tensor([[9.0, 1.0], [1.0, 1.0], [2.0, 7.0], [6.0, 0.0]])
    k, losses, _ = learner(CORNERS).learn(z, None)
    assert k.tolist() == [1, 0, 2, 1] and set(losses) == {"contrastive", "alignment", "compactness"}
    label = torch.tensor([2, 2, 0, 1])
    k, losses, _ = learner(CORNERS).learn(z, label)
    assert k.equal(label) and set(losses) == {"contrastive", "alignment"}, "s-PDM has no compactness loss"


def test_learn_gives_the_losses_of_the_choice_with_its_sharpness():
    z, model = torch.tensor([[9.0, 1.0], [2.0, 7.0]]), learner(CORNERS, tau=0.3)
    for label in (None, torch.tensor([0, 1])):
        k, losses, _ = model.learn(z, label)
        d = (z[:, None] - model.prototypes).square().sum(2).sqrt()
        assert close(losses["contrastive"].detach(), F.cross_entropy(-0.3 * d, k).detach())
        assert close(losses["alignment"].detach(), (z - model.prototypes[k]).square().mean().detach())
    assert close(model.learn(z, None)[1]["compactness"].detach(), 0)


def test_learn_stays_in_float32_under_mixed_precision():
    prototypes, z = (torch.randn(n, 8, generator=seeded(n)) for n in (3, 5))
    model = learner(prototypes.tolist(), images=99)
    losses = model.learn(z, None)[1]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model.learn(z, None)[1]
        statistics = network().learn(inputs()[0], None)[2]
    assert same(losses, mixed) and all(v.dtype == torch.float32 for v in [*mixed.values(), *statistics.values()])


def test_choose_gives_features_and_the_nearest_prototype_beyond_one_chunk():
    model, images = learner(CORNERS), torch.zeros(1003, 2, dtype=torch.uint8)
    images[1001, 1], images[5, 0] = 255, 255
    model.prototypes.data.copy_(torch.tensor([[-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]]))
    z, k = model.choose(images, CPU)
    assert close(z, images.float() / 127.5 - 1)
    assert k[5] == 1 and k[1001] == 2 and (k == 0).sum() == 1001 and k.dtype == torch.int64


def test_statistics_by_hand():
    model = learner(CORNERS, images=1000)
    model.counts.copy_(torch.tensor([1, 0, 0]))
    model.usage.copy_(torch.tensor([1, 0, 0]))
    _, _, statistics = model.learn(torch.tensor([[0.0, 0.0], [9.0, 3.0]]), None)
    assert close(statistics["variance of z"], 4.5 ** 2 + 1.5 ** 2), "summed over dimensions, divided by B"
    perplexity = math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))                   # shares 3/4, 1/4, 0
    assert close(statistics["usage perplexity"], perplexity) and statistics["dead prototypes"] == 1


def test_counts_begin_again_when_an_epoch_is_full():
    model, seen = learner(CORNERS, images=8), []
    for k in ([0, 0, 1, 0], [1, 1, 1, 1], [2, 2, 2, 0], [0, 0, 0, 0], [1, 1, 1, 1]):
        model.count(torch.tensor(k))
        seen.append((model.counts.tolist(), model.usage.tolist()))
    assert seen == [([3, 1, 0], [0, 0, 0]), ([3, 5, 0], [0, 0, 0]), ([1, 0, 3], [3, 5, 0]), ([5, 0, 3], [3, 5, 0]),
                    ([0, 4, 0], [5, 0, 3])]


def test_every_choice_is_counted_once_in_training_and_never_elsewhere():
    model = learner(CORNERS, images=100)
    model.learn(torch.tensor([[9.0, 1.0], [1.0, 1.0], [8.0, 0.0]]), None)
    assert model.counts.tolist() == [1, 2, 0]
    model.learn(torch.zeros(3, 2), torch.tensor([2, 2, 1]))
    assert model.counts.tolist() == [1, 3, 2]
    model.choose(torch.zeros(5, 2, dtype=torch.uint8), CPU)
    assert model.counts.tolist() == [1, 3, 2] and model.usage.tolist() == [0, 0, 0]


# ---- dead prototypes --------------------------------------------------------------------------------------------

BATCH = [[0.0, 1.0], [9.0, 0.0], [0.0, 4.0], [5.0, 0.0]]     # distances to the nearest of CORNERS: 1, 1, 4, 5


@pytest.mark.parametrize("counts, moved", [
    ([5, 3, 0], {2: 3}),                                      # the dead one to the farthest image
    ([8, 0, 0], {1: 3, 2: 2}),                                # two: the farthest first
    ([4, 3, 0], {}),                                          # the epoch is not over
    ([3, 3, 2], {})])                                         # nobody is dead
def test_reviving_moves_the_dead_to_the_farthest_images_at_the_end_of_an_epoch(counts, moved):
    model, z = learner(CORNERS, images=8, revive=True), torch.tensor(BATCH)
    model.counts.copy_(torch.tensor(counts))
    k, losses, _ = model.learn(z, None)
    expected = torch.tensor(CORNERS)
    for row, image in moved.items():
        expected[row] = z[image]
        assert k[image] == row, "the choice comes after the move"
    assert model.prototypes.equal(expected)
    sum(losses.values()).backward()
    assert model.prototypes.grad.isfinite().all()


@pytest.mark.parametrize("revive, label", [(False, None), (True, torch.tensor([0, 1, 0, 1]))])
def test_nothing_moves_unasked_nor_under_labels(revive, label):
    model = learner(CORNERS, images=8, revive=revive)
    model.counts.copy_(torch.tensor([5, 3, 0]))
    model.learn(torch.tensor(BATCH), label)
    assert model.prototypes.equal(torch.tensor(CORNERS)) and model.usage.tolist() == [5, 3, 0]


def test_more_dead_than_images_all_move_to_images():
    model = learner([[0.0, 0.0], *[[50.0, 50.0]] * 4], images=8, revive=True)
    model.counts.copy_(torch.tensor([8, 0, 0, 0, 0]))
    z = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    model.move_dead(z)
    assert model.prototypes.tolist() == [[0, 0], [2, 0], [1, 0], [1, 0], [1, 0]]


def test_reviving_changes_training_only_from_the_second_epoch_on(tmp_path, monkeypatch, training_only):
    monkeypatch.setitem(pdm.SHAPE_SPLITS, "train", (24, 0))                                 # three steps an epoch
    for steps, alike in ((3, True), (4, False)):
        states = []
        for word in ("--revive", "--no-revive"):
            out = tmp_path / f"{steps}{word}"
            assert pdm.main([*args(out=out, start="uniform", steps=steps, warmup=0, lr=1e-5), word]) == 0
            states.append(checkpoint(out)["model"]["prototypes"])
        assert same(*states) == alike, "from a uniform start some are dead"


# ---- where prototypes start -------------------------------------------------------------------------------------

def test_spread_points_are_points_one_from_every_far_cluster():
    centres = 100 * torch.eye(5)
    z = (centres[:, None] + 0.1 * torch.randn(5, 20, 5, generator=seeded())).flatten(0, 1)
    for seed in range(10):
        found = pdm.spread_points(z, 5, seed)
        assert all((z == row).all(1).any() for row in found), "features of real images"
        assert sorted(found.argmax(1).tolist()) == [0, 1, 2, 3, 4]


def test_spread_points_follow_from_the_seed():
    z = torch.randn(50, 3, generator=seeded())
    found = [pdm.spread_points(z, 4, seed) for seed in (0, 0, 1)]
    assert found[0].equal(found[1]) and not found[0].equal(found[2])
    assert len({row for seed in range(20) for row in pdm.spread_points(z, 1, seed)[:, 0].tolist()}) > 8


def test_spread_points_are_drawn_by_squared_distance():
    z = torch.tensor([[0.0], [1.0], [3.0]])
    second = [b for a, b in (pdm.spread_points(z, 2, seed)[:, 0].tolist() for seed in range(1000)) if a == 0]
    assert len(second) > 250 and 0 not in second
    assert second.count(1) / len(second) == pytest.approx(1 / 10, abs=0.06), "1 and 9 of 10; by distance it were 1 of 4"


def test_spread_points_may_be_more_than_there_are():
    assert pdm.spread_points(torch.tensor([[1.0], [2.0]]), 5, 0).shape == (5, 1)


def begun(**changes):
    cfg, data = config(**changes), pdm.load_dataset("shapes", "train", 16)
    model = network(10, **changes)
    labels = data.labels if cfg.supervised else None
    model.begin(data.images, labels, cfg, CPU)
    index = pdm.random_index(data.images, 200, cfg.seed, 8)
    with torch.no_grad():
        z = model.train().encoder(data.images[index].float() / 127.5 - 1)
    return model.prototypes.detach(), z, data.labels[index]


def test_k_means_finds_clusters_of_any_size_in_spite_of_unlucky_starts():
    corners = torch.tensor([[0.0, 0], [10, 0], [0, 10], [11, 11]])
    sizes = (200, 5, 30, 3)
    points = torch.cat([c + 0.1 * torch.randn(n, 2, generator=torch.Generator().manual_seed(n))
                        for c, n in zip(corners, sizes)])
    centres = pdm.k_means(points, 4, 0)
    means = torch.stack([part.mean(0) for part in points.split(sizes)])
    assert close(centres[pdm.distances(means, centres).argmin(1)], means, 1e-4)
    assert pdm.k_means(points, 4, 0).equal(centres)


def test_prototypes_of_pdm_start_at_centres_of_features_whose_mean_is_zero():
    prototypes, z, _ = begun()
    assert close(z.mean(0), torch.zeros(8), 1e-5), "or all of them would point one way"
    k = pdm.distances(z, prototypes).argmin(1)
    assert close(prototypes, torch.stack([z[k == i].mean(0) for i in range(4)]), 1e-4), "each the mean of its own"


def test_prototypes_of_s_pdm_start_at_the_mean_of_their_class():
    prototypes, z, labels = begun(supervised=True)
    assert close(prototypes, torch.stack([z[labels == c].mean(0) for c in range(10)]), 1e-5)


def test_a_uniform_start_and_no_conditioning_ask_no_image(monkeypatch):
    monkeypatch.setattr(pdm, "train", lambda cfg, model, *a: (model, dict(rows=[])))
    data, path = pdm.load_dataset("shapes", "train", 16), pdm.Path("nowhere")
    features = pdm.train_pdm(config(), path, [data], CPU)[0]
    assert features.prototypes.abs().max() > 0.1
    monkeypatch.setattr(pdm.PDM, "begin", lambda *a: pytest.fail("asked"))
    uniform = pdm.train_pdm(config(start="uniform"), path, [data], CPU)[0]
    assert uniform.prototypes.abs().max() <= 0.1
    pdm.train_pdm(config(conditioning="none"), path, [data], CPU)


# ---- attention --------------------------------------------------------------------------------------------------

def attention_layer(channels=16, dim=6):
    torch.manual_seed(0)
    return awake(pdm.PrototypeAttention(channels, dim)).requires_grad_(False)


def attended(layer, h, tokens, bias):
    """By hand, head after head: softmax(q k / sqrt(c) + bias) v."""
    q = layer.q(layer.norm(h).flatten(2).transpose(1, 2))
    k, v = layer.kv(tokens).chunk(2, -1)
    c, heads = h.shape[1] // layer.heads, []
    for s in (slice(i, i + c) for i in range(0, h.shape[1], c)):
        logits = q[..., s] @ k[..., s].transpose(1, 2) / math.sqrt(c) + bias[:, None]
        heads.append(logits.softmax(-1) @ v[..., s])
    return h + layer.out(torch.cat(heads, -1)).transpose(1, 2).view_as(h)


@pytest.mark.parametrize("channels, heads", [(16, 8), (128, 8), (12, 4), (4, 4)])
def test_attention_has_eight_heads_or_as_many_as_divide(channels, heads):
    assert pdm.PrototypeAttention(channels, 6).heads == heads


def test_one_key_adds_the_same_vector_at_every_pixel_whatever_they_hold():
    layer, tokens = attention_layer(), torch.randn(2, 1, 6, generator=seeded())
    v = layer.kv(tokens[:, 0])[:, 16:]
    expected = layer.out(v)[:, :, None, None].expand(2, 16, 4, 4)
    for seed in (1, 2):
        h = torch.randn(2, 16, 4, 4, generator=seeded(seed))
        added = layer(h, tokens) - h
        assert close(added, expected, 1e-5), "out(v): the softmax over one key is 1"
        assert added.std() > 0.05 and (added - added[:, :, :1, :1]).abs().max() < 1e-5


def test_one_key_gives_the_queries_no_gradient():
    layer = attention_layer().requires_grad_(True)
    layer(*(torch.randn(shape, generator=seeded()) for shape in ((2, 16, 4, 4), (2, 1, 6)))).square().sum().backward()
    assert layer.q.weight.grad.abs().max() < 1e-5 < layer.kv.weight.grad[16:].abs().max()
    assert layer.kv.weight.grad[:16].abs().max() < 1e-5, "nor the keys"


def test_several_keys_are_a_plain_softmax_and_differ_from_pixel_to_pixel():
    layer, bias = attention_layer(), torch.tensor([[0.0, 1.5, 0.0], [2.0, 0.0, 0.0]])
    h, tokens = (3 * torch.randn(shape, generator=seeded()) for shape in ((2, 16, 4, 4), (2, 3, 6)))
    found = layer(h, tokens, bias)
    assert close(found, attended(layer, h, tokens, bias), 1e-5)
    assert close(layer(h, tokens), attended(layer, h, tokens, 0 * bias), 1e-5)
    assert (found - h).std((2, 3)).max() > 0.05


def test_the_bias_raises_the_weight_of_the_chosen_key():
    layer, eye = attention_layer(4, 4), torch.eye(4)
    layer.q.weight.zero_(), layer.q.bias.zero_(), layer.out.weight.copy_(eye), layer.out.bias.zero_()
    layer.kv.weight.copy_(torch.cat([eye, eye])), layer.kv.bias.zero_()
    for strength in (0.0, 1.0, 3.0):                          # no query: the weights are the softmax of the bias
        added = layer(torch.zeros(1, 4, 2, 2), eye[None, :3], torch.tensor([[0.0, strength, 0.0]]))[0, :, 1, 0]
        e = math.exp(strength)
        assert close(added, [1 / (2 + e), e / (2 + e), 1 / (2 + e), 0])


def given_to_attention(model, k):
    seen = []
    handle = model.attention.register_forward_pre_hook(lambda module, given: seen.append(given))
    x, t = inputs(len(k))
    with torch.no_grad():
        model(x, t, k)
    handle.remove()
    return seen[0], pdm.time_embedding(t, 8)


def test_the_key_is_the_chosen_prototype_plus_sinusoids_of_the_noise_level():
    model = network()
    (h, tokens, bias), time = given_to_attention(model, torch.tensor([2, -1, 0]))
    expected = torch.stack([model.prototypes[2], model.null, model.prototypes[0]]) + time
    assert close(tokens, expected[:, None].detach()) and bias is None
    assert h.shape == (3, 16, 8, 8), "before the middle block"


def test_attend_all_gives_every_prototype_and_a_bias_to_the_chosen():
    model = network(attend="all")
    model.bias.data.fill_(1.5)
    (_, tokens, bias), time = given_to_attention(model, torch.tensor([2, -1, 0]))
    expected = torch.stack([model.prototypes, model.null.expand(4, -1), model.prototypes]) + time[:, None]
    assert close(tokens, expected.detach())
    assert bias.tolist() == [[0, 0, 1.5, 0], [0, 0, 0, 0], [1.5, 0, 0, 0]]


@pytest.mark.parametrize("attend", ["one", "all"])
def test_what_the_denoiser_is_told_is_a_prototype_or_the_null_vector(attend):
    model, (x, t) = awake(network(attend=attend)).eval(), inputs()
    shown, hidden = torch.tensor([0, 1, 2, 3]), torch.full((4,), -1)
    with torch.no_grad():
        before = [model(x, t, k) for k in (shown, hidden)]
        model.prototypes.add_(1)
        after = [model(x, t, k) for k in (shown, hidden)]
        model.null.add_(1)
        last = [model(x, t, k) for k in (shown, hidden)]
    assert not close(before[0], after[0]) and close(after[0], last[0])
    assert close(before[1], after[1]) and not close(after[1], last[1])


@pytest.mark.parametrize("attend", ["one", "all"])
def test_conditioning_changes_nothing_at_the_start(attend):
    model, (x, t) = network(attend=attend).eval(), inputs()
    awake(model.unet)
    with torch.no_grad():
        for k in ([0, 1, 2, 3], [-1] * 4):
            found = model(x, t, torch.tensor(k))
            assert found.std() > 0.01 and found.equal(model.unet(x, t)), "attention's last layer starts at zero"


def test_the_baseline_is_the_unet_whatever_k_is():
    model, (x, t) = awake(network(conditioning="none")).eval(), inputs()
    with torch.no_grad():
        assert model(x, t, torch.tensor([0, 1, 2, -1])).equal(model.unet(x, t))


# ---- who receives a gradient from which loss --------------------------------------------------------------------

def gradients(part, attend="one", label=None, hidden=(False,) * 4):
    """The gradients of the noise loss, or of the prototype losses, alone."""
    model, (x, t) = awake(network(attend=attend)), inputs()
    x0 = torch.rand(4, 3, 16, 16, generator=seeded(7)) * 2 - 1
    with torch.no_grad():
        model.prototypes.copy_(model.encoder(x0))             # every image its own
    eps, losses, _ = model(x, t, label, x0, torch.tensor(hidden))
    (eps.square().mean() if part == "noise" else losses[part]).backward()
    return model


def none_has_a_gradient(module):
    return all(p.grad is None or not p.grad.any() for p in module.parameters())


def test_the_noise_loss_reaches_chosen_prototypes_and_not_the_encoder():
    model = gradients("noise", label=torch.tensor([0, 2, 2, 1]), hidden=(False, False, False, True))
    assert model.prototypes.grad.any(1).tolist() == [True, False, True, False], "hidden: the null vector instead"
    assert model.null.grad.any() and none_has_a_gradient(model.encoder)
    assert model.unet.first.weight.grad.any() and model.attention.kv.weight.grad.any()


def test_the_noise_loss_of_pdm_reaches_the_nearest_prototypes():
    model = gradients("noise")
    assert model.counts.tolist() == [1, 1, 1, 1] and model.prototypes.grad.any(1).all()
    assert not model.null.grad.any() and none_has_a_gradient(model.encoder)


def test_attend_all_sends_the_noise_loss_to_all_prototypes_and_the_bias():
    model = gradients("noise", "all", torch.tensor([0, 0, 0, 0]), (False, False, True, True))
    assert model.prototypes.grad.any(1).all() and model.bias.grad.any() and model.attention.q.weight.grad.any()
    assert none_has_a_gradient(model.encoder)


@pytest.mark.parametrize("part, encoder", [("contrastive", True), ("alignment", True), ("compactness", False)])
def test_prototype_losses_reach_encoder_and_prototypes_and_not_the_denoiser(part, encoder):
    model = gradients(part, label=torch.tensor([1, 2, 3, 0]) if encoder else None)
    assert model.prototypes.grad.any(1).all() and none_has_a_gradient(model.encoder) != encoder
    assert none_has_a_gradient(model.unet) and none_has_a_gradient(model.attention) and model.null.grad is None


def test_every_weight_of_every_variant_is_trained():
    for changes in (dict(attend="all"), dict(supervised=True), dict(conditioning="none")):
        model = network(**changes)
        groups = model.param_groups(config())
        assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in model.parameters()}
        assert all((group["factor"], group["start"]) == (1, 0) for group in groups)


# ---- the loss ---------------------------------------------------------------------------------------------------

def a_batch():
    eps = torch.randn(4, 3, 16, 16, generator=seeded())
    return SimpleNamespace(x0=torch.rand(4, 3, 16, 16, generator=seeded(1)), t=torch.tensor([1, 20, 30, 49]), eps=eps,
                           target=torch.tensor([0, 1, 2, 3]), chance=torch.tensor([0.19, 0.21, 0.0, 0.99]))


@pytest.mark.parametrize("supervised", [False, True])
def test_the_loss_is_the_weighted_sum_and_each_part_is_given(supervised):
    batch, abar, seen = a_batch(), pdm.alpha_bars(50), []
    parts = {"contrastive": torch.tensor(2.0), "alignment": torch.tensor(3.0)}
    parts.update({} if supervised else {"compactness": torch.tensor(5.0)})

    def net(*given):
        seen.append(given)
        return batch.eps + 2, parts, {"variance of z": torch.tensor(7.0)}
    cfg = config(supervised=supervised, alignment=0.5, compactness=0.25, null_prob=0.2, tau=9.0)
    losses = pdm.pdm_loss(cfg, net, batch, abar)
    assert next(iter(losses)) == "loss"
    assert close(losses.pop("loss"), 4 + 2 + 1.5 + (0 if supervised else 1.25))
    assert close(losses.pop("diffusion"), 4) and losses == {**parts, "variance of z": 7}
    xt, t, label, x0, hidden = seen[0]
    assert close(xt, pdm.add_noise(batch.x0, batch.t, batch.eps, abar)) and t is batch.t and x0 is batch.x0
    assert label is (batch.target if supervised else None), "PDM sees no label"
    assert hidden.tolist() == [True, False, True, False]


def test_prototypes_are_never_hidden_at_probability_zero():
    hidden = []

    def net(xt, t, label, x0, hide):
        hidden.append(hide.tolist())
        return xt, {}, {}
    for p in (0.0, 1.0):
        pdm.pdm_loss(config(null_prob=p), net, a_batch(), pdm.alpha_bars(50))
    assert hidden == [[False] * 4, [True] * 4]


def test_the_loss_of_the_baseline_is_the_noise_loss_alone():
    batch, abar = a_batch(), pdm.alpha_bars(50)
    losses = pdm.pdm_loss(config(conditioning="none"), lambda xt, t, k: batch.eps + 3, batch, abar)
    assert set(losses) == {"loss"} and close(losses["loss"], 9)


# ---- do prototypes mean something? ------------------------------------------------------------------------------

def test_contingency_and_purity_by_hand():
    table = pdm.contingency(torch.tensor([0, 0, 1, 2]), torch.tensor([1, 1, 0, 1]), 3, 2)
    assert table.tolist() == [[0, 2], [1, 0], [0, 1]] and table.dtype == torch.float64
    assert pdm.purity(table) == 1
    assert pdm.purity(torch.tensor([[3.0, 1.0], [0.0, 4.0], [2.0, 2.0]])) == 0.75


def test_mutual_information_of_known_tables():
    nmi = pdm.normalised_mutual_information
    independent = torch.outer(torch.tensor([1.0, 2, 3]), torch.tensor([5.0, 1])).double()
    assert nmi(independent) == pytest.approx(0, abs=1e-12)
    relabelled = torch.tensor([3.0, 4.0, 5.0]).double().diag()[[2, 0, 1]]
    assert nmi(relabelled) == pytest.approx(1) and nmi(torch.tensor([[7.0]]).double()) == 1
    ln2, classes = math.log(2), -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    table = torch.tensor([[2.0, 0.0], [1.0, 1.0]]).double()   # entropies ln 2 and `classes`, joint 1.5 ln 2
    for known in (table, table.T):
        assert nmi(known) == pytest.approx(2 * (ln2 + classes - 1.5 * ln2) / (ln2 + classes))
    assert nmi(torch.tensor([[4.0, 4.0], [0.0, 0.0]]).double()) == pytest.approx(0)


def test_resemblance_by_hand():
    z = torch.tensor([[0.0], [1.0], [10.0], [12.0]])
    assert pdm.resemblance(z, torch.tensor([0, 0, 1, 1])) == pytest.approx(1.5 / 10.5)      # (1, 2) / (10, 12, 9, 11)
    assert math.isnan(pdm.resemblance(z, torch.tensor([0, 1, 2, 3])))
    assert math.isnan(pdm.resemblance(z, torch.tensor([2, 2, 2, 2])))


# ---- pictures ---------------------------------------------------------------------------------------------------

def test_nearest_images_come_closest_first():
    z, prototypes = torch.tensor([[0.0], [1.0], [5.0], [6.0]]), torch.tensor([[5.2], [0.6], [9.0]])
    assert pdm.nearest_images(z, prototypes, 2).tolist() == [[2, 3], [1, 0], [3, 2]]


def test_samples_stand_beside_real_images_with_a_white_gap(monkeypatch):
    drawn = []
    monkeypatch.setattr(pdm, "draw_grid", lambda *a: drawn.append(a))
    ones = torch.ones(2, 3, 1, 4, 4, dtype=torch.uint8)
    pdm.draw_beside_real("p.png", torch.stack([ones[0], 2 * ones[1]]), 3 * ones[:, :2], ["a", "b"])
    path, images, rows, _, columns = drawn[0]
    assert images[:, 0, 0, 0].tolist() == [1, 1, 1, 255, 3, 3, 2, 2, 2, 255, 3, 3] and rows == ["a", "b"]
    assert columns[1].startswith("samples") and columns[5].startswith("real") and len(columns) == 6


@pytest.mark.parametrize("labelled", [True, False])
def test_features_are_drawn_in_the_plane_of_their_largest_variance(figures, labelled):
    random = seeded(3)
    plane = torch.linalg.qr(torch.randn(5, 2, generator=random)).Q
    z = torch.randn(40, 2, generator=random) * torch.tensor([1.0, 4.0]) @ plane.T + 3
    k, stars = torch.arange(40) % 2, z[:2]
    pdm.draw_features("f.png", z, k, stars, torch.arange(40) % 4 if labelled else None, list("abcd"))
    panels = figures[0].axes
    assert len(panels) == 1 + labelled
    for axes, groups in zip(panels, (2, 4)):
        places, *parts = [np.asarray(dots.get_offsets()) for dots in axes.collections]
        assert len(parts) == groups, "the stars, and a colour a group above them"
        points = np.empty((40, 2))
        for i in range(groups):
            points[i::groups] = parts[i]
        assert close(torch.pdist(torch.tensor(points)), torch.pdist(z).double(), 1e-3), "nothing lies off the plane"
        assert points[:, 0].var() > points[:, 1].var() and np.allclose(places, points[:2], atol=1e-4)


def test_usage_is_drawn_over_steps_and_by_class(figures):
    rows = [{"step": s, "usage perplexity": s / 10, "dead prototypes": d, "variance of z": 1.0} for s, d in
            ((10, 2), (20, 1))]
    pdm.draw_usage("u.png", rows, torch.tensor([[1.0, 2], [3, 0], [0, 5]]), ["a", "b"])
    use, variance, bars = figures[0].axes
    assert [list(line.get_ydata()) for line in use.lines[:2]] == [[1, 2], [1, 2]], "perplexity; 3 - dead"
    assert list(use.lines[0].get_xdata()) == [10, 20]
    stacks = [[(bar.get_y(), bar.get_height()) for bar in group] for group in bars.containers]
    assert stacks == [[(0, 1), (0, 3), (0, 0)], [(1, 2), (3, 0), (0, 5)]]


# ---- conditions to sample from ----------------------------------------------------------------------------------

def test_prototypes_are_drawn_as_often_as_they_were_chosen():
    model = SimpleNamespace(counts=torch.tensor([0, 300, 100]), usage=torch.tensor([0, 500, 100]))
    drawn = pdm.draw_conditions(config(), model, 10_000)
    share = torch.bincount(drawn, minlength=3) / 10_000
    assert drawn.dtype == torch.int64 and drawn.equal(drawn.sort().values)
    assert share[0] == 0 and close(share[1:], [800 / 1000, 200 / 1000], 0.02)
    share = torch.bincount(pdm.draw_conditions(config(frequency="uniform"), model, 9000), minlength=3) / 9000
    assert close(share, [1 / 3] * 3, 0.025), "the paper's code"


def test_drawn_prototypes_follow_from_the_seed_and_are_uniform_before_training():
    model = SimpleNamespace(counts=torch.zeros(3).long(), usage=torch.zeros(3).long())
    share = torch.bincount(pdm.draw_conditions(config(), model, 9000), minlength=3) / 9000
    assert close(share, [1 / 3] * 3, 0.025)
    one, two, other = (pdm.draw_conditions(config(seed=s), model, 50) for s in (0, 0, 1))
    assert one.equal(two) and not one.equal(other)


def test_without_conditioning_there_is_nothing_to_draw():
    assert pdm.draw_conditions(config(conditioning="none"), None, 3).tolist() == [0, 0, 0]


def test_an_image_is_turned_into_what_the_network_saw_in_training(tmp_path):
    Image.new("RGB", (32, 24), (30, 60, 90)).save(tmp_path / "a.png")
    for channels, value in ((1, [60]), (3, [30, 60, 90])):
        seen = []
        model = SimpleNamespace(choose=lambda image, device: (seen.append(image), torch.tensor([2])))
        cfg = config(like=str(tmp_path / "a.png"), num_samples=3)
        found = pdm.asked_conditions(cfg, model, dict(shape=[channels, 16, 16], classes=[]), CPU)
        assert found.tolist() == [2, 2, 2] and found.dtype == torch.int64
        assert seen[0].shape == (1, channels, 16, 16) and seen[0][0, :, 8, 8].tolist() == value


def test_rows_are_named_by_what_conditions_them():
    extra = dict(classes=["cat", "dog"])
    assert pdm.condition_names(config(), extra) == [f"prototype {i}" for i in range(4)]
    assert pdm.condition_names(config(supervised=True), extra) == ["cat", "dog"]
    assert pdm.condition_names(config(conditioning="none"), extra) == ["no condition"]


# ---- cost -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("supervised, K", [(False, 4), (True, 10)])
def test_the_cost_is_measured_in_turns_against_the_same_unet(monkeypatch, supervised, K):
    clock, order, real = [0.0], [], pdm.pdm_loss

    def spend(kind, net, conditioned, unconditioned):
        given = isinstance(net, pdm.PDM)
        clock[0] += conditioned if given else unconditioned
        order.append((kind, given))

    def loss(cfg, net, batch, abar):
        spend("step", net, 3, 2)
        return real(cfg, net, batch, abar)
    monkeypatch.setattr(pdm, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(pdm, "pdm_loss", loss)
    monkeypatch.setattr(pdm, "generate", lambda net, cfg, *a: spend("image", net, 100, 50))
    cfg, data = config(supervised=supervised), pdm.load_dataset("shapes", "train", 16)
    model = network(10, supervised=supervised)
    before = copy.deepcopy(model.state_dict())
    cost = pdm.measure_cost(cfg, model, dict(shape=[3, 16, 16], classes=list(range(10)), images=200), [data], CPU,
                            rounds=2)
    assert order == 4 * [("step", True), ("image", True), ("step", False), ("image", False)]
    for kind, times in (("a training step", (3, 2, 1.5)), ("a sampled image", (2, 1, 2))):
        assert times == tuple(cost[f"seconds of {kind}{end}"] for end in ("", ", unconditioned", ", ratio"))
    assert cost["bytes of prototypes"] == K * 8 * 4
    assert cost["bytes of a bank of every training feature"] == 200 * 8 * 4
    unet, more = (sum(p.numel() for p in part.parameters()) for part in (model.unet, model))
    assert (cost["parameters of the U-Net"], cost["parameters"]) == (unet, more)
    extra = sum(p.numel() for part in (model.encoder, model.attention) for p in part.parameters())
    assert more == unet + extra + K * 8 + 8, "and the prototypes and the null vector"
    assert same(dict(model.state_dict()), dict(before)), "the model itself is left alone"


# ---- runs -------------------------------------------------------------------------------------------------------

LOSSES = ["loss", "diffusion", "contrastive", "alignment", "compactness"]
STATISTICS = ["variance of z", "usage perplexity", "dead prototypes"]
REST = ["learning rate", "images/s", "seconds", "skipped steps"]


def test_a_run_of_pdm_leaves_every_file_and_logs_every_loss(done):
    assert set(contents(done)) == MADE
    for name in MADE:
        if name.endswith(".png"):
            with Image.open(done / name) as image:
                image.load()
                assert min(image.size) > 60
    rows = log(done)
    assert list(rows[0]) == ["step", *LOSSES, *STATISTICS, *REST] and [row["step"] for row in rows] == ["2", "4", "6"]
    for row in rows:
        values = {name: float(row[name]) for name in LOSSES + STATISTICS}
        assert values["loss"] == pytest.approx(sum(values[name] for name in LOSSES[1:]), rel=1e-5)
        assert values["variance of z"] > 0 and 1 <= values["usage perplexity"] <= 4
        assert 0 <= values["dead prototypes"] <= 3
    assert float(rows[0]["diffusion"]) == pytest.approx(1, abs=0.15)


def test_metrics_json_says_what_prototypes_mean_and_cost(done):
    found, run = metrics(done), pdm.load_run(done, "cpu")
    assert set(found) == {"settings", "training_images", "machine", "torch", "seconds", "results", "prototypes", "cost"}
    assert found["training_images"] == 200 and found["settings"]["num_prototypes"] == 4
    assert set(found["seconds"]) == {"training", "sampling"}
    for judge in ("a classifier trained apart", "the run's own f_phi"):
        for kind in ("samples", "real held-out images"):
            assert set(found["results"][judge][kind]) == {"frechet"}, "prototypes are no classes"
    cost = found["cost"]
    assert cost["parameters"] == sum(p.numel() for p in run.model.parameters())
    for kind in ("a training step", "a sampled image"):
        plain = cost[f"seconds of {kind}, unconditioned"]
        assert plain > 0 and cost[f"seconds of {kind}, ratio"] == pytest.approx(cost[f"seconds of {kind}"] / plain)


def test_resemblance_of_many_is_that_of_a_random_part_of_them():
    z = torch.cat([torch.zeros(3000, 2), torch.ones(3000, 2)])
    assert pdm.resemblance(z, torch.arange(6000) // 3000) == 0, "sorted by prototype: both must be among the part"


@pytest.mark.parametrize("changes, words", [
    (["--supervised", "--conditioning", "none"], "--supervised"), (["--null-prob", "0"], "--guidance 0")])
def test_settings_that_contradict_each_other_are_refused(tmp_path, capsys, changes, words):
    refused(capsys, [*args(out=tmp_path / "run"), *changes], words)
    assert not (tmp_path / "run").exists()


def test_figures_of_prototypes_can_be_computed_again(done):
    found, run = metrics(done)["prototypes"], pdm.load_run(done, "cpu")
    train, test = (pdm.load_dataset("shapes", split, 16) for split in ("train", "test"))
    (_, used), (z, k) = (run.model.choose(data.images, CPU) for data in (train, test))
    share = np.bincount(used, minlength=4) / 200
    alive = share[share > 0]
    assert found.pop("prototypes alive (nearest to some training image)") == pytest.approx(len(alive) / 4)
    assert found.pop("usage perplexity, training images") == pytest.approx(math.exp(-(alive * np.log(alive)).sum()))
    assert found.pop("variance of z, held-out images") == pytest.approx(float(np.var(z.numpy(), 0).sum()))
    common = sum(max(np.bincount(test.labels[k == i])) for i in k.unique())
    assert found.pop("purity, held-out images") == pytest.approx(common / 60)
    table = pdm.contingency(k, test.labels, 4, 10)
    assert found.pop("NMI, held-out images") == pytest.approx(pdm.normalised_mutual_information(table))
    images, conditions = (torch.from_numpy(a) for a in samples(done))
    z_made, k_made = run.model.choose(images.permute(0, 3, 1, 2), CPU)
    name = "distance of {} within / between prototypes"
    alike, approx = pdm.resemblance(z_made, conditions), functools.partial(pytest.approx, rel=1e-4, nan_ok=True)
    assert found.pop(name.format("samples")) == approx(alike)
    assert found.pop(name.format("real images")) == approx(pdm.resemblance(z, k))
    again = (k_made == conditions).float().mean().item()
    assert found.pop("samples that choose the prototype they came from") == pytest.approx(again) and not found


def test_the_checkpoint_holds_the_counts_and_the_average_copies_them(done):
    state = checkpoint(done)
    assert state["script"] == "pdm" and state["extra"] == dict(shape=[3, 16, 16], classes=list(pdm.SHAPES), images=200)
    assert state["model"]["counts"].sum() == 48 and state["model"]["usage"].sum() == 0
    assert same(state["model"]["counts"], state["average"]["counts"])
    assert not same(state["model"]["prototypes"], state["average"]["prototypes"])
    drawn = pdm.draw_conditions(config(), pdm.load_run(done, "cpu").model, 12)
    assert samples(done)[1].tolist() == drawn.tolist(), "samples follow the use in training"


def test_a_run_of_s_pdm_is_measured_by_its_classes(supervised):
    assert set(contents(supervised)) == MADE
    assert list(log(supervised)[0]) == ["step", *LOSSES[:-1], *STATISTICS, *REST]
    found, run = metrics(supervised), pdm.load_run(supervised, "cpu")
    for judge in ("a classifier trained apart", "the run's own f_phi"):
        for kind in ("samples", "real held-out images"):
            assert set(found["results"][judge][kind]) == {"frechet", "accuracy"}
    test = pdm.load_dataset("shapes", "test", 16)
    right = (run.model.choose(test.images, CPU)[1] == test.labels).float().mean().item()
    assert found["results"]["the run's own f_phi"]["real held-out images"]["accuracy"] == pytest.approx(right)
    assert found["cost"]["bytes of prototypes"] == 10 * 8 * 4
    labels = pdm.load_dataset("shapes", "train", 16).labels
    assert samples(supervised)[1].tolist() == pdm.evaluation_labels(labels, 12).tolist(), "in the data's proportions"
    counts = torch.zeros(10, dtype=torch.int64)
    images = pdm.load_dataset("shapes", "train", 16)
    for step in range(6):
        batch = next(pdm.random_batches(config(), images.images, images.labels, step, CPU))
        counts += torch.bincount(batch.target, minlength=10)
    assert checkpoint(supervised)["model"]["counts"].equal(counts), "the labels choose"


def test_a_run_without_conditioning_has_no_prototypes_anywhere(baseline):
    assert set(contents(baseline)) == BASIC
    assert list(log(baseline)[0]) == ["step", "loss", *REST]
    found = metrics(baseline)
    assert not {"prototypes", "cost"} & set(found) and set(found["results"]) == {"a classifier trained apart",
                                                                                 "inception"}
    assert not any("prototype" in name for name in checkpoint(baseline)["model"])
    assert samples(baseline)[1].tolist() == [0] * 12


def test_no_conditioning_of_s_pdm_works_or_is_refused(tmp_path, capsys):
    try:
        status = pdm.main([*args(out=tmp_path / "run", conditioning="none", steps=1), "--supervised"])
    except Exception as error:
        pytest.fail(f"a traceback: {error!r}")
    assert status in (0, 2)


def test_attend_all_trains_and_samples(tmp_path, training_only):
    out = tmp_path / "all"
    assert pdm.main(args(out=out, attend="all")) == 0
    state = checkpoint(out)["model"]
    assert state["bias"] != 1 and log(out)[0].keys() >= {*LOSSES, *STATISTICS}
    assert pdm.main(flags(sample=out, prototype=1, num_samples=2)) == 0
    assert samples(out / "samples")[1].tolist() == [1, 1]


def trained(folder, data, **changes):
    folder.mkdir()
    pdm.train_pdm(config(**changes), folder, [data, data], CPU)
    return checkpoint(folder)


def test_pdm_never_sees_a_label(tmp_path, training_only):
    data = pdm.load_dataset("shapes", "train", 16)
    shuffled = dataclasses.replace(data, labels=data.labels[torch.randperm(200, generator=seeded())])
    unlabelled = dataclasses.replace(data, labels=None)
    states = [trained(tmp_path / str(i), d, steps=3) for i, d in enumerate((data, shuffled, unlabelled))]
    for part in ("model", "average", "optimizer"):
        assert same(states[0][part], states[1][part]) and same(states[0][part], states[2][part]), part


def test_s_pdm_does_see_labels(tmp_path, training_only):
    data = pdm.load_dataset("shapes", "train", 16)
    shuffled = dataclasses.replace(data, labels=data.labels.roll(1))
    for start in ("features", "uniform"):
        one, two = (trained(tmp_path / f"{start}{i}", d, supervised=True, start=start, steps=2)["model"]
                    for i, d in enumerate((data, shuffled)))
        assert not same(one["prototypes"], two["prototypes"]) and not same(one["counts"], two["counts"])


def interrupt_at(patch, step):
    """The run stops dead in this step, after the weights have moved; nothing is saved on the way out."""
    whole = pdm.update_average

    def update(average, model, n):
        if n == step:
            raise KeyboardInterrupt
        whole(average, model, n)
    patch.setattr(pdm, "update_average", update)


@pytest.mark.parametrize("word", ["--revive", "--supervised"])
def test_counts_and_prototypes_survive_a_kill_bit_for_bit(tmp_path, monkeypatch, training_only, word):
    monkeypatch.setitem(pdm.SHAPE_SPLITS, "train", (24, 0))   # three steps an epoch
    settings = dict(steps=7, log_every=1, dropout=0.3)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert pdm.main([*args(out=whole, **settings), word]) == 0
    for step, counted, used in ((1, 0, 0), (5, 8, 24)):       # before the first save; in the second epoch
        with pytest.MonkeyPatch.context() as patch:
            interrupt_at(patch, step)
            again = step > 1
            assert pdm.main(flags(resume=broken) if again else [*args(out=broken, **settings), word]) == 130
        saved = checkpoint(broken)["model"]
        assert (saved["counts"].sum(), saved["usage"].sum()) == (counted, used)
    assert pdm.main(flags(resume=broken)) == 0
    a, b = checkpoint(whole), checkpoint(broken)
    assert (a["model"]["counts"].sum(), a["model"]["usage"].sum()) == (8, 24)
    for part in ("model", "average", "optimizer"):
        assert same(a[part], b[part]), part
    clock = {"images/s", "seconds"}
    rows = [[{k: v for k, v in row.items() if k not in clock} for row in log(folder)] for folder in (whole, broken)]
    assert rows[0] == rows[1] and len(rows[0]) == 7


def test_images_that_changed_since_are_not_trained_on(tmp_path, monkeypatch, capsys, training_only):
    out = tmp_path / "run"
    assert pdm.main(args(out=out, steps=1)) == 0
    monkeypatch.setitem(pdm.SHAPE_SPLITS, "train", (199, 0))
    refused(capsys, flags(resume=out, steps=2), "have changed")


def test_a_comparison_trains_three_variants_and_can_go_on(tmp_path, capsys, training_only):
    out = tmp_path / "compare"
    assert pdm.main([*args(out=out), "--compare"]) == 0
    table = capsys.readouterr().out
    result, names = json.loads((out / "comparison.json").read_text()), ["unconditional", "PDM", "s-PDM"]
    assert list(result["variants"]) == names and result["real held-out images"].keys() == {"accuracy", "frechet"}
    for name, variant in result["variants"].items():
        assert [h["step"] for h in variant["history"]] == [3, 6] and name in table
        for found in (*variant["history"], variant["guidance 0"]):
            assert ("accuracy" in found) == (name == "s-PDM") and found["frechet"] > 0
    saved = [json.loads((out / name / "config.json").read_text()) for name in names]
    assert [(s["conditioning"], s["supervised"], s["compare"]) for s in saved] == [
        ("none", False, False), ("prototype", False, False), ("prototype", True, False)]
    apart = [{k: v for k, v in s.items() if k not in ("conditioning", "supervised")} for s in saved]
    assert apart[0].pop("guidance") == 0 and apart[1].pop("guidance") == apart[2].pop("guidance") == SETTINGS["guidance"]
    wanted = {k: v for k, v in SETTINGS.items() if k != "guidance"}
    assert apart[0] == apart[1] == apart[2] and apart[0].items() >= {**wanted, "attend": "one"}.items()
    Image.open(out / "comparison.png").load()
    first = {name: checkpoint(out / name)["model"] for name in names}
    (out / "s-PDM" / "checkpoint.pt").unlink()                # as if stopped before the third variant
    (out / "comparison.json").unlink()
    assert pdm.main(flags(resume=out)) == 0
    again = json.loads((out / "comparison.json").read_text())["variants"]
    assert [v["history"][-1]["frechet"] for v in again.values()] == pytest.approx(
        [v["history"][-1]["frechet"] for v in result["variants"].values()])
    assert all(same(checkpoint(out / name)["model"], first[name]) for name in names)
    assert pdm.main(flags(sample=out / "PDM", num_samples=2)) == 0


@pytest.mark.parametrize("n, K", [(24, 1), (4, 2)])
def test_a_folder_without_classes_is_enough_for_pdm(tmp_path, n, K):
    root, out = flat_folder(tmp_path / "pictures", n), tmp_path / "run"
    assert pdm.main(args(out=out, dataset="folder", data_dir=root, steps=2, num_prototypes=K, num_samples=6)) == 0
    assert set(contents(out)) == MADE
    found = metrics(out)
    assert set(found["results"]) == {"the run's own f_phi", "inception"}
    assert not any("purity" in name or "NMI" in name for name in found["prototypes"])


# ---- sampling and measuring a run -------------------------------------------------------------------------------

def test_samples_of_one_prototype_or_of_the_one_that_an_image_chooses(done, tmp_path, capsys):
    before, arguments = contents(done), flags(sample=done, device="cpu", num_samples=5)
    assert pdm.main([*arguments, *flags(prototype=3, out=tmp_path / "p")]) == 0
    assert samples(tmp_path / "p")[1].tolist() == [3] * 5 and (tmp_path / "p" / "samples.png").exists()
    run, test = pdm.load_run(done, "cpu"), pdm.load_dataset("shapes", "test", 16)
    for k in run.model.choose(test.images, CPU)[1].unique().tolist():
        image = test.images[run.model.choose(test.images, CPU)[1] == k][0]
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{k}.png")
        out = tmp_path / f"like{k}"
        assert pdm.main([*arguments, *flags(like=tmp_path / f"{k}.png", out=out)]) == 0
        assert samples(out)[1].tolist() == [k] * 5 and f"prototype {k}" in capsys.readouterr().out
        assert (out / "samples.png").exists()
    assert contents(done) == before


def test_samples_are_drawn_by_use_or_uniformly(done, tmp_path):
    run = pdm.load_run(done, "cpu")
    for frequency in ("usage", "uniform"):
        out = tmp_path / frequency
        assert pdm.main(flags(sample=done, num_samples=9, frequency=frequency, out=out)) == 0
        assert samples(out)[1].tolist() == pdm.draw_conditions(config(frequency=frequency), run.model, 9).tolist()


def test_s_pdm_samples_the_classes_asked_for(supervised, tmp_path):
    arguments = flags(sample=supervised, num_samples=3)
    asked = [(dict(labels="star,3"), [9, 3, 9]), ({}, [0, 1, 2]), (dict(prototype=4), [4, 4, 4])]
    for i, (words, expected) in enumerate(asked):
        assert pdm.main([*arguments, *flags(out=tmp_path / str(i), **words)]) == 0
        assert samples(tmp_path / str(i))[1].tolist() == expected


def test_evaluating_again_gives_the_same_numbers_and_prints_them(done, tmp_path, capsys):
    before, out = contents(done), tmp_path / "again"
    assert pdm.main(flags(evaluate=done, out=out)) == 0
    printed = capsys.readouterr().out
    one, two = metrics(done), metrics(out)
    for name, figures in one["results"].items():
        for kind, found in figures.items():
            assert found == pytest.approx(two["results"][name][kind], rel=1e-4, abs=1e-6)
    assert one["prototypes"] == pytest.approx(two["prototypes"], rel=1e-4, nan_ok=True)
    for name in (*one["prototypes"], *one["cost"], "not FID", "FID, IS, KID: not computed"):
        assert name in printed
    assert contents(done) == before and (samples(done)[0] == samples(out)[0]).all()
    assert set(contents(out)) == MADE - {"config.json", "log.csv", "checkpoint.pt", "curves.png"}


# ---- what goes wrong: exit status 2, one sentence ---------------------------------------------------------------

@pytest.mark.parametrize("changes, words", [
    (dict(image_size=8), ["--image-size 8", "16"]),
    (dict(prototype_dim=7), ["--prototype-dim", "even"]),
    (dict(prototype_dim=0), ["--prototype-dim 0"]),
    (dict(num_prototypes=0), ["--num-prototypes 0"]),
    (dict(conditioning="class"), ["--conditioning", "prototype"]),
    (dict(attend="two"), ["--attend", "one"]),
    (dict(start="zero"), ["--start", "uniform"]),
    (dict(frequency="often"), ["--frequency", "usage"]),
    (dict(tau=-1), ["--tau"]),
    (dict(null_prob=1.5), ["--null-prob"]),
    (dict(prototype=-2), ["--prototype"])])
def test_a_setting_that_cannot_be_is_named_and_makes_no_folder(tmp_path, capsys, changes, words):
    refused(capsys, args(out=tmp_path / "run", **changes), *words)
    assert not list(tmp_path.iterdir())


def test_reviving_by_several_processes_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pdm, "WORLD", 2)
    refused(capsys, [*args(out=tmp_path / "run"), "--revive"], "--revive", "one process")


@pytest.mark.parametrize("word", ["--supervised", "--compare"])
def test_what_needs_classes_is_refused_without(tmp_path, capsys, word):
    root = flat_folder(tmp_path / "pictures", 4)
    refused(capsys, [*args(out=tmp_path / "run", dataset="folder", data_dir=root), word], "pictures", "train/<class>")
    assert not (tmp_path / "run").exists()


def test_a_prototype_that_is_not_there_is_named(done, supervised, baseline, tmp_path, capsys):
    out = tmp_path / "s"
    refused(capsys, flags(sample=done, out=out, prototype=4), "--prototype 4", "0 to 3")
    refused(capsys, flags(sample=supervised, out=out, prototype=10), "--prototype 10", "0 to 9")
    for name, value in (("prototype", 0), ("like", "a.png"), ("labels", "star")):
        refused(capsys, flags(sample=baseline, out=out, **{name: value}), "no prototypes", f"--{name}")
    assert not out.exists()


def test_labels_mean_nothing_to_pdm_and_must_be_classes_of_s_pdm(done, supervised, tmp_path, capsys):
    refused(capsys, flags(sample=done, out=tmp_path / "s", labels="star"), "--labels", "--prototype")
    refused(capsys, flags(sample=supervised, out=tmp_path / "s", labels="hexagon"), "hexagon", "circle")
    assert not (tmp_path / "s").exists()


def test_an_image_that_is_missing_or_broken_is_named(done, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"no image")
    for name in ("missing.png", "broken.png"):
        refused(capsys, flags(sample=done, out=tmp_path / "s", like=tmp_path / name), name)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("name, value", [
    ("num_prototypes", 5), ("prototype_dim", 6), ("conditioning", "none"), ("attend", "all"), ("start", "uniform")])
def test_what_belongs_to_the_run_cannot_change_on_resuming(done, capsys, name, value):
    before = contents(done)
    refused(capsys, flags(resume=done, **{name: value}), f"--{name.replace('_', '-')}", value)
    assert contents(done) == before


def test_weights_of_losses_can_change_on_resuming(done, tmp_path, training_only):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.json", "checkpoint.pt", "log.csv"):
        (folder / name).write_bytes((done / name).read_bytes())
    assert pdm.main([*flags(resume=folder, steps=8, alignment=0, compactness=0), "--revive"]) == 0
    row = {name: float(value) for name, value in log(folder)[-1].items()}
    assert row["step"] == 8 and row["loss"] == pytest.approx(row["diffusion"] + row["contrastive"], rel=1e-5)


def test_help_lists_every_setting(capsys):
    with pytest.raises(SystemExit) as stop:
        pdm.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for name in pdm.Config.__dataclass_fields__:
        if name != "PRESETS" and not name.isupper():
            assert f"--{name.replace('_', '-')}" in text, name


def test_names_of_variants():
    changes = itertools.product(("prototype", "none"), (False, True))
    names = [pdm.variant_name(config(conditioning=c, supervised=s)) for c, s in changes]
    assert names == ["PDM", "s-PDM", "unconditional", "unconditional"]
