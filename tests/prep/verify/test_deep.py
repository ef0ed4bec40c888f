"""verify --deep finds what only the texts of the source can tell, and does not blame the data for another source."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from prep.verify import verify
from shared.manifest import load_build, seal, text_of
from tests.prep.builds import GOLDEN, SOURCE, built, golden_rows, write_parquet
from tests.prep.verify.damage import (
    EVERY,
    column,
    counted,
    edit_index,
    named,
    problem_of,
    reseal,
    set_token,
)


def test_deep_finds_a_token_that_only_the_text_can_tell(data: Path) -> None:
    row = pq.read_table(data / "train/documents.parquet").to_pylist()[11]
    at = row["start"] + 4
    for token in (300, 999):
        set_token(data, f"train/{at // 3000:05d}.npy", at % 3000, token)
        reseal(data)
        reseal(data, lambda m: m["splits"]["train"].update(utf8_bytes=counted(data, "train")))
        assert named(data) == []
        file = f"train/{at // 3000:05d}.npy"
        assert f"token {at} of train (token 4 of document {row['id']!r})" in problem_of(data, file, deep=EVERY)


@pytest.mark.parametrize(("split", "file"), [("train", "train/00000.npy"), ("val", "val/00000.npy")])
def test_deep_looks_into_both_splits_even_for_two_documents(data: Path, split: str, file: str) -> None:
    set_token(data, file, 2, 999)
    reseal(data)
    reseal(data, lambda m: m["splits"][split].update(utf8_bytes=counted(data, split)))
    assert "not what SentencePiece gives" in problem_of(data, file, deep=2)


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda m: m["splits"]["val"].update(utf8_bytes=m["splits"]["val"]["utf8_bytes"] + 1), "utf8_bytes of val"),
        (lambda m: m["splits"]["train"].update(utf8_bytes=0), "utf8_bytes of train"),
        (lambda m: m["splits"]["train"]["last_document"].update(tokens_dropped=3), "3 tokens were dropped"),
    ],
)
def test_deep_finds_numbers_that_only_the_text_can_tell(data: Path, edit: Callable[..., Any], problem: str) -> None:
    reseal(data, edit)
    assert named(data) == []
    assert problem in problem_of(data, "manifest.json", deep=EVERY)


def test_deep_finds_an_index_that_lies_about_the_text(data: Path) -> None:
    file = edit_index(data, "train", column("text_sha256", 4, bytes(32)))
    reseal(data)
    assert named(data) == []
    assert "row 4: row " in problem_of(data, file, deep=EVERY)


def test_deep_reads_every_kind_of_source_and_model(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    rows = golden_rows()
    source = tmp_path / "source"
    source.mkdir()
    (source / "0.txt").write_bytes((SOURCE / "lines.txt").read_bytes())
    (source / "1.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in rows[:40]))
    write_parquet(source / "2" / "rows.parquet", rows[40:90], group_rows=20)
    packed = "".join(json.dumps(row) + "\n" for row in rows[90:]).encode()
    (source / "3.jsonl.zst").write_bytes(zstandard.compress(packed[:30_000]) + zstandard.compress(packed[30_000:]))
    for model in ("tokenizer", "unigram", "user_symbols", "squeeze"):
        tokenizer = GOLDEN / f"{model}.model"
        out = built(source, tmp_path / model, tokenizer=tokenizer, train_sequences=450, order="listed")
        files = set(pq.read_table(out / "train/documents.parquet")["file"].to_pylist())
        assert files == {"0.txt", "1.jsonl", "2/rows.parquet", "3.jsonl.zst"}
        assert named(out, deep=EVERY) == []


def test_deep_checks_as_many_documents_as_asked_in_both_splits(whole: Path) -> None:
    assert [verify(whole, deep=n).reencoded for n in (1, 2, 7)] == [1, 2, 7]


def test_deep_does_not_blame_the_data_for_another_source(data: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(SOURCE, tmp_path / "copy"))
    assert named(data, deep=EVERY, source=str(copy)) == []
    lines = (copy / "prose.jsonl").read_bytes().split(b"\n")
    (copy / "prose.jsonl").write_bytes(b"\n".join(lines[1:] + lines[:1]))
    with pytest.raises(ValueError, match=r"prose.jsonl: is not the file that the data set was made from"):
        verify(data, deep=EVERY, source=str(copy))
    (copy / "prose.jsonl").unlink()
    with pytest.raises(ValueError, match=r"has no file prose.jsonl"):
        verify(data, deep=EVERY, source=str(copy))
    with pytest.raises(ValueError, match="no such file or directory"):
        verify(data, deep=1, source=str(tmp_path / "nowhere"))


def test_deep_asks_for_the_source_where_none_is_recorded(data: Path) -> None:
    record = {key: value for key, value in load_build(data).items() if key != "source"}
    (data / "build.json").write_bytes(text_of(seal(record, "sha256")))
    assert named(data) == [] and named(data, deep=3, source=str(SOURCE)) == []
    with pytest.raises(ValueError, match=r"build.json: does not say where the source is; give --source"):
        verify(data, deep=3)
