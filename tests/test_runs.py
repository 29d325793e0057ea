"""Whole runs of all scripts, tiny ones: what they leave behind, going on after a stop, comparing, and what goes wrong."""
import csv
import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from conftest import (CPU, ROOT, SCRIPTS, TINY, args, checkpoint, close, config, contents, flags, log, metrics,
                      refused, same, samples, settings, train_apart)

MADE = {"config.json", "log.csv", "checkpoint.pt", "metrics.json", "curves.png", "samples.png", "samples.npz"}
KNOWN = {"script", "step", "machine", "torch", "classes", "settings", "log"}

# ---- What a run leaves behind -----------------------------------------------------------------------------------

def test_a_run_leaves_its_files_and_pictures(script, done):
    found = set(contents(done))
    assert found >= MADE and {Path(name).suffix for name in found - MADE} <= {".png", ".json"}
    for path in done.glob("*.png"):
        with Image.open(path) as image:
            image.load()
            assert min(image.size) > 100
    assert len(samples(done)[1]) == 20 and samples(done)[0].shape == (20, 16, 16, 3)
    assert samples(done)[0].dtype == np.uint8
    assert script.Config(**json.loads((done / "config.json").read_text())) == config(script, eval_every=3)

def test_log_csv_has_a_row_for_each_time_it_saves_or_measures(script, done):
    rows, cfg = log(done), config(script)
    assert [row["step"] for row in rows] == ["2", "3", "4", "6"] and {float(row["skipped"]) for row in rows} == {0}
    assert [float(row["lr"]) for row in rows] == pytest.approx([script.learning_rate(n, cfg) for n in (1, 2, 3, 5)])
    seconds = [float(row["seconds"]) for row in rows]
    assert seconds == sorted(seconds) and seconds[0] > 0 and list(rows[0])[0] == "loss"
    assert [row["frechet"] != "" for row in rows] == [False, True, False, True], "measured every third step"

def test_the_checkpoint_loads_without_code_and_load_run_gives_the_average(script, done):
    state, run = checkpoint(done), script.load_run(done, "cpu")
    assert set(state) == {"script", "step", "known", "log", "model", "average", "optimizer", "scaler"}
    assert state["step"] == 6 and state["script"] == script.SCRIPT and state["known"]["classes"] == list(script.SHAPES)
    assert len(state["known"]["targets"]) == 200 and not same(state["model"], state["average"])
    assert run.config == config(script, eval_every=3) and run.step == 6 and not run.model.training
    assert all(value.equal(state["average"][name]) for name, value in run.model.state_dict().items())

def test_metrics_json_is_flat_and_holds_figures_and_circumstances(script, done):
    found = metrics(done)
    assert KNOWN <= set(found) and found["settings"] == json.loads((done / "config.json").read_text())
    figures = {name: value for name, value in found.items() if name not in KNOWN}
    assert all(isinstance(value, (int, float)) for value in figures.values())
    assert all(re.fullmatch(r"[a-z0-9_.]+", name) for name in figures)
    assert {"frechet", "seconds_before", "seconds_training", "seconds_sampling"} <= set(figures)
    assert (found["script"], found["step"], len(found["log"])) == (script.SCRIPT, 6, 4)
    assert found["classes"] == list(script.SHAPES)
    assert found["parameters"] == sum(p.numel() for p in script.load_run(done, "cpu").model.parameters())

def test_curves_show_every_column_of_the_log_that_is_measured(script, done, tmp_path, monkeypatch):
    drawn, run = [], script.load_run(done, "cpu")
    monkeypatch.setattr(script, "draw_curves", lambda path, groups, names: drawn.extend(names))
    script.write_metrics(run.config, run, {}, tmp_path)
    assert sorted(drawn) == sorted({*log(done)[0]} - {"step", "seconds", "lr", "skipped"})
    assert {"loss", "frechet"} <= {*drawn}

def test_nothing_is_written_over(script, done, tmp_path, training_only):
    before, run = contents(done), shutil.copytree(done, tmp_path / "run")
    assert script.main(args(script, out=done, steps=1)) == 0
    assert checkpoint(Path(f"{done}-2"))["step"] == 1
    for name in ("sample", "sample", "evaluate"):
        assert script.main(flags(**{name: run}, num_samples=2)) == 0
    assert len([*run.glob("sample*/samples.npz")]) == 2 and len([*run.glob("evaluat*")]) == 1
    assert {name: content for name, content in contents(run).items() if "/" not in name} == before == contents(done)
    assert [script.new_folder(tmp_path / "a").name for _ in range(3)] == ["a", "a-2", "a-3"]

def test_the_seed_decides_the_samples(script, done, tmp_path):
    for seed in (1, 1, 2):
        assert script.main(flags(sample=done, num_samples=4, seed=seed, out=tmp_path / "s")) == 0
    a, b, c = (samples(tmp_path / name)[0] for name in ("s", "s-2", "s-3"))
    assert (a == b).all() and (a != c).any() and a.shape == (4, 16, 16, 3)

# ---- Going on after an interruption -----------------------------------------------------------------------------

def assert_same_training(one, other, rows=True):
    a, b = checkpoint(one), checkpoint(other)
    for part in ("step", "model", "average", "optimizer", "scaler"):
        assert same(a[part], b[part]), part
    assert all(same(a["known"][part], b["known"][part]) for part in ("targets", "figures", "images"))
    a, b = ([{**row, "seconds": 0} for row in state["log"]["rows"]] for state in (a, b))
    assert a == b if rows else a[-1] == b[-1]

def stop_at(patch, script, step, stop):
    """stop() is called in this step, after the weights have moved."""
    whole = script.update_average

    def update(average, model, n):
        if n == step:
            stop()
        whole(average, model, n)
    patch.setattr(script, "update_average", update)

def die():
    """As a kill does: nothing is saved on the way out, for no handler knows of it."""
    raise SystemExit("killed")

LONG = dict(dropout=0.3, accumulate=2, steps=7, warmup=0.3, batch_size=16, mirror=True)

@pytest.fixture(scope="session")
def whole(script, tmp_path_factory):
    """A run that was never stopped: mirrored, with dropout, in passes."""
    folder = tmp_path_factory.mktemp("whole")
    cfg = config(script, **LONG)
    sets = script.load_sets(cfg)
    script.new_run(cfg, sets, folder, CPU)
    script.train(cfg, sets, folder, CPU)
    return folder

def test_a_run_that_is_killed_goes_on_bit_for_bit(script, whole, tmp_path, training_only):
    out = tmp_path / "run"
    for step in (1, 3, 6):                                          # before the first save, between saves, at the end
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, script, step, die)
            with pytest.raises(SystemExit):
                script.main(args(script, out=out, **LONG) if step == 1 else flags(resume=out))
        assert checkpoint(out)["step"] == step // 2 * 2
    assert script.main(flags(resume=out)) == 0
    assert_same_training(whole, out)
    assert [row["step"] for row in log(out)] == ["2", "4", "6", "7"]

def test_a_run_killed_before_training_or_while_saving_goes_on_bit_for_bit(
        script, whole, tmp_path, monkeypatch, capsys, training_only):
    out, save, saves = tmp_path / "run", torch.save, []

    def half(content, file):
        saves.append(file)
        if len(saves) in (1, 4):                                    # the state of step 0, and of step 4
            file.write(b"half")
            raise KeyboardInterrupt
        save(content, file)
    monkeypatch.setattr(torch, "save", half)
    assert script.main(args(script, out=out, **LONG)) == 130
    assert f"--resume {out}" in capsys.readouterr().err and not (out / "checkpoint.pt").exists()
    assert script.main(flags(resume=out)) == 130 and checkpoint(out)["step"] == 2
    assert script.main(flags(resume=out)) == 0
    assert_same_training(whole, out)

def test_ctrl_c_saves_the_step_and_says_how_to_go_on(script, whole, tmp_path, capsys, training_only):
    out, before = tmp_path / "run", signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, script, 2, lambda: signal.raise_signal(signal.SIGINT))
        assert script.main(args(script, out=out, **LONG)) == 130
    assert checkpoint(out)["step"] == 3 and f"--resume {out}" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before
    assert script.main(flags(resume=out)) == 0
    assert_same_training(whole, out, rows=False)                    # one row more

def test_a_run_killed_while_it_samples_is_measured_as_the_others(script, done, tmp_path, capsys):
    out = shutil.copytree(done, tmp_path / "run")
    (out / "metrics.json").unlink()

    def stop(*given, **options):
        raise KeyboardInterrupt
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "sample", stop)
        assert script.main(flags(resume=out)) == 130 and f"--resume {out}" in capsys.readouterr().err
        assert script.main(flags(sample=out)) == 130 and "--resume" not in capsys.readouterr().err
    assert script.main(flags(resume=out)) == 0
    assert (samples(out)[0] == samples(done)[0]).all() and log(out) == log(done)
    first, second = metrics(done), metrics(out)
    assert set(first) == set(second)
    for name, value in first.items():
        if isinstance(value, float) and not re.search("seconds|step_|sample_", name):
            assert second[name] == pytest.approx(value, rel=1e-4, abs=1e-6, nan_ok=True), name

# Processes of their own: one imports the scripts, and is copied for each
PROCESSES = multiprocessing.get_context(None if os.name == "nt" else "forkserver")
PROCESSES.set_forkserver_preload(["conftest", *SCRIPTS])

def start(script, arguments, **environment):
    process = PROCESSES.Process(target=train_apart, args=(script.SCRIPT, arguments, environment))
    process.start()
    return process

@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_process_that_is_killed_goes_on_bit_for_bit(script, pictures, tmp_path, training_only):
    out, rows = tmp_path / "run", tmp_path / "run" / "log.csv"
    given = dict(dataset="folder", data_dir=pictures, steps=10_000, save_every=5)
    process = start(script, args(script, out=out, **given))
    while not (rows.exists() and len(rows.read_text().splitlines()) > 3):
        time.sleep(0.01)
        assert process.is_alive()
    process.kill()
    process.join()
    stopped = checkpoint(out)["step"]
    for arguments in (flags(resume=out), args(script, out=tmp_path / "whole", **given)):
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, script, stopped + 5, die)
            with pytest.raises(SystemExit):
                script.main(arguments)
    assert stopped > 0 and checkpoint(out)["step"] == stopped + 5
    assert_same_training(out, tmp_path / "whole")

def test_two_processes_and_two_passes_train_like_one(script, pictures, tmp_path, training_only):
    """But for rounding; and, where a method looks at a batch as a whole, nearly."""
    name, near, atol = ("loss", 1e-3, 2e-3) if script.SCRIPT == "protodiffusion" else ("diffusion", 0.02, 0.02)
    given = dict(dataset="folder", data_dir=pictures, dropout=0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    both = [start(script, args(script, out=tmp_path / "two", **given), RANK=rank, WORLD_SIZE="2", MASTER_PORT=port,
                  MASTER_ADDR="127.0.0.1") for rank in "01"]        # what torchrun does
    for passes in (1, 2):
        assert script.main(args(script, accumulate=passes, out=tmp_path / f"{passes}", **given)) == 0
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    for other in ("two", "2"):
        for a, b in zip(log(tmp_path / "1"), log(tmp_path / other), strict=True):
            assert float(a[name]) == pytest.approx(float(b[name]), rel=near)
            assert (a["step"], a["lr"], a["skipped"]) == (b["step"], b["lr"], b["skipped"])
        a, b = (checkpoint(tmp_path / run)["average"] for run in ("1", other))
        assert all(torch.allclose(a[key], b[key], atol=atol) for key in a if key.startswith("unet"))

def test_a_run_can_go_on_with_other_settings_which_it_remembers(script, done, tmp_path, training_only):
    out = shutil.copytree(done, tmp_path / "run")
    assert script.main(flags(resume=out, steps=7, lr=1e-3, channels=8, amp="bf16")) == 0
    assert script.main(flags(resume=out, steps=8, amp="fp16")) == 0
    saved = json.loads((out / "config.json").read_text())
    assert checkpoint(out)["step"] == 8 and (saved["steps"], saved["lr"], saved["amp"]) == (8, 1e-3, "fp16")

def test_images_that_changed_since_are_not_trained_on(script, tmp_path, pictures, capsys, training_only):
    copy, out = shutil.copytree(pictures, tmp_path / "pictures"), tmp_path / "run"
    assert script.main(args(script, out=out, dataset="folder", data_dir=copy, steps=1)) == 0
    before = contents(out)
    next((copy / "train").glob("*/*")).unlink()
    refused(script, capsys, flags(resume=out, steps=4), "have changed")
    shutil.rmtree(copy)
    refused(script, capsys, flags(resume=out, steps=4), copy)
    assert contents(out) == before

def test_measuring_saving_and_compiling_are_not_training_time(script, tmp_path, monkeypatch):
    """By a clock that only moves when something is done."""
    cfg, now, compiled = config(script, eval_every=3, compile=True), [0], []

    def takes(seconds, function):
        def slow(*given, **options):
            now[0] += seconds
            return function(*given, **options)
        return slow

    def compile(net, **options):                              # as torch's does, it takes its time at the first call
        def forward(*given):
            now[0] += 0 if compiled else 10_000
            compiled.append(True)
            return net(*given)
        return forward
    sets = script.load_sets(cfg)
    model = type(cfg.build(dict(shape=[3, 16, 16], classes=[""] * 10)))
    monkeypatch.setattr(script, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(script, "fingerprint", takes(7, script.fingerprint))
    monkeypatch.setattr(script, "save_safely", takes(1000, script.save_safely))
    monkeypatch.setattr(script, "random_batches", takes(1, script.random_batches))
    monkeypatch.setattr(model, "quality", takes(100, lambda self, cfg, run, sets: {"frechet": 1.0}))
    monkeypatch.setattr(torch, "compile", compile)
    script.new_run(cfg, sets, tmp_path, CPU)
    script.train(cfg, sets, tmp_path, CPU)
    state = checkpoint(tmp_path)
    assert {row["step"]: row["seconds"] for row in state["log"]["rows"]} == {2: 1, 3: 2, 4: 3, 6: 5} and compiled
    assert state["known"]["seconds"] == 7 and state["log"]["seconds"] == 5

# ---- Gradients that are no numbers ------------------------------------------------------------------------------

@pytest.fixture
def planted(script, tmp_path, monkeypatch):
    """train(bad, ...): trains with gradients of NaN in the steps `bad` -> every state that was saved."""
    def train(bad, **changes):
        cfg, states = config(script, **changes), []
        sets, whole, save, steps = script.load_sets(cfg), script.safe_step, script.save_safely, itertools.count()

        def spoil(optimizer, scaler):
            if next(steps) in bad:
                optimizer.param_groups[0]["params"][0].grad.fill_(math.nan)
            return whole(optimizer, scaler)

        def keep(content, path):
            save(content, path)
            states.append(torch.load(path, weights_only=True))
        monkeypatch.setattr(script, "safe_step", spoil)
        monkeypatch.setattr(script, "save_safely", keep)
        script.new_run(cfg, sets, tmp_path, CPU)
        script.train(cfg, sets, tmp_path, CPU)
        return states
    return train

def test_a_gradient_that_is_no_number_changes_no_weight_and_no_moment(script, planted, tmp_path):
    states = planted({3}, steps=5, save_every=1)                    # after 0, 1, 2, ... steps
    assert [state["step"] for state in states] == list(range(6))
    assert same(states[3]["optimizer"]["state"], states[4]["optimizer"]["state"])
    names = [name for name, _ in script.load_run(tmp_path, "cpu").model.named_parameters()]
    stay = [all(same(a["model"][name], b["model"][name]) for name in names) for a, b in zip(states, states[1:])]
    assert stay == [False, False, False, True, False]
    assert [float(row["skipped"]) for row in log(tmp_path)] == [0, 0, 0, 1, 1]
    assert all(value.isfinite().all() for value in states[-1]["model"].values())

def test_thirty_bad_gradients_in_a_row_end_the_run_with_sound_weights(script, planted, tmp_path):
    with pytest.raises(script.Stop, match=r"diverged.*--lr"):
        planted(set(range(100)), steps=60, save_every=10)
    assert all(value.isfinite().all() for value in checkpoint(tmp_path)["average"].values())
    assert checkpoint(tmp_path)["step"] == 30

def test_thirty_bad_gradients_in_all_are_survived(planted, tmp_path):
    planted(set(range(33)) - {20}, steps=34, save_every=50)
    assert [float(row["skipped"]) for row in log(tmp_path)] == [32]

# ---- Comparing --------------------------------------------------------------------------------------------------

def finished(script, folder, changes, rows, **figures):
    """What a comparison reads of a finished run."""
    folder.mkdir()
    content = dict(script=script.SCRIPT, step=6, machine="", classes=[], settings=settings(script, **changes),
                   log=[dict(step=2, loss=1.0, seconds=1.5), *rows], seconds_before=10, **figures)
    (folder / "metrics.json").write_text(json.dumps(content))
    return str(folder)

def test_runs_that_differ_in_their_seed_are_a_group_with_mean_and_interval(script, tmp_path, monkeypatch, capsys):
    runs, drawn = [], []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: drawn.append(figure))
    for name, lr, values in (("a", 0.1, (1, 2, 6)), ("b", 0.2, (7,))):
        for seed, value in enumerate(values):
            rows = [dict(step=4, loss=0.5, seconds=3.0, frechet=8), dict(step=6, loss=0.4, seconds=4, frechet=value)]
            changes, only = dict(seed=seed, data_dir=name, lr=lr), dict(only=1) if name == "b" else {}
            runs.append(finished(script, tmp_path / f"{name}{seed}", changes, rows, frechet=value, **only))
    assert script.main(["--compare", *runs, "--out", str(tmp_path / "c")]) == 0
    with open(tmp_path / "c" / "comparison.csv", newline="") as file:
        table = {(row["figure"], row["group"]): row for row in csv.DictReader(file)}
    assert {group for _, group in table} == {"lr 0.1", "lr 0.2"}, "named by what differs but for the seed"
    assert {figure for figure, _ in table} == {"step", "seconds_before", "frechet", "only"}
    three, one = table["frechet", "lr 0.1"], table["frechet", "lr 0.2"]
    assert three["runs"] == "3" and float(three["mean"]) == 3
    assert float(three["half"]) == pytest.approx(4.303 * 7 ** 0.5 / 3 ** 0.5), "Student's t, 2 degrees of freedom"
    assert (one["runs"], float(one["mean"]), one["half"]) == ("1", 7, "nan") and "lr 0.1" in capsys.readouterr().out
    _, steps, _, clock = drawn[0].axes                              # over steps: loss, frechet; over seconds
    assert steps.lines[0].get_xydata().tolist() == [[4, 8], [6, 1]]
    assert clock.lines[0].get_xydata().tolist() == [[13, 8], [14, 1]], "with all that comes before training"
    many = [float(i) for i in range(40)]
    assert script.mean_interval(many)[1] == pytest.approx(2.262 * np.std(many, ddof=1) / 40 ** 0.5)

def test_finished_runs_are_compared_and_others_refused(script, done, tmp_path, capsys):
    before = contents(done)
    assert script.main(["--compare", str(done), str(done), "--out", str(tmp_path / "c")]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("frechet", "seconds_training", "all runs"))
    assert contents(done) == before and set(contents(tmp_path / "c")) == {"comparison.csv", "comparison.png"}
    unfinished = shutil.copytree(done, tmp_path / "run")
    (unfinished / "metrics.json").unlink()
    refused(script, capsys, ["--compare", done, unfinished], unfinished, "metrics.json")
    for content in (dict(script="other"), dict(script=script.SCRIPT, log=[]), [1, 2]):
        (unfinished / "metrics.json").write_text(json.dumps(content))
        refused(script, capsys, ["--compare", done, unfinished], unfinished)

# ---- What goes wrong: exit status 2, one sentence, and nothing changes -------------------------------------------

@pytest.mark.parametrize("changes, words", [
    (dict(dataset="cifar11"), ["cifar11", "shapes"]),
    (dict(image_size=18, multipliers="1,2,2"), ["--image-size"]),
    (dict(multipliers="1,0"), ["--multipliers"]),
    (dict(channels=6), ["--channels"]),
    (dict(steps=0), ["--steps", "0"]),
    (dict(dropout=1.5), ["--dropout"]),
    (dict(lr="nan"), ["--lr"]),
    (dict(accumulate=3), ["--batch-size", "--accumulate"]),
    (dict(multipliers="1,x"), ["--multipliers"]),
    (dict(sample_steps=1500), ["--sample-steps"]),
    (dict(timesteps=20), ["noise levels", "21"]),
    (dict(device="toaster"), ["toaster", "cpu"]),
    (dict(dataset="folder", data_dir="nowhere"), ["nowhere", "--data-dir"])])
def test_a_setting_that_cannot_be_is_named_and_makes_no_folder(script, tmp_path, capsys, changes, words):
    refused(script, capsys, args(script, out=tmp_path / "run", **changes), *words)
    assert not list(tmp_path.iterdir())

def edited(**changes):
    def damage(folder):
        saved = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**saved, **changes}))
    return damage

def replaced(change):
    return lambda folder: torch.save(change(checkpoint(folder)), folder / "checkpoint.pt")

DAMAGES = {
    "truncated": (lambda folder: os.truncate(folder / "checkpoint.pt", 2000), "checkpoint.pt"),
    "foreign": (replaced(lambda state: {"weights": torch.zeros(3)}), "checkpoint.pt"),
    "another script's": (replaced(lambda state: {**state, "script": "otherdiffusion"}), "otherdiffusion"),
    "another network": (edited(channels=16), "config.json"),
    "another version": (edited(momentum=0.9), "another version"),
    "half a config": (lambda folder: os.truncate(folder / "config.json", 20), "config.json"),
    "no settings": (lambda folder: (folder / "config.json").write_text("[1, 2]"), "config.json")}

@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_foreign_run_is_refused_and_left_as_it_is(script, done, tmp_path, capsys, damage):
    folder = shutil.copytree(done, tmp_path / "run")
    change, word = DAMAGES[damage]
    change(folder)
    before = contents(folder)
    for task in ("resume", "sample", "evaluate"):
        refused(script, capsys, flags(**{task: folder}), word)
        assert contents(folder) == before

def test_a_run_that_is_not_there_or_not_begun_is_named(script, done, tmp_path, capsys):
    for task in ("resume", "sample", "evaluate"):
        refused(script, capsys, flags(**{task: tmp_path / "nothing"}), "nothing")
    assert not list(tmp_path.iterdir())
    folder = shutil.copytree(done, tmp_path / "run")
    (folder / "checkpoint.pt").unlink()
    refused(script, capsys, flags(sample=folder), folder, "checkpoint.pt", "--resume")

@pytest.mark.parametrize("name, value", [("channels", 16), ("dataset", "folder"), ("image_size", 32),
                                         ("prototype_dim", 4), ("blocks", 2), ("timesteps", 500)])
def test_a_setting_that_belongs_to_the_run_cannot_change(script, done, capsys, name, value):
    before = contents(done)
    refused(script, capsys, flags(resume=done, **{name: value}), f"--{name.replace('_', '-')}", value, TINY[name])
    assert contents(done) == before

@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
                                   RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")])
def test_memory_that_runs_out_and_samples_that_are_no_numbers_are_explained_and_nothing_else(
        script, done, tmp_path, capsys, monkeypatch, error):
    def fail(*given, **options):
        raise error
    sampling = flags(sample=done, out=tmp_path / "s")
    monkeypatch.setattr(script, "sample", fail)
    refused(script, capsys, sampling, "memory", "--batch-size", "--sample-batch")
    error = RuntimeError("shape mismatch")
    with pytest.raises(RuntimeError, match="shape mismatch"):
        script.main(sampling)
    monkeypatch.setattr(script, "sample", lambda predict, xT, *given, **options: xT * math.nan)
    refused(script, capsys, sampling, "--amp", "--lr")

def test_a_folder_that_may_not_be_made_and_a_full_disk_are_named(script, tmp_path, capsys, monkeypatch):
    def full(content, path, **k):
        raise OSError(28, "No space left on device")

    def refuse(self, *a, **k):
        raise PermissionError(13, "Permission denied", str(self))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", full)
        refused(script, capsys, args(script, out=tmp_path / "run"), "checkpoint.pt", "the disk is full")
    monkeypatch.setattr(script.Path, "mkdir", refuse)
    refused(script, capsys, args(script, out=tmp_path / "other"), tmp_path / "other", "Permission denied")

# ---- The scripts themselves -------------------------------------------------------------------------------------

def test_importing_changes_nothing_for_the_importer(tmp_path):
    code = """import os, random, signal, sys, torch, numpy, matplotlib
def state():
    return (random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist(), torch.is_grad_enabled(),
            torch.get_default_dtype(), torch.get_float32_matmul_precision(), torch.get_num_threads(),
            torch.backends.cudnn.benchmark, torch.backends.cuda.flash_sdp_enabled(), sorted(os.environ),
            dict.__getitem__(matplotlib.rcParams, 'backend'), signal.getsignal(signal.SIGINT))
before = state()
for name in sys.argv[1:]:
    __import__(name)
assert state() == before and 'matplotlib.pyplot' not in sys.modules and not os.listdir()
"""
    found = subprocess.run([sys.executable, "-c", code, *SCRIPTS], cwd=tmp_path, capture_output=True, text=True,
                           env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert found.returncode == 0 and not found.stdout, found.stdout + found.stderr

def test_help_lists_every_setting_with_its_meaning_and_default(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    words = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert stop.value.code == 0
    for field in dataclasses.fields(script.Config):
        flag, default = f"--{field.name.replace('_', '-')}", re.escape(f"[{field.default}]")
        assert re.search(rf"{flag}\b[^\[]{{9,}}{default}", words), f"{flag}: meaning and default"

# ---- What only ProtoDiffusion's runs do: the others' are in their own files --------------------------------------

@pytest.fixture
def pd(script):
    if script.SCRIPT != "protodiffusion":
        pytest.skip("of ProtoDiffusion alone")
    return script

def begun(pd, folder, **changes):
    """The checkpoint of step 0."""
    folder.mkdir()
    cfg = config(pd, **changes)
    pd.new_run(cfg, pd.load_sets(cfg), folder, CPU)
    return checkpoint(folder)

def test_three_ways_to_start_share_their_network_and_stage_1(pd, tmp_path, monkeypatch):
    frozen, unfrozen = (begun(pd, tmp_path / name, prototypes=name) for name in ("frozen", "unfrozen"))
    monkeypatch.setattr(pd, "fit", lambda *a: pytest.fail("random prototypes need no stage 1"))
    random = begun(pd, tmp_path / "random", prototypes="random")
    assert same(frozen["model"], unfrozen["model"]) and frozen["known"]["figures"] == unfrozen["known"]["figures"]
    table, noise = (state["model"].pop("table.weight") for state in (unfrozen, random))
    assert same(random["model"], unfrozen["model"]) and table.shape == noise.shape == (10, 8)
    assert table.square().mean() == pytest.approx(1, abs=1e-4) and abs(noise.std() - 1) < 0.3
    assert set(unfrozen["known"]["figures"]) == {"stage1_accuracy", "prototype_norm", "prototype_distance"}
    assert (tmp_path / "frozen/prototypes.png").exists() and not (tmp_path / "random/prototypes.png").exists()

def test_each_image_trains_the_nearest_prototype_of_its_class(pd, tmp_path, monkeypatch):
    learners, learn = [], pd.learn_prototypes
    monkeypatch.setattr(pd, "learn_prototypes", lambda *a: learners.append(learn(*a)) or learners[-1])
    state, data = begun(pd, tmp_path / "run", prototypes_per_class=2), pd.load_dataset("shapes", "train", 16)
    targets, own = state["known"]["targets"], learners[0].prototypes[data.labels]                # [N, K, D]
    z = pd.features_of(learners[0], data.images, CPU)
    nearest = (z[:, None] - own).square().sum(-1).argmin(1)
    assert targets.equal(2 * data.labels + nearest) and 0 < nearest.float().mean() < 1
    assert close(state["model"]["table.weight"], pd.class_table(learners[0].prototypes, "rms"))

def test_a_permuted_table_has_the_same_rows_elsewhere_and_images_keep_theirs(pd, tmp_path):
    plain, permuted = (begun(pd, tmp_path / str(i), permuted=i) for i in (False, True))
    rows, moved = (state["model"]["table.weight"] for state in (plain, permuted))
    assert not rows.equal(moved) and rows.sort(0).values.equal(moved.sort(0).values)
    assert all((rows == row).all(1).any() for row in moved), "rows move as wholes"
    assert plain["known"]["targets"].equal(permuted["known"]["targets"])

def test_samples_show_the_labels_asked_for(pd, done, tmp_path, capsys):
    assert pd.main([*flags(sample=done, num_samples=5, out=tmp_path / "s"), "--labels=star, 3"]) == 0
    labels = samples(tmp_path / "s")[1]
    assert set(labels) == {3, 9} and len(labels) == 5
    for label in ("10", "-1", "hexagon", "1.5"):
        refused(pd, capsys, [*flags(sample=done, out=tmp_path / "t"), f"--labels={label}"], label, "0 to 9", "circle")
    assert not (tmp_path / "t").exists()

def test_without_classes_there_are_no_prototypes_to_learn(pd, tmp_path, capsys):
    for i in range(4):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")
    refused(pd, capsys, args(pd, out=tmp_path / "run", dataset="folder", data_dir=tmp_path), "train/<class>")
    assert not (tmp_path / "run").exists()

def test_conditions_sampled_together_are_guided_and_seeded_by_their_batch(pd, done, monkeypatch):
    run, calls, guided = pd.load_run(done, "cpu"), [], pd.guided_noise

    def note(model, x, t, condition, null, w):
        calls.append((condition.tolist(), null.tolist(), w, x[0, 0, 0, 0].item()))
        return guided(model, x, t, condition, null, w)
    monkeypatch.setattr(pd, "guided_noise", note)
    cfg = dataclasses.replace(run.config, sample_batch=2, sample_steps=1, guidance=0.5)
    trace = []
    images = pd.generate(cfg, run, torch.tensor([3, -1, 5]), trace)
    assert [call[:3] for call in calls] == [([3, -1], [-1, -1], 0.5), ([5], [-1], 0.5)]
    assert calls[0][3] != calls[1][3], "each batch starts from its own noise"
    assert images.shape == (3, 3, 16, 16) and images.dtype == torch.uint8 and [t for t, _ in trace] == [999, 999]
