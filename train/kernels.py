"""Where the time of a step goes: operations and kernels as torch's profiler sees them, in a handful of groups."""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

GROUPS = (
    "products forward",
    "products backward",
    "attention",
    "norm, quantise, RoPE",
    "head and loss",
    "update",
    "rest",
)


def kernels_of_cuda(work: Callable[[], None]) -> list[tuple[str, float]]:
    """(group, microseconds on the device) of each kernel."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        work()
        torch.cuda.synchronize()
    events = [e for e in profiled.events() if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    return [(kernel_group(event.name), event.self_device_time_total) for event in events]


def operations_of_host(work: Callable[[], None]) -> list[tuple[str, float]]:
    """(group, microseconds on the host) of each operation."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        work()
    return [(group_of(lineage(event)), event.self_cpu_time_total) for event in profiled.events()]


def lineage(event: Any) -> list[str]:
    """Names of an operation and of all that called it, from the inside out."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return names


def group_of(names: list[str]) -> str:
    """The group of an operation of eager PyTorch."""
    callers = " ".join(names)
    if "ChunkedCrossEntropy" in callers or "embedding" in callers:
        return "head and loss"
    if "scaled_dot_product" in callers:
        return "attention"
    if names[0].removeprefix("aten::") in ("mm", "_int_mm", "addmm", "bmm") or "mm_fp32" in names[0]:
        return "products backward" if "Backward" in callers else "products forward"
    if any(name in callers for name in ("QuantizedProduct", "RMSNorm", "SwiGLUNorm", "Rotate")):
        return "norm, quantise, RoPE"
    return "rest"


def kernel_group(name: str) -> str:
    """The group of a CUDA kernel. Forward and backward products have the same kernels: all count as forward."""
    low = name.lower()
    if "flash" in low or "fmha" in low or "attention" in low:
        return "attention"
    if any(part in low for part in ("gemm", "nvjet", "cutlass", "xmma")):
        return "products forward"
    if "softmax" in low or "embedding" in low or "scatter" in low or "gather" in low:
        return "head and loss"
    return "norm, quantise, RoPE" if "triton" in low else "rest"
