"""Files that must be downloaded whole: how far they are is shown, and a signal does not wait for them."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prep.downloads import Downloads
from tests.prep import hub_server
from tests.prep.builds import ROOT, SOURCE, tokenize_arguments, write_parquet
from tests.prep.hub_builds import NEWER, SMALL, environment
from tests.prep.hub_server import Fault, Hub, Repository, Request

LINE = re.compile(
    r"^fetching a file from the Hub: ([\d.]+)/([\d.]+) MB ([\d.]+)% · ([\d.]+) MB/s · (?:(\d+) s|\?) left$", re.M
)
# The real command, with a line at every occasion and a client that writes what it gets at once.
CODE = """if True:
    import sys
    from huggingface_hub import constants
    from shared import progress
    constants.DOWNLOAD_CHUNK_SIZE, progress.PLAIN_EVERY, sys.argv[0] = 1 << 14, 0.0, "prep"
    import prep.__main__
"""
PIECES, PAUSE = 200, 0.02
SIZE = PIECES << 14  # bytes, which come in 4 s


@pytest.fixture(params=["jsonl", "zst", "parquet"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One that is needed before the build, one that a unit needs, and one whose sha256 the Hub does not state."""
    if request.param == "parquet":
        monkeypatch.setattr(hub_server, "LFS_BYTES", 1 << 40)
    return str(request.param)


@pytest.fixture
def sources(hub: Hub, tmp_path: Path) -> Hub:
    """One large file of each kind; all come slowly."""
    import zstandard

    chance = random.Random(0)
    lines = (SOURCE / "prose.jsonl").read_bytes()
    noise = b"".join(b'{"text": "%s"}\n' % chance.randbytes(4000).hex().encode() for _ in range(SIZE // 8000))
    write_parquet(tmp_path / "a.parquet", [{"text": chance.randbytes(2000).hex()} for _ in range(SIZE // 2000)], 100)
    files = {
        "jsonl": {"a.jsonl": (lines + noise)[:SIZE].rpartition(b"\n")[0]},
        "zst": {"a.jsonl.zst": zstandard.compress(lines + noise + noise)},
        "parquet": {"a.parquet": (tmp_path / "a.parquet").read_bytes()},
    }
    for name, content in files.items():
        hub.repositories[f"O/{name}"] = Repository("datasets", {NEWER: content}, {"main": NEWER})
    hub.faults.append(lambda r: Fault(pause=PAUSE) if large(r) else None)
    return hub


def large(request: Request) -> bool:
    return request.method == "GET" and "a." in (request.name or "")


def command(hub: Hub, kind: str, folder: Path) -> subprocess.Popen[str]:
    options = {**SMALL, "train_sequences": 100, "order": "listed"}
    arguments = tokenize_arguments(f"hf://O/{kind}", folder / "out", **options)
    return subprocess.Popen(
        [sys.executable, "-c", CODE, *arguments],
        cwd=ROOT,
        env=environment(hub, folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_how_far_a_download_is_shows_in_true_numbers(kind: str, sources: Hub, tmp_path: Path) -> None:
    (content,) = sources.repositories[f"O/{kind}"].commits[NEWER].values()
    with command(sources, kind, tmp_path) as process:
        stdout, stderr = process.communicate(timeout=100)
    assert (process.returncode, stderr) == (0, "")
    seen = [tuple(float(x or "nan") for x in found) for found in LINE.findall(stdout)]
    assert len(seen) >= 8, stdout
    speed = len(content) / 1e6 / (len(content) / (1 << 14) * PAUSE)
    for done, total, percent, rate, left in seen:
        assert total == round(len(content) / 1e6, 1)
        assert percent == pytest.approx(100 * done / total, abs=4)
        if percent > 30:
            assert 0.3 * speed < rate < 1.1 * speed
            assert left == pytest.approx((total - done) / rate, abs=1.5)
    shares = [percent for _, _, percent, _, _ in seen]
    assert shares == sorted(shares) and shares[0] < 30 and shares[-1] > 70


def test_a_signal_ends_a_download_at_once_and_the_same_command_goes_on(kind: str, sources: Hub, tmp_path: Path) -> None:
    with command(sources, kind, tmp_path) as process:
        assert process.stdout is not None
        while not LINE.search(line := process.stdout.readline()):
            assert line, process.communicate()
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
    assert time.monotonic() - began < 2
    assert process.returncode == 75 and stderr.count("\n") == 1 and "same command goes on" in stderr, stderr
    sources.faults.clear()
    with command(sources, kind, tmp_path) as process:
        assert process.communicate(timeout=100)[1] == "" and process.returncode == 0


def test_what_others_left_in_the_cache_is_not_counted(tmp_path: Path) -> None:
    now = 0.0
    downloads = Downloads(tmp_path, lambda: now)
    (tmp_path / "killed.1.incomplete").write_bytes(bytes(5_000_000))
    assert downloads.line() == ""
    with downloads.of(10_000_000):
        now = 2.0
        assert downloads.line() == "fetching a file from the Hub: 0.0/10.0 MB 0.0% · 0.0 MB/s · ? left"
        (tmp_path / "ours.2.incomplete").write_bytes(bytes(4_000_000))
        assert downloads.line() == "fetching a file from the Hub: 4.0/10.0 MB 40.0% · 2.0 MB/s · 3 s left"
        with downloads.of(30_000_000):
            os.truncate(tmp_path / "ours.2.incomplete", 34_000_000)  # a hole, which a client may leave for a while
            assert downloads.line() == "fetching 2 files from the Hub: 4.0/40.0 MB 10.0% · 2.0 MB/s · 18 s left"
        now = 4.0
        (tmp_path / "ours.2.incomplete").unlink()
        assert downloads.line() == "fetching a file from the Hub: 30.0/40.0 MB 75.0% · 7.5 MB/s · 1 s left"
    assert downloads.line() == ""
    with downloads.of(1_000_000):
        assert "0.0/1.0 MB" in downloads.line(), "what has come before is told no more"


def test_a_download_that_fails_is_not_counted_as_come(tmp_path: Path) -> None:
    downloads = Downloads(tmp_path, lambda: 1.0)
    with downloads.of(1_000_000):
        with pytest.raises(ValueError), downloads.of(2_000_000):
            raise ValueError
        assert "0.0/1.0 MB" in downloads.line()
