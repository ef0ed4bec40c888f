"""metrics.jsonl, samples.jsonl and anomalies.jsonl: one JSON object a line, appended, cut back on resume.

Two runs of one identity have equal logs but for "timing", under which all stands that depends on time or machine.
Numbers that are not finite are null: JSON has no other word for them.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol

from shared.durable import fsync_folder, write_all, write_durably

Record = Mapping[str, Any]


class Log:
    """An append-only file of JSON lines. A line reaches the system whole; `sync` makes all lines so far durable."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        fsync_folder(path.parent)

    def append(self, record: Record) -> None:
        """Write one line. OSError names the file: a write to a descriptor would not."""
        line = to_json(record) + "\n"
        try:
            write_all(self._fd, line.encode())
        except OSError as error:
            raise OSError(f"{self.path}: {error.strerror or error}") from None

    def sync(self) -> None:
        os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


def read(path: Path) -> list[dict[str, Any]]:
    """All lines of a log, [] when there is none. A torn last line, of a killed or a living run, is left out.

    ValueError names a damaged line elsewhere, counted from 1.
    """
    lines = _lines(path)
    for number, (record, _) in enumerate(lines, 1):
        if record is None and number < len(lines):
            raise ValueError(f"{path}: line {number} is damaged")
    return [record for record, _ in lines if record is not None]


def undamaged(path: Path) -> list[dict[str, Any]]:
    """The lines of a log before the first that is torn or damaged: what `cut` could keep."""
    return [record for record, _ in takewhile(lambda line: line[0] is not None, _lines(path)) if record is not None]


def cut(path: Path, keep: Callable[[dict[str, Any]], bool], discarded: Path) -> None:
    """Cut a log at its first line that is damaged or not to keep; what follows goes to a file in `discarded`."""
    kept = 0
    for record, end in _lines(path):
        if record is None or not keep(record):
            break
        kept = end
    data = path.read_bytes() if path.exists() else b""
    if len(data) == kept:
        return
    discarded.mkdir(exist_ok=True)
    write_durably(_unused(discarded, path.stem), data[kept:])
    with path.open("r+b") as file:
        file.truncate(kept)
        os.fsync(file.fileno())


def train_record(
    step: int, tokens: int, loss: float, lr: float, weight_decay: float, grad_norm: float, timing: Record
) -> dict[str, Any]:
    """One step: tokens predicted so far, mean loss in nats of the batch before the update, gradient norm before the
    clip. A step whose loss or norm is not finite was skipped: it changed nothing."""
    return {
        "kind": "train",
        "step": step,
        "tokens": tokens,
        "loss": loss,
        "lr": lr,
        "weight_decay": weight_decay,
        "grad_norm": grad_norm,
        "skipped": not (math.isfinite(loss) and math.isfinite(grad_norm)),
        "timing": timing,
    }


def eval_record(step: int, loss: float, bits_per_byte: float, timing: Record) -> dict[str, Any]:
    """One evaluation on the validation split after the update of `step`."""
    return {"kind": "eval", "step": step, "val_loss": loss, "val_bits_per_byte": bits_per_byte, "timing": timing}


def probe_record(step: int, layers: list[dict[str, Any]], timing: Record) -> dict[str, Any]:
    """What a probe of update `step` found; probes.py names the numbers of `layers`."""
    return {"kind": "probe", "step": step, "layers": layers, "timing": timing}


class Sink(Protocol):
    """What metrics are also shown to."""

    def add(self, record: Record) -> None: ...
    def sync(self) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """The numbers of metrics.jsonl as TensorBoard events. Needs the extra `tensorboard`.

    They stand under <kind>/<name>, those of a layer under probe/<name>/<layer>.<projection>.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        """ValueError without that package. What a killed run wrote from `first_step` on is not shown."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError("--tensorboard needs the package tensorboard: pip install tensorboard") from None
        self._writer = SummaryWriter(str(folder), purge_step=first_step)

    def add(self, record: Record) -> None:
        for name, value in scalars(record):
            self._writer.add_scalar(f"{record['kind']}/{name}", value, record["step"])

    def sync(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def scalars(record: Record) -> Iterator[tuple[str, float]]:
    """The numbers of a line of metrics.jsonl by name, but for its step."""
    for name, value in {**record, **record["timing"]}.items():
        if isinstance(value, int | float) and name != "step":
            yield name, value
    for found in record.get("layers", ()):
        for name, value in found.items():
            if name not in ("layer", "projection"):
                yield f"{name}/{found['layer']}.{found['projection']}", value


def _lines(path: Path) -> list[tuple[dict[str, Any] | None, int]]:
    """The lines of a log, None for one that is torn or no JSON object, and where in bytes each ends."""
    found: list[tuple[dict[str, Any] | None, int]] = []
    end = 0
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        end += len(line)
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        found.append((record if isinstance(record, dict) and line.endswith(b"\n") else None, end))
    return found


def number(value: float | None, digits: int = 4) -> str:
    """A number of a log for people; null is one that was not finite."""
    if value is None or math.isnan(value):
        return "not finite"
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}f}"


def to_json(record: Record) -> str:
    """One line of strict JSON; what is not finite is null."""
    return json.dumps(_plain(record), ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    """`value` with every number that is not finite replaced by None."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _unused(folder: Path, stem: str) -> Path:
    """The first of stem-1.jsonl, stem-2.jsonl, ... that does not exist."""
    number = 1
    while (folder / f"{stem}-{number}.jsonl").exists():
        number += 1
    return folder / f"{stem}-{number}.jsonl"
