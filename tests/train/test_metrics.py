"""Logs: what is appended is read back, a torn tail is tolerated, a cut keeps a prefix and loses nothing."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.metrics import Log, TensorBoard, cut, read, train_record


def write(path: Path, *records: dict[str, Any]) -> None:
    log = Log(path)
    for record in records:
        log.append(record)
    log.sync()
    log.close()


def test_what_is_appended_is_read_back_exactly(tmp_path: Path) -> None:
    records = [{"step": 1, "loss": 0.1 + 0.2}, {"step": 2, "text": "zwei\nZeilen \u2028 \u2581 \x00"}]
    write(tmp_path / "log.jsonl", records[0])
    write(tmp_path / "log.jsonl", records[1])
    assert read(tmp_path / "log.jsonl") == records
    assert read(tmp_path / "none.jsonl") == []


def test_numbers_that_are_not_finite_are_null_and_the_step_is_marked(tmp_path: Path) -> None:
    write(tmp_path / "log.jsonl", train_record(3, 96, math.nan, 1e-3, 0.1, math.inf, {"ms": 1.0, "x": [-math.inf]}))
    (line,) = read(tmp_path / "log.jsonl")
    assert (line["loss"], line["grad_norm"], line["timing"]["x"]) == (None, None, [None])
    assert line["skipped"] is True
    assert "NaN" not in (tmp_path / "log.jsonl").read_text()
    assert train_record(3, 96, 1.0, 1e-3, 0.1, 2.0, {})["skipped"] is False


@given(st.integers(0, 200))
def test_a_line_torn_at_any_byte_is_left_out_and_the_others_stand(
    tmp_path_factory: pytest.TempPathFactory, at: int
) -> None:
    path = tmp_path_factory.mktemp("torn") / "log.jsonl"
    records = [{"step": n, "loss": n / 3, "text": "é"} for n in range(1, 5)]
    write(path, *records)
    data = path.read_bytes()
    path.write_bytes(data[:at])
    assert read(path) == records[: data[:at].count(b"\n")]


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n\0\0\0\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2 is damaged"):
        read(path)


@given(st.integers(0, 6), st.sampled_from([b"", b'{"ste', b"\0\0\0"]))
def test_a_cut_keeps_the_lines_up_to_a_step_and_the_tail_goes_to_discarded(
    tmp_path_factory: pytest.TempPathFactory, last: int, torn: bytes
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    path, discarded = folder / "metrics.jsonl", folder / "discarded"
    write(path, *({"step": n} for n in range(1, 6)))
    path.write_bytes(path.read_bytes() + torn)
    before = path.read_bytes()
    cut(path, lambda record: record["step"] <= last, discarded)
    assert [record["step"] for record in read(path)] == list(range(1, min(last, 5) + 1))
    tails = [file.read_bytes() for file in sorted(discarded.glob("*"))] if discarded.exists() else []
    assert path.read_bytes() + b"".join(tails) == before
    assert len(tails) == (last < 5 or torn != b"")


def test_a_second_cut_does_not_overwrite_the_first_tail(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for text in ("first", "second"):
        write(path, {"step": 9, "text": text})
        cut(path, lambda record: False, tmp_path / "discarded")
    assert [json.loads(f.read_text())["text"] for f in sorted((tmp_path / "discarded").iterdir())] == [
        "first",
        "second",
    ]


def test_a_cut_ends_before_a_damaged_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\0\0\0\n{"step": 2}\n')
    cut(path, lambda record: True, tmp_path / "discarded")
    assert read(path) == [{"step": 1}]
    assert (tmp_path / "discarded" / "metrics-1.jsonl").read_bytes() == b'\0\0\0\n{"step": 2}\n'


def test_a_full_disk_names_the_log() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    log = Log(Path("/dev/full"))
    with pytest.raises(OSError, match="/dev/full: No space left"):
        log.append({"step": 1})
    log.close()


def test_tensorboard_is_shown_the_same_numbers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shown: list[tuple[str, float, int]] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            assert (folder, purge_step) == (str(tmp_path), 3)

        def add_scalar(self, *what: Any) -> None:
            shown.append(what)

        def close(self) -> None: ...

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    board = TensorBoard(tmp_path, 3)
    board.add(train_record(3, 96, 2.5, 1e-3, 0.1, 0.5, {"ms": 7.0, "mfu": None, "time": "now"}))
    board.close()
    assert shown == [
        ("train/tokens", 96, 3),
        ("train/loss", 2.5, 3),
        ("train/lr", 1e-3, 3),
        ("train/weight_decay", 0.1, 3),
        ("train/grad_norm", 0.5, 3),
        ("train/skipped", False, 3),
        ("train/ms", 7.0, 3),
    ]


def test_tensorboard_missing_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        TensorBoard(tmp_path, 1)
