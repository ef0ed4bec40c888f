"""What a commit does, in which order; and what stops a build that would write wrong ids."""

import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prep.encoder import Encoded, Encoder
from prep.pipeline import build
from prep.plan import Settings
from shared.stop import Stop
from shared.tokenizer import load_tokenizer
from tests.prep.builds import TOKENIZER, golden_rows, write_parquet

SMALL = Settings(40, 4, 128, 2000, "shuffled", 0, 1)


def run(folder: Path) -> None:
    write_parquet(folder / "source" / "a.parquet", golden_rows(), 4)
    tokenizer = load_tokenizer(TOKENIZER)
    build(str(folder / "source"), tokenizer, SMALL, folder / "out", workers=1, restart=False, stop=Stop())


def test_the_journal_never_speaks_of_bytes_that_may_be_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each rename of the journal every byte written before it has been flushed, and so has the journal itself."""
    parent, steps = os.getpid(), []
    unflushed: set[str] = set()
    renamed = 0

    def name_of(fd: int) -> str:
        return str(Path(f"/proc/self/fd/{fd}").readlink())

    real_write, real_fsync, real_replace = os.write, os.fsync, Path.replace

    def write(fd: int, data: Any) -> int:
        if os.getpid() == parent and (name := name_of(fd)).startswith(str(tmp_path)):
            unflushed.add(name)
            steps.append(("write", name))
        return real_write(fd, data)

    def fsync(fd: int) -> None:
        real_fsync(fd)
        unflushed.discard(name_of(fd))
        steps.append(("fsync", name_of(fd)))

    def replace(path: Path, target: Path) -> Path:
        nonlocal renamed
        if target.name == "journal.json":
            renamed += 1
            assert not unflushed, unflushed
            assert steps[-1] == ("fsync", str(path))
        return real_replace(path, target)

    monkeypatch.setattr(os, "write", write)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    run(tmp_path)
    assert renamed > 5 and not unflushed
    assert steps[-1] == ("fsync", str(tmp_path))  # the last rename is durable, too


def test_a_build_whose_ids_are_not_sentencepieces_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sampled comparison of every build: a fault in the fast path is noticed before anything is written."""
    real = Encoder.encode

    def wrong(self: Encoder, texts: Any) -> Encoded:
        encoded = real(self, texts)
        tokens = encoded.tokens.copy()
        tokens[encoded.offsets[:-1] + 2] ^= np.uint16(1)
        return Encoded(tokens, encoded.offsets, encoded.utf8_bytes)

    monkeypatch.setattr(Encoder, "encode", wrong)
    with pytest.raises(ValueError, match="encoded otherwise than by SentencePiece"):
        run(tmp_path)
    assert not (tmp_path / "out").exists()


def test_the_sample_that_was_compared_is_on_record(tmp_path: Path) -> None:
    run(tmp_path)
    from shared.manifest import load_build

    parity = load_build(tmp_path / "out")["parity"]
    assert parity["documents"] >= 5 and parity["mismatches"] == 0


def test_a_finished_build_leaves_no_worker_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's own clean-up would meet a pool that is still closing, and print a traceback at times."""
    real = Encoder.encode

    def slow(self: Encoder, texts: Any) -> Encoded:
        time.sleep(0.05)  # so that the next piece is under way when the last one is written
        return real(self, texts)

    monkeypatch.setattr(Encoder, "encode", slow)
    run(tmp_path)
    assert not multiprocessing.active_children()
