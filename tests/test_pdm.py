"""PDM and s-PDM: what pdm.py does not share with the other scripts. Exact answers wherever there is one."""
import functools
import itertools
import math
import os
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import conftest
import pdm
from conftest import CPU, awake, checkpoint, close, flags, log, metrics, normal, same, samples

args, config = (functools.partial(make, pdm) for make in (conftest.args, conftest.config))
LOSSES = ["diffusion", "contrastive", "alignment", "compactness"]
STATISTICS = ["variance_of_z", "usage_perplexity", "dead_prototypes"]
variable = functools.partial(torch.tensor, dtype=torch.float32, requires_grad=True)
shapes = functools.partial(pdm.load_dataset, "shapes", image_size=16)
ABAR, CORNERS = pdm.alpha_bars(1000), [[-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]]

@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Finished runs, which tests only read: PDM, s-PDM, the baseline, and PDM on grey images without classes."""
    root = tmp_path_factory.mktemp("runs")
    (root / "images").mkdir()
    for i in range(4):
        Image.effect_noise((16, 16), 50 + 50 * i).save(root / f"images/{i}.png")
    variants = dict(pdm={}, spdm=dict(supervised=True), plain=dict(conditioning="none"),
                    grey=dict(dataset="folder", data_dir=root / "images"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pdm.Figure, "savefig", lambda figure, path, **how: path.touch())
        for name, changes in variants.items():
            assert pdm.main(args(out=root / name, eval_every=6, **changes)) == 0
    return root

def network(**changes):
    torch.manual_seed(0)
    return config(**changes).build(dict(shape=[3, 16, 16], classes=list("abcdefg")))

def learner(scale=1.0, **changes):
    """A PDM of one view with prototypes at CORNERS, perhaps scaled, whose images are their own features: [B, 2]."""
    model = network(**dict(prototype_dim=2, num_prototypes=3, views="one") | changes)
    model.encoder = torch.nn.Flatten()
    model.prototypes.data = scale * torch.tensor(CORNERS)
    return model

def a_batch(target=(0, 1, 2, 3), chance=(0.5, 0.5, 0.5, 0.5)):
    x0, eps = normal(2, 4, 3, 16, 16)
    return pdm.Batch(x0.clamp(-1, 1), torch.tensor(target), torch.tensor([1, 200, 600, 999]), eps, torch.tensor(chance))

def test_variants_start_with_the_same_unet_and_every_weight_is_in_a_group():
    for changes in ({}, dict(conditioning="none"), dict(supervised=True)):
        model = network(**changes)
        groups = [{id(p) for p in group["params"]} for group in model.param_groups()]
        assert sorted(p for group in groups for p in group) == sorted(id(p) for p in model.parameters())
        assert {id(p) for p in model.unet.parameters()} in groups, "the U-Net's gradient is clipped apart"
        assert same(model.unet.state_dict(), network().unet.state_dict())
    assert model.prototypes.shape == (7, 8) and 0.09 < model.prototypes.abs().max() <= 0.1

def test_the_encoder_is_four_halving_convolutions_and_a_mean_over_pixels():
    net = pdm.feature_encoder(3, 8)
    kinds = "Conv2d ReLU Conv2d BatchNorm2d ReLU Conv2d BatchNorm2d ReLU Conv2d AdaptiveAvgPool2d Flatten"
    assert [type(layer).__name__ for layer in net] == kinds.split()
    assert net[5].weight.shape == (256, 128, 4, 4) and net[:9](normal(2, 3, 48, 48)).shape == (2, 8, 3, 3)

def test_distances_are_not_squared_exact_far_from_the_origin_and_float32_from_half():
    z, e, far = torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([[3.0, 4.0], [6.0, 8.0]]), torch.full((40, 2), 1e3)
    assert close(pdm.distances(z, e), [[5, 10], [0, 5]]) and pdm.distances(z.half(), e.half()).dtype == torch.float32
    assert (pdm.distances(far, far + torch.tensor([0, 0.0625])) == 0.0625).all(), "no product, which would cancel"

def by_hand(scores):
    """The balanced assignment of scores [B, K], in float64 and without logarithms."""
    q = scores.detach().double().exp()
    for _ in range(3):
        q = q / q.sum(0)
        q = q / q.sum(1, keepdim=True)
    return q

def test_each_view_predicts_what_is_assigned_to_the_others():
    cosines = [variable((0.2 * normal(4, 3, seed=i)).tolist()) for i in range(3)]
    q, p = [by_hand(20 * cos) for cos in cosines], [(10 * cos.detach()).softmax(1) for cos in cosines]
    loss = pdm.swapped_loss(cosines)
    loss.backward()
    assert close(loss.detach(), -sum((q[j] * p[i].log()).sum() for i, j in itertools.permutations(range(3), 2)) / 4 / 6)
    for i, cos in enumerate(cosines):
        others = sum(q[j] for j in range(3) if j != i)
        assert close(cos.grad, (2 * p[i] - others) / 0.1 / 4 / 6), "targets: constants"

def test_the_second_of_two_processes_assigns_the_images_of_both_and_learns_from_its_own(monkeypatch):
    cosines = 0.2 * normal(2, 4, 3)

    def gather(parts, own):
        parts[0].copy_(own.roll(1, 1))                        # the first has these, shifted by a column
        parts[1].copy_(own)
    monkeypatch.setattr(pdm, "WORLD", 2)
    monkeypatch.setattr(pdm, "RANK", 1)
    monkeypatch.setattr(pdm, "dist", SimpleNamespace(is_initialized=lambda: True, all_gather=gather))
    q1, q2 = (by_hand(torch.cat([cos.roll(1, 1), cos]) / 0.05)[4:] for cos in cosines)
    expected = sum(F.cross_entropy(cos.double() / 0.1, q) / 2 for cos, q in zip(cosines, (q2, q1)))
    assert close(pdm.swapped_loss([*cosines]), expected)

@pytest.mark.parametrize("label, expected", [(None, [1, 0, 2, 1]), (torch.tensor([2, 2, 0, 1]), [2, 2, 0, 1])])
def test_pdm_chooses_the_nearest_prototype_and_s_pdm_the_labels(label, expected):
    model, z = learner(), torch.tensor([[0.8, -0.8], [-0.8, -0.8], [-0.6, 0.4], [0.2, -1.0]])
    k, losses, _ = model.learn(z, label, config())
    assert k.tolist() == expected and len(losses) == (2 if label is not None else 3), "s-PDM has no compactness loss"
    usage = 0.99 / 3 + 0.01 * torch.bincount(k, minlength=3) / 4
    model.eval().learn(z, label, config())
    assert close(model.usage, usage), "a moving average of the choices in training, and of no others"

def test_with_two_views_directions_count_the_clean_image_chooses_and_all_three_are_swapped(monkeypatch):
    model, given = learner(torch.tensor([[9.0], [1.0], [0.1]]), views="two"), []
    x = torch.tensor([[[0.8, -0.5], [-0.1, -0.2], [-3.0, 2.0]], [[1, 0.9], [0, -1], [2, 2]],
                      [[-1.0, 0.5], [0.3, 3.0], [-1, -4]]])
    views = iter(x[1:])
    monkeypatch.setattr(pdm, "random_view", lambda image, cfg: given.append(image.tolist()) or next(views))
    k, losses, _ = model.learn(x[0], None, config())
    z, one, two = x / x.norm(dim=2, keepdim=True)
    e = torch.tensor(CORNERS) / math.sqrt(2)                  # their cosines: 0, 0 and -1
    assert given == [x[0].tolist()] * 2 and k.tolist() == [1, 0, 2]
    expected = pdm.swapped_loss([v @ e.T for v in (z, one, two)]), (z - e[k]).square().mean(), torch.tensor(2.0)
    assert close(torch.stack([losses[name] for name in LOSSES[1:]]).detach(), torch.stack(expected))

@pytest.mark.parametrize("changes, length", [({}, 2), (dict(views="two"), 1), (dict(views="two", supervised=True), 2)])
def test_images_are_compared_with_prototypes_as_in_training_and_their_choices_are_not_counted(changes, length):
    model = learner(2.0, **changes)
    z, d = model.choose(torch.tensor([[0, 255], [0, 0], [255, 0]], dtype=torch.uint8), CPU)
    factor = 1 if length == 2 else math.sqrt(0.5)             # all of length 1 if two views are compared, else as is
    corners, expected = torch.tensor(CORNERS), factor * torch.tensor([[-1.0, 1.0], [-1, -1], [1, -1]])
    assert close(z, expected) and close(d, torch.cdist(expected, length * factor * corners))
    assert len(model.usage.unique()) == 1

IMAGES = normal(1, 3, 24, 24).expand(300, -1, -1, -1)         # one image, so that only what is drawn differs

def viewed(x, forget, **changes):
    torch.manual_seed(0)
    return pdm.random_view(x, config(forget=forget, **changes))

def spans(values, low, high):
    edge = 0.05 * (high - low)
    return low - 1e-4 < values.min() < low + edge and high - edge < values.max() < high + 1e-4

def test_place_is_a_square_inside_the_image_or_around_it_with_its_edge_repeated():
    x = (2 * torch.arange(16) + 1) / 16 - 1                   # where pixels lie, in -1 to 1
    ramps = torch.stack(torch.meshgrid(x, x, indexing="ij")).expand(300, -1, -1, -1)        # rows: y; columns: x
    v = viewed(ramps, "place", view_size="0.5,1.5")
    v = torch.stack([v[:, 0].mT, v[:, 1]], 1)                 # y, x: both grow along the last axis
    side = 8 * v[:, :, :1].diff().amax(3, keepdim=True)       # slopes, where the edge is not repeated
    place = v[:, :, :1].abs().argmin(3, keepdim=True)         # some pixel inside
    shift = v.gather(3, place) - side * x[place]
    assert close(v, (side * x + shift).clamp(x[0], x[-1]).expand_as(v), 1e-5)
    assert close(side[:, 0], side[:, 1], 1e-4) and spans(side, 0.5, 1.5), "squares"
    far = (side[:, 0] - 1).abs().flatten() > 0.1
    y, x = (shift / (1 - side))[far].flatten(1).T
    assert spans(y, -1, 1) and spans(x, -1, 1) and torch.stack([y, x]).corrcoef()[0, 1].abs() < 0.2

def test_mirror_shows_half_of_the_images_from_the_other_side():
    turned = (viewed(IMAGES, "mirror") == IMAGES.flip(-1)).flatten(1).all(1)
    assert 120 < turned.sum() < 180 and viewed(IMAGES, "mirror")[~turned].equal(IMAGES[~turned])

def test_hue_gives_every_order_of_the_channels_and_in_half_of_the_images_dark_for_bright():
    kinds = [(order, sign) for order in itertools.permutations(range(3)) for sign in (-1, 1)]
    found = [kind for image in viewed(IMAGES, "hue") for kind in kinds if image.equal(kind[1] * IMAGES[0, [*kind[0]]])]
    assert len(found) == 300 and set(found) == {*kinds} and 120 < sum(sign > 0 for _, sign in found) < 180

def test_light_is_one_contrast_and_one_brightness_and_saturation_scales_what_is_not_grey():
    v, grey = viewed(IMAGES, "saturation"), IMAGES.mean(1, keepdim=True)
    a = ((v - grey) / (IMAGES - grey))[:, :1, :1, :1]
    assert close(v, grey + a * (IMAGES - grey), 1e-4) and spans(a, 0, 1.6)
    assert 40 < (a.abs() < 1e-6).sum() < 80 and 60 < (a > 0.8).sum() < 200, "a fifth is grey"
    dark, bright = (viewed(torch.full_like(IMAGES, value), "light") for value in (0, 1))
    b, a = dark[:, 0, 0, 0], (bright - dark)[:, 0, 0, 0]
    assert close(viewed(IMAGES, "light")[:, 2, 3, 4], a * IMAGES[0, 2, 3, 4] + b, 1e-5)
    assert spans(a, 0.6, 1.4) and spans(b, -0.6, 0.6) and torch.stack([a, b]).corrcoef()[0, 1].abs() < 0.2

@pytest.mark.parametrize("channels, heads, n", [(16, 8, 3), (12, 4, 1)])
def test_attention_is_a_plain_softmax_over_keys(channels, heads, n):
    layer = awake(pdm.PrototypeAttention(channels, 6), 5).requires_grad_(False)
    h, tokens = 3 * normal(2, channels, 4, 4), 3 * normal(2, n, 6, seed=1)
    q = layer.q(layer.norm(h).flatten(2).transpose(1, 2)).unflatten(2, (heads, -1))         # [B, HW, heads, c]
    k, v = (part.unflatten(2, (heads, -1)) for part in layer.kv(tokens).chunk(2, -1))       # [B, n, heads, c]
    weights = (torch.einsum("bphc,bnhc->bhpn", q, k) / math.sqrt(channels / heads)).softmax(-1)
    found = layer.out(torch.einsum("bhpn,bnhc->bphc", weights, v).flatten(2)).transpose(1, 2).reshape(h.shape)
    assert close(layer(h, tokens), h + found, 1e-5)
    assert (found.std((2, 3)).max() > 0.05) == (n > 1), "one key adds the same to every pixel"

@pytest.mark.parametrize("views", ["one", "two"])
def test_the_key_is_the_prototype_plus_sinusoids_of_the_noise_level(views):
    model, seen = network(views=views, multipliers="1,2").eval().requires_grad_(False), []
    model.attention.register_forward_pre_hook(lambda module, given: seen.extend(given))
    awake(model.unet)
    x, t, k, e = normal(3, 3, 16, 16), torch.tensor([5, 9, 900]), torch.tensor([2, -1, 0]), model.prototypes
    found, (h, tokens) = model.denoise(x, t, k), seen
    e = e if views == "one" else math.sqrt(8) * e / e.norm(dim=1, keepdim=True)             # numbers of size 1
    assert close(tokens[:, 0], torch.stack([e[2], model.null, e[0]]) + pdm.time_embedding(t, 8))
    assert found.std() > 0.01 and found.equal(model.unet(x, t)), "attention's last layer starts at zero"
    awake(model.attention)
    assert h.shape == (3, 16, 8, 8) and not close(model.denoise(x, t, k), found, 1e-2), "before the middle block"

@pytest.mark.parametrize("supervised", [False, True])
def test_the_loss_is_the_weighted_sum_and_each_part_is_given(supervised):
    model, batch, told = network(supervised=supervised), a_batch(chance=(0.19, 0.21, 0, 0.99)), []
    parts = {name: torch.tensor(value) for name, value in zip(LOSSES[1:4 - supervised], (2.0, 3.0, 5.0))}
    model.learn = lambda x0, label, cfg: (torch.tensor([3, 2, 1, 0]), parts, dict(variance_of_z=torch.tensor(7.0)))
    model.denoise = lambda xt, t, k: told.append(k.tolist()) or batch.eps + 2
    for null_prob in (0.2, 0.0, 1.0):
        cfg = config(null_prob=null_prob, supervised=supervised, alignment=0.5, compactness=0.25)
        losses = model(batch, ABAR, cfg)
        assert close(losses.pop("loss"), 4 + 2 + 1.5 + (0 if supervised else 1.25))
        assert close(losses.pop("diffusion"), 4) and losses == {**parts, "variance_of_z": 7}
    assert told == [[-1, 2, -1, 0], [3, 2, 1, 0], [-1] * 4], "hidden where chance is below null_prob"

@pytest.mark.parametrize("part, target, moved, reached", [
    ("diffusion", (0, 2, 2, 1), [0, 2], "unet attention prototypes null"),                  # the last is hidden
    ("diffusion", None, [0, 1, 2], "unet attention prototypes null"),
    ("contrastive", None, [0, 1, 2, 3], "prototypes encoder"), ("compactness", None, [0, 1, 2, 3], "prototypes"),
    ("alignment", (1, 2, 3, 0), [0, 1, 2, 3], "prototypes encoder")])
def test_the_noise_loss_trains_chosen_prototypes_and_the_others_the_encoder(part, target, moved, reached):
    model, batch = awake(network(num_prototypes=4)), a_batch(target or (0, 0, 0, 0), chance=(0.5, 0.5, 0.5, 0.05))
    with torch.no_grad():
        model.prototypes.copy_(model.encoder(batch.x0))       # every image its own
    model(batch, ABAR, config(supervised=target is not None))[part].backward()
    trained = {name: p for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {name.split(".")[0] for name in trained} == {*reached.split()}
    assert model.prototypes.grad.any(1).nonzero().flatten().tolist() == moved

def test_pdm_never_sees_a_label():
    model, batch = network(), a_batch()
    known = model.begin(config(), [pdm.Dataset(batch.x0, batch.target, [*"abcd"])], None, CPU)
    assert known["targets"].tolist() == [-1] * 4

# ---- Sampling, figures, costs, data ------------------------------------------------------------------------------

def test_prototypes_are_drawn_as_often_as_they_were_chosen_or_uniformly():
    def drawn(usage, n, **changes):
        run = SimpleNamespace(model=SimpleNamespace(usage=torch.tensor(usage)))
        return pdm.draw_conditions(config(num_samples=n, **changes), run).tolist()
    assert drawn([0, 0.375, 0.625], 8) == [1] * 3 + [2] * 5 and drawn([0.75, 0, 0.25], 4) == [0, 0, 0, 2]
    assert drawn([0, 0.9, 0.1], 6, frequency="uniform") == [0, 0, 1, 1, 2, 2], "the paper's code"

def sampled(run, out, **words):
    """What samples are drawn from."""
    assert pdm.main(flags(sample=run, num_samples=5, out=out, **words)) == 0
    return samples(out)[1].tolist()

def test_samples_of_prototypes_or_classes_that_are_asked_for(runs, tmp_path):
    assert sampled(runs / "pdm", tmp_path / "numbers", prototype="3,0") == [3, 0, 3, 0, 3]
    assert sampled(runs / "spdm", tmp_path / "names", labels="star,diamond") == [9, 3, 9, 3, 9]
    assert sampled(runs / "plain", tmp_path / "all") == [0] * 5

@pytest.mark.parametrize("name, expected", [("pdm", [200, 100, 30]), ("grey", [122])])      # 0.3 R + 0.59 G + 0.11 B
def test_samples_like_an_image_are_of_its_prototype(runs, tmp_path, monkeypatch, name, expected):
    seen, choose = [], pdm.PDM.choose
    Image.new("RGB", (20, 30), (200, 100, 30)).save(tmp_path / "colour.png")
    monkeypatch.setattr(pdm.PDM, "choose", lambda model, *given: seen.append(given[0]) or choose(model, *given))
    found = sampled(runs / name, tmp_path / "out", like=tmp_path / "colour.png")
    assert seen[0].shape == (1, len(expected), 16, 16) and seen[0][0, :, 3, 3].tolist() == expected
    assert found == 5 * choose(pdm.load_run(runs / name, "cpu").model, seen[0], CPU)[1].argmin(1).tolist()

MEANING = {"alive", "usage_perplexity", "variance_of_z"}
COST = {"parameters", "unet_parameters", "prototype_bytes", "bank_bytes",
        "step_seconds", "step_ratio", "sample_seconds", "sample_ratio"}
CLASSES = {"accuracy", "purity", "nmi"}
JUDGED = {"frechet", "real_frechet", "real_accuracy"}

@pytest.mark.parametrize("name, columns, figures", [
    ("pdm", {*LOSSES, *STATISTICS, "frechet", "accuracy"}, MEANING | COST | JUDGED | CLASSES),
    ("spdm", {*LOSSES[:-1], *STATISTICS, "frechet", "accuracy"}, MEANING | COST | JUDGED | CLASSES),
    ("grey", {*LOSSES, *STATISTICS}, MEANING | COST), ("plain", {"frechet"}, JUDGED)])
def test_runs_leave_pictures_log_their_losses_give_figures_and_sample_by_use(runs, name, columns, figures):
    common = {"script", "step", "machine", "classes", "settings", "log", "seconds", "seconds_before"}
    run, found = pdm.load_run(runs / name, "cpu"), metrics(runs / name)
    assert {*found} == figures | common and {*log(runs / name)[0]} >= columns | {"step", "loss", "seconds"}
    pictures = "samples curves" if name == "plain" else "samples curves prototypes features usage"
    assert {path.stem for path in (runs / name).glob("*.png")} == {*pictures.split()}
    assert samples(runs / name)[1].tolist() == pdm.draw_conditions(run.config, run).tolist()
    if "real_frechet" in found:
        sets, some = pdm.load_sets(run.config), pdm.some_of(60, 20)
        real = pdm.judge_images(run.config, run, sets, sets[1].images[some], sets[1].labels[some])
        assert found["real_frechet"] == pytest.approx(real["frechet"]), "of as many images as samples"

def test_figures_and_pictures_of_prototypes_by_hand(tmp_path, monkeypatch):
    images = torch.arange(8, dtype=torch.uint8).view(8, 1, 1, 1).expand(8, 3, 16, 16)
    test = pdm.Dataset(images, torch.tensor([1, 1, 1, 0, 0, 0, 0, 1]), ["bar", "star"])
    train = pdm.Dataset(images, 1 - test.labels, test.classes)
    chosen, drawn, judged = torch.tensor([0, 0, 0, 2, 2, 0, 1, 3]), {}, []
    distances = torch.arange(8)[:, None] / 10 + (chosen[:, None] != torch.arange(4))        # among equals the first
    cfg = config(num_prototypes=4, prototype_dim=2, num_samples=8)
    model = network(num_prototypes=4, prototype_dim=2).requires_grad_(False)
    run = SimpleNamespace(model=model, device=CPU, config=cfg, log=[])
    model.choose = lambda given, device: (given[:, :2, 0, 0].float(), distances)
    monkeypatch.setattr(pdm, "generate", lambda cfg, run, k: k.byte().view(-1, 1, 1, 1).expand(-1, 3, 16, 16))
    monkeypatch.setattr(pdm, "draw_grid", lambda path, *given: drawn.update({path.stem: given}))
    monkeypatch.setattr(pdm.Figure, "savefig", lambda figure, path, **how: drawn.update({path.stem: figure}))
    monkeypatch.setattr(pdm, "judge_images", lambda cfg, run, sets, *given: judged.extend(given) or {})
    found = pdm.measure_prototypes(cfg, run, [train, test], tmp_path)
    joint = 3 / 8 * math.log2(8 / 3) + 3 / 8 * 3 + 1 / 4 * 2  # in bits; prototypes alone 1.75, classes alone 1
    assert found == pytest.approx(dict(alive=4, usage_perplexity=2 ** 1.75, variance_of_z=2 * 5.25, purity=7 / 8,
                                       nmi=2 * (1.75 + 1 - joint) / 2.75))
    assert pdm.normalised_mutual_information(torch.ones(1, 1)) == 1, "one prototype of one class"
    tiles, rows, _ = drawn["prototypes"]
    assert rows == ["1: 100% bar", "2: 100% bar", "0: 75% star", "3: 100% star"], "by their commonest class"
    assert tiles[13:26, 0, 0, 0].tolist() == [2] * 6 + [255] + [3, 4, 0, 1, 2, 5], "samples; the nearest real images"
    assert drawn["usage"].axes[1].images[0].get_array().tolist() == [[1, 0], [2, 0], [1, 3], [0, 1]]
    model.quality(cfg, run, [train, test])
    assert judged[0][:, 0, 0, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and judged[1].tolist() == [1, 1, 0, 0, 0, 0, 1, 1]

def test_the_cost_is_a_median_of_rounds_beside_the_same_unet(runs, monkeypatch):
    run, spent, turns, loss = pdm.load_run(runs / "pdm", "cpu"), [], [], pdm.noise_loss
    before, steps = checkpoint(runs / "pdm")["average"], iter([99, 2, 99, 2, 9, 2, 4, 2, 3, 2])       # two warm up

    def step(denoise, *given):
        turns.append(type(denoise.__self__))
        spent.append(next(steps))
        return loss(denoise, *given)
    monkeypatch.setattr(pdm, "noise_loss", step)
    monkeypatch.setattr(pdm, "generate", lambda cfg, run, k: spent.append(
        len(k) * (2 + (type(run.model) is pdm.PDM)) + cfg.guidance))
    monkeypatch.setattr(pdm, "time", SimpleNamespace(perf_counter=lambda: sum(spent)))
    found = pdm.measure_cost(run.config, run, [shapes()], 3)
    assert turns == [pdm.PDM, pdm.Unconditional] * 5 and same(run.model.state_dict(), before)
    assert found == dict(step_seconds=4, step_ratio=2, sample_seconds=3, sample_ratio=1.5, prototype_bytes=8 * 8 * 4,
                         parameters=sum(p.numel() for p in run.model.parameters()), bank_bytes=200 * 8 * 4,
                         unet_parameters=sum(p.numel() for p in run.model.unet.parameters()))

def test_eurosat_holds_a_tenth_out_and_begins_again_if_its_unpacking_was_cut_off(tmp_path, monkeypatch):
    kinds, seen, sizes = ["Forest", "Industrial", "River"], [], [10, 30]

    def unpack(url, download_root, md5):
        n = sizes.pop(0)
        for i in range(n):
            folder = f"{download_root}/2750/{kinds[i % 3]}"
            os.makedirs(folder, exist_ok=True)
            Image.new("RGB", (64, 64), (8 * i, 100 * (i % 3), 128)).save(f"{folder}/{i}.jpg")
        pdm.check(n == 30, "cut off")
    monkeypatch.setattr("torchvision.datasets.eurosat.download_and_extract_archive", unpack)
    with pytest.raises(pdm.Stop, match="cut off"):
        pdm.load_dataset("eurosat", "train", 32, tmp_path)
    for split, n in (("train", 27), ("test", 3)):
        data = pdm.load_dataset("eurosat", split, 32, tmp_path)
        means = data.images.double().mean((2, 3))
        assert (means[:, 1] / 100).round().equal(data.labels.double()) and data.classes == kinds and len(means) == n
        seen += (means[:, 0] / 8).round().tolist()
    assert sorted(seen) == list(range(30)), "no image is in both"

def faces(root, monkeypatch):
    """CelebA of 14 images, whose red is 15 times their number; -> attributes bool [14, 40], no. 20 is Male."""
    monkeypatch.setattr("torchvision.datasets.celeba.check_integrity", lambda *given: True)
    folder, known = root / "celeba/img_align_celeba", normal(14, 40) > 0
    folder.mkdir(parents=True)
    names = " ".join(f"T{i}" if i != 20 else "Male" for i in range(40))
    signs = [" ".join(" 1" if x else "-1" for x in row) for row in known]
    for file, head, rows in (
            ("list_attr_celeba", f"14\n{names} \n", signs), ("list_eval_partition", "", "00001222222222"),
            ("list_landmarks_align_celeba", "14\nx y\n", ["69 109"] * 14), ("identity_CelebA", "", "78912312345678"),
            ("list_bbox_celeba", "14\nimage_id x_1 y_1 width height\n", ["   9 7 226 313"] * 14)):
        lines = [f"{i + 1:06}.jpg {row}\n" for i, row in enumerate(rows)]
        (root / f"celeba/{file}.txt").write_text(head + "".join(lines))
    for i in range(14):
        Image.new("RGB", (178, 218), (15 * i, 99, 99)).save(folder / f"{i + 1:06}.jpg")
    return known

def test_celeba_is_read_with_male_as_its_class(tmp_path, monkeypatch):
    male = faces(tmp_path, monkeypatch)[:, 20].long()
    for split, part in (("train", slice(0, 4)), ("test", slice(5, 14))):                    # the fifth is validation
        data = pdm.load_dataset("celeba", split, 32, tmp_path)
        assert data.classes == ["not male", "male"] and data.labels.equal(male[part])
        assert close(data.images[:, 0].double().mean((1, 2)), 15 * torch.arange(14)[part], 4)
