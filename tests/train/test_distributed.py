"""Several ranks are one trainer: the same batches, one stop, one skip, one voice, and a resume to the same bytes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.train.command import ROOT, Command, Done, Faults, tiny
from tests.train.dataset import build
from tests.train.same_bytes import assert_same_run, contents, without_timing
from train.checkpoint import steps_in
from train.metrics import read

POISON = ("poison", 3, 4)  # on rank 1 alone
KILL = ("signal_in", "step", 7, int(signal.SIGKILL))
ONE_AT_A_TIME = {"batch.micro": 1}


def ranks(
    train: Command,
    data: Path,
    run: Path,
    faults: Sequence[Faults],
    *args: object,
    seconds: float = 120,
    **settings: object,
) -> list[Done]:
    """`train run` as processes that talk by gloo, as many as there are lists of faults."""
    return train.ranks(faults, *tiny(data, run, *args, settings={**ONE_AT_A_TIME, **settings}), seconds=seconds)


def torchrun(
    data: Path, run: Path, faults: Faults, *args: object, restarts: int = 0
) -> "subprocess.CompletedProcess[str]":
    """`train run` as torchrun starts two of it, with faults on rank 1 until it is restarted."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = ["-m", "--", "tests.train.faulty", "1", json.dumps(list(faults))]
    command = [*launcher, "--max-restarts", restarts, *program, *tiny(data, run, *args, settings={**ONE_AT_A_TIME})]
    return subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def reference(train: Command, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, all 24 steps in one go, with a checkpoint of every step; they exchange gradients once a step."""
    run = tmp_path_factory.mktemp("two_ranks") / "run"
    first, second = ranks(train, data, run, [[("once_a_step",)], [POISON]], **{"checkpoint.every": 1})
    assert (first.code, first.err) == (0, "")
    assert "Ctrl-C is safe" in first.out
    assert (second.code, second.out, second.err) == (0, "", ""), "rank 0 speaks alone"
    return run


@pytest.fixture(scope="module")
def alone(train: Command, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as one process."""
    run = tmp_path_factory.mktemp("one_rank") / "run"
    assert train.run(data, run, settings=ONE_AT_A_TIME, faults=[POISON]).code == 0
    return run


def values(run: Path, kind: str, name: str) -> list[float]:
    lines = [line for line in read(run / "metrics.jsonl") if line["kind"] == kind]
    return [line[name] for line in lines if line[name] is not None]


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_both(reference: Path) -> None:
    lines = [line for line in read(reference / "metrics.jsonl") if line["kind"] == "train"]
    assert [line["step"] for line in lines if line["skipped"]] == [3, 4]
    assert lines[-1]["loss"] < lines[0]["loss"]


@pytest.mark.parametrize(("kind", "name"), [("train", "loss"), ("train", "grad_norm"), ("eval", "val_loss")])
def test_two_ranks_train_and_evaluate_as_one_does(alone: Path, reference: Path, kind: str, name: str) -> None:
    """Up to the order of sums, which the world size changes: therefore it belongs to the identity."""
    one, two = values(alone, kind, name), values(reference, kind, name)
    assert two == pytest.approx(one, rel=2e-2 if name == "grad_norm" else 2e-3)


def test_two_ranks_probe_the_gradient_of_the_whole_batch_and_change_nothing_by_it(
    train: Command, data: Path, alone: Path, reference: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = ranks(train, data, run, [[], [POISON]], **{"checkpoint.every": 1, "probe.every": 0})
    assert [each.code for each in done] == [0, 0]
    assert contents(run / "checkpoints") == contents(reference / "checkpoints")
    lines = without_timing(reference / "metrics.jsonl")
    assert without_timing(run / "metrics.jsonl") == [line for line in lines if line["kind"] != "probe"]
    assert [line["step"] for line in lines if line["kind"] == "probe"] == [6, 12, 18, 24], "rank 0 writes alone"
    one, two = (
        [each["grad_norm"] for layers in values(path, "probe", "layers") for each in layers]  # type: ignore[attr-defined]
        for path in (alone, reference)
    )
    assert two == pytest.approx(one, rel=0.02)


def test_three_ranks_resume_to_the_same_bytes(train: Command, tmp_path: Path) -> None:
    """Sums over three depend on how the gradients lie in torch's buckets, which it lays out anew as it goes."""
    data, settings = build(tmp_path / "set", train=150, val=0), {"batch.sequences": 6, "checkpoint.every": 1}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for run, steps in ((whole, 12), (cut, 5), (cut, 12)):
        done = ranks(train, data, run, [[], [], []], "--steps", steps, **settings)
        assert [(each.code, each.err) for each in done] == [(0, "")] * 3
    assert_same_run(cut, whole)


def test_a_signal_to_one_rank_stops_both_and_the_resume_ends_in_the_same_bytes(
    train: Command, data: Path, reference: Path, tmp_path: Path
) -> None:
    run, term = tmp_path / "run", int(signal.SIGTERM)
    first, second = ranks(train, data, run, [[], [POISON, ("signal_in", "step", 7, term)]])
    assert (first.code, second.code) == (75, 75)
    assert [(first.err + second.err).count(words) for words in ("\n", "stopped after step 7 of 24")] == [1, 1]
    assert steps_in(run / "checkpoints") == [5, 7]
    assert [each.code for each in ranks(train, data, run, [[], [POISON]])] == [0, 0]
    assert_same_run(run, reference)


def test_a_scheduler_s_signal_stops_a_job_of_torchrun_with_nothing_lost(
    train: Command, data: Path, reference: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = torchrun(data, run, [POISON, ("signal_job", 7, int(signal.SIGTERM))])
    assert done.returncode != 0
    assert done.stderr.count("with nothing lost; the same command goes on") == 1, done.stderr
    assert 5 < steps_in(run / "checkpoints")[-1] < 24
    assert [each.code for each in ranks(train, data, run, [[], [POISON]])] == [0, 0]
    assert_same_run(run, reference)


def test_torchrun_restarts_after_a_kill_and_the_run_ends_in_the_same_bytes(
    train: Command, data: Path, tmp_path: Path
) -> None:
    """From the newest checkpoint, also where the command says --restart: that is for its first start alone."""
    unbroken, run = tmp_path / "unbroken", tmp_path / "run"
    assert [each.code for each in ranks(train, data, unbroken, [[], []], **{"checkpoint.every": 1})] == [0, 0]
    run.mkdir()
    shutil.copy(unbroken / "config.json", run)
    done = torchrun(data, run, [KILL], "--restart", restarts=1)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error: another process of this job has ended") == 1, done.stderr
    assert "Traceback" not in done.stderr
    starts = json.loads((run / "run.json").read_bytes())["starts"]
    assert [start["from_step"] for start in starts] == [0, 5]
    assert_same_run(run, unbroken)


def test_five_bad_steps_in_a_row_stop_all_with_one_line(train: Command, data: Path, tmp_path: Path) -> None:
    done = ranks(train, data, tmp_path / "run", [[], [("poison", *range(1, 6))]])
    assert [each.code for each in done] == [3, 3]
    assert (done[0].err + done[1].err).count("\n") == 1 and "stopped at step 5" in done[0].err + done[1].err


def one_voice(done: list[Done], *says: str, speaker: int = 0) -> None:
    """All have failed, and one of them has said why in one line."""
    assert [each.code for each in done] == [1] * len(done), done
    assert [each.err for rank, each in enumerate(done) if rank != speaker] == [""] * (len(done) - 1), done
    error = done[speaker].err
    assert error.startswith("error: ") and error.count("\n") == 1 and all(words in error for words in says), error


def test_a_rank_that_is_killed_ends_the_others_with_a_message(train: Command, data: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    first, second, third = ranks(train, data, tmp_path / "run", [[], [KILL], []], **{"batch.sequences": 3})
    assert second.code == -9
    words = "another process of this job has ended"
    speaker = 0 if words in first.err else 1
    one_voice([first, third], words, "newest checkpoint", speaker=speaker)
    assert time.monotonic() - began < 30


def test_a_bad_data_set_ends_all_with_one_line(train: Command, data: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(data, bad)
    shard = bad / "train" / "00001.npy"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    one_voice(ranks(train, bad, tmp_path / "run", [[], []]), str(shard), "prep repair")


@pytest.mark.parametrize("wrong", [{"schedule.peak_lr": "much"}, {"batch.sequences": 5}])
def test_a_mistake_that_all_ranks_see_is_told_once(
    train: Command, data: Path, tmp_path: Path, wrong: dict[str, object]
) -> None:
    done = ranks(train, data, tmp_path / "run", [[], []], **wrong)
    one_voice(done, next(iter(wrong)), speaker=0 if done[0].err else 1)


def test_a_full_disk_ends_all_with_one_line_and_the_same_command_goes_on(
    train: Command, data: Path, reference: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    one_voice(ranks(train, data, run, [[("fail_writes", 40)], [POISON]]), "could not be saved", "No space left")
    assert [each.code for each in ranks(train, data, run, [[], [POISON]])] == [0, 0]
    assert_same_run(run, reference)


def test_a_host_with_another_data_set_is_found_out(train: Command, data: Path, tmp_path: Path) -> None:
    other = build(tmp_path / "other", train=120, val=10, seed=1)
    done = ranks(train, data, tmp_path / "run", [[], [("elsewhere", str(other))]])
    one_voice(done, "is data set", "where rank 0 runs", speaker=1)


def test_a_rank_that_keeps_the_others_waiting_too_long_ends_them(train: Command, data: Path, tmp_path: Path) -> None:
    done = ranks(train, data, tmp_path / "run", [[("slow", 14, 7)], [("slow", 0, 7)]])
    one_voice(done, "did not answer (waited up to 7 s)", speaker=1)


def test_another_number_of_processes_is_another_run_unless_elastic(
    train: Command, data: Path, reference: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert [each.code for each in ranks(train, data, run, [[], [POISON]], "--steps", 10)] == [0, 0]
    one = {"settings": ONE_AT_A_TIME}
    refused = train.run(data, run, **one)  # type: ignore[arg-type]
    assert refused.code == 1
    assert "runtime.world_size is 2 in this run and 1 now" in refused.err and "--elastic" in refused.err
    done = train.run(data, run, "--elastic", "--steps", 20, **one)  # type: ignore[arg-type]
    assert (done.code, done.err) == (0, "")
    assert "processes: 2 before, 1 now: same order, but other bits" in done.out
    assert json.loads((run / "config.json").read_bytes())["runtime"]["world_size"] == 1
    assert json.loads((run / "run.json").read_bytes())["starts"][-1]["changed"] == {"runtime.world_size": [2, 1]}
    back = ranks(train, data, run, [[], []])
    one_voice(back, "runtime.world_size is 1 in this run and 2 now")
    assert train.run(data, run, **one).code == 0  # type: ignore[arg-type]
    assert values(run, "train", "loss") == pytest.approx(values(reference, "train", "loss"), rel=2e-3)
    assert contents(run / "checkpoints" / "step-00000010") == contents(reference / "checkpoints" / "step-00000010")
    assert contents(run / "checkpoints" / "step-00000024") != contents(reference / "checkpoints" / "step-00000024")


def test_an_elastic_run_finds_its_micro_batch_anew(train: Command, data: Path, tmp_path: Path) -> None:
    run, chosen = tmp_path / "run", {"batch.micro": "none"}
    assert train.run(data, run, "--steps", 2, settings=chosen).code == 0
    done = ranks(train, data, run, [[], [], [], []], "--elastic", "--steps", 4, **chosen)
    assert [each.code for each in done] == [0] * 4, done
    changed = json.loads((run / "run.json").read_bytes())["starts"][-1]["changed"]
    assert changed == {"runtime.world_size": [1, 4], "runtime.micro": [2, 1]}
