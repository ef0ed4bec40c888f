"""What should not happen in a healthy run: losses that are not finite, and spikes. Watching never changes a run.

A step whose loss or gradient norm is not finite has made no update (loop.py); LIMIT of them in a row end the run. A
spike is a loss or a gradient norm more than SIGMAS standard deviations above the mean of the WINDOW finite values
before it. The windows and the count are part of a checkpoint, so a resumed run finds the same anomalies.

Lines of anomalies.jsonl, where null is a number that is not finite:

    {"kind": "nonfinite", "step", "loss", "grad_norm", "in_a_row", "sequences"}
    {"kind": "spike", "step", "quantity": "loss" or "grad_norm", "value", "mean", "sigma", "sequences"}

`sequences` are the numbers of the sequences of the global batch, in order: what the step has seen, which
`train inspect RUN --step N` shows. The caller adds them: they are a pure function of the step (order.py).
"""

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

WINDOW = 128
SIGMAS = 6.0
LIMIT = 5  # non-finite steps in a row


class Anomalies:
    """Watches a run step by step."""

    def __init__(self) -> None:
        self.in_a_row = 0
        self.recorded = 0  # lines so far
        self._windows: dict[str, deque[float]] = {name: deque(maxlen=WINDOW) for name in ("loss", "grad_norm")}

    @property
    def too_many(self) -> bool:
        return self.in_a_row >= LIMIT

    def observe(self, step: int, loss: float, grad_norm: float) -> list[dict[str, Any]]:
        """Take in one step; return its lines for anomalies.jsonl, in nats and in the norm of the whole gradient.

        `sequences` are still to be added.
        """
        values = {"loss": loss, "grad_norm": grad_norm}
        if not all(math.isfinite(value) for value in values.values()):
            self.in_a_row += 1
            self.recorded += 1
            return [{"kind": "nonfinite", "step": step, **values, "in_a_row": self.in_a_row}]
        self.in_a_row = 0
        found = []
        for name, value in values.items():
            window = self._windows[name]
            if spike := _spike(window, value):
                found.append({"kind": "spike", "step": step, "quantity": name, "value": value, **spike})
            window.append(value)
        self.recorded += len(found)
        return found

    def state_dict(self) -> dict[str, Any]:
        windows = {name: list(window) for name, window in self._windows.items()}
        return {"in_a_row": self.in_a_row, "recorded": self.recorded, "windows": windows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.in_a_row = state["in_a_row"]
        self.recorded = state["recorded"]
        for name, window in self._windows.items():
            window.clear()
            window.extend(state["windows"][name])


def _spike(window: deque[float], value: float) -> dict[str, float] | None:
    """Mean and standard deviation of a full window that `value` stands out of, else None."""
    if len(window) < WINDOW:
        return None
    mean = math.fsum(window) / WINDOW
    sigma = math.sqrt(math.fsum((x - mean) ** 2 for x in window) / WINDOW)
    return {"mean": mean, "sigma": sigma} if sigma > 0 and value > mean + SIGMAS * sigma else None
