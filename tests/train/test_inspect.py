"""What a step sees is shown for every step of the schedule, from the run and the data set alone, and safely."""

import json
import shutil
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.permutation import Permutation
from shared.terminal import printable
from shared.tokenizer import load_tokenizer
from tests.train.command import Command, Done
from tests.train.dataset import GOLDEN, build
from train.inspect import inspect

LENGTH, BATCH, STEPS = 32, 4, 24
TOKENIZER = load_tokenizer(GOLDEN / "tokenizer.model").processor
PROSE = (GOLDEN / "source" / "prose.jsonl").read_text().splitlines()
TEXTS = [text for line in PROSE if (text := json.loads(line)["text"])]


@pytest.fixture(scope="module")
def run(train: Command, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has made one step of its 24."""
    run = tmp_path_factory.mktemp("inspect") / "run"
    assert train.run(data, run, "--steps", 1, settings={"seed": 5}).code == 0
    return run


def sequences(data: Path, step: int) -> list[int]:
    """By the definition of the order."""
    manifest = json.loads((data / "manifest.json").read_text())
    order = Permutation(manifest["splits"]["train"]["sequences"], tag="order/1", data_id=manifest["id"], seed=5)
    return order(np.arange((step - 1) * BATCH, step * BATCH)).tolist()


def stream(data: Path) -> Sequence[int]:
    return np.concatenate([np.load(file) for file in sorted((data / "train").glob("*.npy"))]).tolist()


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_any_step_is_shown_with_its_sequences_documents_and_text(data: Path, run: Path, step: int) -> None:
    """Steps that are not made yet as well."""
    seen, tokens = inspect(run, step).json(), stream(data)
    index = pq.read_table(data / "train/documents.parquet").to_pylist()
    texts = list(islice(cycle(TEXTS), len(index)))
    assert seen["step"] == step
    assert seen["sequences"] == sequences(data, step)
    documents, exact = iter(seen["documents"]), 0
    for i in sequences(data, step):
        first, last = i * LENGTH, i * LENGTH + LENGTH
        for number, row in enumerate(index):
            start, end = max(first, row["start"]), min(last, row["start"] + row["length"] - 1)
            if start > end:
                continue
            found = next(documents)
            assert (found["sequence"], found["first_token"], found["last_token"]) == (i, start, end)
            assert {name: found[name] for name in row} == {**row, "text_sha256": row["text_sha256"].hex()}
            assert found["text"].strip("\ufffd") in texts[number]
            before, through = (TOKENIZER.decode(tokens[row["start"] : stop]) for stop in (start, end + 1))
            if "\ufffd" not in before + through:  # no cut within a character
                assert before + found["text"] == through
                exact += 1
    assert exact > BATCH / 2
    assert next(documents, None) is None


def test_neither_checkpoints_nor_logs_are_needed(train: Command, run: Path, tmp_path: Path) -> None:
    bare = tmp_path / "run"
    bare.mkdir()
    for name in ("config.json", "run.json"):
        shutil.copy(run / name, bare)
    assert inspect(bare, 3) == inspect(run, 3)


def test_the_command_prints_a_line_a_row_of_the_batch(train: Command, data: Path, run: Path) -> None:
    done = train("inspect", run, "--step", STEPS)
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert [line.split()[:2] for line in lines] == [["sequence", str(i)] for i in sequences(data, STEPS)]
    shown = train("inspect", run, "--step", STEPS, "--json")
    assert (shown.code, shown.err, shown.out.count("\n")) == (0, "", 1)
    found = json.loads(shown.out)
    assert list(found) == ["step", "sequences", "documents"]
    assert found == inspect(run, STEPS).json()
    for document in found["documents"]:
        (line,) = (line for line in lines if line.split()[1] == str(document["sequence"]))
        assert f"{document['id']} (prose.jsonl row {document['row']}, " in line
        assert json.dumps(document["text"], ensure_ascii=False) in line


def test_a_data_set_that_moved_is_found_by_data(train: Command, data: Path, run: Path, tmp_path: Path) -> None:
    old, new, mine = tmp_path / "old", tmp_path / "new", tmp_path / "run"
    shutil.copytree(data, old)
    assert train.run(old, mine, "--steps", 1).code == 0
    old.rename(new)
    refused(train("inspect", mine, "--step", 2), f"{old}: the data set of {mine} is not there", "--data DIR")
    done = train("inspect", mine, "--step", 2, "--data", new)
    assert (done.code, done.err) == (0, "") and done.out.startswith("sequence ")
    assert train("eval", mine, "--data", new).code == 0


def refused(done: Done, *words: str) -> None:
    assert (done.code, done.out) == (1, ""), done
    assert done.err.startswith("error: ") and done.err.count("\n") == 1
    for word in words:
        assert word in done.err


def test_what_cannot_be_shown_is_refused_in_one_line(train: Command, data: Path, run: Path, tmp_path: Path) -> None:
    refused(train("inspect", run, "--step", STEPS + 1), f"--step {STEPS + 1}", f"steps 1 to {STEPS}")
    refused(train("inspect", tmp_path / "none", "--step", 1), "no run here", "train run")
    refused(train("inspect", run, "--step", 1, "--data", tmp_path), "manifest.json: missing")
    other = build(tmp_path / "other", train=120, val=0, seed=1)
    refused(train("inspect", run, "--step", 1, "--data", other), str(other), "give --data")
    for step in ("0", "-1", "one"):
        done = train("inspect", run, "--step", step)
        assert (done.code, done.err.count("\n")) == (2, 1)
    broken = Path(shutil.copytree(data, tmp_path / "broken"))
    (broken / "train/00001.npy").unlink()
    refused(train("inspect", run, "--step", 1, "--data", broken), "train/00001.npy", "prep verify")
    nowhere = Path(shutil.copytree(run, tmp_path / "nowhere"))
    (nowhere / "run.json").unlink()
    refused(train("inspect", nowhere, "--step", 1), "run.json", "--data DIR")


def test_a_step_that_the_data_set_does_not_last_for_is_refused(train: Command, tmp_path: Path) -> None:
    data, run = build(tmp_path / "data", train=21, val=0), tmp_path / "run"
    assert train.run(data, run, "--steps", 1).code == 0
    assert len(inspect(run, 5).rows) == BATCH
    refused(train("inspect", run, "--step", 6), "--step 6", "5 steps")


HOSTILE = "\x1b[2J\x1b]0;owned\x07 \x9b31m \u202egnp.exe \x7f\r\nsequence 999 \u2028 | \\x1b \U000e0041 <b>"


def test_control_characters_of_web_text_never_reach_the_terminal(train: Command, tmp_path: Path) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    build(data, train=24, val=0, length=256, texts=[HOSTILE], url=f"https://e.com/{HOSTILE}")
    assert train.run(data, run, "--steps", 1).code == 0
    for arguments in ([], ["--json"]):
        done = train("inspect", run, "--step", 6, *arguments)
        assert (done.code, done.err) == (0, "")
        assert all(c.isprintable() or c == "\n" for c in done.out)
        assert done.out.count("\n") == (1 if arguments else BATCH)
    documents = json.loads(done.out)["documents"]
    assert {document["url"] for document in documents} == {f"https://e.com/{HOSTILE}"}
    whole = [d["text"] for d in documents if d["last_token"] - d["first_token"] + 1 == d["length"]]
    assert HOSTILE in whole


json_values: st.SearchStrategy[Any] = st.recursive(
    st.text() | st.integers() | st.none(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)


@given(json_values)
def test_what_is_made_printable_is_the_same_json_value(value: Any) -> None:
    shown = printable(json.dumps(value, ensure_ascii=False))
    assert shown.isprintable() or not shown
    assert json.loads(shown) == value
