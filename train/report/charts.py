"""Curves as SVG text for a page: as wide as a phone, coloured for light and dark, small however long the run.

Axes and numbers only: titles, legends and whatever a person has named stand in the page around them.
"""

import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

Array = npt.NDArray[np.float64]

DOTS = 40  # as many can be told apart
BINS = 360  # points of a long curve: one a pixel of the chart
WIDTH, HEIGHT = 360, 210  # CSS pixels, which a phone shows one to one
DPI = 72  # of an SVG: 1 pt = 1 px

BLUE, ORANGE, GREEN, VIOLET = "#2f7ed8", "#e0702a", "#2a9d5c", "#b04fc0"  # readable on white and on black
_DEPTH = ((0.18, 0.49, 0.85), (0.69, 0.31, 0.75), (0.88, 0.44, 0.16))  # the first layer blue, the last orange

# Colours that the page decides: matplotlib writes the left, the page reads the right.
_INK, _LINE = "#010203", "#040506"
_BY_THE_PAGE = {_INK: "currentColor", _LINE: "var(--line)"}
_STEPS = (1, 2, 2.5, 5, 10)  # between ticks
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be read, searched and scaled
    "font.size": 11,
    "text.parse_math": False,
    "text.color": _INK,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _INK,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "grid.color": _LINE,
    "grid.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "path.simplify": True,
}


@dataclass(frozen=True)
class Curve:
    """`y` over `x`, both (N,) float64 with x rising; NaN leaves a gap. `dots` for few points that stand apart."""

    x: Array
    y: Array
    color: str = BLUE
    dots: bool = False
    band: bool = False  # show how far the values between two points of a long curve reach


@dataclass(frozen=True)
class Thinned:
    """A long curve in BINS bins: the middle of each, its least, mean and largest value, all (<= BINS,)."""

    x: Array
    low: Array
    mean: Array
    high: Array


def thinned(x: Array, y: Array, bins: int = BINS) -> Thinned:
    """Bins of equally many neighbours. No value lies outside low ... high; a bin without a finite value is NaN."""
    count = min(bins, len(x))
    edges = np.linspace(0, len(x), count + 1).round().astype(int)
    parts = [y[a:b] for a, b in pairwise(edges)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a bin of nothing but NaN is NaN
        low, mean, high = (np.array([f(part) for part in parts]) for f in (np.nanmin, np.nanmean, np.nanmax))
    middles = np.array([x[a:b].mean() for a, b in pairwise(edges)])
    return Thinned(middles, low, mean, high)


def chart(
    curves: Sequence[Curve],
    *,
    name: str,
    log: bool = False,
    percent: bool = False,
    top: float | None = None,
    x_end: float | None = None,
    marks: Sequence[float] = (),
    line_at: float | None = None,
) -> str:
    """An <svg> element.

    `name` keeps the ids of one chart apart from those of others in a page. `top` cuts off what lies above it. `x_end`
    lets the x axis go further than the curves. `marks` are steps that deserve a triangle at the upper edge.
    """
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI)
        axes = figure.add_axes((46 / WIDTH, 24 / HEIGHT, 1 - 58 / WIDTH, 1 - 34 / HEIGHT))
        for curve in curves:
            _draw(axes, curve)
        if top is not None:
            axes.set_ylim(top=top)
        axes.set_xlim(0, x_end or max((curve.x[-1] for curve in curves if len(curve.x)), default=1))
        _scale(axes, log and all((curve.y > 0).any() for curve in curves), "%" if percent else "")
        axes.grid(axis="y")
        axes.tick_params(length=0)
        if line_at is not None:
            axes.axhline(line_at, color=_INK, linewidth=0.8, linestyle=(0, (4, 3)))
        if len(marks):
            axes.plot(marks, [1.0] * len(marks), "v", transform=axes.get_xaxis_transform(), clip_on=False, markersize=6,
                      color=ORANGE, markeredgewidth=0)  # fmt: skip
        return _inline(figure)


def top_of(losses: Array, val: Array) -> float | None:
    """Where to cut a long loss curve off, so that what comes after the first steep fall can be told apart."""
    settled = losses[len(losses) // 20 :]
    finite = settled[np.isfinite(settled)]
    if len(losses) < 100 or not len(finite):
        return None
    top = float(np.nanmax([np.percentile(finite, 99.5), *val]))
    return top + 0.05 * (top - float(finite.min())) if np.nanmax(losses[:20]) > top else None


def ramp(count: int) -> list[str]:
    """Colours for `count` layers, from the first to the last; each is readable on white and on black."""
    colors = []
    for i in range(count):
        place = 2 * i / max(1, count - 1)
        a, b = (_DEPTH[0], _DEPTH[1]) if place <= 1 else (_DEPTH[1], _DEPTH[2])
        share = place if place <= 1 else place - 1
        rgb = (round(255 * (p * (1 - share) + q * share)) for p, q in zip(a, b, strict=True))
        colors.append("#" + "".join(f"{value:02x}" for value in rgb))
    return colors


def _draw(axes: Axes, curve: Curve) -> None:
    if curve.dots:
        few = thinned(curve.x, curve.y)
        marker = "o" if len(few.x) <= DOTS else ""  # more would hide what they stand on
        axes.plot(few.x, few.mean, marker=marker, color=curve.color, markersize=3.5, linewidth=1.3, clip_on=False)
    elif len(curve.x) > BINS:
        few = thinned(curve.x, curve.y)
        if curve.band:
            axes.fill_between(few.x, few.low, few.high, color=curve.color, alpha=0.28, linewidth=0)
        axes.plot(few.x, few.mean, color=curve.color, linewidth=1.3)
    else:
        lonely = len(curve.x) == 1
        axes.plot(curve.x, curve.y, "o" if lonely else "-", color=curve.color, linewidth=1.3, markersize=3.5)


def _scale(axes: Axes, log: bool, unit: str) -> None:
    """Few round ticks; a logarithmic axis only where the values reach so far that it helps."""
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=_STEPS))
    if log and (shown := axes.dataLim.minposy) * 4 < axes.dataLim.y1:
        axes.set_yscale("log")
        decades = np.log10(axes.dataLim.y1 / shown)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,), numticks=8))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: _tick(value))
    axes.yaxis.set_major_formatter(lambda value, _: _tick(value) + unit)


def _tick(value: float) -> str:
    """A number in at most six letters or so."""
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.4g}{letter}"
    return f"{value:.4g}"


def _inline(figure: Figure) -> str:
    """The figure as an element of a page: no prologue, no date, no ids but those that are referred to."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    inner = file.getvalue().partition("<svg ")[2].partition(">")[2]
    inner = re.sub(r"<metadata>.*?</metadata>", "", inner, flags=re.DOTALL)
    inner = re.sub(r"\s+", " ", re.sub(r'<g id="[^"]*"', "<g", inner))
    for theirs, ours in _BY_THE_PAGE.items():
        inner = inner.replace(theirs, ours)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" aria-hidden="true">{inner.strip()}'
