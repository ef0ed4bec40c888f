"""python -m tests.bench: prep against what one would use instead, in one run on one machine.

On ../shared/corpus with its tokenizer where they are present, else on a sample corpus of this Python. Rounds alternate
between the candidates, so that a machine whose speed drifts is fair to both; the ratio is the median over the rounds.
"""

import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prep.encoder import Encoder
from shared.provenance import processor
from shared.tokenizer import load_tokenizer
from tests.bench import hugging_face
from tests.bench.stages import profile

ROOT = Path(__file__).resolve().parents[2]
# pool: SentencePiece processes; the others where the extra `bench` is installed
MODULES = {"pool": "sentencepiece", "hugging_face": "tokenizers", "rust": "gigatoken"}
OTHERS = [name for name, module in MODULES.items() if importlib.util.find_spec(module)]
VERIFIED_BYTES = 1 << 30
CORPUS, LLAMA = ROOT.parent / "shared" / "corpus", ROOT.parent / "shared" / "tokenizer" / "tokenizer.model"


def encoder_against_others(files: list[Path], tokenizer_path: Path, rounds: int) -> dict[str, Any]:
    """One core, texts in memory: tokens/s of a fresh encoder and of what else there is over the same documents."""
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
    same = all(
        np.array_equal(encoder.encode(unit).tokens, np.concatenate([encoder.reference(t) for t in unit.to_pylist()]))
        for unit in units[::4]
    )
    found = {
        "tokens": tokens,
        "identical": same,
        "sentencepiece M tokens/s": _m(plain),
        "encoder M tokens/s": _m(fast),
        "encoder, second pass M tokens/s": _m(warm),
        "encoder / sentencepiece": _ratio(fast, plain),
    }
    for name, make in (("hugging_face", _hugging_face), ("rust", _gigatoken)):
        if name in OTHERS:
            rates, agreeing = _rates(make, tokenizer_path, units[::4] if name == "hugging_face" else units, rounds)
            found[f"{name} M tokens/s"], found[f"encoder / {name}"] = _m(rates), _ratio(fast, rates)
            found[f"documents with SentencePiece's ids, {name}"] = f"{agreeing:.2%}"
    return found


Encode = Callable[[list[str]], list[list[int]]]


def _rates(
    make: Callable[[Path], Encode], tokenizer: Path, units: list[pa.Array], rounds: int
) -> tuple[list[float], float]:
    """tokens/s of a fresh encoder on one core over the same texts, and the share of documents whose ids agree."""
    texts, rates = [unit.to_pylist() for unit in units], []
    for _ in range(rounds):
        encode = make(tokenizer)
        began = time.perf_counter()
        tokens = sum(len(ids) for part in texts for ids in encode(part))
        rates.append(tokens / (time.perf_counter() - began))
    wanted = load_tokenizer(tokenizer).processor.encode(texts[0])
    agreeing = sum(list(ids) == right for ids, right in zip(encode(texts[0]), wanted, strict=True))
    return rates, agreeing / len(wanted)


def _gigatoken(tokenizer: Path) -> Encode:
    import gigatoken

    encoder = gigatoken.Tokenizer.from_sentencepiece(str(tokenizer))
    return lambda texts: encoder.encode_batch(texts, parallel=False)


def _hugging_face(tokenizer: Path) -> Encode:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    encoder = hugging_face.load(tokenizer)
    return lambda texts: [one.ids for one in encoder.encode_batch_fast(texts, add_special_tokens=False)]


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


def verify_against_sha256sum(files: list[Path], tokenizer: Path, rounds: int, workers: int) -> dict[str, Any]:
    """GB/s of `prep verify` and of `sha256sum` on the same cores, over a data set of about a gigabyte.

    The source is repeated for it; what verify does does not depend on what the tokens say. `openssl` hashes with the
    processor's own instructions, where `sha256sum` may not; it is given where it is installed.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder, size = Path(temporary), sum(file.stat().st_size for file in files)
        (folder / "source").mkdir()
        for i in range(max(1, round(VERIFIED_BYTES / 1.5 / size))):
            for file in files:
                (folder / "source" / f"{i:04d}_{file.name}").symlink_to(file)
        prep = [sys.executable, "-m", "prep"]
        job = [*prep, "tokenize", "--source", str(folder / "source"), "--tokenizer", str(tokenizer)]
        copies = len(list((folder / "source").iterdir())) // len(files)
        sequences = _count(files, tokenizer) * copies * 9 // 10 // 1024
        _run([*job, "--out", str(folder / "out"), "--train-sequences", str(sequences), "--val-sequences", "256"])
        paths = sorted(path for path in (folder / "out").rglob("*") if path.is_file())
        total = sum(path.stat().st_size for path in paths)
        commands = {"verify": [*prep, "verify", str(folder / "out")]}
        for name, words in {"sha256sum": "sha256sum", "openssl": "openssl dgst -sha256"}.items():
            if shutil.which(name):
                each = f"printf '%s\\0' \"$@\" | xargs -0 -n 1 -P {workers} {words}"
                commands[name] = ["sh", "-c", each, "sh", *map(str, paths)]
        rates: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(rounds):
            for name, command in commands.items():
                rates[name].append(total / _run(command)[0])
    return {
        "GB": round(total / 1e9, 2),
        "GB/s": {name: round(statistics.median(rate) / 1e9, 2) for name, rate in rates.items()},
        "verify / other": {name: _ratio(rates["verify"], rates[name]) for name in list(rates)[1:]},
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


PARTS = ("encoder", "tokenize", "verify", "profile")


@click.command()
@click.argument("parts", nargs=-1, type=click.Choice(PARTS))
@click.option("--rounds", default=3, show_default=True)
@click.option("--workers", default=2, show_default=True)
def main(parts: tuple[str, ...], rounds: int, workers: int) -> None:
    """Measure PARTS of prep, by default all, and print one JSON object."""
    with tempfile.TemporaryDirectory() as temporary:
        if CORPUS.exists():
            files, tokenizer = sorted(CORPUS.glob("edu_*.parquet")), LLAMA
        else:
            from prep.sample_corpus import write_sample_corpus

            folder = Path(temporary) / "sample"
            write_sample_corpus(folder)
            files, tokenizer = sorted(folder.glob("*.parquet")), folder / "tokenizer.model"
        measure: dict[str, Callable[[], dict[str, Any]]] = {
            "encoder": lambda: encoder_against_others(files, tokenizer, rounds),
            "tokenize": lambda: tokenize_against_pool(files, tokenizer, rounds, workers),
            "verify": lambda: verify_against_sha256sum(files, tokenizer, rounds, workers),
            "profile": lambda: profile(files, tokenizer, _count(files, tokenizer) * 97 // 100 // 1024),
        }
        result: dict[str, Any] = {"machine": f"{processor()}, {platform.python_version()}"}
        for part in parts or PARTS:
            result[part] = measure[part]()
    click.echo(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
