"""Which documents are validation, and which document goes where until both splits are full.

A document's side depends on its text alone, so exact duplicates are always on the same side.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field


def threshold(train_tokens: int, val_tokens: int) -> int:
    """Below which a document's 64-bit draw is on the val side: four times val's share of the tokens, at most a half.

    Four times, so that val is full after about a quarter of the source and the rest goes to train.
    """
    return min(1 << 63, (1 << 66) * val_tokens // (val_tokens + train_tokens))


def is_val(text_sha256: bytes, seed: int, limit: int) -> bool:
    """Whether a document is on the val side; `limit` is `threshold`'s."""
    draw = hashlib.sha256(b"holdout:%d:" % seed + text_sha256).digest()
    return int.from_bytes(draw[:8], "big") < limit


@dataclass(frozen=True)
class Kept:
    """A document that goes to a split: its place in the unit, and how many of its tokens are kept."""

    document: int
    split: str
    tokens: int
    dropped: int


@dataclass
class Room:
    """What the splits still take. `left` counts tokens; `held` are the hashes that stand in val."""

    left: dict[str, int]
    held: set[bytes] = field(default_factory=set)

    @property
    def full(self) -> bool:
        return not any(self.left.values())

    def place(self, lengths: Sequence[int], hashes: Sequence[bytes], val_side: Sequence[bool]) -> "Placed":
        """Place documents in order until both splits are full."""
        kept: list[Kept] = []
        in_val = after_full = read = 0
        for i, (length, digest, on_val_side) in enumerate(zip(lengths, hashes, val_side, strict=True)):
            if self.full:
                break
            read += 1
            split = "val" if on_val_side and self.left["val"] else "train"
            if on_val_side and split == "train" and digest in self.held:
                in_val += 1
                continue
            if not self.left[split]:
                after_full += 1
                continue
            tokens = min(length, self.left[split])
            self.left[split] -= tokens
            if split == "val":
                self.held.add(digest)
            kept.append(Kept(i, split, tokens, length - tokens))
        return Placed(kept, read, in_val, after_full)


@dataclass(frozen=True)
class Placed:
    """Where the first `read` documents of a unit went; the rest came after both splits were full."""

    kept: list[Kept]
    read: int
    in_val: int
    after_full: int
