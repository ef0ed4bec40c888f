"""python -m tests.bench.ranks: training on one process, on two, and on one with two threads, in turn, on CPU cores.

The body of the 95M model, a vocabulary of 1,000, 8 sequences of 1,024 tokens an update. Speeds are those that the runs
have recorded, without their first step; the ratio of two is the median over the rounds.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from shared.provenance import processor
from tests.train.dataset import build
from train.metrics import read

ROOT = Path(__file__).resolve().parents[2]
WAYS = {"1 process, 1 thread": (1, 1), "2 processes, 1 thread each": (2, 1), "1 process, 2 threads": (1, 2)}
SEQUENCES, STEPS = 8, 4


def speed(data: Path, run: Path, processes: int, threads: int) -> float:
    """Tokens a second of a fresh run of STEPS steps."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", "--"]
    sizes = {"model.vocab_size": "none", "batch.sequences": SEQUENCES, "batch.micro": 2}
    command = [sys.executable, "-m", *(launcher if processes > 1 else []), "train", "run", "--preset", "95m"]
    command += ["--device", "cpu", "--steps", str(STEPS), "--data", str(data), "--run", str(run)]
    command += [f"--set={name}={value}" for name, value in sizes.items()]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, check=True)
    lines = [line for line in read(run / "metrics.jsonl") if line["kind"] == "train"]
    return statistics.median(line["timing"]["tokens_per_second"] for line in lines[1:])


@click.command()
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
def main(rounds: int) -> None:
    """Print tokens a second, and how many times as fast two processes are."""
    speeds: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(rounds):
        for name, (processes, threads) in WAYS.items():
            with tempfile.TemporaryDirectory() as folder:
                data = build(Path(folder) / "data", train=SEQUENCES * STEPS, val=0, length=1024)
                speeds[name].append(speed(data, Path(folder) / "run", processes, threads))
    click.echo(f"{processor()}, medians of {rounds} rounds")
    one = speeds["1 process, 1 thread"]
    for name, found in speeds.items():
        ratio = statistics.median(each / base for each, base in zip(found, one, strict=True))
        click.echo(f"{name:<28} {statistics.median(found):8,.0f} tokens/s  {ratio:5.2f} x")


if __name__ == "__main__":
    main()
