"""CIFAR-10 on one GPU in five pieces that fit short loans of a machine (no test).

    python tests/gpu.py speed   --data DIR    4 min  matrix rate; training and sampling of each script
    python tests/gpu.py recipe  --data DIR    4 min  learning rate and batch; then guidance, sampler, steps
    python tests/gpu.py compare --data DIR    6 min  random, frozen, unfrozen prototypes; raw scale; more seeds
    python tests/gpu.py best    --data DIR    5 min  one long run of what recipe and compare found best
    python tests/gpu.py others  --data DIR    6 min  Patronus, s-PDM, PDM

A piece is a list of the scripts' own commands, which it prints. DIR is a folder data set, train/<class>/* and
test/<class>/*. How many steps a run trains follows from the images/s that are measured first and from what is left
then of --minutes. Compiling is no training time but takes minutes: only pieces of more than 7 minutes compile. What
does not fit waits; what fails says so in its metrics.json. Full or cut off, the same command goes on; so it does on
another machine, if the report lies in --out there.
"""
import argparse
import contextlib
import io
import shlex
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import benchmark                                        # lets the scripts be imported
import patronus
import pdm
import protodiffusion as proto

# Each piece: minutes; how many runs should fit into them; seconds that a run takes beside its training.
TIMES = dict(speed=(4, 1, 0), recipe=(4, 5, 15), compare=(6, 3, 45), best=(5, 1, 70), others=(6, 3, 50))
FULL = dict(dataset="folder", batch_size=512, lr=1e-3, learner_steps=2000, judge_steps=3000, latent_steps=8000,
            invert_steps=50, sample_batch=500, inception="off")
TINY = dict(image_size=16, channels=8, multipliers="1,1", blocks=1, attention=8, num_prototypes=6, prototype_dim=8,
            batch_size=16, compile=False, steps=6, learner_steps=2, learner_width=4, judge_steps=2, judge_width=4,
            latent_steps=2, latent_width=16, latent_timesteps=21, invert_steps=3, pairs=6, num_samples=20,
            sample_steps=3, sample_batch=20, device="cpu")

class Piece:
    """A piece of the programme: its clock, its folder with a folder for each item, and the commands of the items."""
    def __init__(self, name, args, seconds):
        self.args = args
        self.until = time.monotonic() + seconds
        self.compile = seconds > 420
        self.folder = args.out / name
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "plan.json"                # seconds of training, and steps
        self.plan = proto.read_json(path) if path.exists() else {}
        self.device = proto.find_device("cpu" if args.rehearse else "auto")

    def left(self):
        return self.until - time.monotonic()

    def do(self, name, seconds, work):
        """work(folder) leaves metrics.json: if that is not there, and if there are the seconds that work takes."""
        folder = self.folder / name
        if (folder / "metrics.json").exists():
            return
        if self.left() < seconds:
            return print(f"--- {self.folder.name}/{name} waits: the same command goes on with it", flush=True)
        if not (folder / "config.json").exists():       # what was cut off begins again, but for a run
            shutil.rmtree(folder, ignore_errors=True)
        try:
            work(folder)
        except (Exception, SystemExit):
            folder.mkdir(exist_ok=True)
            proto.save_json(dict(failed=traceback.format_exc()), folder / "metrics.json")
            print(f"--- {self.folder.name}/{name} failed: {traceback.format_exc()}", flush=True)
        report(self.args, self.folder.name)

    def command(self, script, *words, **settings):
        """A command of a script, in this process, which keeps what is compiled. Raises RuntimeError if it fails."""
        words = [str(word) for word in words]
        for name, value in settings.items():
            flag = name.replace("_", "-")
            words += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}={value}"]
        print(f"--- {self.left():.0f} s left: python {script.SCRIPT}.py {shlex.join(words)}", flush=True)
        with contextlib.redirect_stderr(io.StringIO()) as said:
            status = script.main(words)
        if status == 130:
            raise KeyboardInterrupt
        if status:
            raise RuntimeError(said.getvalue())

    def settings(self, script, **changes):
        """Settings for this machine and this piece, those that the script has."""
        tiny = TINY if self.args.rehearse else {}
        chosen = {**FULL, "data_dir": self.args.data, "compile": self.compile, **changes, **tiny}
        return {name: value for name, value in chosen.items() if hasattr(script.Config, name)}

    def job(self, script, kind, settings):
        """A measurement for benchmark.py."""
        return dict(script=script.SCRIPT, dataset="folder", kind=kind, batch=settings["batch_size"], settings=settings,
                    device=str(self.device), seconds=0.05 if self.args.rehearse else 3)

    def steps(self, script, settings):
        """Steps of a run: all runs of a piece train equally long, those of one batch the same number of steps."""
        name = f"{script.SCRIPT}, batch {settings['batch_size']}"
        if name not in self.plan:
            kind = "compiled" if settings["compile"] else "step"
            rate = benchmark.measure(self.job(script, kind, settings))["images_per_second"]
            if "seconds" not in self.plan:              # once network and judge are ready
                cfg = proto.Config(**{**proto.Config.PRESETS["folder"], **self.settings(proto)})
                proto.load_judge(cfg, proto.load_classes(cfg)[2], self.device)
                _, runs, beside = TIMES[self.folder.name]
                self.plan["seconds"] = max(0.05 * self.left(), self.left() / runs - beside)
            self.plan[name] = max(3, round(self.plan["seconds"] * rate / settings["batch_size"]))
            proto.save_json(self.plan, self.folder / "plan.json")
        return self.plan[name]

    def train(self, name, script, **changes):
        """Train and measure a run, or go on with it."""
        def work(folder):
            if (folder / "config.json").exists():
                return self.command(script, "--resume", folder)
            settings = self.settings(script, **changes)
            settings = {"steps": self.steps(script, settings), **settings}
            tenth, third = (-(-settings["steps"] // part) for part in (10, 3))
            measured = third if self.folder.name == "compare" else 0
            self.command(script, out=folder, save_every=tenth, eval_every=measured, **settings)
        self.do(name, self.plan.get("seconds", 0) + TIMES[self.folder.name][2], work)

    def evaluate(self, name, run, **changes):
        """Measure a run with other settings of sampling, if it is on this machine."""
        if run and (run / "checkpoint.pt").exists():
            self.do(name, 20, lambda folder: self.command(proto, "--evaluate", run, out=folder, **changes))

    def nearest(self, pattern, *names):
        """Of the runs like `pattern`, the one of the least Frechet distance -> folder, or None; settings `names`."""
        found = finished(self.args.out, pattern)
        folder = min(found, key=lambda folder: found[folder]["frechet"], default=None)
        return folder, {name: found[folder]["settings"][name] for name in names if folder}

def finished(out, pattern):
    """What is finished of the runs and evaluations PIECE/NAME that are like `pattern` -> {folder: metrics}."""
    return {path.parent: metrics for path in sorted(out.glob(f"{pattern}/metrics.json"))
            if "frechet" in (metrics := proto.read_json(path))}

def report(args, piece):
    """The small files of a piece; and in summary.json the metrics of all pieces."""
    shutil.copytree(args.out / piece, args.report / piece, dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns("*.pt", "*.npz", "*.tmp"))
    metrics = {f"{path.parent.parent.name}/{path.parent.name}": proto.read_json(path)
               for path in sorted(args.out.glob("*/*/metrics.json"))}
    proto.save_json(metrics, args.report / "summary.json")

def speed(piece):
    """Rows of benchmark.py; what is compiled comes last."""
    for kind in ("step", "sampling", "plain", "compiled")[:3 if piece.args.rehearse else 4]:
        for script in (proto, pdm, patronus):
            def work(folder):
                row = benchmark.measure_apart(piece.job(script, kind, piece.settings(script)))
                folder.mkdir()
                proto.save_json(row, folder / "metrics.json")
            piece.do(f"{script.SCRIPT}-{kind}", 120 if kind == "compiled" else 30, work)

def recipe(piece):
    """Runs of equal time from random tables; then guidance, sampler and steps for the best of them."""
    for batch, lr in ((512, 1e-3), (512, 5e-4), (512, 2e-3), (256, 1e-3)):
        piece.train(f"run-{batch}-{lr}", proto, prototypes="random", num_samples=1000, batch_size=batch, lr=lr)
    run, _ = piece.nearest("recipe/run-*")
    ways = [("dpmpp", 20, w) for w in (0.0, 0.3, 0.6, 1.0, 1.5)] + [("dpmpp", steps, 0.3) for steps in (10, 40)]
    for sampler, steps, w in ways + [("ddim", 20, 0.3), ("ddpm", 20, 0.3), ("ddpm", 50, 0.3)]:
        piece.evaluate(f"way-{sampler}-{steps}-{w}", run, sampler=sampler, sample_steps=steps, guidance=w)

def recommended(piece):
    """The settings that recipe found best, of the runs and of sampling in 20 steps."""
    return {**piece.nearest("recipe/run-*", "lr", "batch_size")[1],
            **piece.nearest("recipe/way-*-20-*", "sampler", "guidance")[1]}

def compare(piece):
    """Three ways to start the class table, at equal scale; at raw scale; with more seeds. Then --compare."""
    starts = ("random", "frozen", "unfrozen")
    runs = [(start, "rms", 0) for start in starts] + [("frozen", "raw", 0), ("unfrozen", "raw", 0)]
    for start, scale, seed in runs + [(start, "rms", seed) for seed in (1, 2) for start in starts]:
        piece.train(f"{start}-{scale}-{seed}", proto, prototypes=start, scale=scale, seed=seed, num_samples=1000,
                    **recommended(piece))
    done = finished(piece.folder, "*")
    shutil.rmtree(piece.folder / "comparison", ignore_errors=True)      # made anew in each call, however late it is
    piece.do("comparison", -600, lambda folder: piece.command(proto, f"--out={folder}", "--compare", *done))

def best(piece):
    """One long run, with its metrics and pictures; then guidance again."""
    piece.train("run", proto, **recommended(piece), **piece.nearest("compare/*frozen-*-0", "prototypes", "scale")[1])
    few = 20 if piece.args.rehearse else 2000
    for w in (0.0, 0.3, 0.6, 1.0, 1.8):
        piece.evaluate(f"guidance-{w}", piece.folder / "run", guidance=w, num_samples=few)

def others(piece):
    """The other papers."""
    piece.train("patronus", patronus, num_samples=2000)
    piece.train("s-pdm", pdm, num_samples=2000, supervised=True)
    piece.train("pdm", pdm, num_samples=2000)

def main(argv=None):
    """The command line. Returns 0, or 130 if it was cut off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    pieces = dict(speed=speed, recipe=recipe, compare=compare, best=best, others=others)
    parser.add_argument("piece", nargs="+", choices=pieces)
    parser.add_argument("--data", required=True, help="folder data set, writable: the judge is kept there")
    parser.add_argument("--out", type=Path, default="runs/gpu", help="runs and checkpoints [runs/gpu]")
    parser.add_argument("--report", type=Path, default="runs/gpu-report", help="small files [runs/gpu-report]")
    parser.add_argument("--minutes", type=float, help="time of each piece [see above]")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, in a few minutes")
    args = parser.parse_args(argv)
    for name in args.piece:
        try:
            pieces[name](Piece(name, args, 60 * (args.minutes or TIMES[name][0])))
        except KeyboardInterrupt:
            print(f"--- {name} was cut off: the same command goes on", flush=True)
            return 130
    return 0

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))    # what `timeout` sends: as Ctrl-C
    sys.exit(main())
