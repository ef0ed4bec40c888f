"""A file holds the old bytes or the new ones; a lock has one holder; space is asked for beforehand."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shared import durable
from shared.durable import exclusive, require_space, sha256_file, write_durably

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_failed_write_leaves_the_old_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "file"
    write_durably(path, b"old")

    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space"):
        write_durably(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    write_durably(path, b"new")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"new"


def test_a_short_write_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:3]))
    write_durably(tmp_path / "file", b"ten bytes!")
    assert (tmp_path / "file").read_bytes() == b"ten bytes!"


def test_the_file_is_flushed_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    real_fsync, real_replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (steps.append("fsync"), real_fsync(fd))[1])
    monkeypatch.setattr(Path, "replace", lambda a, b: (steps.append("rename"), real_replace(a, b))[1])
    write_durably(tmp_path / "file", b"x")
    assert steps == ["fsync", "rename", "fsync"]


def test_a_lock_has_one_holder_and_a_killed_one_frees_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from shared.durable import exclusive
with exclusive(Path({str(path)!r}), "test"):
    print("held", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="another test is at work"), exclusive(path, "test"):
            pass
        holder.kill()
    with exclusive(path, "test"):
        assert path.exists()
    assert not path.exists()


def test_too_little_space_is_said_with_both_numbers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"needs 1000000000\.000 GB and the disk has .* GB free"):
        require_space(tmp_path, 10**18, "this")


def test_the_bytes_shown_while_hashing_are_the_files_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "CHUNK", 10)
    (tmp_path / "file").write_bytes(bytes(range(95)))
    shown: list[bytes] = []
    digest = sha256_file(tmp_path / "file", lambda chunk: shown.append(bytes(chunk)))
    assert b"".join(shown) == bytes(range(95)) and max(map(len, shown)) == 10
    assert len(digest) == 64
