"""Speed and memory of the scripts on this machine (no test): python tests/benchmark.py [--seconds 5] [--json FILE]

For every script beside this folder, at the settings of `shapes` and of `cifar10`: training images/s, sampled
images/s, peak memory. Two references come from the same run: the training step in plain float32, without
channels_last and without compilation; and the matrix-product rate of the device, of which a step reaches a fraction
(forward FLOP as torch counts them, three times for a step). Every measurement is a process of its own.
"""
import argparse
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
LOSSES = {"protodiffusion": "protodiffusion_loss", "pdm": "pdm_loss", "patronus": "patronus_loss"}


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def rate(work, seconds, device):
    """Calls of work() a second, after warming up, over at least `seconds`."""
    for _ in range(3):
        work()
    wait(device)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        work()
        wait(device)
        count += 1
    return count / (time.perf_counter() - start)


def peak_memory(device):
    """Peak of this process in MiB: allocated on the GPU, or resident on a CPU (None where it cannot be told)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 20
    try:
        import resource
    except ImportError:                                     # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


def measure(job):
    """One measurement -> dict. job: script, dataset, kind (step | plain step | sampling), seconds, batch, compile."""
    sys.path.insert(0, str(ROOT))
    script = importlib.import_module(job["script"])
    device = script.find_device(job["device"])
    if job["kind"] != "plain step":
        script.choose_backends(device)
    preset = script.Config.PRESETS[job["dataset"]]
    cfg = script.Config(**{**preset, "dataset": job["dataset"], "compile": job["compile"]})
    cfg.amp = "off" if job["kind"] == "plain step" else cfg.amp
    B = cfg.batch_size = job["batch"] or cfg.batch_size
    shape, dtype = [3, cfg.image_size, cfg.image_size], script.amp_dtype(device, cfg.amp)
    layout = torch.contiguous_format if job["kind"] == "plain step" else script.memory_format(device)
    extra = dict(shape=shape, classes=list("0123456789"), table=torch.randn(10, cfg.prototype_dim),
                 frequency=torch.ones(10, 1), images=50_000)
    model = cfg.build(extra).to(device, memory_format=layout)
    images = torch.randint(0, 256, (4 * B, *shape), dtype=torch.uint8, device=device)
    targets = torch.randint(0, 2, (4 * B,), device=device)    # classes, or prototypes to sample from; or activations
    conditions = torch.rand(B, cfg.num_prototypes, device=device) if job["script"] == "patronus" else targets[:B]
    result = dict(parameters=sum(p.numel() for p in model.parameters()))
    if job["kind"] == "sampling":
        cfg.sample_batch = B
        per_call = B
        if job["script"] == "patronus":
            work = lambda: script.render(model.eval(), cfg, conditions, device, shape=shape)
        else:
            work = lambda: script.generate(model.eval(), cfg, conditions, shape, device)
    else:
        abar, per_call = script.alpha_bars(cfg.timesteps).to(device), B
        loss_fn = getattr(script, LOSSES[job["script"]])
        optimizer = torch.optim.AdamW(model.param_groups(cfg), lr=cfg.lr, fused=job["kind"] != "plain step")
        scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
        forward = torch.compile(model) if cfg.compile and job["kind"] == "step" else model
        step = SimpleNamespace(n=0)

        def work():
            for batch in script.random_batches(cfg, images, targets, step.n, device):
                if job["kind"] == "plain step":
                    batch.x0 = batch.x0.contiguous()
                with script.autocast(device, dtype):
                    loss = loss_fn(cfg, forward, batch, abar)["loss"]
                scaler.scale(loss).backward()
            if job["kind"] == "plain step":
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            else:
                script.safe_step(optimizer, scaler)
            step.n += 1
    result["images/s"] = rate(work, job["seconds"], device) * per_call
    result["MiB"] = peak_memory(device)
    if job["kind"] == "step":
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, *shape, device=device), torch.zeros(1, dtype=torch.long, device=device), conditions[:1])
        result["GFLOP an image"] = 3 * counter.get_total_flops() / 1e9
    return result


def matrix_rate(device, seconds):
    """TFLOP/s of a square bfloat16 matrix product: 8192 on a GPU, 2048 on a CPU."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    return rate(lambda: a @ b, seconds, device) * 2 * n ** 3 / 1e12


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5, help="time of each measurement")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", type=int, default=0, help="images a step (default: 512 on a GPU, else 64 and 16)")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", help="file to write the table to")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        return print(json.dumps(measure(json.loads(args.job))))
    sys.path.insert(0, str(ROOT))
    scripts = [name for name in LOSSES if (ROOT / f"{name}.py").exists()]
    first = importlib.import_module(scripts[0])
    device = first.find_device(args.device)
    peak = matrix_rate(device, args.seconds)
    table = dict(machine=first.machine(device), torch=torch.__version__, matrix_product_tflops=peak, rows=[])
    print(f"{table['machine']}, torch {torch.__version__}; bfloat16 matrix product {peak:.2f} TFLOP/s\n"
          f"{'script':16}{'settings':10}{'parameters':>11}{'kind':>12}{'batch':>7}{'images/s':>10}{'MiB':>8}"
          f"{'of matrix rate':>16}")
    for script in scripts:
        for dataset in ("shapes", "cifar10"):
            batch = args.batch or (512 if device.type == "cuda" else 64 if dataset == "shapes" else 16)
            for kind in ("plain step", "step", "sampling"):
                job = dict(script=script, dataset=dataset, kind=kind, seconds=args.seconds, batch=batch,
                           compile=args.compile, device=str(device))
                command = [sys.executable, __file__, "--job", json.dumps(job)]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(done.stderr)
                row = {**job, **json.loads(done.stdout.splitlines()[-1])}
                share = f"{row['images/s'] * row['GFLOP an image'] / 1000 / peak:.1%}" if kind == "step" else ""
                print(f"{script:16}{dataset:10}{row['parameters'] / 1e6:>10.2f}M{kind:>12}{batch:>7}"
                      f"{row['images/s']:>10.1f}{row['MiB'] or 0:>8.0f}{share:>16}", flush=True)
                table["rows"].append(row)
    if args.json:
        Path(args.json).write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
