"""compare: runs of one config are equal or the first difference is named; of others the gap is what the logs say."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.train.command import Command
from tests.train.dataset import build
from train.compare import Comparison, Difference, compare, told
from train.metrics import read

SEEDS = (0, 1, 2)
CHANGED: dict[str, object] = {"model.layers": 2}


@pytest.fixture(scope="module")
def runs(train: Command, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run and its twin of three seeds each, a0 ... a2 and b0 ... b2; of seed 0 with `train eval`."""
    folder = tmp_path_factory.mktemp("compare")
    for seed in SEEDS:
        for name, quantization in (("a", "bitnet"), ("b", "none")):
            chosen = {**CHANGED, "seed": seed, "model.quantization": quantization, "probe.every": 3}
            assert train.run(data, folder / f"{name}{seed}", "--steps", 16, settings=chosen).code == 0
    for name in ("a0", "b0"):
        assert train("eval", folder / name, "--sequences", 7).code == 0
    return folder


@pytest.fixture
def copy(runs: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(runs / "a0", tmp_path / "copy"))


def edit(log: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    lines = read(log)
    change(lines)
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))


def evals(run: Path) -> dict[int, tuple[float, float]]:
    lines = read(run / "metrics.jsonl")
    return {n["step"]: (n["val_loss"], n["val_bits_per_byte"]) for n in lines if n["kind"] == "eval"}


def test_two_runs_of_one_config_are_equal_however_often_they_save_and_probe(
    train: Command, data: Path, runs: Path, tmp_path: Path
) -> None:
    other: dict[str, object] = {**CHANGED, "checkpoint.every": 3, "probe.every": 2, "eval.every": 8, "sample.every": 4}
    assert train.run(data, tmp_path / "other", "--steps", 12, settings=other).code == 0
    done = train("compare", runs / "a0", tmp_path / "other")
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[-1] == "equal      it is" and "up to step 12" in done.out
    assert not list(tmp_path.glob("*.html")) and not list(runs.glob("*.html"))


def test_runs_that_drifted_apart_are_an_error_that_names_the_first_step(
    train: Command, data: Path, runs: Path, tmp_path: Path
) -> None:
    """A trainer that draws something at random, which a resume forgets."""
    run, chosen = tmp_path / "run", {**CHANGED, "probe.every": 3, "checkpoint.every": 7}
    assert train.run(data, run, "--steps", 7, settings=chosen).code == 0
    assert train.run(data, run, "--steps", 16, settings=chosen, faults=[("draw",)]).code == 0
    done = train("compare", runs / "a0", run)
    assert done.code == 1
    ours, theirs = (read(each / "metrics.jsonl") for each in (runs / "a0", run))
    loss = [next(n["loss"] for n in lines if n["kind"] == "train" and n["step"] == 8) for lines in (ours, theirs)]
    assert done.out.splitlines()[-1] == f"different  first at step 8, train loss: {loss[0]} in a, {loss[1]} in b"
    found = json.loads(train("compare", runs / "a0", run, "--json").out)
    assert found["same_config"] is True and found["equal"] is False
    assert found["first_difference"] == {"step": 8, "line": "train", "field": "loss", "a": loss[0], "b": loss[1]}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_whatever_number_differs_is_named(runs: Path, copy: Path, choose: st.DataObject) -> None:
    log = runs / "a0" / "metrics.jsonl"
    lines = read(log)
    at = choose.draw(st.integers(0, len(lines) - 1))
    line = lines[at]
    if line["kind"] == "probe":
        i = choose.draw(st.integers(0, len(line["layers"]) - 1))
        where, name = line["layers"][i], choose.draw(st.sampled_from(["zero", "flipped", "absmax", "update_norm"]))
        field = f"layers[{i}].{name}"
    else:
        names = [name for name, value in line.items() if isinstance(value, float)]
        where, name = line, choose.draw(st.sampled_from(names))
        field = name
    before = where[name]
    where[name] = choose.draw(st.sampled_from([None, math.nextafter(before, 9), before + 1]))
    (copy / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    want = Difference(line["step"], line["kind"], field, before, where[name])
    assert compare([(runs / "a0", copy)]).first_difference == want


def drop_a_sample_text(run: Path) -> None:
    edit(run / "samples.jsonl", lambda lines: lines[0].update(text="other"))


def add_an_anomaly(run: Path) -> None:
    (run / "anomalies.jsonl").write_text('{"kind": "spike", "step": 6}\n')


def change_a_checkpoint(run: Path) -> None:
    path = run / "checkpoints" / "step-00000010" / "checkpoint.json"
    stated = json.loads(path.read_text())
    stated["files"]["model.safetensors"]["sha256"] = "0" * 64
    path.write_text(json.dumps(stated))


@pytest.mark.parametrize(
    ("break_", "step", "line", "field"),
    [
        (drop_a_sample_text, 8, "sample", "The"),
        (add_an_anomaly, 6, "anomaly", ""),
        (change_a_checkpoint, 10, "checkpoint", "model.safetensors"),
    ],
)
def test_all_that_a_run_leaves_is_compared(
    runs: Path, copy: Path, break_: Callable[[Path], None], step: int, line: str, field: str
) -> None:
    break_(copy)
    found = compare([(runs / "a0", copy)]).first_difference
    assert found and (found.step, found.line, found.field) == (step, line, field)


def test_time_and_machine_do_not_matter_but_are_noted(runs: Path, copy: Path) -> None:
    edit(copy / "metrics.jsonl", lambda lines: [line["timing"].update(ms=0.0) for line in lines] and None)
    starts = json.loads((copy / "run.json").read_text())
    starts["starts"][-1]["versions"]["torch"] = "2.8.0"
    (copy / "run.json").write_text(json.dumps(starts))
    found = compare([(runs / "a0", copy)])
    assert found.first_difference is None and not found.failed
    assert any("torch is" in note and "2.8.0" in note for note in found.notes)


def test_validation_on_another_number_of_sequences_is_no_difference(
    train: Command, data: Path, runs: Path, tmp_path: Path
) -> None:
    chosen: dict[str, object] = {**CHANGED, "eval.sequences": 3}
    assert train.run(data, tmp_path / "run", "--steps", 16, settings=chosen).code == 0
    assert evals(tmp_path / "run")[4] != evals(runs / "a0")[4]
    assert train("compare", runs / "a0", tmp_path / "run").code == 0


def test_a_run_and_its_twin_differ_by_what_the_logs_say(train: Command, runs: Path) -> None:
    done = train("compare", runs / "a0", runs / "b0")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert [line for line in lines if line.startswith("differs")] == [
        "differs    model.quantization: bitnet in a, none in b"
    ]
    a, b = evals(runs / "a0"), evals(runs / "b0")
    for step in (4, 8, 12, 16):
        nats, bits = a[step][0] - b[step][0], a[step][1] - b[step][1]
        assert (
            f"gap        step {step}: loss {a[step][0]:.4f} and {b[step][0]:.4f}, "
            f"a - b {nats:+.4f} nats, {bits:+.4f} bits per byte"
        ) in lines
    whole = [json.loads((runs / name / "evals" / "step-16.json").read_text()) for name in ("a0", "b0")]
    gap = whole[0]["loss"] - whole[1]["loss"]
    assert any(line.startswith("gap        step 16 on 7 sequences") and f"{gap:+.4f} nats" in line for line in lines)
    page = (runs / "compare-a0-b0.html").read_text()
    assert lines[-1] == f"page       {runs}/compare-a0-b0.html"
    assert f"{gap:+.4f}" in page and page.count("<svg") == 4 and "model.quantization" in page


def test_the_gap_over_seeds_is_the_mean_of_the_pairs_and_its_standard_error(train: Command, runs: Path) -> None:
    pairs = [part for seed in SEEDS[1:] for part in ("--pair", runs / f"a{seed}", runs / f"b{seed}")]
    done = train("compare", runs / "a0", runs / "b0", *pairs, "--json")
    assert (done.code, done.err) == (0, "")
    found = json.loads(done.out)
    assert [gap["step"] for gap in found["gaps"]] == [4, 8, 12, 16], "seed 0 alone has a `train eval`"
    assert found["runs"] == [[str(runs / f"a{seed}"), str(runs / f"b{seed}")] for seed in SEEDS]
    for gap in found["gaps"]:
        a, b = (np.array([evals(runs / f"{side}{seed}")[gap["step"]] for seed in SEEDS]) for side in "ab")
        each = a - b  # (seeds, nats and bits per byte)
        for i, unit in enumerate(("nats", "bits")):
            assert gap[unit]["each"] == each[:, i].tolist()
            assert gap[unit]["mean"] == pytest.approx(each[:, i].mean(), rel=1e-12)
            assert gap[unit]["standard_error"] == pytest.approx(each[:, i].std(ddof=1) / math.sqrt(3), rel=1e-9)
        assert gap["loss"] == pytest.approx([a[:, 0].mean(), b[:, 0].mean()])
        assert gap["bits_per_byte"] == pytest.approx([a[:, 1].mean(), b[:, 1].mean()])
    last = found["gaps"][-1]["nats"]
    out = train("compare", runs / "a0", runs / "b0", *pairs).out
    assert f"a - b {last['mean']:+.4f} ± {last['standard_error']:.4f} nats" in out
    assert "means over 3 pairs" in out and "3 seeds" in Path(found["page"]).read_text()


@pytest.mark.parametrize(
    ("paths", "said"),
    [
        (["a0", "b0", "a1", "b2"], "a pair shares its seed"),
        (["a0", "b0", "a0", "b0"], "seed 0 was given already"),
        (["a0", "b0", "b1", "a1"], "model.quantization is bitnet in"),
        (["a0", "a0", "a1", "a1"], "no gap to take the mean of"),
        (["a0", "none"], "no run here"),
    ],
)
def test_pairs_that_are_no_repetition_are_refused_in_one_line(
    train: Command, runs: Path, paths: list[str], said: str
) -> None:
    a, b, *more = [runs / path for path in paths]
    done = train("compare", a, b, *(["--pair", *more] if more else []))
    assert (done.code, done.out) == (1, "")
    assert said in done.err and done.err.count("\n") == 1


def test_a_run_without_a_step_is_not_called_equal(runs: Path, copy: Path) -> None:
    (copy / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match="nothing to compare yet"):
        compare([(runs / "a0", copy)])


def test_no_gap_is_stated_over_different_texts(train: Command, runs: Path, tmp_path: Path) -> None:
    data = build(tmp_path / "set", train=120, val=10, seed=9)
    assert train.run(data, tmp_path / "run", "--steps", 16, settings=CHANGED).code == 0
    assert train("eval", tmp_path / "run", "--sequences", 7).code == 0
    done = train("compare", runs / "a0", tmp_path / "run")
    assert done.code == 0 and "gap        none to state" in done.out and "no gap is stated" in done.out


def test_a_comparison_stands_without_its_page(train: Command, runs: Path, tmp_path: Path) -> None:
    done = train("compare", runs / "a0", runs / "b0", "--json", faults=[("without", "matplotlib")])
    assert done.code == 0 and json.loads(done.out)["page"] is None
    assert done.err.startswith("no page: ") and "pip install" in done.err and done.err.count("\n") == 1
    done = train("compare", runs / "a0", runs / "b0", "--out", tmp_path / "no" / "folder.html")
    assert done.code == 0 and "gap " in done.out and done.err.startswith("no page: ")


def test_many_evaluations_are_told_in_few_lines_with_the_last_one(runs: Path) -> None:
    found = compare([(runs / "a0", runs / "b0")])
    for count in (1, 7, 8, 9, 120):
        gaps = [type(gap)(**{**vars(gap), "step": n}) for n in range(1, count + 1) for gap in found.gaps[:1]]
        lines = [line for line in told(Comparison(**{**vars(found), "gaps": gaps})) if line.startswith("gap ")]
        assert 1 <= len(lines) <= 8 and lines[-1].startswith(f"gap        step {count}:")
