"""The page of one run: what was run, how it went, what it saw where it stumbled, what it says."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from shared.progress import duration
from shared.provenance import utc_now
from train import config, schedule
from train.inspect import Row, inspect
from train.metrics import number
from train.report.charts import BINS, BLUE, GREEN, ORANGE, VIOLET, Array, Curve, chart, top_of
from train.report.health import health
from train.report.page import Figure, write_page
from train.report.recorded import Line, Recorded, column, recorded

REPORT = "report.html"
EVENTS = 60  # steps with anomalies shown, the newest
WITH_DOCUMENTS = 5  # of these, the newest
TEXTS = 12  # steps of which samples are shown, evenly spaced
EXCERPT = 300  # characters of a document


@dataclass(frozen=True)
class Event:
    """The anomalies of a step, and the sequences that it saw with their documents."""

    step: int
    words: str
    rows: list[Row]


def write_report(path: Path, data: Path | None = None) -> Path:
    """Write report.html of the run at `path`, and return where. ValueError when there is no run.

    The data set, for the documents of anomalies, is that of the last start, or `data`.
    """
    run = recorded(path)
    events, missing = _events(run, data)
    write_page(
        path / REPORT,
        "run.html",
        title=path.resolve().name,
        written=utc_now(),
        command=f"python -m train report {path}",
        run=run,
        state=_state(run),
        tiles=list(_tiles(run)),
        charts=list(_charts(run)) if run.train else [],
        health=health(run.probes),
        events=events,
        num_events=len({line["step"] for line in run.anomalies}),
        missing=missing,
        excerpt=EXCERPT,
        samples=_samples(run.samples),
        evaluations=[found for _, found in run.evaluations if {"loss", "bits_per_byte"} <= found.keys()],
        others=[(name, found) for name, found in run.evaluations if not {"loss", "bits_per_byte"} <= found.keys()],
        settings=_settings(run),
        resolved=run.facts.to_dict()["runtime"],
    )
    return path / REPORT


def _state(run: Recorded) -> str:
    total = run.facts.config.schedule.total_steps
    kind = "full precision" if run.facts.config.model.quantization == "none" else "BitNet b1.58"
    outcome = run.starts[-1].get("outcome", "running, or killed") if run.starts else "of unknown outcome"
    return f"{run.facts.config.preset}, {kind}: step {run.step:,} of {total:,}, {outcome}"


def _tiles(run: Recorded) -> Iterator[tuple[str, str]]:
    """The figures one looks for first, with their words."""
    if run.evals:
        last = run.evals[-1]
        yield number(last["val_loss"]), f"validation loss at step {last['step']:,}, nats a token"
        yield number(last["val_bits_per_byte"]), "bits per byte there"
    if not run.train:
        return
    losses = column(run.train[-100:], "loss")
    yield number(_finite_mean(losses)), f"training loss, mean of the last {len(losses)} steps"
    timings = [line["timing"] for line in run.train[1:] or run.train]
    yield f"{median(t['tokens_per_second'] for t in timings):,.0f}", "tokens a second, median"
    if (used := [t["mfu"] for t in timings if t["mfu"] is not None]) and len(used) == len(timings):
        yield f"{median(used):.1%}", "of the device's peak (MFU), median"
    if memory := [t["memory_bytes"] for t in timings if t["memory_bytes"] is not None]:
        yield f"{max(memory) / 2**30:.2f} GiB", "memory at most"
    yield duration(sum(t["ms"] for t in timings) / 1000), "in steps, without evaluation and saving"
    yield f"{run.train[-1]['tokens']:,}", "tokens predicted"
    yield f"{sum(line['skipped'] for line in run.train):,}", "steps skipped: not finite"
    yield f"{len(run.anomalies):,}", "anomalies recorded"


def _charts(run: Recorded) -> Iterator[Figure]:
    steps, losses = column(run.train, "step"), column(run.train, "loss")
    at, val = column(run.evals, "step"), column(run.evals, "val_loss")
    odd = sorted({float(line["step"]) for line in run.anomalies})
    marked = "Triangles: anomalies." if odd else ""
    curves = [Curve(steps, losses, BLUE, band=True), Curve(at, val, ORANGE, dots=True)]
    top = top_of(losses, val)
    above = f"The first steps, from {number(losses[0], 2)}, lie above the chart. " if top else ""
    yield Figure(
        "Loss, nats a token",
        chart(curves, name="loss", top=top, marks=odd),
        [("training", BLUE), ("validation", ORANGE)],
        f"{above}{_band(steps)}{marked}",
    )
    if len(at):
        bits = Curve(at, column(run.evals, "val_bits_per_byte"), ORANGE, dots=True)
        first = run.facts.config.eval.sequences
        yield Figure(
            "Validation, bits per byte",
            chart([bits], name="bits", x_end=run.step),
            caption=f"On the first {first:,} sequences of the validation split, or all there are.",
        )
    yield _schedule_chart(run)
    norms = Curve(steps, column(run.train, "grad_norm"), GREEN, band=True)
    clip = run.facts.config.optimizer.clip
    yield Figure(
        "Gradient norm, before the clip",
        chart([norms], name="norm", log=True, line_at=clip, marks=odd),
        caption=f"Dashed: the clip at {clip:g}. {_band(steps)}{marked}",
    )
    timed = run.train[1:] or run.train
    speed = column([line["timing"] for line in timed], "tokens_per_second")
    yield Figure(
        "Throughput, tokens a second",
        chart([Curve(column(timed, "step"), speed, VIOLET, band=True)], name="speed"),
        caption=f"Without the first step, which compiles. {_band(steps)}",
    )


def _schedule_chart(run: Recorded) -> Figure:
    s = run.facts.config.schedule
    at = np.unique(np.linspace(1, s.total_steps, BINS).round())
    knots = np.unique([*at, s.warmup_steps, s.middle_step])
    rates = np.array([schedule.lr(int(n), s) for n in knots])
    done = knots <= run.step
    svg = chart(
        [Curve(knots, rates, "#8a929b"), Curve(knots[done], rates[done], BLUE)], name="schedule", x_end=s.total_steps
    )
    words = f"Weight decay {s.weight_decay:g} up to step {s.middle_step:,}, then 0."
    return Figure("Learning rate", svg, [("done", BLUE), ("to come", "#8a929b")], words)


def _band(steps: Array) -> str:
    """How to read a long curve."""
    each = -(-len(steps) // BINS)
    return f"Line and band: mean and extremes of {each:,} steps. " if len(steps) > BINS else ""


def _events(run: Recorded, data: Path | None) -> tuple[list[Event], str]:
    """The newest steps with anomalies, newest first, the first few with what they saw; and why others are without."""
    by_step: dict[int, list[str]] = {}
    for line in run.anomalies:
        by_step.setdefault(line["step"], []).append(_words(line))
    events, missing = list[Event](), ""
    for step, words in list(reversed(by_step.items()))[:EVENTS]:
        rows: list[Row] = []
        if len(events) < WITH_DOCUMENTS and not missing:
            try:
                rows = inspect(run.path, step, data).rows
            except (ValueError, OSError) as error:
                missing = f"What they saw is not shown: {error}"
        events.append(Event(step, "; ".join(words), rows))
    return events, missing


def _words(line: Line) -> str:
    """An anomaly as a sentence."""
    if line["kind"] == "nonfinite":
        loss, norm = number(line["loss"]), number(line["grad_norm"])
        return f"loss {loss}, gradient norm {norm}: no update was made ({line['in_a_row']} in a row)"
    away = (line["value"] - line["mean"]) / line["sigma"]
    quantity = {"loss": "loss", "grad_norm": "gradient norm"}[line["quantity"]]
    return f"{quantity} {number(line['value'])} is {away:.1f} σ above the mean of {number(line['mean'])}"


def _samples(lines: list[Line]) -> list[tuple[str, list[tuple[int, str | None]]]]:
    """For each prompt its texts by step, newest first: the last and others evenly spaced."""
    steps = sorted({line["step"] for line in lines})
    kept = {steps[round(i)] for i in np.linspace(0, len(steps) - 1, min(TEXTS, len(steps)))} if steps else set()
    found: dict[str, list[tuple[int, str | None]]] = {}
    for line in reversed(lines):
        if line["step"] in kept:
            text = line["text"].removeprefix(line["prompt"]) if line["text"] is not None else None
            found.setdefault(line["prompt"], []).append((line["step"], text))
    return list(reversed(found.items()))


def _settings(run: Recorded) -> list[tuple[str, Any, bool]]:
    """(name, value, whether it is another than the preset's) of every setting."""
    ours = config.flatten(config.to_dict(run.facts.config))
    theirs = config.flatten(config.to_dict(config.preset(run.facts.config.preset)))
    return [(name, value, value != theirs[name]) for name, value in ours.items()]


def _finite_mean(values: Array) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else None
