"""A build that was killed, stopped or ran out of disk at any instant ends in the same bytes."""

import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.prep.builds import (
    ROOT,
    built,
    bytes_of,
    faulty,
    golden_rows,
    number_of_calls,
    one_line_error,
    prep,
    tokenize_arguments,
    write_parquet,
)

SMALL = {"train_sequences": 120, "val_sequences": 6, "shard_tokens": 4000}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    write_parquet(folder / "a.parquet", golden_rows(), 5)
    return folder


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The data set as an undisturbed build makes it."""
    return bytes_of(built(source, tmp_path_factory.mktemp("whole") / "out", **SMALL))


def assert_recovers(folder: Path, source: Path, whole: dict[str, bytes], disturb: Callable[[list[str]], None]) -> None:
    """The reusable checker: whatever `disturb` does to a build, the same command then ends in the same bytes.

    Nothing else is left beside them, and a finished data set is never there before it is whole.
    """
    out = folder / "out"
    arguments = tokenize_arguments(source, out, **SMALL)
    disturb(arguments)
    if out.exists():
        assert bytes_of(out) == whole
    done = prep(*arguments)
    assert done.returncode == 0, done.stderr
    assert bytes_of(out) == whole
    assert [path.name for path in folder.iterdir()] == ["out"]


def calls_of_a_build(folder: Path, source: Path) -> int:
    calls = number_of_calls(*tokenize_arguments(source, folder / "out", **SMALL))
    shutil.rmtree(folder / "out")
    return calls


@pytest.mark.parametrize("action", ["kill-before", "kill-after", "full", "short"])
def test_a_failure_at_any_step_of_any_commit_loses_nothing(
    tmp_path: Path, source: Path, whole: dict[str, bytes], action: str
) -> None:
    calls = calls_of_a_build(tmp_path, source)
    assert calls > 60
    # The last steps, where files get their names, and some of the others; another choice for each action.
    chance = random.Random(action)
    victims = sorted({*chance.sample(range(1, calls + 1), 6), *range(calls - 4, calls + 1)})

    def disturb(victim: int, arguments: list[str]) -> None:
        done = faulty(action, victim, *arguments)
        if action.startswith("kill"):
            assert done.returncode == -signal.SIGKILL
        elif done.returncode:  # removing what is left after success may fail without harm
            assert "No space left on device" in one_line_error(done, 1)

    for victim in victims:
        folder = tmp_path / f"at-{victim}"
        folder.mkdir()
        assert_recovers(folder, source, whole, lambda arguments, victim=victim: disturb(victim, arguments))  # type: ignore[misc]


def test_repeated_kills_at_random_instants_end_in_the_same_bytes(
    tmp_path: Path, source: Path, whole: dict[str, bytes]
) -> None:
    chance = random.Random(0)

    def disturb(arguments: list[str]) -> None:
        for _ in range(5):
            with subprocess.Popen(
                [sys.executable, "-m", "prep", *arguments], cwd=ROOT, stdout=subprocess.DEVNULL
            ) as process:
                time.sleep(0.2 + 0.5 * chance.random())
                process.kill()

    assert_recovers(tmp_path, source, whole, disturb)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_exits_75_says_so_in_one_line_and_loses_nothing(
    tmp_path: Path, source: Path, whole: dict[str, bytes], number: signal.Signals
) -> None:
    def disturb(arguments: list[str]) -> None:
        with subprocess.Popen(
            [sys.executable, "-m", "prep", *arguments],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            journal = tmp_path / "out.partial" / "journal.json"
            while not journal.exists() and process.poll() is None:
                time.sleep(0.002)
            process.send_signal(number)
            _, stderr = process.communicate(timeout=60)
        assert process.returncode == 75
        assert stderr.count("\n") == 1 and "same command goes on" in stderr and "out.partial" in stderr

    assert_recovers(tmp_path, source, whole, disturb)


def test_a_killed_build_repeats_at_most_the_unit_in_hand(tmp_path: Path, source: Path) -> None:
    """Each start goes on where the journal stands: the units done before are not read again."""
    out = tmp_path / "out"
    arguments = tokenize_arguments(source, out, **SMALL)
    calls = calls_of_a_build(tmp_path, source)
    faulty("kill-before", calls // 2, *arguments)
    assert (tmp_path / "out.partial" / "journal.json").exists()
    again = prep(*arguments)
    assert "going on at" in again.stdout
    at = int(again.stdout.partition("going on at ")[2].partition(" tokens")[0].replace(",", ""))
    assert at > 0


def test_workers_do_not_outlive_a_killed_build(tmp_path: Path, source: Path) -> None:
    arguments = tokenize_arguments(source, tmp_path / "out", workers=3, **SMALL)
    with subprocess.Popen(
        [sys.executable, "-m", "prep", *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True
    ) as process:
        while not (tmp_path / "out.partial" / "journal.json").exists():
            time.sleep(0.005)
        process.kill()
    for _ in range(100):
        if not members(process.pid):
            return
        time.sleep(0.05)
    raise AssertionError(f"still there: {members(process.pid)}")


def members(session: int) -> list[int]:
    """The processes of a session that are not yet gone."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, owner = (path / "stat").read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(owner) == session and state != "Z":
            found.append(int(path.name))
    return found
