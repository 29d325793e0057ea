"""PDM and s-PDM: what pdm.py does not share with the other scripts. Exact answers wherever there is one."""
import functools
import itertools
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

import conftest
import pdm
from conftest import CPU, ROOT, awake, checkpoint, close, contents, flags, log, metrics, normal, refused, same, samples

args, config = (functools.partial(make, pdm, num_prototypes=4) for make in (conftest.args, conftest.config))
LOSSES = ["diffusion", "contrastive", "alignment", "compactness"]
STATISTICS = ["variance_of_z", "usage_perplexity", "dead_prototypes"]
variable = functools.partial(torch.tensor, dtype=torch.float32, requires_grad=True)
shapes = functools.partial(pdm.load_dataset, "shapes", image_size=16)
ABAR, CORNERS = pdm.alpha_bars(1000), [[-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]]

@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Finished runs, which tests only read: PDM, s-PDM, the baseline, and PDM on a folder `flat` without classes."""
    root = tmp_path_factory.mktemp("runs")
    (root / "flat").mkdir()
    for i in range(4):
        Image.effect_noise((16, 16), 50 + 50 * i).save(root / f"flat/{i}.png")
    variants = dict(pdm={}, spdm=dict(supervised=True), plain=dict(conditioning="none"),
                    one=dict(dataset="folder", data_dir=root / "flat", num_prototypes=1))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("draw_curves", "draw_samples", "draw_denoising", "measure_cost"):      # tested elsewhere
            patch.setattr(pdm, name, lambda *a: {})
        for name, changes in variants.items():
            assert pdm.main(args(out=root / name, eval_every=3, **changes)) == 0
    return SimpleNamespace(**{name: root / name for name in (*variants, "flat")})

def trained(folder, data=None, **changes):
    """The model before training, and the checkpoint after."""
    cfg, sets = config(**changes), [data or shapes(), shapes("test")]
    pdm.new_run(cfg, sets, folder, CPU)
    model = pdm.load_run(folder, "cpu").model
    pdm.train(cfg, sets, folder, CPU)
    return model, checkpoint(folder)

def network(**changes):
    torch.manual_seed(0)
    return config(**changes).build(dict(shape=[3, 16, 16], classes=list("abcdefg")))

def learner(scale=1.0, **changes):
    """A PDM of one view with prototypes at CORNERS, perhaps scaled, whose images are their own features: [B, 2]."""
    model = network(**dict(prototype_dim=2, num_prototypes=3, views="one") | changes)
    model.encoder = nn.Flatten()
    model.prototypes.data = scale * torch.tensor(CORNERS)
    return model

def a_batch(target=(0, 1, 2, 3), chance=(0.5, 0.5, 0.5, 0.5)):
    x0, eps = normal(2, 4, 3, 16, 16)
    return pdm.Batch(x0.clamp(-1, 1), torch.tensor(target), torch.tensor([1, 200, 600, 999]), eps, torch.tensor(chance))

# ---- Losses, the choice of a prototype, attention ---------------------------------------------------------------

def test_variants_start_with_the_same_unet_and_train_every_weight(tmp_path):
    variants = ({}, dict(conditioning="none"), dict(supervised=True))
    models = [trained(tmp_path, steps=0, **changes)[0] for changes in variants]
    for model in models:
        assert all(p.equal(q) for p, q in zip(model.unet.parameters(), models[0].unet.parameters()))
        groups = [{id(p) for p in group["params"]} for group in model.param_groups()]
        assert sorted(p for group in groups for p in group) == sorted(id(p) for p in model.parameters())
        assert {id(p) for p in model.unet.parameters()} in groups, "the U-Net's gradient is clipped apart"
    assert models[2].prototypes.shape == (10, 8) and 0.09 < models[2].prototypes.abs().max() <= 0.1

def test_the_encoder_is_four_halving_convolutions_and_a_mean_over_pixels():
    net, x = pdm.feature_encoder(3, 8).eval(), normal(2, 3, 48, 48)
    kinds = "Conv2d ReLU Conv2d BatchNorm2d ReLU Conv2d BatchNorm2d ReLU Conv2d AdaptiveAvgPool2d Flatten"
    assert [type(layer).__name__ for layer in net] == kinds.split() and net[5].weight.shape == (256, 128, 4, 4)
    assert net[:9](x).shape == (2, 8, 3, 3) and close(net(x).detach(), net[:9](x).mean((2, 3)).detach())

def test_distances_are_not_squared_exact_far_from_the_origin_and_float32_from_half():
    z, e, far = torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([[3.0, 4.0], [6.0, 8.0]]), torch.full((40, 2), 1e3)
    assert close(pdm.distances(z, e), [[5, 10], [0, 5]]) and pdm.distances(z.half(), e.half()).dtype == torch.float32
    assert (pdm.distances(far, far + torch.tensor([0, 0.0625])) == 0.0625).all(), "no product, which would cancel"

def test_contrastive_loss_is_the_cross_entropy_of_negative_distances():
    d, k = torch.tensor([[1.0, 2.0], [3.0, 1.5]]), torch.tensor([0, 1])
    for tau in (1.0, 2.0):
        assert close(2 * pdm.contrastive_loss(d, k, tau), math.log1p(math.exp(-tau)) + math.log1p(math.exp(-1.5 * tau)))

def test_contrastive_gradient_draws_z_to_its_prototype_and_pushes_the_others():
    z, e, tau = variable([[0.0, 0.0]]), variable([[3.0, 0.0], [-4.0, 0.0]]), 0.7            # distances 3 and 4
    pdm.contrastive_loss(pdm.distances(z, e), torch.tensor([0]), tau).backward()
    p = 1 / (1 + math.exp(tau))                               # of the other prototype
    assert close(z.grad, [[-2 * tau * p, 0]])
    assert close(e.grad, [[tau * p, 0], [tau * p, 0]]), "downhill: the chosen to z, the other away"
    pdm.contrastive_loss(pdm.distances(e[:1], e), torch.tensor([0]), 1.0).backward()
    assert e.grad.isfinite().all(), "also where z is its prototype"

def test_alignment_loss_is_a_mean_over_elements_that_moves_features_and_prototypes():
    z, e = variable([[1.0, 2.0], [3.0, 4.0]]), variable([[0.0, 0.0], [5.0, 5.0], [1.0, 1.0]])
    loss = pdm.alignment_loss(z, e, torch.tensor([0, 2]))
    loss.backward()
    assert close(loss.detach(), (1 + 4 + 4 + 9) / 4)
    assert close(z.grad, [[0.5, 1], [1, 1.5]]), "2 (z - e) / 4"
    assert close(e.grad, [[-0.5, -1], [0, 0], [-1, -1.5]]), "no stop-gradient"

@pytest.mark.parametrize("rows, expected", [                  # K (K - 1) if all are one; opposite is as bad as equal
    ([[2.0, 0, 0], [0, 3, 0], [0, 0, 0.5]], 0), ([[7.0, 1]], 0), ([[1.0, 2, 3]] * 4, 12),
    ([[1.0, 2, 3], [-2, -4, -6]], 2), ([[1.0, 0], [1, 1], [0, 1]], 2 * (0.5 + 0 + 0.5))])
def test_compactness_loss_is_the_sum_of_squared_cosines_off_the_diagonal(rows, expected):
    for scale in (1, torch.linspace(0.5, 20, len(rows))[:, None]):                          # lengths do not matter
        assert close(pdm.compactness_loss(scale * torch.tensor(rows)), expected)

def test_compactness_gradient_turns_prototypes_apart():
    e = variable([[1.0, 0.0], [1.0, math.sqrt(3)]])           # an angle of 60 degrees, lengths 1 and 2
    pdm.compactness_loss(e).backward()                        # 2 cos^2, its derivative by the angle -2 sin(120)
    assert close(e.grad, [[0, math.sqrt(3)], [0.75, -math.sqrt(3) / 4]])

def by_hand(scores, rounds=3):
    """The balanced assignment of scores [B, K], in float64 and without logarithms."""
    q = np.exp(np.array(scores.tolist()))
    for _ in range(rounds):
        q = q / q.sum(0)
        q = q / q.sum(1, keepdims=True)
    return torch.from_numpy(q)

def test_a_balanced_assignment_scales_columns_and_then_rows_three_times():
    scores = (2 * normal(5, 3)).requires_grad_()
    q = pdm.balanced_assignment(scores)
    assert close(q, by_hand(scores)) and close(q.sum(1), torch.ones(5)) and not q.requires_grad
    assert not close(q, by_hand(scores, 2), 1e-3) and not close(q.sum(0), torch.full((3,), 5 / 3), 1e-3)
    assert close(pdm.balanced_assignment(scores, rounds=1), by_hand(scores, 1)), "its last scaling is of rows"

def test_in_the_limit_prototypes_receive_equal_shares_and_sums_with_rows_or_columns_change_nothing():
    scores, a, b = normal(12, 3), normal(12, 1, seed=1), normal(3, seed=2)
    q, moved = (pdm.balanced_assignment(given, 200) for given in (scores, scores + a + b))
    assert close(q.sum(1), torch.ones(12)) and close(q.sum(0), torch.full((3,), 4.0), 1e-5) and close(q, moved, 1e-5)
    r = math.exp((0.3 + 0.9 + 0.2 - 0.8) / 2)                 # q11 q22 / (q12 q21) stays, and q11 = q22, q12 = q21
    q = pdm.balanced_assignment(torch.tensor([[0.3, -0.2], [0.8, 0.9]]), 200)
    assert close(q, [[r / (1 + r), 1 / (1 + r)], [1 / (1 + r), r / (1 + r)]], 1e-5)

@pytest.mark.parametrize("n", [2, 3])
def test_each_view_predicts_what_is_assigned_to_the_others(n):
    cosines = [variable((0.2 * normal(4, 3, seed=i)).tolist()) for i in range(n)]
    q, p = [by_hand(20 * cos) for cos in cosines], [(10 * cos.detach()).softmax(1) for cos in cosines]
    expected = -sum(q[j][b, k] * p[i][b, k].log() for i in range(n) for j in range(n) if i != j
                    for b in range(4) for k in range(3)) / 4 / (n * (n - 1))
    loss = pdm.swapped_loss(cosines)
    loss.backward()
    assert close(loss.detach(), expected) and close(pdm.swapped_loss(cosines[::-1]).detach(), expected), "symmetric"
    for i, cos in enumerate(cosines):
        others = sum(q[j] for j in range(n) if j != i)
        assert close(cos.grad, ((n - 1) * p[i] - others) / 0.1 / 4 / (n * (n - 1))), "targets: constants"

def test_the_second_of_two_processes_assigns_the_images_of_both_and_learns_from_its_own(monkeypatch):
    monkeypatch.setattr(pdm, "RANK", 1)                       # the first has these cosines, shifted by a column
    monkeypatch.setattr(pdm, "in_all_processes", lambda rows: torch.cat([rows.roll(1, 1), rows]).detach())
    cosines = 0.2 * normal(2, 4, 3)
    q1, q2 = (by_hand(torch.cat([cos.roll(1, 1), cos]) / 0.05)[4:] for cos in cosines)
    expected = sum(F.cross_entropy(cos.double() / 0.1, q) / 2 for cos, q in zip(cosines, (q2, q1)))
    assert close(pdm.swapped_loss([*cosines]), expected)

def test_pdm_chooses_the_nearest_prototype_and_s_pdm_the_labels():
    z, label = torch.tensor([[0.8, -0.8], [-0.8, -0.8], [-0.6, 0.4], [0.2, -1.0]]), torch.tensor([2, 2, 0, 1])
    k, losses, _ = learner().learn(z, None, config())
    assert k.tolist() == [1, 0, 2, 1] and set(losses) == {"contrastive", "alignment", "compactness"}
    k, losses, _ = learner().learn(z, label, config())
    assert k.equal(label) and set(losses) == {"contrastive", "alignment"}, "s-PDM has no compactness loss"

def test_learn_gives_the_losses_of_the_choice_with_its_sharpness():
    z, model = torch.tensor([[0.8, -0.9], [-0.8, 0.7]]), learner()
    for label in (None, torch.tensor([0, 1])):
        k, losses, _ = model.learn(z, label, config(tau=0.3))
        d = (z[:, None] - model.prototypes).square().sum(2).sqrt()
        assert close(losses["contrastive"].detach(), F.cross_entropy(-0.3 * d, k).detach())
        assert close(losses["alignment"].detach(), (z - model.prototypes[k]).square().mean().detach())

def test_with_two_views_directions_count_the_clean_image_chooses_and_all_three_are_swapped(monkeypatch):
    model, cfg, given = learner(torch.tensor([[9.0], [1.0], [0.1]]), views="two"), config(), []
    z, *views = x = torch.tensor([[[0.8, -0.5], [-0.1, -0.2], [-3.0, 2.0]], [[1, 0.9], [0, -1], [2, 2]],
                                  [[-1.0, 0.5], [0.3, 3.0], [-1, -4]]])
    rest = iter(views)
    monkeypatch.setattr(pdm, "random_view", lambda image, settings: given.append((image, settings)) or next(rest))
    model.encoder.register_forward_pre_hook(lambda module, images: given.append(images[0]))
    k, losses, statistics = model.learn(z, None, cfg)
    assert given[:2] == [(z, cfg)] * 2 and len(given) == 3 and given[2].sort(0)[0].equal(x.flatten(0, 1).sort(0)[0])
    z, one, two = x / x.norm(dim=2, keepdim=True)
    e = torch.tensor(CORNERS) / math.sqrt(2)                  # their cosines: 0, 0 and -1
    assert k.tolist() == [1, 0, 2] and close(statistics["variance_of_z"], z.var(0, correction=0).sum())
    expected = pdm.swapped_loss([v @ e.T for v in (z, one, two)]), (z - e[k]).square().mean(), torch.tensor(2.0)
    assert close(torch.stack([losses[name] for name in LOSSES[1:]]).detach(), torch.stack(expected))

@pytest.mark.parametrize("views", ["one", "two"])
def test_learn_stays_in_float32_under_mixed_precision(views):
    model, x, found = network(views=views), normal(4, 3, 16, 16), []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled):
            found.append(model.learn(x, None, config())[1:])
        model.usage.fill_(0.25)
    assert same(*found) and all(v.dtype == torch.float32 for part in found[1] for v in part.values())

def test_statistics_by_hand():
    model = learner().eval()
    for usage, dead in (((0.7, 0.298, 0.002), 1), ((0.7, 0.296, 0.004), 0), ((0.0, 1.0, 0.0), 2)):      # 1 %: 0.0033
        model.usage.copy_(torch.tensor(usage))
        _, _, statistics = model.learn(torch.tensor([[-1.0, -1.0], [2.0, 0.0]]), None, config())
        assert close(statistics.pop("variance_of_z"), 1.5 ** 2 + 0.5 ** 2), "summed over dimensions, divided by B"
        assert close([*statistics.values()], [math.exp(-sum(p * math.log(p) for p in usage if p)), dead])

def test_usage_is_a_moving_average_of_the_choices_in_training_and_of_no_others():
    model, usage, z = learner(), torch.full((3,), 1 / 3), torch.tensor([[0.9, -0.8], [-1, -1], [0.8, -1], [1, -1]])
    for label, share in ((None, [0.25, 0.75, 0]), (torch.tensor([2, 2, 1, 2]), [0, 0.25, 0.75])):
        usage = 0.99 * usage + 0.01 * torch.tensor(share)
        _, _, statistics = model.learn(z, label, config())
        assert close(model.usage, usage) and close(statistics["usage_perplexity"].log(), -(usage * usage.log()).sum())
    model.eval().learn(z, None, config())
    model.choose(torch.zeros(3, 2, dtype=torch.uint8), CPU)
    assert close(model.usage, usage)

@pytest.mark.parametrize("changes, length", [({}, 2), (dict(views="two"), 1), (dict(views="two", supervised=True), 2)])
def test_images_are_compared_with_prototypes_as_in_training(changes, length):
    z, d = learner(2.0, **changes).choose(torch.tensor([[0, 255], [0, 0], [255, 0]], dtype=torch.uint8), CPU)
    factor = 1 if length == 2 else math.sqrt(0.5)             # all of length 1 if two views are compared, else as is
    corners, expected = torch.tensor(CORNERS), factor * torch.tensor([[-1.0, 1.0], [-1, -1], [1, -1]])
    assert close(z, expected) and close(d, torch.cdist(expected, length * factor * corners))

# ---- Random views -----------------------------------------------------------------------------------------------

def viewed(x, forget, seed=0, **changes):
    torch.manual_seed(seed)
    return pdm.random_view(x, config(forget=forget, **changes))

def least_squares(x, v):
    """The factor a of each image for which a x is nearest to v, images [N, 1, 1, 1]."""
    return (x * v).sum((1, 2, 3), keepdim=True) / x.square().sum((1, 2, 3), keepdim=True)

def spans(values, low, high):
    """Values in this range, from end to end, each drawn for itself."""
    edge = 0.05 * (high - low)
    return low - 1e-4 < values.min() < low + edge and high - edge < values.max() < high + 1e-4

IMAGES = normal(1, 3, 24, 24).expand(300, -1, -1, -1)         # one image, so that only what is drawn differs

@pytest.mark.parametrize("forget", ["place", "mirror", "hue", "light", "saturation", "form", config().forget])
def test_a_view_is_drawn_from_torchs_generator_for_each_image(forget):
    one, again, other = (viewed(IMAGES, forget, seed) for seed in (0, 0, 1))
    assert one.shape == IMAGES.shape and one.dtype == torch.float32 and one.equal(again) and not one.equal(other)
    assert (one != one[:1]).flatten(1).any(1).sum() > 100 and viewed(IMAGES, "").equal(IMAGES)

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
    assert close(viewed(IMAGES, "place", view_size="1,1"), IMAGES, 1e-4)

def test_mirror_shows_half_of_the_images_from_the_other_side():
    turned = (viewed(IMAGES, "mirror") == IMAGES.flip(-1)).flatten(1).all(1)
    assert 120 < turned.sum() < 180 and viewed(IMAGES, "mirror")[~turned].equal(IMAGES[~turned])

def test_hue_gives_every_order_of_the_channels_and_in_half_of_the_images_dark_for_bright():
    kinds = [(order, sign) for order in itertools.permutations(range(3)) for sign in (-1, 1)]
    found = [kind for image in viewed(IMAGES, "hue") for kind in kinds if image.equal(kind[1] * IMAGES[0, [*kind[0]]])]
    assert len(found) == 300 and set(found) == {*kinds} and 120 < sum(sign > 0 for _, sign in found) < 180

def test_light_is_one_contrast_and_one_brightness_and_saturation_scales_what_is_not_grey():
    v, grey = viewed(IMAGES, "saturation"), IMAGES.mean(1, keepdim=True)
    a = least_squares(IMAGES - grey, v)
    assert close(v, grey + a * (IMAGES - grey), 1e-5) and spans(a, 0, 1.6)
    assert 40 < (a.abs() < 1e-6).sum() < 80 and 60 < (a > 0.8).sum() < 200, "a fifth is grey"
    v, centred = viewed(IMAGES, "light"), IMAGES - IMAGES.mean((1, 2, 3), keepdim=True)
    a = least_squares(centred, v)
    b = (v - a * IMAGES).mean((1, 2, 3), keepdim=True)
    assert close(v, a * IMAGES + b, 1e-5) and spans(a, 0.6, 1.4) and spans(b, -0.6, 0.6)
    assert torch.cat([a, b], 1).flatten(1).T.corrcoef()[0, 1].abs() < 0.2

def test_form_moves_whole_pixels_within_each_quarter():
    number = torch.arange(576.0).view(24, 24)                 # each pixel has its own, in all channels
    v = viewed(torch.stack([number, number + 1000, number + 2000]).expand(300, -1, -1, -1), "form")
    assert (v[:, 1] - v[:, 0] == 1000).all() and (v[:, 2] - v[:, 0] == 2000).all(), "channels stay together"
    assert v[:, 0].flatten(1).sort(1)[0].equal(number.flatten().expand(300, -1)), "no pixel is lost"
    assert (v[:, 0] // 24 // 12 == number // 24 // 12).all() and (v[:, 0] % 24 // 12 == number % 24 // 12).all()
    assert all(len(v[:, 0, i, i].unique()) > 100 for i in range(24)), "any of the quarter's 144 may come"

# ---- Attention, the denoiser ------------------------------------------------------------------------------------

def attention_layer(channels=16, dim=6):
    return awake(pdm.PrototypeAttention(channels, dim), 5).requires_grad_(False)

def test_one_key_adds_the_same_vector_at_every_pixel_whatever_they_hold():
    layer, tokens = attention_layer(), normal(2, 1, 6)
    expected = layer.out(layer.kv(tokens[:, 0])[:, 16:])[:, :, None, None].expand(2, 16, 4, 4)
    for h in (normal(2, 16, 4, 4, seed=1), normal(2, 16, 4, 4, seed=2)):
        assert close(layer(h, tokens) - h, expected, 1e-5), "out(v): the softmax over one key is 1"

def test_one_key_gives_the_queries_no_gradient():
    layer = attention_layer().requires_grad_(True)
    layer(normal(2, 16, 4, 4), normal(2, 1, 6)).square().sum().backward()
    q, k, v = layer.q.weight.grad, *layer.kv.weight.grad.split(16)
    assert q.abs().max() < 1e-4 and k.abs().max() < 1e-4 < v.abs().max(), "nor the keys"

@pytest.mark.parametrize("channels, heads", [(16, 8), (12, 4)])
def test_several_keys_are_a_plain_softmax_and_differ_from_pixel_to_pixel(channels, heads):
    layer, bias = attention_layer(channels), torch.tensor([[0.0, 1.5, 0.0], [2.0, 0.0, 0.0]])
    h, tokens = 3 * normal(2, channels, 4, 4), 3 * normal(2, 3, 6, seed=1)
    q = layer.q(layer.norm(h).flatten(2).transpose(1, 2)).unflatten(2, (heads, -1))         # [B, HW, heads, c]
    k, v = (part.unflatten(2, (heads, -1)) for part in layer.kv(tokens).chunk(2, -1))       # [B, n, heads, c]
    for given, added in ((bias, bias[:, None, None]), (None, 0)):
        weights = (torch.einsum("bphc,bnhc->bhpn", q, k) / math.sqrt(channels / heads) + added).softmax(-1)
        found = layer.out(torch.einsum("bhpn,bnhc->bphc", weights, v).flatten(2)).transpose(1, 2).reshape(h.shape)
        assert close(layer(h, tokens, given), h + found, 1e-5) and found.std((2, 3)).max() > 0.05

def test_the_bias_raises_the_weight_of_the_chosen_key():
    layer, eye = attention_layer(4, 4), torch.eye(4)
    for part, weight in ((layer.q, 0 * eye), (layer.kv, torch.cat([eye, eye])), (layer.out, eye)):
        part.weight.copy_(weight), part.bias.zero_()
    for e in (1.0, 2.0, 20.0):                                # no query: the weights are the softmax of the bias
        added = layer(torch.zeros(1, 4, 2, 2), eye[None, :3], torch.tensor([[0.0, math.log(e), 0.0]]))[0, :, 1, 0]
        assert close(added, [1 / (2 + e), e / (2 + e), 1 / (2 + e), 0])

@pytest.mark.parametrize("attend, views", [("one", "one"), ("one", "two"), ("all", "two")])
def test_keys_are_prototypes_plus_sinusoids_of_the_noise_level_and_a_bias_marks_the_chosen(attend, views):
    model, seen = network(attend=attend, views=views, multipliers="1,2").eval().requires_grad_(False), []
    model.attention.register_forward_pre_hook(lambda module, given: seen.append(given))
    awake(model.unet)
    x, t, k, e = normal(3, 3, 16, 16), torch.tensor([5, 9, 900]), torch.tensor([2, -1, 0]), model.prototypes
    found, (h, tokens, bias) = model.denoise(x, t, k), seen[0]
    e = e if views == "one" else math.sqrt(8) * e / e.norm(dim=1, keepdim=True)             # numbers of size 1
    expected = [e[2:3], model.null[None], e[:1]] if attend == "one" else [e, model.null.expand(4, 8), e]
    assert close(tokens, torch.stack(expected) + pdm.time_embedding(t, 8)[:, None])
    assert (bias is None) if attend == "one" else bias.tolist() == [[0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    assert found.std() > 0.01 and found.equal(model.unet(x, t)), "attention's last layer starts at zero"
    awake(model.attention)
    assert h.shape == (3, 16, 8, 8) and not close(model.denoise(x, t, k), found, 1e-2), "before the middle block"

@pytest.mark.parametrize("supervised", [False, True])
def test_the_loss_is_the_weighted_sum_and_each_part_is_given(supervised):
    model, batch, told = network(supervised=supervised), a_batch(chance=(0.19, 0.21, 0, 0.99)), []
    parts = {name: torch.tensor(value) for name, value in zip(LOSSES[1:4 - supervised], (2.0, 3.0, 5.0))}

    def learn(x0, label, given):
        assert x0 is batch.x0 and given is cfg and label is (batch.target if supervised else None)
        return torch.tensor([3, 2, 1, 0]), parts, dict(variance_of_z=torch.tensor(7.0))
    model.learn, model.denoise = learn, lambda xt, t, k: told.append(k.tolist()) or batch.eps + 2
    for null_prob in (0.2, 0.0, 1.0):
        cfg = config(null_prob=null_prob, supervised=supervised, alignment=0.5, compactness=0.25)
        losses = model(batch, ABAR, cfg)
        assert next(iter(losses)) == "loss" and close(losses.pop("loss"), 4 + 2 + 1.5 + (0 if supervised else 1.25))
        assert close(losses.pop("diffusion"), 4) and losses == {**parts, "variance_of_z": 7}
    assert told == [[-1, 2, -1, 0], [3, 2, 1, 0], [-1] * 4], "hidden where chance is below null_prob"

def gradients(part, attend="one", target=None, **batch):
    """The model after the gradients of one of the losses, and which parts have one; of s-PDM if there is a target."""
    model, batch = awake(network(attend=attend)), a_batch(target or (0, 1, 2, 3), **batch)
    with torch.no_grad():
        model.prototypes.copy_(model.encoder(batch.x0))       # every image its own
    model(batch, ABAR, config(supervised=target is not None))[part].backward()
    return model, {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}

def test_the_noise_loss_reaches_chosen_prototypes_and_not_the_encoder_which_the_others_train():
    model, parts = gradients("diffusion", target=(0, 2, 2, 1), chance=(0.5, 0.5, 0.5, 0.05))
    assert model.prototypes.grad.any(1).tolist() == [True, False, True, False], "hidden: the null vector instead"
    assert parts == {"unet", "attention", "prototypes", "null"}
    model, parts = gradients("diffusion")
    assert model.prototypes.grad.any(1).all() and parts == {"unet", "attention", "prototypes"}
    model, parts = gradients("diffusion", "all", (0, 0, 0, 0))
    assert model.prototypes.grad.any(1).all() and parts == {"unet", "attention", "prototypes", "bias"}
    for part, target, encoder in (("contrastive", (1, 2, 3, 0), ["encoder"]), ("alignment", (1, 2, 3, 0), ["encoder"]),
                                  ("contrastive", None, ["encoder"]), ("compactness", None, [])):
        model, parts = gradients(part, target=target)
        assert model.prototypes.grad.any(1).all() and parts == {"prototypes", *encoder}

def test_pdm_never_sees_a_label(tmp_path):
    data = shapes()
    others = [pdm.Dataset(data.images, data.labels.roll(1), data.classes), pdm.Dataset(data.images, None, [])]
    one, two, three = (trained(tmp_path, images, steps=2)[1] for images in (data, *others))
    assert all(same(one[part], other[part]) for other in (two, three) for part in ("model", "average", "optimizer"))

def test_contingency_purity_resemblance_and_mutual_information_by_hand():
    table = pdm.contingency(torch.tensor([0, 0, 1, 2]), torch.tensor([1, 1, 0, 1]), 3, 2)
    assert table.tolist() == [[0, 2], [1, 0], [0, 1]] and pdm.purity(torch.tensor([[3.0, 1], [0, 4], [2, 2]])) == 0.75
    z, many = torch.tensor([[0.0], [1.0], [10.0], [12.0]]), torch.arange(6000)[:, None] // 3000
    assert pdm.resemblance(z, torch.tensor([0, 0, 1, 1])) == pytest.approx(1.5 / 10.5)      # (1, 2) / (10, 12, 9, 11)
    assert math.isnan(pdm.resemblance(z, torch.arange(4))) and math.isnan(pdm.resemblance(z, torch.ones(4)))
    assert pdm.resemblance(many.float(), many[:, 0]) == 0, "a random part of many, which come sorted"
    ln2, classes = math.log(2), -0.75 * math.log(0.75) - 0.25 * math.log(0.25)              # joint entropy: 1.5 ln 2
    for rows, expected in (([[5.0, 1], [10, 2], [15, 3]], 0), ([[0.0, 3], [4, 0]], 1), ([[1.0]], 1),
                           ([[2.0, 0], [1, 1]], 2 * (ln2 + classes - 1.5 * ln2) / (ln2 + classes))):
        assert close(pdm.normalised_mutual_information(torch.tensor(rows).double()), expected)

def test_prototypes_are_drawn_as_often_as_they_were_chosen_or_uniformly():
    def drawn(usage, n, **changes):
        run = SimpleNamespace(model=SimpleNamespace(usage=torch.tensor(usage)))
        return pdm.draw_conditions(config(num_samples=n, **changes), run).tolist()
    assert drawn([0, 0.375, 0.625], 8) == [1] * 3 + [2] * 5 and drawn([0.75, 0, 0.25], 4) == [0, 0, 0, 2]
    assert drawn([0, 0.9, 0.1], 6, frequency="uniform") == [0, 0, 1, 1, 2, 2], "the paper's code"
    assert drawn([0, 1.0], 3, conditioning="none") == [0, 0, 0]

def test_samples_of_prototypes_asked_for_or_of_the_one_that_an_image_chooses(runs, tmp_path, capsys):
    def sampled(run, **words):
        count = len([*tmp_path.glob("s*")])
        assert pdm.main(flags(sample=run, num_samples=5, out=tmp_path / f"s{count}", **words)) == 0
        return samples(tmp_path / f"s{count}")[1].tolist()
    assert sampled(runs.pdm, prototype="3,0") == [3, 0, 3, 0, 3] and sampled(runs.plain) == [0] * 5
    assert sampled(runs.spdm, labels="star,3") == [9, 3, 9, 3, 9] and sampled(runs.spdm, prototype=4) == [4] * 5
    images = shapes("test").images
    for i, k in enumerate(pdm.load_run(runs.pdm, "cpu").model.choose(images[:3], CPU)[1].argmin(1).tolist()):
        Image.fromarray(images[i].permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
        assert sampled(runs.pdm, like=tmp_path / "a.png") == [k] * 5 and f"prototype {k}" in capsys.readouterr().out

# ---- Whole runs, what goes wrong, and data sets in their real formats -------------------------------------------

MEANING = {"alive", "usage_perplexity", "variance_of_z", "within_between_samples", "within_between_real", "rechosen"}
LABELLED = {"frechet", "real_frechet", "real_accuracy", "purity", "nmi"}

@pytest.mark.parametrize("name, columns, figures", [
    ("pdm", {*LOSSES, *STATISTICS, "frechet"}, MEANING | LABELLED | {"accuracy"}),
    ("one", {*LOSSES, *STATISTICS}, MEANING),
    ("spdm", {*LOSSES[:-1], *STATISTICS, "frechet", "accuracy"}, MEANING | LABELLED | {"accuracy"}),
    ("plain", {"frechet"}, LABELLED - {"purity", "nmi"})])
def test_runs_leave_pictures_log_their_losses_give_figures_and_sample_by_use(runs, name, columns, figures):
    folder, common = getattr(runs, name), "script step machine torch classes settings log parameters seconds_".split()
    assert len([*folder.glob("*.png")]) == (0 if name == "plain" else 3)
    assert {key for key in metrics(folder) if not key.startswith(tuple(common))} == figures
    assert set(log(folder)[0]) == columns | {"loss", "step", "lr", "seconds", "skipped"}
    if "real_frechet" in figures:
        judge = pdm.load_judge(config(data_dir=folder.parent), shapes(), CPU)
        real = pdm.judge_images(judge, *pdm.as_many(shapes("test"), 20), CPU)
        assert metrics(folder)["real_frechet"] == pytest.approx(real["frechet"]), "of as many images as samples"
    chosen = [0] * 20 if name == "plain" else pdm.draw_conditions(config(), pdm.load_run(folder, "cpu")).tolist()
    assert samples(folder)[1].tolist() == chosen

def test_figures_of_prototypes_can_be_computed_again(runs, tmp_path, monkeypatch):
    grids, figures, run = [], metrics(runs.pdm), pdm.load_run(runs.pdm, "cpu")
    train, test, (images, k) = shapes(), shapes("test"), (torch.from_numpy(a) for a in samples(runs.pdm))
    monkeypatch.setattr(pdm, "draw_grid", lambda path, tiles, *given: grids.append(tiles.unflatten(0, (4, 13))))
    pdm.measure_prototypes(config(), run, [train, test], images.permute(0, 3, 1, 2), k, tmp_path)
    (z_train, d_train), (z, d), (z_made, d_made) = (
        run.model.choose(x, CPU) for x in (train.images, test.images, images.permute(0, 3, 1, 2)))
    used, chosen, again = (distances.argmin(1) for distances in (d_train, d, d_made))
    alive, table = np.unique(used, return_counts=True)[1] / 200, pdm.contingency(chosen, test.labels, 4, 10)
    expected = dict(
        alive=len(alive), usage_perplexity=np.exp(-(alive * np.log(alive)).sum()), variance_of_z=z.numpy().var(0).sum(),
        within_between_samples=pdm.resemblance(z_made, k), within_between_real=pdm.resemblance(z, chosen),
        rechosen=np.mean((again == k).tolist()), purity=pdm.purity(table), nmi=pdm.normalised_mutual_information(table))
    assert {name: figures[name] for name in expected} == pytest.approx(expected, rel=1e-4, nan_ok=True)
    order, tiles = sorted(range(4), key=lambda k: table[k].tolist().index(table[k].max())), grids[0]
    e = run.model.prototypes / run.model.prototypes.norm(dim=1, keepdim=True)
    for shown, k in zip(tiles, order):
        assert shown[7:].equal(train.images[(z_train - e[k]).square().sum(1).argsort()[:6]]) and (shown[6] == 255).all()
    assert tiles[:, :6].flatten(0, 1).equal(pdm.generate(config(), run, torch.tensor(order).repeat_interleave(6)))

def planted(runs, k_of):
    """The run of PDM, in which an image chooses prototype k_of(images)."""
    run = pdm.load_run(runs.pdm, "cpu")
    run.model.choose = lambda images, device: (torch.zeros(len(images), 8), -F.one_hot(k_of(images), 4).float())
    return run

def test_pictures_show_prototypes_in_the_order_of_their_commonest_class(runs, tmp_path, monkeypatch):
    images, drawn = torch.arange(8, dtype=torch.uint8).view(8, 1, 1, 1).expand(8, 3, 16, 16), []
    data = pdm.Dataset(images, torch.tensor([1, 1, 1, 0, 0, 0, 0, 1]), ["bar", "star"])
    run = planted(runs, lambda images: torch.tensor([0, 0, 0, 2, 2, 0, 1, 3])[images[:, 0, 0, 0].long() % 8])
    table = pdm.crosstable(run, data)
    assert table.tolist() == [[1, 3], [1, 0], [2, 0], [0, 1]]
    assert pdm.crosstable(run, pdm.Dataset(images, None, [])).tolist() == [[4], [1], [2], [1]]
    monkeypatch.setattr(pdm, "draw_grid", lambda path, tiles, rows, *given: drawn.append(rows))
    monkeypatch.setattr(Figure, "savefig", lambda figure, *given, **options: drawn.append(figure))
    pdm.measure_prototypes(config(), run, [data, data], images, torch.arange(8) % 4, tmp_path)
    rows, _, (_, matrix, *_) = *drawn[:2], drawn[2].axes
    assert rows == ["1: 100% bar", "2: 100% bar", "0: 75% star", "3: 100% star"]
    assert matrix.images[0].get_array().tolist() == table[[1, 2, 0, 3]].tolist()
    assert [label.get_text() for label in matrix.get_yticklabels()] == [*"1203"]

def test_samples_are_judged_by_the_commonest_class_of_held_out_images_of_their_prototype(runs, tmp_path, monkeypatch):
    run, test, asked, found = planted(runs, lambda images: images.flatten(1).sum(1) % 4), shapes("test"), [], {}
    for name, value in dict(draw_conditions=torch.arange(20) % 4, draw_denoising=0, draw_samples=0, load_judge=0,
                            measure_prototypes={}, measure_cost={}).items():
        monkeypatch.setattr(pdm, name, lambda *given, value=value: value)
    monkeypatch.setattr(pdm, "judge_images", lambda judge, images, labels, device: asked.append(labels) or dict(
        accuracy=float(len(asked)), frechet=0.0))
    monkeypatch.setattr(pdm, "write_metrics", lambda cfg, run, figures, folder: found.update(figures))
    pdm.evaluate_pdm(config(), run, [shapes(), test], tmp_path)
    own = [test.labels[test.images.flatten(1).sum(1) % 4 == i].bincount().argmax().item() for i in range(4)]
    assert asked[0].tolist() == own * 5 and len({*own}) > 2 and found["accuracy"] == 1 and found["real_accuracy"] == 2

def test_the_cost_is_measured_against_the_same_unet(runs, monkeypatch):
    clock, loss, run = [0.0], pdm.noise_loss, pdm.load_run(runs.pdm, "cpu")

    def spend(net, with_prototypes, without):
        clock[0] += with_prototypes if type(net) is pdm.PDM else without
    monkeypatch.setattr(pdm, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(pdm, "noise_loss", lambda f, *given: spend(f.__self__, 3, 2) or loss(f, *given))
    monkeypatch.setattr(pdm, "generate", lambda cfg, run, k: spend(run.model, 2 * len(k), len(k) + cfg.guidance))
    assert pdm.measure_cost(config(), run, [shapes()], 1) == dict(
        step_seconds=3, step_ratio=1.5, sample_seconds=2, sample_ratio=2, prototype_bytes=4 * 8 * 4,
        bank_bytes=200 * 8 * 4, unet_parameters=sum(p.numel() for p in run.model.unet.parameters()))

PROGRAM = """
import os, sys, torch, conftest, pdm
conftest.shrink(pdm), conftest.only_train(pdm)
port, pdm.WORLD, pdm.RANK = 20000 + os.getpid() % 20000, 2, int(os.fork() == 0)
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", RANK=str(pdm.RANK))
def train(*given, real=pdm.train):
    own = conftest.normal(2, 8, 3)[:, 4 * pdm.RANK:][:, :4]
    found = pdm.in_all_processes(own[0]), pdm.swapped_loss([*own])
    torch.save(found, f"{given[2]}/cosines-{pdm.RANK}.pt"), real(*given)
pdm.train = train
sys.exit(pdm.main(sys.argv[1:]))"""

@pytest.mark.skipif(os.name == "nt", reason="POSIX processes")
def test_two_processes_assign_their_images_as_one_and_the_usage_is_of_the_first(runs, tmp_path):
    given, data, cosines = args(out=tmp_path / "run", supervised=True, steps=3), shapes(), normal(2, 8, 3)
    subprocess.run([sys.executable, "-c", PROGRAM, *given], cwd=ROOT / "tests", check=True, timeout=300)
    (rows, loss), (same_rows, other) = (torch.load(tmp_path / f"run/cosines-{rank}.pt") for rank in (0, 1))
    assert rows.equal(cosines[0]) and same_rows.equal(rows) and close((loss + other) / 2, pdm.swapped_loss([*cosines]))
    for folder, steps, size in ((runs.spdm, 6, 8), (tmp_path / "run", 3, 4)):               # 4 of the 8 are the other's
        usage = torch.full((10,), 0.1)
        for step in range(steps):
            batch = next(pdm.random_batches(config(), data.images, data.labels, step, CPU))
            usage = 0.99 * usage + 0.01 * torch.bincount(batch.target[:size], minlength=10) / size
        assert close(checkpoint(folder)["model"]["usage"], usage)

def test_what_cannot_be_is_one_sentence_and_changes_nothing(runs, tmp_path, capsys):
    before, out, broken = contents(runs.pdm), tmp_path / "run", tmp_path / "broken.png"
    for word, changes in [
            ("--image-size", dict(image_size=8)), ("--prototype-dim", dict(prototype_dim=7)), ("--tau", dict(tau=-1)),
            ("--forget", dict(forget="mirror,colour")), ("--forget form", dict(forget="form,hue", image_size=17)),
            ("--view-size", dict(view_size="0.8")), ("--view-size", dict(view_size="0.8,-1")),
            ("--view-size", dict(view_size="1.2,0.8")), ("--view-size", dict(view_size="0,1")),
            ("--guidance 0", dict(null_prob=0)), ("--supervised", dict(supervised=True, conditioning="none")),
            ("train/<class>", dict(supervised=True, dataset="folder", data_dir=runs.flat))]:
        refused(pdm, capsys, args(out=out, **changes), word)
    broken.write_bytes(b"no image")
    for run, word, asked in [
            (runs.pdm, "0 to 3", dict(prototype=4)), (runs.spdm, "circle", dict(labels="hexagon")),
            (runs.plain, "--like", dict(like=broken)), (runs.pdm, "broken.png", dict(like=broken)),
            (runs.pdm, "no.png", dict(like="no.png")), (runs.pdm, "--like", dict(like=broken, prototype=1))]:
        refused(pdm, capsys, flags(sample=run, out=out, **asked), word)
    for word, change in dict(num_prototypes=5, conditioning="none", attend="all").items():
        refused(pdm, capsys, flags(resume=runs.pdm, **{word: change}), f"--{word.replace('_', '-')} {change}")
    assert not out.exists() and contents(runs.pdm) == before

def test_eurosat_holds_a_tenth_out(tmp_path):
    kinds, seen = ["Forest", "Industrial", "River"], []
    for i in range(30):
        (tmp_path / "eurosat/2750" / kinds[i % 3]).mkdir(parents=True, exist_ok=True)
        image = Image.new("RGB", (64, 64), (8 * i, 100 * (i % 3), 128))
        image.save(tmp_path / f"eurosat/2750/{kinds[i % 3]}/{i}.jpg")
    for split, n in (("train", 27), ("test", 3)):
        data = pdm.load_dataset("eurosat", split, 32, tmp_path)
        means = data.images.double().mean((2, 3))
        assert (means[:, 1] / 100).round().equal(data.labels.double()) and data.classes == kinds and len(means) == n
        seen += (means[:, 0] / 8).round().tolist()
    assert sorted(seen) == list(range(30)), "no image is in both"

def test_celeba_is_read_with_male_as_its_class_and_missing_says_what_to_fetch(tmp_path, monkeypatch):
    with pytest.raises(pdm.Stop, match=r"celeba.*img_align_celeba.*\.txt"):
        pdm.load_dataset("celeba", "train", 32, tmp_path)
    monkeypatch.setattr("torchvision.datasets.celeba.check_integrity", lambda path, md5: os.path.isfile(path))
    (tmp_path / "celeba/img_align_celeba").mkdir(parents=True)
    for i in range(6):
        Image.new("RGB", (178, 218), (40 * i, 99, 99)).save(tmp_path / f"celeba/img_align_celeba/{i + 1:06}.jpg")
    traits = " ".join(f"trait_{i}" if i != 20 else "Male" for i in range(40))
    for name, head, rows in (
            ("attr_celeba", f"6\n{traits} \n", ["-1 " * 20 + sign + "  1" * 19 for sign in ("-1", " 1") * 3]),
            ("eval_partition", "", "000122"), ("landmarks_align_celeba", "6\nleft_x left_y\n", ["69 109"] * 6),
            ("bbox_celeba", "6\nimage_id x_1 y_1 width height\n", ["   9 7 226 313"] * 6), ("identity", "", "789123")):
        file = tmp_path / "celeba" / ("identity_CelebA.txt" if name == "identity" else f"list_{name}.txt")
        file.write_text(head + "".join(f"{i + 1:06}.jpg {row}\n" for i, row in enumerate(rows)))
    for split, labels, red in (("train", [0, 1, 0], [0, 40, 80]), ("test", [0, 1], [160, 200])):
        data = pdm.load_dataset("celeba", split, 32, tmp_path)
        assert data.classes == ["not male", "male"] and data.labels.tolist() == labels
        assert close(data.images[:, 0].double().mean((1, 2)), red, 2), "and without partition 1"
