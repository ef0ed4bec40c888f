"""python -m tests.bench: prep against what one would use instead, in one run on one machine.

On ../shared/corpus with its tokenizer where they are present, else on a sample corpus of this Python. Rounds alternate
between the candidates, so that a machine whose speed drifts is fair to both; the ratio is the median over the rounds.
"""

import importlib.util
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prep.encoder import Encoder
from shared.provenance import processor
from shared.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
# pool: SentencePiece processes; rust: gigatoken, where the extra `bench` is installed
OTHERS = ["pool", "rust"] if importlib.util.find_spec("gigatoken") else ["pool"]
CORPUS, LLAMA = ROOT.parent / "shared" / "corpus", ROOT.parent / "shared" / "tokenizer" / "tokenizer.model"


def encoder_against_sentencepiece(files: list[Path], tokenizer_path: Path, rounds: int) -> dict[str, Any]:
    """One core, texts in memory: tokens/s of a fresh encoder and of SentencePiece over the same documents."""
    tokenizer = load_tokenizer(tokenizer_path)
    pa.set_cpu_count(1)
    texts = [pq.read_table(file, columns=["text"], use_threads=False)["text"] for file in files]
    # As prep does: units of about 22 MB of text.
    units = [chunk for text in texts for chunk in _units(text)]
    fast, warm, plain = [], [], []
    for _ in range(rounds):
        encoder = Encoder(tokenizer)
        for rates in (fast, warm):
            began = time.perf_counter()
            tokens = sum(len(encoder.encode(unit).tokens) for unit in units)
            rates.append(tokens / (time.perf_counter() - began))
        began = time.perf_counter()
        ids = [encoder.reference(text) for unit in units[::4] for text in unit.to_pylist()]
        plain.append(sum(map(len, ids)) / (time.perf_counter() - began))
    rust = _gigatoken(units, tokenizer_path, rounds)
    same = all(
        np.array_equal(encoder.encode(unit).tokens, np.concatenate([encoder.reference(t) for t in unit.to_pylist()]))
        for unit in units[::4]
    )
    return {
        "tokens": tokens,
        "identical": same,
        "sentencepiece M tokens/s": _m(plain),
        "encoder M tokens/s": _m(fast),
        "encoder, second pass M tokens/s": _m(warm),
        "encoder / sentencepiece": _ratio(fast, plain),
        **({"gigatoken M tokens/s": _m(rust), "encoder / gigatoken": _ratio(fast, rust)} if rust else {}),
    }


def _gigatoken(units: list[pa.Array], tokenizer: Path, rounds: int) -> list[float]:
    """tokens/s of a fresh gigatoken on one core over the same texts; nothing without the extra `bench`."""
    if importlib.util.find_spec("gigatoken") is None:
        return []
    import gigatoken

    texts = [unit.to_pylist() for unit in units]
    rates = []
    for _ in range(rounds):
        encoder = gigatoken.Tokenizer.from_sentencepiece(str(tokenizer))
        began = time.perf_counter()
        tokens = sum(len(ids) for part in texts for ids in encoder.encode_batch(part, parallel=False))
        rates.append(tokens / (time.perf_counter() - began))
    return rates


def tokenize_against_pool(files: list[Path], tokenizer: Path, rounds: int, workers: int) -> dict[str, Any]:
    """Whole processes, start-up included, over all files; and once running, as each program says."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "source").mkdir()
        for file in files:
            (folder / "source" / file.name).symlink_to(file)
        sequences = (_count(files, tokenizer) * 97 // 100) // 1024
        prep = [
            *(sys.executable, "-m", "prep", "tokenize", "--source", str(folder / "source"), "--tokenizer"),
            *(str(tokenizer), "--out", str(folder / "out"), "--workers", str(workers)),
            *("--train-sequences", str(sequences - 256), "--val-sequences", "256"),
        ]
        others = {
            name: [sys.executable, str(ROOT / f"tests/bench/{name}.py"), str(folder / "source")] for name in OTHERS
        }
        rates: dict[str, list[float]] = {name: [] for name in ("prep", *OTHERS)}
        running: dict[str, list[float]] = {name: [] for name in ("prep", *OTHERS)}
        for _ in range(rounds):
            for name, command in others.items():
                seconds, output = _run([*command, str(tokenizer), str(folder / "out.bin"), str(workers)])
                rates[name].append((folder / "out.bin").stat().st_size / 2 / seconds)
                running[name].append(_running(output))
            seconds, output = _run(prep)
            rates["prep"].append((sequences * 1024 + 2) / seconds)
            running["prep"].append(_running(output))
            shutil.rmtree(folder / "out")
        memory = _memory(prep)
    return {
        "workers": workers,
        "prep MB, largest process": memory,
        "whole process, M tokens/s": {name: _m(rate) for name, rate in rates.items()},
        "prep / other, whole processes": {name: _ratio(rates["prep"], rates[name]) for name in OTHERS},
        "once running, M tokens/s": {name: _m(rate) for name, rate in running.items()},
        "prep / other, once running": {name: _ratio(running["prep"], running[name]) for name in OTHERS},
    }


def _units(text: pa.ChunkedArray) -> list[pa.Array]:
    whole = text.combine_chunks()
    return [whole.slice(i, 4000) for i in range(0, len(whole), 4000)]


def _count(files: list[Path], tokenizer: Path) -> int:
    encoder = Encoder(load_tokenizer(tokenizer))
    return sum(len(encoder.encode(unit).tokens) for f in files for unit in _units(pq.read_table(f)["text"]))


def _run(command: list[str]) -> tuple[float, str]:
    """Seconds, and what it printed."""
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return time.perf_counter() - began, done.stdout


def _memory(command: list[str]) -> int:
    """MB of its largest process. Started by a small program: a child begins with the size of what forked it."""
    code = "import resource as r, subprocess, sys; subprocess.run(sys.argv[1:], stdout=-3, check=True)"
    code += "; print(r.getrusage(r.RUSAGE_CHILDREN).ru_maxrss)"
    return int(_run([sys.executable, "-c", code, *command])[1]) // 1024


def _running(output: str) -> float:
    """The rate that a program printed of itself, in tokens/s: the last 'N M tokens/s'."""
    return float(output.rpartition(" M tokens/s")[0].split()[-1]) * 1e6


def _m(rates: list[float]) -> float:
    return round(statistics.median(rates) / 1e6, 2)


def _ratio(ours: list[float], theirs: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 2)


@click.command()
@click.option("--rounds", default=3, show_default=True)
@click.option("--workers", default=2, show_default=True)
def main(rounds: int, workers: int) -> None:
    """Measure prep and print one JSON object."""
    if CORPUS.exists():
        files, tokenizer = sorted(CORPUS.glob("edu_*.parquet")), LLAMA
    else:
        from prep.sample_corpus import write_sample_corpus

        folder = Path(tempfile.mkdtemp()) / "sample"
        write_sample_corpus(folder)
        files, tokenizer = sorted(folder.glob("*.parquet")), folder / "tokenizer.model"
    result = {
        "machine": f"{processor()}, {platform.python_version()}",
        "encoder": encoder_against_sentencepiece(files, tokenizer, rounds),
        "tokenize": tokenize_against_pool(files, tokenizer, rounds, workers),
    }
    click.echo(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
