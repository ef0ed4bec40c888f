"""Ternary health: what the weights, codes and activations of every projection look like, each probe.every steps.

A line of metrics.jsonl, {"kind": "probe", "step": n, "layers": [...], "timing": {"seconds", "time"}}, stands behind the
train line of n, and holds an object for each layer and projection in the order of the model:

    layer         from 0
    projection    q, k, v, o, gate, up or down: a matrix with a scale of its own, fused with others or not
  of the model after update n, which is that of checkpoint step-n:
    minus, zero, plus    shares of the codes that are -1, 0 and 1; they add up to 1
    scale         s = mean|W|
    saturated     share of the int8 activations that are 127 or -127; absmax puts one of each token there
    absmax        largest |x| of a token's activations, the mean over tokens
    weight_norm   L2 norm of the full-precision latent W
  of update n itself:
    flipped       share of the codes that it changed
    grad_norm     L2 norm of the gradient of the global batch, before the clip
    update_norm   L2 norm of what was added to W

The full-precision twin has no codes: minus, zero, plus, flipped, scale and saturated are not in its objects. A number
that is not finite is null. A step without an update (not finite) has flipped 0 and update_norm 0.

Activations are those of the first sequence of batch n in a forward pass of its own, without gradients and uncompiled:
what is compiled for training never sees a probe, and the numbers are a function of checkpoint step-n and the batch.
All is computed on the device by rank 0 alone, which holds what all ranks hold, and read once, with the step's loss.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from train.bitlinear import BitLinear, quantize_activations
from train.model import Block, Linear, Model
from train.runtime import eager


@dataclass(frozen=True)
class Matrix:
    """One weight of the model, and its projections in the order in which their rows are fused in it."""

    layer: int
    linear: BitLinear | Linear
    rows: dict[str, int]  # projection: out features


@dataclass(frozen=True)
class Readings:
    """What a probe found, on the device: reading it waits for the step to end."""

    projections: list[tuple[int, str]]  # layer and projection, P of them
    names: list[str]  # of the numbers, F of them
    values: Tensor  # (P, F) fp32
    seconds: float  # that the host spent; on CUDA the device works on

    def layers(self) -> list[dict[str, Any]]:
        """The objects of `layers` in a probe line."""
        return [
            {"layer": layer, "projection": projection, **dict(zip(self.names, row, strict=True))}
            for (layer, projection), row in zip(self.projections, self.values.tolist(), strict=True)
        ]


class Probe:
    """Watches one update: made when the gradients are whole, asked to measure when the codes are new."""

    @torch.no_grad()
    def __init__(self, model: Model) -> None:
        """Keep what the update will overwrite: weights and codes, and the norms of gradients that it scales."""
        self._began, self._model = time.monotonic(), model
        self._before = [
            (matrix, matrix.linear.weight.clone(), _codes(matrix.linear), gradient_norms(matrix))
            for matrix in matrices(model)
        ]

    @torch.no_grad()
    def measure(self, tokens: Tensor) -> Readings:
        """After the update. `tokens` (B, T) int64 are the inputs whose activations are looked at."""
        seen = activations(self._model, tokens)
        found: dict[tuple[int, str], dict[str, Tensor]] = {}
        for matrix, weight, codes, grad_norms in self._before:
            first = 0
            for projection, count in matrix.rows.items():
                part = slice(first, first + count)
                found[matrix.layer, projection] = {
                    **({} if codes is None else of_codes(matrix.linear, codes, part)),
                    **seen[matrix.linear],
                    **of_weights(matrix.linear.weight[part], weight[part]),
                    "grad_norm": grad_norms[projection],
                }
                first += count
        self._before = []
        values = torch.stack([torch.stack([each.float() for each in row.values()]) for row in found.values()])
        names = list(next(iter(found.values())))
        return Readings(list(found), names, values, time.monotonic() - self._began)


def matrices(model: Model) -> Iterator[Matrix]:
    """All that are, or in the twin would be, ternary; in the order of the forward pass."""
    c = model.config
    queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
    for i, block in enumerate(model.layers):
        assert isinstance(block, Block)
        yield Matrix(i, block.attention.qkv, {"q": queries, "k": keys, "v": keys})
        yield Matrix(i, block.attention.output, {"o": c.hidden})
        yield Matrix(i, block.ffn.gate_up, {"gate": c.ffn, "up": c.ffn})
        yield Matrix(i, block.ffn.down, {"down": c.hidden})


def of_codes(linear: BitLinear | Linear, before: Tensor, part: slice) -> dict[str, Tensor]:
    """Of some rows of codes (N, K) now and before an update, which share one scale: scalars."""
    assert isinstance(linear, BitLinear)
    codes = linear.codes[part]
    return {
        "minus": _share(codes == -1),
        "zero": _share(codes == 0),
        "plus": _share(codes == 1),
        "flipped": _share(codes != before[part]),
        "scale": linear.scale[part][0],
    }


def of_weights(weight: Tensor, before: Tensor) -> dict[str, Tensor]:
    return {
        "weight_norm": torch.linalg.vector_norm(weight),
        "update_norm": torch.linalg.vector_norm(weight - before),
    }


def gradient_norms(matrix: Matrix) -> dict[str, Tensor]:
    """The norm of each projection's gradient as it stands: scalars by projection."""
    gradient = matrix.linear.weight.grad
    assert gradient is not None, "a probe comes after backward"
    parts = torch.split(gradient, list(matrix.rows.values()))
    return {name: torch.linalg.vector_norm(part) for name, part in zip(matrix.rows, parts, strict=True)}


def activations(model: Model, tokens: Tensor) -> dict[torch.nn.Module, dict[str, Tensor]]:
    """What enters each matrix for tokens (B, T), measured by hooks that are gone afterwards: scalars by module."""
    found: dict[torch.nn.Module, dict[str, Tensor]] = {}

    def look(linear: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].flatten(0, -2)  # (M, K)
        found[linear] = {"absmax": x.float().abs().amax(-1).mean()}
        if isinstance(linear, BitLinear):
            codes, _ = quantize_activations(x)
            found[linear]["saturated"] = _share(codes.abs() >= 127)

    hooks = [matrix.linear.register_forward_pre_hook(look) for matrix in matrices(model)]
    try:
        with torch.no_grad(), eager(model):
            model.hidden_states(tokens, None)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _codes(linear: BitLinear | Linear) -> Tensor | None:
    return linear.codes.clone() if isinstance(linear, BitLinear) else None


def _share(mask: Tensor) -> Tensor:
    """Which part of a mask is true, a scalar; counted in whole numbers."""
    return torch.count_nonzero(mask) / mask.numel()
