"""The schedule's golden values, and what holds for every schedule."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.config import ScheduleConfig, preset
from train.schedule import lr, weight_decay

S95 = preset("95m").schedule


def test_the_golden_values_of_the_95m_schedule() -> None:
    assert lr(1, S95) == 4e-6
    assert lr(375, S95) == 1.5e-3
    assert lr(376, S95) == pytest.approx(1.499983e-3, rel=1e-6)
    assert lr(30_000, S95) == 1e-3
    assert lr(30_001, S95) == pytest.approx(9.99967e-4, rel=1e-6)
    assert lr(60_000, S95) == 1.5e-5


def test_decay_ends_after_the_middle_step() -> None:
    assert [weight_decay(n, S95) for n in (1, 30_000, 30_001, 60_000)] == [0.1, 0.1, 0.0, 0.0]


def test_tiny_has_its_own_knots() -> None:
    tiny = preset("tiny").schedule
    assert (tiny.warmup_steps, tiny.middle_step, tiny.total_steps) == (20, 150, 300)
    assert [lr(n, tiny) for n in (20, 150, 300)] == [1.5e-3, 1e-3, 1.5e-5]
    assert [weight_decay(n, tiny) for n in (150, 151)] == [0.1, 0.0]


rates = st.floats(0, 1, allow_subnormal=False)


@settings(deadline=None)
@given(st.lists(st.integers(1, 500), min_size=3, max_size=3), rates, rates, rates)
def test_every_schedule_is_straight_between_exact_knots(
    lengths: list[int], peak: float, middle: float, final: float
) -> None:
    ends = [sum(lengths[: i + 1]) for i in range(3)]
    schedule = ScheduleConfig(*ends, peak, middle, final)
    knots = [(0, 0.0), *zip(ends, (peak, middle, final), strict=True)]
    for end, value in knots[1:]:
        assert lr(end, schedule) == value
    for (a, first), (b, last) in itertools.pairwise(knots):
        for n in range(a + 1, b):
            assert lr(n, schedule) == pytest.approx(first + (last - first) * (n - a) / (b - a), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("n", [0, 60_001])
def test_there_is_no_rate_outside_the_schedule(n: int) -> None:
    with pytest.raises(AssertionError):
        lr(n, S95)
