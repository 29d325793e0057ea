"""Fixtures and helpers of all tests."""
import csv
import importlib
import json
import os
import sys
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from assignment import EXERCISES, state, taken_out  # noqa: E402

SCRIPTS = [name for name in ("protodiffusion", "pdm", "patronus") if (ROOT / f"{name}.py").exists()]
CPU = torch.device("cpu")
SHAPES = {"train": 200, "test": 60, "judge": 200}                  # how many images the tests draw
# Settings of a run that takes a second. A script takes those that it has.
TINY = dict(
    dataset="shapes", image_size=16, channels=8, multipliers="1", blocks=1, attention=1, dropout=0.1, timesteps=1000,
    prototype_dim=8, learner_steps=4, learner_width=4, num_prototypes=8, hide=0.0, latent_steps=4,
    latent_width=8, latent_timesteps=21, invert_steps=2, pairs=12, steps=6, batch_size=8, lr=2e-3,
    save_every=2, seed=0, device="cpu", amp="off", num_samples=20, sampler="dpmpp", sample_steps=2, judge_steps=3,
    judge_width=4, inception="off")
IDLE = {("prototypes", "random"): ("learner_steps", "learner_width"), ("supervised", True): ("num_prototypes",),
        ("conditioning", "none"): ("num_prototypes", "prototype_dim")}

def flags(**settings):
    """Settings as words of the command line."""
    words = []
    for name, value in settings.items():
        words.append("--" + "no-" * (value is False) + name.replace("_", "-"))
        if not isinstance(value, bool):
            words.append(str(value))
    return words

def settings(script, **changes):
    """The tiny settings that the script has, with changes."""
    fields = script.Config.__dataclass_fields__
    return {**{name: value for name, value in TINY.items() if name in fields}, **changes}

def config(script, **changes):
    return script.Config(**settings(script, **changes))

def args(script, **changes):
    """As flags; those of TINY that have no effect beside the changes, and would be refused, are left out."""
    given = settings(script, **changes)
    idle = {name for setting, names in IDLE.items() if setting in given.items() for name in names}
    return flags(**{name: value for name, value in given.items() if name in changes or name not in idle})

def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}

def log(folder):
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))

def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)

def metrics(folder):
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)

def samples(folder):
    """The images in samples.npz, and what they were drawn from."""
    with np.load(folder / "samples.npz") as saved:
        return [saved[name] for name in saved.files if name != "classes"]

def same(a, b):
    """Nested dicts, lists and tensors are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b

def refused(script, capsys, arguments, *words):
    """main ends with status 2 and one sentence on stderr that has all the words."""
    capsys.readouterr()
    try:
        status = script.main([str(a) for a in arguments])
    except SystemExit as stop:                                      # argparse
        status = stop.code
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.strip() and not line.startswith(("usage:", " "))]
    assert status == 2 and len(lines) == 1, f"{arguments}: {error}"
    assert all(str(word) in lines[0] for word in words), f"{words}: {lines[0]}"

def seeded(seed=0):
    return torch.Generator().manual_seed(seed)

def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)

def close(a, b, atol=1e-6, rtol=1e-5):
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    return a.shape == b.shape and torch.allclose(a, b, rtol, atol)

def awake(net, seed=0):
    """Every weight and bias at random, so that nothing starts at zero."""
    gen = seeded(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=gen) * 0.2 + (0.5 if p.dim() == 1 else 0))
    return net

def shrink(script):
    """The script, with small sets of shapes."""
    script.SHAPE_SPLITS = {name: (SHAPES[name], seed) for name, (_, seed) in script.SHAPE_SPLITS.items()}
    return script

@pytest.fixture(scope="session", autouse=True)
def small(tmp_path_factory):
    """One thread, as in processes of their own; small sets of shapes; and a folder whose data/ keeps caches."""
    torch.set_num_threads(1)
    os.chdir(tmp_path_factory.mktemp("here"))
    for name in {*SCRIPTS} & {*sys.modules}:                        # another may be half written
        shrink(sys.modules[name])

@pytest.fixture(scope="session", params=SCRIPTS)
def script(request):
    """Each script: for tests of what all of them do."""
    return shrink(importlib.import_module(request.param))

@pytest.fixture(scope="session")
def done(script, tmp_path_factory):
    """A finished run of each script, which tests only read."""
    folder = tmp_path_factory.mktemp("done") / "run"
    assert script.main(args(script, out=folder, eval_every=3)) == 0
    return folder

def only_train(script, replace=setattr):
    """Runs end with their training, and draw no picture."""
    for name in [*vars(script)]:
        if name.startswith("evaluate_") or name in ("draw_prototypes", "finish_run", "explain"):
            replace(script, name, lambda *a: {})

def train_apart(name, arguments, environment):
    """For a process of its own: train the script `name`, as if it were started in this environment."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    script = importlib.reload(importlib.import_module(name))        # now it reads RANK and WORLD_SIZE
    only_train(script)
    sys.exit(script.main(arguments))

@pytest.fixture
def training_only(script, monkeypatch):
    only_train(script, monkeypatch.setattr)

@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of images in two classes, for processes of their own."""
    root = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for part in ("train", "test"):
        for c, name in enumerate(("dark", "light")):
            (root / part / name).mkdir(parents=True)
            for i in range(20):
                pixels = random.integers(100 * c, 100 + 100 * c, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root

LONGEST = "tests/test_tutorial.py::test_every_cell_runs_on_reduced_settings"
BESIDE = tuple(f"tests/test_{name}.py" for name in "data folders gpu method patronus pdm".split())

@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """If all tests run, some run in a process of their own: LONGEST waits for it, and fails if one of them does."""
    if len(items) > 300 and LONGEST in {item.nodeid for item in items}:
        command = [sys.executable, "-m", "pytest", "-q", LONGEST, *BESIDE]
        config.longest = Popen(command, cwd=ROOT, text=True, stdout=PIPE, stderr=STDOUT)
        items[:] = [item for item in items if not item.nodeid.startswith(BESIDE)]

def pytest_terminal_summary(terminalreporter, config):
    """-k with a name that is nowhere: the exercises there are. In a handout: where else a body belongs."""
    asked = config.option.keyword
    if asked and not {"passed", "failed", "error", "skipped"} & {*terminalreporter.stats}:
        terminalreporter.line(f"no test is called {asked}; the exercises are {', '.join(EXERCISES)}")
    for name in taken_out(ROOT):
        if "--copy" in state(name) and (not asked or name in asked):
            terminalreporter.line(f"{name}: {state(name)}")
