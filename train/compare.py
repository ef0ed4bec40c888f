"""Two runs side by side: are they equal where they should be, and if they are different runs, how far apart?

Runs of one identity (config.json: settings that shape the trajectory, data id, what was resolved) must have equal lines
and checkpoints at equal steps, but for `timing`. Of runs that differ, the gap is told at equal steps on the same text;
over several pairs of runs that differ in the seed alone, as the mean of the paired gaps and its standard error.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from train import checkpoint, config
from train.report.recorded import Recorded, recorded

Pair = tuple[Recorded, Recorded]
ABSENT = "(absent)"
SHOWN = 8  # gaps told in lines, evenly spaced and the last one; all are in the page and in --json


@dataclass(frozen=True)
class Difference:
    """The first place where two runs that should be equal are not."""

    step: int
    line: str  # train, checkpoint, eval, probe, sample or anomaly
    field: str
    a: Any
    b: Any


@dataclass(frozen=True)
class Estimate:
    """A gap a - b over pairs of runs: `each` of them, their mean, and its standard error (None for one pair)."""

    each: list[float]

    @property
    def mean(self) -> float:
        return fmean(self.each)

    @property
    def standard_error(self) -> float | None:
        return stdev(self.each) / math.sqrt(len(self.each)) if len(self.each) > 1 else None

    def to_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "standard_error": self.standard_error, "each": self.each}


@dataclass(frozen=True)
class Gap:
    """Both sides evaluated after update `step`, on the same text; means over the pairs.

    `sequences` are those of `train eval`, the first of the validation split; None is the evaluation during training.
    """

    step: int
    sequences: int | None
    loss: tuple[float, float]
    bits_per_byte: tuple[float, float]
    nats: Estimate
    bits: Estimate


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; `first_difference` is looked for only where the identities are `same`."""

    pairs: list[Pair]
    same: bool
    common_steps: int
    first_difference: Difference | None
    settings: dict[str, tuple[Any, Any]]  # what differs in config.json between the first pair, by name
    gaps: list[Gap]  # by step; that of the training first
    notes: list[str]

    @property
    def failed(self) -> bool:
        return self.same and self.first_difference is not None

    def to_dict(self) -> dict[str, Any]:
        """The object of `train compare --json`."""
        return {
            "runs": [[str(a.path), str(b.path)] for a, b in self.pairs],
            "same_config": self.same,
            "equal": self.first_difference is None if self.same else None,
            "common_steps": self.common_steps,
            "first_difference": vars(self.first_difference) if self.first_difference else None,
            "settings": {name: list(values) for name, values in self.settings.items()},
            "gaps": [{**vars(gap), "nats": gap.nats.to_dict(), "bits": gap.bits.to_dict()} for gap in self.gaps],
            "notes": self.notes,
        }


def compare(paths: Sequence[tuple[Path, Path]]) -> Comparison:
    """Compare the runs of a pair, or of several pairs that differ in the seed alone. ValueError says what is amiss."""
    pairs = [(recorded(a), recorded(b)) for a, b in paths]
    a, b = pairs[0]
    same = a.facts.identity() == b.facts.identity()
    if len(pairs) > 1:
        if same:
            raise ValueError(f"{a.path} and {b.path} have the same config: there is no gap to take the mean of")
        _require_seeds(pairs)
    common = min(min(one.step, other.step) for one, other in pairs)
    if same and not common:
        raise ValueError(f"{a.path} and {b.path}: nothing to compare yet: one of them has recorded no step")
    ours, theirs = (config.flatten(side.facts.to_dict()) for side in (a, b))
    return Comparison(
        pairs=pairs,
        same=same,
        common_steps=common,
        first_difference=first_difference(a, b) if same else None,
        settings={name: (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]},
        gaps=[] if same else _gaps(pairs),
        notes=list(_notes(pairs, same)),
    )


def first_difference(a: Recorded, b: Recorded) -> Difference | None:
    """Where two runs of one identity first differ, up to the last step that both have recorded."""
    ours, theirs = _by_step(a, _same_evals(a, b)), _by_step(b, _same_evals(a, b))
    for step in range(1, min(a.step, b.step) + 1):
        at = ours.get(step, {}), theirs.get(step, {})
        for kind in KINDS:
            x, y = (side.get(kind) for side in at)
            if kind in MAY_LACK and (x is None or y is None):  # how often it is made is no part of the identity
                continue
            for field, p, q in _differing(x, y, ""):
                return Difference(step, kind, field, p, q)
    return None


def told(found: Comparison) -> Iterator[str]:
    """A comparison in lines for people."""
    for a, b in found.pairs:
        yield f"a          {a.path}: step {a.step:,}"
        yield f"b          {b.path}: step {b.step:,}"
    yield from (f"note       {note}" for note in found.notes)
    if found.same:
        yield f"config     the same: all that both have recorded up to step {found.common_steps:,} must be equal"
        if (d := found.first_difference) is None:
            yield "equal      it is"
        else:
            yield f"different  first at step {d.step:,}, {d.line} {d.field}: {d.a} in a, {d.b} in b"
        return
    for name, (ours, theirs) in found.settings.items():
        yield f"differs    {name}: {ours} in a, {theirs} in b"
    shown = range(0, len(found.gaps), -(-len(found.gaps) // SHOWN) or 1)
    for gap in [found.gaps[-1 - i] for i in reversed(shown)]:
        yield (
            f"gap        step {gap.step:,}{place(gap)}: loss {gap.loss[0]:.4f} and {gap.loss[1]:.4f}, "
            f"a - b {estimate(gap.nats)} nats, {estimate(gap.bits)} bits per byte"
        )
    if len(found.pairs) > 1:
        yield f"           means over {len(found.pairs)} pairs, ± their standard error, paired by seed"
    if not found.gaps:
        yield "gap        none to state: no evaluation on the same text at equal steps"


def place(gap: Gap) -> str:
    """Which evaluation it is, where it is not that of the training."""
    return "" if gap.sequences is None else f" on {gap.sequences:,} sequences"


def estimate(gap: Estimate) -> str:
    """+0.0123, or +0.0123 ± 0.0004 over several pairs."""
    error = gap.standard_error
    return f"{gap.mean:+.4f}" + (f" ± {error:.4f}" if error is not None else "")


KINDS = ("train", "checkpoint", "anomaly", "probe", "eval", "sample")
MAY_LACK = ("checkpoint", "probe", "eval", "sample")


def _by_step(run: Recorded, evals: bool) -> dict[int, dict[str, Any]]:
    """All that is recorded of a step, by kind."""
    found: dict[int, dict[str, Any]] = {}
    for kind, lines in (("train", run.train), ("probe", run.probes), ("eval", run.evals if evals else [])):
        for line in lines:
            found.setdefault(line["step"], {})[kind] = line
    for line in run.samples:
        found.setdefault(line["step"], {}).setdefault("sample", {})[line["prompt"]] = line["text"]
    for line in run.anomalies:
        found.setdefault(line["step"], {}).setdefault("anomaly", []).append(line)
    folder = run.path / "checkpoints"
    for step in checkpoint.steps_in(folder):
        with suppress(
            OSError, ValueError, KeyError
        ):  # a run in progress deletes old ones; train run judges damaged ones
            files = json.loads((folder / checkpoint.name_of(step) / checkpoint.SUMMARY).read_bytes())["files"]
            found.setdefault(step, {})["checkpoint"] = {name: file["sha256"] for name, file in files.items()}
    return found


def _differing(a: Any, b: Any, field: str) -> Iterator[tuple[str, Any, Any]]:
    """The fields in which two records differ, in order, with both values."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for name in [*a, *(b.keys() - a.keys())]:
            if name != "timing":
                inner = f"{field}.{name}" if field else name
                yield from _differing(a.get(name, ABSENT), b.get(name, ABSENT), inner)
    elif isinstance(a, list) and isinstance(b, list):
        for i, (x, y) in enumerate(zip_longest(a, b, fillvalue=ABSENT)):
            yield from _differing(x, y, f"{field}[{i}]")
    elif a != b:
        yield field, ABSENT if a is None and not field else a, ABSENT if b is None and not field else b


def _gaps(pairs: Sequence[Pair]) -> list[Gap]:
    """The gaps at all (step, sequences) that every run was evaluated at; none where the text is not the same."""
    if not all(_same_text(a, b) for a, b in pairs):
        return []
    training = all(_same_evals(a, b) for a, b in pairs) and len({a.facts.config.eval.sequences for a, _ in pairs}) == 1
    measured = [(_losses(a, training), _losses(b, training)) for a, b in pairs]
    shared = set.intersection(*({*a} & {*b} for a, b in measured))
    gaps = []
    for step, sequences in sorted(shared, key=lambda key: (key[0], key[1] or 0)):
        found = [(a[step, sequences], b[step, sequences]) for a, b in measured]
        losses, bits = ([(a[i], b[i]) for a, b in found] for i in (0, 1))
        gaps.append(
            Gap(
                step,
                sequences,
                (fmean(a for a, _ in losses), fmean(b for _, b in losses)),
                (fmean(a for a, _ in bits), fmean(b for _, b in bits)),
                Estimate([a - b for a, b in losses]),
                Estimate([a - b for a, b in bits]),
            )
        )
    return gaps


def _losses(run: Recorded, in_training: bool) -> dict[tuple[int, int | None], tuple[float, float]]:
    """{(step, sequences): (nats, bits per byte)} of all evaluations that are finite: `train eval`, and in training."""
    found: dict[tuple[int, int | None], tuple[float | None, float | None]] = {}
    if in_training:
        found = {(line["step"], None): (line["val_loss"], line["val_bits_per_byte"]) for line in run.evals}
    for _, line in run.evaluations:
        if {"step", "sequences", "loss", "bits_per_byte"} <= line.keys():
            found[line["step"], line["sequences"]] = (line["loss"], line["bits_per_byte"])
    return {key: (nats, bits) for key, (nats, bits) in found.items() if nats is not None and bits is not None}


def _require_seeds(pairs: Sequence[Pair]) -> None:
    """Refuse pairs that are no repetition of the first with another seed. ValueError names what differs."""
    seeds: list[int] = []
    for a, b in pairs:
        seed = a.facts.config.seed
        if b.facts.config.seed != seed:
            raise ValueError(f"{a.path} has seed {seed} and {b.path} {b.facts.config.seed}: a pair shares its seed")
        if seed in seeds:
            raise ValueError(f"{a.path}: seed {seed} was given already: pairs differ in the seed")
        seeds.append(seed)
        for first, other in zip(pairs[0], (a, b), strict=True):
            ours, theirs = (_without_seed(run) for run in (first, other))
            for name in ours:
                if ours[name] != theirs[name]:
                    raise ValueError(
                        f"{name} is {ours[name]} in {first.path} and {theirs[name]} in {other.path}: "
                        "the runs of one side differ in the seed alone"
                    )


def _without_seed(run: Recorded) -> dict[str, Any]:
    return {name: value for name, value in run.facts.identity().items() if name != "seed"}


def _same_text(a: Recorded, b: Recorded) -> bool:
    return a.facts.data_id == b.facts.data_id


def _same_evals(a: Recorded, b: Recorded) -> bool:
    return _same_text(a, b) and a.facts.config.eval.sequences == b.facts.config.eval.sequences


def _notes(pairs: Sequence[Pair], same: bool) -> Iterator[str]:
    """What a reader of the result has to know."""
    a, b = pairs[0]
    if same and a.starts and b.starts:
        for name, ours, theirs in (
            ("torch", a.starts[-1]["versions"]["torch"], b.starts[-1]["versions"]["torch"]),
            ("the processor", a.starts[-1]["processor"], b.starts[-1]["processor"]),
            ("the GPU", a.starts[-1]["gpu"], b.starts[-1]["gpu"]),
        ):
            if ours != theirs:
                yield f"{name} is {ours} in {a.path} and {theirs} in {b.path}: equal bytes are not promised for that"
    if not _same_text(a, b):
        yield "the data sets differ, so their validation losses are over different texts: no gap is stated"
    for run in (run for pair in pairs for run in pair):
        yield from run.damage
