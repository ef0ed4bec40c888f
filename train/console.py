"""What a run says while it works: plain lines for what happens once, one progress line for the steps. Rank 0 only."""

import time
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

from shared.progress import Progress, duration

SPEED_KNOWN = 10  # steps timed before an end is promised; the first one compiles and is not timed


class Console:
    """Says things on stdout; `loud` is False on all ranks but the first."""

    def __init__(self, loud: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._loud, self._clock = loud, clock
        self._progress = Progress(clock=clock)
        self._began: float | None = None
        self._timed = 0

    def say(self, line: str) -> None:
        if self._loud:
            self._progress.clear()
            print(line, flush=True)

    def step(self, record: dict[str, Any], last_step: int) -> None:
        """Show one train record of metrics.jsonl as progress towards `last_step`.

        The time left is told from the clock on the wall, since evaluations and saves are a part of what a run takes.
        """
        if self._began is None:
            self._began = self._clock()
            return
        self._timed += 1
        pace = (self._clock() - self._began) / self._timed  # seconds a step
        left = pace * (last_step - record["step"])
        if self._timed == SPEED_KNOWN:
            speed = record["tokens"] / record["step"] / pace
            end = datetime.now().astimezone() + timedelta(seconds=left)
            self.say(
                f"speed {speed:,.0f} tokens/s; step {last_step:,} expected {end:%Y-%m-%d %H:%M} ({duration(left)})"
            )
        if self._loud:
            self._progress.show(lambda: progress_line(record, last_step, left))

    def end(self) -> None:
        self._progress.clear()


def progress_line(record: dict[str, Any], last_step: int, seconds_left: float) -> str:
    """One train record as a line."""
    timing = record["timing"]
    parts = [
        f"step {record['step']:,}/{last_step:,}",
        f"loss {record['loss']:.4f}",
        f"norm {record['grad_norm']:.3f}",
        f"lr {record['lr']:.3e}",
        f"{timing['ms']:,.0f} ms",
        f"{timing['tokens_per_second']:,.0f} tok/s",
    ]
    if timing["mfu"] is not None:
        parts.append(f"MFU {timing['mfu']:.1%}")
    if timing["memory_bytes"] is not None:
        parts.append(f"{timing['memory_bytes'] / 2**30:.1f} GiB")
    return " | ".join([*parts, f"{duration(seconds_left)} left"])
