"""Two ranks are one trainer: the same batches, one stop, one skip, and a resume to the same bytes."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.train.command import ROOT, TINY, Command
from tests.train.same_bytes import assert_same_run, contents, without_timing
from train.checkpoint import steps_in
from train.metrics import read

POISON = ("poison", 3, 4)  # on rank 1 alone


def torchrun(data: Path, run: Path, faults: Sequence[object], **settings: object) -> "subprocess.CompletedProcess[str]":
    """`train run` as two processes that talk by gloo, with faults on rank 1."""
    chosen = [f"--set={name}={value}" for name, value in {**TINY, "batch.micro": 1, **settings}.items()]
    program = [
        "-m",
        "--",
        "tests.train.faulty",
        "1",
        json.dumps(list(faults)),
        "run",
        "--preset",
        "tiny",
        "--device",
        "cpu",
    ]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend=c10d"]
    return subprocess.run(
        [*launcher, "--rdzv-endpoint=localhost:0", *program, "--data", data, "--run", run, *chosen],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def reference(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("two_ranks") / "run"
    done = torchrun(data, run, [POISON], **{"checkpoint.every": 1})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Ctrl-C is safe") == 1, "rank 0 speaks alone"
    return run


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_both(reference: Path) -> None:
    lines = [line for line in read(reference / "metrics.jsonl") if line["kind"] == "train"]
    assert [line["step"] for line in lines if line["skipped"]] == [3, 4]
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_two_ranks_train_as_one_does(train: Command, data: Path, reference: Path, tmp_path: Path) -> None:
    """Up to the order of sums, which the world size changes: therefore it belongs to the identity."""
    assert train.run(data, tmp_path / "one", settings={"batch.micro": 1}, faults=[POISON]).code == 0
    for kind, name in (("train", "loss"), ("eval", "val_loss")):
        one, two = (
            [line[name] for line in read(run / "metrics.jsonl") if line["kind"] == kind and line[name] is not None]
            for run in (tmp_path / "one", reference)
        )
        assert two == pytest.approx(one, rel=2e-3)


def test_two_ranks_probe_the_gradient_of_the_whole_batch_and_change_nothing_by_it(
    train: Command, data: Path, reference: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = torchrun(data, run, [POISON], **{"checkpoint.every": 1, "probe.every": 0})
    assert done.returncode == 0, done.stderr
    assert contents(run / "checkpoints") == contents(reference / "checkpoints")
    lines = without_timing(reference / "metrics.jsonl")
    assert without_timing(run / "metrics.jsonl") == [line for line in lines if line["kind"] != "probe"]
    assert [line["step"] for line in lines if line["kind"] == "probe"] == [6, 12, 18, 24], "rank 0 writes alone"
    assert train.run(data, tmp_path / "one", settings={"batch.micro": 1}, faults=[POISON]).code == 0
    one, two = (
        [
            each["grad_norm"]
            for line in read(path / "metrics.jsonl")
            if line["kind"] == "probe"
            for each in line["layers"]
        ]
        for path in (tmp_path / "one", reference)
    )
    assert two == pytest.approx(one, rel=0.02)


def test_a_signal_to_one_rank_stops_both_and_the_resume_ends_in_the_same_bytes(
    data: Path, reference: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = torchrun(data, run, [POISON, ("signal_in", "step", 7, int(signal.SIGTERM))])
    assert done.returncode == 1
    assert done.stderr.count("stopped after step 7 of 24 with nothing lost") == 1
    assert "exitcode  : 75" in done.stderr
    assert steps_in(run / "checkpoints") == [5, 7]
    assert torchrun(data, run, [POISON]).returncode == 0
    assert_same_run(run, reference)


def test_another_number_of_processes_is_another_run(train: Command, data: Path, reference: Path) -> None:
    done = train.run(data, reference, settings={"batch.micro": 1})
    assert done.code == 1
    assert "runtime.world_size is 2 in this run and 1 now" in done.err
