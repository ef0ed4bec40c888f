"""Two runs with one seed are the same bytes, and so are a run in one go and a run broken anywhere."""

import random
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.train.command import Command
from tests.train.same_bytes import assert_same_run, contents, without_timing
from train.checkpoint import load, steps_in

# Every run of this file meets three bad steps and finds spikes, so the anomalies are part of what must be the same.
# Each step draws a random number that shapes the update, so the random state is, too.
FAULTS: tuple[Any, ...] = (("poison", 7, 8, 9), ("short_window", 6, 1.0), ("draw",))


@pytest.fixture(scope="session")
def reference(train: Command, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All 24 steps in one go, with a checkpoint of every step."""
    run = tmp_path_factory.mktemp("reference") / "run"
    done = train.run(data, run, settings={"checkpoint.every": 1}, faults=FAULTS)
    assert (done.code, done.err) == (0, "")
    kinds = {line["kind"] for line in without_timing(run / "anomalies.jsonl")}
    assert kinds == {"nonfinite", "spike"}, "the reference must exercise the anomalies"
    assert {line["kind"] for line in without_timing(run / "metrics.jsonl")} == {"train", "probe", "eval"}
    return run


def finish(train: Command, data: Path, run: Path, args: Sequence[object] = (), **named: Any) -> None:
    done = train.run(data, run, *args, faults=FAULTS, **named)
    assert (done.code, done.err) == (0, "")


def test_two_runs_with_one_seed_end_in_the_same_bytes(
    train: Command, data: Path, reference: Path, tmp_path: Path
) -> None:
    finish(train, data, tmp_path / "again", settings={"checkpoint.every": 1})
    assert_same_run(tmp_path / "again", reference)
    assert contents(tmp_path / "again" / "checkpoints") == contents(reference / "checkpoints")
    assert (tmp_path / "again" / "config.json").read_bytes() == (reference / "config.json").read_bytes()


def test_another_seed_ends_in_other_bytes(train: Command, data: Path, reference: Path, tmp_path: Path) -> None:
    finish(train, data, tmp_path / "other", settings={"seed": 1})
    with pytest.raises(AssertionError, match="differs"):
        assert_same_run(tmp_path / "other", reference)


@pytest.mark.parametrize("seed", range(4))
def test_a_run_killed_at_random_instants_ends_in_the_same_bytes(
    train: Command, data: Path, reference: Path, tmp_path: Path, seed: int
) -> None:
    """In the milliseconds after a line of the log: in a step, an evaluation, a save, in samples, between any two."""
    instants, run, lines = random.Random(seed), tmp_path / "run", 0
    for _ in range(4):
        lines += instants.randint(1, 5)
        done = train.run(data, run, faults=FAULTS, kill_at=(run / "metrics.jsonl", lines, instants.uniform(0, 0.02)))
        assert done.code == -9, done
    finish(train, data, run)
    assert_same_run(run, reference)


# In a run of 3 saves and 2 removals, how far apart the calls are at which it is killed: all but writes densely.
STRIDES = {"mkdir": 2, "fsync": 5, "rename": 2, "replace": 1, "unlink": 3, "rmdir": 1, "write": 41}


@pytest.mark.parametrize("call", STRIDES)
def test_a_run_killed_at_a_change_of_the_disk_ends_in_the_same_bytes(
    train: Command, data: Path, reference: Path, tmp_path: Path, call: str
) -> None:
    """Half a log line, half a checkpoint, one that is not renamed yet, half a removal of an old one: all are met."""
    settings = {"checkpoint.every": 8, "checkpoint.keep_last": 1}
    for at in range(1, 1000, STRIDES[call]):
        run = tmp_path / f"run-{at}"
        done = train.run(data, run, settings=settings, faults=[*FAULTS, ("kill_at", call, at)])
        if done.code == 0:
            assert at > 1, f"no {call} was met"
            break
        assert done.code == -9, done.err
        finish(train, data, run, settings=settings)
        assert_same_run(run, reference)


# Every piece of state there is; a moment stands for all parameters and for one of them.
PIECES = [
    "layers.0.ffn.down.weight",
    "exp_avg.",
    "exp_avg.embedding",
    "exp_avg_sq.",
    "exp_avg_sq.norm.weight",
    "step.",
    "random.cpu",
    "loss",
    "grad_norm",
    "in_a_row",
    "recorded",
]


@pytest.mark.parametrize("piece", PIECES)
def test_the_checker_notices_a_resume_that_leaves_out_a_piece_of_state(
    train: Command, data: Path, reference: Path, tmp_path: Path, piece: str
) -> None:
    """Stopped after step 8, the second of three bad ones in a row, so that no piece is empty there."""
    before = train.run(data, tmp_path / "cut", "--steps", 8, faults=FAULTS)
    assert before.code == 0
    done = train.run(data, tmp_path / "cut", faults=[*FAULTS, ("forget", piece)])
    if done.code == 0:
        with pytest.raises(AssertionError, match=r"differs|lines"):
            assert_same_run(tmp_path / "cut", reference)
    else:
        assert "anomalies.jsonl: lines up to step 8" in done.err


def test_every_piece_of_state_is_in_that_list(reference: Path) -> None:
    point = load(reference / "checkpoints" / "step-00000008")
    anomalies = point.state["anomalies"]
    names = [*point.model, *point.optimizer, *anomalies, *anomalies["windows"]]
    missed = {name for name in names if not any(name.startswith(piece) for piece in PIECES)}
    assert missed == {"windows", *point.model} - set(PIECES)
    assert set(point.state) == {"step", "tokens", "data_id", "anomalies"}


def test_steps_stops_there_and_a_larger_number_goes_on(
    train: Command, data: Path, reference: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for steps in (3, 8, 11):
        finish(train, data, run, settings={"checkpoint.every": 0}, args=["--steps", steps])
        assert steps_in(run / "checkpoints")[-1] == steps
        steps_evaluated = [line["step"] for line in without_timing(run / "metrics.jsonl") if line["kind"] == "eval"]
        assert steps_evaluated == list(range(4, steps + 1, 4)), "a stop writes no extra evaluation"
    finish(train, data, run)
    assert steps_in(run / "checkpoints") == [3, 8, 11, 15, 20, 24]
    assert_same_run(run, reference)


def test_evaluating_sampling_and_saving_change_nothing_in_the_trajectory(
    train: Command, data: Path, reference: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    finish(train, data, run, settings={"eval.every": 1, "sample.every": 0, "checkpoint.every": 7})
    for step in (7, 14, 21, 24):
        ours, theirs = (r / "checkpoints" / f"step-{step:08d}" for r in (run, reference))
        assert contents(ours) == contents(theirs)


def test_reading_the_numbers_of_a_step_late_changes_nothing(
    train: Command, data: Path, reference: Path, tmp_path: Path
) -> None:
    run, late = tmp_path / "run", [*FAULTS, ("late",)]
    done = train.run(data, run, faults=[*late, ("signal_in", "step", 11, int(signal.SIGTERM))])
    assert done.code == 75
    assert train.run(data, run, faults=late).code == 0
    assert_same_run(run, reference)
    stuck = [("poison", 7, 8, 9, 10, 11), ("late",)]
    assert train.run(data, tmp_path / "stuck", faults=stuck).code == 3
    steps = [line["step"] for line in without_timing(tmp_path / "stuck" / "metrics.jsonl") if line["kind"] == "train"]
    assert steps == list(range(1, 12))
