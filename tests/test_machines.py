"""What people and machines do to a run: bad input, full disks, threads, environments, styles."""
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import matplotlib
import pytest
import torch

from conftest import CPU, ROOT, SCRIPTS, args, checkpoint, config, contents, flags, metrics, normal, refused, samples

# Command lines. Behind a colon: what the sentence has; else it has the first word of the last flag.
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
    --compare OTHER : another script; --compare BEGUN : metrics.json; --compare RUN --steps 3;
    --compare RUN --resume RUN; """, protodiffusion="""
    TRAIN --labels circle; TRAIN --null-prob 0; TRAIN --guidance -1; TRAIN --imagenet; TRAIN --prototypes frozn;
    TRAIN --prototypes random --scale raw; TRAIN --prototypes random --prototypes-per-class 3;
    --sample RUN --labels hexagon; --sample RUN --labels 3;
    --evaluate RUN --labels star; --compare RUN --labels star; --resume RUN --prototypes-per-class 2""", pdm="""
    TRAIN --like x.png; TRAIN --labels 1 : prototype; TRAIN --null-prob 0; TRAIN --guidance inf; TRAIN --forget form;
    TRAIN --supervised : prototypes; TRAIN --conditioning none : prototypes; TRAIN --views one --forget hue;
    TRAIN --view-size 2,1; TRAIN --prototype-dim 7; TRAIN --image-size 8; TRAIN --tau 1; --sample RUN --prototype 99;
    --sample RUN --like nothing.png : nothing.png; --sample RUN --like RUN/log.csv : log.csv;
    --sample RUN --like a --prototype 1; --sample RUN --prototype 1 --frequency usage; --compare RUN --like a;
    TRAIN --forget hue --view-size 0.5,1""", patronus="""
    TRAIN --set 1=2; TRAIN --edit x.png; TRAIN --bias 2; TRAIN --hide 2; TRAIN --patch 20; TRAIN --num-prototypes 5;
    TRAIN --emphasis inf; TRAIN --latent-timesteps 5 : noise levels; TRAIN --latent-width 7; TRAIN --labels circle;
    TRAIN --invert-steps 2000; TRAIN --global-prototypes 1.5; TRAIN --attribute large --watch large; --model RUN : edit;
    --model RUN --edit x; --model RUN --edit x --set 1=nan; --model RUN --edit x --set 8=1 : prototypes 0 to 7;
    --model RUN --edit nothing.png --set 1=2 : nothing.png; --model RUN --sample RUN; --explain RUN --lr 9;
    --explain RUN --pairs 9; --explain RUN --num-samples 9; --diagnose RUN --inception x; --sample RUN --invert-steps 9;
    --diagnose RUN --invert-steps 9; --model RUN --edit x --set 1=1 --seed 3 : seed; --resume RUN --latent-steps 9;
    --explain BEGUN : it first; --diagnose BEGUN : it first; --diagnose RUN --attribute none""")

def test_bad_input_is_one_sentence_and_changes_nothing(script, done, tmp_path_factory, tmp_path, capsys):
    places = {name: tmp_path_factory.mktemp(name) for name in ("EMPTY", "HALF", "OTHER", "BEGUN")}
    cfg = config(script, data_dir=os.path.abspath("data"))
    script.new_run(cfg, script.load_sets(cfg), places["BEGUN"], CPU)
    script.save(vars(cfg), places["HALF"] / "config.json")
    script.save(dict(vars(cfg), momentum=0.9), places["OTHER"] / "config.json")
    script.save(dict(settings=dict(vars(cfg), momentum=0.9), step=6), places["OTHER"] / "metrics.json")
    before, places["RUN"] = contents(done), done
    for case in (BAD["all"] + BAD[script.SCRIPT]).split(";"):
        words, _, expected = case.partition(" : ")
        given = [re.sub("|".join(places), lambda found: str(places[found[0]]), word) for word in words.split()]
        if given[0] == "TRAIN":
            given = [*args(script, out=tmp_path / "new"), *given[1:]]
        refused(script, capsys, given, expected.strip() or re.findall(r"--(\w+)", words)[-1])
        assert not [*tmp_path.iterdir()] and contents(done) == before, case

def test_a_full_disk_is_a_sentence_and_keeps_what_is_there(script, done, tmp_path, monkeypatch, capsys, training_only):
    def full(path, mode="r", **options):
        return open("/dev/full" if "w" in mode else path, mode, **options)
    run = shutil.copytree(done, tmp_path / "run")
    monkeypatch.setattr(script, "open", full, raising=False)
    refused(script, capsys, flags(resume=run, steps=8), "No space left")
    assert contents(run) == contents(done)
    assert script.cached(tmp_path / "prototype-a.pt", ["key"], lambda: 5) == 5, "it goes without a cache"

def test_a_file_is_on_the_disk_before_it_takes_the_place_of_the_old_one(script, tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file.fileno()).st_size))
    script.save(dict(a=1), tmp_path / "a.json")
    assert synced == [(tmp_path / "a.json").stat().st_size]

def test_main_works_in_a_thread_and_reads_only_what_it_is_given(script, done, tmp_path, monkeypatch, training_only):
    monkeypatch.setattr(sys, "argv", ["kernel", "-f", "connection.json"])
    status, given = [], flags(resume=shutil.copytree(done, tmp_path / "run"), steps=7)
    thread = threading.Thread(target=lambda: status.append(script.main(given)))
    thread.start()
    thread.join()
    assert status == [0] and checkpoint(tmp_path / "run")["step"] == 7

def test_a_tilde_behind_an_equals_sign_is_the_home_folder(script, done, monkeypatch):
    monkeypatch.setenv("HOME", str(done.parent))
    assert script.main(["--sample=~/run", "--out=~/tilde", "--num-samples=2"]) == 0
    assert len(samples(done.parent / "tilde")[0]) == 2

def test_help_lists_every_setting_and_is_the_same_without_docstrings(script, capsys):
    bare = dict(__name__=script.SCRIPT, __file__=script.__file__)
    exec(compile(Path(script.__file__).read_text(), script.SCRIPT, "exec", optimize=2), bare)       # as python -OO does
    texts = []
    for main in (script.main, bare["main"]):
        with pytest.raises(SystemExit):
            main(["--help"])
        texts.append(re.sub(r"\s+", " ", capsys.readouterr().out))
    for field in dataclasses.fields(script.Config):
        flag, default = field.name.replace("_", "-"), re.escape(f"[{field.default}]")
        assert re.search(rf"--{flag}\b[^\[]{{9,}}{default}", texts[0]), f"{flag}: meaning and default"
    assert texts[0] == texts[1] and not bare["load_run"].__doc__

def test_importing_a_script_does_nothing(tmp_path):
    code = """import os, random, signal, sys, torch, numpy, matplotlib, torchvision
def state():
    return (random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist(), torch.get_default_dtype(),
            torch.is_grad_enabled(), torch.get_num_threads(), torch.backends.cudnn.benchmark, sorted(os.environ),
            torch.backends.cuda.flash_sdp_enabled(), dict.__getitem__(matplotlib.rcParams, 'backend'),
            signal.getsignal(signal.SIGINT))
before = state()
for name in sys.argv[1:]:
    __import__(name)
assert state() == before and 'matplotlib.pyplot' not in sys.modules and not os.listdir()"""
    assert not subprocess.check_output([sys.executable, "-c", code, *SCRIPTS], cwd=tmp_path, stderr=subprocess.STDOUT,
                                       env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})

def test_pictures_are_drawn_in_matplotlibs_own_style_whatever_the_users_is(script, done, tmp_path, capsys):
    images = ((normal(6, 3, 8, 8) + 1) * 99).clamp(0, 255).to(torch.uint8)
    script.draw_grid(tmp_path / "a.png", images, ["one $", "two"], "title", ["x", "y", "z"])
    with matplotlib.rc_context({"image.origin": "lower", "text.usetex": True, "figure.facecolor": "black",
                                "font.size": 30, "lines.linewidth": 9, "savefig.pad_inches": 2}):
        script.draw_grid(tmp_path / "b.png", images, ["one $", "two"], "title", ["x", "y", "z"])
        script.draw_curves(tmp_path / "curves.png", {"run": [metrics(done)]})
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "curves.png").read_bytes() == (done / "curves.png").read_bytes()
    assert script.drawable(["star", "\u898b"]) == ["star", "1"] and "numbers" in capsys.readouterr().out
