"""TensorBoard shows the numbers of metrics.jsonl, each once, whatever happened to the run."""

from pathlib import Path
from signal import SIGKILL, SIGTERM

import numpy as np
import pytest

from tests.train.command import Command
from train.checkpoint import steps_in
from train.metrics import read

pytest.importorskip("tensorboard", reason="needs the extra tensorboard")


def shown(run: Path) -> dict[tuple[str, int], list[float]]:
    """{(name, step): values} as TensorBoard itself reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    found: dict[tuple[str, int], list[float]] = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            found.setdefault((name, event.step), []).append(event.value)
    return found


def recorded(run: Path) -> dict[tuple[str, int], list[float]]:
    """The same out of metrics.jsonl; TensorBoard holds fp32."""
    found = {}
    for line in read(run / "metrics.jsonl"):
        numbers = {**line, **line["timing"]}
        for each in line.get("layers", []):
            numbers |= {f"{name}/{each['layer']}.{each['projection']}": value for name, value in each.items()}
        for name, value in numbers.items():
            if isinstance(value, int | float) and name != "step" and not name.startswith("layer"):
                found[f"{line['kind']}/{name}", line["step"]] = [float(np.float32(value))]
    return found


@pytest.mark.parametrize("signal", [None, SIGTERM, SIGKILL])
def test_tensorboard_shows_each_number_of_the_log_once(
    train: Command, data: Path, tmp_path: Path, signal: int | None
) -> None:
    run = tmp_path / "run"
    settings: dict[str, object] = {"probe.every": 3, "checkpoint.every": 2}
    if signal:
        faults = [("signal_in", "step", 12, signal)]
        assert train.run(data, run, "--tensorboard", "--steps", 16, settings=settings, faults=faults).code in (75, -9)
        assert steps_in(run / "checkpoints"), "a resume from a checkpoint is what this is about"
        assert 10 <= read(run / "metrics.jsonl")[-1]["step"] < 16
    assert train.run(data, run, "--tensorboard", "--steps", 16, settings=settings).code == 0
    assert {name.partition("/")[0] for name, _ in recorded(run)} == {"train", "eval", "probe"}
    assert shown(run) == recorded(run)
