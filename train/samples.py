"""Texts from fixed prompts, so that one can read how a model grows: samples.jsonl, a line a prompt and step.

The noise of a prompt is the same at every step: what changes in its text is the weights' doing. Sampling uses random
numbers of its own and changes nothing in the run.
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from shared.tokenizer import Tokenizer
from train import metrics
from train.generate import generate
from train.model import Model
from train.runtime import eager

PROMPTS = (
    "The",
    "Once upon a time",
    "The capital of France is",
    "Water is made of",
    "In the year 1969,",
    "Children learn to read by",
)
TOKENS = 64
TEMPERATURE, TOP_P = 0.8, 0.95


def sample_records(
    model: Model, tokenizer: Tokenizer, *, step: int, length: int, seed: int
) -> Iterator[dict[str, Any]]:
    """The lines of samples.jsonl for the model after update `step`, one by one; the text is None if it diverged."""
    for i, prompt in enumerate(PROMPTS):
        ids = encode(tokenizer, prompt)[: length // 2]  # only a toy length cuts a prompt
        generator = torch.Generator().manual_seed(seed + i)
        text: str | None = None
        with suppress(ValueError):
            text = continued(model, tokenizer, ids, TOKENS, length, TEMPERATURE, TOP_P, generator)
        yield {"step": step, "prompt": prompt, "text": text}


def last_complete(path: Path, step: int) -> int:
    """The last step up to `step` whose samples are all in the log, 0 when there is none."""
    steps = [line["step"] for line in metrics.undamaged(path)]
    return max((s for s in set(steps) if s <= step and steps.count(s) == len(PROMPTS)), default=0)


def encode(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The prompt as the beginning of a document."""
    return [tokenizer.identity.bos_id, *tokenizer.processor.encode(prompt)]


def continued(
    model: Model,
    tokenizer: Tokenizer,
    ids: list[int],
    tokens: int,
    length: int,
    temperature: float,
    top_p: float,
    generator: torch.Generator,
) -> str:
    """The text of `ids` and of up to `tokens` ids that the model adds, up to the end of the document or of `length`."""
    end = tokenizer.identity.eos_id
    with eager(model):
        added = generate(
            model, ids, tokens, length=length, temperature=temperature, top_p=top_p, generator=generator, stop=end
        )
    text: str = tokenizer.processor.decode(ids + added)
    return text
