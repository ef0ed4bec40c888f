"""The summary of a run: every number printed is that of the logs."""

import json
from pathlib import Path
from statistics import median

import pytest

from shared.durable import sha256_file
from tests.train.command import Command
from train.metrics import number, read
from train.summary import speed_of, summary


@pytest.fixture(scope="module")
def run(train: Command, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("summary") / "run"
    assert train.run(data, path, "--steps", 18, faults=[("poison", 7)]).code == 0
    assert train("eval", path, "--sequences", 5).code == 0
    return path


def test_a_summary_says_what_the_logs_say(train: Command, data: Path, run: Path) -> None:
    done = train("summary", run)
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    records = read(run / "metrics.jsonl")
    steps = [record for record in records if record["kind"] == "train"]
    evals = [record for record in records if record["kind"] == "eval"]
    assert lines[0] == f"run        {run}: step 18 of 24, {18 * 4 * 32:,} tokens"
    assert json.loads((data / "manifest.json").read_text())["id"] in lines[1]
    assert lines[2] == f"loss       {steps[0]['loss']:.4f} at step 1, {steps[17]['loss']:.4f} at step 18"
    found = [line for line in lines if line.startswith("val loss")]
    assert found == [
        f"val loss   {e['val_loss']:.4f} at step {e['step']}, {e['val_bits_per_byte']:.4f} bits per byte"
        for e in evals[-2:]
    ]
    evaluation = json.loads((run / "evals" / "step-18.json").read_text())
    assert f"eval       {evaluation['loss']:.4f} at step 18 on 5 sequences" in done.out
    assert "skipped    1 steps" in done.out
    speed = median(step["timing"]["tokens_per_second"] for step in steps[1:])
    assert f"speed      {speed:,.0f} tokens/s" in done.out
    point = run / "checkpoints" / "step-00000018"
    assert f"{point}, model.safetensors sha256 {sha256_file(point / 'model.safetensors')}" in done.out
    texts = [record["text"] for record in read(run / "samples.jsonl") if record["step"] == 16]
    assert [json.loads(line[11:]) for line in lines if line.startswith("sample")] == texts


def test_a_gpu_shows_its_use_and_its_memory() -> None:
    timings = [
        {"ms": 1000.0 * n, "tokens_per_second": 100.0 * n, "mfu": 0.1 * n, "memory_bytes": n * 2**30} for n in (3, 1, 2)
    ]
    want = "speed      200 tokens/s, 2,000.0 ms a step (medians), MFU 20.0%, at most 3.00 GiB, 6 s in steps"
    assert speed_of(timings) == want


def test_what_was_not_finite_is_said_so() -> None:
    assert number(None) == "not finite"


def test_a_folder_without_a_run_is_refused_in_one_line(train: Command, tmp_path: Path) -> None:
    done = train("summary", tmp_path)
    assert done.code == 1 and "no run here" in done.err and done.err.count("\n") == 1


def test_a_run_without_a_step_has_no_summary(run: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((run / "config.json").read_bytes())
    with pytest.raises(ValueError, match="no step is recorded yet"):
        list(summary(tmp_path))
