"""A data set holds exactly what section 2 of the design says, checked against a second, plain writing of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from prep.holdout import threshold
from prep.pipeline import build
from prep.plan import Settings
from shared.index import read_index
from shared.manifest import load_manifest, open_stream
from shared.stop import Stop
from shared.tokenizer import load_tokenizer
from tests.prep.builds import SOURCE, TOKENIZER, bytes_of, golden_rows, prep, tokenize_arguments, write_parquet
from tests.prep.reference import Expected, Text, expect, in_order, label_bytes

SP = SentencePieceProcessor(model_file=str(TOKENIZER))
GOLDEN_ID = "b82688a19d963d815e9290f6af955fea73be9258b81b02f9c1d67fd682e20621"


def make(source: Path, out: Path, s: Settings, workers: int = 1) -> None:
    build(str(source), load_tokenizer(TOKENIZER), s, out, workers=workers, restart=False, stop=Stop())


def assert_is(folder: Path, expected: Expected) -> None:
    manifest = load_manifest(folder)
    for name, split in manifest.splits.items():
        stream = open_stream(folder, manifest, name)
        assert stream[:].tolist() == expected.tokens[name]
        rows = [tuple(row.values()) for batch in read_index(folder, name) for row in batch.to_pylist()]
        assert rows == expected.documents[name]
        assert split.documents == len(rows) and split.tokens == len(stream)
        assert split.utf8_bytes == label_bytes(SP, expected.tokens[name])
        last = split.last_document
        assert (last.id, last.tokens_used, last.tokens_dropped) == expected.last[name]
        sizes = [shard.tokens for shard in split.shards]
        assert all(size == manifest.shard_tokens for size in sizes[:-1]) and 0 < sizes[-1] <= manifest.shard_tokens
        for shard in split.shards:
            assert np.load(folder / shard.file).dtype == np.dtype("<u2")  # an ordinary .npy file
    skipped = manifest.skipped
    assert {"empty": skipped.empty, "in_val": skipped.in_val, "after_full": skipped.after_full} == expected.skipped


def parquet_units(rows: list[dict[str, Any]], group_rows: int, file: str) -> list[list[Text]]:
    texts = [
        Text(row.get("text"), row.get("id") or f"{file}#{i}", row.get("url") or "", file, i)
        for i, row in enumerate(rows)
    ]
    return [texts[i : i + group_rows] for i in range(0, len(texts), group_rows)]


texts = st.one_of(
    st.none(),
    st.just(""),
    st.sampled_from([row["text"] for row in golden_rows() if row["text"]][::9]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=200),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    drawn=st.lists(texts, min_size=1, max_size=60),
    repeat=st.integers(1, 3),
    group_rows=st.integers(1, 9),
    train=st.integers(1, 40),
    val=st.integers(0, 20),
    length=st.sampled_from([1, 7, 32]),
    shard=st.sampled_from([1, 50, 333, 100_000]),
    order=st.sampled_from(["shuffled", "listed"]),
    seed=st.integers(0, 5),
    piece=st.sampled_from([1, 500, 1 << 30]),
)
def test_a_data_set_is_what_the_plain_reference_says(
    tmp_path_factory: pytest.TempPathFactory,
    drawn: list[str | None],
    repeat: int,
    group_rows: int,
    train: int,
    val: int,
    length: int,
    shard: int,
    order: str,
    seed: int,
    piece: int,
) -> None:
    """Whatever the texts and the settings; also when a unit is read in many pieces (`piece` bytes each)."""
    folder = tmp_path_factory.mktemp("drawn")
    rows = [{"text": text, "id": None if i % 3 else f"d{i}"} for i, text in enumerate(drawn * repeat)]
    write_parquet(folder / "source" / "a.parquet", rows, group_rows)
    s = Settings(train, val, length, shard, order, seed, 1)
    units = parquet_units(rows, group_rows, "a.parquet")
    expected = expect(in_order(units, order, seed), SP, s.budget(), seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prep.plan.PIECE_BYTES", piece)
        patch.setattr("prep.worker.TEXT_BYTES", piece)
        if expected is None:
            with pytest.raises(ValueError, match="too small"):
                make(folder / "source", folder / "out", s)
        else:
            make(folder / "source", folder / "out", s)
            assert_is(folder / "out", expected)


def test_copies_empty_texts_and_what_comes_too_late_are_counted(tmp_path: Path) -> None:
    """One unit, copies of all its documents, an empty text in each third row, and rows behind the end."""
    words = [f"document {i} about rivers" for i in range(40)]
    rows: list[dict[str, Any]] = [{"text": "" if i % 3 == 2 else words[i * 7 % 40]} for i in range(400)]
    write_parquet(tmp_path / "source" / "a.parquet", rows, 400)
    s = Settings(45, 4, 32, 1000, "listed", 0, 1)
    [unit] = parquet_units(rows, 400, "a.parquet")
    expected = expect(unit, SP, s.budget(), 0)
    assert expected is not None
    assert expected.skipped["in_val"] > 0
    used = sum(len(documents) for documents in expected.documents.values()) + sum(expected.skipped.values())
    assert 100 < used < 400 and any(not row["text"] for row in rows[used:])
    make(tmp_path / "source", tmp_path / "out", s)
    assert_is(tmp_path / "out", expected)


def test_text_files_of_every_kind_give_the_same_documents(tmp_path: Path) -> None:
    """Lines of .jsonl, .jsonl.zst (in several frames) and .txt; more than one unit a file; blank lines count."""
    rows = [{"text": row["text"], "id": f"r{i}"} for i, row in enumerate(golden_rows()[:300] * 30)]
    lines = [json.dumps(row, ensure_ascii=i % 2 == 0).encode() for i, row in enumerate(rows)]
    lines[17] = b""
    data = b"\n".join(lines)
    folders = {kind: tmp_path / kind / "source" for kind in ("jsonl", "zst")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    (folders["jsonl"] / "a.jsonl").write_bytes(data)
    frames = [data[i : i + 400_000] for i in range(0, len(data), 400_000)]
    (folders["zst"] / "a.jsonl.zst").write_bytes(b"".join(zstandard.compress(frame) for frame in frames))
    s = Settings(5000, 100, 128, 1 << 18, "shuffled", 3, 1)
    for kind, folder in folders.items():
        name = f"a.{'jsonl' if kind == 'jsonl' else 'jsonl.zst'}"
        texts = [Text(row["text"] if i != 17 else None, row["id"], "", name, i) for i, row in enumerate(rows)]
        units = [texts[i : i + 4096] for i in range(0, len(texts), 4096)] if kind == "jsonl" else [texts]
        expected = expect(in_order(units, "shuffled", 3), SP, s.budget(), 3)
        assert expected is not None
        make(folder, tmp_path / kind / "out", s, workers=2)
        assert_is(tmp_path / kind / "out", expected)


def test_a_line_of_txt_is_a_document_and_nothing_of_it_is_stripped(tmp_path: Path) -> None:
    lines = ["  two spaces ", "", "\t", "a\r", "b\u2028c\x0b\x0cd\x85e", "▁x", "last without a line break"]
    (tmp_path / "a.txt").write_bytes("\n".join(lines).encode())
    s = Settings(1, 0, 40, 1000, "listed", 0, 1)
    expected = expect([Text(t, f"a.txt#{i}", "", "a.txt", i) for i, t in enumerate(lines)], SP, s.budget(), 0)
    assert expected is not None
    make(tmp_path / "a.txt", tmp_path / "out", s)
    assert_is(tmp_path / "out", expected)


def test_the_golden_data_set_has_its_golden_id(tmp_path: Path) -> None:
    """The identity of a data set depends on nothing but its inputs: not the machine, the day or a library."""
    done = prep(*tokenize_arguments(SOURCE, tmp_path / "out", workers=2))
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["id"] == GOLDEN_ID
    assert done.stdout.strip().endswith(GOLDEN_ID)
    assert [file["name"] for file in manifest["source"]["files"]] == ["hostile.jsonl", "lines.txt", "prose.jsonl"]


@pytest.mark.parametrize("workers", [2, 7])
def test_the_number_of_workers_changes_no_byte(tmp_path: Path, workers: int) -> None:
    write_parquet(tmp_path / "source" / "a.parquet", golden_rows(), 20)
    write_parquet(tmp_path / "source" / "b.parquet", golden_rows()[::-1], 30)
    for n in (1, workers):
        done = prep(*tokenize_arguments(tmp_path / "source", tmp_path / f"out{n}", workers=n, train_sequences=900))
        assert done.returncode == 0, done.stderr
    assert bytes_of(tmp_path / "out1") == bytes_of(tmp_path / f"out{workers}")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out1", f"out{workers}", "source"]


def test_the_threshold_keeps_at_most_half_and_else_four_times_the_share() -> None:
    assert threshold(1_966_080_001, 10_485_761) == 2**66 * 10_485_761 // 1_976_565_762
    assert threshold(10, 10) == 2**63
    assert threshold(10, 0) == 0
