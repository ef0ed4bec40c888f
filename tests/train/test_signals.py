"""SIGTERM and SIGINT anywhere: exit 75, nothing lost, the same command goes on to the same bytes."""

import re
import signal
from pathlib import Path

import pytest

from tests.train.command import Command
from tests.train.same_bytes import assert_same_run, without_timing
from train.checkpoint import steps_in
from train.metrics import read

TERM, INT = int(signal.SIGTERM), int(signal.SIGINT)


@pytest.fixture(scope="module")
def reference(train: Command, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("unbroken") / "run"
    assert train.run(data, run, settings={"checkpoint.every": 1}).code == 0
    return run


# (where, which entry into that place, the step that must be saved)
PLACES = [
    ("step", 7, 7),
    ("update", 1 + 3, 3),  # the first is the initialisation's
    ("update", 1 + 24, 24),  # the last step: its evaluation and samples are still to do
    ("reading", 1, 1),
    ("evaluating", 5 + 2, 8),  # five batches each
    ("sampling", 1, 8),
    ("sampling", 6, 8),
    ("save", 2, None),  # another thread writes: it may be in the step after
    ("copy", 2, 10),
]


@pytest.mark.parametrize("number", [TERM, INT])
@pytest.mark.parametrize(("place", "entry", "step"), PLACES)
def test_a_signal_saves_and_the_same_command_goes_on(
    train: Command, data: Path, reference: Path, tmp_path: Path, place: str, entry: int, step: int | None, number: int
) -> None:
    run = tmp_path / "run"
    done = train.run(data, run, faults=[("signal_in", place, entry, number)])
    assert done.code == 75
    said = re.fullmatch(r"\S+: stopped after step (\d+) of 24 with nothing lost; the same command .*\n", done.err)
    assert said, done.err
    step = step or int(said[1])
    assert int(said[1]) == step
    assert steps_in(run / "checkpoints")[-1] == step
    assert [line["step"] for line in read(run / "metrics.jsonl") if line["kind"] == "train"] == list(range(1, step + 1))
    if place == "evaluating":  # it was left, not finished
        assert [line["step"] for line in read(run / "metrics.jsonl") if line["kind"] == "eval"] == [4]
    done = train.run(data, run)
    assert (done.code, done.err) == (0, "")
    assert_same_run(run, reference)


@pytest.mark.parametrize("place", ["step", "evaluating", "save"])
def test_a_second_signal_exits_at_once_and_loses_no_more_than_a_kill(
    train: Command, data: Path, reference: Path, tmp_path: Path, place: str
) -> None:
    run = tmp_path / "run"
    done = train.run(data, run, faults=[("signal_in", place, 2, INT, TERM)])
    assert (done.code, done.err) == (75, "")
    assert train.run(data, run).code == 0
    assert_same_run(run, reference)


def test_a_signal_while_the_data_set_is_verified_leaves_no_run_behind(
    train: Command, data: Path, tmp_path: Path
) -> None:
    done = train.run(data, tmp_path / "run", faults=[("signal_in", "hashing", 1, TERM)])
    assert done.code == 75
    assert "the same command" in done.err
    assert not (tmp_path / "run").exists()


def test_a_signal_in_the_samples_leaves_them_whole_in_the_end(train: Command, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train.run(data, run, faults=[("signal_in", "sampling", 3, TERM)]).code == 75
    assert len(without_timing(run / "samples.jsonl")) in (2, 3), "left between two prompts"
    assert train.run(data, run, "--steps", 8).code == 0
    lines = without_timing(run / "samples.jsonl")
    assert len(lines) == len({line["prompt"] for line in lines}) == 6
