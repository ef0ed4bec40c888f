"""Tokenising on a Dask cluster: the bytes of a local build, whatever happens to workers and scheduler."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from prep.sources import LocalSource
from shared.manifest import load_build
from tests.prep.builds import (
    ROOT,
    built,
    bytes_of,
    golden_rows,
    one_line_error,
    prep,
    tokenize_arguments,
    write_parquet,
)
from tests.prep.dask_cluster import Dask, building
from tests.prep.hub_builds import SMALL as HUB_SMALL
from tests.prep.hub_builds import environment, hub_of, write_files
from tests.prep.hub_server import serving

pytest.importorskip("distributed", reason="needs the extra cluster: pip install '.[cluster]'")

SMALL = {"train_sequences": 240, "val_sequences": 6, "shard_tokens": 4000}
PATIENT = {"PATIENCE": 1e9}  # so that what goes on does so by Dask's own means
HASTY = {"PATIENCE": 1.0, "TIMES_THE_SLOWEST": 0.0, "TIMEOUT": 5.0, "LOOK": 0.2}
Worker = subprocess.Popen[bytes]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    write_parquet(folder / "a.parquet", golden_rows(), 3)
    return folder


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The data set as a local build makes it."""
    return bytes_of(built(source, tmp_path_factory.mktemp("whole") / "out", **SMALL))


@pytest.fixture(scope="module")
def dask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dask]:
    cluster = Dask(tmp_path_factory.mktemp("dask"))
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def pair(dask: Dask) -> list[Worker]:
    """Its two workers."""
    return dask.start_workers(2)


def arguments_on(dask: Dask, source: object, out: Path, **options: object) -> list[str]:
    """Of `prep tokenize` with all the workers that there are."""
    words = tokenize_arguments(source, out, **{**SMALL, **options})
    at = words.index("--workers")
    return [*words[:at], *words[at + 2 :], "--executor", dask.spec]


@contextmanager
def stopped(workers: list[Worker]) -> Iterator[None]:
    for worker in workers:
        worker.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(signal.SIGCONT)


def test_a_cluster_makes_the_bytes_of_a_local_build(
    tmp_path: Path, dask: Dask, pair: list[Worker], source: Path, whole: dict[str, bytes]
) -> None:
    with building(arguments_on(dask, source, tmp_path / "out"), PATIENT) as build:
        done = build.finish()
    assert (done.returncode, done.stderr) == (0, "")
    assert bytes_of(tmp_path / "out") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    record = load_build(tmp_path / "out")
    assert (record["executor"], record["workers"]) == (dask.spec, 2)


def test_what_a_stalled_worker_keeps_is_done_by_another_and_no_more_than_two_steps_a_worker_are_under_way(
    tmp_path: Path, dask: Dask, pair: list[Worker], source: Path, whole: dict[str, bytes]
) -> None:
    with stopped(pair[1:]), building(arguments_on(dask, source, tmp_path / "out"), HASTY) as build:
        done = build.finish()
    assert (done.returncode, done.stderr) == (0, "")
    assert bytes_of(tmp_path / "out") == whole
    assert max(seen.in_flight + seen.waiting for seen in build.seen()) == 4
    assert any(seen.in_flight and seen.waiting for seen in build.seen())


def test_what_a_killed_worker_had_is_done_by_the_others(
    tmp_path: Path, dask: Dask, pair: list[Worker], source: Path, whole: dict[str, bytes]
) -> None:
    victims = dask.start_workers(1)
    with stopped(victims), building(arguments_on(dask, source, tmp_path / "out"), PATIENT) as build:
        build.read_until_stuck()
        assert build.seen()[-1].workers == 3
        victims[0].kill()
        done = build.finish()
    assert (done.returncode, done.stderr) == (0, "")
    assert bytes_of(tmp_path / "out") == whole


def test_a_signal_leaves_the_cluster_idle_and_the_same_command_goes_on(
    tmp_path: Path, dask: Dask, pair: list[Worker], source: Path, whole: dict[str, bytes]
) -> None:
    arguments = arguments_on(dask, source, tmp_path / "out")
    with stopped(pair), building(arguments, PATIENT) as build:
        build.read_until_stuck()
        build.process.send_signal(signal.SIGTERM)
        done = build.finish()
        assert "same command goes on" in done.stderr and done.stderr.count("\n") == 1
        assert done.returncode == 75
        assert tasks_on(dask) == 0
    with building(arguments, PATIENT) as build:
        assert build.finish().returncode == 0
    assert bytes_of(tmp_path / "out") == whole


def tasks_on(dask: Dask) -> int:
    """Tasks that the scheduler knows of."""
    ask = (
        "import sys; from distributed import Client; c = Client(sys.argv[1], set_as_default=False); "
        "print(c.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks)))"
    )
    address = dask.spec.replace("dask", "tcp")
    done = subprocess.run([sys.executable, "-c", ask, address], capture_output=True, text=True, timeout=120)
    return int(done.stdout)


def test_a_worker_with_other_code_is_refused_by_name(
    tmp_path: Path, dask: Dask, pair: list[Worker], source: Path
) -> None:
    code = tmp_path / "code"
    for name in ("prep", "shared"):
        shutil.copytree(ROOT / name, code / name, ignore=shutil.ignore_patterns("__pycache__"))
    with (code / "prep" / "encoder.py").open("a") as file:
        file.write("# another version\n")
    others = dask.start_workers(1, code)
    # Steps that Dask has given to the stopped workers go to the other one after a while.
    hurried = {"PATIENCE": 1.0, "TIMES_THE_SLOWEST": 0.0}
    with stopped(pair), building(arguments_on(dask, source, tmp_path / "out"), hurried) as build:
        line = one_line_error(build.finish(), 1)
    others[0].kill()
    assert "Dask worker tcp://127.0.0.1:" in line and "another prep's code" in line and "same commit" in line


def test_a_hanging_or_dead_scheduler_ends_in_one_line_and_a_local_build_goes_on(
    tmp_path: Path, source: Path, whole: dict[str, bytes]
) -> None:
    (tmp_path / "dask").mkdir()
    dask = Dask(tmp_path / "dask")
    arguments = arguments_on(dask, source, tmp_path / "out")
    try:
        with building(arguments, HASTY) as build:
            assert "the scheduler has no workers" in one_line_error(build.finish(), 1)
        workers = dask.start_workers(1)
        with building([*arguments, "--workers", "3"], HASTY) as build:
            build.read_until(lambda seen: bool(seen) and seen[-1].percent > 0)
            with stopped([*workers, dask.scheduler]):
                line = one_line_error(build.finish(), 1)
                assert "the Dask scheduler has not answered for 5 s; the same command goes on" in line
        with stopped(workers), building(arguments, HASTY) as build:
            build.read_until_stuck()
            dask.scheduler.kill()
            line = one_line_error(build.finish(), 1)
    finally:
        dask.close()
    assert "the Dask scheduler is gone; the same command goes on" in line
    assert "going on at" in prep(*tokenize_arguments(source, tmp_path / "out", **SMALL)).stdout
    assert bytes_of(tmp_path / "out") == whole


def test_a_scheduler_that_restarts_is_asked_again(tmp_path: Path, source: Path, whole: dict[str, bytes]) -> None:
    (tmp_path / "dask").mkdir()
    dask = Dask(tmp_path / "dask")
    try:
        workers = dask.start_workers(1)
        with building(arguments_on(dask, source, tmp_path / "out"), {**PATIENT, "TIMEOUT": 120.0}) as build:
            build.read_until(lambda seen: bool(seen) and seen[-1].percent > 0)
            with stopped(workers):
                dask.restart_scheduler()
                workers[0].kill()
            dask.start_workers(1)
            done = build.finish()
    finally:
        dask.close()
    assert (done.returncode, done.stderr) == (0, "")
    assert bytes_of(tmp_path / "out") == whole


def test_a_step_whose_workers_die_again_and_again_is_given_up(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prep import cluster

    dask = Dask(tmp_path, DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES="0")
    monkeypatch.setattr(cluster, "MAX_DEATHS", 2)
    monkeypatch.setattr(cluster, "LOOK", 0.2)
    try:
        workers = dask.start_workers(2)
        with cluster.connect(dask.spec, 0, partial(idle_worker, LocalSource(source, []))) as executor:  # type: ignore[arg-type]
            with pytest.raises(ValueError, match=r"died, the last at tcp.*out of memory"):
                executor.submit(os._exit, 1).result(timeout=60)
            assert all(worker.wait(timeout=60) == 1 for worker in workers)
    finally:
        dask.close()


def test_a_step_that_dask_has_forgotten_is_asked_for_again(
    dask: Dask, pair: list[Worker], source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As happens when it is sent while the connection to the scheduler breaks."""
    from prep import cluster

    monkeypatch.setattr(cluster, "LOOK", 0.2)
    with cluster.connect(dask.spec, 0, partial(idle_worker, LocalSource(source, []))) as executor:  # type: ignore[arg-type]
        with stopped(pair):
            answer = executor.submit(os.getpid)
            executor._client.futures.clear()
        assert answer.result(timeout=30) in [worker.pid for worker in pair]


def idle_worker(source: LocalSource) -> None:
    """In place of a prep.worker.Worker, where none is needed."""


def test_a_source_on_the_hub_is_fetched_once_by_the_parent(tmp_path: Path, dask: Dask, pair: list[Worker]) -> None:
    write_files(tmp_path / "files", files=2, copies=1)
    options = {**HUB_SMALL, "train_sequences": 300}
    with serving(hub_of(tmp_path / "files")) as hub:
        hf = "hf://HuggingFaceFW/fineweb-edu@87f09149ef4734204d70ed1d046ddc9ca3f2b8f9?config=sample-10BT"
        variables = environment(hub, tmp_path)
        local = tokenize_arguments(hf, tmp_path / "local", **{**SMALL, **options})
        assert prep(*local, env=variables).returncode == 0
        with building(arguments_on(dask, hf, tmp_path / "out", **options), PATIENT, env=variables) as build:
            done = build.finish()
    assert (done.returncode, done.stderr) == (0, "")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "local")
    assert not list(tmp_path.glob("out.*"))


def test_a_worker_that_does_not_see_the_source_says_so(tmp_path: Path) -> None:
    from prep.cluster_worker import pack, perform

    setup = pack(partial(idle_worker, LocalSource(tmp_path / "elsewhere", [])))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"elsewhere: Dask worker \S+ does not see this folder; .* same path"):
        perform(setup, os.getpid, ())


def test_an_address_where_nobody_answers_gets_one_line(tmp_path: Path, source: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        spec = f"dask://127.0.0.1:{unused.getsockname()[1]}"
        arguments = [*tokenize_arguments(source, tmp_path / "out", **SMALL), "--executor", spec]
        with building(arguments, {"TIMEOUT": 1.0}) as build:
            line = one_line_error(build.finish(), 1)
    assert f"{spec}: no Dask scheduler answers there" in line and "dask scheduler" in line


def test_what_is_no_address_is_a_usage_error(tmp_path: Path, source: Path) -> None:
    done = prep(*tokenize_arguments(source, tmp_path / "out"), "--executor", "10.0.0.1:8786")
    assert "expected dask://HOST[:PORT]" in one_line_error(done, 2)


def test_without_the_extra_the_option_says_what_to_install(tmp_path: Path, source: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['distributed'] = None\n")
    arguments = [*tokenize_arguments(source, tmp_path / "out"), "--executor", "dask://127.0.0.1"]
    done = prep(*arguments, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert "pip install '.[cluster]'" in one_line_error(done, 1)
