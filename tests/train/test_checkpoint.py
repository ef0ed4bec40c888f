"""A checkpoint is whole or it is not one: damage is found in every byte, a failed save leaves the others, nothing is
unpickled, equal states have equal bytes."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from train import checkpoint
from train.checkpoint import Saver, Snapshot, load, name_of, newest, retain, set_aside, steps_in, verify, write


def snapshot(step: int, seed: int = 0) -> Snapshot:
    generator = torch.Generator().manual_seed(seed)
    model = {"b.weight": torch.randn(3, 5, generator=generator), "a": torch.randn(7, generator=generator)}
    moments = {"m.a": torch.zeros(7, dtype=torch.bfloat16), "step": torch.tensor(step), "rng": torch.arange(9).byte()}
    return Snapshot(step, model, moments, {"tokens": step * 64, "windows": [0.1, 1e-300], "text": "é"})


def same(a: Snapshot, b: Snapshot) -> bool:
    pairs = ((a.model, b.model), (a.optimizer, b.optimizer))
    equal = all(
        x.keys() == y.keys() and all(x[k].equal(y[k]) and x[k].dtype == y[k].dtype for k in x) for x, y in pairs
    )
    return equal and a.step == b.step and a.state == b.state


def never(folder: Path, problem: str) -> None:
    raise AssertionError(f"{folder}: {problem}")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_is_loaded_exactly_and_equal_states_have_equal_bytes(tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        assert same(load(write(tmp_path / name, snapshot(3))), snapshot(3))
    assert contents(tmp_path / "x") == contents(tmp_path / "y")
    assert names(tmp_path / "x" / name_of(3)) == [
        "checkpoint.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]


def test_other_programs_can_read_the_tensors(tmp_path: Path) -> None:
    file = write(tmp_path, snapshot(1)) / "model.safetensors"
    assert load_file(file)["b.weight"].equal(snapshot(1).model["b.weight"])
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_a_flipped_bit_in_any_byte_of_any_file_is_found(tmp_path: Path) -> None:
    folder = write(tmp_path, snapshot(12))
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        for at in range(len(data)):
            path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
            assert verify(folder) is not None, f"{path.name}, byte {at}"
        for torn in (data[:-1], data + b"\0", b""):
            path.write_bytes(torn)
            assert verify(folder) is not None
        path.unlink()
        assert verify(folder) == f"{path.name} is missing"
        path.write_bytes(data)
    assert verify(folder) is None


def test_a_checkpoint_under_another_step_is_found(tmp_path: Path) -> None:
    folder = write(tmp_path, snapshot(12))
    assert verify(folder.rename(tmp_path / name_of(13))) == "checkpoint.json is damaged"


def test_the_newest_that_verifies_is_used_and_damaged_ones_are_named(tmp_path: Path) -> None:
    assert newest(tmp_path, never) is None
    for step in (1, 2, 3, 100_000_000):
        write(tmp_path, snapshot(step))
    assert newest(tmp_path, never) == tmp_path / "step-100000000"
    told: list[str] = []
    for step in (3, 100_000_000):
        (tmp_path / name_of(step) / "state.json").write_text("{}")
    found = newest(tmp_path, lambda folder, problem: told.append(f"{set_aside(folder).name}: {problem}"))
    assert found == tmp_path / name_of(2)
    assert [line.partition(" has ")[0] for line in told] == [
        "step-100000000.damaged: state.json",
        "step-00000003.damaged: state.json",
    ]
    write(tmp_path, snapshot(3))
    assert set_aside(tmp_path / name_of(3)).name == "step-00000003.damaged-2"


def test_when_none_verifies_it_is_never_a_new_start(tmp_path: Path) -> None:
    (write(tmp_path, snapshot(1)) / "checkpoint.json").unlink()
    for _ in range(2):  # the second time there are only damaged ones left
        with pytest.raises(ValueError, match="--restart"):
            newest(tmp_path, lambda folder, problem: None if not folder.exists() else set_aside(folder) and None)


def test_a_file_that_runs_code_when_unpickled_is_refused_and_does_not_run(tmp_path: Path) -> None:
    folder = write(tmp_path, snapshot(1))
    ran = tmp_path / "ran"

    class Trap:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            return Path.touch, (ran,)

    torch.save({"a": Trap()}, folder / "model.safetensors")
    assert verify(folder) is not None
    with pytest.raises(Exception, match=r"(?i)header"):
        load(folder)
    assert not ran.exists()


def test_retention_keeps_the_newest_and_the_milestones(tmp_path: Path) -> None:
    for step in range(10, 110, 10):
        write(tmp_path, snapshot(step))
    retain(tmp_path, keep_last=3, keep_every=40)
    assert steps_in(tmp_path) == [40, 80, 90, 100]
    retain(tmp_path, keep_last=1, keep_every=0)
    assert steps_in(tmp_path) == [100]


# What can fail in a save: the n-th write, fsync or rename, as a full disk does it: with and without an errno.
FULL = (OSError(errno.ENOSPC, "No space left on device"), OSError("8 requested and 3 written"))
PLACES = [("write", n) for n in range(1, 7)] + [("fsync", n) for n in range(1, 7)] + [("rename", 1)]
FAILURES = [(call, n, error) for call, n in PLACES for error in FULL]


@pytest.mark.parametrize(("call", "n", "error"), FAILURES)
def test_a_failed_save_leaves_the_older_ones_and_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, n: int, error: OSError
) -> None:
    write(tmp_path, snapshot(1))
    before = contents(tmp_path)
    saver = Saver(tmp_path, keep_last=1, keep_every=0)
    real, count = getattr(os, call), iter(range(1, 100))

    def failing(*arguments: Any, **named: Any) -> Any:
        if next(count) == n:
            raise error
        return real(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        later = snapshot(2)
        saver.save(2, later.model, later.optimizer, later.state, lambda: None)
        with pytest.raises(ValueError, match=r"step-00000002: could not be saved: .*(No space left|3 written)"):
            saver.wait()
    saver.close()
    after = contents(tmp_path)
    assert before.items() <= after.items()
    if after != before:  # the fsync after the rename failed: then the new one is there and whole
        assert (call, n) == ("fsync", 6)
        assert verify(tmp_path / name_of(2)) is None


def test_nothing_is_deleted_before_the_new_one_verifies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, snapshot(1))
    saver = Saver(tmp_path, keep_last=1, keep_every=0)
    real = os.rename

    def rot(source: Path, target: Path) -> None:  # the disk loses a bit between the write and the check
        (Path(source) / "state.json").write_bytes(b"x")
        real(source, target)

    monkeypatch.setattr(os, "rename", rot)
    later = snapshot(2)
    saver.save(2, later.model, later.optimizer, later.state, lambda: None)
    with pytest.raises(ValueError, match="did not keep what was written"):
        saver.wait()
    saver.close()
    assert verify(tmp_path / name_of(1)) is None


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Holds every fsync until it is set: a disk that is slow for as long as a test likes."""
    opened, real = threading.Event(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: opened.wait(30) and real(fd))
    yield opened
    opened.set()


def test_a_save_returns_before_the_disk_is_done_and_holds_the_state_of_its_moment(
    tmp_path: Path, gate: threading.Event
) -> None:
    saver = Saver(tmp_path, keep_last=3, keep_every=0)
    live = snapshot(5)
    state = dict(live.state)
    order: list[str] = []
    saver.save(5, live.model, live.optimizer, state, lambda: order.append("logs"))
    assert steps_in(tmp_path) == []  # the disk has not moved yet
    for tensor in (*live.model.values(), *live.optimizer.values()):
        tensor.zero_()
    state["tokens"] = -1
    saver.check()  # neither waits nor raises
    gate.set()
    saver.wait()
    saver.close()
    assert order == ["logs"]
    assert same(load(tmp_path / name_of(5)), snapshot(5))


def test_logs_then_files_then_folder_are_durable_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = (tmp_path / "metrics.jsonl").open("wb")
    done: list[str] = []
    fsync, rename = os.fsync, os.rename

    def synced(fd: int) -> None:
        done.append(next(p.name for p in tmp_path.rglob("*") if os.path.samestat(p.stat(), os.fstat(fd))))
        fsync(fd)

    def renamed(source: Path, target: Path) -> None:
        done.append(f"{Path(source).name} -> {Path(target).name}")
        rename(source, target)

    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    saver = Saver(tmp_path / "checkpoints", keep_last=3, keep_every=0)
    saver.save(1, snapshot(1).model, snapshot(1).optimizer, snapshot(1).state, lambda: os.fsync(log.fileno()))
    saver.wait()
    saver.close()
    log.close()
    assert done == [
        "metrics.jsonl",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
        "checkpoint.json",
        "step-00000001.partial",
        "step-00000001.partial -> step-00000001",
        "checkpoints",
    ]


def test_the_next_save_waits_for_the_last(tmp_path: Path, gate: threading.Event) -> None:
    saver = Saver(tmp_path, keep_last=3, keep_every=0)
    for step in (1, 2):
        if step == 2:
            threading.Timer(0.2, gate.set).start()
        saver.save(step, snapshot(step).model, snapshot(step).optimizer, snapshot(step).state, lambda: None)
        assert steps_in(tmp_path) == list(range(1, step))
    saver.wait()
    saver.close()
    assert all(same(load(tmp_path / name_of(step)), snapshot(step)) for step in (1, 2))


def test_a_failed_save_is_noticed_by_a_check(tmp_path: Path) -> None:
    saver = Saver(tmp_path / "gone", keep_last=3, keep_every=0)
    saver.save(1, snapshot(1).model, snapshot(1).optimizer, snapshot(1).state, lambda: None)
    saver.close()
    with pytest.raises(ValueError, match="could not be saved"):
        saver.check()


def test_half_of_a_checkpoint_is_never_one_and_is_cleaned_up(tmp_path: Path) -> None:
    write(tmp_path, snapshot(1))
    (tmp_path / "step-00000002.partial").mkdir()
    (tmp_path / "step-00000002.partial" / "model.safetensors").write_bytes(b"half")
    assert newest(tmp_path, never) == tmp_path / name_of(1)
    assert write(tmp_path, snapshot(2)).name == name_of(2)  # over the remains of a kill
    (tmp_path / "step-00000001.partial").mkdir()
    checkpoint.remove_partial(tmp_path)
    assert names(tmp_path) == [name_of(1), name_of(2)]
