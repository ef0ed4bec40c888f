"""A GPU that computes nothing: it counts the bytes of live tensors and runs out of memory when a cap is passed.

torch's fake tensors have shapes and storages without content. A dispatch mode sees each new storage, and its end.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from train import bitlinear, cross_entropy, model, rows
from train.config import Config
from train.loop import Loop
from train.model import Model
from train.order import Order


class Allocator(TorchDispatchMode):
    """Counts live bytes; torch.OutOfMemoryError in the operation that passes `cap`, as CUDA raises it."""

    def __init__(self, cap: int) -> None:
        super().__init__()
        self.cap, self.live, self.peak = cap, 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        if self.live > self.cap:
            raise torch.OutOfMemoryError(f"out of memory in {func}")
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class FakeDevice:
    """The training loop of `config` on a device of `cap` bytes, optimizer's state and all."""

    def __init__(self, config: Config, length: int, allocator: Allocator) -> None:
        self.allocator = allocator
        network = Model(config.model, torch.bfloat16)
        network.requantize()
        order = Order("0" * 64, 0, config.batch.sequences, config.batch.sequences)
        stream: Any = np.zeros(config.batch.sequences * length + 1, dtype=np.uint16)
        self.attempt = Loop(config, network, order, stream, length=length, micro=0).attempt

    def peak(self, micro: int) -> int:
        """Most bytes live while accumulating the gradients of two micro-batches."""
        self.allocator.peak = self.allocator.live
        self.attempt(micro)
        return self.allocator.peak


@contextmanager
def fake_device(config: Config, length: int, cap: int, patch: pytest.MonkeyPatch) -> Iterator[FakeDevice]:
    """It computes as CUDA does: codes in bf16, products of bf16 leave as fp32, all rows at once, attention in bf16."""

    def product(a: Tensor, b: Tensor) -> Tensor:
        return bitlinear.mm_fp32(a, b) if a.dtype == torch.bfloat16 else a @ b

    patch.setattr(bitlinear, "code_dtype", lambda device: torch.bfloat16)
    patch.setattr(bitlinear, "product", product)
    patch.setattr(cross_entropy, "product", product)
    patch.setattr(rows, "rows_at_once", len)
    patch.setattr(model, "attention_dtype", lambda device, compute: compute)
    with FakeTensorMode(allow_non_fake_inputs=True), Allocator(cap) as allocator:
        yield FakeDevice(config, length, allocator)
