"""plan -> workers -> ordered commit: builds a data set, or goes on with one.

The parent plans, places and writes; worker processes read and encode. Results are taken in the order of the plan,
whatever the order in which they are done, so the bytes do not depend on the number of workers.
"""

import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prep import worker
from prep.ahead import Ahead
from prep.encoder import Encoder
from prep.forecast import forecast_source
from prep.job import DOWNLOAD, FOOTERS, Job, findable, finished, hash_files, pin_of, prepare, publish
from prep.pace import Pace
from prep.plan import Plan, Settings, Step
from prep.sources import LocalSource, all_units, open_source
from prep.worker import Result, Worker
from prep.writer import JOURNAL, Writer
from shared.durable import exclusive, require_space, write_durably
from shared.manifest import (
    BUILD,
    MANIFEST,
    TOKENIZER,
    Manifest,
    Skipped,
    manifest_dict,
    seal,
    text_of,
)
from shared.progress import Progress
from shared.provenance import provenance, utc_now
from shared.shards import TOKEN_BYTES
from shared.stop import Stop
from shared.tokenizer import Tokenizer

if TYPE_CHECKING:
    from prep.cluster import Cluster

WAIT = 0.2  # seconds between two looks at the stop flag
PACKAGES = ("numpy", "pyarrow", "sentencepiece", "zstandard", "huggingface_hub")


def build(
    spec: str,
    tokenizer: Tokenizer,
    settings: Settings,
    out: Path,
    *,
    workers: int,
    restart: bool,
    stop: Stop,
    tokenizer_spec: str | None = None,
    executor: str | None = None,
) -> Manifest:
    """Make `out` or go on making it. ValueError and OSError for what the user must mend; Interrupted at a signal.

    `workers` processes of this machine encode, or with `executor`, dask://HOST:PORT, those of a cluster: 0 for as many
    as it has at the start.
    """
    out = out.absolute()
    progress = Progress()
    source = open_source(spec, pin=pin_of(spec, out, restart), stop=stop, progress=progress)
    out.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(out.with_name(out.name + ".lock"), "prep tokenize"):
        if manifest := finished(source, settings, tokenizer, out):
            click.echo(f"{out}: already complete, nothing to do")
            return manifest
        stamps = {name: source.stamp(name) for name in source.names}
        job = Job(spec, source, hash_files(source), tokenizer, settings, out, tokenizer_spec)
        stop.check(f"{out}: interrupted before anything was done; the same command starts again")
        prepare(job, restart)
        if (job.partial / MANIFEST).exists() and not (job.partial / JOURNAL).exists():
            return publish(job)  # a former start was killed right before its last step
        return _Build(job, stamps, workers, executor, stop, progress).run()


class _Build:
    """One start of a build: from where the journal stands to the end or a stop."""

    def __init__(
        self,
        job: Job,
        stamps: dict[str, int | None],
        workers: int,
        executor: str | None,
        stop: Stop,
        progress: Progress,
    ) -> None:
        self.job, self.workers, self.stop, self.progress = job, workers, stop, progress
        self.executor = executor
        self.cluster: Cluster | None = None
        self.pending: deque[tuple[Step, Future[Result]]] = deque()  # under way, in the order of the plan
        settings, source = job.settings, job.source
        if not isinstance(source, LocalSource):
            (job.partial / DOWNLOAD).mkdir()
            (job.partial / FOOTERS).mkdir(exist_ok=True)
            source.work_in(job.partial / DOWNLOAD, job.partial / FOOTERS)
        self.budget = settings.budget()
        self.plan = Plan(all_units(source, settings.unit_bytes), settings.order, settings.seed)
        self.encoder = Encoder(job.tokenizer)
        here = source if isinstance(source, LocalSource) else source.fetched()
        self.make_worker = partial(Worker, here, stamps, self.encoder, settings.seed, settings.holdout_threshold())
        self.writer = Writer(job.partial, self.budget, settings.shard_tokens, self.encoder.text_bytes)
        left = self._left()
        require_space(job.partial, left * TOKEN_BYTES, f"building {job.out.name}")
        self.done_before = sum(self.budget.values()) - left
        self.pace = Pace(sum(self.budget.values()), self.done_before, self.writer.seconds)

    def run(self) -> Manifest:
        with self._executor() as pool:
            self._announce()
            try:
                self._fill(pool)
            finally:
                self.progress.clear()
            self.writer.close()
            if not self.writer.room.full:
                raise ValueError(self._too_small())
            with _writing(self.job.partial):
                return self._finish()

    def _fill(self, pool: Executor) -> None:
        """Write results, in order, until the splits are full or the source ends."""
        ahead = Ahead(self.job.source, pool, self.workers, self._left())
        for step, result in self._results(ahead):
            self.pace.text_bytes += result.text_bytes
            cursor = self.plan.after(step, result.next_row)
            with _writing(self.job.partial):
                self.writer.commit(result, step.unit.file, cursor, self.pace.seconds())
            ahead.written(step, result.next_row, self._left())
            if cursor.track != step.track:
                ahead.release(step.unit)
            self.progress.show(self._line)
            if self.writer.room.full:
                break
            self._check_stop()
        ahead.close()
        self.progress.show(self._line, now=True)

    @contextmanager
    def _executor(self) -> Iterator[Executor]:
        if self.executor is None:
            with _pool(self.workers, self.make_worker) as pool:
                yield pool
            return
        from prep.cluster import connect

        with connect(self.executor, self.workers, self.make_worker) as self.cluster:
            self.workers = self.cluster.num_workers
            yield self.cluster

    def _results(self, ahead: Ahead) -> Iterator[tuple[Step, Result]]:
        """Steps and what they gave, in order, with several of them under way."""
        steps = self.plan.steps(self.writer.cursor)
        pending = self.pending
        while True:
            while ahead.wants(step for step, _ in pending) and (step := next(steps, None)):
                pending.append((step, ahead.submit(step)))
            if not pending:
                return
            step, future = pending[0]
            while not wait([future], timeout=WAIT).done:
                self.progress.show(self._line)
                self._check_stop()
            pending.popleft()
            result = future.result()
            if result.ended:
                self.plan.ended(step.track)
            elif result.next_row < step.stop:  # very long documents: the rest comes before whatever follows it
                rest = Step(step.track, step.unit, result.next_row, step.stop)
                pending.appendleft((rest, ahead.submit(rest)))
            yield step, result

    def _check_stop(self) -> None:
        self.stop.check(f"{self.job.partial}: interrupted; the same command goes on where it stopped")

    def _announce(self) -> None:
        s, identity, files = self.job.settings, self.job.tokenizer.identity, self.job.files
        click.echo(f"source: {self.job.spec}, {len(files)} files, {sum(file.size for file in files) / 1e6:,.1f} MB")
        wanted = ", ".join(f"{split} {n:,} tokens" for split, n in self.budget.items() if n)
        click.echo(f"tokenizer: {identity.vocab_size:,} pieces, sha256 {identity.sha256[:16]}…")
        if self.encoder.slow_reason:
            click.echo(f"SentencePiece encodes every document whole, which is slower: {self.encoder.slow_reason}")
        click.echo(
            f"wanted: {wanted}, in sequences of {s.sequence_length:,}; {len(self.plan.tracks):,} units, {s.order}"
        )
        for line in forecast_source(
            self.job.source, self.plan.tracks, s, self.encoder, self.workers, self.job.partial
        ).lines():
            click.echo(line)
        if self.done_before:
            click.echo(f"{self.job.partial}: going on at {self.done_before:,} tokens")

    def _left(self) -> int:
        return sum(self.writer.room.left.values())

    def _line(self) -> str:
        done, fetching = self.pace.total - self._left(), self.job.source.fetching()
        if fetching and done == self.done_before:
            return fetching  # which alone tells that something goes on
        return " · ".join(part for part in (self.pace.line(done), self._under_way(), fetching) if part)

    def _under_way(self) -> str:
        """How the work flows on a cluster: nothing new is handed out while much waits to be written."""
        if self.cluster is None:
            return ""
        waiting = sum(future.done() for _, future in self.pending)
        in_flight = len(self.pending) - waiting
        return f"{len(self.cluster.present)} workers, {in_flight} in flight, {waiting} waiting to be written"

    def _too_small(self) -> str:
        length = self.job.settings.sequence_length
        held = {split: max(0, (n - self.writer.room.left[split] - 1) // length) for split, n in self.budget.items()}
        holds = " and ".join(f"{held[split]:,} {split}" for split in held)
        wants = " and ".join(f"{n:,} {split}" for split, n in self._wanted().items())
        return (
            f"{self.job.spec}: too small: it holds {holds} sequences of {length:,}, not {wants}; add files, or ask for "
            f"--train-sequences {held['train']} --val-sequences {held['val']} or fewer with --restart"
        )

    def _wanted(self) -> dict[str, int]:
        return {"train": self.job.settings.train_sequences, "val": self.job.settings.val_sequences}

    def _finish(self) -> Manifest:
        """Write what closes the data set, manifest.json last, and put it in its place."""
        job, folder = self.job, self.job.partial
        splits, indexes = {}, {}
        for name, writer in self.writer.splits.items():
            splits[name], stated = writer.finish(self._wanted()[name])
            indexes.update(stated)
        unsealed = job.manifest(splits, Skipped(**self.writer.skipped))
        write_durably(folder / TOKENIZER, job.tokenizer.model)
        write_durably(folder / BUILD, text_of(seal(self._build_record(indexes), "sha256")))
        write_durably(folder / MANIFEST, text_of(seal(manifest_dict(unsealed), "id")))
        self.writer.end()
        return publish(job)

    def _build_record(self, indexes: dict[str, Any]) -> dict[str, Any]:
        return {
            "finished": utc_now(),
            "seconds": round(self.pace.seconds(), 3),
            "starts": self.writer.starts,
            "workers": self.workers,
            "executor": self.executor,
            "source": self.job.spec_path,
            "tokenizer": findable(self.job.tokenizer_spec) if self.job.tokenizer_spec else None,
            "encoder": self.encoder.slow_reason or "parts",
            "parity": {"documents": self.writer.parity, "mismatches": 0},
            "indexes": indexes,
            "provenance": provenance(PACKAGES),
        }


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Say of a failed write where it was and that nothing is lost: a write has no file name of its own."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"{folder}: {reason}; nothing is lost: make room, and the same command goes on") from error


@contextmanager
def _pool(workers: int, make: "partial[Worker]") -> Iterator[ProcessPoolExecutor]:
    """Worker processes. They are forked where that is safe: they then share the encoder's tables."""
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    pool = ProcessPoolExecutor(workers, context, initializer=worker.start, initargs=(make, os.getpid()))
    try:
        yield pool
    except BrokenProcessPool:  # waiting for a result shows it, and so does handing out more work
        raise ValueError(
            "a worker process died (out of memory?); "
            "the same command goes on where it stopped, with fewer --workers if need be"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
