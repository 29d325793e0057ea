"""Speed and memory of the scripts on this machine (no test): python tests/benchmark.py [--seconds 5]

For every script, at the settings of `shapes` and of `cifar10`: parameters, the peak of a GPU's memory, images/s of a
training step (plain: in float32; step: in the default precision and layout; compiled: on a GPU) and of sampling. Beside
them the rate of a bfloat16 matrix product, and the part of it that the work reaches. Each has a process of its own."""
import argparse
import copy
import importlib
import itertools
import math
import multiprocessing
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
COLUMNS = ("script", "dataset", "kind", "batch", "parameters", "peak_mib", "images_per_second", "matrix_tflops",
           "of_matrix_rate")

def rate(work, seconds, device):
    """Calls of work() a second, warm: the median of five rounds of `seconds` together; within one nobody waits."""
    def round_of(calls):
        start = time.perf_counter()
        for _ in range(calls):
            work()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        return (time.perf_counter() - start) / calls
    for _ in range(2):                                  # the first one compiles
        once = round_of(1)
    calls = max(1, round(seconds / 5 / once))
    return 1 / statistics.median(round_of(calls) for _ in range(5 if once < seconds else 1))

def matrix_rate(device, seconds):
    """TFLOP/s of a square bfloat16 matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16)
    return rate(lambda: a @ b, seconds, device) * 2 * n ** 3 / 1e12

def sampling(script, cfg, model, known, device):
    """A function that samples one batch: of Patronus for activations [B, m], of the others for prototype 0."""
    run = SimpleNamespace(model=model.eval().requires_grad_(False), known=known, device=device)
    if script.SCRIPT == "patronus":
        s = torch.rand(cfg.sample_batch, cfg.num_prototypes)
        return lambda forward: script.render(cfg, run, s)
    return lambda forward: script.generate(cfg, run, torch.zeros(cfg.sample_batch, dtype=torch.int64))

def training(script, cfg, model, known, device):
    """A function of the network, as it is or compiled, that does what train() does in a step."""
    images = torch.randint(0, 256, (4 * cfg.batch_size, *known["shape"]), dtype=torch.uint8, device=device)
    targets = torch.zeros(len(images), dtype=torch.int64)
    abar = script.alpha_bars(cfg.timesteps).to(device)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.train().param_groups(), lr=1e-4, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=script.amp_dtype(device, cfg.amp) is torch.float16)
    count = itertools.count()
    def step(forward):
        number = next(count)
        batch = script.random_batch(cfg, images, targets, number, device)
        with script.autocast(device, cfg.amp):
            losses = forward(batch, abar, cfg)
        scaler.scale(losses["loss"]).backward()
        scaler.unscale_(optimizer)
        norms = [torch.nn.utils.clip_grad_norm_(group["params"], 1.0) for group in optimizer.param_groups]
        optimizer.found_inf = (~sum(norms).isfinite()).float()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        script.update_average(average, model, number)
    return step

def measure(job):
    """A measurement in this process -> the job with its figures, as a dict.
    job: script, dataset, kind (plain, step, compiled, sampling), batch, device, seconds, and perhaps settings."""
    script = importlib.import_module(job["script"])
    device = script.find_device(job["device"])
    plain = job["kind"] == "plain"
    cfg = script.Config(**{**script.Config.PRESETS[job["dataset"]], **job.get("settings", {})})
    cfg.amp = "off" if plain else cfg.amp
    cfg.batch_size = cfg.sample_batch = job["batch"]
    known = dict(shape=[3, cfg.image_size, cfg.image_size], classes=list("0123456789"))
    model = cfg.build(known)
    model = model.to(device) if plain else script.placed(model, device)
    work = (sampling if job["kind"] == "sampling" else training)(script, cfg, model, known, device)
    with FlopCounterMode(display=False) as counter:
        work(model)
    forward = torch.compile(model, dynamic=False) if job["kind"] == "compiled" else model
    images = rate(lambda: work(forward), job["seconds"], device) * job["batch"]
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else math.nan
    tflop = counter.get_total_flops() / job["batch"] / 1e12
    matrix = matrix_rate(device, job["seconds"] / 5)
    return dict(job, parameters=sum(p.numel() for p in model.parameters()), peak_mib=memory / 2 ** 20,
                images_per_second=images, tflop_per_image=tflop, matrix_tflops=matrix,
                of_matrix_rate=images * tflop / matrix)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5, help="time of each measurement")
    args = parser.parse_args()
    device = importlib.import_module("protodiffusion").find_device("auto")
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{machine}, torch {torch.__version__}\n", *(f"{name:>17}" for name in COLUMNS))
    kinds = ["plain", "step", "sampling"] + ["compiled"] * (device.type == "cuda")
    batches = dict(shapes=64, cifar10=512 if device.type == "cuda" else 4)
    for script, dataset, kind in itertools.product(("protodiffusion", "pdm", "patronus"), batches, kinds):
        job = dict(script=script, dataset=dataset, kind=kind, batch=batches[dataset], device=str(device),
                   seconds=args.seconds)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            row = pool.submit(measure, job).result()
        cells = (f"{row[name]:.4g}" if isinstance(row[name], float) else row[name] for name in COLUMNS)
        print(*(f"{cell:>17}" for cell in cells), flush=True)

if __name__ == "__main__":
    main()
