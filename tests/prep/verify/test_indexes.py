"""What verify finds in an index whose hashes were made to fit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from shared.manifest import load_manifest
from tests.prep.verify.damage import column, edit_index, problem_of, reseal

GAPS = "do not follow each other without gaps"


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (column("start", 5, 0), GAPS),
        (column("length", 3, 2), GAPS),
        (column("length", 3, -1), GAPS),
        (
            lambda columns: [
                values.insert(4, 0 if name == "length" else values[4]) for name, values in columns.items()
            ],
            GAPS,
        ),
        (column("file", 2, "other.jsonl"), "names rows that the source does not have"),
        (column("row", 2, -1), "names rows that the source does not have"),
        (column("url", 2, None), "has empty cells"),
        (column("id", -1, "another"), "last document is not the one"),
        (lambda columns: [values.pop() for values in columns.values()], "documents and"),
        (lambda columns: [values.pop(0) for values in columns.values()], GAPS),
        (lambda columns: columns.update({name: values[:0] for name, values in columns.items()}), "has 0 documents"),
    ],
)
def test_an_index_that_contradicts_itself_is_named(data: Path, change: Callable[..., Any], problem: str) -> None:
    file = edit_index(data, "train", change)
    reseal(data)
    assert problem in problem_of(data, file)


def test_an_index_of_another_content_is_named_whatever_its_file_hash(data: Path) -> None:
    content = load_manifest(data).splits["val"].index.content_sha256
    file = edit_index(data, "val", column("url", 0, "https://elsewhere.example"))
    reseal(data, lambda m: m["splits"]["val"]["index"].update(content_sha256=content))
    assert problem_of(data, file) == "its content is not what the manifest says"


def test_an_index_with_other_columns_is_named(data: Path) -> None:
    table = pq.read_table(data / "val/documents.parquet")
    reordered = table.select(["length", *(name for name in table.column_names if name != "length")])
    pq.write_table(reordered, data / "val/documents.parquet")
    reseal(data)
    assert "its columns are not those of an index" in problem_of(data, "val/documents.parquet")


def test_a_text_in_both_splits_is_named(data: Path) -> None:
    held = pq.read_table(data / "val/documents.parquet")["text_sha256"][-1].as_py()
    file = edit_index(data, "train", column("text_sha256", 7, held))
    reseal(data)
    assert "stands in val as well" in problem_of(data, file)
