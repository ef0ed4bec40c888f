"""repair makes whatever verify finds whole again, makes nothing else anew, and never makes anything worse."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from prep.verify import verify
from tests.prep.builds import (
    GOLDEN,
    ROOT,
    SOURCE,
    TOKENIZER,
    bytes_of,
    faulty,
    number_of_calls,
    one_line_error,
    prep,
    tokenize_arguments,
)
from tests.prep.hub_builds import environment, hub_of, hub_tokenize, spans, write_files
from tests.prep.hub_server import Fault, serving

TRAIN, VAL = "train/documents.parquet", "val/documents.parquet"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(SOURCE, folder / "source")
    shutil.copyfile(SOURCE / "prose.jsonl", folder / "source" / "again.jsonl")
    arguments = tokenize_arguments(
        folder / "source", folder / "data", train_sequences=700, seq_len=100, shard_tokens=25_000, unit_bytes=1
    )
    assert (done := prep(*arguments)).returncode == 0, done.stderr
    assert json.loads((folder / "data/manifest.json").read_text())["skipped"]["in_val"], "duplicates were met"
    return folder / "data"


@pytest.fixture
def data(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "data"))


def flip(path: Path, at: int = -200) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def swap_ids(path: Path) -> None:
    """A readable index that says something else."""
    table = pq.read_table(path).to_pydict()
    table["id"] = table["id"][::-1]
    pq.write_table(pq.read_table(path).from_pydict(table, schema=pq.read_schema(path)), path)


def link(path: Path) -> None:
    elsewhere = path.parent.parent.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a flipped byte in a shard": lambda d: flip(d / "train/00001.npy"),
    "a flipped byte in a header": lambda d: flip(d / "train/00000.npy", 20),
    "a shard cut off": lambda d: truncate(d / "train/00002.npy"),
    "a shard too long": lambda d: (d / "val/00000.npy").write_bytes((d / "val/00000.npy").read_bytes() + b"x"),
    "a shard missing": lambda d: (d / "train/00001.npy").unlink(),
    "a shard that is a link": lambda d: link(d / "train/00001.npy"),
    "all shards missing": lambda d: [path.unlink() for path in d.glob("*/*.npy")],
    "a flipped byte in an index": lambda d: flip(d / TRAIN, 100),
    "an index missing": lambda d: (d / VAL).unlink(),
    "an index that says something else": lambda d: swap_ids(d / TRAIN),
    "both indexes cut off": lambda d: [truncate(d / TRAIN), truncate(d / VAL)],
    "a flipped byte in the tokenizer": lambda d: flip(d / "tokenizer.model"),
    "the tokenizer missing": lambda d: (d / "tokenizer.model").unlink(),
    "a flipped byte in build.json": lambda d: flip(d / "build.json", 30),
    "build.json missing": lambda d: (d / "build.json").unlink(),
    "a surplus file": lambda d: (d / "train/notes.txt").write_text("mine"),
    "a shard and the index of its split": lambda d: [flip(d / "train/00001.npy"), flip(d / TRAIN, 100)],
    "a shard and the index of the other split": lambda d: [flip(d / "train/00001.npy"), (d / VAL).unlink()],
    "a split missing": lambda d: shutil.rmtree(d / "val"),
    "all but the manifest": lambda d: [path.unlink() for path in d.rglob("*.*") if path.name != "manifest.json"],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_repaired_to_the_same_bytes(damage: str, data: Path, whole: Path) -> None:
    DAMAGES[damage](data)
    bad = [problem.file for problem in verify(data).bad]
    assert bad
    before = {path: path.stat().st_ino for path in data.rglob("*") if path.is_file()}
    options = ["--source", whole.parent / "source", "--tokenizer", TOKENIZER] if "build.json" in bad else []
    done = prep("repair", data, *options)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert bytes_of(data) == bytes_of(whole) and verify(data, deep=5, source=str(whole.parent / "source")).ok
    for path, inode in before.items():
        if path.exists() and str(path.relative_to(data)) not in [*bad, "build.json"]:
            assert path.stat().st_ino == inode, f"{path} was good and is left alone"
    assert all(file in done.stdout for file in bad)
    beside = {path.name for path in data.parent.iterdir()} - {"elsewhere"}
    assert beside == ({"data", "data.surplus"} if "surplus" in damage else {"data"})
    if "surplus" in damage:
        assert (data.parent / "data.surplus/train/notes.txt").read_text() == "mine"


def test_nothing_is_done_to_a_whole_data_set(data: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    done = prep("repair", data)
    assert done.returncode == 0 and "nothing to repair" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*")} == before


def test_a_bad_manifest_is_refused(data: Path) -> None:
    flip(data / "manifest.json", 40)
    flip(data / "train/00001.npy")
    before = bytes_of(data)
    line = one_line_error(prep("repair", data), 1)
    assert "manifest.json" in line and "tokenize again" in line
    assert bytes_of(data) == before


@pytest.mark.parametrize("damage", ["a flipped byte in a shard", "an index missing", "a split missing"])
def test_another_source_replaces_nothing(damage: str, data: Path, whole: Path, tmp_path: Path) -> None:
    DAMAGES[damage](data)
    before = bytes_of(data)
    other = Path(shutil.copytree(whole.parent / "source", tmp_path / "other"))
    for file in other.iterdir():
        file.write_bytes(file.read_bytes().replace(b"the ", b"teh "))
    line = one_line_error(prep("repair", data, "--source", other), 1)
    assert "--source" in line and bytes_of(data) == before
    (other / "prose.jsonl").unlink()
    assert "--source" in one_line_error(prep("repair", data, "--source", other), 1)
    assert bytes_of(data) == before


def test_another_tokenizer_replaces_nothing(data: Path) -> None:
    flip(data / "tokenizer.model")
    before = bytes_of(data)
    line = one_line_error(prep("repair", data, "--tokenizer", GOLDEN / "unigram.model"), 1)
    assert "another tokenizer" in line and bytes_of(data) == before


@pytest.mark.parametrize("damage", ["an index missing", "both indexes cut off", "a flipped byte in the tokenizer"])
def test_nothing_is_encoded_where_all_shards_are_good(damage: str, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prep import repair
    from prep.encoder import Encoder
    from shared.stop import Stop

    def refuse(*arguments: object) -> None:
        raise AssertionError("encoded")

    monkeypatch.setattr(Encoder, "encode", refuse)
    DAMAGES[damage](data)
    assert repair.Repair(data, None, None, 1, Stop()).run()
    assert verify(data).ok


def test_a_repair_that_is_killed_anywhere_is_taken_up_again(data: Path, whole: Path, tmp_path: Path) -> None:
    for path in (data / "train/00001.npy", data / "tokenizer.model"):
        flip(path)
    (data / VAL).unlink()
    counted = Path(shutil.copytree(data, tmp_path / "counted"))
    calls = number_of_calls("repair", counted)
    assert bytes_of(counted) == bytes_of(whole) and calls > 12
    for victim in range(2, calls, 5):
        folder = Path(shutil.copytree(data, tmp_path / f"at-{victim}" / "data"))
        assert faulty("kill-before", victim, "repair", folder).returncode == -9
        done = prep("repair", folder)
        assert done.returncode == 0, done.stderr
        assert bytes_of(folder) == bytes_of(whole)


def test_a_rebuild_that_was_killed_goes_on(data: Path, whole: Path, tmp_path: Path) -> None:
    DAMAGES["a shard and the index of its split"](data)
    counted = Path(shutil.copytree(data, tmp_path / "counted" / "data"))
    calls = number_of_calls("repair", counted)
    assert faulty("kill-before", calls // 2, "repair", data).returncode == -signal.SIGKILL
    done = prep("repair", data)
    assert done.returncode == 0 and "data.repair.partial: going on at" in done.stdout, done.stderr
    assert bytes_of(data) == bytes_of(whole)
    assert {path.name for path in data.parent.iterdir()} == {"data", "counted"}


def test_what_another_rebuild_left_is_discarded(data: Path, whole: Path) -> None:
    arguments = tokenize_arguments(SOURCE, data.with_name("data.repair"), train_sequences=10**6)
    one_line_error(prep(*arguments), 1)
    assert data.with_name("data.repair.partial").exists()
    DAMAGES["a shard and the index of its split"](data)
    done = prep("repair", data)
    assert done.returncode == 0 and "going on" not in done.stdout, done.stderr
    assert bytes_of(data) == bytes_of(whole)


def test_a_signal_ends_a_wait_for_the_hub(tmp_path: Path) -> None:
    write_files(tmp_path / "files")
    with serving(hub_of(tmp_path / "files")) as hub:
        env = environment(hub, tmp_path)
        assert hub_tokenize(hub, tmp_path / "data", env=env).returncode == 0
        flip(tmp_path / "data" / "train/00002.npy")
        hub.faults.append(lambda r: Fault(429, {"Retry-After": "500"}) if spans(r) else None)
        command = [sys.executable, "-m", "prep", "repair", str(tmp_path / "data")]
        with subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            while "waiting 8 min 20 s" not in (line := process.stdout.readline()):
                assert line, process.communicate()
            process.send_signal(signal.SIGTERM)
            threading.Timer(10, process.kill).start()
            _, stderr = process.communicate()
    assert process.returncode == 75 and stderr.count("\n") == 1, stderr


def test_from_the_hub_only_what_the_shard_needs_is_fetched(tmp_path: Path) -> None:
    write_files(tmp_path / "files")
    with serving(hub_of(tmp_path / "files")) as hub:
        env = environment(hub, tmp_path)
        assert hub_tokenize(hub, tmp_path / "data", env=env, shard_tokens=1 << 14).returncode == 0
        before = bytes_of(tmp_path / "data")
        built = sum(hub.served.values())
        for file in ("train/00002.npy", "tokenizer.model"):
            flip(tmp_path / "data" / file)
        hub.served.clear()
        assert prep("repair", tmp_path / "data", env=env).returncode == 0
        assert bytes_of(tmp_path / "data") == before
        assert 0 < sum(hub.served.values()) < 0.7 * built
        (tmp_path / "data" / TRAIN).unlink()
        assert prep("repair", tmp_path / "data", env=env).returncode == 0
        assert bytes_of(tmp_path / "data") == before
    assert json.loads((tmp_path / "data" / "build.json").read_text())["source"].startswith("hf://")
