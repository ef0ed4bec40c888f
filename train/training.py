"""From a checkpoint to the last step: stepping, and what is due after a step.

After step n come, in this order: its line in metrics.jsonl, a checkpoint, an evaluation, samples. What is due is a pure
function of n and the settings, and the logs say what of it is there: so when a kill or a signal cuts off an evaluation
or samples at n, the resume from n makes them before it steps on, and the logs end equal to those of an unbroken run.
"""

import time
from pathlib import Path
from typing import Any

import torch

from shared.provenance import utc_now
from shared.shards import TokenStream
from shared.stop import Interrupted, Stop
from shared.tokenizer import Tokenizer
from train import checkpoint, distributed, metrics, runtime, samples, schedule
from train.anomalies import LIMIT, Anomalies
from train.checkpoint import Saver
from train.console import Console
from train.evaluate import evaluate
from train.logs import Logs
from train.loop import Loop, Measured
from train.run_folder import Facts, RunFolder


class TooManyAnomalies(Exception):
    """The run stopped on steps without a finite loss and gradient. The message says where and what to do."""


class Training:
    """One start of a run. `step` is the number of updates made."""

    def __init__(
        self,
        folder: RunFolder,
        facts: Facts,
        loop: Loop,
        logs: Logs,
        validation: TokenStream | None,
        tokenizer: Tokenizer,
        console: Console,
        stop: Stop,
    ) -> None:
        """`validation` is None for a data set without that split: then nothing is evaluated."""
        self.folder, self.facts, self.config = folder, facts, facts.config
        self.loop, self.logs, self.validation, self.tokenizer = loop, logs, validation, tokenizer
        self.console, self.stop, self.stopping = console, stop, False
        self.anomalies = Anomalies()
        self.step = 0
        self.unread: Measured | None = None  # the last step, while its numbers are on the device
        self.saver = Saver(folder.checkpoints, self.config.checkpoint.keep_last, self.config.checkpoint.keep_every)
        self.tokens_per_step = self.config.batch.sequences * facts.sequence_length
        self.peak_flops = runtime.peak_flops(loop.device)
        self.flops_per_token = runtime.flops_per_token(self.config.model, facts.sequence_length)

    def resume(self, point: Path | None) -> None:
        """Take over a verified checkpoint, or start at step 0. ValueError when it or the logs do not fit this run.

        Rank 0 reads, and the others have it from there: they need no access to the run.
        """
        found = distributed.from_writer(lambda: self._read_state(point))
        self.step, anomalies, self.logs.evaluated, self.logs.sampled = found
        self.anomalies.load_state_dict(anomalies)
        self.saver.last_step = self.step
        self.loop.share()

    def _read_state(self, point: Path | None) -> tuple[int, dict[str, Any], int, int]:
        if point is not None:
            found = checkpoint.load(point)
            if found.state["data_id"] != self.facts.data_id:
                raise ValueError(f"{point}: belongs to data set {found.state['data_id']}, not {self.facts.data_id}")
            self.loop.load(found.model, found.optimizer)
            self.anomalies.load_state_dict(found.state["anomalies"])
            self.step = found.step
        self.logs.examine(self.step, self.anomalies.recorded)
        return self.step, self.anomalies.state_dict(), self.logs.evaluated, self.logs.sampled

    def has_work(self, target: int) -> bool:
        return self.step < target or self._evaluation_due() or self._samples_due()

    def run(self, target: int) -> None:
        """Train up to step `target`. Interrupted at a signal, TooManyAnomalies, ValueError when a save fails."""
        self.target = target
        self.logs.open(self.step)
        self.saved_at = self.ready_at = time.monotonic()
        try:
            self._tend()
            while self.step < target and not self._must_stop():
                self._advance()
            self._save()
            self.saver.wait()
        finally:
            self.saver.close()
            self.logs.close()
            self.console.end()
        if self.has_work(target):
            raise Interrupted(
                f"{self.folder.path}: stopped after step {self.step:,} of {target:,} with nothing lost; "
                "the same command goes on from there"
            )

    def _advance(self) -> None:
        """One step and what is due after it."""
        launched = self.loop.step(self.step + 1)
        self._read()
        self.step, self.unread = self.step + 1, launched
        if not reads_late(self.loop.device):
            self._read()
        if self.step == self.target or self._save_due():
            self._save()
        self.saver.check()
        self._tend()

    def _read(self) -> None:
        """Wait for the last step and record what it found."""
        measured, self.unread = self.unread, None
        if measured is None:
            return
        n, loss, norm = measured.step, measured.loss.item(), measured.grad_norm.item()
        lr, decay = schedule.lr(n, self.config.schedule), schedule.weight_decay(n, self.config.schedule)
        record = metrics.train_record(n, n * self.tokens_per_step, loss, lr, decay, norm, self._timing())
        self.logs.metric(record)
        if measured.probe is not None:
            timing = {"seconds": measured.probe.seconds, "time": utc_now()}
            self.logs.metric(metrics.probe_record(n, measured.probe.layers(), timing))
        for line in self.anomalies.observe(n, loss, norm):
            self.logs.anomaly({**line, "sequences": self.loop.order.indices(n).tolist()})
        self.console.step(record, self.target)
        if self.anomalies.too_many:
            saved = self.saver.last_step
            raise TooManyAnomalies(
                f"{self.folder.path}: stopped at step {n:,}: {LIMIT} steps in a row had no finite loss and gradient; "
                + (f"the last checkpoint is that of step {saved:,}; " if saved else "there is no checkpoint yet; ")
                + "see anomalies.jsonl, and start another run with a lower schedule.peak_lr"
            )

    def _timing(self) -> dict[str, Any]:
        now = time.monotonic()
        seconds, self.ready_at = now - self.ready_at, now
        speed = self.tokens_per_step / seconds
        peak = self.peak_flops
        return {
            "ms": seconds * 1000,
            "tokens_per_second": speed,
            "mfu": speed * self.flops_per_token / (peak * distributed.world_size()) if peak else None,
            "memory_bytes": runtime.peak_memory(self.loop.device),
            "time": utc_now(),
        }

    def _save_due(self) -> bool:
        every, minutes = self.config.checkpoint.every, self.config.checkpoint.minutes
        by_time = minutes > 0 and time.monotonic() - self.saved_at >= 60 * minutes
        return by_time or _due(self.step, every)

    def _save(self) -> None:
        """Begin to save the state as it stands, if that is not saved."""
        self._read()
        if self.step == self.saver.last_step or not distributed.is_writer():
            return
        state = {
            "step": self.step,
            "tokens": self.step * self.tokens_per_step,
            "data_id": self.facts.data_id,
            "anomalies": self.anomalies.state_dict(),
        }
        self.saver.save(self.step, self.loop.model_state(), self.loop.optimizer_state(), state, self.logs.sync)
        self.saved_at = self.ready_at = time.monotonic()

    def _tend(self) -> None:
        """Evaluate and sample if that is due for the step as it stands; leave at once when a stop comes."""
        for due, work in ((self._evaluation_due, self._evaluate), (self._samples_due, self._sample)):
            if due() and not self.stopping:
                self._read()
                work()
                self.ready_at = time.monotonic()

    def _evaluation_due(self) -> bool:
        due = _due(self.step, self.config.eval.every, self.config.schedule.total_steps)
        return due and self.validation is not None and self.logs.evaluated < self.step

    def _samples_due(self) -> bool:
        due = _due(self.step, self.config.sample.every, self.config.schedule.total_steps)
        return due and self.logs.sampled < self.step

    def _evaluate(self) -> None:
        assert self.validation is not None
        began, length = time.monotonic(), self.facts.sequence_length
        found = evaluate(
            self.loop.model,
            self.validation,
            self.tokenizer,
            sequences=min(self.config.eval.sequences, (len(self.validation) - 1) // length),
            length=length,
            micro=self.loop.micro,
            left=self._must_stop,
        )
        if found is None:
            return
        timing = {"seconds": time.monotonic() - began, "time": utc_now()}
        self.logs.metric(metrics.eval_record(self.step, found.loss, found.bits_per_byte, timing))
        self.logs.evaluated = self.step
        self.console.say(
            f"step {self.step:,}: validation loss {found.loss:.4f}, {found.bits_per_byte:.4f} bits per byte "
            f"({found.sequences} sequences)"
        )

    def _sample(self) -> None:
        lines = samples.sample_records(
            self.loop.model, self.tokenizer, step=self.step, length=self.facts.sequence_length, seed=self.config.seed
        )
        for line in lines if distributed.is_writer() else ():
            if self.stop:
                return
            self.logs.sample(line)
        self.logs.sampled = self.step

    def _must_stop(self) -> bool:
        """Whether a signal has come, on any rank; once it has, all ranks know."""
        self.stopping = self.stopping or distributed.any_rank(bool(self.stop))
        return self.stopping


def reads_late(device: torch.device) -> bool:
    """Whether the numbers of a step are read while the next one runs, so that the device never waits for the host."""
    return device.type == "cuda"


def _due(step: int, every: int, last: int = 0) -> bool:
    """Whether something is due after `step`: each `every` steps (0: never) and after the step `last`."""
    return step > 0 and every > 0 and (step % every == 0 or step == last)
