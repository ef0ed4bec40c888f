"""What happens to each token alone between two products: RMSNorm, SwiGLU with its norm, and the rotation of RoPE.

Each is a function of its own to autograd. It keeps its input and nothing of what it computes on the way, which backward
computes again; all in fp32 (fp64 where the input is). A CPU takes a cache-full of tokens at a time through all of it,
so that memory sees each input and each result once; elsewhere a compiler fuses it.

Shapes: M tokens, C features, F features of a half, H heads of D features.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

CACHE = 1_500_000  # bytes at a time for each thread of a CPU: 64 tokens of the 6,144 features before SwiGLU, in fp32

Rotation = tuple[Tensor, Tensor]  # cos and sin of each token, (M, D/2) each


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64: what norms, scales and rounding are computed in."""
    return torch.promote_types(dtype, torch.float32)


def by_rows(function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """`function(*tensors)`, which takes and returns tensors of M rows and treats each row alone.

    A CPU takes as many rows at a time as its cache holds of the first tensor.
    """
    count, at_once = len(tensors[0]), rows_at_once(tensors[0])
    if count <= at_once:
        return function(*tensors)
    whole: tuple[Tensor, ...] = ()
    for start in range(0, count, at_once):
        parts = function(*(tensor[start : start + at_once] for tensor in tensors))
        whole = whole or tuple(part.new_empty(count, *part.shape[1:]) for part in parts)
        for into, part in zip(whole, parts, strict=True):
            into[start : start + at_once] = part
    return whole


def is_eager_on_cpu(x: Tensor) -> bool:
    """Whether each operation on `x` goes through it alone, on a CPU; a GPU and a compiler have rules of their own."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def rows_at_once(x: Tensor) -> int:
    """How many rows of (M, ...) fit the cache in fp32; all M where it is not a CPU, and for a compiler."""
    if not is_eager_on_cpu(x):
        return len(x)
    return max(1, CACHE * torch.get_num_threads() // (4 * x[0].numel())) if len(x) else 0


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, in fp32 or wider."""
    y: Tensor = RMSNorm.apply(x.flatten(0, -2), eps)  # type: ignore[no-untyped-call]
    return y.view(x.shape)


def swiglu_norm(gate_up: Tensor, eps: float) -> Tensor:
    """(..., 2F) -> (..., F): the RMSNorm of silu(gate) * up, in fp32 or wider."""
    y: Tensor = SwiGLUNorm.apply(gate_up.flatten(0, -2), eps)  # type: ignore[no-untyped-call]
    return y.view(*gate_up.shape[:-1], -1)


def rotate(x: Tensor, rotation: Rotation, turned: int, dtype: torch.dtype) -> Tensor:
    """(M, H, D) -> (M, H, D) in `dtype`: the pairs (x[i], x[i + D/2]) of the first `turned` heads by their angles."""
    y: Tensor = Rotate.apply(x, *rotation, turned, dtype)  # type: ignore[no-untyped-call]
    return y


class RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.eps = eps  # type: ignore[attr-defined]

        def rows(x: Tensor) -> tuple[Tensor]:
            x = x.to(exact_dtype(x.dtype))
            return (x * inverse_norm(x, eps),)

        return by_rows(rows, x)[0]

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,), eps = ctx.saved_tensors, ctx.eps  # type: ignore[attr-defined]

        def rows(x: Tensor, g: Tensor) -> tuple[Tensor]:
            return (norm_slope(x.to(g.dtype), g, eps).to(x.dtype),)

        return *by_rows(rows, x, grads[0]), None


class SwiGLUNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, gate_up: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.eps = eps  # type: ignore[attr-defined]

        def rows(gate_up: Tensor) -> tuple[Tensor]:
            gate, up = gate_up.to(exact_dtype(gate_up.dtype)).chunk(2, dim=-1)
            h = F.silu(gate).mul_(up)
            return (h.mul_(inverse_norm(h, eps)),)

        return by_rows(rows, gate_up)[0]

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gate_up,), eps = ctx.saved_tensors, ctx.eps  # type: ignore[attr-defined]

        def rows(gate_up: Tensor, g: Tensor) -> tuple[Tensor]:
            gate, up = gate_up.to(g.dtype).chunk(2, dim=-1)
            silu = F.silu(gate)
            g = norm_slope(silu * up, g, eps)
            of_gate, of_up = torch.ops.aten.silu_backward(g * up, gate), silu.mul_(g)
            return (torch.cat((of_gate.to(gate_up.dtype), of_up.to(gate_up.dtype)), dim=-1),)

        return *by_rows(rows, gate_up, grads[0]), None


class Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: Tensor, cos: Tensor, sin: Tensor, turned: int, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.turned, ctx.x_dtype = turned, x.dtype  # type: ignore[attr-defined]
        return turn(x, cos, sin, turned, dtype)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors  # type: ignore[attr-defined]
        grad = turn(grads[0], cos, -sin, ctx.turned, ctx.x_dtype)  # type: ignore[attr-defined]
        return grad, None, None, None, None


def turn(x: Tensor, cos: Tensor, sin: Tensor, turned: int, dtype: torch.dtype) -> Tensor:
    """What `rotate` says; its inverse with -sin."""

    def rows(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor]:
        a, b = x[:, :turned].to(exact_dtype(x.dtype)).chunk(2, dim=-1)
        cos, sin = cos[:, None], sin[:, None]
        pairs = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
        return (torch.cat((pairs.to(dtype), x[:, turned:].to(dtype)), dim=1),)

    return by_rows(rows, x, cos, sin)[0]


def inverse_norm(x: Tensor, eps: float) -> Tensor:
    """(M, C) -> r = 1 / sqrt(mean(x^2) + eps), (M, 1)."""
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def norm_slope(x: Tensor, g: Tensor, eps: float) -> Tensor:
    """The gradient by x (M, C) of y = x r, given that by y: r (g - x r^2 mean(g x))."""
    r = inverse_norm(x, eps)
    return torch.addcmul(g, x, r * r * (g * x).mean(-1, keepdim=True), value=-1).mul_(r)
