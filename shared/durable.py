"""Bytes that survive a kill or a power cut: write aside, fsync the file, rename, fsync the folder; locks; free space.

Everything is written with plain files. A memory map on a full disk dies of SIGBUS, which no program can catch cleanly;
a plain write raises OSError.
"""

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

CHUNK = 1 << 20


def fsync_folder(folder: Path) -> None:
    """Make renames, creations and deletions in `folder` durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write every byte: a raw write may stop short, on a nearly full disk for one."""
    view = memoryview(data).cast("B")
    while len(view):
        view = view[os.write(fd, view) :]


def write_durably(path: Path, data: bytes) -> None:
    """Put `data` at `path` so that at any instant the path holds the old bytes or the new ones, whole."""
    aside = path.with_name(path.name + ".tmp")
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        write_all(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)
    aside.replace(path)
    fsync_folder(path.parent)


def sha256_file(path: Path, observe: Callable[[memoryview], None] | None = None) -> str:
    """Hex SHA-256 of a file. `observe` is shown each chunk on the way, so that one pass over the disk does for both."""
    digest = hashlib.sha256()
    buffer = bytearray(CHUNK)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while (n := _fill(file.readinto, view)) > 0:
            digest.update(view[:n])
            if observe is not None:
                observe(view[:n])
    return digest.hexdigest()


def _fill(readinto: Callable[[memoryview], int | None], view: memoryview) -> int:
    """Read until `view` is full or the file ends, so that chunk borders never fall inside a 2-byte token."""
    total = 0
    while total < len(view):
        n = readinto(view[total:])
        if not n:
            break
        total += n
    return total


@contextmanager
def exclusive(path: Path, owner: str) -> Iterator[None]:
    """Hold the lock file `path` for the length of the block; a second holder is refused with a ValueError.

    POSIX record locks are used because a forked worker does not inherit them: after SIGKILL of the holder the lock is
    free at once, even while a worker still winds down. The file is removed on the way out. `owner` names the holder
    in the message ("prep tokenize").
    """
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            raise ValueError(f"{path}: another {owner} is at work here; wait for it or stop it first") from None
        try:  # the holder before us may have removed the file between our open and our lock
            ours = os.path.samestat(os.fstat(fd), path.stat())
        except FileNotFoundError:
            ours = False
        if ours:
            break
        os.close(fd)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(fd)


def require_space(folder: Path, needed: int, what: str) -> None:
    """Refuse with a ValueError when the disk that holds `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"{folder}: {what} needs {needed / 1e9:.3f} GB and the disk has {free / 1e9:.3f} GB free; "
            "free some space or choose another disk"
        )
