"""What cannot be read from the Hub is told in one line, and a signal ends a wait for it."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.prep.builds import ROOT, one_line_error, tokenize_arguments
from tests.prep.hub_builds import COMMIT, FINEWEB, ON_MAIN, SMALL, environment, hub_tokenize, spans
from tests.prep.hub_server import Fault, Hub, Request


def test_no_access_gets_one_line_that_names_the_token_and_a_way_around(tmp_path: Path, hub: Hub) -> None:
    hub.repositories[FINEWEB].needs_token = "hf_right"
    for token, status in (("", 401), ("hf_wrong", 403)):
        variables = {"HF_TOKEN": token} if token else {}
        env = environment(hub, tmp_path, **variables)
        line = one_line_error(hub_tokenize(hub, tmp_path / "out", env=env), 1)
        assert str(status) in line and "HF_TOKEN" in line and "--source" in line and FINEWEB in line
    env = environment(hub, tmp_path, HF_TOKEN="hf_right")
    assert hub_tokenize(hub, tmp_path / "out", env=env).returncode == 0, "and with the token it is read"
    hub.repositories["O/tokenizer"].needs_token = "hf_right"
    env = environment(hub, tmp_path / "other")
    line = one_line_error(hub_tokenize(hub, tmp_path / "out2", env=env), 1)
    assert "HF_TOKEN" in line and "--tokenizer FILE.model" in line


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("hf://HuggingFaceFW", "hf://OWNER/NAME"),
        ("hf://O/absent", "404"),
        (f"hf://{FINEWEB}@nobranch?config=sample-10BT", "404"),
        (f"hf://{FINEWEB}?config=sample-1T", "no config 'sample-1T'; add ?config=NAME"),
        (f"hf://{FINEWEB}@{'d' * 40}?config=sample-10BT", "404"),
    ],
)
def test_a_wrong_name_gets_one_line(tmp_path: Path, hub: Hub, source: str, expected: str) -> None:
    line = one_line_error(hub_tokenize(hub, tmp_path / "out", source=source), 1)
    assert expected in line and source.partition("?")[0] in line
    assert not (tmp_path / "out.partial").exists()


def test_a_broken_parquet_file_at_the_hub_is_named(tmp_path: Path, hub: Hub) -> None:
    content = hub.repositories[FINEWEB].commits[COMMIT]
    name = "sample/10BT/000_00000.parquet"
    good = content[name]
    content[name] = good[:-4] + b"nope"
    line = one_line_error(hub_tokenize(hub, tmp_path / "out"), 1)
    assert name in line and "not a readable parquet file" in line
    content[name] = good[:4000] + bytes(140_000) + good[144_000:]
    line = one_line_error(hub_tokenize(hub, tmp_path / "out", "--restart"), 1)
    assert name in line and "damaged near row" in line


@pytest.mark.parametrize("least", [1000, 9000], ids=["footer", "unit"])
def test_a_signal_ends_a_wait_for_the_hub_at_once(least: int, tmp_path: Path, hub: Hub) -> None:
    def large(request: Request) -> bool:
        return spans(request) and request.range is not None and request.range[1] - request.range[0] > least

    hub.faults.append(lambda r: Fault(429, {"Retry-After": "500"}) if large(r) else None)
    arguments = tokenize_arguments(ON_MAIN, tmp_path / "out", **SMALL)
    command = [sys.executable, "-m", "prep", *arguments]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(hub, tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        while "waiting 8 min 20 s" not in process.stdout.readline():
            assert process.poll() is None
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 75 and stderr.count("\n") == 1 and "same command goes on" in stderr
    assert time.monotonic() - began < 5
