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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from train.bitlinear import BitLinear, quantize_activations
from train.model import Model, Projection
from train.runtime import eager


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
            (matrix, matrix.weight.clone(), None if matrix.codes is None else matrix.codes.clone(), grad_norm(matrix))
            for matrix in model.projections()
        ]

    @torch.no_grad()
    def measure(self, tokens: Tensor) -> Readings:
        """After the update. `tokens` (B, T) int64 are the inputs whose activations are looked at."""
        seen = activations(self._model, tokens)
        found = {
            (matrix.layer, matrix.name): {
                **({} if codes is None else of_codes(matrix, codes)),
                **seen[matrix.linear],
                **of_weights(matrix.weight, weight),
                "grad_norm": norm,
            }
            for matrix, weight, codes, norm in self._before
        }
        self._before = []
        values = torch.stack([torch.stack([each.float() for each in row.values()]) for row in found.values()])
        names = list(next(iter(found.values())))
        return Readings(list(found), names, values, time.monotonic() - self._began)


def of_codes(matrix: Projection, before: Tensor) -> dict[str, Tensor]:
    """Of codes (N, K) now and before an update, which share one scale: scalars."""
    codes, scale = matrix.codes, matrix.scale
    assert codes is not None and scale is not None
    return {
        "minus": _share(codes == -1),
        "zero": _share(codes == 0),
        "plus": _share(codes == 1),
        "flipped": _share(codes != before),
        "scale": scale[0],
    }


def of_weights(weight: Tensor, before: Tensor) -> dict[str, Tensor]:
    return {
        "weight_norm": torch.linalg.vector_norm(weight),
        "update_norm": torch.linalg.vector_norm(weight - before),
    }


def grad_norm(matrix: Projection) -> Tensor:
    """The norm of a projection's gradient as it stands, a scalar."""
    gradient = matrix.linear.weight.grad
    assert gradient is not None, "a probe comes after backward"
    norm: Tensor = torch.linalg.vector_norm(gradient[matrix.rows])
    return norm


def activations(model: Model, tokens: Tensor) -> dict[torch.nn.Module, dict[str, Tensor]]:
    """What enters each matrix for tokens (B, T), measured by hooks that are gone afterwards: scalars by module."""
    found: dict[torch.nn.Module, dict[str, Tensor]] = {}

    def look(linear: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].flatten(0, -2)  # (M, K)
        found[linear] = {"absmax": x.float().abs().amax(-1).mean()}
        if isinstance(linear, BitLinear):
            codes, _ = quantize_activations(x)
            found[linear]["saturated"] = _share(codes.abs() >= 127)

    linears = dict.fromkeys(matrix.linear for matrix in model.projections())
    hooks = [linear.register_forward_pre_hook(look) for linear in linears]
    try:
        with torch.no_grad(), eager(model):
            model.hidden_states(tokens, None)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _share(mask: Tensor) -> Tensor:
    """Which part of a mask is true, a scalar; counted in whole numbers."""
    return torch.count_nonzero(mask) / mask.numel()
