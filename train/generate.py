"""Sampling from a model with a key-value cache.

Activations are quantised token by token, so a token's codes do not depend on how many are fed at once: with the cache
come the same logits as without, up to the order in which attention adds.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from train.model import Cache, Model


@torch.no_grad()
def generate(
    model: Model,
    prompt: Sequence[int],
    tokens: int,
    *,
    length: int,
    temperature: float,
    top_p: float,
    generator: torch.Generator,
    stop: int | None = None,
) -> list[int]:
    """Up to `tokens` ids that follow `prompt`, fewer where `stop` (which is included) or position `length` is reached.

    temperature 0 takes the likeliest id; top_p < 1 draws from the fewest likeliest ids whose probabilities reach it.
    `generator`, on the CPU, is all the randomness there is: the model and the global generators stay as they were.
    ValueError for a prompt that leaves no room, or numbers outside their range.
    """
    check(prompt, temperature, top_p, length)
    device = model.embedding.device
    room = min(tokens, length - len(prompt))
    cache = Cache(model, batch=1, capacity=len(prompt) + room)
    ids, fed = list(prompt), 0
    while len(ids) < len(prompt) + room:
        logits = model(torch.tensor([ids[fed:]], device=device), cache)[0, -1]
        fed = len(ids)
        ids.append(draw(logits.cpu(), temperature, top_p, generator))
        if ids[-1] == stop:
            break
    return ids[len(prompt) :]


def check(prompt: Sequence[int], temperature: float, top_p: float, length: int) -> None:
    """ValueError for what cannot be sampled."""
    if not 1 <= len(prompt) < length:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens; the model takes 1 to {length - 1} and writes after them"
        )
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature {temperature}: give 0 (always the likeliest token) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top-p {top_p}: give a number above 0 and at most 1")


def draw(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One id from logits (V,). ValueError when they are not finite, as a diverged model's may be."""
    if not logits.isfinite().all():
        raise ValueError("the model's logits are not finite: it has diverged and cannot be sampled from")
    if temperature == 0:
        return int(logits.argmax())
    probabilities, ids = ((logits.double() - logits.max()) / temperature).softmax(-1).sort(descending=True, stable=True)
    above = probabilities.cumsum(-1) - probabilities  # what the likelier ids hold together
    kept = probabilities[above < top_p]
    return int(ids[torch.multinomial(kept, 1, generator=generator)])
