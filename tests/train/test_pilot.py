"""`make pilot`: the beginning of the job, or a rehearsal of it, by the one command that people type."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.train.command import ROOT
from train.metrics import read

GOLDEN = ROOT / "tests" / "golden"
# The tiny preset with a small model, and a rehearsal set that the golden source is large enough for.
SETTINGS = {"model.hidden": 64, "model.layers": 1, "model.heads": 1, "model.kv_heads": 1, "model.ffn": 96}
ARGS = "--device cpu " + " ".join(f"--set {name}={value}" for name, value in SETTINGS.items())
SMALL = {
    "PYTHON": sys.executable,
    "PRESET": "tiny",
    "ARGS": ARGS,
    "SOURCE": str(GOLDEN / "source" / "prose.jsonl"),
    "TOKENIZER": str(GOLDEN / "tokenizer.model"),
}
SIZE = "--train-sequences {} --val-sequences 256 --seq-len 16"


RECORDER = """#!/usr/bin/env bash
echo "$@" >> calls
[[ "$3" != "$FAIL" ]] || exit 75
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The project as a tarball brings it, so that nobody's data/ and runs/ are touched."""
    for name in ("prep", "shared", "train"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def start(tree: Path, target: str, **variables: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        ["make", target, *(f"{name}={value}" for name, value in variables.items())],
        cwd=tree,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**{k: v for k, v in os.environ.items() if not k.startswith("MAKE")}, "OMP_NUM_THREADS": "1"},
    )


def make(tree: Path, target: str, **variables: object) -> tuple[int, str, str]:
    process = start(tree, target, **variables)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def evals(tree: Path) -> list[str]:
    return sorted(path.name for path in (tree / "runs" / "pilot" / "evals").glob("*"))


def test_without_a_data_set_the_pilot_rehearses_and_says_so(tree: Path) -> None:
    code, out, err = make(tree, "pilot", **SMALL, STEPS=2, PILOT_SIZE=SIZE.format(24))
    assert (code, err) == (0, "")
    assert "a rehearsal, for data/fineweb-edu is not built" in out.splitlines()[-1]
    assert json.loads((tree / "data" / "pilot" / "manifest.json").read_text())["splits"]["train"]["sequences"] == 24
    assert [r["step"] for r in read(tree / "runs" / "pilot" / "metrics.jsonl")] == [1, 2]
    assert json.loads((tree / "runs" / "pilot" / "evals" / "step-2.json").read_text())["sequences"] == 256
    assert "The sun" in out and "checkpoint runs/pilot/checkpoints/step-00000002" in out


def test_a_pilot_on_the_full_set_is_the_beginning_of_the_run(tree: Path) -> None:
    built = make(tree, "tokenize", **{**SMALL, "ARGS": SIZE.format(2400)})
    assert (built[0], built[2]) == (0, "")
    code, out, err = make(tree, "pilot", **SMALL, STEPS=2)
    assert (code, err) == (0, "") and "rehearsal" not in out
    assert "make train RUN=runs/pilot goes on with it" in out.splitlines()[-1]
    assert not (tree / "data" / "pilot").exists()
    code, out, err = make(tree, "train", **SMALL, STEPS=4, RUN="runs/pilot")
    assert (code, err) == (0, "") and "steps      3 to 4 of 300, going on from checkpoint step-00000002" in out
    assert [r["step"] for r in read(tree / "runs" / "pilot" / "metrics.jsonl")] == [1, 2, 3, 4]


def test_an_interrupted_pilot_stops_and_the_same_command_goes_on(tree: Path) -> None:
    process = start(tree, "pilot", **SMALL, STEPS=250, PILOT_SIZE=SIZE.format(2400))
    log = tree / "runs" / "pilot" / "metrics.jsonl"
    while len(read(log)) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "with nothing lost; the same command goes on" in err
    assert "perplexity" not in out and evals(tree) == [], "nothing after the run was run"
    done = len(read(log))
    assert done < 250
    code, out, err = make(tree, "pilot", **SMALL, STEPS=250, PILOT_SIZE=SIZE.format(2400))
    assert (code, err) == (0, "") and "going on from checkpoint" in out and evals(tree) == ["step-250.json"]


@pytest.fixture
def recorder(tree: Path) -> Path:
    """A python that only notes what it is called with, in the file that is returned."""
    (tree / "python").write_text(RECORDER)
    (tree / "python").chmod(0o755)
    return tree / "calls"


@pytest.mark.parametrize("fails", ["tokenize", "run", "eval", "sample", "none"])
def test_nothing_runs_after_a_part_that_was_interrupted(
    tree: Path, recorder: Path, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAIL", fails)
    code, _, err = make(tree, "pilot", PYTHON="./python")
    calls = [line.split()[2] for line in recorder.read_text().splitlines()]
    all_calls = ["tokenize", "run", "eval", "sample", "summary"]
    assert calls == all_calls[: all_calls.index(fails) + 1 if fails in all_calls else None]
    assert (code == 0) == (fails == "none") and ("Error 75" in err) == (fails != "none")


def test_the_pilot_is_the_95m_job_for_1000_steps(tree: Path, recorder: Path) -> None:
    assert make(tree, "pilot", PYTHON="./python")[0] == 0
    tokenize, run, evaluate, *_ = recorder.read_text().splitlines()
    assert tokenize == "-m prep tokenize --out data/pilot --train-sequences 32000 --val-sequences 512"
    assert run == "-m train run --preset 95m --data data/pilot --run runs/pilot --steps 1000"
    assert evaluate == "-m train eval runs/pilot --sequences 256"
    recorder.unlink()
    assert make(tree, "train", PYTHON="./python", RUN="runs/pilot")[0] == 0
    assert recorder.read_text() == "-m train run --preset 95m --data data/fineweb-edu --run runs/pilot\n"


@pytest.mark.parametrize(
    ("built", "variables", "want"),
    [
        ("data/pilot", {}, ["run --preset 95m --data data/pilot"]),
        (
            "data/pilot",
            {"SOURCE": "a b"},
            ["tokenize --source a b --out data/pilot", "run --preset 95m --data data/pilot"],
        ),
        ("data/fineweb-edu", {"SOURCE": "x"}, ["run --preset 95m --data data/fineweb-edu"]),
        ("else where", {"DATA": "else where"}, ["run --preset 95m --data else where"]),
        ("data/pilot.partial", {}, ["tokenize --out data/pilot", "run --preset 95m --data data/pilot"]),
        ("data/fineweb-edu.partial", {}, ["tokenize --out data/pilot", "run --preset 95m --data data/pilot"]),
    ],
)
def test_the_pilot_builds_only_what_is_missing(
    tree: Path, recorder: Path, built: str, variables: dict[str, str], want: list[str]
) -> None:
    (tree / built).mkdir(parents=True)
    (tree / built / "manifest.json").touch()
    assert make(tree, "pilot", PYTHON="./python", **variables)[0] == 0
    calls = [line.removeprefix("-m prep ").removeprefix("-m train ") for line in recorder.read_text().splitlines()]
    assert all(call.startswith(start) for call, start in zip(calls, want, strict=False))
    assert len(calls) == len(want) + 3
