"""The twin: what its run is, but for the quantisation, and never anything else."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.command import ROOT, Command
from train.checkpoint import steps_in
from train.metrics import read
from train.run_folder import RunFolder


@pytest.fixture
def run(train: Command, data: Path, tmp_path: Path) -> Path:
    path = tmp_path / "run"
    assert train.run(data, path, "--steps", 8, settings={"seed": 3, "schedule.peak_lr": 2e-3}).code == 0
    return path


def test_the_twin_differs_from_its_run_in_nothing_but_the_quantisation(train: Command, run: Path) -> None:
    done = train("twin", run)
    assert (done.code, done.err) == (0, "")
    twin = run.with_name("run-twin")
    ours, theirs = (RunFolder(path).facts().identity() for path in (run, twin))
    assert {name: theirs[name] for name in ours if ours[name] != theirs[name]} == {"model.quantization": "none"}
    lines = [[line for line in read(path / "metrics.jsonl") if line["kind"] == "train"] for path in (run, twin)]
    assert len(lines[1]) == 8 == len(lines[0])
    for a, b in zip(*lines, strict=True):
        assert [a[name] for name in ("step", "tokens", "lr", "weight_decay")] == [
            b[name] for name in ("step", "tokens", "lr", "weight_decay")
        ]
    assert 0 < abs(lines[0][0]["loss"] - lines[1][0]["loss"]) < 0.1, "the same weights on the same batch, less rounding"


def test_the_twin_goes_on_when_its_run_has(train: Command, data: Path, run: Path) -> None:
    assert train("twin", run, faults=[("signal_in", "step", 5, 15)]).code == 75
    assert train("twin", run).code == 0
    twin = run.with_name("run-twin")
    assert steps_in(twin / "checkpoints")[-1] == 8
    more: dict[str, object] = {"seed": 3, "schedule.peak_lr": 2e-3}
    assert train.run(data, run, "--steps", 12, settings=more).code == 0
    assert train("twin", run).code == 0
    assert steps_in(twin / "checkpoints")[-1] == 12
    assert "nothing left to do" in train("twin", run).out


def test_the_data_set_is_that_of_the_run_wherever_it_is_now(train: Command, data: Path, run: Path) -> None:
    starts = json.loads((run / "run.json").read_text())
    starts["starts"][-1]["data"] = "/nowhere"
    (run / "run.json").write_text(json.dumps(starts))
    done = train("twin", run)
    assert done.code == 1 and "--data DIR" in done.err and done.err.count("\n") == 1
    assert train("twin", run, "--data", data).code == 0


def test_what_has_no_twin_is_refused_in_one_line(train: Command, run: Path, tmp_path: Path) -> None:
    assert train("twin", run).code == 0
    bare = Path(shutil.copytree(run, tmp_path / "bare"))
    shutil.rmtree(bare / "checkpoints")
    for path, said in (
        (run.with_name("run-twin"), "is in full precision already"),
        (bare, "has no checkpoint yet"),
        (tmp_path / "none", "no run here"),
    ):
        done = train("twin", path)
        assert done.code == 1 and said in done.err and done.err.count("\n") == 1
    assert not (tmp_path / "none-twin").exists()


def test_make_twin_trains_and_compares_and_make_report_writes_the_page(run: Path) -> None:
    """By the commands that people type."""
    for target in ("twin", "report"):
        done = subprocess.run(
            ["make", target, f"RUN={run}", f"PYTHON={sys.executable}"], cwd=ROOT, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        if target == "twin":
            assert "gap        step 8: loss" in done.stdout
            assert (run.parent / "compare-run-run-twin.html").exists() and (run.parent / "run-twin").exists()
    assert (run / "report.html").exists()
