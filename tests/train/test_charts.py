"""Curves: a long one is thinned without hiding how far it went, and every chart is well-formed and small."""

import math
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.report.charts import Curve, chart, ramp, thinned, top_of

VALUES = st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), min_size=1, max_size=300)


@given(VALUES, st.integers(1, 40))
def test_a_thinned_curve_covers_every_value_and_invents_none(values: list[float], bins: int) -> None:
    x, y = np.arange(1.0, len(values) + 1), np.array(values)
    few = thinned(x, y, bins)
    assert len(few.x) == min(bins, len(values)) and (np.diff(few.x) > 0).all()
    finite = y[np.isfinite(y)]
    assert not len(finite) or (np.nanmax(few.high), np.nanmin(few.low)) == (finite.max(), finite.min())
    seen = np.isfinite(few.mean)
    slack = 1e-9 * np.abs(few.mean[seen]) + 1e-9
    assert (few.low[seen] <= few.mean[seen] + slack).all() and (few.mean[seen] <= few.high[seen] + slack).all()
    assert seen.any() == bool(len(finite))


def test_what_is_short_is_drawn_as_it_is() -> None:
    y = np.array([3.0, math.nan, 1.0])
    few = thinned(np.arange(1.0, 4.0), y)
    np.testing.assert_array_equal(few.mean, y)


@pytest.mark.parametrize(
    "values",
    [[], [1.0], [math.nan], [math.nan] * 500, [2.0] * 500, [0.0] * 5, [-1.0, 1.0], [1e-30, 1e30], list(range(9999))],
)
@pytest.mark.parametrize("log", [False, True])
def test_any_values_make_a_chart_of_well_formed_svg(values: list[float], log: bool) -> None:
    y = np.array(values, dtype=np.float64)
    x = np.arange(1.0, len(y) + 1)
    svg = chart([Curve(x, y, band=True), Curve(x[::7], y[::7], dots=True)], name="one", log=log, marks=[1.0])
    ElementTree.fromstring(svg.replace("xlink:href", "href"))
    assert "#010203" not in svg and "#040506" not in svg, "the page decides on the colour of text and lines"
    assert len(svg) < 120_000


def test_a_long_curve_is_as_small_as_a_short_one() -> None:
    y = np.random.default_rng(0).random(60_000)
    long, short = (chart([Curve(np.arange(1.0, n + 1), y[:n], band=True)], name="one") for n in (60_000, 361))
    assert len(long) < 1.2 * len(short)


def test_the_same_curve_is_the_same_text() -> None:
    curve = Curve(np.arange(1.0, 9.0), np.arange(1.0, 9.0))
    assert chart([curve], name="a") == chart([curve], name="a")


def test_a_long_fall_is_cut_off_above_and_a_short_or_flat_curve_is_not() -> None:
    steps = np.arange(2000.0)
    top = top_of(3 + 8 * np.exp(-steps / 20), np.array([3.1]))
    assert top is not None and 3 < top < 4
    assert top_of(3 + 8 * np.exp(-steps[:50] / 20), np.array([])) is None
    assert top_of(np.full(2000, 3.0), np.array([])) is None
    assert top_of(np.full(2000, math.nan), np.array([])) is None


@pytest.mark.parametrize("layers", [1, 2, 3, 8, 40])
def test_layers_have_colours_of_their_own_that_can_be_read_on_white_and_on_black(layers: int) -> None:
    colors = ramp(layers)
    assert len(set(colors)) == layers
    for color in colors:
        light = luminance(color)
        assert 1.05 / (light + 0.05) >= 3 and (light + 0.05) / 0.05 >= 3, "WCAG 2.1, 1.4.11: 3 to 1 for graphics"
    assert all(a != b for a, b in pairwise(colors))


def luminance(color: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2.1)."""
    parts = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b
