"""The command line: quick help, exit codes, and one line for every mistake, in a process of its own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.train.command import ROOT, TINY, Command
from tests.train.same_bytes import assert_same_run

SETTINGS = [f"--set={name}={value}" for name, value in TINY.items()]


def start(*args: object) -> "subprocess.Popen[str]":
    """`python -m train ARGS`, the very command that people type."""
    return subprocess.Popen(
        [sys.executable, "-m", "train", *map(str, args)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_help_names_every_command() -> None:
    process = start("--help")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert all(f"  {command} " in out for command in ("run", "eval", "sample"))


def test_help_is_quick_because_nothing_heavy_is_imported_for_it() -> None:
    code = "import sys, train.cli; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_real_process_stops_at_ctrl_c_and_goes_on_to_the_same_bytes(
    train: Command, data: Path, tmp_path: Path
) -> None:
    command = ("run", "--preset", "tiny", "--device", "cpu", "--data", data, "--run", tmp_path / "run", *SETTINGS)
    process = start(*command)
    while not (log := tmp_path / "run" / "metrics.jsonl").exists() or log.read_bytes().count(b"\n") < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "with nothing lost; the same command goes on" in err and err.count("\n") == 1
    process = start(*command)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert "going on from checkpoint" in out
    assert train.run(data, tmp_path / "reference", settings={"checkpoint.every": 1}).code == 0
    assert_same_run(tmp_path / "run", tmp_path / "reference")


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["run"], 2, "--preset"),
        (["run", "--preset", "tiny", "--data", "D", "--run", "R", "--steps", "0"], 2, "--steps"),
        (["run", "--preset", "tiny", "--data", "D", "--run", "R", "--device", "tpu"], 2, "cpu"),
        (["fly"], 2, "fly"),
        (["run", "--preset", "huge", "--data", "DATA", "--run", "R"], 1, "95m, tiny"),
        (["run", "--preset", "tiny", "--data", "/nowhere", "--run", "R"], 1, "/nowhere/manifest.json"),
        (["run", "--preset", "tiny", "--data", "DATA", "--run", "R", "--set", "modle.hidden=1"], 1, "model.hidden"),
        (["run", "--preset", "tiny", "--data", "DATA", "--run", "R", "--set", "seed"], 1, "name=value"),
        (["run", "--preset", "tiny", "--data", "DATA", "--run", "R", "--steps", "301"], 1, "300"),
        (["eval", "/nowhere"], 1, "/nowhere"),
        (["sample", "/nowhere", "--prompt", "x"], 1, "/nowhere"),
        (["sample", "/nowhere", "--prompt", "x", "--top-p", "0"], 2, "--top-p"),
    ],
)
def test_a_mistake_is_told_in_one_line(
    train: Command, data: Path, tmp_path: Path, args: list[str], code: int, words: str
) -> None:
    places = {"DATA": str(data), "R": str(tmp_path / "run"), "D": str(data)}
    done = train(*[places.get(arg, arg) for arg in args])
    assert done.code == code, done
    assert done.err.startswith("error: ") and done.err.count("\n") == 1
    assert words in done.err
    assert not (tmp_path / "run").exists()


def test_a_run_without_a_checkpoint_cannot_be_read(train: Command, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train.run(data, run, faults=[("kill_at", "fsync", 12)]).code == -9
    done = train("eval", run)
    assert done.code == 1
    assert "no checkpoint yet" in done.err or "no run here" in done.err
