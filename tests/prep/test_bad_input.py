"""Whatever is wrong with the input: one line on stderr that says what and where, and nothing is lost."""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from tests.prep.builds import (
    GOLDEN,
    ROOT,
    SOURCE,
    TOKENIZER,
    bytes_of,
    golden_rows,
    one_line_error,
    prep,
    tokenize_arguments,
    write_parquet,
)

GOOD = b'{"text": "good"}\n'


def parquet(folder: Path, damage: Callable[[bytes], bytes] = bytes, **columns: pa.Array) -> None:
    path = folder / "a.parquet"
    pq.write_table(pa.table(columns), path)
    path.write_bytes(damage(path.read_bytes()))


def not_utf8() -> pa.Array:
    raw = pa.array([b"fine", b"fine", b"\xff\xfe", b"fine"], pa.binary())
    return pa.Array.from_buffers(pa.string(), 4, raw.buffers())


def corrupt(data: bytes) -> bytes:
    """Spoil the column data and leave the footer whole."""
    return data[:40] + b"\xff" * 200 + data[240:]


WORDS = pa.array([f"word {i} " * 40 for i in range(200)])
BAD_SOURCES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "nothing there": (lambda f: f.rmdir(), ["no such file or directory"]),
    "no usable file": (lambda f: (f / "a.csv").write_text("x"), ["no files of .parquet"]),
    "empty parquet": (lambda f: (f / "a.parquet").touch(), ["a.parquet", "not a readable parquet"]),
    "garbage parquet": (lambda f: (f / "a.parquet").write_bytes(b"x" * 999), ["a.parquet", "not a readable parquet"]),
    "truncated parquet": (lambda f: parquet(f, lambda d: d[:-50], text=WORDS), ["a.parquet", "not a readable parquet"]),
    "damaged parquet": (lambda f: parquet(f, corrupt, text=WORDS), ["a.parquet", "damaged near row 0"]),
    "no text column": (lambda f: parquet(f, body=WORDS), ["a.parquet", "no column 'text'", "body"]),
    "text of numbers": (lambda f: parquet(f, text=pa.array([1, 2])), ["a.parquet", "int64, not strings"]),
    "text of bytes": (lambda f: parquet(f, text=pa.array([b"x"])), ["a.parquet", "binary, not strings"]),
    "parquet not UTF-8": (lambda f: parquet(f, text=not_utf8()), ["a.parquet", "row 2", "UTF-8"]),
    "ids that are lists": (lambda f: parquet(f, text=pa.array(["x"]), id=pa.array([[1]])), ["a.parquet", "'id'"]),
    "garbage zst": (lambda f: (f / "a.jsonl.zst").write_bytes(b"garbage" * 99), ["a.jsonl.zst", "not readable as zst"]),
    "truncated zst": (
        lambda f: (f / "a.jsonl.zst").write_bytes(zstandard.compress(GOOD * 9999)[:-9]),
        ["a.jsonl.zst", "cut off"],
    ),
    "bad JSON": (lambda f: (f / "a.jsonl").write_bytes(GOOD * 3 + b"\n{'text': 1}\n"), ["a.jsonl", "row 4", "JSON"]),
    "JSON of a list": (lambda f: (f / "a.jsonl").write_bytes(GOOD + b"[1]\n"), ["a.jsonl", "row 1", "object"]),
    "JSON without text": (lambda f: (f / "a.jsonl").write_bytes(b'{"txt": ""}'), ["a.jsonl", "row 0", "'text'"]),
    "JSON text a number": (lambda f: (f / "a.jsonl").write_bytes(b'{"text": 7}'), ["a.jsonl", "row 0", "int"]),
    "JSON too deep": (lambda f: (f / "a.jsonl").write_bytes(b"[" * 99999), ["a.jsonl", "row 0"]),
    "JSON lone surrogate": (lambda f: (f / "a.jsonl").write_bytes(b'{"text": "\\ud800"}'), ["row 0", "UTF-8"]),
    "jsonl not UTF-8": (lambda f: (f / "a.jsonl").write_bytes(GOOD + b'{"text": "\xff"}'), ["row 1", "UTF-8"]),
    "zst not UTF-8": (
        lambda f: (f / "a.jsonl.zst").write_bytes(zstandard.compress(GOOD * 5000 + b'{"text": "\xff"}')),
        ["a.jsonl.zst", "row 5000", "UTF-8"],
    ),
    "txt not UTF-8": (lambda f: (f / "a.txt").write_bytes(b"fine\n\nfine\n\xc3\x28\n"), ["a.txt", "row 3", "UTF-8"]),
    "too small": (
        lambda f: (f / "a.txt").write_text("few words\n" * 90),
        ["too small", "it holds", "--train-sequences"],
    ),
}


@pytest.mark.parametrize("name", BAD_SOURCES)
def test_a_bad_source_gets_one_line(tmp_path: Path, name: str) -> None:
    make, expected = BAD_SOURCES[name]
    (tmp_path / "source").mkdir()
    make(tmp_path / "source")
    line = one_line_error(prep(*tokenize_arguments(tmp_path / "source", tmp_path / "out")), 1)
    for words in expected:
        assert words in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "code", "expected"),
    [
        ({"tokenizer": GOLDEN / "no_bos.model"}, 1, "no bos piece"),
        ({"tokenizer": GOLDEN / "make.py"}, 1, "not a SentencePiece model"),
        ({"tokenizer": GOLDEN / "absent.model"}, 1, "cannot read the tokenizer"),
        ({"train_sequences": 0}, 2, "--train-sequences"),
        ({"val_sequences": -1}, 2, "--val-sequences"),
        ({"seq_len": 0}, 2, "--seq-len"),
        ({"shard_tokens": 0}, 2, "--shard-tokens"),
        ({"workers": 0}, 2, "--workers"),
        ({"seed": -1}, 2, "--seed"),
        ({"order": "random"}, 2, "--order"),
        ({"train_sequences": 10**13}, 1, "GB free"),
    ],
)
def test_an_impossible_argument_gets_one_line(
    tmp_path: Path, options: dict[str, object], code: int, expected: str
) -> None:
    assert expected in one_line_error(prep(*tokenize_arguments(SOURCE, tmp_path / "out", **options)), code)
    assert not (tmp_path / "out").exists()


def test_the_numbers_that_too_small_a_source_names_are_possible(tmp_path: Path) -> None:
    line = one_line_error(prep(*tokenize_arguments(SOURCE, tmp_path / "out", train_sequences=10**6)), 1)
    options = {
        name: int(line.partition(f"--{name.replace('_', '-')} ")[2].split()[0])
        for name in ("train_sequences", "val_sequences")
    }
    assert options["train_sequences"] > 100
    done = prep(*tokenize_arguments(SOURCE, tmp_path / "out", **options), "--restart")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    assert prep(*tokenize_arguments(SOURCE, out)).returncode == 0
    return out


CHANGES = {
    "train sequences": {"train_sequences": 61},
    "val sequences": {"val_sequences": 5},
    "sequence length": {"seq_len": 127},
    "shard tokens": {"shard_tokens": 3001},
    "order": {"order": "listed"},
    "seed": {"seed": 1},
    "unit bytes": {"unit_bytes": 2},
    "tokenizer": {"tokenizer": GOLDEN / "user_symbols.model"},
    "source files": {"source": GOLDEN / "source" / "*.jsonl"},
}


@pytest.mark.parametrize("field", CHANGES)
def test_a_finished_data_set_is_left_alone_by_another_configuration(finished: Path, field: str) -> None:
    before = bytes_of(finished)
    options = {"source": SOURCE, **CHANGES[field]}
    assert f"another {field}" in one_line_error(
        prep(*tokenize_arguments(options.pop("source"), finished, **options)), 1
    )
    assert bytes_of(finished) == before


def test_a_finished_data_set_is_finished_at_once(finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    done = prep(*tokenize_arguments(SOURCE, finished, workers=2))
    assert done.returncode == 0 and "already complete" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_a_source_changed_since_is_noticed(tmp_path: Path) -> None:
    source = Path(shutil.copytree(SOURCE, tmp_path / "source"))
    assert prep(*tokenize_arguments(source, tmp_path / "out")).returncode == 0
    file = source / "lines.txt"
    file.write_bytes(file.read_bytes().swapcase())
    line = one_line_error(prep(*tokenize_arguments(source, tmp_path / "out")), 1)
    assert "another source files" in line


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    """A build that a full disk stopped midway: no file may grow past 9,000 bytes."""
    out = tmp_path / "out"
    done = prep(
        *tokenize_arguments(SOURCE, out),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000)),
    )
    line = one_line_error(done, 1)
    assert "out.partial" in line and "the same command goes on" in line
    assert not out.exists()
    return out


@pytest.mark.parametrize("field", CHANGES)
def test_an_unfinished_build_is_left_alone_by_another_configuration(unfinished: Path, field: str) -> None:
    options = {"source": SOURCE, **CHANGES[field]}
    source = options.pop("source")
    line = one_line_error(prep(*tokenize_arguments(source, unfinished, **options)), 1)
    assert f"another {field}" in line and "--restart" in line


def test_a_full_disk_midway_resumes_to_the_same_bytes(unfinished: Path, finished: Path) -> None:
    assert prep(*tokenize_arguments(SOURCE, unfinished)).returncode == 0
    assert bytes_of(unfinished) == bytes_of(finished)


def test_restart_discards_an_unfinished_build(unfinished: Path) -> None:
    assert prep(*tokenize_arguments(SOURCE, unfinished, seed=1), "--restart").returncode == 0
    assert [path.name for path in unfinished.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["out", "out.partial"])
def test_a_foreign_folder_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("years of work")
    for extra in ([], ["--restart"]):
        line = one_line_error(prep(*tokenize_arguments(SOURCE, tmp_path / "out"), *extra), 1)
        assert str(tmp_path / name) in line
        assert (tmp_path / name / "thesis.txt").read_text() == "years of work"


def test_a_second_writer_is_refused_and_the_first_is_not_disturbed(tmp_path: Path, finished: Path) -> None:
    source = tmp_path / "source"
    write_parquet(source / "a.parquet", golden_rows() * 4, 3)
    arguments = tokenize_arguments(source, tmp_path / "out", train_sequences=2000)
    with subprocess.Popen([sys.executable, "-m", "prep", *arguments], cwd=ROOT, stdout=subprocess.DEVNULL) as first:
        while not (tmp_path / "out.partial" / "journal.json").exists():
            time.sleep(0.01)
        line = one_line_error(prep(*arguments), 1)
        assert "another prep tokenize is at work" in line
        assert first.wait(60) == 0
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["splits"]["train"]["sequences"] == 2000


def test_a_worker_that_is_killed_gets_one_line_and_the_build_goes_on(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_parquet(source / "a.parquet", golden_rows() * 4, 3)
    arguments = tokenize_arguments(source, tmp_path / "out", train_sequences=2000)
    with subprocess.Popen(
        [sys.executable, "-m", "prep", *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while not (children := Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()):
            time.sleep(0.005)
        time.sleep(0.1)
        os.kill(int(children[0]), 9)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert stderr.count("\n") == 1 and "a worker process died" in stderr
    assert prep(*arguments).returncode == 0


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    from prep.encoder import Encoder
    from prep.sources import open_source, units_of
    from prep.worker import Worker
    from shared.tokenizer import load_tokenizer

    (tmp_path / "a.txt").write_text("some words\n" * 10)
    source = open_source(str(tmp_path))
    stamp = (tmp_path / "a.txt").stat().st_mtime_ns
    worker = Worker(source, {"a.txt": stamp}, Encoder(load_tokenizer(TOKENIZER)), 0, 0)
    [unit] = units_of(source, "a.txt", 1)
    assert len(worker.run(unit, 0, 10).hashes) == 10
    os.utime(tmp_path / "a.txt", ns=(stamp, stamp + 1))
    with pytest.raises(ValueError, match="changed while"):
        worker.run(unit, 0, 10)
