"""The index of a data set made again from its source, without encoding anything: how long each document is, in tokens,
shows in the shards, where `<s>` stands at each start and nowhere else."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from prep.holdout import is_val
from prep.plan import Cursor, Plan
from prep.rows import RowReader, Rows
from prep.scan import Positions
from prep.sources import LocalSource, all_units
from prep.worker import TEXT_BYTES, hash_texts
from shared.index import SCHEMA
from shared.manifest import Manifest, open_stream
from shared.stop import Stop

if TYPE_CHECKING:
    from prep.hub import HubSource


@dataclass
class _Split:
    """Where the documents of a split start (documents + 1,), how many have been found, and their rows if wanted."""

    starts: Positions
    found: int
    batches: list[pa.RecordBatch] | None

    @property
    def full(self) -> bool:
        return self.found == len(self.starts) - 1


def reindex(
    folder: Path, manifest: Manifest, source: "LocalSource | HubSource", splits: list[str], stop: Stop
) -> dict[str, list[pa.RecordBatch]]:
    """The rows of the indexes of `splits`. All shards must be good. Memory: some 300 bytes a document.

    They are right if their content has the manifest's hash; with another source it will not.
    """
    state = {
        name: _Split(_starts(folder, manifest, name), 0, [] if name in splits else None) for name in manifest.splits
    }
    reader, held = RowReader(source), set[bytes]()
    plan = Plan(all_units(source, manifest.source.unit_bytes), manifest.source.order, manifest.source.seed)
    for step in plan.steps(Cursor()):
        stop.check(f"{folder}: interrupted; nothing was replaced")
        source.fetch(step.unit)
        row = step.row
        while row < step.stop and not all(split.full for split in state.values()):
            piece = reader.read(step.unit, row, step.stop, TEXT_BYTES)
            for rows in piece.rows:
                _take(rows, step.unit.file, manifest, state, held)
            row = piece.next_row
            if piece.ended:
                plan.ended(step.track)
                break
        if step.unit.rows is None or row == step.unit.row + step.unit.rows:
            source.release(step.unit)
        if all(split.full for split in state.values()):
            break
    return {name: state[name].batches or [] for name in splits}


def _starts(folder: Path, manifest: Manifest, split: str) -> Positions:
    stream, found = open_stream(folder, manifest, split), []
    at = 0
    for shard in manifest.splits[split].shards:
        tokens = stream[at : at + shard.tokens]
        found.append(np.flatnonzero(tokens == manifest.tokenizer.bos_id) + at)
        at += shard.tokens
    return np.append(np.concatenate(found), at)


def _take(rows: Rows, file: str, manifest: Manifest, state: dict[str, _Split], held: set[bytes]) -> None:
    """Place the documents as `holdout.Room` did, which had their lengths where we have the place they start at."""
    limit, seed = int(manifest.source.holdout_threshold), manifest.source.seed
    hashes = hash_texts(rows.text)
    kept: dict[str, list[int]] = {name: [] for name in state}
    first = {name: split.found for name, split in state.items()}
    for i, digest in enumerate(hashes):
        val_side = is_val(digest, seed, limit)
        name = "val" if val_side and "val" in state and not state["val"].full else "train"
        if (val_side and name == "train" and digest in held) or state[name].full:
            continue
        if name == "val":
            held.add(digest)
        state[name].found += 1
        kept[name].append(i)
    for name, split in state.items():
        if split.batches is None or not kept[name]:
            continue
        starts = split.starts[first[name] : split.found + 1]
        which = pa.array(kept[name], pa.int64())
        columns = [
            pa.array(starts[:-1]),
            pa.array(np.diff(starts).astype(np.int32)),
            rows.id.take(which),
            rows.url.take(which),
            pa.array([file] * len(which), pa.string()),
            pa.array(rows.row).take(which),
            pa.array([hashes[i] for i in kept[name]], pa.binary(32)),
        ]
        split.batches.append(pa.record_batch(columns, schema=SCHEMA))
