"""The programme of gpu.py, rehearsed: what a machine is rented for must not fail there. And benchmark.py, tiny."""
import json
import shutil
import tarfile
import time

import pytest
import torch

import benchmark
import gpu


@pytest.fixture(autouse=True)
def backends(monkeypatch):
    """What a script switches on for its process is not for the other tests'."""
    for script in gpu.SCRIPTS.values():
        monkeypatch.setattr(script, "choose_backends", lambda device: None)


@pytest.fixture
def programme(tmp_path, monkeypatch):
    """run(pieces, minutes, full=False) -> status, what was found; full: no time is left but for one thing.

    The machine trains 4 steps a second, it says. run.steps counts training steps, and Ctrl-C comes at run.stop_at.
    """
    data = gpu.rehearsal_images(tmp_path / "images")

    def run(pieces, minutes, full=False):
        monkeypatch.setattr(gpu.Piece, "left", lambda self: 0 if full else 60 * minutes)
        flags = ["--rehearse", "--data", data, "--out", str(run.out), "--minutes", str(minutes)]
        status = gpu.main([*pieces.split(), *flags])
        return status, json.loads((run.out / "summary.json").read_text())
    run.out, run.steps, run.stop_at = tmp_path / "out", 0, None
    for script in gpu.SCRIPTS.values():
        def counted(optimizer, scaler, real=script.safe_step):
            run.steps += 1
            if run.steps == run.stop_at:
                raise KeyboardInterrupt
            return real(optimizer, scaler)
        monkeypatch.setattr(script, "safe_step", counted)
    monkeypatch.setattr(gpu.Piece, "rate", lambda self, script, chosen: 16 * 4.0)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, path, dpi: path.write_bytes(b""))     # slow
    return run


def report_holds_small_files_alone(folder):
    files = list(folder.iterdir())
    assert len(files) <= 7 and all(file.stat().st_size < 2 ** 24 for file in files)
    names = [name for file in folder.glob("*.tar.gz") for name in tarfile.open(file).getnames()]
    assert not [name for name in names if name.endswith((".pt", ".npz"))]
    return names


def test_steps_follow_from_measured_rate_and_the_time_that_is_left(programme, monkeypatch):
    monkeypatch.setattr(gpu.Piece, "judge", None)
    for name, minutes, seconds in (("short", 3, 180 - 80), ("long", 5, 300 - 80), ("none", 1, 0.05 * 60)):
        monkeypatch.setattr(gpu.Piece, "left", lambda self: 60 * minutes)
        piece = gpu.Piece(gpu.argparse.Namespace(piece=["best"], out=programme.out / name, rehearse=True, data="images",
                                                 report=None))
        piece.start("best", time.monotonic() + 60 * minutes)
        cfg, folder = piece.config(gpu.proto, name, piece.seconds(1, reserve=80))
        assert cfg.steps == round(seconds * 4), "seconds x images/s / images a step"
        assert gpu.proto.Config(**gpu.proto.read_config(folder)) == cfg
        assert piece.config(gpu.proto, name, 1000)[0].steps == cfg.steps, "a run that has begun keeps its steps"
        monkeypatch.setattr(gpu.Piece, "left", lambda self: 1.0)
        assert piece.seconds(1, reserve=80) == seconds, "all runs of a piece have equal time"


def test_pieces_follow_one_another_and_go_on_after_a_cut(programme):
    status, found = programme("recipe", 0.05, full=True)      # 0.36 s of training each: three steps, the least
    assert status == 0 and programme.steps == 3 and found["recipe"]["chosen"]["lr"] == 1e-3
    assert {"lr 1e-3", "lr 1e-3, average 3 x as long", "chosen"} <= set(found["recipe"])
    first = found["recipe"]["lr 1e-3"]
    status, found = programme("recipe", 1)
    assert status == 0 and programme.steps == 3 * 4 and found["recipe"]["lr 1e-3"] == first
    chosen, ways = found["recipe"]["chosen"], [name for name in found["recipe"] if "20 steps" in name]
    assert len(ways) == 7 and f"{chosen['sampler']}, 20 steps, guidance {chosen['guidance']}" in ways

    programme.steps, programme.stop_at = 0, 9
    assert programme("best", 4 / 3)[0] == 130, "cut in step 9 of 16: 5 % of 80 s, 4 steps a second"
    status, found = programme("best", 4 / 3)
    assert status == 0 and programme.steps == 9 + 16 - 8, "on from the checkpoint of step 8"
    assert found["best"]["run"]["steps"] == 16 and found["best"]["run"]["settings"] == chosen
    names = report_holds_small_files_alone(programme.out / "report")
    assert {"best/log.txt", "best/run/metrics.json", "best/run/samples.png", "best/run/log.csv"} <= set(names)
    assert "cut off" in (programme.out / "best" / "log.txt").read_text()

    other = programme.out.parent / "other machine"            # which gets the summary alone
    other.mkdir()
    shutil.copy(programme.out / "report" / "summary.json", other)
    programme.out, programme.steps, programme.stop_at = other, 0, None
    status, again = programme("recipe best", 1)
    assert status == 0 and programme.steps == 0, "what is done elsewhere is not done again"
    assert again["recipe"] == found["recipe"] and again["best"] == found["best"]


def test_what_fails_is_kept_and_the_rest_goes_on(programme, monkeypatch, capsys):
    def train_run(cfg, *given, real=gpu.proto.train_run):
        if cfg.lr == 1e-3 and cfg.batch_size == 16:
            raise gpu.proto.Stop("it diverged")
        return real(cfg, *given)
    monkeypatch.setattr(gpu.proto, "train_run", train_run)
    for _ in range(2):                                        # and does not fail again in the next call
        status, found = programme("recipe", 1)
        assert status == 0 and found["recipe"]["lr 1e-3"]["failed"] == "Stop: it diverged"
        assert "frechet" in found["recipe"]["lr 2e-3"] and found["recipe"]["chosen"]["lr"] != 1e-3
    assert "Traceback" in capsys.readouterr().err
    assert "it diverged" in (programme.out / "report" / "summary.md").read_text()


def test_pieces_of_one_call_share_its_time_in_turns(programme, monkeypatch):
    ends = {}
    monkeypatch.setattr(gpu.Piece, "start", lambda self, name, until, real=gpu.Piece.start: (
        ends.update({name: until - time.monotonic()}), real(self, name, until)))
    for name in ("recipe", "best"):
        monkeypatch.setattr(gpu, name, lambda piece: None)
    assert programme("recipe best", 2)[0] == 0
    assert ends["recipe"] == pytest.approx(60, abs=2) and ends["best"] == pytest.approx(120, abs=3)


def test_comparison_at_another_scale_takes_steps_and_random_table_of_the_first(programme, monkeypatch):
    assert programme("compare", 0.05, full=True)[0] == 0
    assert programme.steps == 9, "three runs of three steps"
    status, found = programme("compare", 0.5, full=True)
    first, raw = (found["compare"][name] for name in ("rms-seed-0", "raw-seed-0"))
    assert status == 0 and raw["steps"] == first["steps"] == 3 and programme.steps == 9 + 6, "random trains once"
    assert raw["random"]["frechet"] == first["random"]["frechet"] and "rms-seed-1" not in found["compare"]
    assert json.loads((programme.out / "compare/raw-seed-0/frozen/config.json").read_text())["scale"] == "raw"


def test_the_other_scripts_run_and_judges_are_trained_once(programme, monkeypatch):
    fits = []

    def counted(*given, real=gpu.proto.fit):
        fits.append(given[6])                                 # its seed
        return real(*given)
    for script in gpu.SCRIPTS.values():
        monkeypatch.setattr(script, "fit", counted)
    shown = []
    monkeypatch.setattr(gpu.patronus, "explain_patronus", lambda *given: shown.append(given[-2]))   # many pictures
    monkeypatch.setattr(gpu.pdm, "measure_cost", lambda *given: {"parameters": 1})
    status, found = programme("others", 0.05)
    assert status == 0 and fits.count(gpu.proto.JUDGE_SEED) == 2, "one of classes, one of attributes"
    assert "prototypes" in found["others"]["pdm"] and "TAD" in found["others"]["patronus"]["results"]
    names = report_holds_small_files_alone(programme.out / "report")
    assert shown == [programme.out / "others" / "patronus"]
    assert {"others/patronus/samples.png", "others/pdm/usage.png", "others/s-pdm/metrics.json"} <= set(names)
    assert all(script.fit is counted for script in gpu.SCRIPTS.values()), "as it was before"


def test_speed_keeps_rows_with_profiles(programme, monkeypatch):
    row = {"parameters": 1, "images/s": 100.0, "MiB": 1.0, "GFLOP an image": 1.0, "of matrix rate": 0.25,
           "minutes for 50,000": 8.3, "seconds to begin": 90.0}
    profile = {"idle": 0.1, "waits": 0.0, "shares": {"arithmetic": 1.0}, "table": "aten::conv2d"}
    monkeypatch.setattr(benchmark, "matrix_rate", lambda device, seconds: 1.0)
    monkeypatch.setattr(benchmark, "measure_apart", lambda job, peak: {
        **job, **row, **({"profile": profile} if job["profile"] else {})})
    status, found = programme("speed", 1)
    assert status == 0 and len(found["speed"]) == 1 + 15
    text = (programme.out / "report" / "summary.md").read_text()
    assert "no kernel runs for 10.0% of the time" in text and "25.0%" in text and "8.3 min" in text


@pytest.mark.parametrize("script", benchmark.LOSSES)
def test_benchmark_measures_step_and_sampling(script):
    settings = {name: value for name, value in gpu.TINY.items() if hasattr(gpu.SCRIPTS[script].Config, name)}
    job = dict(script=script, dataset="cifar10", seconds=0.01, batch=4, compile=False, device="cpu", settings=settings)
    step, sampling = (benchmark.measure({**job, "kind": kind}) for kind in ("step", "sampling"))
    passes = 3 * (1 if script == "patronus" else 2)           # three steps, with guidance or without
    assert sampling["GFLOP an image"] == pytest.approx(step["GFLOP an image"] / 3 * passes)
    assert step["images/s"] > 0 and sampling["images/s"] > 0 and "profile" not in step


def test_benchmark_profiles_work_and_sorts_it_by_kind():
    x, weight = torch.randn(8, 16, 32, 32), torch.randn(16, 16, 3, 3)
    found = benchmark.profiled(lambda: torch.nn.functional.conv2d(x, weight).clone(), torch.device("cpu"), 3)
    assert sum(found["shares"].values()) == pytest.approx(1) and found["shares"]["arithmetic"] > 0.5
    assert found["shares"]["layout, casts, copies"] > 0 and "aten::" in found["table"] and found["idle"] is None


@pytest.mark.parametrize("name, kind", [
    ("triton_poi_fused__to_copy_convolution_silu_3", "compiled norms and activations"),
    ("void cudnn::engines_precompiled::nchwToNhwcKernel<__nv_bfloat16>", "layout, casts, copies"),
    ("sm90_xmma_fprop_implicit_gemm_bf16bf16_nhwc_cudnn", "arithmetic"), ("nvjet_tst_128x256_64x4", "arithmetic"),
    ("pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64>>", "attention"),
    ("multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimiser, clipping, average"),
    ("RowwiseMomentsCUDAKernel", "norms, activations, sums")])
def test_kernels_are_sorted_by_their_names(name, kind):
    assert benchmark.kind_of(name) == kind


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_norm_by_sums_is_group_norm(dtype, most):
    norm, x = gpu.proto.group_norm(32), 1 + 2 * torch.randn(4, 32, 8, 8).contiguous(memory_format=torch.channels_last)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    found = benchmark.norm_by_sums(norm, x.to(dtype))
    assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)
    assert (found - norm(x)).norm() / norm(x).norm() < most


def test_rate_is_the_median_of_rounds(monkeypatch):
    clock, calls = [0.0], []                                  # a machine that is slow at first, and once again later

    def work():
        calls.append(1)
        clock[0] += 1.0 if len(calls) <= 2 or 8 < len(calls) <= 12 else 0.1
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock[0])
    assert benchmark.rate(work, 2.0, torch.device("cpu")) == pytest.approx(10)
    assert len(calls) == 2 + 1 + 5 * 4, "two to warm up, one to time, and five rounds that fill the time"

    def slow():
        calls.append(1)
        clock[0] += 4.0
    calls.clear()
    assert benchmark.rate(slow, 2.0, torch.device("cpu")) == 1 / 4
    assert len(calls) == 3, "what takes longer than the time is not repeated"


@pytest.mark.parametrize("script", gpu.SCRIPTS.values(), ids=gpu.SCRIPTS)
def test_compiled_networks_are_whole_graphs_of_few_sizes(script, monkeypatch, tmp_path):
    sizes = []

    def backend(graph, inputs):
        sizes.append(next(len(x) for x in inputs if x.dim() == 4 and not isinstance(x, torch.nn.Parameter)))
        return graph
    monkeypatch.setattr(torch, "compile", lambda net, real=torch.compile, **options: real(
        net, backend=backend, fullgraph=True, **options))     # fullgraph: an error where Python would have to step in
    torch._dynamo.reset()
    small = dict(channels=4, multipliers="1", num_prototypes=6, steps=2, batch_size=8, sample_batch=6, sample_steps=2)
    cfg = script.Config(**{name: value for name, value in small.items() if hasattr(script.Config, name)}, compile=True)
    shape, targets = [3, cfg.image_size, cfg.image_size], torch.arange(10)
    extra = dict(shape=shape, classes=list("abcdefghij"), table=torch.randn(10, cfg.prototype_dim), images=10)
    images = torch.zeros(10, *shape, dtype=torch.uint8)
    loss_fn = getattr(script, benchmark.LOSSES[script.SCRIPT])
    for run in (tmp_path / "first", tmp_path / "second"):
        run.mkdir()
        average, _ = script.train(cfg, cfg.build(extra), images, targets, lambda *given: loss_fn(cfg, *given), run,
                                  extra, torch.device("cpu"))
        if script is gpu.patronus:
            script.render(average, cfg, torch.rand(15, 6), torch.device("cpu"), shape=shape)
        else:
            script.generate(average, cfg, torch.arange(15) % 4, shape, torch.device("cpu"))
    with_guidance = 6 if script is gpu.patronus else 12
    assert sizes == [8, with_guidance], "a training step, whole batches; not the last three images, not another run"
