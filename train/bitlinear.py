"""BitLinear: ternary weights times 8-bit activations (BitNet b1.58, arXiv 2402.17764; 2B4T, arXiv 2504.12285).

    weights       s = mean|W| (>= 1e-5)                W^ = clip(round(W * (1/s)), -1, 1)        one s a segment
    activations   g = max|x| of a token (>= 1e-5)      x^ = clip(round(x * (127/g)), -128, 127)
    product       y = (x^ W^T) * (g/127) * s           straight-through gradients for both

Rounding is half to even. Scales, codes and rounding are in fp32 (in fp64 where the input is): done in bf16, 6% of the
codes of activations change. x^ W^T is a sum of at most K integers of size <= 128, below 2^24 for K <= 131,072: it is
exact in int32 and in fp32, in whatever order a kernel adds. So all paths of `integer_product` give the same bits.

Shapes: M tokens, K in features, N out features, S segments (q, k, v fused in one matrix are three).
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from train.rows import by_rows, exact_dtype

SMALLEST_SCALE = 1e-5


Derived = tuple[Tensor, Tensor, Tensor]


class BitLinear(nn.Module):
    """y = x W^T with quantised x and W, no bias. `segments` are the out features of the fused matrices, in order.

    `weight` (N, K) is the full-precision latent. From it `quantize` derives what the products use: `codes` (N, K),
    `scale` (N,) and `quantized` = codes x scale (N, K) in the compute dtype. The owner calls it after every change of
    the weight, and may assert `fresh`.
    """

    def __init__(self, in_features: int, segments: tuple[int, ...], compute: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.segments, self.compute = in_features, segments, compute
        self.weight = nn.Parameter(torch.empty(sum(segments), in_features))
        self.codes = self.scale = self.quantized = torch.empty(0)
        self.derive: Callable[..., Derived] = derive  # or the same, compiled
        self._version = -1

    @torch.no_grad()
    def quantize(self) -> None:
        """Rebuild what is derived from the weight."""
        kept_in = code_dtype(self.weight.device)
        self.codes, self.scale, self.quantized = self.derive(self.weight, self.segments, kept_in, self.compute)
        self._version = self.weight._version

    @property
    def fresh(self) -> bool:
        """Whether the codes are those of the weight as it stands, where it stands."""
        return self._version == self.weight._version and self.codes.device == self.weight.device

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) of any float dtype -> (..., N) in the compute dtype."""
        y: Tensor = QuantizedProduct.apply(  # type: ignore[no-untyped-call]
            x.flatten(0, -2), self.weight, self.codes, self.scale, self.quantized
        )
        return y.view(*x.shape[:-1], -1)


def derive(weight: Tensor, segments: tuple[int, ...], kept_in: torch.dtype, compute: torch.dtype) -> Derived:
    """The codes in the dtype `kept_in`, the scale of each row, and their product in the compute dtype."""
    codes, scale = quantize_weight(weight, segments)
    return codes.to(kept_in), scale, (codes * scale[:, None]).to(compute)


def quantize_weight(weight: Tensor, segments: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(N, K) -> codes (N, K) of -1, 0, 1 and each row's scale (N,), constant in a segment; both at least fp32."""
    rows = torch.split(weight.to(exact_dtype(weight.dtype)), list(segments))
    scales = [part.abs().mean().clamp(min=SMALLEST_SCALE) for part in rows]
    codes = [(part * (1 / s)).round_().clamp_(-1, 1) for part, s in zip(rows, scales, strict=True)]
    return torch.cat(codes), torch.cat([s.expand(n) for s, n in zip(scales, segments, strict=True)])


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """(M, K) -> integer codes (M, K) and g/127 of each token (M, 1); both at least fp32."""
    x = x.to(exact_dtype(x.dtype))
    largest = x.abs().amax(-1, keepdim=True).clamp(min=SMALLEST_SCALE)
    return (x * (127 / largest)).round_().clamp_(-128, 127), largest / 127


def integer_product(x_codes: Tensor, w_codes: Tensor) -> Tensor:
    """(M, K) x (N, K) -> (M, N) exact sums, in int32 for int8 codes, else in fp32; never rounded to bf16."""
    if w_codes.dtype == torch.int8 and w_codes.shape[1] > 1:  # for K = 1, torch 2.13 gives wrong sums on a CPU
        return torch._int_mm(x_codes, w_codes.t())
    if w_codes.dtype == torch.bfloat16:
        sums: Tensor = mm_fp32(x_codes, w_codes.t())
        return sums
    return x_codes.float() @ w_codes.float().t()


def product(a: Tensor, b: Tensor) -> Tensor:
    """(M, K) x (K, N) -> (M, N), accumulated in fp32; on CUDA it leaves as fp32 also where the operands are bf16."""
    on_units = a.is_cuda and a.dtype == torch.bfloat16
    result: Tensor = mm_fp32(a, b) if on_units else a @ b
    return result


@torch.library.custom_op("bitnet::mm_fp32", mutates_args=())
def mm_fp32(a: Tensor, b: Tensor) -> Tensor:
    """(M, K) x (K, N) -> (M, N) in fp32 for bf16 operands. An operator, for torch 2.8 cannot compile out_dtype."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


@mm_fp32.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32)


def code_dtype(device: torch.device) -> torch.dtype:
    """What codes are stored and multiplied in: int8 units on CPUs, bf16 units on CUDA, fp32 elsewhere."""
    if device.type == "cpu":
        return torch.int8 if int8_is_exact() else torch.float32
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


@cache
def int8_is_exact() -> bool:
    """Whether this processor's int8 product gives exact sums: on some without VNNI, pairs saturate at 16 bits."""
    x = torch.tensor([-128, 127, -128, 1], dtype=torch.int8).repeat_interleave(16)[:, None].repeat(1, 768)
    w = torch.tensor([-1, 1, 0], dtype=torch.int8).repeat_interleave(16)[:, None].repeat(1, 768)
    x[3::4, ::3], w[3::4, ::5] = 127, -1
    return torch.equal(torch._int_mm(x, w.t()).double(), x.double() @ w.double().t())


class QuantizedProduct(torch.autograd.Function):
    """The forward product on integers; the gradients of the same formula with rounding taken as the identity.

    Straight-through, y = x_q W_q^T has the gradients g W_q and g^T x_q, with x_q = x^ g/127 and W_q = W^ s.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        weight: Tensor,
        w_codes: Tensor,
        w_scale: Tensor,
        w_quantized: Tensor,
    ) -> Tensor:
        compute = w_quantized.dtype

        def quantized(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            codes, scale = quantize_activations(x)
            return codes.to(w_codes.dtype), scale, (codes * scale).to(compute)

        def scaled(sums: Tensor, x_scale: Tensor) -> tuple[Tensor]:
            return ((sums * x_scale).mul_(w_scale).to(compute),)

        x_codes, x_scale, x_quantized = by_rows(quantized, x)
        ctx.save_for_backward(x_quantized, w_quantized)
        ctx.x_dtype = x.dtype  # type: ignore[attr-defined]
        (y,) = by_rows(scaled, integer_product(x_codes, w_codes), x_scale)
        return y

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_quantized, w_quantized = ctx.saved_tensors  # type: ignore[attr-defined]
        (g,) = grads
        grad_x = (g @ w_quantized).to(ctx.x_dtype)  # type: ignore[attr-defined]
        return grad_x, product(g.t(), x_quantized).to(exact_dtype(g.dtype)), None, None, None
