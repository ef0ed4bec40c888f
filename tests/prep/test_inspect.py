"""inspect shows what stands in the data: a text that can be found in the source, and where it came from."""

import json
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import shared.passages
from prep.inspect import inspect
from prep.verify import verify
from shared.manifest import load_manifest, open_stream
from shared.passages import decode
from shared.terminal import printable
from shared.tokenizer import Tokenizer, load_tokenizer
from tests.prep.builds import (
    CORPUS,
    GOLDEN,
    LLAMA,
    SOURCE,
    built,
    golden_rows,
    one_line_error,
    prep,
    tokenize_arguments,
    write_parquet,
)

MODELS = {name: load_tokenizer(GOLDEN / f"{name}.model") for name in ("tokenizer", "unigram", "user_symbols")}
LENGTH = 128


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("inspect") / "data"
    return built(SOURCE, out, train_sequences=600, val_sequences=20, seq_len=LENGTH)


def source_text(file: str, row: int) -> str:
    line = (SOURCE / file).read_bytes().split(b"\n")[row]
    return line.decode() if file.endswith(".txt") else json.loads(line)["text"]


def index(data: Path, split: str) -> list[dict[str, Any]]:
    return pq.read_table(data / split / "documents.parquet").to_pylist()


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_document_is_shown_verbatim_with_its_origin(data: Path, split: str) -> None:
    rows = index(data, split)
    dropped = load_manifest(data).splits[split].last_document.tokens_dropped
    for i, row in enumerate(rows):
        token = row["start"] + (i * 7) % row["length"]
        shown = inspect(data, split, token=token).json()
        assert list(shown) == ["split", "token", "sequence", "document", "text"]
        assert (shown["split"], shown["token"], shown["sequence"]) == (split, token, token // LENGTH)
        assert shown["document"] == {**row, "text_sha256": row["text_sha256"].hex()}
        text = source_text(row["file"], row["row"]).replace("▁", " ")  # which SentencePiece cannot tell apart
        if dropped and row is rows[-1]:
            assert text.startswith(shown["text"].rstrip("\ufffd")) and len(shown["text"]) < len(text)
        else:
            assert shown["text"] == text
            assert "▁" in source_text(row["file"], row["row"]) or sha256(text.encode()).digest() == row["text_sha256"]


def test_documents_without_id_and_url_are_named_by_their_row(data: Path) -> None:
    rows = [row for row in index(data, "train") if row["file"] == "lines.txt"]
    shown = inspect(data, "train", token=rows[3]["start"]).json()["document"]
    assert shown["id"] == f"lines.txt#{shown['row']}" and shown["url"] == ""


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_sequence_shows_each_of_its_documents_and_their_borders(data: Path, split: str) -> None:
    manifest = load_manifest(data)
    stream, rows = open_stream(data, manifest, split), index(data, split)
    for sequence in range(manifest.splits[split].sequences):
        view = inspect(data, split, sequence=sequence)
        shown, ids = view.json(), stream[sequence * LENGTH : sequence * LENGTH + LENGTH + 1]
        first, last = sequence * LENGTH, sequence * LENGTH + LENGTH
        inside = [row for row in rows if row["start"] <= last and row["start"] + row["length"] > first]
        assert (shown["token"], shown["sequence"]) == (first, sequence)
        assert shown["document"] == [{**row, "text_sha256": row["text_sha256"].hex()} for row in inside]
        for part, row in zip(view.parts, inside, strict=True):
            text = source_text(row["file"], row["row"]).replace("▁", " ")
            assert part.text.strip("\ufffd") in text
        texts = "".join(part.text for part in view.parts)
        assert len(shown["text"]) == len(texts) + 3 * int((ids == 1).sum()) + 4 * int((ids == 2).sum())
        joined = "".join(source_text(row["file"], row["row"]).replace("▁", " ").join(["<s>", "</s>"]) for row in inside)
        assert shown["text"].strip("\ufffd") in joined


def test_people_see_the_same(data: Path) -> None:
    row = next(row for row in index(data, "train") if row["url"] and row["length"] > 20)
    lines = list(inspect(data, "train", token=row["start"] + 3).lines())
    assert lines[0].startswith(f"train token {row['start'] + 3}: ") and "token 3 of its document" in lines[0]
    assert lines[2:5] == [f"document {row['id']}", f"url {row['url']}", f"source {row['file']} row {row['row']}"]
    assert lines[5] == f"tokens 0 to {row['length'] - 1} of its {row['length']}"
    assert lines[-1] == printable(source_text(row["file"], row["row"]))
    view = inspect(data, "train", sequence=5)
    lines = list(view.lines())
    assert lines[0] == f"train sequence 5: tokens {5 * LENGTH} to {6 * LENGTH}"
    assert [line for line in lines if line.startswith("document ")] == [f"document {p.document.id}" for p in view.parts]


def test_the_last_token_is_a_label_of_the_last_sequence(data: Path) -> None:
    split = load_manifest(data).splits["train"]
    assert inspect(data, "train", token=split.tokens - 1).sequence == split.sequences - 1
    assert inspect(data, "train", sequence=split.sequences - 1).parts[-1].stop == split.tokens


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        ({"token": -1}, "train has no token -1, only 0 to 76800"),
        ({"token": 76_801}, "train has no token 76801, only 0 to 76800"),
        ({"sequence": -1}, "train has no sequence -1, only 0 to 599"),
        ({"sequence": 600}, "train has no sequence 600, only 0 to 599"),
    ],
)
def test_numbers_outside_are_refused_with_the_range(data: Path, asked: dict[str, int], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        inspect(data, "train", **asked)


def test_what_is_missing_is_told(data: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(data, tmp_path / "copy"))
    with pytest.raises(ValueError, match="no test split, only train, val"):
        inspect(copy, "test", token=0)
    (copy / "val/00000.npy").unlink()
    with pytest.raises(ValueError, match=r"val/00000.npy: No such file or directory; run prep verify"):
        inspect(copy, "val", token=0)
    shutil.copyfile(GOLDEN / "unigram.model", copy / "tokenizer.model")
    with pytest.raises(ValueError, match=r"tokenizer.model: sha256 is"):
        inspect(copy, "train", token=0)
    (copy / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"manifest.json: missing"):
        inspect(copy, "train", token=0)


def test_the_command_prints_the_same(data: Path) -> None:
    done = prep("inspect", data, "--sequence", 7, "--split", "val", "--json")
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)
    assert json.loads(done.stdout) == inspect(data, "val", sequence=7).json()
    done = prep("inspect", data, "--token", 1234)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "\n".join(inspect(data, "train", token=1234).lines()) + "\n"


def test_no_control_character_of_a_page_reaches_a_terminal(tmp_path: Path) -> None:
    controls = "".join(map(chr, [*range(32), *range(0x7F, 0xA0)]))
    text = f"One\tline of prose\nand \x1b]0;title\x07 \x9b2J {controls} é 日本"
    write_parquet(tmp_path / "a.parquet", [{"text": text * 40, "id": "\x1b[31mred", "url": "\x9b1m"}] * 9, 3)
    data = built(tmp_path / "a.parquet", tmp_path / "data", train_sequences=9, val_sequences=0, seq_len=900)
    for option in ("--token", "--sequence"):
        done = prep("inspect", data, option, 1)
        assert done.returncode == 0 and not set(controls) - {"\n", "\t"} & set(done.stdout)
        assert "One\tline of prose\nand \\u001b]0;title\\u0007 \\u009b2J " in done.stdout and "é 日本" in done.stdout
        assert "document \\u001b[31mred\nurl \\u009b1m\n" in done.stdout
        done = prep("inspect", data, option, 1, "--json")
        assert not set(controls) - {"\n"} & set(done.stdout), "JSON escapes them in its own way"
        assert text in json.loads(done.stdout)["text"]


def test_each_token_is_decoded_once(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    real = shared.passages.decode
    monkeypatch.setattr(shared.passages, "decode", lambda *a: decoded.append(len(a[1])) or real(*a))
    view = inspect(data, "train", token=1234)
    assert decoded == [view.parts[0].document.length]


def test_the_command_refuses_in_one_line(data: Path, tmp_path: Path) -> None:
    assert "only 0 to 76800" in one_line_error(prep("inspect", data, "--token", 76_801), 1)
    assert "only 0 to 19" in one_line_error(prep("inspect", data, "--sequence", -1, "--split", "val"), 1)
    assert "manifest.json: missing" in one_line_error(prep("inspect", tmp_path, "--token", 0), 1)
    one_line_error(prep("inspect", data), 2)
    one_line_error(prep("inspect", data, "--token", 1, "--sequence", 1), 2)


def framed(tokenizer: Tokenizer, text: str) -> np.ndarray[Any, np.dtype[np.uint16]]:
    return np.array([1, *tokenizer.processor.encode(text), 2], dtype=np.uint16)


@pytest.mark.parametrize("model", MODELS)
def test_decoding_a_whole_document_is_sentencepieces(model: str) -> None:
    tokenizer = MODELS[model]
    for row in golden_rows():
        if row["text"]:
            assert decode(tokenizer, framed(tokenizer, row["text"]), 0) == tokenizer.processor.decode(
                tokenizer.processor.encode(row["text"])
            )


@given(text=st.text(), model=st.sampled_from(sorted(MODELS)))
def test_any_text_comes_back(text: str, model: str) -> None:
    assert decode(MODELS[model], framed(MODELS[model], text), 0) == text.replace("▁", " ")


@given(text=st.text(alphabet=st.sampled_from(" ab.\n\r\tthe1<>")), cut=st.integers(0, 100), again=st.integers(0, 100))
def test_parts_of_a_document_join_to_the_whole(text: str, cut: int, again: int) -> None:
    ids = framed(MODELS["tokenizer"], text)
    a, b = sorted([cut % (len(ids) + 1), again % (len(ids) + 1)])
    parts = [(ids[:a], 0), (ids[a:b], a), (ids[b:], b)]
    assert "".join(decode(MODELS["tokenizer"], part, place) for part, place in parts) == text


def test_half_a_character_is_shown_as_unknown() -> None:
    ids = framed(MODELS["tokenizer"], "字")  # <s> ▁ and three bytes
    assert decode(MODELS["tokenizer"], ids[:4], 0) == "\ufffd"
    assert set(decode(MODELS["tokenizer"], ids[3:], 3)) == {"\ufffd"}


@pytest.mark.corpus
@pytest.mark.skipif(not LLAMA.exists(), reason="../shared is not here")
def test_documents_of_the_real_corpus_are_found_in_it(tmp_path: Path) -> None:
    arguments = {"train_sequences": 1000, "val_sequences": 64, "seq_len": 1024, "shard_tokens": 1 << 20, "workers": 2}
    source = CORPUS / "val_edu.parquet"
    out = tmp_path / "data"
    done = prep(*tokenize_arguments(source, out, **arguments, tokenizer=LLAMA))
    assert done.returncode == 0, done.stderr
    assert verify(out, deep=100).bad == []
    rows = pq.read_table(source, columns=["text", "id", "url"]).to_pylist()
    for split in ("train", "val"):
        for i, row in enumerate(index(out, split)[:-1]):
            if i % 50 == 0:
                shown = inspect(out, split, token=row["start"] + row["length"] // 2).json()
                assert shown["text"] == rows[shown["document"]["row"]]["text"]
                assert {key: shown["document"][key] for key in ("id", "url")} == {
                    key: rows[row["row"]][key] for key in ("id", "url")
                }
