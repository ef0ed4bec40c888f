"""Nothing trains on bad ground, and a run is only ever continued as what it is. One line says what is wrong."""

import json
import shutil
from pathlib import Path

import pytest

from shared.durable import exclusive
from tests.train.command import Command, Done
from tests.train.dataset import build
from tests.train.same_bytes import assert_same_run, contents, without_timing
from train.checkpoint import steps_in
from train.metrics import read


@pytest.fixture(scope="module")
def finished(train: Command, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of all 24 steps, with checkpoints of 5, 10, 15, 20, 24; tests copy it."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert train.run(data, run).code == 0
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def refused(done: Done, *words: str) -> None:
    """Exit 1, one line on stderr that starts with error: and has all the words, no traceback."""
    assert done.code == 1, done
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    for word in words:
        assert word in done.err


def folder_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


# -- the data set -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file",
    ["train/00001.npy", "val/00000.npy", "train/documents.parquet", "tokenizer.model", "manifest.json", "build.json"],
)
def test_a_flipped_bit_in_any_file_of_the_data_set_is_named_before_anything_else(
    train: Command, data: Path, tmp_path: Path, file: str
) -> None:
    bad = Path(shutil.copytree(data, tmp_path / "bad"))
    flip(bad / file, 200)
    refused(train.run(bad, tmp_path / "run"), str(bad / file))
    assert not (tmp_path / "run").exists()


def test_a_missing_and_a_foreign_file_are_both_named(train: Command, data: Path, tmp_path: Path) -> None:
    bad = Path(shutil.copytree(data, tmp_path / "bad"))
    (bad / "train" / "00000.npy").unlink()
    (bad / "train" / "extra.npy").write_bytes(b"")
    refused(train.run(bad, tmp_path / "run"), "train/00000.npy", "train/extra.npy", "prep repair")


def test_95m_refuses_another_vocabulary(train: Command, data: Path, tmp_path: Path) -> None:
    done = train("run", "--preset", "95m", "--data", data, "--run", tmp_path / "run")
    refused(done, "32000", "1000", "--preset tiny")


def test_too_few_sequences_are_refused_with_both_numbers_unless_steps_fits(
    train: Command, data: Path, tmp_path: Path
) -> None:
    long = {"schedule.total_steps": 31}
    refused(train.run(data, tmp_path / "run", settings=long), "124 sequences", "has 120", "--steps 30")
    assert train.run(data, tmp_path / "run", "--steps", 2, settings=long).code == 0
    refused(train.run(data, tmp_path / "run", "--steps", 32, settings=long), "--steps 32", "31")


def test_without_a_validation_split_nothing_is_evaluated(train: Command, tmp_path: Path) -> None:
    data = build(tmp_path / "no_val", train=20, val=0)
    done = train.run(data, tmp_path / "run", "--steps", 5)
    assert done.code == 0
    assert "no validation split" in done.out
    assert {line["kind"] for line in read(tmp_path / "run" / "metrics.jsonl")} == {"train"}
    refused(train("eval", tmp_path / "run"), "no val split")


# -- the identity -------------------------------------------------------------------------------------------------


def test_another_data_set_is_refused(train: Command, run: Path, tmp_path: Path) -> None:
    other = build(tmp_path / "other", train=120, val=10, seed=1)
    refused(train.run(other, run), "data_id", "--restart")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 1),
        ("model.ffn", 32),
        ("model.quantization", "none"),
        ("batch.sequences", 2),
        ("batch.micro", 4),
        ("schedule.peak_lr", 1e-3),
        ("schedule.total_steps", 25),
        ("optimizer.beta2", 0.99),
    ],
)
def test_another_value_of_the_identity_is_refused_by_name(
    train: Command, data: Path, run: Path, name: str, value: object
) -> None:
    before = contents(run)
    refused(train.run(data, run, settings={name: value}), name.replace("batch.micro", "runtime.micro"), str(value))
    assert contents(run) == before


def test_other_settings_may_change_and_are_noted(train: Command, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train.run(data, run, "--steps", 3).code == 0
    assert train.run(data, run, "--steps", 6, settings={"checkpoint.every": 2, "eval.every": 3}).code == 0
    starts = json.loads((run / "run.json").read_text())["starts"]
    assert [(s["from_step"], s["last_step"], s["outcome"]) for s in starts] == [(0, 3, "done"), (3, 6, "done")]
    assert starts[0]["changed"] == {}
    assert starts[1]["changed"] == {"checkpoint.every": [5, 2], "eval.every": [4, 3]}
    assert starts[1]["data_id"] == json.loads((data / "manifest.json").read_text())["id"]
    assert starts[1]["versions"]["torch"]
    assert json.loads((run / "config.json").read_text())["eval"]["every"] == 3


def test_what_was_resolved_at_the_first_start_is_reused(train: Command, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train.run(data, run, "--steps", 1, settings={"batch.micro": "none"}).code == 0
    resolved = json.loads((run / "config.json").read_text())["runtime"]
    assert (resolved["device"], resolved["micro"], resolved["threads"], resolved["world_size"]) == ("cpu", 2, 1, 1)
    assert train.run(data, run, "--steps", 2, settings={"batch.micro": "none"}, faults=[("threads", 2)]).code == 0
    assert json.loads((run / "config.json").read_text())["runtime"] == resolved


# -- resuming -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [None, 24, 20])
def test_a_finished_run_again_exits_0_and_changes_nothing(
    train: Command, data: Path, run: Path, steps: int | None
) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    done = train.run(data, run, *(["--steps", steps] if steps else []))
    assert (done.code, done.err) == (0, "")
    assert "nothing left to do" in done.out
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(
    train: Command, data: Path, run: Path, finished: Path
) -> None:
    flip(folder_of(run, 24) / "model.safetensors")
    (folder_of(run, 20) / "checkpoint.json").unlink()
    done = train.run(data, run)
    assert (done.code, done.err) == (0, "")
    assert f"{folder_of(run, 24)} is damaged (model.safetensors does not have its sha256)" in done.out
    assert f"{folder_of(run, 20)} is damaged (checkpoint.json is missing)" in done.out
    assert "going on from checkpoint step-00000015" in done.out
    assert folder_of(run, 24).with_name("step-00000024.damaged").is_dir()
    again = contents(run / "checkpoints")
    assert all(again[name] == data for name, data in contents(finished / "checkpoints").items())
    for log in ("metrics.jsonl", "samples.jsonl", "anomalies.jsonl"):
        assert without_timing(run / log) == without_timing(finished / log)
    assert read(run / "discarded" / "metrics-1.jsonl")[0]["step"] == 16


def test_when_no_checkpoint_verifies_it_stops_and_names_restart(train: Command, data: Path, run: Path) -> None:
    for step in steps_in(run / "checkpoints"):
        flip(folder_of(run, step) / "state.json")
    refused(train.run(data, run), "no checkpoint verifies", "--restart")
    refused(train.run(data, run), "no checkpoint verifies", "--restart")  # never a silent new start


def test_restart_starts_anew_and_sets_the_old_logs_aside(
    train: Command, data: Path, run: Path, finished: Path, tmp_path: Path
) -> None:
    old = (run / "metrics.jsonl").read_bytes()
    assert train.run(data, run, "--restart", settings={"seed": 3}).code == 0
    assert (run / "discarded" / "metrics-1.jsonl").read_bytes() == old
    assert train.run(data, tmp_path / "fresh", settings={"seed": 3}).code == 0
    assert_same_run(run, tmp_path / "fresh")
    assert len(json.loads((run / "run.json").read_text())["starts"]) == 2


@pytest.mark.parametrize(("log", "line"), [("metrics.jsonl", 3), ("metrics.jsonl", -1)])
def test_a_log_without_lines_that_the_checkpoint_covers_is_refused(
    train: Command, data: Path, run: Path, log: str, line: int
) -> None:
    shutil.rmtree(folder_of(run, 24))
    lines = [text for text in (run / log).read_text().splitlines(keepends=True) if json.loads(text)["step"] <= 20]
    del lines[line if line > 0 else [i for i, text in enumerate(lines) if json.loads(text)["kind"] == "train"][-1]]
    (run / log).write_text("".join(lines))
    refused(train.run(data, run), str(run / log), "up to step 20")


def test_a_deleted_evaluation_is_made_again(train: Command, data: Path, run: Path, finished: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert json.loads(lines[-1])["kind"] == "eval"
    (run / "metrics.jsonl").write_text("".join(lines[:-1]))
    assert train.run(data, run).code == 0
    assert without_timing(run / "metrics.jsonl") == without_timing(finished / "metrics.jsonl")


# -- the folder ---------------------------------------------------------------------------------------------------


def test_a_second_trainer_is_refused(train: Command, data: Path, run: Path) -> None:
    with exclusive(run / "lock", "test"):
        refused(train.run(data, run), "another trainer")


def test_a_folder_that_is_no_run_is_left_alone(train: Command, data: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("irreplaceable")
    for restart in ([], ["--restart"]):
        refused(train.run(data, tmp_path / "mine", *restart), "thesis.txt", "--run")
    assert contents(tmp_path / "mine") == {"thesis.txt": b"irreplaceable"}


def test_a_damaged_config_is_refused_and_restart_is_offered(train: Command, data: Path, run: Path) -> None:
    (run / "config.json").write_text("{")
    refused(train.run(data, run), str(run / "config.json"), "--restart")
    assert train.run(data, run, "--restart", "--steps", 1).code == 0


# -- saving -------------------------------------------------------------------------------------------------------


def test_a_full_disk_while_saving_leaves_the_older_checkpoints(
    train: Command, data: Path, tmp_path: Path, finished: Path
) -> None:
    run = tmp_path / "run"
    done = train.run(data, run, faults=[("fail_writes", 100)])
    refused(done, "could not be saved", "No space left", "the same command")
    kept = steps_in(run / "checkpoints")
    assert kept == steps_in(finished / "checkpoints")[: len(kept)] and 1 <= len(kept) < 5
    assert train.run(data, run).code == 0
    assert contents(run / "checkpoints") == contents(finished / "checkpoints")


def test_retention_keeps_the_last_and_the_milestones(train: Command, data: Path, tmp_path: Path) -> None:
    kept = {"checkpoint.every": 2, "checkpoint.keep_last": 3, "checkpoint.keep_every": 8}
    assert train.run(data, tmp_path / "run", settings=kept).code == 0
    assert steps_in(tmp_path / "run" / "checkpoints") == [8, 16, 20, 22, 24]


def test_checkpoints_are_made_by_time_as_well(train: Command, data: Path, tmp_path: Path) -> None:
    timed = {"checkpoint.every": 0, "checkpoint.minutes": 1e-9}
    assert train.run(data, tmp_path / "run", "--steps", 4, settings=timed).code == 0
    assert steps_in(tmp_path / "run" / "checkpoints") == [1, 2, 3, 4]


# -- anomalies ----------------------------------------------------------------------------------------------------


def test_non_finite_steps_change_nothing_and_five_in_a_row_stop_the_run_with_exit_3(
    train: Command, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    poison = [("poison", 3, 7, 8, 9, 10, 11)]
    done = train.run(data, run, settings={"checkpoint.every": 1}, faults=poison)
    assert done.code == 3
    assert done.err.startswith("error: ") and done.err.count("\n") == 1 and "step 11" in done.err
    steps = {line["step"]: line for line in read(run / "metrics.jsonl") if line["kind"] == "train"}
    assert [n for n, line in steps.items() if line["skipped"]] == [3, 7, 8, 9, 10, 11]
    assert steps[3]["loss"] is None and steps[3]["grad_norm"] is None
    found = read(run / "anomalies.jsonl")
    assert [(line["step"], line["in_a_row"]) for line in found] == [(3, 1), (7, 1), (8, 2), (9, 3), (10, 4), (11, 5)]
    for name in ("model.safetensors", "optimizer.safetensors"):  # no weight, no moment, no count has moved
        assert (folder_of(run, 2) / name).read_bytes() == (folder_of(run, 3) / name).read_bytes()
        assert (folder_of(run, 3) / name).read_bytes() != (folder_of(run, 4) / name).read_bytes()
    assert json.loads((run / "run.json").read_text())["starts"][-1]["outcome"] == "stopped on anomalies"
    again = train.run(data, run, faults=poison)  # the last checkpoint stands before the fifth: it is met again
    assert again.code == 3
    assert read(run / "anomalies.jsonl") == found
    assert train.run(data, run).code == 0  # and when what made it non-finite is gone, the run goes on


def test_a_learning_rate_out_of_this_world_ends_in_exit_3_and_not_in_a_traceback(
    train: Command, data: Path, tmp_path: Path
) -> None:
    wild = {"schedule.peak_lr": 1e36, "schedule.middle_lr": 1e36, "sample.every": 1, "eval.every": 1}
    done = train.run(data, tmp_path / "run", settings=wild)
    assert done.code == 3, done
    assert done.err.count("\n") == 1


# -- what it says -------------------------------------------------------------------------------------------------


def test_the_start_and_the_speed_are_told(train: Command, data: Path, tmp_path: Path) -> None:
    done = train.run(data, tmp_path / "run")
    for words in (
        "device     cpu",
        "parameters",
        "Ctrl-C is safe",
        "tokens/s; step 24 expected",
        "verified",
        "done: step 24",
    ):
        assert words in done.out


def test_the_numbers_in_metrics_are_what_their_names_say(finished: Path) -> None:
    lines = [line for line in read(finished / "metrics.jsonl") if line["kind"] == "train"]
    keys = {"kind", "step", "tokens", "loss", "lr", "weight_decay", "grad_norm", "skipped", "timing"}
    assert all(set(line) == keys for line in lines)
    assert [line["step"] for line in lines] == list(range(1, 25))
    assert [line["tokens"] for line in lines] == [n * 4 * 32 for n in range(1, 25)]
    assert [line["lr"] for line in lines[:4]] == [1.5e-3 / 4 * n for n in range(1, 5)]
    assert [line["weight_decay"] for line in lines[11:13]] == [0.1, 0.0]
    assert lines[-1]["loss"] < lines[0]["loss"]
    for timing in (line["timing"] for line in lines):
        assert timing["tokens_per_second"] == pytest.approx(4 * 32 / (timing["ms"] / 1000))
        assert timing["mfu"] is None  # no CPU is in the table
        assert timing["memory_bytes"] > 1e7
    evals = [line for line in read(finished / "metrics.jsonl") if line["kind"] == "eval"]
    assert [line["step"] for line in evals] == [4, 8, 12, 16, 20, 24]
    assert all(set(line) == {"kind", "step", "val_loss", "val_bits_per_byte", "timing"} for line in evals)
    samples = read(finished / "samples.jsonl")
    assert [line["step"] for line in samples] == [8] * 6 + [16] * 6 + [24] * 6
    assert all(line["text"].startswith(line["prompt"][:3]) for line in samples)
