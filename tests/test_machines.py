"""What machines do to a run: few samples, caches, environments, signals, divergence, full disks."""
import importlib.util
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import protodiffusion as pd
from conftest import CPU, ROOT, args, checkpoint, config, contents, flags, metrics, normal, only_train, refused, seeded
from test_runs import PROCESSES, finished, stop_at

class Scaled(torch.nn.Module):
    """A stand-in for the Inception network: its features are the means of the channels, times a factor."""
    def __init__(self, factor=1.0):
        super().__init__()
        self.fc, self.factor = torch.nn.Linear(3, 4), torch.nn.Parameter(torch.tensor(factor))

    def forward(self, x):
        return self.fc(self.factor * x.mean((2, 3)))

@pytest.fixture
def weights(script, tmp_path, monkeypatch):
    torch.save(Scaled().state_dict(), tmp_path / "weights.pth")
    monkeypatch.setattr(script, "fid_inception", Scaled)
    return tmp_path / "weights.pth"

def raising(error):
    """A function that fails."""
    def fail(*given, **options):
        raise error
    return fail

def protodiffusion(*words, stdout, cwd=None, **environment):
    """The script in a process of its own, with the text of its stderr."""
    return subprocess.run([sys.executable, ROOT / "protodiffusion.py", *words], cwd=cwd, stdout=stdout, text=True,
                          stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1", **environment})

# ---- Metrics ----------------------------------------------------------------------------------------------------

def test_the_cache_of_reference_statistics_knows_the_weights_and_one_sample_has_no_kid(tmp_path, monkeypatch):
    real = torch.randint(256, (30, 3, 4, 4), generator=seeded()).to(torch.uint8)
    cfg = config(pd, data_dir=tmp_path, inception=str(tmp_path / "weights.pth"))
    monkeypatch.setattr(pd, "fid_inception", Scaled)
    torch.save(Scaled().state_dict(), tmp_path / "weights.pth")
    found = pd.inception_metrics(cfg, real // 2, real, CPU)
    assert set(pd.inception_metrics(cfg, real[:1], real, CPU)) == {"fid_0.001k", "is_0.001k", "is_0.001k_std"}
    torch.save(Scaled(3.0).state_dict(), tmp_path / "weights.pth")
    assert pd.inception_metrics(cfg, real // 2, real, CPU)["fid_0.03k"] == pytest.approx(9 * found["fid_0.03k"], 1e-4)

def test_a_frechet_distance_is_never_below_zero():
    for seed in range(20):
        root = normal(6, 2, seed=seed, dtype=torch.float64)
        assert 0 <= pd.frechet_distance(root[:, 0], root @ root.T, root[:, 0], root @ root.T) < 1e-5

@pytest.mark.parametrize("fails", ["inception_metrics", "sample"])
def test_a_failure_while_measuring_keeps_what_was_measured(script, done, tmp_path, monkeypatch, capsys, fails):
    kept = contents(done)
    monkeypatch.setattr(script, fails, raising(OSError(28, "No space left on device")))
    refused(script, capsys, flags(evaluate=done, out=tmp_path / "measured"), "the disk is full")
    found = metrics(tmp_path / "measured")
    assert {"settings", "log", "seconds_training"} <= set(found) and contents(done) == kept
    assert ({"seconds_sampling", "frechet"} <= set(found)) == (fails == "inception_metrics")

# ---- Machines ---------------------------------------------------------------------------------------------------

def test_two_samples_are_enough_and_a_data_folder_that_cannot_be_written_goes_without_caches(
        script, pictures, weights, tmp_path, monkeypatch, capsys):
    data = shutil.copytree(pictures, tmp_path / "data", ignore=shutil.ignore_patterns("prototype-*"))
    before = contents(data)

    def read_only(path, mode="r", **options):
        if mode != "r" and Path(path).is_relative_to(data):
            raise OSError(30, "Read-only file system", str(path))
        return open(path, mode, **options)
    monkeypatch.setattr(script, "open", read_only, raising=False)
    given = args(script, dataset="folder", data_dir=data, inception=weights, out=tmp_path / "run", num_samples=2)
    assert script.main(given) == 0 and contents(data) == before
    found = metrics(tmp_path / "run")
    assert found["is_0.002k"] == pytest.approx(1), "a split for each image"
    assert found["frechet"] >= 0 and found["fid_0.002k"] >= 0 and "kid_0.002k" in found
    notes = re.findall(r"note: \S+/prototype-(\S+)\.pt cannot be written.*Read-only", capsys.readouterr().out)
    assert set(notes) == {"folder-range", "folder-train-16", "folder-test-16", "inception-folder-16",
                          f"{'traits' if script.SCRIPT == 'patronus' else 'judge'}-folder-16-4-3"}

def test_a_notebooks_backend_and_a_terminal_that_cannot_print_a_name(tmp_path):
    for c, name in enumerate(("見", "Ω")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (16, 16), (99 * c, 9 * i, 0)).save(tmp_path / "data" / name / f"{i}.png")
    given = args(pd, dataset="folder", data_dir="data", num_samples=2, out="run")
    found = protodiffusion(*given, cwd=tmp_path, stdout=subprocess.PIPE, MPLBACKEND="module://not.installed",
                           PYTHONIOENCODING="ascii")
    assert found.returncode == 0 and "Traceback" not in found.stderr and r"(\u03a9, \u898b)" in found.stdout
    assert metrics(tmp_path / "run")["classes"] == ["Ω", "見"] and (tmp_path / "run/samples.png").exists()

@pytest.mark.parametrize("rank, world", [("0", None), (None, "2"), ("x", "2"), ("", ""), ("2", "2"), ("0", "0")])
def test_an_environment_that_torchrun_did_not_make_is_refused(script, tmp_path, monkeypatch, capsys, rank, world):
    for name, value in (("RANK", rank), ("WORLD_SIZE", world)):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    spec = importlib.util.spec_from_file_location(script.SCRIPT, script.__file__)
    started = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(started)                                # importing it must work
    refused(started, capsys, args(script, out=tmp_path / "run"), "RANK", "WORLD_SIZE", "torchrun")
    assert not list(tmp_path.iterdir())

def test_compiling_without_a_compiler_is_one_sentence(script, done, tmp_path, monkeypatch, capsys):
    from torch._inductor.exc import InvalidCxxCompiler
    monkeypatch.setattr(torch, "compile", lambda net, **options: raising(InvalidCxxCompiler()))
    out = shutil.copytree(done, tmp_path / "run")
    refused(script, capsys, flags(resume=out, steps=8, compile=True), "leave out --compile", "C++ compiler")

def test_main_works_in_a_thread_and_reads_only_what_it_is_given(script, done, tmp_path, monkeypatch, training_only):
    monkeypatch.setattr(sys, "argv", ["kernel", "-f", "connection.json"])
    status, given = [], flags(resume=shutil.copytree(done, tmp_path / "run"), steps=8)
    thread = threading.Thread(target=lambda: status.append(script.main(given)))
    thread.start()
    thread.join()
    assert status == [0] and checkpoint(tmp_path / "run")["step"] == 8
    monkeypatch.setattr(script, "exit_status", lambda task, given: given.task)
    assert script.main([]) == ("train", None)

def test_runs_that_start_together_never_share_a_folder(tmp_path, monkeypatch):
    with ThreadPoolExecutor(16) as pool:
        assert len(set(pool.map(lambda i: pd.new_folder(tmp_path / "runs/a"), range(100)))) == 100
    mkdir = Path.mkdir

    def late(self, **options):
        if self.name == "b":
            mkdir(self)                                             # another run makes it in this moment
        mkdir(self, **options)
    monkeypatch.setattr(Path, "mkdir", late)
    assert pd.new_folder(tmp_path / "b") == tmp_path / "b-2"

# ---- Signals, and what is left behind ---------------------------------------------------------------------------

SIGNALS = pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])

@SIGNALS
@pytest.mark.parametrize("times, saved", [(1, 3), (2, 2)])
def test_a_signal_saves_at_the_end_of_the_step_and_a_second_stops_at_once(
        script, tmp_path, capsys, training_only, number, status, times, saved):
    out = tmp_path / "it's a run"
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, script, 2, lambda: [signal.raise_signal(number) for _ in range(times)])
        assert script.main(args(script, out=out)) == status
    assert checkpoint(out)["step"] == saved
    words = shlex.split(capsys.readouterr().err.split("go on with: ")[1])[2:]       # as if it were pasted
    assert words == ["--resume", str(out)] and script.main(words) == 0 and checkpoint(out)["step"] == 6

def process(name, arguments, number, **environment):
    """For one of two processes, the second of which gets a signal in its third step."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    script = importlib.reload(importlib.import_module(name))
    only_train(script)
    if script.RANK == 1:
        stop_at(pytest.MonkeyPatch(), script, 2, lambda: signal.raise_signal(number))
    sys.exit(script.main(arguments))

@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@SIGNALS
def test_a_signal_in_one_of_two_processes_saves_in_the_same_step(script, pictures, tmp_path, number, status):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
    given = args(script, out=tmp_path / "run", dataset="folder", data_dir=pictures, save_every=100)
    both = [PROCESSES.Process(target=process, args=(script.SCRIPT, given, number), kwargs=dict(where, RANK=rank))
            for rank in "01"]
    for method in ("start", "join"):
        for each in both:
            getattr(each, method)()
    assert both[0].exitcode in (130, status) and both[1].exitcode == status
    assert checkpoint(tmp_path / "run")["step"] == 3

def test_an_interrupted_save_leaves_the_old_file_and_no_other(tmp_path):
    (tmp_path / "a.json").write_text("old")
    before = contents(tmp_path)
    with pytest.raises(KeyboardInterrupt), pd.replacing(tmp_path / "a.json") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert contents(tmp_path) == before

def test_an_output_that_nobody_reads_is_not_called_permissions(tmp_path):
    run = finished(pd, tmp_path / "a", {}, [dict(step=6, loss=0.5, seconds=2)])
    read, write = os.pipe()
    os.close(read)
    found = protodiffusion("--compare", run, "--out", tmp_path / "c", stdout=write, PYTHONUNBUFFERED="")
    os.close(write)
    assert found.returncode == 2 and len(found.stderr.splitlines()) == 2 and "| head" in found.stderr, found.stderr

# ---- Trainings that go wrong, or on -----------------------------------------------------------------------------

@pytest.mark.parametrize("lr, since, save_every", [(1e4, 0, 10), (30, 15, 10), (1e4, 0, 1), (1e4, 15, 10)])
def test_a_training_that_diverges_names_the_last_checkpoint_whose_weights_are_good(
        script, tmp_path, monkeypatch, capsys, lr, since, save_every):
    monkeypatch.setattr(script, "learning_rate", lambda step, cfg: cfg.lr if step >= since else 1e-3)
    assert script.main(args(script, out=tmp_path / "run", steps=300, lr=lr, save_every=save_every)) == 2
    step, = re.findall(r"diverged: --resume it from step (\d+), whose weights are good", capsys.readouterr().err)
    assert checkpoint(tmp_path / "run")["step"] == int(step)
    run = script.load_run(tmp_path / "run", "cpu")
    sets = getattr(script, "load_traits", script.load_sets)(run.config)
    batch = next(script.random_batches(run.config, sets[0].images, run.known["targets"], 0, CPU))
    for weights in ("model", "average"):
        run.model.load_state_dict(run.state[weights])
        losses = run.model(batch, script.alpha_bars(run.config.timesteps), run.config)
        assert 0 < losses.get("diffusion", losses["loss"]) < 2

@pytest.mark.parametrize("steps, words", [(8, "for 8 steps in all, the learning rate goes from 0 to {:.2g},"),
                                          (3, "step 6 of 3: there is nothing left to train")])
def test_going_on_with_more_or_fewer_steps_is_explained(script, done, tmp_path, capsys, training_only, steps, words):
    out, rate = shutil.copytree(done, tmp_path / "run"), script.learning_rate(6, config(script, steps=8))
    assert script.main(flags(resume=out, steps=steps)) == 0
    assert words.format(rate) in capsys.readouterr().out and checkpoint(out)["step"] == max(steps, 6)

def test_a_run_that_has_not_begun_has_no_rate_to_go_on_from(script, capsys):
    script.print_new_steps(SimpleNamespace(step=0, config=config(script)), config(script, steps=9))
    assert not capsys.readouterr().out

@pytest.mark.parametrize("change", ["pixels", "labels"])
def test_other_images_or_labels_than_the_run_began_with_are_refused(
        script, pictures, tmp_path, capsys, training_only, change):
    data, out = shutil.copytree(pictures, tmp_path / "data"), tmp_path / "run"
    assert script.main(args(script, out=out, dataset="folder", data_dir=data, steps=1)) == 0
    if change == "pixels":
        Image.new("RGB", (16, 16)).save(data / "train/dark/3.png")
    else:                                                           # the last of a class becomes the next one's first
        (data / "train/dark/9.png").rename(data / "train/light/-.png")
    refused(script, capsys, flags(resume=out, steps=4), "have changed")

@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_called_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(pd, "open", lambda path, mode: open("/dev/full", mode), raising=False)
    with pytest.raises(pd.Stop, match="a.pt cannot be written .the disk is full.$"):
        pd.save_safely({"a": [1.5] * 10_000}, tmp_path / "a.pt")

def test_memory_that_runs_out_while_loading_is_not_blamed_on_the_batch(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "zeros", raising(RuntimeError("DefaultCPUAllocator: can't allocate memory")))
    with pytest.raises(pd.Stop, match="images do not fit into memory: lower --image-size"):
        pd.load_dataset("folder", "train", 16, shutil.copytree(pictures, tmp_path / "data"))

def test_a_relative_data_folder_is_kept_absolute(script, pictures, tmp_path, monkeypatch, training_only):
    shutil.copytree(pictures, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    assert script.main(args(script, out="run", dataset="folder", data_dir="data", steps=2)) == 0
    monkeypatch.chdir("/")
    assert script.load_run(tmp_path / "run", "cpu").config.data_dir == str(tmp_path / "data")
