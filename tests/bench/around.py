"""python -m tests.bench.around: what a run of the 95M job spends beside its steps, on whatever device it would take.

The start: `--help` beside the interpreter's own start; from the command to the first line of metrics.jsonl, fresh and
resumed, for preset tiny. Then with the 95M model, next to the time of one of its steps: reading a batch, writing its
line, evaluation (the first 256 sequences each 500 steps), and how long a save holds the run up.
"""

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import click
import torch

from shared.manifest import load_manifest
from shared.provenance import processor
from tests.train.dataset import build
from train import metrics, runtime
from train.bench import synchronize
from train.checkpoint import Saver
from train.config import preset
from train.loop import Loop
from train.order import Order, rows
from train.run import built
from train.run_folder import Facts, RunFolder

ROOT = Path(__file__).resolve().parents[2]
LENGTH, VOCABULARY = 1024, 32_000
STARTED = 300.0  # seconds that a first step may take


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def start_of_help(rounds: int) -> str:
    def run(*arguments: str) -> float:
        command = [sys.executable, *arguments]
        return seconds(lambda: subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True))

    beside = statistics.median(run("-m", "train", "--help") - run("-c", "pass") for _ in range(rounds))
    return f"train --help          {beside:8.3f} s beside the interpreter's own start"


def first_steps(folder: Path) -> Iterator[str]:
    """A fresh tiny run and its resume, each stopped by a signal after its first step."""
    data, run = build(folder / "tiny", train=2_400, val=64, length=256), folder / "run"
    log = RunFolder(run).metrics
    command = [sys.executable, "-m", "train", "run", "--preset", "tiny", "--data", str(data), "--run", str(run)]
    for name in ("first tiny step", "the same, resumed"):
        recorded, began = len(metrics.undamaged(log)), time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(metrics.undamaged(log)) == recorded:
            if process.poll() is not None or time.perf_counter() - began > STARTED:
                raise click.ClickException(f"the run did not get to a step: {' '.join(command)}")
            time.sleep(0.02)
        yield f"{name:<21} {time.perf_counter() - began:8.2f} s from the command on"
        process.send_signal(signal.SIGTERM)
        process.wait()


def beside_steps(folder: Path, device: str, rounds: int) -> Iterator[str]:
    config = preset("95m")
    config = replace(config, model=replace(config.model, vocab_size=VOCABULARY))
    data = build(folder / "data", train=32 * (rounds + 1), val=0, length=LENGTH)
    manifest = load_manifest(data)
    order = Order(manifest.id, config.seed, manifest.splits["train"].sequences, config.batch.sequences)
    loop = built(Facts(config, manifest.id, LENGTH, runtime.choose(device, config.batch.micro)), order, data, manifest)
    where = loop.device
    tokens = torch.from_numpy(rows(loop.stream, loop.order.indices(1)[: loop.micro], LENGTH)).to(where)

    def forward() -> None:
        with torch.no_grad(), runtime.eager(loop.model):
            loop.model.loss(tokens[:, :-1], tokens[:, 1:])

    def timed(work: Callable[[], object]) -> float:
        def wait() -> None:
            work()
            synchronize(where)

        wait()
        return statistics.median(seconds(wait) for _ in range(rounds))

    micros = config.batch.sequences // loop.micro
    step = micros * timed(lambda: loop.attempt(loop.micro)) / 2  # an attempt is two micro-batches
    yield f"a step                {step:8.3f} s on {where.type}: {micros} micro-batches without their update"
    steps = iter(range(1, rounds + 2))
    batch = timed(lambda: rows(loop.stream, loop.order.indices(next(steps)), LENGTH))
    yield f"reading a batch       {batch * 1e3:8.3f} ms, {batch / step:.4%} of a step"
    line = timed_line(folder / "metrics.jsonl")
    yield f"a line of metrics     {line * 1e3:8.3f} ms, {line / step:.4%} of a step"
    share = timed(forward) * config.eval.sequences / loop.micro / (config.eval.every * step)
    yield f"evaluation            {share:8.2%} of the steps between two"
    yield from saves(loop, folder / "checkpoints", where, rounds)


def timed_line(path: Path) -> float:
    """Seconds of one line of a log, the mean of many."""
    log = metrics.Log(path)
    record = metrics.train_record(1, 32_768, 10.5, 1e-3, 0.1, 1.0, {"ms": 1.0, "tokens_per_second": 1.0})

    def lines() -> None:
        for _ in range(1_000):
            log.append(record)

    found = seconds(lines) / 1_000
    log.close()
    return found


def saves(loop: Loop, folder: Path, device: torch.device, rounds: int) -> Iterator[str]:
    """How long `save` keeps its caller, the first time and then; and how long the thread writes."""
    folder.mkdir()
    saver, stalls, writes = Saver(folder, keep_last=2, keep_every=0), [], []
    for step in range(1, rounds + 2):
        model, optimizer = loop.model_state(), loop.optimizer_state()
        synchronize(device)
        stalls.append(seconds(lambda: saver.save(step, model, optimizer, {"step": step}, lambda: None)))  # noqa: B023
        writes.append(seconds(saver.wait))
    saver.close()
    size = sum(tensor.nbytes for tensor in (*model.values(), *optimizer.values()))
    first, later = stalls[0], statistics.median(stalls[1:])
    yield (
        f"a save of {size / 1e9:.2f} GB     {later:8.3f} s of standing still, {first:.3f} s the first time; "
        f"written in {statistics.median(writes):.1f} s beside the steps"
    )


@click.command()
@click.option("--device", default="auto", show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
def main(device: str, rounds: int) -> None:
    """Print it, a line each."""
    click.echo(f"{processor()}, {os.cpu_count()} cores, torch {torch.__version__}, medians of {rounds}")
    with tempfile.TemporaryDirectory() as folder:
        click.echo(start_of_help(rounds))
        for line in first_steps(Path(folder)):
            click.echo(line)
        for line in beside_steps(Path(folder), device, rounds):
            click.echo(line)


if __name__ == "__main__":
    main()
