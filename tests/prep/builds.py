"""What the tests of prep share: the golden material, runs of the real CLI, and a data set as bytes to compare."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
SOURCE, TOKENIZER = GOLDEN / "source", GOLDEN / "tokenizer.model"
SHARED = ROOT.parent / "shared"
CORPUS, LLAMA = SHARED / "corpus", SHARED / "tokenizer" / "tokenizer.model"


def prep(*arguments: object, cwd: Path = ROOT, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `python -m prep` as a user would."""
    command = [sys.executable, "-m", "prep", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, **options)


def faulty(action: str, victim: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The same with one step made to fail: see tests/prep/faults.py."""
    command = [sys.executable, str(ROOT / "tests/prep/faults.py"), action, str(victim), "--", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def number_of_calls(*arguments: object) -> int:
    """How many steps there are that can be made to fail, found by doing them."""
    return int(faulty("count", 0, *arguments).stdout.rpartition("calls: ")[2])


def tokenize_arguments(source: object, out: Path, **options: object) -> list[str]:
    """Arguments of `prep tokenize` for a small data set; `options` change them."""
    chosen = {
        "source": source,
        "tokenizer": TOKENIZER,
        "train_sequences": 60,
        "val_sequences": 4,
        "seq_len": 128,
        "shard_tokens": 3000,
        "workers": 1,
        "unit_bytes": 1,
        **options,
    }
    words = [word for key, value in chosen.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    return ["tokenize", *words, "--out", str(out)]


def built(source: object, out: Path, **options: object) -> Path:
    """The small data set, made at `out`."""
    done = prep(*tokenize_arguments(source, out, **options))
    assert done.returncode == 0, done.stderr
    return out


def one_line_error(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The single line of a failure; a traceback or a second line is a failure of its own."""
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    assert done.stderr.count("\n") == 1 and not done.stderr.startswith(" "), done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.strip()


def golden_rows() -> list[dict[str, Any]]:
    """Every row of the golden .jsonl files, in order."""
    files = sorted(SOURCE.glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_bytes().split(b"\n") if line]


def write_parquet(path: Path, rows: Sequence[dict[str, Any]], group_rows: int) -> None:
    columns = {name: pa.array([row.get(name) for row in rows], pa.string()) for name in ("text", "id", "url")}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=group_rows, compression="zstd")


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every file of a data set but build.json, which says when and where."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "build.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
