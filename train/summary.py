"""A run in a few lines: how far it is, what it has reached, how fast it is, what it writes. Read from its own logs."""

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from shared.progress import duration
from train import checkpoint, metrics
from train.metrics import number
from train.run_folder import RunFolder


def summary(path: Path) -> Iterator[str]:
    """The lines about the run at `path`. ValueError when there is no run, or none of its steps is recorded."""
    folder = RunFolder(path)
    facts = folder.facts()
    records = metrics.read(folder.metrics)
    steps = [record for record in records if record["kind"] == "train"]
    if not steps:
        raise ValueError(f"{path}: no step is recorded yet; python -m train run goes on with it")
    last = steps[-1]
    total = facts.config.schedule.total_steps
    yield f"run        {path}: step {last['step']:,} of {total:,}, {last['tokens']:,} tokens"
    yield f"data       id {facts.data_id}"
    yield f"loss       {number(steps[0]['loss'])} at step 1, {number(last['loss'])} at step {last['step']:,}"
    for record in [record for record in records if record["kind"] == "eval"][-2:]:
        loss, bits = number(record["val_loss"]), number(record["val_bits_per_byte"])
        yield f"val loss   {loss} at step {record['step']:,}, {bits} bits per byte"
    for step, found in evaluations(folder):
        yield (
            f"eval       {number(found['loss'])} at step {step:,} on {found['sequences']:,} sequences, "
            f"{number(found['bits_per_byte'])} bits per byte"
        )
    yield f"skipped    {sum(record['skipped'] for record in steps)} steps without a finite loss and gradient"
    yield speed_of([record["timing"] for record in steps[1:] or steps])
    for step in checkpoint.steps_in(folder.checkpoints)[-1:]:
        point = folder.checkpoints / checkpoint.name_of(step)
        model = json.loads((point / checkpoint.SUMMARY).read_bytes())["files"][checkpoint.MODEL]
        yield f"checkpoint {point}, {checkpoint.MODEL} sha256 {model['sha256']}"
    yield from samples(metrics.read(folder.samples))


def evaluations(folder: RunFolder) -> list[tuple[int, dict[str, Any]]]:
    """What `train eval` has left, by step."""
    found = [json.loads(path.read_bytes()) for path in folder.evals.glob("step-*.json")]
    return sorted(((each["step"], each) for each in found), key=lambda pair: pair[0])


def speed_of(timings: list[dict[str, Any]]) -> str:
    """Medians over steps, of which the first is not one: it compiles."""
    speed, milliseconds = (median(t[name] for t in timings) for name in ("tokens_per_second", "ms"))
    parts = [f"{speed:,.0f} tokens/s", f"{milliseconds:,.1f} ms a step (medians)"]
    if timings[-1]["mfu"] is not None:
        parts.append(f"MFU {median(t['mfu'] for t in timings):.1%}")
    if timings[-1]["memory_bytes"] is not None:
        parts.append(f"at most {max(t['memory_bytes'] for t in timings) / 2**30:.2f} GiB")
    return "speed      " + ", ".join([*parts, f"{duration(sum(t['ms'] for t in timings) / 1000)} in steps"])


def samples(records: list[dict[str, Any]]) -> Iterator[str]:
    """The texts of the last step that has any, a line each."""
    for record in records:
        if record["step"] == records[-1]["step"]:
            yield f"sample     {json.dumps(record['text'], ensure_ascii=False)}"
