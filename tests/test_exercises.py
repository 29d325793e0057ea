"""What judges the exercises: their answers to chosen inputs, beside those of the original, which recorded.json holds.

    python -m pytest tests -k add_noise             # judges one exercise
    python tests/assignment.py --list               # all of them, and how far each is
    python tests/test_exercises.py                  # records the answers of the originals again

An exercise has a function here that is given what is judged, and its script. It gives labels, which say what is tried,
and answers: tensors, numbers, lists. Inputs follow from sines, so they are the same on every machine.
"""
import functools
import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from assignment import EXERCISES, judged_in, places  # noqa: E402

RECORDED = Path(__file__).with_name("recorded.json")

ABAR = torch.tensor([0.99, 0.8, 0.5, 0.1, 0.004])

def numbers(*shape, seed=0, dtype=torch.float32):
    """Numbers between -1.5 and 1.5 without a pattern."""
    n = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)
    return (1.5 * torch.sin(1.7 * n ** 1.5 + 2.3 * seed)).to(dtype).view(shape)

def whole(*values):
    return torch.tensor(values)

def learns(*shape, seed=0):
    return numbers(*shape, seed=seed).requires_grad_()

# ---- Diffusion --------------------------------------------------------------------------------------------------

def add_noise(f, script):
    for shape, t in (((3, 2, 4, 4), [4, 0, 2]), ((4, 3, 4, 4), [1, 3, 3, 0]), ((1, 1, 2, 5), [2]), ((5, 1, 1, 5), [0, 1, 2, 3, 4])):
        yield f"images {list(shape)} at t = {t}", f(numbers(*shape), whole(*t), numbers(*shape, seed=1), ABAR)
    yield "eps = 0", f(numbers(2, 1, 2, 2), whole(4, 1), torch.zeros(2, 1, 2, 2), ABAR)

def noise_loss(f, script):
    x0, eps, told = numbers(2, 3, 4, 5), numbers(2, 3, 4, 5, seed=1), []

    def model(xt, t, condition):
        told.extend([xt, t, condition])
        return 0.5 * xt + condition[:, None, None, None]
    for t in ([3, 1], [0, 4]):
        yield f"t = {t}", f(model, x0, whole(2.0, -1.0), whole(*t), eps, ABAR)
        yield "what the model is given", [given.tolist() for given in told]
        told.clear()
    found = f(lambda xt, t, condition: (eps + 0.7 * condition).bfloat16(), x0, 1.0, whole(3, 1), eps, ABAR)
    yield "a prediction in 16 bits", found
    yield "its type", str(found.dtype)

def guided_noise(f, script):
    x, t = numbers(3, 1, 2, 2), whole(4, 5, 6)
    for kind in (torch.float32, torch.bfloat16):
        for w in (0, 0.3, 1.8, 4.0, -0.5):
            calls = []

            def model(x, t, row):
                calls.append([t.tolist(), row.tolist(), x.tolist()])
                return (1.37 * row[:, None, None, None] + x).to(kind)
            found = f(model, x, t, whole(2, 0, 1), whole(-1, -1, -1), w)
            yield f"w = {w}, a network of {kind}", found
            yield f"w = {w}: calls of the network, and with what", calls
            yield f"w = {w}, a network of {kind}: the type", str(found.dtype)
    yield "conditions [B, 4]", f(lambda x, t, s: x * s.mean(1)[:, None, None, None], x, t, numbers(3, 4), -numbers(3, 4), 0.7)

def ddim_step(f, script):
    x0, eps, noise = (numbers(4, 2, 3, 3, seed=i, dtype=torch.float64) for i in range(3))
    for a, a_next in ((0.3, 0.7), (0.0004, 0.02), (0.9, 0.999)):
        a, a_next = (torch.tensor(v, dtype=torch.float64) for v in (a, a_next))
        yield f"from abar {a:.4f} to {a_next:.3f}, eta = 0, without noise", f(x0, eps, a, a_next)
        for eta in (0.4, 1.0):
            yield f"from abar {a:.4f} to {a_next:.3f}, eta = {eta}", f(x0, eps, a, a_next, eta, noise)
    one = torch.ones((), dtype=torch.float64)
    yield "to the clean image, abar 1", f(x0, eps, a, one, 1.0, noise)
    tiny = [f(x0.float(), eps.float(), torch.tensor(a), torch.tensor(a_next), 1.0, noise.float()) for a, a_next in ROUNDING]
    yield "where rounding brings 1 - a_next - sigma^2 below 0: all are numbers", [bool(x.isfinite().all()) for x in tiny]

ROUNDING = [(1e-9, 0.05989), (1e-9, 0.210984058), (1e-9, 0.5425144911), (1e-8, 0.5425144911), (1e-9, 0.7432448528)]

def dpmpp_step(f, script):
    x, x0, before = (numbers(2, 1, 3, 3, seed=i, dtype=torch.float64) for i in range(3))
    levels = [torch.tensor(v, dtype=torch.float64) for v in (0.02, 0.3, 0.6, 0.95, 1.0)]
    for i in (1, 2):
        a_before, a, a_next = levels[i - 1:i + 2]
        yield f"the first step, from abar {a} to {a_next}", f(x, x0, a, a_next)
        yield f"from abar {a} to {a_next}, {a_before} before", f(x, x0, a, a_next, before, a_before)
    yield "the last step, to abar 1", f(x, x0, levels[3], levels[4], before, levels[2])
    yield "the only step, to abar 1", f(x, x0, levels[3], levels[4])

# ---- Metrics ----------------------------------------------------------------------------------------------------

def covariance(n, rank, seed):
    root = numbers(n, rank, seed=seed, dtype=torch.float64)
    return root @ root.T

def frechet_distance(f, script):
    mu, other = (numbers(4, seed=i, dtype=torch.float64) for i in (1, 2))
    for ranks in ((4, 4), (4, 2), (1, 4), (2, 3)):
        one, two = (covariance(4, rank, i) for i, rank in enumerate(ranks))
        yield f"covariances of ranks {ranks}", float(f(mu, one, other, two))
        yield f"covariances of ranks {ranks}, exchanged", float(f(other, two, mu, one))
    far = torch.full((4,), 3.0, dtype=torch.float64)
    yield "means apart", float(f(mu, covariance(4, 4, 0), mu + far, covariance(4, 4, 0)))
    for rank in (1, 2, 4):
        found = float(f(mu, covariance(4, rank, 3), mu, covariance(4, rank, 3)))
        yield f"equals of rank {rank}: 0, and not below", [round(found, 4), found >= 0]
    large = 1e4 * torch.eye(3, dtype=torch.float64)
    yield "large covariances that are almost equal", float(f(0 * far[:3], large, 0 * far[:3], large * 1.001)) * 1e3

def auroc(f, script):
    score, yes = torch.round(4 * numbers(40)), numbers(40, seed=5) > 0.4
    for name, given in (("floats with ties", score), ("whole numbers with ties", score.long()), ("no ties", numbers(40, seed=2)),
                        ("the other way round", -score), ("all alike", 0 * score)):
        yield name, float(f(given, yes))
    yield "three scores", float(f(whole(1.0, 3.0, 2.0), whole(True, False, True)))
    for name, given in (("only positives", yes | True), ("only negatives", yes & False)):
        yield name, float(f(score, given))

# ---- ProtoDiffusion ---------------------------------------------------------------------------------------------

def dce_loss(f, script):
    for shape in ((4, 3, 2), (5, 4, 1), (2, 2, 5)):
        d, y = learns(*shape).square().detach().requires_grad_(), torch.arange(shape[0]) % shape[1]
        for gamma in ((), (0.5,), (7.0,)):
            loss = f(d, y, *gamma)
            yield f"d {list(shape)}, gamma {[*gamma] or 'by default'}", loss
            yield f"d {list(shape)}, gamma {[*gamma] or 'by default'}: gradient", torch.autograd.grad(loss, d)[0]
    yield "a distance of 900", f(torch.tensor([[[900.0], [0.0]]]), whole(0))

def prototype_loss(f, script):
    for shape in ((4, 3, 2), (5, 4, 1), (2, 2, 5)):
        d, y = learns(*shape).square().detach().requires_grad_(), (torch.arange(shape[0]) + 1) % shape[1]
        loss = f(d, y)
        yield f"d {list(shape)}", loss
        yield f"d {list(shape)}: gradient", torch.autograd.grad(loss, d)[0]

# ---- PDM --------------------------------------------------------------------------------------------------------

def contrastive_loss(f, script):
    d, k = learns(4, 3).square().detach().requires_grad_(), whole(2, 0, 1, 1)
    for tau in (0.3, 1.0, 4.0):
        loss = f(d, k, tau)
        yield f"tau = {tau}", loss
        yield f"tau = {tau}: gradient", torch.autograd.grad(loss, d)[0]

def alignment_loss(f, script):
    for shape in ((3, 2), (2, 5)):
        z, e, k = learns(*shape), learns(4, shape[1], seed=1), whole(2, 0, 2)[:shape[0]]
        loss = f(z, e, k)
        yield f"z {list(shape)}", loss
        loss.backward()
        yield f"z {list(shape)}: gradient of features", z.grad
        yield f"z {list(shape)}: gradient of prototypes", e.grad

def compactness_loss(f, script):
    for shape in ((3, 2), (5, 4), (1, 3)):
        e = learns(*shape)
        loss = f(e)
        yield f"prototypes {list(shape)}", loss
        yield f"prototypes {list(shape)}: gradient", torch.autograd.grad(loss, e)[0]
    yield "opposite ones", f(whole([1.0, 2.0], [-3.0, -6.0]))

def balanced_assignment(f, script):
    for shape in ((5, 3), (2, 4), (6, 1)):
        for rounds in ((), (1,), (2,), (40,)):
            found = f(2 * learns(*shape), *rounds)
            yield f"scores {list(shape)}, rounds {[*rounds] or 'by default'}", found
            yield "it has a gradient", found.requires_grad

def swapped_loss(f, script):
    before = {name: getattr(script, name) for name in ("RANK", "in_all_processes")}
    try:
        for rank in (0, 1):
            if rank == 1:                                           # the first process has other rows
                script.RANK = 1
                script.in_all_processes = lambda rows: torch.cat([rows.roll(1, 1).roll(1, 0), rows]).detach()
            for n in (2, 3):
                cosines = [(0.3 * numbers(4, 3, seed=i)).requires_grad_() for i in range(n)]
                loss = f(cosines)
                yield f"{n} views, process {rank}", loss
                yield f"{n} views, process {rank}: gradients", torch.stack(torch.autograd.grad(loss, cosines))
    finally:
        for name, value in before.items():
            setattr(script, name, value)

def filled(net):
    """A network whose weights are the same on every machine."""
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(0.3 * numbers(*p.shape, seed=i) + (0.5 if p.dim() == 1 else 0))
    return net

def attention(f, script):
    for channels, (H, W), n in ((16, (4, 4), 3), (12, (2, 5), 4), (16, (3, 2), 1)):
        layer = filled(script.PrototypeAttention(channels, 6))
        h, tokens = 2 * numbers(2, channels, H, W), 2 * numbers(2, n, 6, seed=1)
        name = f"h {list(h.shape)}, {layer.heads} heads, {n} tokens"
        yield name, f(layer, h, tokens)
        yield f"{name}, with a bias", f(layer, h, tokens, numbers(2, n, seed=3))

def learn(f, script):
    shifts, before = iter(range(2, 99)), script.random_view
    script.random_view = lambda x, cfg: x.roll(next(shifts), 0) + 0.1 * numbers(*x.shape, seed=next(shifts))
    x = numbers(4, 3, 2, 2)
    try:
        for name, changes, label in (("one view", dict(views="one"), None), ("tau 0.3", dict(views="one", tau=0.3), None),
                                     ("two views", {}, None), ("labels", dict(supervised=True), whole(2, 0, 0, 1))):
            cfg, sizes = script.Config(prototype_dim=4, num_prototypes=5, channels=8, multipliers="1", **changes), []
            model = cfg.build(dict(shape=[3, 16, 16], classes=list("abcde")))
            model.encoder = filled(nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.BatchNorm1d(4)))
            model.encoder.register_forward_pre_hook(lambda module, images: sizes.append(len(images[0])))
            model.prototypes.data = numbers(5, 4, seed=7)
            for training in (True, False):
                model.usage.copy_(whole(0.3, 0.4, 0.2985, 0.0015, 0.0))
                k, losses, statistics = f(model.train(training), x, label, cfg)
                tried = f"{name}{'' if training else ', not in training'}: "
                yield f"{tried}k", k
                yield f"{tried}names of the losses", sorted(losses)
                for part, value in [*sorted(losses.items()), *sorted(statistics.items())]:
                    yield f"{tried}{part}", torch.as_tensor(value).float()
                yield f"{tried}usage", model.usage
                yield f"{tried}images at a time in the encoder", [*sizes]
                sizes.clear()
            sum(losses.values()).backward()
            yield f"{tried}gradient of prototypes", model.prototypes.grad
        with torch.autocast("cpu", torch.bfloat16):
            _, losses, _ = f(model, x, label, cfg)
        yield "losses under autocast", torch.stack([losses[part] for part in sorted(losses)])
    finally:
        script.random_view = before

# ---- Patronus ---------------------------------------------------------------------------------------------------

def receptive_field(f, script):
    for layers in ([(3, 1, 0)], [(3, 2, 1), (5, 3, 2)], [(7, 2, 3), (1, 1, 0), (3, 2, 0)], [(4, 4, 1), (3, 1, 1), (2, 2, 0)], []):
        net = nn.Sequential(*(layer for k, s, p in layers for layer in (nn.Conv2d(1, 1, k, s, p), nn.ReLU())))
        yield f"kernel, stride, padding: {layers}", [*f(net)]

def patch_distances(f, script):
    for z, p in (((2, 3, 2, 4), (5, 3)), ((1, 8, 1, 1), (1, 8)), ((3, 2, 3, 3), (4, 2))):
        z, p = 2 * numbers(*z), 2 * numbers(*p, seed=1)
        yield f"z {list(z.shape)}, prototypes {list(p.shape)}", f(z, p)
        with torch.autocast("cpu", torch.bfloat16):
            found = f(z, p)
        yield f"z {list(z.shape)}, prototypes {list(p.shape)}, under autocast", found
    half = f(z.bfloat16(), p.bfloat16())
    yield "16 bits", half
    yield "types", [str(found.dtype), str(half.dtype)]
    z = 30 * numbers(4, 64, 3, 3)
    yield "patches that are prototypes: below 0", bool((f(z, z.permute(0, 2, 3, 1).reshape(-1, 64)) < 0).any())

def activation(f, script):
    d = whole(0.0, 1e-5, 0.3, 1.0, 7.0, 1e6)
    yield "d [6]", f(d)
    yield "d [2, 1, 3]", f(d.view(2, 1, 3).double())

def invert(f, script):
    told = []

    def predict(x, t):
        told.append(t.tolist())
        return 0.4 * x + 0.01 * t[:, None, None, None] - 0.3
    for T, steps in ((100, 4), (100, 1), (50, 7), (21, 21)):
        told.clear()
        yield f"{steps} steps, T = {T}", f(predict, 1.5 * numbers(2, 1, 2, 3), script.alpha_bars(T), steps)
        yield f"{steps} steps, T = {T}: t of each call", told

def spherical(f, script):
    a, b, share = numbers(2, 2, 3), numbers(2, 2, 3, seed=1), whole(0.0, 0.3, 0.5, 1.0)
    for name, other in (("other noise", b), ("longer noise", 2 * b), ("parallel", a), ("parallel and longer", 1.5 * a), ("opposite", -a)):
        yield name, f(a, other, share)

def choose_movers(f, script):
    known = torch.stack([numbers(60, seed=i) > 0.2 * i for i in range(4)], 1)
    s = numbers(60, 8, seed=9) + torch.stack([0.3 * (j % 3) * (-1) ** j * known[:, j % 4].float() for j in range(8)], 1)
    s[:, 5] -= 0.8 * known[:, 2].float() + 0.5 * known[:, 0].float()
    for a, b, n in ((0, 1, ()), (1, 0, ()), (3, 2, (2,)), (2, 0, (1,)), (0, 2, (4,))):
        yield f"columns {a} and {b}, n {[*n] or 'by default'}", [int(j) for j in f(s, known, a, b, *n)]
    before, asked = script.auroc, []
    table = dict(zip(range(7), (0.9, math.nan, 0.8, 0.85, 0.7, 0.3, 0.6))), dict(zip(range(7), (0.99, 0.5, 0.5, 0.2, 0.1, math.nan, 0.4)))

    def stated(score, positive):                                    # a table in place of the function
        asked.append(1)
        return table[int(positive.equal(known[:, 1]))][int(score[0])]
    script.auroc = stated
    try:
        found = f(torch.arange(7.0).expand(60, 7), known, 3, 1)
    finally:
        script.auroc = before
    if asked:
        yield "some AUROC are not defined", [int(j) for j in found]

# ---- Judging ----------------------------------------------------------------------------------------------------

def plain(value):
    """Tensors as lists of numbers, for json."""
    return value.detach().tolist() if isinstance(value, torch.Tensor) else value

def agree(found, right):
    """Equal; floats: to 1e-5, or to 1e-4 of the value."""
    if isinstance(right, list):
        return isinstance(found, list) and len(found) == len(right) and all(map(agree, found, right))
    if isinstance(right, float) and isinstance(found, (int, float)):
        return math.isclose(found, right, rel_tol=1e-4, abs_tol=1e-5) or found != found and right != right
    return found == right

def answers(name, script):
    """Labels and answers of what the script, a module, holds as this exercise."""
    case = dict({"PrototypeAttention.forward": attention, "PDM.learn": learn}).get(name) or globals()[name]
    for label, found in case(functools.reduce(getattr, name.split("."), script), script):
        yield label, plain(found)

@functools.cache
def recorded():
    """The answers of the originals -> exercise: list, in the order in which they are asked for."""
    return json.loads(RECORDED.read_text(encoding="utf-8"))

def judge(name, script):
    """None if the script's function answers as the original did, else a sentence on the first answer that differs."""
    for (label, found), right in zip(answers(name, script), recorded()[name]):
        if not agree(found, right):
            found, right = (text if len(text) < 300 else f"{text[:300]} ..." for text in (str(found), str(right)))
            return f"{label}: the answer is {found}, and right is {right}"
    return None

@pytest.mark.parametrize("exercise", EXERCISES)
def test_exercise(exercise):
    script, missing = judged_in(exercise)
    if missing:
        pytest.fail(missing, pytrace=False)
    hint = f"Look at: {EXERCISES[exercise].hint}"
    try:
        said = judge(exercise, importlib.import_module(script))
    except Exception:
        print(hint)                                                 # below the traceback
        raise
    if said:
        pytest.fail(f"{exercise} in {script}.py, {said}\n{hint}", pytrace=False)

@pytest.mark.parametrize("exercise", EXERCISES)
def test_an_exercise_has_one_text_wherever_it_is_written(exercise):
    texts = {}
    for place in places(exercise):
        if place.body and not place.error:
            texts.setdefault(place.body, []).append(place.script)
    assert len(texts) < 2, f"{exercise} differs between {' and '.join(', '.join(names) for names in texts.values())}"

def rounded(value):
    """Seven digits are enough for `agree`."""
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value

if __name__ == "__main__":
    found = {name: [rounded(v) for _, v in answers(name, importlib.import_module(judged_in(name)[0]))] for name in EXERCISES}
    lines = ",\n".join(f'"{name}": {json.dumps(values)}' for name, values in found.items())
    RECORDED.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8", newline="\n")
