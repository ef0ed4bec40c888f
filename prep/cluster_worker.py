"""What a Dask worker does for prep.cluster: it becomes what a local worker process is, then runs the same steps."""

import hashlib
import pickle
import platform
import threading
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prep import worker
from prep.worker import Worker

PACKAGES = ("numpy", "pyarrow", "sentencepiece", "zstandard")  # what reads and encodes
GO_ON = "the same command goes on where it stopped"


@dataclass(frozen=True)
class Setup:
    """What a worker needs before its first step. `make` is the packed function that makes its `Worker`."""

    environment: dict[str, str]
    folder: Path  # where the source lies
    make: bytes
    sha256: str  # of `make`


def pack(make: "partial[Worker]") -> Setup:
    """The setup for workers that `make` makes, out of the source and whatever else."""
    packed = zlib.compress(pickle.dumps(make))
    return Setup(environment(), make.args[0].folder, packed, hashlib.sha256(packed).hexdigest())


@cache
def environment() -> dict[str, str]:
    """What decides how a process reads and encodes: this program's code, Python, packages."""
    root, code = Path(__file__).resolve().parent.parent, hashlib.sha256()
    for path in sorted([*root.glob("prep/*.py"), *root.glob("shared/*.py")]):
        code.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    python = ".".join(platform.python_version_tuple()[:2])
    return {"prep's code": code.hexdigest()[:12], "Python": python, **{name: version(name) for name in PACKAGES}}


_one_step = threading.Lock()  # a process encodes one step at a time, however many threads Dask gives it
_ready_for: str | None = None  # the `sha256` of the setup that this process has


def perform(setup: Setup, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Runs on a Dask worker: `function(*arguments)` where prep.worker has what `setup` holds."""
    global _ready_for
    with _one_step:
        if _ready_for != setup.sha256:
            _ready_for = None
            for name, ours in environment().items():
                if ours != setup.environment.get(name):
                    raise ValueError(
                        f"Dask worker {_address()}: has another {name} than this build ({ours}, not "
                        f"{setup.environment.get(name)}); start it with the same commit and packages; {GO_ON}"
                    )
            if not setup.folder.is_dir():
                raise ValueError(
                    f"{setup.folder}: Dask worker {_address()} does not see this folder; sources (and --out, if they "
                    f"are on the Hub) must lie on a file system that all workers share, at the same path; {GO_ON}"
                )
            worker.serve(pickle.loads(zlib.decompress(setup.make)))
            _ready_for = setup.sha256
        return function(*arguments)


def _address() -> str:
    from distributed import get_worker

    with suppress(ValueError):  # not on a worker
        return str(get_worker().address)
    return platform.node()
