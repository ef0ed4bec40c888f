"""Ternary health in a page: how codes, activations and norms of every layer and projection moved, and stand now.

The names and their meaning are those of probes.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from train.report.charts import Curve, chart, ramp
from train.report.page import Figure
from train.report.recorded import column

Grid = npt.NDArray[np.float64]  # (probes, layers, projections); NaN where nothing finite was measured


@dataclass(frozen=True)
class Quantity:
    """What is shown of the probes: `of` takes the name of a measured number to its grid."""

    title: str
    caption: str
    of: Callable[[Callable[[str], Grid]], Grid]
    percent: bool = False
    log: bool = False


QUANTITIES = (
    Quantity("Zeros", "Share of the codes that are 0.", lambda get: 100 * get("zero"), percent=True),
    Quantity(
        "Flipped codes",
        "Share of the codes that one update changed. It falls with the learning rate; 0 is a layer at rest.",
        lambda get: 100 * get("flipped"),
        percent=True,
        log=True,
    ),
    Quantity(
        "Saturated activations",
        "Share of the int8 activations at ±127; one value a token always is.",
        lambda get: 100 * get("saturated"),
        percent=True,
        log=True,
    ),
    Quantity("Activation absmax", "Largest |x| of a token, mean over tokens.", lambda get: get("absmax"), log=True),
    Quantity("Weight scale", "s = mean|W| of the latent weights.", lambda get: get("scale"), log=True),
    Quantity(
        "Update to weight",
        "Norm of an update over the norm of the latent weights.",
        lambda get: get("update_norm") / get("weight_norm"),
        log=True,
    ),
    Quantity("Gradient norm", "Of a matrix, before the clip.", lambda get: get("grad_norm"), log=True),
)


@dataclass(frozen=True)
class Health:
    """The charts over time, a line a layer, and the last probe as tables of (title, projections, rows)."""

    step: int
    charts: list[Figure]
    tables: list[tuple[str, list[str], list[list[tuple[str, float]]]]]


def health(probes: Sequence[dict[str, Any]]) -> Health | None:
    """None when nothing was probed. Of the full-precision twin, what needs codes is left out."""
    if not probes:
        return None
    steps = column(probes, "step")
    projections = list(dict.fromkeys(each["projection"] for each in probes[-1]["layers"]))
    layers = 1 + max(each["layer"] for each in probes[-1]["layers"])

    def grid(name: str) -> Grid:
        found = np.full((len(probes), layers, len(projections)), np.nan)
        for n, probe in enumerate(probes):
            for each in probe["layers"]:
                value = each.get(name)
                found[n, each["layer"], projections.index(each["projection"])] = np.nan if value is None else value
        return found

    charts, tables = [], []
    colors = ramp(layers)
    legend = [(f"layer {i}", colors[i]) for i in sorted({0, layers // 2, layers - 1})]
    for quantity in QUANTITIES:
        with np.errstate(divide="ignore", invalid="ignore"):
            values = quantity.of(grid)
        if not np.isfinite(values).any():
            continue
        curves = [Curve(steps, _mean(values[:, i]), colors[i]) for i in range(layers)]
        svg = chart(curves, name=quantity.title, log=quantity.log, percent=quantity.percent)
        charts.append(Figure(f"{quantity.title}, by layer", svg, legend, quantity.caption))
        tables.append((quantity.title, projections, _cells(values[-1], "%" if quantity.percent else "")))
    return Health(int(steps[-1]), charts, tables)


def _mean(values: Grid) -> npt.NDArray[np.float64]:
    """(probes, projections) -> (probes,): the mean of what is finite, NaN where nothing is."""
    finite = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(finite, values, 0).sum(axis=1) / finite.sum(axis=1))


def _cells(values: npt.NDArray[np.float64], unit: str) -> list[list[tuple[str, float]]]:
    """(layers, projections) -> words, and how dark to paint them, 0 to 60."""
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 0.0)
    span = (high - low) or 1.0

    def cell(value: float) -> tuple[str, float]:
        return (f"{value:.2g}{unit}", round(60 * (value - low) / span)) if np.isfinite(value) else ("–", 0)

    return [[cell(value) for value in row] for row in values.tolist()]
