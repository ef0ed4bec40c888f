"""Loss, perplexity and bits per byte on the validation split, and on nothing else.

Bits per byte compares models with different tokenizers: nats over all labels / ln 2 / bytes of text these labels stand
for. It changes nothing in a run: no gradients, no random numbers, the codes stay as they are.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from shared.shards import TokenStream
from shared.tokenizer import Tokenizer, piece_bytes
from train import distributed
from train.model import Model
from train.order import rows
from train.runtime import eager


@dataclass(frozen=True)
class Evaluation:
    """What came out: `loss` is the mean over `tokens` labels in nats; `utf8_bytes` is the text of these labels."""

    sequences: int
    tokens: int
    utf8_bytes: int
    loss: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf  # e^710 is no float

    @property
    def bits_per_byte(self) -> float:
        return self.loss * self.tokens / math.log(2) / self.utf8_bytes if self.utf8_bytes else math.nan

    def to_dict(self, step: int) -> dict[str, Any]:
        """The object of `train eval --json` and of evals/step-N.json."""
        return {
            "split": "val",
            "step": step,
            "sequences": self.sequences,
            "tokens": self.tokens,
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
        }


def evaluate(
    model: Model,
    stream: TokenStream,
    tokenizer: Tokenizer,
    *,
    sequences: int,
    length: int,
    micro: int,
    left: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Evaluate on the first `sequences` of the validation stream, `micro` at a time on each rank.

    `left()` is asked before each batch; where it says yes, the evaluation is left at once and the result is None.
    """
    rank, world_size = distributed.rank(), distributed.world_size()
    nats = torch.zeros((), dtype=torch.float64)
    for start in range(0, sequences, micro * world_size):  # as many rounds on every rank: all ask `left` together
        if left():
            return None
        indices = np.arange(start + rank, min(start + micro * world_size, sequences), world_size)
        if len(indices):
            tokens = torch.from_numpy(rows(stream, indices, length)).to(model.embedding.device)
            with torch.no_grad(), eager(model):
                nats += model.loss(tokens[:, :-1], tokens[:, 1:]).cpu().double() * (len(indices) * length)
    distributed.add_up(nats)
    tokens_in_all = sequences * length
    return Evaluation(
        sequences, tokens_in_all, text_bytes(stream, tokenizer, tokens_in_all), nats.item() / tokens_in_all
    )


def text_bytes(stream: TokenStream, tokenizer: Tokenizer, labels: int) -> int:
    """UTF-8 bytes of the text that the first `labels` labels of a stream, its tokens 1 ... labels, stand for.

    A piece counts its bytes with U+2581 as a space; the first of a document begins with a space that SentencePiece has
    added and that is no text. Over a whole split this is the manifest's utf8_bytes.
    """
    tokens: npt.NDArray[np.uint16] = stream[0 : labels + 1]
    firsts = np.count_nonzero(tokens[:-1] == tokenizer.identity.bos_id)
    return int(piece_bytes(tokenizer.processor)[tokens[1:]].sum()) - int(firsts)
