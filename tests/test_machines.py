"""What people and machines do to a run: bad input, bugs, memory, full disks, threads, environments, styles."""
import builtins
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import threading

import matplotlib
import pytest
import torch

from conftest import CPU, ROOT, SCRIPTS, args, checkpoint, config, contents, flags, metrics, normal, refused

# ---- Bad input: exit status 2, one sentence, and nothing changes -------------------------------------------------

# Command lines; behind a colon what the sentence has, which is else the first word of the last flag.
BAD = dict(all="""
    TRAIN --steps 0; TRAIN --steps 1e3; TRAIN --step 3; TRAIN --bogus 1; TRAIN --lr nan; TRAIN --lr inf; TRAIN --lr -1;
    TRAIN --seed 9223372036854775808; TRAIN --seed -1; TRAIN --dropout 1.5; TRAIN --batch-size 0; TRAIN --amp fp8;
    TRAIN --multipliers 1,2,2 --image-size 18; TRAIN --multipliers 1,x; TRAIN --multipliers 1,0; TRAIN --channels 6;
    TRAIN --sample-steps 1500; TRAIN --timesteps 20 : noise levels; TRAIN --device toaster; TRAIN --dataset cifar11;
    TRAIN --dataset folder --data-dir nowhere : nowhere; TRAIN --data-dir x; TRAIN --eval-every -1; TRAIN --warmup 2;
    TRAIN --inception nofile; TRAIN --out RUN/log.csv/x : Not a directory; --resume nothing : nothing/config.json;
    --resume RUN --out x; --resume RUN --steps 3; --resume RUN --channels 16; --resume RUN --data-dir x;
    --resume RUN --dataset folder; --resume OTHER : another script; --sample RUN --sample-steps 1001;
    --sample RUN --lr 9; --sample RUN --steps 9; --sample RUN --inception nofile; --sample EMPTY : config.json;
    --sample HALF : checkpoint.pt; --sample BEGUN : it first; --evaluate RUN --lr 9; --evaluate RUN --data-dir x;
    --evaluate BEGUN : it first; --evaluate OTHER : another script; --compare nothing : nothing/metrics.json; --compare;
    --compare OTHER : runs of this script; --compare BEGUN : metrics.json; --compare RUN --steps 3;
    --compare RUN --resume RUN; """, protodiffusion="""
    TRAIN --labels circle; TRAIN --null-prob 0; TRAIN --guidance -1; TRAIN --imagenet; TRAIN --prototypes frozn;
    TRAIN --prototypes random --scale raw; --sample RUN --labels hexagon; --sample RUN --labels 3;
    --evaluate RUN --labels star; --compare RUN --labels star; --resume RUN --prototypes-per-class 2""", pdm="""
    TRAIN --like x.png; TRAIN --labels 1 : prototype; TRAIN --null-prob 0; TRAIN --guidance inf; TRAIN --forget form;
    TRAIN --supervised : num_prototypes; TRAIN --conditioning none : num_prototypes; TRAIN --views one --forget hue;
    TRAIN --view-size 2,1; TRAIN --prototype-dim 7; TRAIN --image-size 8; TRAIN --tau 1; --sample RUN --prototype 99;
    --sample RUN --like nothing.png : nothing.png; --sample RUN --like RUN/log.csv : cannot identify;
    --sample RUN --like a --prototype 1; --compare RUN --like a""", patronus="""
    TRAIN --set 1=2; TRAIN --edit x.png; TRAIN --bias 2; TRAIN --hide 2; TRAIN --patch 20; TRAIN --num-prototypes 5;
    TRAIN --emphasis inf; TRAIN --latent-timesteps 5 : noise levels; TRAIN --latent-width 7; TRAIN --labels circle;
    TRAIN --invert-steps 2000; TRAIN --global-prototypes 1.5; TRAIN --attribute large --watch large; --model RUN : edit;
    --model RUN --edit x; --model RUN --edit x --set 1=nan; --model RUN --edit x --set 8=1 : prototypes 0 to 7;
    --model RUN --edit nothing.png --set 1=2 : nothing.png; --model RUN --sample RUN; --explain RUN --lr 9;
    --explain BEGUN : it first; --diagnose BEGUN : it first; --diagnose RUN --attribute none""")

def test_bad_input_is_one_sentence_and_changes_nothing(script, done, tmp_path_factory, tmp_path, capsys):
    places = {name: tmp_path_factory.mktemp(name) for name in ("EMPTY", "HALF", "OTHER", "BEGUN")}
    cfg = config(script, data_dir=os.path.abspath("data"))
    script.new_run(cfg, script.load_sets(cfg), places["BEGUN"], CPU)
    script.save(vars(cfg), places["HALF"] / "config.json")
    other = vars(importlib.import_module(SCRIPTS[SCRIPTS.index(script.SCRIPT) - 1]).Config())
    script.save(other, places["OTHER"] / "config.json")
    script.save(dict(settings=other), places["OTHER"] / "metrics.json")
    before, places["RUN"] = contents(done), done
    for case in (BAD["all"] + BAD[script.SCRIPT]).split(";"):
        words, _, expected = case.partition(" : ")
        given = [re.sub("|".join(places), lambda found: str(places[found[0]]), word) for word in words.split()]
        if given[0] == "TRAIN":
            given = [*args(script, out=tmp_path / "new"), *given[1:]]
        refused(script, capsys, given, expected.strip() or re.findall(r"--(\w+)", words)[-1])
        assert not [*tmp_path.iterdir()] and contents(done) == before, case

@pytest.mark.parametrize("damage", [
    dict(channels=16), dict(channels=-4), dict(channels="8"), dict(channels=8.5), dict(lr=[1]), dict(lr=math.inf),
    dict(lr=None), dict(mirror=1), dict(dataset="x"), dict(multipliers="a"), dict(momentum=0.9), dict(seed=2 ** 63),
    dict(data_dir=3), dict(timesteps=1), dict(device="toaster"), ["config.json", "[1, 2]"], ["config.json", '{"a": '],
    ["checkpoint.pt", ""], ["checkpoint.pt", "PK\3\4"]], ids=str)
def test_a_damaged_run_is_refused_and_left_as_it_is(script, done, tmp_path, capsys, damage):
    run = shutil.copytree(done, tmp_path / "run")
    if isinstance(damage, dict):
        damage = ["config.json", json.dumps({**json.loads((run / "config.json").read_text()), **damage})]
    (run / damage[0]).write_text(damage[1])
    before = contents(run)
    for task in ("resume", "sample", "evaluate"):
        refused(script, capsys, flags(**{task: run}))
    assert contents(run) == before

# ---- Bugs, memory, disks -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("error", [
    ValueError("a bug"), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"), pytest.param(MemoryError(), marks=pytest.mark.xfail(
        strict=True, reason="its message is empty"))], ids=repr)
def test_a_bug_shows_its_traceback_and_memory_that_runs_out_is_a_sentence(
        script, done, tmp_path, monkeypatch, capsys, error):
    def fail(*given, **options):
        raise error
    monkeypatch.setattr(script, "sample", fail)
    if isinstance(error, ValueError):
        with pytest.raises(ValueError, match="a bug"):
            script.main(flags(sample=done, out=tmp_path / "s"))
    else:
        refused(script, capsys, flags(sample=done, out=tmp_path / "s"), "memory ran out", "--batch-size")

def test_a_full_disk_is_a_sentence_and_keeps_the_last_checkpoint(
        script, done, tmp_path, monkeypatch, capsys, training_only):
    def full(path, mode="r", **options):
        return open("/dev/full" if "w" in mode else path, mode, **options)
    run = shutil.copytree(done, tmp_path / "run")
    monkeypatch.setattr(script, "open", full, raising=False)
    refused(script, capsys, flags(resume=run, steps=8), "No space left")
    assert contents(run) == contents(done)
    assert script.cached(tmp_path / "prototype-a.pt", ["key"], lambda: 5) == 5, "without a cache"

@pytest.mark.xfail(strict=True, reason="torch has its own words for it")
def test_a_disk_that_is_full_half_way_is_a_fault_of_the_disk(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "open", lambda path, mode: open("/dev/full", mode), raising=False)
    with pytest.raises(OSError, match="No space left"):
        script.save(dict(a=torch.zeros(10 ** 6)), tmp_path / "a.pt")

# ---- Threads, environments, styles -------------------------------------------------------------------------------

def test_main_works_in_a_thread_and_reads_only_what_it_is_given(script, done, tmp_path, monkeypatch, training_only):
    monkeypatch.setattr(sys, "argv", ["kernel", "-f", "connection.json"])
    status, given = [], flags(resume=shutil.copytree(done, tmp_path / "run"), steps=7)
    thread = threading.Thread(target=lambda: status.append(script.main(given)))
    thread.start()
    thread.join()
    assert status == [0] and checkpoint(tmp_path / "run")["step"] == 7

def test_the_home_folder_may_be_written_as_a_tilde_also_behind_an_equals_sign(script, done, monkeypatch):
    monkeypatch.setenv("HOME", str(done.parent))
    assert script.main(["--sample=~/run", "--out=~/by tilde", "--num-samples=2"]) == 0
    assert samples(done.parent / "by tilde")[0].shape == (2, 16, 16, 3)

def apart(*words, cwd, **environment):
    """What a process of its own returns, with its stdout."""
    return subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True, env={
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment})

def test_help_is_the_same_without_docstrings_and_lists_every_setting(tmp_path, monkeypatch, capsys):
    import protodiffusion
    monkeypatch.setattr(sys, "argv", ["protodiffusion.py"])
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        protodiffusion.main(["--help"])
    help = capsys.readouterr().out
    assert apart("-OO", ROOT / "protodiffusion.py", "--help", cwd=tmp_path).stdout == help
    for field in dataclasses.fields(protodiffusion.Config):
        assert re.search(rf"--{field.name.replace('_', '-')}\b[^\[]{{9,}}{re.escape(f'[{field.default}]')}", help)

def test_importing_changes_nothing_for_the_importer(tmp_path):
    code = """import os, random, signal, sys, torch, numpy, matplotlib
def state():
    return (random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist(), torch.is_grad_enabled(),
            torch.get_default_dtype(), torch.get_float32_matmul_precision(), torch.get_num_threads(), torch.backends.cudnn.benchmark, torch.backends.cuda.flash_sdp_enabled(), sorted(os.environ),
            dict.__getitem__(matplotlib.rcParams, 'backend'), signal.getsignal(signal.SIGINT))
before = state()
for name in sys.argv[1:]:
    __import__(name)
assert state() == before and 'matplotlib.pyplot' not in sys.modules and not os.listdir()
"""
    found = apart("-c", code, *SCRIPTS, cwd=tmp_path)
    assert found.returncode == 0 and not found.stdout + found.stderr

def test_pictures_are_drawn_in_matplotlibs_own_style(script, done, tmp_path):
    ...
