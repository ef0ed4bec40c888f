"""python -m tests.bench.cluster SOURCE TOKENIZER SEQUENCES: from one worker process to two, here and on Dask.

The Dask clusters are a scheduler and its workers on this machine, which stay up from round to round; each worker has
one thread. Rounds go through the candidates in turn. Prints one JSON object.
"""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

from shared.provenance import processor
from tests.prep.dask_cluster import ROOT, Dask

VAL = 256


def tokenize(options: list[str], sequences: int, folder: Path) -> tuple[float, float, str]:
    """Seconds of the whole process, M tokens/s as it says itself once running, and the data set's id."""
    out = folder / "out"
    command = [sys.executable, "-m", "prep", "tokenize", *options, "--out", str(out)]
    began = time.perf_counter()
    done = subprocess.run(
        [*command, "--train-sequences", str(sequences - VAL), "--val-sequences", str(VAL)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    seconds = time.perf_counter() - began
    shutil.rmtree(out)
    running = [float(rate) for rate in re.findall(r"% · ([\d.]+) M tokens/s", done.stdout)]
    return seconds, running[-1], done.stdout.rpartition("id: ")[2].strip()


@click.command()
@click.argument("source")
@click.argument("tokenizer")
@click.argument("sequences", type=int)
@click.option("--rounds", type=int, default=3)
def main(source: str, tokenizer: str, sequences: int, rounds: int) -> None:
    rates: dict[str, list[tuple[float, float]]] = {}
    ids = set()
    with tempfile.TemporaryDirectory() as temporary:
        clusters = []
        for workers in (1, 2):
            folder = Path(temporary) / f"dask-{workers}"
            folder.mkdir()
            clusters.append(Dask(folder))
            clusters[-1].start_workers(workers)
        candidates = {
            "local 1": ["--workers", "1"],
            "local 2": ["--workers", "2"],
            "dask 1": ["--executor", clusters[0].spec],
            "dask 2": ["--executor", clusters[1].spec],
        }
        try:
            for _ in range(rounds):
                for name, how in candidates.items():
                    options = ["--source", source, "--tokenizer", tokenizer, *how]
                    seconds, running, data_id = tokenize(options, sequences, Path(temporary))
                    rates.setdefault(name, []).append((sequences * 1024 / seconds / 1e6, running))
                    ids.add(data_id)
        finally:
            for cluster in clusters:
                cluster.close()
    assert len(ids) == 1, f"different bytes: {ids}"
    medians = {
        name: [round(statistics.median(column), 2) for column in zip(*found, strict=True)]
        for name, found in rates.items()
    }
    scaling = {
        kind: [round(b / a, 2) for a, b in zip(medians[f"{kind} 1"], medians[f"{kind} 2"], strict=True)]
        for kind in ("local", "dask")
    }
    found = {"whole process, once running: M tokens/s": medians, "2 over 1": scaling, "rounds": rounds}
    print(json.dumps({"processor": processor(), "cpus": os.cpu_count(), **found}, indent=2))


if __name__ == "__main__":
    main()
