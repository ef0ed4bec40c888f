"""Learning rate and weight decay as pure functions of the step. Steps count from 1: step n is the n-th update."""

from train.config import ScheduleConfig


def lr(n: int, schedule: ScheduleConfig) -> float:
    """Linear through (0, 0), (warmup_steps, peak_lr), (middle_step, middle_lr), (total_steps, final_lr).

    The two-stage schedule of "The Era of 1-bit LLMs: Training Tips, Code and FAQ"; at the knots exactly their values.
    """
    s = schedule
    assert 1 <= n <= s.total_steps, f"step {n} is outside 1 ... {s.total_steps}"
    if n <= s.warmup_steps:
        return _between(n, 0, 0.0, s.warmup_steps, s.peak_lr)
    if n <= s.middle_step:
        return _between(n, s.warmup_steps, s.peak_lr, s.middle_step, s.middle_lr)
    return _between(n, s.middle_step, s.middle_lr, s.total_steps, s.final_lr)


def weight_decay(n: int, schedule: ScheduleConfig) -> float:
    """The decay of matrices: on up to middle_step, then off, so that the ternary weights come to rest."""
    return schedule.weight_decay if n <= schedule.middle_step else 0.0


def _between(n: int, start: int, first: float, end: int, last: float) -> float:
    """The line through (start, first) and (end, last) at n; at both ends exactly their values."""
    if n == end:  # last * k / k need not be last in floating point
        return last
    return (first * (end - n) + last * (n - start)) / (end - start)
