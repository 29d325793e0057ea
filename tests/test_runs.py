"""Whole runs, tiny ones: what they leave behind, going on after an interruption, and what goes wrong."""
import csv
import functools
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import protodiffusion as pd

ROOT = Path(pd.__file__).resolve().parent
SETTINGS = dict(
    dataset="shapes", image_size=8, channels=8, multipliers="1,2", blocks=1, attention=4, dropout=0.1, timesteps=1000,
    prototypes="unfrozen", prototypes_per_class=1, prototype_dim=8, learner_steps=4, learner_width=4, judge_steps=4,
    judge_width=4, steps=6, batch_size=8, accumulate=1, lr=2e-3, log_every=2, save_every=2, eval_every=3, num_samples=10, sample_steps=2,
    sampler="dpmpp", guidance=0.5, seed=0, amp="off", device="cpu", inception="off")
MADE = ("config.json", "log.csv", "checkpoint.pt", "metrics.json", "samples.png", "samples.npz", "denoising.png",
        "prototypes.png", "curves.png")
posix = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")


def flags(**settings):
    return [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def args(**changes):
    return flags(**{**SETTINGS, **changes})


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """One thread and small sets of shapes: a run takes a second, and a process of its own computes alike."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pd, "SHAPE_SPLITS", {"train": (200, 0), "test": (60, 1), "judge": (200, 2)})
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run, which tests only read."""
    folder = tmp_path_factory.mktemp("done") / "run"
    assert pd.main(args(out=folder)) == 0
    return folder


@pytest.fixture
def training_only(monkeypatch):
    monkeypatch.setattr(pd, "measure", lambda *a: None)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of images in two classes, for processes of their own."""
    root, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for part in ("train", "test"):
        for c, name in enumerate(("dark", "light")):
            (root / part / name).mkdir(parents=True)
            for i in range(20):
                pixels = random.integers(100 * c, 100 + 100 * c, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def log(folder):
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def same(a, b):
    """Nested dicts, lists and tensors are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_training(one, other, losses=True):
    a, b = checkpoint(one), checkpoint(other)
    assert a["step"] == b["step"]
    for part in ("model", "average", "optimizer", "scaler"):
        assert same(a[part], b[part]), part
    keys = ("step", "learning rate", "skipped steps", *["loss"] * losses)
    assert [[r[k] for k in keys] for r in log(one)] == [[r[k] for k in keys] for r in log(other)]


def refused(capsys, arguments, *words):
    """main ends with status 2 and one sentence on stderr that has all the words."""
    capsys.readouterr()
    try:
        status = pd.main([str(a) for a in arguments])
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.strip() and not line.startswith(("usage:", " "))]
    assert status == 2 and len(lines) == 1, captured.err
    assert "Traceback" not in captured.err and lines[0].startswith(("protodiffusion:", "python protodiffusion.py:"))
    for word in words:
        assert str(word) in lines[0], lines[0]
    return lines[0]


# What a run leaves behind

def test_a_run_leaves_every_file_and_nothing_else(done):
    assert sorted(contents(done)) == sorted(MADE)
    for name in MADE:
        if name.endswith(".png"):
            with Image.open(done / name) as image:
                image.load()
                assert min(image.size) > 100


def test_config_json_holds_the_settings_and_can_be_built_again(done):
    saved = json.loads((done / "config.json").read_text(encoding="utf-8"))
    assert {k: saved[k] for k in SETTINGS} == SETTINGS
    cfg = pd.Config(**saved)
    assert (cfg.out, cfg.resume, cfg.sample, cfg.evaluate) == ("", "", "", "")


def test_log_csv_has_its_columns_steps_and_learning_rates(done):
    rows = log(done)
    assert list(rows[0]) == ["step", "loss", "learning rate", "images/s", "seconds", "skipped steps"]
    assert [row["step"] for row in rows] == ["2", "4", "6"] and {row["skipped steps"] for row in rows} == {"0"}
    cfg = pd.Config(**SETTINGS)
    for row in rows:
        assert float(row["learning rate"]) == pytest.approx(pd.learning_rate(int(row["step"]) - 1, cfg))
        assert 0 < float(row["loss"]) < 3 and float(row["images/s"]) > 0
    assert sorted(float(row["seconds"]) for row in rows) == [float(row["seconds"]) for row in rows]


def test_the_checkpoint_loads_without_code_and_holds_everything(done):
    state = checkpoint(done)
    assert {"script", "step", "log", "extra", "model", "average", "optimizer", "scaler"} <= set(state)
    assert state["step"] == 6 and state["script"] == "protodiffusion" and state["extra"]["classes"] == list(pd.SHAPES)
    assert not same(state["model"], state["average"])


def test_the_first_logged_loss_is_that_of_a_network_that_predicts_zero(done):
    assert float(log(done)[0]["loss"]) == pytest.approx(1, abs=0.15)


def test_metrics_json_holds_results_seconds_and_circumstances(done):
    metrics = json.loads((done / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["training_images"] == 200 and metrics["settings"]["steps"] == 6
    assert set(metrics["seconds"]) == {"stage 1", "training", "sampling"} and 0 <= metrics["stage 1"]["accuracy"] <= 1
    judges = {"a classifier trained apart", "the run's own prototype learner"}
    assert set(metrics["results"]) == judges | {"inception"} and metrics["results"]["inception"] == {}
    for name in judges:
        for kind in ("samples", "real held-out images"):
            found = metrics["results"][name][kind]
            assert 0 <= found["accuracy"] <= 1 and found["frechet"] >= -1e-6
    assert metrics["parameters"] == sum(p.numel() for p in pd.load_run(done, "cpu").model.parameters())


def test_samples_npz_is_as_evaluators_read_it(done):
    with np.load(done / "samples.npz") as saved:
        assert saved.files == ["arr_0", "arr_1"]
        images, labels = saved["arr_0"], saved["arr_1"]
    assert images.shape == (10, 8, 8, 3) and images.dtype == np.uint8
    assert labels.shape == (10,) and labels.dtype == np.int64 and 0 <= labels.min() and labels.max() < 10


def test_a_second_run_goes_beside_the_first_and_leaves_it_alone(done, training_only):
    before = contents(done)
    assert pd.main(args(out=done, prototypes="random", steps=2)) == 0
    second = Path(f"{done}-2")
    assert contents(done) == before and checkpoint(second)["step"] == 2
    assert not (second / "prototypes.png").exists()


def test_new_folder_takes_the_first_that_is_empty(tmp_path):
    assert pd.new_folder(tmp_path / "a") == pd.new_folder(tmp_path / "a") == tmp_path / "a"
    for name in ("a", "a-2"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "notes.txt").write_text("mine")
    assert pd.new_folder(tmp_path / "a") == tmp_path / "a-3" and (tmp_path / "a" / "notes.txt").read_text() == "mine"


# Sampling and measuring

def samples(folder):
    with np.load(folder / "samples.npz") as saved:
        return saved["arr_0"], saved["arr_1"]


def test_sampling_takes_labels_by_number_and_name_into_a_new_folder_each(done, tmp_path):
    before = contents(done)
    arguments = flags(sample=done, device="cpu", num_samples=5)
    out = tmp_path / "s"
    assert pd.main([*arguments, *flags(labels="star,3", out=out)]) == 0
    assert pd.main([*arguments, *flags(labels="star, 3", out=out)]) == 0
    images, labels = samples(out)
    assert labels.tolist() == [9, 3, 9, 3, 9] and images.shape == (5, 8, 8, 3)
    again, _ = samples(tmp_path / "s-2")
    assert (images == again).all() and (out / "samples.png").exists()
    assert contents(done) == before


def test_sampling_without_a_place_goes_below_the_run(tmp_path, training_only):
    run = tmp_path / "run"
    assert pd.main(args(out=run, prototypes="random", steps=2)) == 0
    before = contents(run)
    for _ in range(2):
        assert pd.main(flags(sample=run, num_samples=12)) == 0
    assert samples(run / "samples")[1].tolist() == [*range(10), 0, 1]
    assert (run / "samples-2" / "samples.npz").exists()
    assert {k: v for k, v in contents(run).items() if not k.startswith("samples")} == before


def test_the_seed_decides_the_samples(done, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert pd.main(flags(sample=done, num_samples=4, seed=seed, out=tmp_path / name)) == 0
    a, b, c = (samples(tmp_path / name)[0] for name in "abc")
    assert (a == b).all() and (a != c).any()


def test_evaluating_again_gives_the_same_numbers_in_a_new_folder(done, tmp_path):
    before, out = contents(done), tmp_path / "again"
    assert pd.main(flags(evaluate=done, out=out)) == 0
    first, second = (json.loads((folder / "metrics.json").read_text()) for folder in (done, out))
    for name in first["results"]:
        for kind, found in first["results"][name].items():
            assert found == pytest.approx(second["results"][name][kind], rel=1e-5, abs=1e-9)
    assert first["seconds"]["training"] == second["seconds"]["training"]
    assert contents(done) == before and (samples(done)[0] == samples(out)[0]).all()


# Prototypes and the comparison

def test_frozen_prototypes_stay_and_unfrozen_ones_move(done, tmp_path, training_only):
    out = tmp_path / "frozen"
    assert pd.main(args(out=out, prototypes="frozen")) == 0
    frozen, unfrozen = checkpoint(out), checkpoint(done)
    assert same(frozen["extra"]["table"], unfrozen["extra"]["table"])           # one stage 1, same seed
    for part in ("model", "average"):
        assert same(frozen[part]["table.weight"], frozen["extra"]["table"])
        assert not same(unfrozen[part]["table.weight"], unfrozen["extra"]["table"])
    assert frozen["extra"]["table"].square().mean() == pytest.approx(1, abs=1e-4)
    assert (out / "prototypes.png").exists()


def test_random_prototypes_need_no_first_stage(tmp_path, monkeypatch, training_only):
    monkeypatch.setattr(pd, "learn_prototypes", lambda *a: pytest.fail("stage 1 ran"))
    out = tmp_path / "random"
    assert pd.main(args(out=out, prototypes="random", steps=2)) == 0
    state = checkpoint(out)
    assert "learner" not in state["extra"] and state["extra"]["seconds"] == 0
    assert state["model"]["table.weight"].shape == (10, 8)


def test_two_prototypes_a_class_make_two_rows_a_class(tmp_path):
    out = tmp_path / "two"
    assert pd.main(args(out=out, prototypes_per_class=2)) == 0
    extra = checkpoint(out)["extra"]
    assert extra["table"].shape == (20, 8) and extra["frequency"].shape == (10, 2)
    assert torch.allclose(extra["frequency"].sum(1), torch.ones(10))
    labels = pd.load_dataset("shapes", "train", 8).labels
    assert (extra["rows"] // 2).equal(labels) and sorted(contents(out)) == sorted(MADE)
    share = torch.bincount(extra["rows"], minlength=20).view(10, 2) / torch.bincount(labels, minlength=10)[:, None]
    assert torch.allclose(share, extra["frequency"])


def test_a_comparison_trains_three_variants_alike_and_can_go_on(tmp_path, capsys):
    out = tmp_path / "compare"
    assert pd.main([*args(out=out), "--compare"]) == 0
    table = capsys.readouterr().out
    result = json.loads((out / "comparison.json").read_text())
    assert set(result["variants"]) == {"random", "frozen", "unfrozen"}
    for name, variant in result["variants"].items():
        assert [h["step"] for h in variant["history"]] == [3, 6] and len(variant["guidance"]) == len(pd.SWEEP)
        assert {"config.json", "checkpoint.pt", "log.csv"} <= set(contents(out / name))
        assert name in table
        assert json.loads((out / name / "config.json").read_text())["prototypes"] == name
    seconds = {name: v["stage 1 seconds"] for name, v in result["variants"].items()}
    assert seconds["random"] == 0 < seconds["frozen"] == seconds["unfrozen"]
    first = {name: checkpoint(out / name) for name in result["variants"]}
    assert same(first["frozen"]["extra"]["table"], first["unfrozen"]["extra"]["table"])
    Image.open(out / "comparison.png").load()
    (out / "unfrozen" / "checkpoint.pt").unlink()                   # as if stopped before the third variant
    (out / "comparison.json").unlink()
    assert pd.main(flags(resume=out)) == 0
    again = json.loads((out / "comparison.json").read_text())["variants"]
    assert {n: v["history"][-1]["accuracy"] for n, v in again.items()} == \
        {n: v["history"][-1]["accuracy"] for n, v in result["variants"].items()}
    for name, state in first.items():
        assert same(checkpoint(out / name)["model"], state["model"]) and len(again[name]["history"]) == 2
    assert pd.main(flags(sample=out / "frozen", num_samples=2)) == 0


# Going on after an interruption

def interrupt_at(monkeypatch, step):
    """The run stops dead in this step, after the weights have moved; nothing is saved on the way out."""
    whole = pd.update_average

    def update(average, model, n):
        if n == step:
            raise KeyboardInterrupt
        whole(average, model, n)
    monkeypatch.setattr(pd, "update_average", update)


def test_a_run_that_goes_on_is_bit_for_bit_the_one_that_never_stopped(tmp_path, capsys, training_only):
    settings = dict(dropout=0.3, accumulate=2, steps=7, log_every=1, unfreeze_at=0.3, warmup=0.3)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert pd.main(args(out=whole, **settings)) == 0
    for step in (1, 3, 6):                                          # before the first save, between saves, at the end
        with pytest.MonkeyPatch.context() as patch:
            interrupt_at(patch, step)
            assert pd.main(args(out=broken, **settings) if step == 1 else flags(resume=broken)) == 130
        assert f'--resume "{broken}"' in capsys.readouterr().err
        assert checkpoint(broken)["step"] == step // 2 * 2
    assert pd.main(flags(resume=broken)) == 0
    assert_same_training(whole, broken)
    assert not list(tmp_path.rglob("*.tmp"))


def test_mirroring_and_several_epochs_go_on_alike(tmp_path, pictures, training_only):
    settings = dict(dataset="folder", data_dir=pictures, steps=12, batch_size=16, prototypes="random")  # 40 images
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert pd.main([*args(out=whole, **settings), "--mirror"]) == 0
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 7)
        assert pd.main([*args(out=broken, **settings), "--mirror"]) == 130
    assert pd.main(flags(resume=broken)) == 0
    assert_same_training(whole, broken)


def test_a_run_stopped_in_its_first_stage_goes_on(tmp_path, capsys, training_only, done):
    out = tmp_path / "early"
    with pytest.MonkeyPatch.context() as patch:
        def stop(*a):
            raise KeyboardInterrupt
        patch.setattr(pd, "learn_prototypes", stop)
        assert pd.main(args(out=out)) == 130
    assert f'--resume "{out}"' in capsys.readouterr().err and not (out / "checkpoint.pt").exists()
    assert pd.main(flags(resume=out)) == 0
    assert_same_training(out, done)


def test_a_finished_run_can_be_resumed_without_a_step(tmp_path, training_only):
    out = tmp_path / "run"
    assert pd.main(args(out=out, prototypes="random", steps=2)) == 0
    state, rows = checkpoint(out), log(out)
    assert pd.main(flags(resume=out)) == 0
    assert same(checkpoint(out)["model"], state["model"]) and log(out) == rows


def test_settings_given_with_resume_reach_the_optimiser(tmp_path, training_only, monkeypatch):
    out, seen = tmp_path / "run", []
    assert pd.main(args(out=out, steps=4, unfreeze_at=0.5)) == 0
    monkeypatch.setattr(pd, "safe_step", lambda optimizer, scaler: seen.append(optimizer.param_groups) or torch.zeros(()))
    assert pd.main(flags(resume=out, steps=8, weight_decay=0.25)) == 0
    assert [group["weight_decay"] for group in seen[-1]] == [0.25, 0.25]
    assert [group["start"] for group in seen[-1]] == [0, 4], "half of the new number of steps"


def test_images_that_changed_since_are_not_trained_on(tmp_path, pictures, capsys, training_only):
    copy, out = tmp_path / "pictures", tmp_path / "run"
    shutil.copytree(pictures, copy)
    settings = dict(dataset="folder", data_dir=copy, prototypes="random", steps=2)
    assert pd.main(args(out=out, **settings)) == 0
    next((copy / "train").glob("*/*")).unlink()
    refused(capsys, flags(resume=out, steps=4), "have changed")


def test_evaluating_saving_and_compiling_are_not_training_time(tmp_path, monkeypatch):
    cfg = pd.Config(**{**SETTINGS, "steps": 6, "log_every": 4, "eval_every": 3, "save_every": 2, "compile": True,
                       "prototypes": "random"})
    data, device, compiled = pd.load_dataset("shapes", "train", 8), torch.device("cpu"), []
    extra = pd.stage_one(cfg, [data] * 2, device, tmp_path)

    def slow(result=None):
        time.sleep(0.4)
        return result

    def compile(net, **options):                              # as torch's does, it takes its time at the first call
        def forward(*given):
            if not compiled:
                compiled.append(slow(True))
            return net(*given)
        return forward
    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(pd, "save_safely", lambda *given, save=pd.save_safely: slow(save(*given)))
    loss_fn = functools.partial(pd.protodiffusion_loss, cfg)
    _, kept = pd.train(cfg, cfg.build(extra), data.images, extra["rows"], loss_fn, tmp_path, extra, device,
                       lambda average: slow({}))
    assert [e["step"] for e in kept["evals"]] == [3, 6] and compiled and kept["seconds"] < 0.4
    first, last = kept["rows"]
    assert first["seconds"] == pytest.approx(4 * 8 / first["images/s"])
    assert last["seconds"] - first["seconds"] == pytest.approx(2 * 8 / last["images/s"])


def test_one_and_two_passes_train_alike(tmp_path, training_only):
    for passes in (1, 2):
        assert pd.main(args(out=tmp_path / str(passes), accumulate=passes, dropout=0)) == 0
    one, two = (checkpoint(tmp_path / p) for p in "12")
    for name, value in one["model"].items():
        assert torch.allclose(value, two["model"][name], atol=2e-4), name
    for a, b in zip(log(tmp_path / "1"), log(tmp_path / "2")):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-4)


def start(arguments, cwd, *before):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, *before, str(ROOT / "protodiffusion.py"), *arguments], cwd=cwd,
                            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(process, condition, seconds=120):
    end = time.monotonic() + seconds
    while process.poll() is None and not condition():
        assert time.monotonic() < end, "too slow"
        time.sleep(0.01)
    return process.poll() is None


LONG = dict(dataset="folder", steps=150, prototypes="random", multipliers="1", blocks=1, attention=0, log_every=10,
            save_every=10)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, pictures):
    out = tmp_path_factory.mktemp("long") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pd, "measure", lambda *a: None)
        assert pd.main(args(out=out, data_dir=pictures, **LONG)) == 0
    return out


@posix
@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_a_process_that_is_killed_or_interrupted_goes_on_bit_for_bit(
        tmp_path, pictures, uninterrupted, training_only, name):
    out = tmp_path / "run"
    process = start(args(out=out, data_dir=pictures, **LONG), tmp_path)
    rows = out / "log.csv"
    running = wait_for(process, lambda: rows.exists() and len(rows.read_text().splitlines()) > 2)
    process.send_signal(getattr(signal, name))
    output, errors = process.communicate(timeout=120)
    assert running, output + errors
    stopped = checkpoint(out)["step"]
    assert 0 < stopped < 150
    if name == "SIGKILL":
        assert process.returncode == -signal.SIGKILL and stopped % 10 == 0
    else:
        assert process.returncode == 130 and "Traceback" not in errors
        assert f'--resume "{out}"' in errors and not list(out.glob("*.tmp"))
    assert pd.main(flags(resume=out)) == 0
    assert_same_training(out, uninterrupted, losses=stopped % 10 == 0)          # else a row averages fewer steps


def test_two_processes_log_the_losses_of_one(tmp_path, pictures, training_only):
    settings = dict(dataset="folder", data_dir=pictures, dropout=0, steps=6)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    two, one = tmp_path / "two", tmp_path / "one"
    process = start(args(out=two, **settings), tmp_path, "-m", "torch.distributed.run", "--nproc_per_node=2",
                    "--master_addr=127.0.0.1", f"--master_port={port}")
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert pd.main(args(out=one, **settings)) == 0
    for a, b in zip(log(one), log(two), strict=True):
        assert a["step"] == b["step"] and float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-4)
    a, b = checkpoint(one)["average"], checkpoint(two)["average"]
    assert all(torch.allclose(a[k], b[k], atol=1e-3) for k in a)
    assert sorted(contents(two)) == sorted(MADE) and output.count("classifier: step 4/4") == 2      # learner and judge


# What goes wrong: exit status 2, one sentence, and nothing changes

@pytest.mark.parametrize("changes, words", [
    (dict(dataset="cifar11"), ["cifar11", "shapes"]),
    (dict(image_size=10, multipliers="1,2,2"), ["--image-size"]),
    (dict(multipliers="1,x"), ["--multipliers"]),
    (dict(multipliers="1,0"), ["--multipliers"]),
    (dict(channels=6), ["--channels"]),
    (dict(steps=0), ["--steps", "0"]),
    (dict(dropout=1.5), ["--dropout", "1.5"]),
    (dict(lr="nan"), ["--lr"]),
    (dict(steps="many"), ["--steps"]),
    (dict(sampler="euler"), ["--sampler", "ddim"]),
    (dict(device="cuda:7"), ["cuda:7", "cpu"]),
    (dict(device="toaster"), ["toaster", "cpu"]),
    (dict(learning_speed=3), ["--learning-speed"])])
def test_a_setting_that_cannot_be_is_named_and_makes_no_folder(tmp_path, capsys, changes, words):
    refused(capsys, args(out=tmp_path / "run", **changes), *words)
    assert not list(tmp_path.iterdir())


def test_a_batch_that_does_not_split_is_named(tmp_path, capsys):
    refused(capsys, args(out=tmp_path / "run", accumulate=3, prototypes="random"), "--batch-size 8", "3")
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_a_folder_without_classes_is_refused_with_advice(tmp_path, capsys):
    for i in range(4):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")
    refused(capsys, args(out=tmp_path / "run", dataset="folder", data_dir=tmp_path), tmp_path, "train/<class>")


def test_a_folder_of_images_that_is_not_there_is_named(tmp_path, capsys):
    arguments = args(out=tmp_path / "run", dataset="folder", data_dir=tmp_path / "nowhere")
    refused(capsys, arguments, "nowhere", "--data-dir")


@pytest.mark.parametrize("label", ["10", "-1", "hexagon", "1.5"])
def test_a_label_that_is_no_class_is_named_with_the_classes(done, tmp_path, capsys, label):
    refused(capsys, [*flags(sample=done, out=tmp_path / "s"), f"--labels={label}"], label, "0 to 9", "circle")
    assert not list(tmp_path.iterdir())


def copied(done, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.json", "checkpoint.pt", "log.csv"):
        (folder / name).write_bytes((done / name).read_bytes())
    return folder


def damage_truncate(folder):
    path = folder / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:2000])


def damage_noise(folder):
    (folder / "checkpoint.pt").write_bytes(b"\x80\x02 this is no checkpoint")


def damage_foreign(folder):
    torch.save({"weights": torch.zeros(3)}, folder / "checkpoint.pt")


def damage_tensor(folder):
    torch.save(torch.zeros(3), folder / "checkpoint.pt")


def damage_script(folder):
    torch.save({**checkpoint(folder), "script": "otherdiffusion"}, folder / "checkpoint.pt")


def damage_old(folder):
    saved = checkpoint(folder)
    del saved["log"]                                          # a format of earlier days
    torch.save(saved, folder / "checkpoint.pt")


def damage_network(folder):
    saved = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**saved, "channels": 16}))


def damage_config(folder):
    (folder / "config.json").write_text('{"steps": ')


def damage_config_list(folder):
    (folder / "config.json").write_text("[1, 2]")


def damage_no_config(folder):
    (folder / "config.json").unlink()


@pytest.mark.parametrize("action", ["resume", "sample", "evaluate"])
@pytest.mark.parametrize("damage, word", [
    (damage_truncate, "checkpoint.pt"), (damage_noise, "checkpoint.pt"), (damage_foreign, "checkpoint.pt"),
    (damage_tensor, "checkpoint.pt"), (damage_script, "checkpoint.pt"), (damage_old, "checkpoint.pt"),
    (damage_network, "config.json"), (damage_config, "config.json"), (damage_config_list, "config.json"),
    (damage_no_config, "config.json")])
def test_a_damaged_or_foreign_run_is_refused_and_left_as_it_is(done, tmp_path, capsys, action, damage, word):
    folder = copied(done, tmp_path)
    damage(folder)
    before = {k: v for k, v in contents(folder).items()}
    refused(capsys, flags(**{action: folder}, device="cpu"), word, folder)
    after = contents(folder)
    if "config.json" in after and damage is not damage_config:      # the same settings, whatever their layout
        assert json.loads(after["config.json"]).items() >= json.loads(before["config.json"]).items() \
            if damage is not damage_config_list else after["config.json"] == before["config.json"]
    for name in ("checkpoint.pt", "log.csv"):
        assert after[name] == before[name]
    assert set(after) == set(before)


@pytest.mark.parametrize("action", ["resume", "sample", "evaluate"])
def test_a_run_that_is_not_there_is_named_and_not_made(tmp_path, capsys, action):
    refused(capsys, flags(**{action: tmp_path / "nothing"}), "nothing")
    assert not list(tmp_path.iterdir())


def test_sampling_before_the_first_checkpoint_says_so(done, tmp_path, capsys):
    folder = copied(done, tmp_path)
    (folder / "checkpoint.pt").unlink()
    refused(capsys, flags(sample=folder), "checkpoint.pt", "--resume")


@pytest.mark.parametrize("name, value", [
    ("channels", 16), ("dataset", "cifar10"), ("image_size", 16), ("prototypes", "frozen"), ("prototype_dim", 4),
    ("blocks", 2), ("timesteps", 500)])
def test_a_setting_that_belongs_to_the_run_cannot_change_on_resuming(done, capsys, name, value):
    before = contents(done)
    refused(capsys, flags(resume=done, **{name: value}), f"--{name.replace('_', '-')}", value, SETTINGS[name])
    assert contents(done) == before


def test_a_setting_that_does_not_belong_to_the_run_can_change(done, tmp_path, training_only):
    folder = copied(done, tmp_path)
    assert pd.main(flags(resume=folder, steps=8, lr=1e-3, channels=8)) == 0
    assert checkpoint(folder)["step"] == 8
    saved = json.loads((folder / "config.json").read_text())
    assert saved["steps"] == 8 and saved["lr"] == 1e-3


@pytest.mark.parametrize("changes", [
    dict(accumulate=3),
    dict(dataset="folder", data_dir="nowhere")])
def test_a_resume_that_is_refused_leaves_config_json_as_it_was(
        done, tmp_path, capsys, pictures, training_only, changes):
    folder = copied(done, tmp_path)
    if "dataset" in changes:
        folder = tmp_path / "pictures"
        assert pd.main(args(out=folder, dataset="folder", data_dir=pictures, prototypes="random", steps=2)) == 0
    before = contents(folder)
    refused(capsys, flags(resume=folder, **changes))
    assert contents(folder) == before


def test_a_run_in_full_precision_goes_on_in_half(done, tmp_path, training_only):
    assert pd.main(flags(resume=copied(done, tmp_path), amp="fp16", steps=7)) == 0


def test_a_config_with_a_word_for_a_number_is_refused(done, tmp_path, capsys):
    folder = copied(done, tmp_path)
    saved = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**saved, "steps": "many"}))
    refused(capsys, flags(sample=folder), "config.json")


def test_more_sampling_steps_than_noise_levels_are_refused_by_name(done, tmp_path, capsys):
    refused(capsys, flags(sample=done, out=tmp_path / "s", sample_steps=1500, num_samples=1), "--sample-steps")


def test_interrupted_sampling_gives_no_command_that_cannot_work(done, tmp_path, capsys, monkeypatch):
    def stop(*a):
        raise KeyboardInterrupt
    monkeypatch.setattr(pd, "generate", stop)
    assert pd.main(flags(sample=done, out=tmp_path / "s")) == 130
    assert "--resume" not in capsys.readouterr().err


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                                   RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")])
def test_memory_that_runs_out_is_one_sentence_with_what_to_lower(done, tmp_path, capsys, monkeypatch, error):
    def fail(*a):
        raise error
    monkeypatch.setattr(pd, "generate", fail)
    refused(capsys, flags(sample=done, out=tmp_path / "s"), "memory", "--batch-size", "--sample-batch")


def test_another_error_of_the_program_is_not_hidden(done, tmp_path, monkeypatch):
    def fail(*a):
        raise RuntimeError("shape mismatch")
    monkeypatch.setattr(pd, "generate", fail)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        pd.main(flags(sample=done, out=tmp_path / "s"))


def test_a_folder_that_may_not_be_made_is_named(tmp_path, capsys, monkeypatch):
    def refuse(self, *a, **k):
        raise PermissionError(13, "Permission denied", str(self))
    monkeypatch.setattr(pd.Path, "mkdir", refuse)
    refused(capsys, args(out=tmp_path / "run"), tmp_path / "run", "Permission denied")


def test_a_disk_that_is_full_is_named(tmp_path, capsys, monkeypatch):
    def full(content, path, **k):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    refused(capsys, args(out=tmp_path / "run", prototypes="random"), "checkpoint.pt", "No space left")


# Gradients that are no numbers

class Planted:
    """The method's loss, but NaN in the given steps; every state that is saved is kept."""

    def __init__(self, monkeypatch, folder, bad, **changes):
        folder.mkdir()
        settings = {**SETTINGS, "save_every": 1, "log_every": 1, "prototypes": "random", **changes}
        self.folder, self.cfg, self.states, self.step = folder, pd.Config(**settings), [], -1
        whole = pd.random_batches

        def batches(cfg, images, targets, step, device):
            self.step = step
            return whole(cfg, images, targets, step, device)

        def loss(net, batch, abar):
            losses = pd.protodiffusion_loss(self.cfg, net, batch, abar)
            return {"loss": losses["loss"] * (float("nan") if self.step in bad else 1)}

        def keep(content, path):
            memory = io.BytesIO()
            torch.save(content, memory)
            memory.seek(0)
            self.states.append(torch.load(memory, weights_only=True))
            path.write_bytes(memory.getvalue())
        monkeypatch.setattr(pd, "random_batches", batches)
        monkeypatch.setattr(pd, "save_safely", keep)
        data = pd.load_dataset("shapes", "train", 8)
        device = torch.device("cpu")
        extra = pd.stage_one(self.cfg, [data] * 2, device, folder)
        torch.manual_seed(0)
        self.run = lambda: pd.train(self.cfg, self.cfg.build(extra), data.images, extra["rows"], loss, folder,
                                    extra, device)


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_a_gradient_that_is_no_number_changes_no_weight_and_no_moment(tmp_path, monkeypatch, amp):
    planted = Planted(monkeypatch, tmp_path / "run", {3}, amp=amp)
    planted.run()
    states = planted.states                                         # after 0, 1, 2, ... steps
    assert [s["step"] for s in states] == list(range(7))
    assert same(states[3]["model"], states[4]["model"])
    assert same(states[3]["optimizer"]["state"], states[4]["optimizer"]["state"])
    assert all(v.isfinite().all() for v in states[-1]["model"].values())
    if amp == "off":
        assert [row["skipped steps"] for row in log(planted.folder)] == ["0", "0", "0", "1", "1", "1"]
        assert not any(same(states[i]["model"], states[i + 1]["model"]) for i in (0, 1, 2, 4))
    else:
        assert int(log(planted.folder)[-1]["skipped steps"]) >= 1
        assert states[4]["scaler"]["scale"] < states[3]["scaler"]["scale"]


def test_gradients_that_are_never_numbers_end_the_run_with_sound_weights(tmp_path, monkeypatch):
    planted = Planted(monkeypatch, tmp_path / "run", set(range(100)), steps=60)
    with pytest.raises(pd.Stop, match=r"31 gradients.*checkpoint\.pt.*--lr"):
        planted.run()
    assert same(planted.states[0]["model"], planted.states[-1]["model"])
    assert all(v.isfinite().all() for v in checkpoint(planted.folder)["average"].values())
    assert len(log(planted.folder)) == 31


def test_thirty_bad_gradients_in_all_but_not_in_a_row_are_survived(tmp_path, monkeypatch):
    planted = Planted(monkeypatch, tmp_path / "run", set(range(0, 40)) - {20}, steps=42, save_every=50)
    planted.run()
    assert log(planted.folder)[-1]["skipped steps"] == "39"
    planted.cfg.steps = 44                                          # goes on, and does not forget them
    planted.run()
    assert log(planted.folder)[-1]["skipped steps"] == "39"


# The script itself

def test_importing_changes_nothing_for_the_importer(tmp_path):
    code = ("import os, random, signal, torch, numpy, matplotlib\n"
            "random.seed(1); numpy.random.seed(1); torch.manual_seed(1)\n"
            "def state():\n"
            "    return (random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist(),\n"
            "            torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_float32_matmul_precision(),\n"
            "            torch.backends.cudnn.benchmark, torch.backends.cuda.flash_sdp_enabled(),\n"
            "            torch.get_num_threads(),\n"
            "            signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), sorted(os.environ),\n"
            "            dict.__getitem__(matplotlib.rcParams, 'backend'))\n"
            "before = state()\n"
            "import protodiffusion, sys\n"
            "assert state() == before\n"
            "assert 'matplotlib.pyplot' not in sys.modules and not os.listdir()\n")
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
                           capture_output=True, text=True)
    assert found.returncode == 0 and not found.stdout, found.stdout + found.stderr


def test_help_lists_every_setting_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        pd.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    words = re.sub(r"\s+", " ", text)
    for name, field in pd.Config.__dataclass_fields__.items():
        if name in SETTINGS or field.metadata:
            assert f"--{name.replace('_', '-')}" in text, name
            assert f"[{field.default}]" in words, name
