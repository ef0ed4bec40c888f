"""Every printed number is what its unit says."""

import re

import pytest

from train.console import SPEED_KNOWN, Console, progress_line
from train.metrics import train_record


def record(step: int, mfu: float | None = None) -> dict[str, object]:
    timing = {"ms": 250.4, "tokens_per_second": 4089.6, "mfu": mfu, "memory_bytes": 3 << 30, "time": "now"}
    return train_record(step, step * 1024, 4.56789, 1.5e-3, 0.1, 0.98765, timing)


def test_the_progress_line_holds_each_number_with_its_unit() -> None:
    assert progress_line(record(1200), 60_000, 3723.0) == (
        "step 1,200/60,000 | loss 4.5679 | norm 0.988 | lr 1.500e-03 | 250 ms | 4,090 tok/s | 3.0 GiB | 1 h 02 min left"
    )
    assert " | MFU 41.2% | " in progress_line(record(1200, mfu=0.4123), 60_000, 1.0)


def test_speed_and_expected_end_come_from_elapsed_time(capsys: pytest.CaptureFixture[str]) -> None:
    """One step each half second, first a minute of compilation that is not counted."""
    now = 1e9
    console = Console(True, clock=lambda: now)
    now += 60
    for step in range(1, SPEED_KNOWN + 2):
        console.step(record(step), 111)
        now += 0.5
    out = capsys.readouterr().out
    found = re.search(r"speed ([\d,]+) tokens/s; step 111 expected .* \((.*)\)", out)
    assert found, out
    assert int(found[1].replace(",", "")) == 2048  # 1,024 tokens in 0.5 s
    assert found[2] == "50 s"  # 100 steps


def test_only_rank_0_speaks(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(False)
    console.say("hello")
    for step in range(1, 30):
        console.step(record(step), 111)
    console.end()
    assert capsys.readouterr().out == ""
