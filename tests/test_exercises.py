"""What judges the exercises: their answers to chosen inputs, beside those of the original, which recorded.json holds.

    python -m pytest tests -k add_noise             # judges one exercise
    python tests/assignment.py --list               # all of them, and how far each is
    python tests/test_exercises.py                  # records the answers of the originals again

An exercise has a function here that is given what is judged, and its script. It gives labels, which say what is tried,
and answers: tensors, numbers, lists. Inputs follow from sines, so they are the same on every machine.
"""
import ast
import copy
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

from assignment import EXERCISES, judged_in, parsed, places  # noqa: E402

RECORDED = Path(__file__).with_name("recorded.json")

ABAR = torch.tensor([0.99, 0.8, 0.5, 0.1, 0.004])

def numbers(*shape, seed=0, dtype=torch.float32):
    """Numbers between -1.5 and 1.5 without a pattern."""
    n = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)
    return (1.5 * torch.sin(1.7 * n ** 1.5 + 2.3 * seed)).to(dtype).view(shape)

def gradients(answer, *inputs):
    """Of the sum of the answer, for each input, as lists; None where there is none."""
    if not answer.requires_grad:
        return None
    found = torch.autograd.grad((answer * numbers(*answer.shape, seed=8)).sum(), inputs, allow_unused=True)
    return [None if g is None else g.tolist() for g in found]

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
    weight = torch.ones((), requires_grad=True)
    yield "gradient of the network", gradients(f(lambda xt, t, condition: weight * xt, x0, None, whole(3, 1), eps, ABAR), weight)

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
    yield "large means, of which float32 knows too little", float(f(mu + 1e5, 0 * one, mu + 1e5 + 0.01, 0 * one)) * 1e3
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
    yield "distances of 900 and 0", f(whole([900.0, 0.0]), whole(0), 1.0)
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
        found = f(layer, h.requires_grad_(), tokens.requires_grad_())
        yield name, found
        yield f"{name}: gradients of h, tokens", gradients(found, h, tokens)

def learn(f, script):
    seeds, before = iter(range(20, 999)), script.random_view
    script.random_view = lambda x, cfg: x + 0.2 * torch.stack([numbers(*image.shape, seed=next(seeds)) for image in x])
    x = numbers(4, 3, 2, 2)
    try:
        for name, changes, label in (("one view", dict(views="one"), None), ("two views", {}, None),
                                     ("labels", dict(supervised=True), whole(2, 0, 0, 1))):
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
            yield f"{tried}gradient of the encoder", model.encoder[1].weight.grad
            with torch.autocast("cpu", torch.bfloat16):
                _, losses, _ = f(model, x, label, cfg)
            yield f"{tried}losses under autocast", torch.stack([losses[part] for part in sorted(losses)])
    finally:
        script.random_view = before

# ---- Patronus ---------------------------------------------------------------------------------------------------

def receptive_field(f, script):
    for layers in ([(3, 1, 0)], [(3, 2, 1), (5, 3, 2)], [(7, 2, 3), (1, 1, 0), (3, 2, 0)], [(4, 4, 1), (3, 1, 1), (2, 2, 0)]):
        net = nn.Sequential(*(layer for k, s, p in layers for layer in (nn.Conv2d(1, 1, k, s, p), nn.ReLU())))
        yield f"kernel, stride, padding: {layers}", [*f(net)]

def patch_distances(f, script):
    for z, p in (((2, 3, 2, 4), (5, 3)), ((1, 8, 1, 1), (1, 8)), ((3, 2, 3, 3), (4, 2))):
        z, p = 2 * numbers(*z), 2 * numbers(*p, seed=1)
        found = f(z.requires_grad_(), p.requires_grad_())
        yield f"z {list(z.shape)}, prototypes {list(p.shape)}", found
        yield f"z {list(z.shape)}, prototypes {list(p.shape)}: gradients", gradients(found, z, p)
        with torch.autocast("cpu", torch.bfloat16):
            found = f(z, p)
        yield f"z {list(z.shape)}, prototypes {list(p.shape)}, under autocast", found
    half = f(z.bfloat16(), p.bfloat16())
    yield "16 bits", half
    yield "types", [str(found.dtype), str(half.dtype)]
    z = 30 * numbers(4, 64, 3, 3)
    yield "patches that are prototypes: below 0", bool((f(z, z.permute(0, 2, 3, 1).reshape(-1, 64)) < 0).any())

def activation(f, script):
    d = whole(0.0, 1e-5, 0.3, 1.0, 7.0, 1e6).requires_grad_()
    yield "d [6]", f(d)
    yield "d [6]: gradient", gradients(f(d), d)
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
    yield "fewer than 2 n activations", [int(j) for j in f(s[:, :5], known, 0, 1)]
    before, asked = script.auroc, []
    table = (0.9, math.nan, 0.8, 0.85, 0.7, 0.3, 0.6), (0.99, 0.5, 0.5, 0.2, 0.1, math.nan, 0.4)

    def stated(score, positive):                                    # a table in place of the function
        asked.append(1)
        value = table[int(positive.equal(known[:, 1]))][round(abs(score[0].item())) - 1]
        return value if score[0] > 0 else 1 - value
    script.auroc = stated
    try:
        found = f(torch.arange(1.0, 8).expand(60, 7), known, 3, 1)
    finally:
        script.auroc = before
    yield "some AUROC are not defined", [int(j) for j in found] if asked else [1, 2, 5]

# ---- Judging ----------------------------------------------------------------------------------------------------

def plain(value):
    """Tensors as lists of numbers, for json."""
    return value.detach().tolist() if isinstance(value, torch.Tensor) else value

def difference(found, right, place=""):
    """None if both are equal, floats to 1e-5 or to 1e-4 of the value; else a sentence on the first place that differs."""
    if isinstance(right, list) and isinstance(found, list):
        if len(found) != len(right):
            return f"the answer{place} has {len(found)} entries, and {len(right)} are right"
        differ = (difference(a, b, f"{place}[{i}]") for i, (a, b) in enumerate(zip(found, right)))
        return next(filter(None, differ), None)
    if isinstance(right, float) and isinstance(found, (int, float)):
        same = math.isclose(found, right, rel_tol=1e-4, abs_tol=1e-5) or found != found and right != right
    else:
        same = found == right
    found = f"{found:.7g}" if isinstance(found, float) else "a list" if isinstance(found, list) else found
    return None if same else f"the answer{place} is {found}, and {'a list' if isinstance(right, list) else right} is right"

def untouched(f):
    """f, which must leave the tensors that it is given as they are."""
    def call(*given):
        tensors = [value for part in given for value in (part if isinstance(part, list) else [part])
                   if isinstance(value, torch.Tensor)]
        versions = [value._version for value in tensors]
        answer = f(*given)
        if versions != [value._version for value in tensors]:
            raise ValueError("a tensor that it is given is changed in place, and whoever calls needs it as it was")
        return answer
    return call

def answers(name, script):
    """Labels and answers of what the script, a module, holds as this exercise."""
    case = {"PrototypeAttention.forward": attention, "PDM.learn": learn}.get(name) or globals()[name]
    for label, found in case(untouched(functools.reduce(getattr, name.split("."), script)), script):
        yield label, copy.deepcopy(plain(found))                    # a list may go on growing

@functools.cache
def recorded():
    """The answers of the originals -> exercise: list, in the order in which they are asked for."""
    return json.loads(RECORDED.read_text(encoding="utf-8"))

MODULES = {"torch", "numpy", "math", "itertools", "functools", "copy", "random", "collections", "typing"}
NAMES = {"open", "exec", "eval", "compile", "input", "breakpoint", "exit", "quit", "globals", "locals", "vars", "setattr",
         "delattr", "Path", "ThreadPoolExecutor", "dist"} | (sys.stdlib_module_names - MODULES)
ATTRIBUTES = set("os sys io builtins importlib inspect subprocess shutil ctypes multiprocessing utils hub serialization package "
                 "jit compile library load save savez savez_compressed savetxt loadtxt genfromtxt tofile fromfile from_file "
                 "dump memmap".split())

def refused(body):
    """What a body may not use, as a sentence; empty if there is nothing. An exercise needs no files and no processes."""
    try:
        tree = parsed("def body():\n" + "\n".join(f"    {line}" for line in body.split("\n")))
    except SyntaxError as fault:
        return f"this is not Python: {fault.msg}, line {(fault.lineno or 2) - 1} of the body"
    nodes = [*ast.walk(tree)]
    own = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    own |= {node.arg for node in nodes if isinstance(node, ast.arg)} | {n.name for n in nodes if isinstance(n, ast.FunctionDef)}
    for node in nodes:
        words = []
        if isinstance(node, ast.Name):
            words = [node.id] if node.id in NAMES - own or node.id.startswith("__") else []
        elif isinstance(node, ast.Global):
            words = ["global"]
        elif isinstance(node, ast.Attribute):
            words = [node.attr]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            words = [getattr(node.args[1], "value", "getattr")] if len(node.args) > 1 else []
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            paths = [name.name for name in node.names]
            roots = [node.module or "."] if isinstance(node, ast.ImportFrom) else paths
            words = [word for path in (*paths, *roots) for word in path.split(".")]
            words += [f"import {path}" for path in roots if path.split(".")[0] not in MODULES]
        for word in map(str, words):
            if isinstance(node, ast.Name) or word in ATTRIBUTES or word.startswith(("__", "_C", "import ", "getattr", "global")):
                return f"an exercise needs no '{word}', so it was not run"
    return ""

def judge(name, script):
    """None if the script's function answers as the original did, else a sentence on the first answer that differs."""
    for (label, found), right in zip(answers(name, script), recorded()[name]):
        if said := difference(found, right):
            return f"{label}: {said}"
    return None

@pytest.mark.parametrize("exercise", EXERCISES)
def test_exercise(exercise):
    script, fault = judged_in(exercise)
    if fault:
        pytest.fail(fault, pytrace=False)
    hint = f"Look at: {EXERCISES[exercise].hint}"
    if said := refused(next(place.body for place in places(exercise) if place.body)):
        pytest.fail(f"{exercise} in {script}.py: {said}", pytrace=False)
    try:
        said = judge(exercise, importlib.import_module(script))
    except NotImplementedError as missing:
        pytest.fail(f"{exercise} is judged in {script}.py, where another exercise is missing: {missing}", pytrace=False)
    except Exception:
        print(hint)                                                 # below the traceback
        raise
    if said:
        pytest.fail(f"{exercise} in {script}.py, {said}\n{hint}", pytrace=False)
    texts = {}
    for place in places(exercise):
        if place.body:
            texts.setdefault(place.body, []).append(place.script)
    if len(texts) > 1:
        pytest.fail(f"{exercise} is right in {script}.py, but differs between "
                    f"{' and '.join(', '.join(names) for names in texts.values())}", pytrace=False)

def rounded(value):
    """Seven digits are enough for `difference`."""
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value

if __name__ == "__main__":
    found = {name: [rounded(v) for _, v in answers(name, importlib.import_module(judged_in(name)[0]))] for name in EXERCISES}
    lines = ",\n".join(f'"{name}": {json.dumps(values)}' for name, values in found.items())
    RECORDED.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8", newline="\n")
