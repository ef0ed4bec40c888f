"""Section 2 of the design written down a second time, plainly and slowly, with nothing of prep in it."""

import hashlib
import itertools
from dataclasses import dataclass, field

from sentencepiece import SentencePieceProcessor

from shared.permutation import Permutation


@dataclass(frozen=True)
class Text:
    """One row of the source."""

    text: str | None
    id: str
    url: str
    file: str
    row: int


@dataclass
class Expected:
    """What a data set must hold."""

    tokens: dict[str, list[int]] = field(default_factory=lambda: {"train": [], "val": []})
    documents: dict[str, list[tuple[int, int, str, str, str, int, bytes]]] = field(
        default_factory=lambda: {"train": [], "val": []}
    )
    last: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=lambda: {"empty": 0, "in_val": 0, "after_full": 0})


def in_order(units: list[list[Text]], order: str, seed: int) -> list[Text]:
    places = range(len(units))
    if order == "shuffled":
        places = Permutation(len(units), tag="units/1", data_id="", seed=seed)(places).tolist()
    return [text for place in places for text in units[place]]


def expect(texts: list[Text], sp: SentencePieceProcessor, budget: dict[str, int], seed: int) -> Expected | None:
    """The data set of `texts` in their order; None when they do not fill the budget."""
    out = Expected()
    n, v = budget["train"], budget["val"]
    limit = min(2**63, 2**66 * v // (v + n))
    val_hashes: set[bytes] = set()
    for t in texts:
        if all(len(out.tokens[split]) == budget[split] for split in budget):
            break
        if not t.text:
            out.skipped["empty"] += 1
            continue
        digest = hashlib.sha256(t.text.encode()).digest()
        draw = int.from_bytes(hashlib.sha256(b"holdout:%d:" % seed + digest).digest()[:8], "big")
        if draw < limit and len(out.tokens["val"]) < v:
            split = "val"
            val_hashes.add(digest)
        elif draw < limit and digest in val_hashes:
            out.skipped["in_val"] += 1
            continue
        elif len(out.tokens["train"]) < n:
            split = "train"
        else:
            out.skipped["after_full"] += 1
            continue
        ids = [sp.bos_id(), *sp.encode(t.text), sp.eos_id()]
        start = len(out.tokens[split])
        kept = ids[: budget[split] - start]
        out.tokens[split] += kept
        out.documents[split].append((start, len(kept), t.id, t.url, t.file, t.row, digest))
        if len(out.tokens[split]) == budget[split]:
            out.last[split] = (t.id, len(kept), len(ids) - len(kept))
    return out if all(len(out.tokens[split]) == budget[split] for split in budget) else None


def label_bytes(sp: SentencePieceProcessor, tokens: list[int]) -> int:
    """Bytes of text behind the labels of a split: all its tokens but the first."""
    total = 0
    for before, token in itertools.pairwise(tokens):
        if sp.is_control(token) or sp.is_unknown(token):
            continue
        size = 1 if sp.is_byte(token) else len(sp.id_to_piece(token).replace("▁", " ").encode())
        total += size - (before == sp.bos_id())
    return total
