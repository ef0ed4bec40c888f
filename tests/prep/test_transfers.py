"""Waiting and trying again, with a clock that only these tests move, and giving up with nothing lost."""

import email.utils
import subprocess
import sys
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest

from prep.transfers import MAX_WAITS, PAUSES, Transfers, asked_pause
from shared.stop import Interrupted, Stop
from tests.prep.builds import ROOT, bytes_of, one_line_error, tokenize_arguments
from tests.prep.hub_builds import ON_MAIN, SMALL, environment, hub_of, hub_tokenize, write_files
from tests.prep.hub_server import Fault, Hub, Repository, once, serving

CONTENT = bytes(range(256)) * 40
URL = "/datasets/O/N/resolve/main/a.bin"


class Clock:
    """Time passes only while someone sleeps."""

    def __init__(self) -> None:
        self.now, self.slept = 0.0, 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += seconds


class Rig:
    def __init__(self, hub: Hub) -> None:
        self.hub, self.clock, self.stop, self.said = hub, Clock(), Stop(), list[str]()
        self.transfers = Transfers(self.stop, self.said.append, "INSTEAD", self.clock.sleep, lambda: self.clock.now)

    def read(self, first: int = 0, stop: int = len(CONTENT), size: int = len(CONTENT)) -> bytes:
        sink = BytesIO()
        self.transfers.read("WHAT", self.hub.endpoint + URL, {}, first, stop, sink, size, "")
        return sink.getvalue()


@pytest.fixture
def rig() -> Iterator[Rig]:
    repository = Repository("datasets", {"main": {"a.bin": CONTENT[:4000]}})
    repository.commits["main"] = {"a.bin": CONTENT[:4000]}
    with serving(Hub({"O/N": repository})) as hub:
        yield Rig(hub)


def test_pauses_grow_and_then_it_gives_up_in_one_line(rig: Rig) -> None:
    rig.hub.faults.append(lambda r: Fault(503))
    with pytest.raises(ValueError, match=r"WHAT: 503 .*gave up after 9 tries; nothing is lost: the same command"):
        rig.read(0, 4000, 4000)
    assert rig.clock.slept == pytest.approx(sum(PAUSES)) and len(rig.hub.requests) == len(PAUSES) + 1
    assert list(PAUSES) == sorted(PAUSES)


def test_a_try_that_brings_something_starts_the_pauses_anew(rig: Rig) -> None:
    rig.hub.faults.append(once(Fault(cut=100), lambda r: True, times=30))
    assert rig.read(0, 4000, 4000) == CONTENT[:4000]
    assert rig.clock.slept == pytest.approx(30 * PAUSES[0])
    assert [r.range for r in rig.hub.requests] == [(100 * i, 4000) for i in range(31)]


def test_a_rate_limit_is_waited_out_as_told_by_all_and_said_once(rig: Rig) -> None:
    rig.hub.faults.append(once(Fault(429, {"Retry-After": "70"}), lambda r: True))
    assert rig.read(10, 20, 4000) == CONTENT[10:20]
    assert rig.clock.slept == pytest.approx(70)
    assert rig.said == ["the Hub's rate limit (429): waiting 1 min 10 s as it asks"]
    rig.hub.faults.append(once(Fault(429, {"RateLimit": '"resolvers";r=0;t=31'}), lambda r: True))
    rig.read(10, 20, 4000)
    assert rig.clock.slept == pytest.approx(101)


def test_a_rate_limit_without_a_time_is_like_any_failure(rig: Rig) -> None:
    rig.hub.faults.append(once(Fault(429), lambda r: True, times=3))
    rig.read(0, 10, 4000)
    assert rig.clock.slept == pytest.approx(sum(PAUSES[:3]))


def test_endless_rate_limits_end(rig: Rig) -> None:
    rig.hub.faults.append(lambda r: Fault(429, {"Retry-After": "1"}))
    with pytest.raises(ValueError, match=r"WHAT: 429 .*gave up"):
        rig.read(0, 10, 4000)
    assert rig.clock.slept == pytest.approx(MAX_WAITS + sum(PAUSES))


def test_nobody_there_is_tried_again_and_then_told(rig: Rig) -> None:
    rig.hub.port = 9  # the discard service, which is not there
    with pytest.raises(ValueError, match=r"WHAT: .*[Rr]efused.*gave up"):
        rig.read()
    assert rig.clock.slept == pytest.approx(sum(PAUSES))


@pytest.mark.parametrize(("status", "words"), [(401, "HF_TOKEN"), (403, "HF_TOKEN"), (404, "no such"), (410, "410")])
def test_what_waiting_cannot_mend_ends_at_once(rig: Rig, status: int, words: str) -> None:
    rig.hub.faults.append(lambda r: Fault(status))
    with pytest.raises(ValueError, match=words):
        rig.read(0, 10, 4000)
    assert rig.clock.slept == 0 and len(rig.hub.requests) == 1


def test_a_stop_ends_a_pause(rig: Rig) -> None:
    rig.hub.faults.append(lambda r: Fault(429, {"Retry-After": "500"}))
    sleep = rig.clock.sleep

    def stop_after_a_while(seconds: float) -> None:
        sleep(seconds)
        if rig.clock.now > 5:
            rig.stop.signal = 15

    rig.transfers = Transfers(rig.stop, rig.said.append, "", stop_after_a_while, lambda: rig.clock.now)
    with pytest.raises(Interrupted):
        rig.read(0, 10, 4000)
    assert 5 < rig.clock.now < 6


def test_retry_after_may_be_a_date() -> None:
    date = email.utils.formatdate(time.time() + 90, usegmt=True)
    assert asked_pause({"Retry-After": date}) == pytest.approx(90, abs=2)
    assert asked_pause({"Retry-After": "0"}) == 1 and asked_pause({}) is None
    assert asked_pause({"Retry-After": "7", "RateLimit": '"api";r=0;t=55'}) == 7


@pytest.mark.parametrize("fault", [Fault(503), Fault(cut=0)])
def test_a_build_that_gives_up_goes_on_later(tmp_path: Path, fault: Fault) -> None:
    """The pauses are made short; the command is the real one."""
    write_files(tmp_path / "files")
    code = "import prep.transfers as t, sys; t.PAUSES = (0.01,) * 3; sys.argv[0] = 'prep'; import prep.__main__"
    with serving(hub_of(tmp_path / "files")) as hub:
        assert hub_tokenize(hub, tmp_path / "whole").returncode == 0
        spans = [r for r in hub.requests if r.storage and r.range and r.range[1] - r.range[0] > 9000]
        third = spans[2]
        hub.faults.append(lambda r: fault if r == third else None)
        arguments = tokenize_arguments(ON_MAIN, tmp_path / "out", **{**SMALL, "workers": 1})
        command = [sys.executable, "-c", code, *arguments]
        env = environment(hub, tmp_path)
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
        line = one_line_error(done, 1)
        assert "gave up after 4 tries; nothing is lost: the same command goes on" in line
        hub.faults.clear()
        again = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
        assert again.returncode == 0 and "going on at" in again.stdout, again.stderr
        whole, out = bytes_of(tmp_path / "whole"), bytes_of(tmp_path / "out")
    assert {name for name in whole if whole[name] != out[name]} == set(), "the default names the commit that main is at"
