"""verify --deep: documents read again from the source and encoded again by plain SentencePiece."""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from prep.lines import parse_json, parse_text, plain_lines, zst_lines
from prep.sources import LocalSource, Unit, kind_of
from shared.index import Document, index_name, read_index
from shared.manifest import MANIFEST, Manifest, Problem, open_stream
from shared.shards import TokenStream
from shared.tokenizer import Tokenizer

if TYPE_CHECKING:
    from prep.hub import HubSource

BATCH_ROWS = 1024


@dataclass(frozen=True)
class Pick:
    """A document to compare: row `row` of the index of `split`."""

    split: str
    row: int
    document: Document


def reencode(
    folder: Path, manifest: Manifest, tokenizer: Tokenizer, source: "LocalSource | HubSource", count: int
) -> tuple[int, list[Problem]]:
    """Compare `count` documents with what `source` gives for them; returns how many, and what is wrong.

    They are spread evenly over each split, its first and last among them. ValueError when it is not the source
    that the data set was made from.
    """
    picks = [pick for split, n in _shares(manifest, count).items() for pick in _spread(folder, manifest, split, n)]
    streams = {split: open_stream(folder, manifest, split) for split in manifest.splits}
    problems: list[Problem] = []
    for name, group in groupby(
        sorted(picks, key=lambda p: (p.document.file, p.document.row)), lambda p: p.document.file
    ):
        members = list(group)
        if name not in source.names:
            raise ValueError(f"the source has no file {name}; give the --source that the data set was made from")
        texts = texts_of(source, name, [pick.document.row for pick in members])
        for pick, text in zip(members, texts, strict=True):
            if text is None or sha256(text.encode()).digest() != pick.document.text_sha256:
                _require_the_same(source, manifest, name)
                where = f"row {pick.row}: row {pick.document.row} of {name}"
                problems.append(Problem(index_name(pick.split), f"{where} holds another text than it says"))
            else:
                problems += _compare(manifest, streams[pick.split], tokenizer, pick, text)
    return len(picks), problems


def _shares(manifest: Manifest, count: int) -> dict[str, int]:
    """Half of `count` from val, as far as it has them, the rest from train."""
    val = min(count // 2, manifest.splits["val"].documents) if "val" in manifest.splits else 0
    train = min(count - val, manifest.splits["train"].documents)
    return {"train": train, "val": val} if val else {"train": train}


def _spread(folder: Path, manifest: Manifest, split: str, count: int) -> Iterator[Pick]:
    rows = np.unique(np.linspace(0, manifest.splits[split].documents - 1, count).round().astype(np.int64))
    first = 0
    for batch in read_index(folder, split):
        here = rows[(rows >= first) & (rows < first + len(batch))]
        for row, document in zip(here.tolist(), batch.take(pa.array(here - first)).to_pylist(), strict=True):
            yield Pick(split, row, Document(**document))
        first += len(batch)


def _compare(manifest: Manifest, stream: TokenStream, tokenizer: Tokenizer, pick: Pick, text: str) -> Iterator[Problem]:
    identity, document, split = tokenizer.identity, pick.document, manifest.splits[pick.split]
    ids = np.array([identity.bos_id, *tokenizer.processor.encode(text), identity.eos_id])
    found = stream[document.start : document.start + document.length]
    wanted = ids[: document.length]  # a complete document ends in </s>, which only all of its ids do
    if not np.array_equal(found, wanted):
        n = min(len(found), len(wanted))
        first = int(np.flatnonzero([*(found[:n] != wanted[:n]), True])[0])
        ends = np.cumsum([shard.tokens for shard in split.shards])
        shard = split.shards[min(int(np.searchsorted(ends, document.start + first, "right")), len(split.shards) - 1)]
        yield Problem(
            shard.file,
            f"token {document.start + first} of {pick.split} (token {first} of document {document.id!r}) "
            "is not what SentencePiece gives for its text",
        )
    elif pick.row == split.documents - 1 and split.last_document.tokens_dropped != len(ids) - document.length:
        yield Problem(
            MANIFEST,
            f"last_document of {pick.split} says {split.last_document.tokens_dropped} tokens were dropped, "
            f"its text has {len(ids) - document.length} more",
        )


def _require_the_same(source: "LocalSource | HubSource", manifest: Manifest, name: str) -> None:
    """A text differs: ValueError if the file does, too, so that a changed source is not held against the data set."""
    stated = {file.name: file.sha256 for file in manifest.source.files}
    if source.identify(name).sha256 != stated.get(name):
        raise ValueError(
            f"{source.where(name)}: is not the file that the data set was made from (another sha256); "
            "give the right --source"
        )


def texts_of(source: "LocalSource | HubSource", name: str, rows: list[int]) -> Iterator[str | None]:
    """The text of each of `rows`, which ascend; None for a row that is not there or has no text."""
    parquet = kind_of(name) == ".parquet"
    found = _parquet_texts(source, name, rows) if parquet else _line_texts(source.path(name), rows)
    at, text = next(found, (-1, None))
    for row in rows:
        if at == row:
            yield text
            at, text = next(found, (-1, None))
        else:
            yield None


def _parquet_texts(source: "LocalSource | HubSource", name: str, rows: list[int]) -> Iterator[tuple[int, str | None]]:
    metadata, first = source.metadata(name), 0
    for group in range(metadata.num_row_groups):
        unit = Unit(name, first, metadata.row_group(group).num_rows, groups=(group, group + 1))
        stop = first + metadata.row_group(group).num_rows
        if any(first <= row < stop for row in rows):
            source.fetch(unit)
            with source.parquet(unit) as file:
                for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=["text"], use_threads=False):
                    here = [row for row in rows if first <= row < first + len(batch)]
                    yield from ((row, batch["text"][row - first].as_py()) for row in here)
                    first += len(batch)
            source.release(unit)
        first = stop


def _line_texts(path: Path, rows: list[int]) -> Iterator[tuple[int, str | None]]:
    kind, wanted = kind_of(path.name), set(rows)
    for row, line in enumerate(zst_lines(path) if kind == ".jsonl.zst" else plain_lines(path, 0)):
        if row in wanted:
            yield row, (parse_text if kind == ".txt" else parse_json)(line)[0]
        if row == rows[-1]:
            return
