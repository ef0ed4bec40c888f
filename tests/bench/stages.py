"""Where the time of a build goes, stage by stage, on one core.

A real build in one process: the pool of workers is replaced by calls in place, whose arguments and results are pickled
as they would be. Timers stand around the program's own functions, for the length of this run only; a stage's time does
not hold that of the stages inside it.
"""

import pickle
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import ExitStack, contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa

from prep import encoder, parts, pipeline, rows, split_writer, worker, writer
from prep.plan import Settings
from shared.stop import Stop
from shared.tokenizer import load_tokenizer

STAGES: list[tuple[Any, str, str]] = [
    (pipeline, "hash_files", "hash the source files"),
    (pipeline, "Encoder", "start the encoder"),
    (pipeline, "forecast_source", "forecast"),
    (rows.RowReader, "read", "read and decode parquet"),
    (encoder, "_framed", "cut into parts"),
    (encoder.Encoder, "_cuts", "cut into parts"),
    (parts.Parts, "number", "look parts up (dictionary)"),
    (encoder.Encoder, "_encode_parts", "SentencePiece on new parts"),
    (parts.Parts, "trim", "forget parts"),
    (encoder.Encoder, "encode", "gather ids"),
    (worker, "hash_texts", "hash the texts"),
    (worker, "is_val", "decide the side"),
    (worker.Worker, "_check_parity", "compare a sample with SentencePiece"),
    (split_writer.SplitWriter, "_append_tokens", "write and hash the tokens"),
    (split_writer.SplitWriter, "append", "collect the index"),
    (writer.Writer, "commit", "place documents"),
    (split_writer.SplitWriter, "sync", "fsync"),
    (writer.Writer, "_write_journal", "journal"),
    (pipeline._Build, "_finish", "write the index, the manifest"),
]


class Stopwatch:
    """CPU and wall seconds by stage; the innermost stage under way gets them."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self._under_way: list[str] = []
        self._since = (0.0, 0.0)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._book()
        self._under_way.append(name)
        try:
            yield
        finally:
            self._book()
            self._under_way.pop()

    def _book(self) -> None:
        now = time.process_time(), time.perf_counter()
        if self._under_way:
            spent = self.seconds.setdefault(self._under_way[-1], [0.0, 0.0])
            spent[0] += now[0] - self._since[0]
            spent[1] += now[1] - self._since[1]
        self._since = now


class InPlace(Executor):
    """A pool whose work is done at once, here; what goes in and out is pickled as for a process."""

    def __init__(self, watch: Stopwatch) -> None:
        self._watch = watch

    def submit(self, fn: Callable[..., Any], /, *arguments: Any, **_: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        result = fn(*arguments)
        with self._watch.stage("transfer (pickle)"):
            future.set_result(pickle.loads(pickle.dumps(result)))
        return future


def profile(files: list[Path], tokenizer: Path, sequences: int) -> dict[str, Any]:
    """Build `sequences` of 1,024 tokens from `files`; seconds of CPU and of wall time by stage, slowest first."""
    watch = Stopwatch()
    pa.set_cpu_count(1)

    @contextmanager
    def pool(workers: int, make: Callable[[], worker.Worker]) -> Iterator[InPlace]:
        worker._keep_freed_memory()
        with mock.patch.object(worker, "_worker", make(), create=True):
            yield InPlace(watch)

    with tempfile.TemporaryDirectory() as folder, ExitStack() as patches, redirect_stdout(StringIO()):
        patches.enter_context(mock.patch.object(pipeline, "_pool", pool))
        for owner, name, stage in STAGES:
            patches.enter_context(mock.patch.object(owner, name, _timed(getattr(owner, name), stage, watch)))
        source = Path(folder) / "source"
        source.mkdir()
        for file in files:
            (source / file.name).symlink_to(file)
        settings = Settings(sequences - 256, 256, 1024, 1 << 26, "shuffled", 0, 8 << 20)
        with watch.stage("everything else"):
            with watch.stage("load the tokenizer"):
                model = load_tokenizer(tokenizer)
            made = pipeline.build(
                str(source), model, settings, Path(folder) / "out", workers=1, restart=False, stop=Stop()
            )
    total = [sum(column) for column in zip(*watch.seconds.values(), strict=True)]
    table = sorted(watch.seconds.items(), key=lambda item: -item[1][0])
    return {
        "tokens": sum(split.tokens for split in made.splits.values()),
        "stage: [CPU s, wall s, share of CPU]": {
            name: [round(cpu, 3), round(wall, 3), f"{cpu / total[0]:.1%}"]
            for name, (cpu, wall) in [*table, ("total", total)]
        },
    }


def _timed(function: Callable[..., Any], stage: str, watch: Stopwatch) -> Callable[..., Any]:
    def timed(*arguments: Any, **named: Any) -> Any:
        with watch.stage(stage):
            return function(*arguments, **named)

    return timed
