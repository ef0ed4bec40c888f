"""What a run has recorded so far, read from its folder alone: finished, in progress, or with a torn or damaged line."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from train import metrics
from train.run_folder import Facts, RunFolder

Line = dict[str, Any]


@dataclass(frozen=True)
class Recorded:
    """The lines of a run's logs by kind, as metrics.py, probes.py, samples.py and anomalies.py document them."""

    path: Path
    facts: Facts
    starts: list[Line]  # the entries of run.json
    train: list[Line]
    evals: list[Line]
    probes: list[Line]
    samples: list[Line]
    anomalies: list[Line]
    evaluations: list[tuple[str, Line]]  # file name and content of what stands in evals/
    damage: list[str]  # what could not be read, a sentence each

    @property
    def step(self) -> int:
        """The last step recorded, 0 when there is none."""
        return self.train[-1]["step"] if self.train else 0


def recorded(path: Path) -> Recorded:
    """Read a run. ValueError when there is none, or when its config.json cannot be used."""
    folder, damage = RunFolder(path), list[str]()
    facts = folder.facts()
    lines = _lines(folder.metrics, damage)
    starts: list[Line] = []
    try:
        starts = folder.starts()
    except ValueError as error:
        damage.append(str(error))
    return Recorded(
        path=path,
        facts=facts,
        starts=starts,
        **{kind: [line for line in lines if line.get("kind") == name] for kind, name in _KINDS.items()},
        samples=_lines(folder.samples, damage),
        anomalies=_lines(folder.anomalies, damage),
        evaluations=list(_evaluations(folder.evals, damage)),
        damage=damage,
    )


def column(lines: Iterable[Mapping[str, Any]], name: str) -> npt.NDArray[np.float64]:
    """One number of each line, (lines,) float64; null, and a number that is not there, are NaN."""
    found = (line.get(name) for line in lines)
    return np.array([np.nan if value is None else value for value in found], dtype=np.float64)


_KINDS = {"train": "train", "evals": "eval", "probes": "probe"}


def _lines(path: Path, damage: list[str]) -> list[Line]:
    """The lines of a log up to the first damaged one; a torn last line is that of a run in progress and no damage."""
    try:
        return metrics.read(path)
    except ValueError as error:
        damage.append(f"{error}; what follows it is left out here")
        return metrics.undamaged(path)


def _evaluations(folder: Path, damage: list[str]) -> Iterable[tuple[str, Line]]:
    for path in sorted(folder.glob("*.json")):
        try:
            found = json.loads(path.read_bytes())
        except (OSError, ValueError):
            damage.append(f"{path}: damaged")
            continue
        if isinstance(found, dict):
            yield path.name, found
