"""Cross-entropy over the tied head, a chunk of tokens at a time, so that (tokens, vocabulary) logits never stand whole.

The gradient of a chunk is known as soon as its logits are: it is formed in the forward pass, so that nothing is
computed twice (as in Liger Kernel, arXiv 2410.10989).
"""

import torch
from torch import Tensor

from train.bitlinear import exact_dtype

CHUNK = 1024  # tokens; their logits over 32,000 ids are 131 MB in fp32


def cross_entropy(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """hidden (M, C) in the compute dtype, head (V, C), labels (M,) int64 -> mean nats, a scalar in fp32 or wider."""
    loss: Tensor = ChunkedCrossEntropy.apply(hidden, head, labels)  # type: ignore[no-untyped-call]
    return loss


class ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and gradients in one pass over the chunks."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        exact = exact_dtype(hidden.dtype)
        weight = head.to(hidden.dtype)
        wanted = any(ctx.needs_input_grad)  # type: ignore[attr-defined]
        grad_hidden = torch.empty_like(hidden) if wanted else None
        grad_head = torch.zeros(head.shape, dtype=exact, device=head.device) if wanted else None
        total = torch.zeros((), dtype=exact, device=hidden.device)
        for start in range(0, len(hidden), CHUNK):
            h, y = hidden[start : start + CHUNK], labels[start : start + CHUNK]
            logits = (h @ weight.t()).to(exact)  # (chunk, V)
            normaliser = logits.logsumexp(-1, keepdim=True)
            total += (normaliser - logits.gather(1, y[:, None])).sum()
            if grad_hidden is not None and grad_head is not None:
                slope = (logits - normaliser).exp_().div_(len(hidden))  # softmax / M, minus one / M at the label
                slope.scatter_add_(1, y[:, None], torch.full_like(normaliser, -1 / len(hidden)))
                slope = slope.to(hidden.dtype)
                grad_hidden[start : start + CHUNK] = slope @ weight
                grad_head += slope.t() @ h
        ctx.save_for_backward(*(g for g in (grad_hidden, grad_head) if g is not None))
        return total / len(hidden)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad_hidden * grads[0], grad_head * grads[0], None
