"""A lookup in the index reads a few row groups and finds what reading all of it would find."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.index import SCHEMA, documents_between, index_name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("index")
    (folder / "train").mkdir()
    return folder


def rows_of(lengths: list[int]) -> list[dict[str, Any]]:
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [
        {"start": start, "length": length, "id": f"d{i}", "url": "", "file": "f", "row": i, "text_sha256": bytes(32)}
        for i, (start, length) in enumerate(zip(starts, lengths, strict=True))
    ]


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=40),
    size=st.integers(1, 41),
    span=st.tuples(st.integers(0, 400), st.integers(1, 60)),
    statistics=st.booleans(),
)
def test_a_lookup_finds_the_owners_of_its_tokens_however_the_index_is_grouped(
    folder: Path, lengths: list[int], size: int, span: tuple[int, int], statistics: bool
) -> None:
    rows = rows_of(lengths)
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    pq.write_table(table, folder / index_name("train"), row_group_size=size, write_statistics=statistics)
    start, stop = span[0], sum(span)
    wanted = [row["id"] for row in rows if row["start"] < stop and row["start"] + row["length"] > start]
    assert [document.id for document in documents_between(folder, "train", start, stop)] == wanted


def test_a_lookup_reads_one_row_group_of_many(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.Table.from_pylist(rows_of([5] * 100), schema=SCHEMA), folder / index_name("train"), 10)
    real, read = pq.ParquetFile.iter_batches, []

    def iter_batches(self: Any, *arguments: Any, row_groups: list[int], **named: Any) -> Iterator[pa.RecordBatch]:
        read.extend(row_groups)
        return real(self, *arguments, row_groups=row_groups, **named)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", iter_batches)
    assert [document.row for document in documents_between(folder, "train", 252, 259)] == [50, 51]
    assert read == [5]
