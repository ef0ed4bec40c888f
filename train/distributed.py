"""Several processes as one trainer, started by torchrun. Alone, every function here is the identity.

Ranks hold equal weights and take rows r, r + W, ... of each global batch; gradients and losses are summed, so all ranks
see the same numbers and decide the same. Only rank 0 writes.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Which of its machine's devices this process takes."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_writer() -> bool:
    return rank() == 0


@contextmanager
def joined() -> Iterator[None]:
    """Join the other processes for the length of the block: nccl between GPUs, gloo between CPUs."""
    if world_size() == 1:
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def barrier() -> None:
    """Wait until all ranks are here."""
    any_rank(False)


def sum_in_place(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over all ranks: one exchange for all, which are of one dtype and on one device."""
    if world_size() == 1:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def any_rank(value: bool) -> bool:
    """Whether `value` holds on any rank: how all ranks agree to stop. It does not wait for the device."""
    if world_size() == 1:
        return value
    flag = torch.tensor(int(value))
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag.item())


def smallest(value: int) -> int:
    """The smallest `value` of all ranks."""
    if world_size() == 1:
        return value
    number = torch.tensor(value)
    dist.all_reduce(number, dist.ReduceOp.MIN)
    return int(number.item())
