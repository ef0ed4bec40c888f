"""Damage to a data set, open and hidden, and what verify then says."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prep.verify import verify
from shared.durable import sha256_file
from shared.index import SCHEMA, ContentHash
from shared.manifest import seal, text_of

FILES = [
    "build.json",
    "manifest.json",
    "tokenizer.model",
    "train/00000.npy",
    "train/00001.npy",
    "train/00002.npy",
    "train/documents.parquet",
    "val/00000.npy",
    "val/documents.parquet",
]
EVERY = 10**6  # documents for --deep: all of them


def named(folder: Path, **options: Any) -> list[str]:
    """The files that verify finds bad."""
    result = verify(folder, **options)
    assert result.ok == (not result.bad)
    return [problem.file for problem in result.bad]


def problem_of(data: Path, file: str, **options: Any) -> str:
    """The one problem of a data set, which must be that of `file`."""
    result = verify(data, **options)
    assert [problem.file for problem in result.bad] == [file], result.bad
    return result.bad[0].problem


def flipped(path: Path, position: int, mask: int) -> bytes:
    """Flip bits of one byte in place; returns what the file held before."""
    before = path.read_bytes()
    after = bytearray(before)
    after[position] ^= mask
    path.write_bytes(after)
    return before


def reseal(data: Path, edit: Callable[[dict[str, Any]], None] = lambda manifest: None) -> None:
    """Make every recorded hash true again, then `edit` the manifest and seal it."""
    manifest = json.loads((data / "manifest.json").read_bytes())
    record = json.loads((data / "build.json").read_bytes())
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            shard["sha256"] = sha256_file(data / shard["file"])
        index = data / split["index"]["file"]
        content = ContentHash()
        for batch in pq.read_table(index).select(SCHEMA.names).cast(SCHEMA).to_batches():
            content.update(batch)
        split["index"]["content_sha256"] = content.hexdigest()
        record["indexes"][split["index"]["file"]] = {"bytes": index.stat().st_size, "sha256": sha256_file(index)}
    edit(manifest)
    (data / "manifest.json").write_bytes(text_of(seal(manifest, "id")))
    (data / "build.json").write_bytes(text_of(seal(record, "sha256")))


def set_token(data: Path, file: str, position: int, token: int) -> None:
    """Put `token` at a position of a shard; a negative one counts from its end."""
    content = bytearray((data / file).read_bytes())
    at = 128 + position * 2 if position >= 0 else len(content) + position * 2
    content[at : at + 2] = token.to_bytes(2, "little")
    (data / file).write_bytes(content)


def edit_index(data: Path, split: str, change: Callable[[dict[str, list[Any]]], None]) -> str:
    """Write an index with changed columns; returns its name."""
    file = f"{split}/documents.parquet"
    columns = pq.read_table(data / file).to_pydict()
    change(columns)
    pq.write_table(pa.table(columns, schema=SCHEMA), data / file)
    return file


def column(name: str, row: int, value: Any) -> Callable[[dict[str, list[Any]]], None]:
    """A change for `edit_index`: one cell."""

    def change(columns: dict[str, list[Any]]) -> None:
        columns[name][row] = value

    return change


def counted(data: Path, split: str) -> int:
    """What verify counts as utf8_bytes of a split whose number is wrong."""
    problem = verify(data, deep=1).bad[0].problem
    assert problem.startswith(f"utf8_bytes of {split} "), problem
    return int(problem.split()[-1])
