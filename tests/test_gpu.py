"""The programme of gpu.py, rehearsed with made-up clocks, rates and measurements; and benchmark.py, tiny."""
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

import benchmark
import gpu
from conftest import CPU, config

EACH = pytest.mark.parametrize("script", (gpu.proto, gpu.pdm, gpu.patronus), ids=lambda script: script.SCRIPT)

def made_up(cfg, run, sets, folder):
    """metrics.json that is best at the lowest learning rate, with dpmpp, without guidance, and frozen."""
    worse = (cfg.sampler != "dpmpp") + (getattr(cfg, "prototypes", "") != "frozen")
    script = sys.modules[type(run.model).__module__]
    script.write_metrics(cfg, run, dict(frechet=cfg.lr + getattr(cfg, "guidance", 0) + worse), folder)

@pytest.fixture
def programme(tmp_path, monkeypatch, pictures):
    """run(pieces, left) -> status, summary: with `left` seconds, at 64 images/s. Ctrl-C comes at step run.stop_at."""
    def run(pieces, left=1e6):
        monkeypatch.setattr(gpu.Piece, "left", lambda self: left)
        status = gpu.main([*pieces.split(), "--rehearse", f"--data={pictures}", f"--out={run.out}",
                           f"--report={run.report}"])
        return status, json.loads((run.report / "summary.json").read_text())
    run.out, run.report, run.steps, run.stop_at = tmp_path / "out", tmp_path / "report", 0, None

    def counted(optimizer, scaler, real=gpu.proto.safe_step):
        run.steps += 1
        if run.steps == run.stop_at:
            raise KeyboardInterrupt
        return real(optimizer, scaler)
    for script in (gpu.proto, gpu.pdm, gpu.patronus):
        monkeypatch.setattr(script, "safe_step", counted)
        for name in [name for name in vars(script) if name.startswith("evaluate_")]:
            monkeypatch.setattr(script, name, made_up)
    monkeypatch.setattr(gpu.proto.ProtoDiffusion, "quality", lambda *given: dict(frechet=1.0, accuracy=0.5))
    monkeypatch.setattr(gpu.proto, "draw_prototypes", lambda *given: {})
    monkeypatch.setattr(gpu.patronus, "explain", lambda *given: None)
    monkeypatch.setattr(benchmark, "measure", lambda job: dict(images_per_second=64.0))
    monkeypatch.setattr(benchmark, "measure_apart", benchmark.measure)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, path, dpi: path.write_bytes(b""))
    return run

@pytest.mark.parametrize("left, seconds", [(300, 300 / 3 - 45), (60, 0.05 * 60)])
def test_steps_follow_from_the_rate_and_the_time_that_is_left(programme, monkeypatch, left, seconds):
    monkeypatch.setattr(gpu.proto, "load_classes", lambda cfg: [None] * 3)
    monkeypatch.setattr(gpu.proto, "load_judge", lambda *given: None)
    args = SimpleNamespace(out=programme.out, rehearse=True, data="images")
    for now in (left, 1):                               # a run, and another one later, in another call
        monkeypatch.setattr(gpu.Piece, "left", lambda self: now)
        steps = gpu.Piece("compare", args, now).steps(gpu.proto, dict(batch_size=16, compile=False))
        assert steps == round(seconds * 64 / 16), "seconds x images/s / images a step: all runs train equally long"

def test_pieces_go_on_after_a_cut_and_on_another_machine(programme):
    programme.stop_at = 9
    assert programme("recipe")[0] == 130, "cut in step 3 of the second run, whose step 2 was saved"
    status, found = programme("recipe", left=10)
    assert status == 0 and programme.steps == 9 and set(found) == {"recipe/run-512-0.001"}, "nothing else fits"
    first = found["recipe/run-512-0.001"]
    status, found = programme("recipe")
    assert status == 0 and programme.steps == 9 + 4 + 6 + 6 and found["recipe/run-512-0.001"] == first
    assert len(found) == 4 + 10 and found["recipe/way-dpmpp-20-0.6"]["settings"]["lr"] == 5e-4, "of the best run"
    assert (programme.report / "recipe/run-512-0.0005/log.csv").exists()
    assert not [path for path in programme.report.rglob("*") if path.suffix in (".pt", ".npz")], "small files alone"

    programme.out, programme.steps = programme.out.parent / "other machine", 0
    shutil.copytree(programme.report, programme.out)
    status, again = programme("recipe best")
    assert status == 0 and programme.steps == 6 and found.items() <= again.items(), "only the piece best is new"
    settings = again["best/run"]["settings"]
    assert [settings[name] for name in ("lr", "batch_size", "sampler", "guidance")] == [5e-4, 16, "dpmpp", 0]
    assert sum("best/guidance" in name for name in again) == 5

def test_what_fails_is_kept_and_the_rest_goes_on(programme, monkeypatch):
    def train(cfg, *given, real=gpu.proto.train):
        gpu.proto.check(cfg.prototypes != "random", "it diverged")
        real(cfg, *given)
    monkeypatch.setattr(gpu.proto, "train", train)
    for _ in range(2):                                  # and does not fail again in the next call
        status, found = programme("compare")
        failed = [name for name, figures in found.items() if "failed" in figures]
        assert status == 0 and failed == [f"compare/random-rms-{seed}" for seed in range(3)]
        assert "it diverged" in found[failed[0]]["failed"] and programme.steps == 8 * 6
    table = (programme.report / "compare/comparison/comparison.csv").read_text()
    assert all(f"prototypes {kind}, scale {scale}" in table
               for kind in ("frozen", "unfrozen") for scale in ("rms", "raw"))
    assert "frechet" in (programme.report / "compare/frozen-raw-0/log.csv").read_text(), "measured while it trained"
    assert programme("best")[1]["best/run"]["settings"]["prototypes"] == "frozen"

def test_the_other_scripts_run_and_speed_is_kept(programme):
    status, found = programme("speed others")
    assert status == 0 and len(found) == 9 + 3 and not [name for name in found if "failed" in found[name]]
    assert found["speed/pdm-plain"]["images_per_second"] == 64 and found["others/s-pdm"]["settings"]["supervised"]

@EACH
def test_benchmark_measures_step_and_sampling(script, monkeypatch):
    monkeypatch.setattr(benchmark, "matrix_rate", lambda device, seconds: 2.0)
    settings = {name: value for name, value in gpu.TINY.items() if hasattr(script.Config, name)}
    job = dict(script=script.SCRIPT, dataset="cifar10", seconds=0.01, batch=4, device="cpu", settings=settings)
    step, plain, three = (benchmark.measure({**job, "kind": kind}) for kind in ("step", "plain", "sampling"))
    six = benchmark.measure({**job, "kind": "sampling", "settings": {**settings, "sample_steps": 6}})
    assert six["tflop_per_image"] == pytest.approx(2 * three["tflop_per_image"]), "twice the steps"
    assert step["tflop_per_image"] == pytest.approx(plain["tflop_per_image"]) and step["parameters"] > 0
    assert step["of_matrix_rate"] == pytest.approx(step["images_per_second"] * step["tflop_per_image"] / 2)

@EACH
def test_a_training_step_compiles_to_one_graph_that_runs_share(script, monkeypatch, tmp_path):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph
    monkeypatch.setattr(torch, "compile", lambda net, real=torch.compile, **options: real(
        net, backend=backend, fullgraph=True, **options))       # an error where Python would have to step in
    torch._dynamo.reset()
    sets = 2 * [script.Dataset(torch.zeros(20, 3, 16, 16, dtype=torch.uint8), torch.arange(20) % 10, [*"abcdefghij"])]
    for lr in (1e-3, 2e-3):
        cfg = config(script, compile=True, multipliers="1", steps=2, lr=lr)
        (tmp_path / str(lr)).mkdir()
        script.new_run(cfg, sets, tmp_path / str(lr), CPU)
        script.train(cfg, sets, tmp_path / str(lr), CPU)
    assert len(graphs) == 1
