"""Speed and memory of the scripts on this machine (no test): python tests/benchmark.py [--seconds 5] [--json FILE]

For every script beside this folder, at the settings of `shapes` and of `cifar10`: training images/s, sampled
images/s and the minutes that 50,000 of them take, peak memory. Two references come from the same run: the training
step in plain float32, without channels_last and without compilation; and the matrix-product rate of the device, of
which work reaches a fraction (forward FLOP of the denoiser as torch counts them; three times for a training step; for
a sample as often as the network is asked). Every measurement is a process of its own. --profile adds where the time
of a step, and of a batch of samples, goes.
"""
import argparse
import copy
import importlib
import json
import re
import statistics
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
    """Calls of work() a second, after warming up: the median of five rounds of `seconds` together.

    As in training, nobody waits between the calls of a round.
    """
    def round_of(calls):
        wait(device)
        start = time.perf_counter()
        for _ in range(calls):
            work()
        wait(device)
        return (time.perf_counter() - start) / calls
    round_of(2)
    once = round_of(1)
    if once > seconds:
        return 1 / once
    return 1 / statistics.median(round_of(max(1, round(seconds / 5 / once))) for _ in range(5))


def peak_memory(device):
    """Peak of this process in MiB: allocated on the GPU, or resident on a CPU (None where it cannot be told)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 20
    try:
        import resource
    except ImportError:                                     # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


KINDS = {"compiled norms and activations": r"^triton_(poi|red|per)",
         "layout, casts, copies": r"nchwto|nhwcto|copy|memcpy|memset|catarray|aten::cat",
         "attention": r"flash|fmha|sdpa|attention",
         "arithmetic": r"conv|gemm|cutlass|nvjet|xmma|::(mm|bmm|addmm)$|cudnn|wgrad|dgrad|^triton_tem",
         "optimiser, clipping, average": r"adam|multi_tensor|foreach|lerp",
         "norms, activations, sums": r"norm|moments|silu|elementwise|reduce|softmax|dropout|aten::(add|mul|sum)"}


def kind_of(name):
    """The first of KINDS that the name of a kernel fits, or else."""
    return next((kind for kind, words in KINDS.items() if re.search(words, name, re.IGNORECASE)), "else")


def profiled(work, device, calls):
    """Where the time of work() goes, by torch.profiler -> dict of figures and "table", the operations that take most.

    idle: share of the time in which no kernel runs; waits: how often a call makes the host wait for the device (both
    None on a CPU). Kinds are guessed from names of kernels (on a CPU, of operations).
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    for _ in range(2):
        work()
    wait(device)
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(calls):
            work()
    events, gpu = profile.events(), device.type == "cuda"
    kernels = sorted((e.time_range.start, e.time_range.end, e.name) for e in events
                     if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation)
    busy, until, spent = 0.0, -1.0, dict.fromkeys([*KINDS, "else"], 0.0)
    for start, end, _ in kernels:                             # several streams may run at once: the union of intervals
        busy, until = busy + max(0.0, end - max(start, until)), max(until, end)
    named = [(name, end - start) for start, end, name in kernels] if gpu else \
        [(e.name, e.self_cpu_time_total) for e in events if e.name.startswith("aten::")]
    for name, microseconds in named:
        spent[kind_of(name)] += microseconds
    total = sum(spent.values()) or 1.0
    waits = sum(bool(re.fullmatch(r"cuda\w*Synchronize", e.name)) for e in events) - 1    # one is the profiler's
    order = "self_device_time_total" if gpu else "self_cpu_time_total"
    return {"idle": 1 - busy / (until - kernels[0][0]) if kernels else None, "waits": waits / calls if gpu else None,
            "shares": {kind: time / total for kind, time in spent.items()},
            "table": profile.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=70)}


def norm_by_sums(self, x):
    """What nn.GroupNorm gives for x [B, C, H, W], from sums over each channel: no other layout, no float32 output.

    On a GPU autocast lets group norm answer in float32, and in older versions of torch it leaves channels_last too.
    """
    B, C, G = *x.shape[:2], self.num_groups
    mean, square = (v.mean((2, 3)).view(B, G, -1).mean(2) for v in (x.float(), x.float().square()))          # [B, G]
    deviation = ((square - mean ** 2).clamp(min=0) + self.eps).sqrt()
    scale = self.weight / deviation.repeat_interleave(C // G, 1)                                             # [B, C]
    shift = self.bias - mean.repeat_interleave(C // G, 1) * scale
    return (x * scale[:, :, None, None] + shift[:, :, None, None]).to(x.dtype)


VARIANTS = {                                                  # what a change would bring: done to a process, for good
    "contiguous": lambda script: setattr(script, "memory_format", lambda device: torch.contiguous_format),
    "norm by sums": lambda script: setattr(torch.nn.GroupNorm, "forward", norm_by_sums)}


def measure(job):
    """One measurement -> dict. job: script, dataset, kind (step | plain step | sampling), seconds, batch, compile,
    device; profile: also where the time goes; settings: of Config, to change; variant: one of VARIANTS."""
    sys.path.insert(0, str(ROOT))
    script = importlib.import_module(job["script"])
    if job.get("variant"):
        VARIANTS[job["variant"]](script)
    device = script.find_device(job["device"])
    if job["kind"] != "plain step":
        script.choose_backends(device)
    preset = script.Config.PRESETS[job["dataset"]]
    cfg = script.Config(**{**preset, "dataset": job["dataset"], "compile": job["compile"], **job.get("settings", {})})
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
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, *shape, device=device), torch.zeros(1, dtype=torch.long, device=device),
                     conditions[:1])
    passes = 3                                                # forward, and backward to inputs and to weights
    if job["kind"] == "sampling":
        cfg.sample_batch = B
        per_call, passes = B, cfg.sample_steps * (1 if getattr(cfg, "guidance", 0) == 0 else 2)
        if job["script"] == "patronus":
            work = lambda: script.render(model, cfg, conditions, device, shape=shape)
        else:
            work = lambda: script.generate(model, cfg, conditions, shape, device)
    else:
        abar, per_call = script.alpha_bars(cfg.timesteps).to(device), B
        loss_fn = getattr(script, LOSSES[job["script"]])
        optimizer = torch.optim.AdamW(model.param_groups(cfg), lr=cfg.lr, fused=job["kind"] != "plain step")
        scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
        average, step = copy.deepcopy(model).requires_grad_(False), SimpleNamespace(n=0)
        model.train()
        forward = torch.compile(model, dynamic=False) if cfg.compile and job["kind"] == "step" else model

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
            script.update_average(average, model, step.n)
            step.n += 1
    start = time.perf_counter()
    work()
    wait(device)
    result["seconds to begin"] = time.perf_counter() - start  # compiling, and the first call
    result["images/s"] = rate(work, job["seconds"], device) * per_call
    result["MiB"] = peak_memory(device)
    result["GFLOP an image"] = passes * counter.get_total_flops() / 1e9
    if job.get("profile"):
        result["profile"] = profiled(work, device, 1 if job["kind"] == "sampling" else 3)
    return result


def measure_apart(job, peak):
    """The same in a process of its own -> the job and its figures, with the fraction of `peak` TFLOP/s that it reaches.

    RuntimeError, with what that process said, if it failed.
    """
    done = subprocess.run([sys.executable, __file__, "--job", json.dumps(job)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    row = {**job, **json.loads(done.stdout.splitlines()[-1])}
    row["of matrix rate"] = row["images/s"] * row["GFLOP an image"] / 1000 / peak
    row["minutes for 50,000"] = 50_000 / row["images/s"] / 60
    return row


HEADER = (f"{'script':16}{'settings':10}{'compiled':>9}{'parameters':>12}{'kind':>12}{'batch':>7}{'images/s':>10}"
          f"{'MiB':>8}{'of matrix rate':>16}{'50,000 images':>15}")


def as_text(row):
    """A row of the printed table, and its profile if there is one."""
    minutes = f"{row['minutes for 50,000']:.1f} min" if row["kind"] == "sampling" else ""
    text = (f"{row['script']:16}{row['dataset']:10}{'yes' if row['compile'] else 'no':>9}"
            f"{row['parameters'] / 1e6:>11.2f}M{row['kind']:>12}{row['batch']:>7}{row['images/s']:>10.1f}"
            f"{row['MiB'] or 0:>8.0f}{row['of matrix rate']:>16.1%}{minutes:>15}")
    if row.get("profile"):
        found = row["profile"]
        idle = "" if found["idle"] is None else \
            f"no kernel runs for {found['idle']:.1%} of the time; the host waits {found['waits']:g} times a call; "
        shares = ", ".join(f"{kind} {share:.1%}" for kind, share in found["shares"].items())
        text += f"\n  {idle}{shares}\n{found['table']}"
    return text


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
    parser.add_argument("--profile", action="store_true", help="also where the time goes")
    parser.add_argument("--variant", choices=VARIANTS, help="another layout, or group norm from sums over channels")
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
    print(f"{table['machine']}, torch {torch.__version__}; bfloat16 matrix product {peak:.2f} TFLOP/s\n{HEADER}")
    for script in scripts:
        for dataset in ("shapes", "cifar10"):
            batch = args.batch or (512 if device.type == "cuda" else 64 if dataset == "shapes" else 16)
            for kind in ("plain step", "step", "sampling"):
                job = dict(script=script, dataset=dataset, kind=kind, seconds=args.seconds, batch=batch,
                           compile=args.compile and kind != "plain step", device=str(device),
                           profile=args.profile and kind != "plain step", variant=args.variant)
                row = measure_apart(job, peak)
                print(as_text(row), flush=True)
                table["rows"].append(row)
    if args.json:
        Path(args.json).write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
