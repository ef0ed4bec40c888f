"""Progress is live on a terminal, quiet elsewhere, and never wider than the screen."""

import io

import pytest

from shared.progress import Progress, duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_line_every_thirty_seconds() -> None:
    now, out = [0.0], io.StringIO()
    progress = Progress(out, clock=lambda: now[0])
    for now[0] in range(0, 100, 10):
        progress.show(lambda: f"at {now[0]}")
    assert out.getvalue() == "at 30\nat 60\nat 90\n"


def test_a_terminal_gets_one_line_that_is_overwritten_and_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    now, out = [10.0], Terminal()
    progress = Progress(out, clock=lambda: now[0])
    progress.show(lambda: "x" * 50)
    progress.show(lambda: "too early")
    now[0] += 1
    progress.show(lambda: "short")
    progress.clear()
    shown = out.getvalue()
    assert "\n" not in shown and "too early" not in shown
    assert all(len(part.rstrip()) < 20 for part in shown.split("\r"))
    assert shown.split("\r")[2] == "short".ljust(19)  # nothing of the longer line is left


def test_durations_are_for_people() -> None:
    assert [duration(s) for s in (-3, 0.4, 59, 60, 200, 3599, 3900)] == [
        "0 s", "0 s", "59 s", "1 min 00 s", "3 min 20 s", "59 min 59 s", "1 h 05 min",
    ]  # fmt: skip
