"""What verify finds in a shard whose hashes were made to fit, as a faulty builder or a forger would."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from shared.manifest import load_manifest
from tests.prep.builds import built, write_parquet
from tests.prep.verify.damage import EVERY, named, problem_of, reseal, set_token


def test_resealing_alone_changes_nothing(data: Path) -> None:
    before = (data / "manifest.json").read_bytes()
    reseal(data)
    assert (data / "manifest.json").read_bytes() == before and named(data) == []


@pytest.mark.parametrize(("file", "position"), [("train/00000.npy", 77), ("train/00002.npy", -1), ("val/00000.npy", 9)])
def test_an_id_outside_the_vocabulary_is_named(data: Path, file: str, position: int) -> None:
    set_token(data, file, position, 1000)
    reseal(data)
    assert problem_of(data, file) == "holds id 1000, the vocabulary ends at 999"


@pytest.mark.parametrize(
    ("old", "new"), [(b"<u2", b"<i2"), (b"<u2", b">u2"), (b"(3000,)", b"(2999,)"), (b"\x01\x00v", b"\x02\x00v")]
)
def test_a_header_of_another_type_or_length_is_named(data: Path, old: bytes, new: bytes) -> None:
    shard = data / "train/00001.npy"
    content = shard.read_bytes()
    assert content[:128].count(old) == 1
    shard.write_bytes(content[:128].replace(old, new) + content[128:])
    reseal(data)
    assert "its header does not say 3000 little-endian uint16 tokens" in problem_of(data, "train/00001.npy")


def test_a_missing_or_stray_frame_is_named(data: Path) -> None:
    rows = pq.read_table(data / "train/documents.parquet").to_pylist()
    inside = next(
        row for row in rows if row["start"] > 3000 and row["start"] + row["length"] < 6000 and row["length"] > 9
    )
    start, end = inside["start"] - 3000, inside["start"] - 3000 + inside["length"] - 1
    shard = (data / "train/00001.npy").read_bytes()
    cases = {
        (start, 300): f"<s> is missing at token {start} of the shard",
        (end, 300): f"</s> is missing at token {end} of the shard",
        (start + 3, 1): f"<s> stands inside a document, at token {start + 3} of the shard",
        (start + 3, 2): f"</s> stands inside a document, at token {start + 3} of the shard",
    }
    for (position, token), problem in cases.items():
        set_token(data, "train/00001.npy", position, token)
        reseal(data)
        assert problem_of(data, "train/00001.npy") == problem
        (data / "train/00001.npy").write_bytes(shard)


def test_the_first_and_the_last_frame_are_checked(data: Path) -> None:
    manifest = load_manifest(data)
    assert manifest.splits["train"].last_document.tokens_dropped, "the golden build cuts its last document"
    set_token(data, "train/00000.npy", 0, 300)
    reseal(data)
    assert "<s> is missing at token 0" in problem_of(data, "train/00000.npy")
    set_token(data, "train/00000.npy", 0, 1)

    def complete(m: dict[str, Any]) -> None:
        m["splits"]["train"]["last_document"]["tokens_dropped"] = 0

    reseal(data, complete)
    assert "</s> is missing" in problem_of(data, "train/00002.npy")
    set_token(data, "train/00002.npy", -1, 2)
    reseal(data, complete)
    assert named(data) == []


def test_large_shards_are_checked_across_read_borders(tmp_path: Path) -> None:
    rows = [{"text": f"{i} river " * 20_000, "id": str(i)} for i in range(30)]
    write_parquet(tmp_path / "long.parquet", rows, group_rows=5)
    out = built(tmp_path / "long.parquet", tmp_path / "out", train_sequences=10_000, shard_tokens=1_200_000)
    assert named(out, deep=EVERY) == []
    at = (1 << 19) - 64 + 1  # the second token of the second read
    assert np.load(out / "train/00000.npy", mmap_mode="r")[at] > 2
    set_token(out, "train/00000.npy", at, 1)
    reseal(out)
    assert problem_of(out, "train/00000.npy") == f"<s> stands inside a document, at token {at} of the shard"
