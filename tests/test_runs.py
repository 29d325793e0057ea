"""Whole runs of all scripts, tiny ones: what they leave behind, going on after a stop, what goes wrong, comparing."""
import csv
import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import socket
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from conftest import (CPU, args, checkpoint, config, contents, flags, log, metrics, refused, same, samples,
                      train_apart)

MADE = {"config.json", "log.csv", "checkpoint.pt", "metrics.json", "curves.png", "samples.png", "samples.npz"}
KNOWN = {"script", "step", "machine", "classes", "settings", "log"}

# ---- What a run leaves behind -----------------------------------------------------------------------------------

def test_a_run_leaves_its_files_and_pictures(script, done):
    found, (images, told) = {*contents(done)}, samples(done)
    assert found >= MADE and {Path(name).suffix for name in found - MADE} == {".png"}
    assert all(min(Image.open(path).convert("L").size) > 100 for path in done.glob("*.png"))
    assert images.shape == (20, 16, 16, 3) and images.dtype == np.uint8 and len(told) == 20
    expected = config(script, eval_every=3, data_dir=os.path.abspath("data"))
    assert json.loads((done / "config.json").read_text()) == vars(expected)

def test_log_csv_has_a_row_for_each_time_it_saves_or_measures(done):
    rows, state = log(done), checkpoint(done)
    assert [row["step"] for row in rows] == ["2", "3", "4", "6"] and [*rows[0]][:2] == ["step", "loss"]
    written = [{name: x for name, x in row.items() if x} for row in rows]
    assert written == [{name: str(x) for name, x in row.items()} for row in state["log"]]
    assert ["frechet" in row for row in written] == [False, True, False, True], "measured every third step"
    seconds = [state["known"]["seconds"], *(float(row["seconds"]) for row in rows)]
    assert seconds == sorted(seconds) and 0 < seconds[0] < seconds[1], "those before training are counted"

def test_the_checkpoint_loads_without_code_and_load_run_gives_the_average(script, done):
    state, run = checkpoint(done), script.load_run(done, "cpu")
    assert {*state} == {"step", "known", "log", "model", "average", "optimizer", "scaler"}
    assert state["known"]["classes"] == script.SHAPES and len(state["known"]["targets"]) == 200
    assert vars(run.config) == json.loads((done / "config.json").read_text())
    assert run.step == state["step"] == 6 and same(run.known, state["known"]) and run.log == state["log"]
    assert run.device == CPU and not run.model.training and not same(state["model"], state["average"])
    assert same({**run.model.state_dict()}, {**state["average"]})

def test_metrics_json_is_flat_and_valid_also_where_a_figure_is_no_number(script, done, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "draw_curves", Mock())
    found, run = metrics(done), script.load_run(done, "cpu")        # metrics() refuses NaN and Infinity
    figures = {name: value for name, value in found.items() if name not in KNOWN}
    assert KNOWN <= {*found} and {"frechet", "seconds_before", "seconds"} <= {*figures}
    assert all(isinstance(x, (int, float)) and re.fullmatch(r"[a-z0-9_.]+", name) for name, x in figures.items())
    assert (found["script"], found["step"], found["classes"]) == (script.SCRIPT, 6, script.SHAPES)
    assert found["settings"] == vars(run.config) and found["log"] == run.log
    script.write_metrics(run.config, run, dict(none=math.nan, much=-math.inf, some=1.5), tmp_path)
    assert [metrics(tmp_path)[name] for name in ("none", "much", "some")] == [None, None, 1.5]

def test_nothing_is_written_over(script, done, tmp_path, capsys, training_only):
    before, run = contents(done), shutil.copytree(done, tmp_path / "run")
    for given in (args(script), flags(sample=run), flags(evaluate=run), flags(compare=run)):
        refused(script, capsys, [*given, "--out", run], "File exists", run)
    for task in ("sample", "sample", "evaluate"):
        assert script.main(flags(**{task: run}, num_samples=2)) == 0
    assert len([*run.glob("sample*/samples.npz")]) == 2 and len([*run.glob("evaluat*")]) == 1
    assert {name: content for name, content in contents(run).items() if "/" not in name} == before == contents(done)

def test_the_seed_decides_the_samples(script, done, tmp_path, monkeypatch):
    for name, seed in zip("abc", (1, 1, 2)):
        assert script.main(flags(sample=done, num_samples=4, seed=seed, out=tmp_path / name)) == 0
    a, b, c = (samples(tmp_path / name)[0] for name in "abc")
    assert (a == b).all() and (a != c).any() and a.shape == (4, 16, 16, 3)
    numbers = torch.arange(3 * 16 * 16).view(3, 16, 16).to(torch.uint8)
    monkeypatch.setattr(script, "to_uint8", lambda x: numbers.expand(len(x), -1, -1, -1))
    assert script.main(flags(sample=done, num_samples=4, out=tmp_path / "d")) == 0
    assert (samples(tmp_path / "d")[0] == numbers.permute(1, 2, 0).numpy()).all()

# ---- Going on after an interruption -----------------------------------------------------------------------------

def assert_same_training(one, other):
    a, b = (checkpoint(folder) for folder in (one, other))
    for timed in (a["known"], b["known"], *a["log"], *b["log"]):
        del timed["seconds"]
    assert same(a, b)

def at_call(patch, where, name, number, instead):
    """This call of where.name, counted from 1, is one of instead."""
    whole, calls = getattr(where, name), itertools.count(1)
    patch.setattr(where, name, lambda *given: (instead if next(calls) == number else whole)(*given))

def die(file=None, *others):
    """As a kill does: nothing is done on the way out. A file has been written half."""
    if hasattr(file, "truncate"):
        file.truncate(10)
    raise SystemExit("killed")

def test_a_run_that_is_stopped_at_any_moment_goes_on_bit_for_bit(script, tmp_path, capsys, training_only):
    out, long = tmp_path / "it's a run", dict(dropout=0.3, mirror=True, steps=7, warmup=0.3, batch_size=16)
    assert script.main(args(script, out=tmp_path / "whole", **long)) == 0
    given = args(script, out=out, **long)
    for where, name, number, kept in (                              # first, before there is a checkpoint
            (os, "fsync", 2, None), (script, "random_batch", 2, 0), (script, "update_average", 4, 2),
            (os, "fsync", 1, 2), (os, "fsync", 2, 2), (script, "write_csv", 1, 2)):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
            at_call(patch, where, name, number, die)
            script.main(given)
        assert kept is None or checkpoint(out)["step"] == kept
        given = flags(resume=out)
    with pytest.MonkeyPatch.context() as patch:                     # by Ctrl-C
        at_call(patch, script, "update_average", 3, Mock(side_effect=KeyboardInterrupt))
        assert script.main(given) == 130
    words = shlex.split(capsys.readouterr().err.split("interrupted; go on with: ")[1])
    assert words == ["python", script.__file__, "--resume", str(out)] and checkpoint(out)["step"] == 4
    assert script.main(words[2:]) == 0
    assert_same_training(out, tmp_path / "whole")
    assert [row["step"] for row in log(out)] == ["2", "4", "6", "7"]

def test_a_run_stopped_while_it_measures_is_measured_as_the_others(script, done, tmp_path, monkeypatch, capsys):
    out = shutil.copytree(done, tmp_path / "run", ignore=lambda *a: ["metrics.json", "samples.npz"])
    with monkeypatch.context() as patch:
        patch.setattr(script, "sample", Mock(side_effect=KeyboardInterrupt))
        assert script.main(flags(resume=out)) == 130 and "--resume" in capsys.readouterr().err
        assert script.main(flags(sample=out)) == 130 and "--resume" not in capsys.readouterr().err
    monkeypatch.setattr(script, "explain", lambda *given: None, raising=False)      # it takes long
    assert script.main(flags(resume=out)) == 0
    assert (samples(out)[0] == samples(done)[0]).all() and log(out) == log(done)
    a, b = metrics(done), metrics(out)
    assert {*a} == {*b} and a["frechet"] == pytest.approx(b["frechet"], rel=1e-4)

# Processes of their own: one imports what takes long, and is copied for each
PROCESSES = multiprocessing.get_context(None if os.name == "nt" else "forkserver")
PROCESSES.set_forkserver_preload(["pytest", "matplotlib.figure", "torchvision.transforms.v2", "torch._dynamo"])

def start(script, arguments, **environment):
    process = PROCESSES.Process(target=train_apart, args=(script.SCRIPT, arguments, environment))
    process.start()
    return process

@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_process_that_is_killed_in_whatever_way_goes_on_bit_for_bit(script, pictures, tmp_path, training_only):
    out, rows = tmp_path / "run", tmp_path / "run/log.csv"
    given = dict(dataset="folder", data_dir=pictures, steps=10_000, save_every=5, mirror=True)
    words = args(script, out=out, **given)
    deadly = [n for n in (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    for i, number in enumerate(deadly, 1):
        process = start(script, words)
        while not (rows.exists() and len(rows.read_text().splitlines()) > 3 * i):
            time.sleep(0.01)
            assert process.is_alive()
        os.kill(process.pid, number)
        process.join()
        assert process.exitcode == -number
        words = flags(resume=out)
    stopped = checkpoint(out)["step"]
    for first, words in ((stopped, words), (0, args(script, out=tmp_path / "whole", **given))):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
            at_call(patch, script, "random_batch", stopped + 6 - first, die)
            script.main(words)
    assert checkpoint(out)["step"] == stopped + 5 > 15
    assert_same_training(out, tmp_path / "whole")

def test_two_processes_train_like_one(script, pictures, tmp_path, training_only):
    """But for rounding; and, where a method looks at a batch as a whole, nearly."""
    name, near, atol = ("diffusion", 0.02, 0.02) if script.SCRIPT == "pdm" else ("loss", 1e-3, 2e-3)
    given = dict(dataset="folder", data_dir=pictures, dropout=0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
    both = [start(script, args(script, out=tmp_path / "two", **given), RANK=rank, **where) for rank in "01"]
    assert script.main(args(script, out=tmp_path / "one", **given)) == 0
    for process in both:
        process.join()
        assert process.exitcode == 0
    for a, b in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert float(a[name]) == pytest.approx(float(b[name]), rel=near) and a["step"] == b["step"]
    a, b = (checkpoint(tmp_path / run)["average"] for run in ("one", "two"))
    assert all(torch.allclose(a[key], b[key], atol=atol) for key in a if key.startswith("unet"))

def test_a_run_can_go_on_with_other_settings_which_it_remembers(script, done, tmp_path, training_only):
    out = shutil.copytree(done, tmp_path / "run")
    moved = dict(json.loads((out / "config.json").read_text()), data_dir="C:\\data\\")    # from another system
    (out / "config.json").write_text(json.dumps(moved))
    assert script.main(flags(sample=out, num_samples=2)) == 0
    assert script.main(flags(resume=out, steps=7, lr=1e-3, channels=8, amp="bf16")) == 0
    assert script.main(flags(resume=out, steps=8, amp="fp16")) == 0
    run = script.load_run(out)
    assert (run.step, run.config.steps, run.config.lr, run.config.amp) == (8, 8, 1e-3, "fp16")

def test_images_or_labels_that_changed_since_are_not_trained_on(script, pictures, tmp_path, capsys, training_only):
    data, out = shutil.copytree(pictures, tmp_path / "data"), tmp_path / "run"
    assert script.main(args(script, out=out, dataset="folder", data_dir=data, steps=1)) == 0
    before = contents(out)
    Image.new("RGB", (16, 16)).save(data / "train/dark/3.png")
    refused(script, capsys, flags(resume=out, steps=4), "have changed")
    shutil.copy(pictures / "train/dark/3.png", data / "train/dark/3.png")
    (data / "train/dark/9.png").rename(data / "train/light/-.png")  # the last of a class becomes the next one's first
    refused(script, capsys, flags(resume=out, steps=4), "have changed")
    assert contents(out) == before

def test_other_images_than_the_runs_are_not_measured_on(script, done, monkeypatch, capsys):
    monkeypatch.setattr(script, "same_images", Mock(side_effect=script.Stop("have changed")))
    for task in {"evaluate", "explain", "diagnose"} & {*script.Config.TASKS}:
        refused(script, capsys, flags(**{task: done}), "have changed")
    assert not [path for path in done.iterdir() if path.is_dir()], "nor is a folder made for it"

def test_measuring_and_saving_are_not_training_time(script, tmp_path, monkeypatch):
    """By a clock that only moves when something is done."""
    cfg, clock = config(script, eval_every=3), []
    sets = script.load_sets(cfg)
    model = type(cfg.build(dict(shape=[3, 16, 16], classes=script.SHAPES)))

    def takes(where, name, seconds):
        whole = getattr(where, name)
        monkeypatch.setattr(where, name, lambda *given: [clock.append(seconds), whole(*given)][1])
    monkeypatch.setattr(model, "quality", lambda self, cfg, run, sets: ({"frechet": 1.0}, [], []))
    monkeypatch.setattr(script, "time", SimpleNamespace(perf_counter=lambda: sum(clock)))
    takes(script, "fingerprint", 7)
    takes(script, "random_batch", 1)
    takes(script, "save_checkpoint", 1000)
    takes(model, "quality", 100)
    script.new_run(cfg, sets, tmp_path, CPU)
    for steps in (6, 8):
        script.train(dataclasses.replace(cfg, steps=steps), sets, tmp_path, CPU)
    assert {int(row["step"]): float(row["seconds"]) for row in log(tmp_path)} == {2: 9, 3: 10, 4: 11, 6: 13, 8: 15}

# ---- What goes wrong --------------------------------------------------------------------------------------------

def test_a_training_that_diverges_ends_with_a_command_that_goes_on(script, tmp_path, capsys, training_only):
    out, draw, nothing = tmp_path / "a run", script.random_batch, torch.full((8, 3, 16, 16), math.nan)
    words = args(script, out=out)
    for name, number, instead in (                                  # what the last update spoils, no loss shows yet
            ("random_batch", 3, lambda *given: draw(*given)._replace(eps=nothing)),
            ("update_average", 2, lambda average, model, n: next(model.parameters()).data.fill_(math.inf))):
        with pytest.MonkeyPatch.context() as patch:
            at_call(patch, script, name, number, instead)
            assert script.main(words) == 2
        command, = re.findall("diverged: go on from before by (python .*), or --amp off\n", capsys.readouterr().err)
        assert [checkpoint(out)["step"], *(row["step"] for row in log(out))] == [2, "2"]
        assert all(x.isfinite().all() for part in ("model", "average") for x in checkpoint(out)[part].values())
        words = shlex.split(command)[2:]
    assert script.main(words) == 0 and script.load_run(out).config.lr == 2e-3 / 16

@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), RuntimeError("can't allocate memory"),
    MemoryError()], ids=repr)
def test_memory_that_runs_out_is_a_sentence_and_a_bug_a_traceback(script, done, tmp_path, monkeypatch, capsys, error):
    monkeypatch.setattr(script, "sample", Mock(side_effect=RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        script.main(flags(sample=done, out=tmp_path / "a"))
    monkeypatch.setattr(script, "sample", Mock(side_effect=error))
    refused(script, capsys, flags(sample=done, out=tmp_path / "b"), "memory ran out", "--batch-size")

@pytest.mark.parametrize("damage", [
    dict(channels=16), dict(channels=-4), dict(channels="8"), dict(channels=8.5), dict(lr=[1]), dict(lr=math.inf),
    dict(lr=None), dict(mirror=1), dict(dataset="x"), dict(multipliers="a"), dict(momentum=0.9), dict(seed=2 ** 63),
    dict(data_dir=3), dict(timesteps=1), ["config.json", "[1, 2]"], ["config.json", '{"a": '], ["checkpoint.pt", ""],
    ["checkpoint.pt", "PK\3\4"], ["checkpoint.pt", None]], ids=str)
def test_a_damaged_run_is_refused_and_left_as_it_is(script, done, tmp_path, capsys, damage):
    run = shutil.copytree(done, tmp_path / "run")
    if isinstance(damage, dict):                                    # other settings
        damage = ["config.json", json.dumps({**json.loads((run / "config.json").read_text()), **damage})]
    (run / damage[0]).write_text(damage[1]) if damage[1] is not None else (run / damage[0]).unlink()
    before = contents(run)
    for task in ("resume", "sample", "evaluate"):
        refused(script, capsys, flags(**{task: run}))
    with pytest.raises(script.Stop):
        script.load_run(run)
    assert contents(run) == before

# ---- Comparing --------------------------------------------------------------------------------------------------

def finished(script, folder, changes, rows, **figures):
    """What a comparison reads of a finished run."""
    content = dict(script=script.SCRIPT, step=6, machine="", classes=[], log=rows, seconds_before=10, **figures,
                   settings={**vars(config(script)), **changes})
    script.save(content, folder / "metrics.json")
    return str(folder)

def test_runs_that_differ_in_their_seed_are_a_group_with_mean_and_interval(script, tmp_path, monkeypatch, capsys):
    runs, drawn = [], []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: drawn.append(figure))
    for lr, values in ((0.1, (1, 2, 6)), (0.2, (7,)), (0.3, range(40)), (0.4, (3, None))):
        for seed, value in enumerate(values):
            rows = [dict(step=4, loss=0.5, seconds=13), dict(step=6, loss=0.4, seconds=14.0, frechet=value)]
            only = dict(only=1, none=None) if lr == 0.2 else {}
            folder = tmp_path / f"{lr} {seed}"
            runs.append(finished(script, folder, dict(seed=seed, lr=lr), rows, frechet=value, **only))
    (tmp_path / "link").symlink_to(runs[0])
    assert script.main(["--compare", *runs, runs[1], str(tmp_path / "link"), "--out", str(tmp_path / "c")]) == 0
    with open(tmp_path / "c/comparison.csv", newline="") as file:
        table = {(row.pop("figure"), row.pop("group")): {name: float(x) for name, x in row.items()}
                 for row in csv.DictReader(file)}
    assert {group for _, group in table} == {"lr 0.1", "lr 0.2", "lr 0.3", "lr 0.4"}, "named by what differs"
    assert {figure for figure, _ in table} == {"step", "seconds_before", "frechet", "only"}
    three, one, many, missing = (table["frechet", f"lr {lr}"] for lr in (0.1, 0.2, 0.3, 0.4))
    half = pytest.approx(4.303 * 7 ** 0.5 / 3 ** 0.5)               # Student's t, 2 degrees of freedom
    assert three == dict(runs=3, mean=3, half=half), "a folder that is given twice counts once"
    assert one == dict(runs=1, mean=7, half=pytest.approx(math.nan, nan_ok=True))
    assert many == dict(runs=40, mean=19.5, half=pytest.approx(2.262 * np.std(range(40), ddof=1) / 40 ** 0.5))
    assert missing["runs"] == 2 and math.isnan(missing["mean"]) and table["only", "lr 0.2"]["mean"] == 1
    assert re.search(r"frechet +lr 0.1 +3 \+- 6.6 \(3 runs\)\n", capsys.readouterr().out)
    _, steps, _, clock = drawn[0].axes                              # over steps: loss, frechet; over seconds
    assert steps.lines[1].get_xydata().tolist() == [[6, 1]] and clock.lines[1].get_xydata().tolist() == [[14, 1]]

def test_finished_runs_are_compared_and_comparisons_passed_over(script, done, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "draw_curves", lambda path, groups: path.touch())
    before, one, two = contents(done), tmp_path / "one", tmp_path / "two"
    assert script.main(["--compare", str(done), "--out", str(one)]) == 0
    assert script.main(["--compare", str(one), str(done), "--out", str(two)]) == 0
    assert contents(one) == contents(two) and {*contents(one)} == {"comparison.csv", "comparison.png"}
    assert "all runs" in capsys.readouterr().out and contents(done) == before
    refused(script, capsys, ["--compare", one, two], "takes folders of finished runs")
