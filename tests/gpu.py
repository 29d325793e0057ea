"""CIFAR-10 on one GPU in five pieces that fit short loans of a machine (no test).

    python tests/gpu.py speed   --data DIR    4 min  matrix rate, training and sampling of each script, where time goes
    python tests/gpu.py recipe  --data DIR    4 min  learning rate, batch, length of the average, guidance, sampler
    python tests/gpu.py compare --data DIR    6 min  random, frozen, unfrozen prototypes; again at raw scale; more seeds
    python tests/gpu.py best    --data DIR    5 min  one long run of what recipe and compare found best
    python tests/gpu.py others  --data DIR    6 min  Patronus, s-PDM, PDM

DIR is a folder data set, train/<class>/* and test/<class>/*. A call may name several pieces, which then share what is
compiled; --minutes is the time of all of them. How long runs train follows from the images/s that are measured first
and from the time that is left then. A piece begins nothing that would not fit, keeps what failed as such, and whether
full or cut off it goes on by the same command. Networks are compiled in pieces of more than 7 minutes; in shorter ones
compiling, by estimate two minutes a graph, would cost more than it brings. Choices are made on training images alone,
by the distance of samples to them in the features of one classifier, the same for all pieces. --out keeps runs,
checkpoints and that classifier. --report gets at most 7 small files: for each piece a tar.gz of figures, logs and
pictures; summary.json (in --out on another machine it tells the pieces there what was found here, and each does what it
has not done); summary.md. --rehearse: tiny networks on a CPU, on images of its own if there is no --data; its figures
mean nothing.
"""
import argparse
import contextlib
import copy
import dataclasses
import functools
import json
import shutil
import signal
import sys
import tarfile
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import benchmark  # noqa: E402
import patronus  # noqa: E402
import pdm  # noqa: E402
import protodiffusion as proto  # noqa: E402

SCRIPTS = dict(protodiffusion=proto, pdm=pdm, patronus=patronus)
MINUTES = dict(speed=4, recipe=4, compare=6, best=5, others=6)
FULL = dict(batch_size=512, lr=1e-3, compile=True, learner_steps=2000, judge_steps=3000, latent_steps=8000,
            invert_steps=50, sample_batch=500, inception="off", log_every=50)
TINY = dict(image_size=16, channels=8, multipliers="1,1", blocks=1, attention=8, num_prototypes=6, prototype_dim=8,
            batch_size=16, compile=False, learner_steps=2, learner_width=4, judge_steps=2, judge_width=4,
            latent_steps=2, latent_width=16, latent_timesteps=21, invert_steps=3, pairs=6, num_samples=20,
            sample_steps=3, sample_batch=20, log_every=1, device="cpu")


class Piece:
    """What a piece works with: clock, folder, settings, and what was found so far, by it and by other pieces."""
    def __init__(self, args):
        self.args, self.out, self.rates = args, Path(args.out), {}
        self.device = proto.find_device("cpu" if args.rehearse else "auto")
        self.machine = proto.machine(self.device)
        saved = self.out / "summary.json"
        self.summary = json.loads(saved.read_text()) if saved.exists() else {"training images/s": {}, "minutes": {}}

    def start(self, name, until):
        """Turn to the piece `name`, which has the time until time.monotonic() is `until`."""
        self.name, self.folder, self.until, self.begun = name, self.out / name, until, 0
        self.began = time.monotonic()
        self.budget = until - self.began                      # seconds
        self.folder.mkdir(parents=True, exist_ok=True)
        self.found, self.before = self.summary.setdefault(name, {}), self.summary["minutes"].get(name, 0)
        self.keep()

    def left(self):
        return self.until - time.monotonic()

    def do(self, name, seconds, work):
        """Keep the figures of work() under its name: if it is still to do and, but for the first in a call, fits.

        It takes about `seconds`. What fails is kept as failed, and the next one has its turn.
        """
        if name in self.found:
            return
        fits = not self.begun or self.left() > seconds
        print(f"--- {self.name}: {name}" + (f", {self.left():.0f} s left" if fits else " must wait: the same command "
                                            "goes on with it"), flush=True)
        if not fits:
            return
        self.begun += 1
        try:
            figures = work()
        except Exception as error:
            traceback.print_exc()
            figures = {"failed": f"{type(error).__name__}: {error}"[-2000:]}
            print(f"{name} failed: {figures['failed']}", flush=True)
        self.keep(name, figures)

    def keep(self, name=None, figures=None):
        """Remember what was found, at once, and write the report."""
        if name:
            self.found[name] = figures
        self.summary["minutes"][self.name] = self.before + (time.monotonic() - self.began) / 60
        proto.save_safely(self.summary, self.out / "summary.json")
        report(self.out, Path(self.args.report or self.out / "report"), self.name)

    def settings(self, script, **changes):
        """Settings for this machine and this piece, as far as the script has them."""
        chosen = {**FULL, "compile": self.name == "speed" or self.budget > 420, **changes,
                  **(TINY if self.args.rehearse else {})}
        return {f.name: chosen[f.name] for f in dataclasses.fields(script.Config) if f.name in chosen}

    def seconds(self, share, reserve, **changes):
        """Of training, for each run of this piece: a share of what is left, but for a reserve, once judge and network
        are ready."""
        if "seconds of training" not in self.found:
            self.judge                                        # trains it
            self.rate(proto, self.settings(proto, **changes))
            self.keep("seconds of training", max(0.05 * self.left(), share * (self.left() - reserve)))
        return self.found["seconds of training"]

    def config(self, script, name, seconds, **changes):
        """Settings of a run, and its folder. Its training takes `seconds`; a run that has begun keeps its steps."""
        folder = self.folder / name
        if not (folder / "config.json").exists():
            chosen = self.settings(script, **changes)
            steps = changes.get("steps") or max(3, round(seconds * self.rate(script, chosen) / chosen["batch_size"]))
            preset = {**script.Config.PRESETS["folder"], "dataset": "folder", "data_dir": str(self.args.data)}
            cfg = script.Config(**{**preset, **chosen, "steps": steps, "save_every": -(-steps // 4)})
            cfg.eval_every = -(-steps // 3)                   # Patronus has no such setting, and does not mind
            folder.mkdir(exist_ok=True)
            script.write_config(folder, cfg)
        cfg = script.Config(**script.read_config(folder))
        print(f"{name}: {cfg.steps} steps of {cfg.batch_size}", flush=True)
        return cfg, folder

    def rate(self, script, chosen):
        """Training images/s of a script's network on this machine; compiles it. Measured once in a process."""
        key = f"{script.SCRIPT}, batch {chosen['batch_size']}{', compiled' * chosen['compile']}, {self.machine}"
        if key not in self.rates:
            job = dict(script=script.SCRIPT, dataset="cifar10", seconds=0.05 if self.args.rehearse else 3,
                       device=str(self.device), compile=chosen["compile"], settings=chosen)
            found = benchmark.measure({**job, "kind": "step", "batch": chosen["batch_size"]})
            if chosen["compile"]:
                benchmark.measure({**job, "kind": "sampling", "batch": chosen["sample_batch"], "seconds": 0.01})
            self.rates[key] = found["images/s"]
            self.summary["training images/s"][key] = {key: found[key] for key in ("images/s", "seconds to begin")}
        return self.rates[key]

    @functools.cached_property
    def sets(self):
        size = TINY["image_size"] if self.args.rehearse else 32
        return [proto.load_dataset("folder", split, size, self.args.data) for split in ("train", "test")]

    @functools.cached_property
    def judge(self):
        return proto.train_judge(proto.Config(**{**proto.Config.PRESETS["folder"], **self.settings(proto),
                                                 "dataset": "folder"}), self.sets[0], self.device)


def report(out, folder, piece):
    """PIECE.tar.gz of the small files of a piece; what all pieces found, in summary.json and summary.md."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / f"{piece}.tar.gz", "w:gz") as tar:
        for path in sorted((out / piece).rglob("*")):
            if path.suffix in (".json", ".csv", ".png", ".txt") and path.stat().st_size < 2 ** 21:
                tar.add(path, path.relative_to(out))
    shutil.copy(out / "summary.json", folder)
    lines = []
    for name, found in json.loads((out / "summary.json").read_text()).items():
        lines += [f"## {name}", ""]
        for key, value in found.items():
            figures = "; ".join(f"{what} {figure}".strip() for what, figure in flat(value) if what != "text")
            lines += [f"- {key}: {figures}"]
            lines += ["", "```", value["text"], "```", ""] if isinstance(value, dict) and "text" in value else []
        lines += [""]
    (folder / "summary.md").write_text("\n".join(lines), encoding="utf-8")


def flat(value, name=""):
    """Nested figures -> (name, rounded figure), one by one; lists are left out."""
    if isinstance(value, dict):
        return [pair for key, part in value.items() for pair in flat(part, f"{name} {key}".strip())]
    return [] if isinstance(value, list) else [(name, f"{value:.4g}" if isinstance(value, float) else str(value))]


@contextlib.contextmanager
def one_judge(folder):
    """Every script's `fit` keeps the weights of judges in `folder`, for a GPU does not train the same one twice."""
    def remembering(fit):
        def fit_once(net, images, targets, loss_fn, steps, cfg, seed, device):
            path = folder / f"judge-{loss_fn.__name__}-{steps}-{cfg.judge_width}.pt"
            if seed == proto.JUDGE_SEED and path.exists():
                net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
                return net.to(device, memory_format=proto.memory_format(device)).eval().requires_grad_(False)
            net = fit(net, images, targets, loss_fn, steps, cfg, seed, device)
            if seed == proto.JUDGE_SEED:
                proto.save_safely(net.state_dict(), path)
            return net
        return fit_once
    before = {script: script.fit for script in SCRIPTS.values()}
    for script, fit in before.items():
        script.fit = remembering(fit)
    try:
        yield
    finally:
        for script, fit in before.items():
            script.fit = fit


@contextlib.contextmanager
def other_averages(factors):
    """While a run trains, also averages of its weights that reach `factor` times as far back -> {factor: model}."""
    update, others = proto.update_average, {}

    def update_all(average, model, n):
        update(average, model, n)
        if n == 0:                                            # a run that goes on has lost them
            others.update({factor: copy.deepcopy(average) for factor in factors})
        for factor, other in others.items():
            update(other, model, factor * n)                  # decay (1 + f n) / (10 + f n): f times as many updates
    proto.update_average = update_all
    try:
        yield others
    finally:
        proto.update_average = update


def quality(piece, cfg, extra, model, **changes):
    """Samples of a model, judged -> accuracy, Frechet distance to training images, and the seconds of sampling."""
    one, start = dataclasses.replace(cfg, **changes), time.perf_counter()
    labels = proto.evaluation_labels(piece.sets[0].labels, one.num_samples)
    rows = proto.rows_for(extra["frequency"], labels, one.seed)
    samples, seconds = proto.generate(model, one, rows, extra["shape"], piece.device), time.perf_counter() - start
    return {**proto.judge_images(piece.judge, samples, labels, piece.device), "seconds of sampling": seconds}


def nearest(found):
    """Of figures by name, the name of those with the least Frechet distance, or None if all failed."""
    return min((name for name in found if "frechet" in found[name]), key=lambda name: found[name]["frechet"],
               default=None)


# --------------------------------------------------------------------------------------------------------------------
# The pieces
# --------------------------------------------------------------------------------------------------------------------

def speed(piece):
    """Rows of benchmark.py at the settings of CIFAR-10, compiled and not, the most wanted ones first."""
    seconds = 0.05 if piece.args.rehearse else 3
    peak = benchmark.matrix_rate(piece.device, seconds)
    piece.keep("matrix product", {"TFLOP/s": peak, "machine": piece.machine, "torch": torch.__version__})
    rows = [("protodiffusion", "step", True, ""), ("protodiffusion", "sampling", True, ""),
            ("protodiffusion", "step", False, "")]
    rows += [("protodiffusion", "step", False, variant) for variant in benchmark.VARIANTS]
    rows += [("protodiffusion", "plain step", False, ""), ("pdm", "step", False, ""), ("patronus", "step", False, "")]
    rows += [("protodiffusion", "step", True, variant) for variant in benchmark.VARIANTS]
    rows += [(script, kind, True, "") for kind in ("step", "sampling") for script in ("pdm", "patronus")]
    rows += [("protodiffusion", "sampling", False, "")]
    for script, kind, compiled, variant in rows:
        def row():
            chosen = piece.settings(SCRIPTS[script])
            job = dict(script=script, dataset="cifar10", kind=kind, seconds=seconds, device=str(piece.device),
                       batch=chosen["sample_batch" if kind == "sampling" else "batch_size"], variant=variant,
                       compile=compiled and chosen["compile"], profile=not variant and (compiled or kind == "step"),
                       settings={**chosen, "compile": compiled and chosen["compile"]})
            row = benchmark.measure_apart(job, peak)
            text = f"{benchmark.HEADER}\n{benchmark.as_text(row)}"
            print(text, flush=True)
            figures = ("images/s", "of matrix rate", "GFLOP an image", "MiB", "seconds to begin") + \
                ("minutes for 50,000",) * (kind == "sampling")
            return {**{key: row[key] for key in figures}, "text": text}
        name = ", ".join(filter(None, (script, kind, "compiled" * compiled, variant)))
        piece.do(name, (0.5 if compiled else 0.15) * piece.budget, row)             # compiling takes a minute or two


def recipe(piece):
    """Runs of equal time from random tables; then guidance, sampler and steps for the best of them."""
    seconds = piece.seconds(1 / 4, reserve=80)            # to sample and judge
    runs = {"lr 1e-3": {}, "lr 5e-4": dict(lr=5e-4), "lr 2e-3": dict(lr=2e-3), "batch 256": dict(batch_size=256)}
    for name, changes in runs.items():
        def run():
            cfg, folder = piece.config(proto, name, seconds, prototypes="random", num_samples=1000, **changes)
            with other_averages((1 / 3, 3) if name == "lr 1e-3" else ()) as averages:
                model, extra, _ = proto.train_run(cfg, folder, piece.sets, piece.device)
            for factor, other in averages.items():
                piece.keep(f"lr 1e-3, average {factor:.2g} x as long", quality(piece, cfg, extra, other))
            return {"steps": cfg.steps, **quality(piece, cfg, extra, model)}
        piece.do(name, 1.5 * seconds, run)
    best = nearest({name: piece.found[name] for name in runs if name in piece.found})
    if best is None:
        return
    ways = {f"{sampler}, {steps} steps, guidance {w}": dict(sampler=sampler, sample_steps=steps, guidance=w)
            for sampler, steps, w in (("dpmpp", 20, 0.0), ("dpmpp", 20, 0.3), ("dpmpp", 20, 0.6), ("dpmpp", 20, 1.0),
                                      ("dpmpp", 20, 1.5), ("ddim", 20, 0.3), ("ddpm", 20, 0.3), ("ddpm", 50, 0.3),
                                      ("dpmpp", 10, 0.3), ("dpmpp", 40, 0.3))}
    if (piece.folder / best / "checkpoint.pt").exists():      # not on another machine
        made = proto.load_run(piece.folder / best, str(piece.device))
        for name, way in ways.items():
            piece.do(name, 15, lambda: quality(piece, made.config, made.extra, made.model, **way))
    done = nearest({name: piece.found[name] for name in ways if name in piece.found and ", 20 steps" in name})
    way = {key: ways[done][key] for key in ("sampler", "guidance")} if done else {}
    piece.keep("chosen", {"lr": FULL["lr"], "batch_size": FULL["batch_size"], **runs[best], **way})


def compare(piece):
    """`protodiffusion.py --compare` at equal scale and seed 0; then at raw scale; then more seeds."""
    chosen = piece.summary.get("recipe", {}).get("chosen", {})
    seconds = piece.seconds(1 / 3, reserve=150, **chosen)    # to learn prototypes, sample and judge
    first = piece.folder / "rms-seed-0"
    for scale, seed in (("rms", 0), ("raw", 0), ("rms", 1), ("rms", 2)):
        name = f"{scale}-seed-{seed}"

        def run():
            done = piece.found.get("rms-seed-0", {})
            same = {"steps": done["steps"]} if "steps" in done else {}
            cfg, folder = piece.config(proto, name, seconds, compare=True, scale=scale, seed=seed, num_samples=1000,
                                       **chosen, **same)
            if scale == "raw" and first.exists() and not (folder / "random").exists():
                shutil.copytree(first / "random", folder / "random")                # a random table has one scale
            proto.compare(cfg, piece.sets, folder, piece.device)
            done = json.loads((folder / "comparison.json").read_text())
            return {"steps": cfg.steps, "real held-out images": done["real held-out images"], **{
                variant: {**v["history"][-1], **{key: v[key] for key in v if key != "history"}}
                for variant, v in done["variants"].items()}}
        piece.do(name, (2 if scale == "raw" else 3) * seconds + 100, run)


def best(piece):
    """A run of the best settings and kind of prototypes, with its metrics and pictures; then guidance again."""
    changes = dict(piece.summary.get("recipe", {}).get("chosen", {}))
    tried = {(key.split("-")[0], variant): found[variant] for key, found in piece.summary.get("compare", {}).items()
             for variant in ("frozen", "unfrozen") if key.endswith("seed-0") and variant in found}
    if nearest(tried):
        changes["scale"], changes["prototypes"] = nearest(tried)
    if "run" in piece.found and not (piece.folder / "run" / "checkpoint.pt").exists():
        return print("the run is done, on another machine")

    def run():
        cfg, folder = piece.config(proto, "run", piece.seconds(1, reserve=80, **changes), **changes)
        model, extra, log = proto.train_run(cfg, folder, piece.sets, piece.device)
        proto.measure(cfg, model, extra, log, piece.sets, folder, piece.device)
        done = json.loads((folder / "metrics.json").read_text())
        return {"settings": changes, "steps": cfg.steps, "training images/s": log["rows"][-1]["images/s"],
                **{key: done[key] for key in ("parameters", "seconds", "stage 1", "results")}}
    piece.do("run", 0, run)
    if "failed" in piece.found["run"]:
        return
    made = proto.load_run(piece.folder / "run", str(piece.device))
    few = min(2000, made.config.num_samples)
    for w in (0.0, 0.3, 0.6, 1.0, 1.8):
        piece.do(f"guidance {w}", 20, lambda: quality(piece, made.config, made.extra, made.model, guidance=w,
                                                      num_samples=few))


def others(piece):
    """Patronus, s-PDM, PDM: each trains for about a fifth of the time. PDM as its help advises for photographs."""
    sets, seconds = piece.sets, 0.22 * piece.budget
    runs = {"patronus": (patronus, {}), "s-pdm": (pdm, dict(supervised=True)),
            "pdm": (pdm, dict(encoder_lr=0.0, tau=0.0))}
    for name, (script, changes) in runs.items():
        def run():
            cfg, folder = piece.config(script, name, seconds, num_samples=2000, **changes)
            if script is patronus:
                model, extra, log = patronus.train_patronus(cfg, folder, sets, piece.device)
                judge = patronus.train_attribute_judge(cfg, sets[0], piece.device)
                patronus.explain_patronus(cfg, model, judge, sets[1], folder, piece.device)
                patronus.measure_patronus(cfg, model, extra, log, sets, judge, folder, piece.device)
            else:
                model, extra, log = pdm.train_pdm(cfg, folder, sets, piece.device)
                pdm.measure_pdm(cfg, model, extra, log, sets, folder, piece.device)
            done = json.loads((folder / "metrics.json").read_text())
            return {"steps": cfg.steps, "training images/s": log["rows"][-1]["images/s"], **{
                key: done[key] for key in ("seconds", "results", "prototypes", "cost") if key in done}}
        piece.do(name, 1.4 * seconds, run)


def rehearsal_images(folder):
    """A tiny folder data set of shapes, ten classes."""
    for split, each in (("train", 8), ("test", 3)):
        data = proto.make_shapes(40 * each, TINY["image_size"], seed=each)
        for c, name in enumerate(data.classes):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for i, image in enumerate(data.images[data.labels == c][:each]):
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / split / name / f"{i}.png")
    return str(folder)


def main(argv=None):
    """The command line. Returns 0, or 130 if it was cut off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    pieces = dict(speed=speed, recipe=recipe, compare=compare, best=best, others=others)
    parser.add_argument("piece", nargs="+", choices=pieces)
    parser.add_argument("--data", help="folder data set")
    parser.add_argument("--out", default="runs/gpu", help="runs and checkpoints [runs/gpu]")
    parser.add_argument("--report", help="small files to bring back [OUT/report]")
    parser.add_argument("--minutes", type=float, help="of this call, start and end included [see above]")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, in about a minute")
    args = parser.parse_args(argv)
    shares, start = [1 if args.rehearse else MINUTES[name] for name in args.piece], time.monotonic()
    minutes = args.minutes or sum(shares)
    piece = Piece(args)
    if not args.data and args.piece != ["speed"]:
        args.data = rehearsal_images(piece.out / "data") if args.rehearse else parser.error("--data DIR is missing")
    for script in SCRIPTS.values():
        script.choose_backends(piece.device)
    for i, name in enumerate(args.piece):
        piece.start(name, start + 60 * minutes * sum(shares[:i + 1]) / sum(shares))
        with open(piece.folder / "log.txt", "a", encoding="utf-8") as file, one_judge(piece.out):
            terminal = sys.stdout
            both = SimpleNamespace(write=lambda text: (terminal.write(text), file.write(text)), isatty=lambda: False,
                                   flush=lambda: (terminal.flush(), file.flush()))
            with contextlib.redirect_stdout(both):
                try:
                    pieces[name](piece)
                except KeyboardInterrupt:
                    print(f"cut off: the same command goes on ({'; '.join(piece.found) or 'nothing'} is done)")
                    return 130
                finally:
                    print(f"{name}: {piece.before + (time.monotonic() - piece.began) / 60:.1f} min so far")
                    both.flush()
                    piece.keep()
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))    # what `timeout` sends: as Ctrl-C
    sys.exit(main())
