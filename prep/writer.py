"""The data set on its way to disk, so that a kill at any instant costs at most the piece in hand.

A build lives in `<out>.partial/`. Tokens and index rows are only ever appended, and journal.json says how much of each
file counts. A commit appends, fsyncs the files (and the folder of a new one), then replaces the journal: written aside,
fsynced, renamed, folder fsynced. What lies beyond the journal's lengths does not exist: the next start cuts it off. So
each piece is either wholly in the data set or not at all, and the bytes do not depend on where the kills fell.

At the end the index is written from its rows, then the other files, manifest.json last. Then the journal is removed: a
folder with a manifest and no journal is whole, and only its rows must go and its name change (`job.publish`).
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from prep.encoder import Ids
from prep.holdout import Kept, Placed, Room
from prep.plan import Cursor
from prep.split_writer import SplitWriter
from prep.worker import Result
from shared.durable import fsync_folder, write_durably

JOURNAL = "journal.json"


class Writer:
    """All splits of a build and their journal. The only thing that writes."""

    def __init__(
        self, folder: Path, budget: dict[str, int], shard_tokens: int, text_bytes: Callable[[Ids], int]
    ) -> None:
        self.folder = folder
        self._text_bytes = text_bytes
        journal = _read_journal(folder)
        assert journal is not None, "a build starts with its journal"
        self._config = journal["config"]
        self.cursor = Cursor(**journal.get("cursor", {}))
        self.seconds: float = journal.get("seconds", 0.0)
        self.starts: int = journal.get("starts", 0) + 1
        self.parity: int = journal.get("parity", 0)
        self.skipped: dict[str, int] = journal.get("skipped", {"empty": 0, "in_val": 0, "after_full": 0})
        self.splits = {
            split: SplitWriter(folder, split, tokens, shard_tokens, journal.get("splits", {}).get(split, {}))
            for split, tokens in budget.items()
            if tokens
        }
        self.room = Room({split: tokens - self._used(split) for split, tokens in budget.items()})
        if "val" in self.splits:
            self.room.held.update(self.splits["val"].hashes())

    def commit(self, result: Result, file: str, cursor: Cursor, seconds: float) -> None:
        """Place the documents of `result`, write them, and say so in the journal."""
        lengths = np.diff(result.offsets).tolist()
        placed = self.room.place(lengths, result.hashes, result.val_side)
        for split, writer in self.splits.items():
            kept = [k for k in placed.kept if k.split == split]
            if kept:
                writer.append(result, kept, file, self._utf8_bytes(result, kept))
        self._count(result, placed)
        self.cursor, self.seconds = cursor, seconds
        self.parity += result.parity
        for writer in self.splits.values():
            writer.sync()
        self._write_journal()

    def close(self) -> None:
        for writer in self.splits.values():
            writer.close()

    def end(self) -> None:
        """Give the journal up: from here on the folder only lacks `job.publish`."""
        (self.folder / JOURNAL).unlink()
        fsync_folder(self.folder)

    def _used(self, split: str) -> int:
        return self.splits[split].tokens if split in self.splits else 0

    def _count(self, result: Result, placed: Placed) -> None:
        """Rows after the document that fills the last split are not counted as anything."""
        empty = result.empty_rows
        if self.room.full and placed.read:
            empty = empty[empty < result.rows[placed.read - 1]]
        self.skipped["empty"] += len(empty)
        self.skipped["in_val"] += placed.in_val
        self.skipped["after_full"] += placed.after_full

    def _utf8_bytes(self, result: Result, kept: list[Kept]) -> int:
        whole = np.array([k.document for k in kept if not k.dropped], dtype=np.int64)
        cut = [result.tokens[result.offsets[k.document] :][: k.tokens] for k in kept if k.dropped]
        return int(result.utf8_bytes[whole].sum()) + sum(map(self._text_bytes, cut))

    def _write_journal(self) -> None:
        state = {
            "config": self._config,
            "cursor": asdict(self.cursor),
            "seconds": self.seconds,
            "starts": self.starts,
            "parity": self.parity,
            "skipped": self.skipped,
            "splits": {split: writer.state() for split, writer in self.splits.items()},
        }
        write_journal(self.folder, state)


def write_journal(folder: Path, state: dict[str, Any]) -> None:
    write_durably(folder / JOURNAL, json.dumps(state, ensure_ascii=False).encode())


def journal_config(folder: Path) -> dict[str, Any] | None:
    """What the unfinished build in `folder` is building, None when there is no journal."""
    journal = _read_journal(folder)
    return journal["config"] if journal else None


def _read_journal(folder: Path) -> dict[str, Any] | None:
    try:
        journal = json.loads((folder / JOURNAL).read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        raise ValueError(f"{folder / JOURNAL}: damaged; start the build again with --restart") from None
    assert isinstance(journal, dict)
    return journal
