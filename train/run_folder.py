"""runs/<id>/ on disk: which run it is (config.json), every start of it (run.json), and where the rest stands.

config.json holds all settings, the data id and what was resolved at the first start. What of that shapes the trajectory
is the identity of the run: another value of one is another run. The rest may change from start to start.
"""

import json
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.durable import exclusive, fsync_folder, write_durably
from shared.manifest import TOKENIZER
from train import metrics, runtime
from train.config import Config, flatten, from_dict, identity, to_dict
from train.runtime import Runtime

FORMAT_VERSION = 1
LOGS = ("metrics.jsonl", "samples.jsonl", "anomalies.jsonl")


@dataclass(frozen=True)
class Facts:
    """config.json: the settings, and what the first start found and every later one reuses."""

    config: Config
    data_id: str
    sequence_length: int
    runtime: Runtime

    def identity(self) -> dict[str, Any]:
        """Flat: all that shapes the trajectory."""
        found = {"data_id": self.data_id, "sequence_length": self.sequence_length}
        return found | identity(self.config) | flatten(runtime.to_dict(self.runtime), "runtime.")

    def to_dict(self) -> dict[str, Any]:
        found = {
            "data_id": self.data_id,
            "sequence_length": self.sequence_length,
            "runtime": runtime.to_dict(self.runtime),
        }
        return {"format_version": FORMAT_VERSION, **to_dict(self.config), **found}


class RunFolder:
    """The folder of one run. Only `train run` writes here, and `train eval` under evals/."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints, self.discarded, self.evals = path / "checkpoints", path / "discarded", path / "evals"
        self.metrics, self.samples, self.anomalies = (path / name for name in LOGS)

    def lock(self) -> AbstractContextManager[None]:
        """Keep other trainers out. ValueError when one is at work, or when the folder is something else than a run."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not self.exists():
            foreign = [p.name for p in self.path.iterdir() if p.name not in ("lock", "config.json.tmp")]
            if foreign:
                raise ValueError(
                    f"{self.path}: not a run: it holds {min(foreign)} and no config.json; name another --run"
                )
        return exclusive(self.path / "lock", "trainer")

    def exists(self) -> bool:
        return (self.path / "config.json").exists()

    def facts(self) -> Facts:
        """Read config.json. ValueError when it is missing, damaged or of another release."""
        path = self.path / "config.json"
        if not path.exists():
            raise ValueError(f"{self.path}: no run here (there is no config.json); start it with: python -m train run")
        try:
            value = json.loads(path.read_bytes())
            version = value.pop("format_version")
            if version != FORMAT_VERSION:
                raise ValueError(f"format_version is {version}, this program reads {FORMAT_VERSION}")
            data_id, length, resolved = (value.pop(name) for name in ("data_id", "sequence_length", "runtime"))
            return Facts(from_dict(value), data_id, length, runtime.from_dict(resolved))
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}: cannot be used: {error}; mend it, or give --restart to start anew") from None

    def write_facts(self, facts: Facts) -> None:
        write_durably(self.path / "config.json", _text(facts.to_dict()))

    def begin(self, model: bytes) -> None:
        """Make what every run has: the folders, and the tokenizer's model."""
        for folder in (self.checkpoints, self.evals):
            folder.mkdir(exist_ok=True)
        path = self.path / TOKENIZER
        if not path.exists() or path.read_bytes() != model:
            write_durably(path, model)
        fsync_folder(self.path)

    def restart(self) -> None:
        """Throw the run away, checkpoints first, so that a kill leaves an older but whole run; logs are set aside."""
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        shutil.rmtree(self.evals, ignore_errors=True)
        for name in LOGS:
            metrics.cut(self.path / name, lambda record: False, self.discarded)

    def starts(self) -> list[dict[str, Any]]:
        """The entries of run.json, oldest first."""
        path = self.path / "run.json"
        try:
            starts = json.loads(path.read_bytes())["starts"] if path.exists() else []
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}: damaged; move it away, then the same command goes on") from None
        return list(starts)

    def data(self, moved: Path | None) -> Path:
        """Where the data set is: `moved`, or else where the last start had it. ValueError when it is not there."""
        starts = self.starts()
        if moved is None and not starts:
            raise ValueError(f"{self.path}: run.json does not say where the data set is; say it: --data DIR")
        data = moved or Path(starts[-1]["data"])
        if not data.exists():
            raise ValueError(f"{data}: the data set of {self.path} is not there; say where it is: --data DIR")
        return data

    def write_start(self, entry: Mapping[str, Any], *, new: bool) -> None:
        """Add an entry to run.json, or replace the last one."""
        starts = self.starts()
        write_durably(self.path / "run.json", _text({"starts": [*(starts if new else starts[:-1]), dict(entry)]}))


def require_same(stored: Mapping[str, Any], wanted: Mapping[str, Any], run: Path) -> None:
    """Refuse with a ValueError that names all values of the identity that differ."""
    odd = [name for name in (*stored, *(wanted.keys() - stored.keys())) if stored.get(name) != wanted.get(name)]
    if odd:
        listed = "; ".join(f"{name} is {stored.get(name)} in this run and {wanted.get(name)} now" for name in odd)
        way_out = "name another --run, or give --restart"
        if set(odd) == {"runtime.world_size"}:
            way_out += ", or --elastic to go on with the same order of sequences and other bits"
        raise ValueError(f"{run}: {listed}: that would be another run: {way_out}")


def _text(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
