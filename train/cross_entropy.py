"""Cross-entropy over the tied head, a chunk of tokens at a time, so that (tokens, vocabulary) logits never stand whole.

The gradient of a chunk is known as soon as its logits are: it is formed in the forward pass and takes their place, so
that nothing is computed twice (as in Liger Kernel, arXiv 2410.10989). The softmax is in fp32 whatever the products are.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from train.bitlinear import product
from train.rows import by_rows, exact_dtype, is_eager_on_cpu

CHUNK = 4096  # tokens to a product: few, since each adds a whole (V, C) gradient; 4096 x 32,000 logits are 524 MB

Softmax = Callable[[Tensor, Tensor, torch.dtype], tuple[Tensor, Tensor]]


def softmax_slope(logits: Tensor, labels: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Losses (m,) in fp32 or wider of logits (m, V) and labels (m,), and their slope (m, V) in `dtype`.

    The slope is the derivative by the logits: softmax - 1 at the label.
    """
    logits, at = logits.to(exact_dtype(logits.dtype)), labels[:, None]
    p = torch.softmax(logits, -1)
    # The likeliest has p = 1 / sum(exp(logit - largest)), which is never too small for its logarithm.
    losses = logits.amax(-1, keepdim=True) - logits.gather(1, at) - p.amax(-1, keepdim=True).log()
    slope = replace_at(p, at, torch.expm1(-losses))  # p - 1 without cancellation
    return losses.squeeze(1), slope.to(dtype)


def replace_at(x: Tensor, at: Tensor, values: Tensor) -> Tensor:
    """Overwrite x (m, V) in the columns `at` (m, 1) by `values` (m, 1), a number a row; the same tensor."""
    if is_eager_on_cpu(x):
        return x.scatter_(1, at, values)
    # In deterministic mode scatter_ stays out of a compiled kernel, and has the host wait for the GPU.
    return torch.where(torch.arange(x.shape[1], device=x.device) == at, values, x, out=x)


def cross_entropy(hidden: Tensor, head: Tensor, labels: Tensor, softmax: Softmax = softmax_slope) -> Tensor:
    """hidden (M, C) in the compute dtype, head (V, C), labels (M,) int64 -> mean nats, a scalar in fp32 or wider.

    `softmax` is `softmax_slope`, compiled or not.
    """
    loss: Tensor = ChunkedCrossEntropy.apply(hidden, head, labels, softmax)  # type: ignore[no-untyped-call]
    return loss


class ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and gradients in one pass over the chunks."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, hidden: Tensor, head: Tensor, labels: Tensor, softmax: Softmax
    ) -> Tensor:
        weight = head.to(hidden.dtype)
        wanted = any(ctx.needs_input_grad)  # type: ignore[attr-defined]
        losses, grads_hidden, grad_head = [], [], torch.empty(0)
        for h, y in zip(torch.split(hidden, CHUNK), torch.split(labels, CHUNK), strict=True):
            logits = product(h, weight.t())  # (chunk, V)
            each, slope = by_rows(lambda part, to: softmax(part, to, hidden.dtype), logits, y)
            losses.append(each)
            if not wanted:
                continue
            grads_hidden.append(slope @ weight)
            share = product(slope.t(), h).to(exact_dtype(h.dtype))
            grad_head = grad_head.add_(share) if len(grads_hidden) > 1 else share
        if wanted:
            ctx.save_for_backward(torch.cat(grads_hidden), grad_head)
        return torch.cat(losses).mean()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors  # type: ignore[attr-defined]
        each = grads[0] / len(grad_hidden)
        return (grad_hidden * each).to(grad_hidden.dtype), grad_head * each, None, None
