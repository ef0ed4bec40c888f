"""The page that lays two runs, or pairs of runs over seeds, over each other."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from shared.provenance import utc_now
from train.compare import Comparison, estimate, place
from train.report.charts import BLUE, GREEN, ORANGE, Curve, chart, top_of
from train.report.page import Figure, write_page
from train.report.recorded import column

SIDES = (BLUE, ORANGE)


def write_comparison(found: Comparison, out: Path, command: str) -> Path:
    """Write the page to `out`, and return that."""
    a, b = found.pairs[0]
    legend = [(f"a: {a.path.name}", SIDES[0]), (f"b: {b.path.name}", SIDES[1])]
    if len(found.pairs) > 1:
        legend = [(f"{words}, {len(found.pairs)} seeds", color) for words, color in legend]
    write_page(
        out,
        "compare.html",
        title=f"{a.path.resolve().name} and {b.path.resolve().name}",
        written=utc_now(),
        command=command,
        found=found,
        charts=list(_charts(found, legend)),
        estimate=estimate,
        place=place,
    )
    return out


def _charts(found: Comparison, legend: list[tuple[str, str]]) -> Iterator[Figure]:
    runs = [(run, color) for pair in found.pairs for run, color in zip(pair, SIDES, strict=True)]

    def over(kind: str, name: str, dots: bool = False) -> list[Curve]:
        curves = []
        for run, color in runs:
            lines = getattr(run, kind)
            if lines:
                curves.append(Curve(column(lines, "step"), column(lines, name), color, dots=dots))
        return curves

    losses, evals = over("train", "loss"), over("evals", "val_loss", dots=True)
    tops = [
        top for curve in losses if (top := top_of(curve.y, np.concatenate([np.empty(0), *(each.y for each in evals)])))
    ]
    if losses:
        svg = chart(losses, name="loss", top=max(tops) if len(tops) == len(losses) else None)
        yield Figure("Training loss, nats a token", svg, legend, "Of a long run the mean of neighbouring steps.")
    if evals:
        yield Figure("Validation loss, nats a token", chart(evals, name="val"), legend)
    if found.gaps:
        gaps = [gap for gap in found.gaps if gap.sequences == found.gaps[0].sequences]
        at = np.array([gap.step for gap in gaps], dtype=np.float64)
        each = [
            Curve(at, np.array([gap.bits.each[i] for gap in gaps]), GREEN, dots=True) for i in range(len(found.pairs))
        ]
        svg = chart(each, name="gap", line_at=0.0)
        yield Figure("Gap a − b, bits per byte", svg, caption="A line a pair; above 0, b is ahead.")
    if losses:
        svg = chart(over("train", "grad_norm"), name="norm", log=True)
        yield Figure("Gradient norm, before the clip", svg, legend)
