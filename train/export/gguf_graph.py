"""llama.cpp's graph of the architecture `bitnet` in fp64, from the file alone: src/models/bitnet.cpp in PyTorch.

It is written from llama.cpp's source, by its names, and shares nothing with train/model.py but the angles of the
rotary embedding (both use fp32). So it sees what a comparison of tensors by name cannot: a tensor under another's name,
a scale that should be its inverse, a hyperparameter that differs. Products are of real numbers: whatever llama.cpp
rounds its activations to on the way is no part of the file.

Shapes: T positions, C hidden, H query heads, G key/value heads, D of a head, F feed-forward, V vocabulary.
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from train.model import rotary


class Graph:
    """A GGUF file as a function: call it with (T,) int64 for logits (T, V) in fp64.

    ValueError for a tensor or a hyperparameter that llama.cpp would not find, or a tensor that it would not use.
    """

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.fields = {name: field.contents() for name, field in reader.fields.items()}
        self.types = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
        # A copy of each, dequantised: the reader maps the file into memory.
        self.arrays = {t.name: np.array(gguf.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
        self._used: set[str] = set()

    def __call__(self, tokens: Tensor) -> Tensor:
        eps, heads, kv_heads = (
            self.parameter(name)
            for name in ("attention.layer_norm_rms_epsilon", "attention.head_count", "attention.head_count_kv")
        )
        angles = rotary(
            torch.arange(len(tokens)), self.parameter("rope.dimension_count"), self.parameter("rope.freq_base")
        )
        unseen = torch.ones(len(tokens), len(tokens), dtype=torch.bool).triu(1)
        embedding = self.tensor("token_embd.weight")
        x = embedding[tokens]  # (T, C)
        for i in range(self.parameter("block_count")):
            blk = f"blk.{i}."
            y = normed(x, eps) * self.tensor(blk + "attn_norm.weight")
            q = neox(self.product(blk + "attn_q", y).view(len(tokens), heads, -1), angles)  # (T, H, D)
            k = neox(self.product(blk + "attn_k", y).view(len(tokens), kv_heads, -1), angles)  # (T, G, D)
            v = self.product(blk + "attn_v", y).view(len(tokens), kv_heads, -1)
            k, v = (part.repeat_interleave(heads // kv_heads, dim=1) for part in (k, v))
            scores = torch.einsum("thd,shd->hts", q, k) / q.shape[-1] ** 0.5
            y = torch.einsum("hts,shd->thd", scores.masked_fill(unseen, -torch.inf).softmax(-1), v).flatten(1)
            y = normed(y, eps) * self.tensor(blk + "attn_sub_norm.weight")
            x = x + self.product(blk + "attn_output", y)
            y = normed(x, eps) * self.tensor(blk + "ffn_norm.weight")
            y = F.silu(self.product(blk + "ffn_gate", y)) * self.product(blk + "ffn_up", y)  # (T, F)
            y = normed(y, eps) * self.tensor(blk + "ffn_sub_norm.weight")
            x = x + self.product(blk + "ffn_down", y)
        logits = (normed(x, eps) * self.tensor("output_norm.weight")) @ embedding.T
        if extra := self.arrays.keys() - self._used:
            raise ValueError(f"the file has {min(extra)}, which is no tensor of llama.cpp's bitnet")
        return logits

    def parameter(self, name: str) -> Any:
        """A hyperparameter of the architecture."""
        key = f"bitnet.{name}"
        if key not in self.fields:
            raise ValueError(f"the file has no {key}")
        return self.fields[key]

    def tensor(self, name: str) -> Tensor:
        if name not in self.arrays:
            raise ValueError(f"the file has no tensor {name}")
        self._used.add(name)
        return torch.from_numpy(self.arrays[name]).double()

    def product(self, name: str, x: Tensor) -> Tensor:
        """(T, K) -> (T, N) by the matrix of this name, times its scale where it has one."""
        y = x @ self.tensor(name + ".weight").T
        return y * self.tensor(name + ".scale") if name + ".scale" in self.arrays else y


def normed(x: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def neox(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate (T, heads, D) as LLAMA_ROPE_TYPE_NEOX does: the first half of D with the second."""
    cos, sin = (angle.double()[:, None] for angle in angles)  # (T, 1, D/2)
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
