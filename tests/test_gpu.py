"""A GPU, pretended: FakeTensorMode has no values, but knows where each tensor lies. And benchmark.py, tiny."""
from unittest.mock import MagicMock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import benchmark
from conftest import CPU, config, settings

GPU = torch.device("cuda:0")

class Pretended(torch.utils._python_dispatch.TorchDispatchMode):     # what is read is 1 or True, a mask takes all
    def __torch_dispatch__(self, func, types, args=(), kwargs={}):
        name, x = func.__name__.split(".")[0], (*args, None)[0]
        if name in ("_local_scalar_dense", "equal"):
            return x.dtype == torch.bool or 1
        args = (x, [key if key is None else key.long() for key in args[1]]) if name == "index" else args
        found, generator = func(*args, **kwargs), kwargs.get("generator")
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, found)) if isinstance(t, torch.Tensor)]
        devices = {t.device for t in tensors if t.dim() or t.device == GPU or name in ("cat", "stack")}
        assert len(devices) < 2 or name in ("copy_", "_to_copy") or name == "index" and x.device == GPU, f"{name} mixes"
        assert not any(t.dtype == torch.float64 and t.device == GPU for t in tensors), "MPS has no float64"
        assert generator is None or generator.initial_seed() % 2 == (found.device == GPU), "another device's generator"
        return found

@pytest.mark.skipif(torch.__version__ < "2.10" and not torch.cuda.is_available(), reason="takes torch 2.10, or a GPU")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("amp, sampler", [("bf16", "dpmpp"), ("fp16", "ddpm")])
def test_devices_do_not_mix(script, amp, sampler, tmp_path, monkeypatch, files={}):
    for name, instead in {                              # a generator for the GPU is one for the CPU, with an odd seed
            "torch.Generator": lambda place=CPU, real=torch.Generator: type("Generator", (real,), dict(
                manual_seed=lambda self, seed: real.manual_seed(self, 2 * seed + (torch.device(place) == GPU))))(),
            "torch.utils.swap_tensors": lambda a, b: (setattr(a, "data", b), setattr(a, "fake_device", b.device)),
            "torch._subclasses.fake_tensor.FakeTensor.__deepcopy__": lambda x, memo: x.detach().clone(),
            "numpy.savez": lambda path, **saved: {t.device for t in saved.values()} == {CPU} or pytest.fail("numpy"),
            "torch.Tensor.backward": lambda x, **_: None, "torch.amp.GradScaler": MagicMock(),
            "torch.cuda.amp.common.amp_definitely_not_available": lambda: False, "torch.cuda.set_device": MagicMock(),
            "torch.cuda.mem_get_info": lambda device: (2 ** 40, 2 ** 40), "torch.cuda.is_bf16_supported": MagicMock(),
            **{f"{script.SCRIPT}.{name}": instead for name, instead in dict(
                save=lambda content, path: files.update({path: content}), load=files.get, fingerprint=lambda *_: "",
                cached=lambda path, key, make: make(), contingency=lambda k, labels, K, C: torch.zeros(K, C),
                choose_movers=lambda *_: [0, 7], diverse=lambda *_: [0, 7], framed=lambda run, images, chosen: images,
                watched_traits=lambda *_: [0, 4], drawing=MagicMock(), draw_when=MagicMock()).items()}}.items():
        monkeypatch.setattr(name, instead, raising=False)
    cfg = config(script, device="cuda:0", amp=amp, sampler=sampler, steps=1, eval_every=1, timesteps=21, judge_steps=1)
    with FakeTensorMode(), Pretended():                 # to measure while training is to sample, and to ask the judge
        sets = script.train_run(cfg, MagicMock(resume=tmp_path), lambda _: 2 * [script.make_shapes(60)])
        assert {p.device for p in script.load_run(tmp_path, GPU).model.parameters()} == {GPU}
        script.inception_features(script.fid_inception().to(GPU), sets[1].images, GPU)
        if script.SCRIPT == "patronus" and amp == "bf16":
            script.explain(cfg, script.finish_run(cfg, sets, tmp_path), sets, tmp_path)
            script.sample_unconditional(cfg, script.load_run(tmp_path, GPU), tmp_path)

@pytest.mark.parametrize("kind", ("plain", "step", "sampling"))
def test_benchmark_measures(script, kind, monkeypatch):
    monkeypatch.setattr(benchmark, "matrix_rate", lambda device, seconds: 2.0)
    job = dict(script=script.SCRIPT, dataset="shapes", kind=kind, batch=4, device="cpu", seconds=0.01)
    row = benchmark.measure({**job, "settings": settings(script)})
    assert 0 < row["of_matrix_rate"] == pytest.approx(row["images_per_second"] * row["tflop_per_image"] / 2)
