"""The checker: two runs that must be the same are the same, byte for byte, `timing` apart."""

from pathlib import Path
from typing import Any

from train.checkpoint import steps_in, verify
from train.metrics import read

LOGS = ("metrics.jsonl", "samples.jsonl", "anomalies.jsonl")


def assert_same_run(run: Path, reference: Path) -> None:
    """`run` is `reference`, an unbroken run that saved every step, however often `run` was broken.

    Every checkpoint of `run`, also one that a signal made, has the bytes that `reference` has for that step; both end
    with the same step; all lines of all logs are equal but for `timing`; both have the same config but for how often
    they save.
    """
    assert steps_in(run / "checkpoints")[-1] == steps_in(reference / "checkpoints")[-1]
    for step in steps_in(run / "checkpoints"):
        ours, theirs = (r / "checkpoints" / f"step-{step:08d}" for r in (run, reference))
        assert verify(ours) is None, f"{ours} is damaged"
        assert contents(ours).keys() == contents(theirs).keys()
        for name, data in contents(theirs).items():
            assert contents(ours)[name] == data, f"{ours / name} differs from {theirs / name}"
    for log in LOGS:
        ours, theirs = without_timing(run / log), without_timing(reference / log)
        for line, expected in zip(ours, theirs, strict=False):
            assert line == expected, f"{run / log}: step {line['step']} differs"
        assert len(ours) == len(theirs), f"{run / log} has {len(ours)} lines, {reference / log} {len(theirs)}"
    assert not list((run / "checkpoints").glob("*.partial"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def without_timing(log: Path) -> list[dict[str, Any]]:
    """The lines of a log; that no line is torn is checked, a finished run has none."""
    assert log.read_bytes().endswith(b"\n") or not log.read_bytes()
    return [{key: value for key, value in line.items() if key != "timing"} for line in read(log)]
