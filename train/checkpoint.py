"""Checkpoints: written aside, hashed, fsynced, renamed, verified; loaded only when every byte is as it was written.

    checkpoints/step-00001000/
      model.safetensors      the parameters, by name
      optimizer.safetensors  the moments and the random state
      state.json             what else the next step depends on
      checkpoint.json        each file's size and sha256, written last

No times, paths or versions stand inside, so equal states have equal bytes. A folder of another name is no checkpoint:
`.partial` is being written or removed, `.damaged` has failed its hashes. Nothing is pickled or unpickled.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.durable import fsync_folder, sha256_file, write_all
from shared.manifest import text_of

MODEL, OPTIMIZER, STATE, SUMMARY = "model.safetensors", "optimizer.safetensors", "state.json", "checkpoint.json"
CHUNK = 1 << 24
DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.int64: "I64", torch.uint8: "U8"}


@dataclass(frozen=True)
class Snapshot:
    """The whole state after `step` updates. Tensors are on the CPU; `state` is plain JSON."""

    step: int
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: Mapping[str, Any]


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def steps_in(checkpoints: Path) -> list[int]:
    """The steps that have a checkpoint folder, ascending, verified or not."""
    found = [re.fullmatch(r"step-(\d{8,})", path.name) for path in checkpoints.glob("step-*")]
    return sorted(int(match[1]) for match in found if match)


def write(checkpoints: Path, snapshot: Snapshot) -> Path:
    """Make a snapshot durable and verify it. OSError leaves what was there before, and nothing of this one."""
    final = checkpoints / name_of(snapshot.step)
    aside = final.with_name(final.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        files = {
            MODEL: _write(aside / MODEL, _safetensors(snapshot.model)),
            OPTIMIZER: _write(aside / OPTIMIZER, _safetensors(snapshot.optimizer)),
            STATE: _write(aside / STATE, [text_of(snapshot.state)]),
        }
        summary = {"step": snapshot.step, "files": files}
        _write(aside / SUMMARY, [text_of(summary)])
        fsync_folder(aside)
        aside.rename(final)
        fsync_folder(checkpoints)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if problem := verify(final):
        raise OSError(f"{final}: {problem}; the disk did not keep what was written")
    return final


def verify(folder: Path) -> str | None:
    """What is wrong with a checkpoint, None when every byte is as it was written."""
    try:
        data = (folder / SUMMARY).read_bytes()
        summary = json.loads(data)
        if text_of(summary) != data or summary["step"] != int(folder.name.removeprefix("step-")):
            return f"{SUMMARY} is damaged"
        if set(summary["files"]) != {MODEL, OPTIMIZER, STATE}:
            return f"{SUMMARY} names other files"
        for file, stated in summary["files"].items():
            size = (folder / file).stat().st_size
            if size != stated["size"]:
                return f"{file} has {size} bytes, not {stated['size']}"
            if sha256_file(folder / file) != stated["sha256"]:
                return f"{file} does not have its sha256"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"cannot be read: {error}"
    except (ValueError, KeyError, TypeError):
        return f"{SUMMARY} is damaged"
    return None


def load(folder: Path) -> Snapshot:
    """Read a checkpoint to the CPU. Call `verify` first: the bytes are taken as they are."""
    from safetensors.torch import load_file

    state = json.loads((folder / STATE).read_bytes())
    step = int(folder.name.removeprefix("step-"))
    return Snapshot(step, load_file(folder / MODEL), load_file(folder / OPTIMIZER), state)


def newest(checkpoints: Path, damaged: Callable[[Path, str], None]) -> Path | None:
    """The newest checkpoint that verifies, None when there never was one; `damaged` is told of newer ones that do not.

    ValueError when there are checkpoints and none verifies: that must never become a silent new start.
    """
    steps = steps_in(checkpoints)
    for step in reversed(steps):
        folder = checkpoints / name_of(step)
        problem = verify(folder)
        if problem is None:
            return folder
        damaged(folder, problem)
    if steps or any(checkpoints.glob("step-*.damaged*")):
        raise ValueError(
            f"{checkpoints}: no checkpoint verifies; copy a good one back, or give --restart to start anew"
        )
    return None


def set_aside(folder: Path) -> Path:
    """Move a damaged checkpoint to step-N.damaged, or to step-N.damaged-2 and so on when that exists."""
    moved, number = folder.with_name(folder.name + ".damaged"), 2
    while moved.exists():
        moved, number = folder.with_name(f"{folder.name}.damaged-{number}"), number + 1
    folder.rename(moved)
    fsync_folder(folder.parent)
    return moved


def remove_partial(checkpoints: Path) -> None:
    """Remove what a kill left half written or half removed."""
    for path in checkpoints.glob("step-*.partial"):
        shutil.rmtree(path)


def retain(checkpoints: Path, keep_last: int, keep_every: int) -> None:
    """Remove all checkpoints but the newest `keep_last` and those of each `keep_every` steps (0: none of these)."""
    for step in steps_in(checkpoints)[:-keep_last]:
        if keep_every == 0 or step % keep_every:
            aside = checkpoints / (name_of(step) + ".partial")
            (checkpoints / name_of(step)).rename(aside)  # so that a kill leaves no half of a checkpoint
            shutil.rmtree(aside)


class Saver:
    """Saves in a thread: a run stands still only while its state is copied, and for the end of the save before.

    A save that fails raises from the next `save`, `check` or `wait`.
    """

    def __init__(self, checkpoints: Path, keep_last: int, keep_every: int) -> None:
        self._checkpoints, self._keep_last, self._keep_every = checkpoints, keep_last, keep_every
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future[None] | None = None
        self._buffers: dict[str, Tensor] = {}  # on the CPU, reused from save to save
        self.last_step = max(steps_in(checkpoints), default=0)

    def save(
        self,
        step: int,
        model: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        state: Mapping[str, Any],
        first: Callable[[], None],
    ) -> None:
        """Copy the state and begin to write it; `first` makes durable what the checkpoint relies on."""
        self.wait()
        copies = self._copy(MODEL, model), self._copy(OPTIMIZER, optimizer)
        if any(tensor.is_cuda for tensor in (*model.values(), *optimizer.values())):
            torch.cuda.synchronize()  # the copies above do not block
        snapshot = Snapshot(step, *copies, json.loads(json.dumps(state)))
        self._running = self._thread.submit(self._write, snapshot, first)
        self.last_step = step

    def check(self) -> None:
        """Raise the error of a save that has failed; never wait."""
        if self._running is not None and self._running.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the save under way. ValueError when it failed."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def close(self) -> None:
        self._thread.shutdown()

    def _copy(self, part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        copies = {}
        for name, tensor in tensors.items():
            key = f"{part}/{name}"
            if key not in self._buffers:
                pinned = tensor.device.type == "cuda"
                self._buffers[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            copies[name] = self._buffers[key].copy_(tensor.detach(), non_blocking=tensor.is_cuda)
        return copies

    def _write(self, snapshot: Snapshot, first: Callable[[], None]) -> None:
        folder = self._checkpoints / name_of(snapshot.step)
        try:
            first()
            write(self._checkpoints, snapshot)
            retain(self._checkpoints, self._keep_last, self._keep_every)
        except OSError as error:
            raise ValueError(
                f"{folder}: could not be saved: {error.strerror or error}; the checkpoints before it are whole: "
                "free some space, then the same command goes on"
            ) from error


def _safetensors(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The safetensors form of some CPU tensors, in pieces: header length, JSON header, the raw values.

    Written here in pieces straight from the tensors: the library builds the file a second time in memory, and writes
    by ways that do not raise OSError on a full disk.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        values = tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(values), CHUNK):
            yield values[start : start + CHUNK]


def _write(path: Path, pieces: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write and fsync a new file; return its size and the hash of what was meant to be written."""
    digest, size = hashlib.sha256(), 0
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        for piece in pieces:
            write_all(fd, piece)
            digest.update(piece)
            size += len(piece)
        os.fsync(fd)
    finally:
        os.close(fd)
    return {"size": size, "sha256": digest.hexdigest()}
