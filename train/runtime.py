"""What a run executes on: chosen once at its first start, stored in config.json, reused by every resume.

Each field can change bits, so together they belong to a run's identity. Nothing here knows about data or files.
"""

import ctypes
import gc
import os
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from platform import node
from typing import Any

import torch

from train.config import ModelConfig
from train.model import Model

LADDER = (32, 16, 8, 4, 2, 1)  # micro-batches tried, in sequences
CPU_MICRO = 2  # 95m: as fast as 4, in 4 GB instead of 6

# Dense bf16 FLOP/s with fp32 accumulation, from the vendors' data sheets, by the name that CUDA reports.
PEAK_FLOPS = {
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
}


@dataclass(frozen=True)
class Runtime:
    """The resolved choices."""

    device: str  # cpu, cuda or mps
    precision: str  # of matrix products and activations: bf16 or fp32; weights and moments are always fp32
    threads: int  # of torch on the CPU; the number changes the order of some sums
    micro: int | None  # sequences at once on one device; None until the first start has found what fits
    compile: bool  # torch.compile
    deterministic: bool
    world_size: int  # processes that share a global batch

    @property
    def compute(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


def choose(device: str, micro: int | None, world_size: int = 1) -> Runtime:
    """The best this machine offers for `device` (auto, cpu, cuda, mps). ValueError when it has no such device."""
    present = [name for name, there in _devices().items() if there]
    if device != "auto" and device not in present:
        raise ValueError(f"--device {device}: this machine or this torch has none; there is {', '.join(present)}")
    device = present[0] if device == "auto" else device
    return Runtime(
        device=device,
        precision="bf16" if _has_bf16(device) else "fp32",
        threads=torch.get_num_threads(),
        micro=micro,
        compile=device == "cuda",
        deterministic=True,
        world_size=world_size,
    )


def to_dict(runtime: Runtime) -> dict[str, Any]:
    return asdict(runtime)


def from_dict(value: dict[str, Any]) -> Runtime:
    """The inverse of `to_dict`. ValueError when fields are missing or unknown."""
    try:
        return Runtime(**value)
    except TypeError as error:
        raise ValueError(f"the resolved runtime cannot be read: {error}") from None


def prepare(runtime: Runtime, local_rank: int = 0) -> torch.device:
    """Set this process up as `runtime` says, before anything touches a GPU; the device to put tensors on.

    ValueError when this machine cannot run it, a resume on another machine for one.
    """
    if runtime.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when CUDA starts: first of all
    if not _devices()[runtime.device]:
        raise ValueError(f"this run was started on {runtime.device}, which this machine or this torch does not have")
    if runtime.device == "cpu" and runtime.precision == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise ValueError("this run was started in bf16, which this processor does not have; go on where it started")
    torch.set_num_threads(runtime.threads)
    # "medium" has a CPU multiply fp32, which is attention alone there, by oneDNN instead of MKL, on AMD three times as
    # fast. Units that it may round the factors to bf16 for (AMX) get queries, keys and values that are bf16 already.
    on_bf16_cpu = runtime.device == "cpu" and runtime.precision == "bf16"
    torch.set_float32_matmul_precision("medium" if on_bf16_cpu else "highest")
    if runtime.deterministic:
        make_deterministic()
    if runtime.device == "cpu":
        _keep_memory()
    if runtime.device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"process {local_rank + 1} of {node()} has no GPU: this machine shows {torch.cuda.device_count()}; "
                "start as many processes as each machine has GPUs (torchrun --nproc-per-node, make train GPUS=)"
            )
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    return torch.device(runtime.device)


def make_deterministic() -> None:
    torch.use_deterministic_algorithms(True)
    # Filling fresh memory with NaN is a debugging aid that costs bandwidth.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    # cuDNN's attention is not covered by deterministic mode, the memory-efficient backward adds atomically.
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)


def _keep_memory() -> None:
    """Have glibc keep freed memory for the next tensor: given back, it comes page by page: a quarter of a step."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return
    mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large block
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nothing goes back
    mallopt(-2, 64 << 20)  # M_TOP_PAD: grow by this much


def compile_model(model: Model) -> None:
    """Compile each block: alike as they are, they share one compilation.

    Nothing about the result depends on what ran before: each shape has its own kernels, and none is chosen by timing.
    """
    from torch._inductor import config as inductor  # slow to import, and only needed here

    inductor.dynamic_scale_rblock = False  # would time two sizes of a reduction and change its order of adding
    if hasattr(inductor, "deterministic"):  # torch >= 2.9
        inductor.deterministic = True
    # Inside DistributedDataParallel dynamo would cut each block in two, to send gradients earlier: a block is small.
    torch._dynamo.config.optimize_ddp = False
    for module in [*model.layers, model.norm]:
        module.compile(dynamic=False)
    for linear in model.bitlinears():
        linear.derive = torch.compile(linear.derive, dynamic=False)
    model.softmax = torch.compile(model.softmax, dynamic=False)


@contextmanager
def eager(model: Model) -> Iterator[None]:
    """Run the model uncompiled for the length of the block: evaluation and sampling bring shapes of their own, and the
    kernels that train must not be compiled anew for those, in a run and not in its resume."""
    if model.layers[0]._compiled_call_impl is None:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def ladder(sequences: int, device: str) -> list[int]:
    """The micro-batches to try for this many sequences a process: those that divide them, largest first.

    A CPU gains nothing from many and does not say when memory runs out: it starts low.
    """
    return [micro for micro in LADDER if sequences % micro == 0 and (device != "cpu" or micro <= CPU_MICRO)]


def fit_micro(runtime: Runtime, candidates: Sequence[int], attempt: Callable[[int], None]) -> Runtime:
    """`runtime` with the first micro-batch that `attempt` gets through without running out of device memory.

    `attempt(micro)` runs forward and backward on that many sequences, with the optimizer's state in place; what it
    leaves behind is the caller's to clear. ValueError when not even the last fits.
    """
    for micro in candidates:
        try:
            attempt(micro)
            return replace(runtime, micro=micro)
        except torch.OutOfMemoryError:
            pass  # the exception holds what the attempt has made: until here
        gc.collect()
        if runtime.device == "cuda":
            torch.cuda.empty_cache()
    raise ValueError(
        f"{runtime.device} runs out of memory with {candidates[-1]} sequence at once; use a device with more memory"
    )


def flops_per_token(model: ModelConfig, length: int) -> int:
    """FLOP of training on one token: 6 a matrix element (head included, norms not), and attention's 12 L C T."""
    assert model.vocab_size is not None
    projections = model.hidden * model.head_dim * 2 * (model.heads + model.kv_heads)
    matrices = model.vocab_size * model.hidden + model.layers * (projections + 3 * model.hidden * model.ffn)
    return 6 * matrices + 12 * model.layers * model.hidden * length


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s of a device in the table, else None: an MFU against a guessed peak says nothing."""
    return PEAK_FLOPS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_memory(device: torch.device) -> int | None:
    """Most bytes taken so far: by tensors on CUDA, by the whole process on a CPU; None where nobody counts."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit if device.type == "cpu" else None


def _devices() -> dict[str, bool]:
    """Best first."""
    return {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}


def _has_bf16(device: str) -> bool:
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    units = device == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return bool(units)
