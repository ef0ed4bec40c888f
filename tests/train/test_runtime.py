"""What a run executes on: chosen, stored, set up, measured against."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from train import bitlinear, cross_entropy, runtime
from train.config import ModelConfig, preset
from train.model import Model
from train.runtime import Runtime, choose, fit_micro, flops_per_token, from_dict, ladder, peak_flops, to_dict

CPU = Runtime(device="cpu", precision="fp32", threads=1, micro=2, compile=False, deterministic=True, world_size=1)


def test_a_cpu_runs_uncompiled_and_deterministic() -> None:
    chosen = choose("cpu", None, world_size=2)
    assert (chosen.device, chosen.compile, chosen.deterministic, chosen.world_size) == ("cpu", False, True, 2)
    assert chosen.threads == torch.get_num_threads() and chosen.micro is None


@pytest.mark.parametrize("units", [True, False])
def test_precision_follows_the_processor(units: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: units)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    chosen = choose("cpu", None)
    assert (chosen.precision, chosen.compute) == (("bf16", torch.bfloat16) if units else ("fp32", torch.float32))


def test_auto_takes_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    chosen = choose("auto", 8)
    assert (chosen.device, chosen.precision, chosen.compile, chosen.micro) == ("cuda", "bf16", True, 8)
    assert choose("cpu", 8).device == "cpu"


def test_a_missing_device_is_refused_with_those_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"--device cuda: .* there is .*cpu"):
        choose("cuda", None)
    with pytest.raises(ValueError, match="started on cuda"):
        runtime.prepare(replace(CPU, device="cuda", deterministic=False))


def test_a_runtime_survives_json() -> None:
    assert from_dict(json.loads(json.dumps(to_dict(CPU)))) == CPU
    with pytest.raises(ValueError, match="cannot be read"):
        from_dict({"device": "cpu"})


SETUP = """
import json, os, torch
from train import bitlinear, cross_entropy, runtime
from train.runtime import Runtime
r = Runtime("cpu", "fp32", 3, 1, False, True, 1)
assert str(runtime.prepare(r)) == "cpu"
print(json.dumps({
    "threads": torch.get_num_threads(),
    "deterministic": torch.are_deterministic_algorithms_enabled(),
    "fill": torch.utils.deterministic.fill_uninitialized_memory,
    "cudnn_sdp": torch.backends.cuda.cudnn_sdp_enabled(),
    "efficient_sdp": torch.backends.cuda.mem_efficient_sdp_enabled(),
    "flash_sdp": torch.backends.cuda.flash_sdp_enabled(),
    "benchmark": torch.backends.cudnn.benchmark,
    "cublas": os.environ["CUBLAS_WORKSPACE_CONFIG"],
    "matmul": torch.get_float32_matmul_precision(),
    "cuda": torch.cuda.is_initialized(),
}))
"""


def test_a_process_is_set_up_as_stored() -> None:
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":16:8", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SETUP], capture_output=True, text=True, env=environment, check=True)
    assert json.loads(done.stdout) == {
        "threads": 3,
        "deterministic": True,
        "fill": False,
        "cudnn_sdp": False,
        "efficient_sdp": False,
        "flash_sdp": True,
        "benchmark": False,
        "cublas": ":4096:8",
        "matmul": "highest",
        "cuda": False,
    }


def test_a_process_without_a_gpu_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_devices", lambda: {"cuda": True})
    monkeypatch.setattr(runtime, "make_deterministic", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    before = torch.get_num_threads()
    with pytest.raises(ValueError, match=r"process 3 of \S+ has no GPU: this machine shows 2"):
        runtime.prepare(replace(CPU, device="cuda", threads=before, deterministic=False), 2)


def test_the_ladder_holds_what_divides_the_batch() -> None:
    assert ladder(32, "cuda") == [32, 16, 8, 4, 2, 1]
    assert ladder(48, "cuda") == [16, 8, 4, 2, 1]
    assert ladder(7, "cuda") == [1]
    assert ladder(32, "cpu") == [m for m in (32, 16, 8, 4, 2, 1) if m <= runtime.CPU_MICRO]


def test_the_largest_micro_batch_that_fits_is_taken() -> None:
    tried = []

    def attempt(micro: int) -> None:
        tried.append(micro)
        if micro > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert fit_micro(CPU, [32, 16, 8, 4, 2, 1], attempt) == replace(CPU, micro=4)
    assert tried == [32, 16, 8, 4]


def test_other_failures_are_not_taken_for_lack_of_memory() -> None:
    def broken(micro: int) -> None:
        raise RuntimeError("an illegal memory access")

    with pytest.raises(RuntimeError, match="illegal"):
        fit_micro(CPU, [2, 1], broken)

    def full(micro: int) -> None:
        raise torch.OutOfMemoryError

    with pytest.raises(ValueError, match="out of memory with 1 sequence"):
        fit_micro(CPU, [2, 1], full)


def test_the_cost_of_a_token() -> None:
    assert flops_per_token(preset("95m").model, 1024) == 6 * 95_354_880 + 12 * 8 * 768 * 1024 == 647_626_752
    config = ModelConfig(hidden=32, layers=2, heads=2, kv_heads=1, head_dim=16, ffn=48, vocab_size=61)
    matrices = sum(p.numel() for p in Model(config).parameters() if p.dim() == 2)
    assert flops_per_token(config, 100) == 6 * matrices + 12 * 2 * 32 * 100


def test_a_peak_is_known_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_flops(torch.device("cpu")) is None
    for name, peak in (("NVIDIA H200", 989e12), ("Some New GPU", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda", 0)) == peak


def test_peak_memory_of_a_cpu_is_that_of_the_process() -> None:
    before = runtime.peak_memory(torch.device("cpu"))
    held = torch.ones(40_000_000)
    after = runtime.peak_memory(torch.device("cpu"))
    assert before is not None and after is not None and held[0] == 1
    assert 100e6 < after < 100e9 and after >= before


def loss_and_gradients(device: str, precision: torch.dtype, compiled: bool) -> tuple[Tensor, dict[str, Tensor]]:
    config = ModelConfig(hidden=64, layers=2, heads=2, kv_heads=1, head_dim=32, ffn=96, vocab_size=61, init_std=0.1)
    model = Model(config, precision).to(device)
    if compiled:
        runtime.compile_model(model)
    model.initialise(0)
    ids = torch.randint(0, 61, (2, 17), generator=torch.Generator().manual_seed(0)).to(device)
    loss = model.loss(ids[:, :-1], ids[:, 1:])
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """torch.compile traces, splits and runs its graphs, but generates no code: a compiler takes a minute here."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    yield counters["stats"]
    assert not counters["graph_break"]


def test_a_compiled_model_computes_the_same(traced: Counter[str]) -> None:
    want = loss_and_gradients("cpu", torch.float32, compiled=False)
    got = loss_and_gradients("cpu", torch.float32, compiled=True)
    assert traced["unique_graphs"] == 7, "one for all blocks, the norm, the softmax, four shapes of weights"
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_products_of_a_gpu_train_alike(
    compiled: bool, monkeypatch: pytest.MonkeyPatch, traced: Counter[str]
) -> None:
    want_loss, want = loss_and_gradients("cpu", torch.float32, compiled=False)

    def on_gpu(a: Tensor, b: Tensor) -> Tensor:
        assert a.dtype == b.dtype == torch.bfloat16
        return bitlinear.mm_fp32(a, b)

    monkeypatch.setattr(bitlinear, "code_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(bitlinear, "product", on_gpu)
    monkeypatch.setattr(cross_entropy, "product", on_gpu)
    loss, gradients = loss_and_gradients("cpu", torch.bfloat16, compiled)
    assert near(loss, gradients, want_loss, want)


def near(loss: Tensor, gradients: dict[str, Tensor], want_loss: Tensor, want: dict[str, Tensor]) -> bool:
    """As near as bf16 is to fp32: a few of a hundred codes differ."""
    far = [n for n, g in gradients.items() if (g.cpu().float() - want[n]).norm() > 0.1 * want[n].norm()]
    return not far and abs(loss.item() - want_loss.item()) < 0.02


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_computes_what_a_cpu_does() -> None:
    want = loss_and_gradients("cpu", torch.float32, compiled=False)
    for compiled in (False, True):
        assert near(*loss_and_gradients("cuda", torch.bfloat16, compiled), *want)
