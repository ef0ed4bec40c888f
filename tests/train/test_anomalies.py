"""Spikes and non-finite steps are found, and found again the same after a resume at any step."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.permutation import Permutation
from tests.train.command import Command
from tests.train.dataset import build
from tests.train.same_bytes import without_timing
from train.anomalies import LIMIT, WINDOW, Anomalies

NAN, INF = math.nan, math.inf


def wobble(step: int) -> float:
    """Mean 3, standard deviation 0.1."""
    return 3 + (0.1 if step % 2 else -0.1)


def test_a_spike_is_recorded_above_six_sigma_and_not_below() -> None:
    for value, expected in ((3.59, []), (3.61, ["loss"]), (1.0, [])):
        watch = Anomalies()
        for step in range(1, WINDOW + 1):
            assert watch.observe(step, wobble(step), 1 + step % 3) == []
        found = watch.observe(WINDOW + 1, value, 2.0)
        assert [line["quantity"] for line in found] == expected
        if found:
            assert found[0]["step"] == WINDOW + 1
            assert found[0]["value"] == value
            assert found[0]["mean"] == pytest.approx(3)
            assert found[0]["sigma"] == pytest.approx(0.1)


def test_the_gradient_norm_is_watched_as_well() -> None:
    watch = Anomalies()
    for step in range(1, WINDOW + 1):
        watch.observe(step, 3.0, wobble(step))
    assert [line["quantity"] for line in watch.observe(WINDOW + 1, 3.0, 4.0)] == ["grad_norm"]


def test_a_short_window_knows_no_spike() -> None:
    watch = Anomalies()
    for step in range(1, WINDOW):
        watch.observe(step, wobble(step), 1.0)
    assert watch.observe(WINDOW, 100.0, 1.0) == []


@pytest.mark.parametrize(("loss", "grad_norm"), [(NAN, 1.0), (INF, 1.0), (3.0, NAN), (3.0, -INF)])
def test_five_non_finite_steps_in_a_row_are_too_many(loss: float, grad_norm: float) -> None:
    watch = Anomalies()
    for count in range(1, LIMIT):
        assert [line["in_a_row"] for line in watch.observe(count, loss, grad_norm)] == [count]
    watch.observe(LIMIT, 3.0, 1.0)  # a finite step starts the count again
    for step in range(LIMIT):
        assert not watch.too_many
        watch.observe(step, loss, grad_norm)
    assert watch.too_many


values = st.one_of(st.floats(2.9, 3.1), st.floats(0, 50), st.sampled_from([NAN, INF]))


@given(st.lists(st.tuples(values, values), min_size=WINDOW, max_size=WINDOW + 40), st.data())
def test_a_resumed_watch_finds_the_same(steps: list[tuple[float, float]], data: st.DataObject) -> None:
    whole, first, rest = Anomalies(), Anomalies(), Anomalies()
    cut = data.draw(st.integers(0, len(steps)))
    expected = [line for n, step in enumerate(steps, 1) for line in whole.observe(n, *step)]
    got = [line for n, step in enumerate(steps[:cut], 1) for line in first.observe(n, *step)]
    rest.load_state_dict(json.loads(json.dumps(first.state_dict())))
    got += [line for n, step in enumerate(steps[cut:], cut + 1) for line in rest.observe(n, *step)]
    assert repr(got) == repr(expected)  # repr: a NaN equals a NaN
    assert rest.state_dict() == whole.state_dict()


NONFINITE, SPIKE, STEPS = 30, 134, 138  # the spike stands behind the first full window


def test_planted_anomalies_are_recorded_with_what_they_have_seen(train: Command, tmp_path: Path) -> None:
    """Through the command line, with the real window; interrupted within the window and gone on with."""
    data = build(tmp_path / "data", train=STEPS * 4, val=0)
    settings = {"schedule.total_steps": STEPS, "sample.every": 0, "checkpoint.every": 0}
    faults = [("poison", NONFINITE), ("spike", 20.0, SPIKE)]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train.run(data, whole, settings=settings, faults=faults).code == 0
    found = without_timing(whole / "anomalies.jsonl")
    keys = {"kind", "step", "sequences"}
    assert [set(line) - keys for line in found] == [
        {"loss", "grad_norm", "in_a_row"},
        *2 * [{"quantity", "value", "mean", "sigma"}],
    ]
    assert [(line["kind"], line["step"]) for line in found] == [
        ("nonfinite", NONFINITE),
        ("spike", SPIKE),
        ("spike", SPIKE),
    ]
    assert (found[0]["loss"], found[0]["grad_norm"]) == (None, None)
    trained = [line for line in without_timing(whole / "metrics.jsonl") if line["kind"] == "train"]
    before = [line for line in trained[: SPIKE - 1] if not line["skipped"]][-128:]
    for line, quantity in zip(found[1:], ("loss", "grad_norm"), strict=True):
        assert (line["quantity"], line["value"]) == (quantity, trained[SPIKE - 1][quantity])
        assert line["mean"] == pytest.approx(np.mean([each[quantity] for each in before]))
        assert line["sigma"] == pytest.approx(np.std([each[quantity] for each in before]))
        assert line["value"] > line["mean"] + 6 * line["sigma"]
    data_id = json.loads((data / "manifest.json").read_text())["id"]
    order = Permutation(STEPS * 4, tag="order/1", data_id=data_id, seed=0)
    for line in found:
        batch = order(np.arange(4 * line["step"] - 4, 4 * line["step"])).tolist()
        assert line["sequences"] == batch
        shown = train("inspect", whole, "--step", line["step"]).out.splitlines()
        assert [int(row.split()[1]) for row in shown] == batch

    for steps in (NONFINITE, SPIKE - 1, SPIKE, STEPS):
        assert train.run(data, broken, "--steps", steps, settings=settings, faults=faults).code == 0
    for log in ("anomalies.jsonl", "metrics.jsonl"):
        assert without_timing(broken / log) == without_timing(whole / log)
