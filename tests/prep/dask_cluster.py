"""A real Dask scheduler and worker processes on loopback, and builds on them: `python tests/prep/dask_cluster.py`.

Run as a program it is `prep` with the times of prep.cluster as its first argument says, and a progress line at every
occasion: `dask_cluster.py '{"PATIENCE": 2}' ARGUMENTS`.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
START = 120  # seconds that a process may take to start; the machine may be busy
LINE = re.compile(r"([\d.]+)% .* (\d+) workers, (\d+) in flight, (\d+) waiting to be written")


class Seen(NamedTuple):
    """What a progress line says."""

    percent: float
    workers: int
    in_flight: int
    waiting: int


class Dask:
    """A scheduler and its workers, whose logs and scratch space lie in `folder`. `variables` are of the environment."""

    def __init__(self, folder: Path, **variables: str) -> None:
        self._folder = folder
        self._environment = {**os.environ, "DASK_DISTRIBUTED__WORKER__MEMORY__TERMINATE": "False", **variables}
        self._processes: list[subprocess.Popen[bytes]] = []
        self._start_scheduler("0")

    def _start_scheduler(self, port: str) -> None:
        self.scheduler = self._start("scheduler", ROOT, "--port", port)
        self._address = self._wait(self.scheduler, r"Scheduler at: +tcp://(\S+)")

    def restart_scheduler(self) -> None:
        """Kill it, and start another one at its address, which knows of nothing."""
        self.scheduler.kill()
        self.scheduler.wait()
        self._start_scheduler(self._address.rpartition(":")[2])

    @property
    def spec(self) -> str:
        return f"dask://{self._address}"

    def start_workers(self, count: int, code: Path = ROOT) -> list[subprocess.Popen[bytes]]:
        """Processes that run prep of the folder `code`, once they are known to the scheduler."""
        options = ["--no-nanny", "--nthreads", "1", "--local-directory", str(self._folder)]
        workers = [self._start("worker", code, f"tcp://{self._address}", *options) for _ in range(count)]
        for worker in workers:
            self._wait(worker, "(Starting established connection)")
        return workers

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def _start(self, kind: str, code: Path, *options: str) -> subprocess.Popen[bytes]:
        log = (self._folder / f"{len(self._processes)}.log").open("wb")
        command = [sys.executable, "-m", "dask", kind, "--host", "127.0.0.1", "--no-dashboard", *options]
        self._processes.append(subprocess.Popen(command, cwd=code, env=self._environment, stdout=log, stderr=log))
        return self._processes[-1]

    def _wait(self, process: subprocess.Popen[bytes], pattern: str) -> str:
        log = self._folder / f"{self._processes.index(process)}.log"
        until = time.monotonic() + START
        while not (found := re.search(pattern, log.read_text())):
            assert process.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.05)
        return found[1]


class Build:
    """`prep` under way, with `lines` of its stdout so far."""

    def __init__(self, arguments: list[str], times: dict[str, float], **options: Any) -> None:
        command = [sys.executable, __file__, json.dumps(times), *arguments]
        options.setdefault("env", os.environ)
        options["env"] = {**options["env"], "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
        )
        self.lines: list[str] = []

    def seen(self) -> list[Seen]:
        """What the progress lines said so far."""
        found = [LINE.search(line) for line in self.lines]
        return [Seen(float(m[1]), *map(int, m.groups()[1:])) for m in found if m]

    def read_until(self, happened: Callable[[list[Seen]], bool]) -> None:
        """Read on until `happened(seen)`. AssertionError when the build ends first."""
        assert self.process.stdout
        while not happened(self.seen()):
            line = self.process.stdout.readline()
            assert line, (self.lines, self.process.communicate())
            self.lines.append(line)

    def read_until_stuck(self) -> None:
        """Nothing comes any more: 5 lines, which is a second, say the same of steps in flight."""
        self.read_until(lambda seen: len(seen) >= 5 and len(set(seen[-5:])) == 1 and seen[-1].in_flight > 0)

    def finish(self) -> subprocess.CompletedProcess[str]:
        stdout, stderr = self.process.communicate(timeout=START)
        self.lines += stdout.splitlines()
        return subprocess.CompletedProcess(self.process.args, self.process.returncode, "\n".join(self.lines), stderr)


@contextmanager
def building(arguments: list[str], times: dict[str, float], **options: Any) -> Iterator[Build]:
    build = Build(arguments, times, **options)
    try:
        yield build
    finally:
        build.process.kill()
        build.process.wait()


def main() -> None:
    from prep import cluster
    from prep.cli import main as command
    from shared import progress
    from shared.stop import run_cli

    for name, value in json.loads(sys.argv[1]).items():
        assert hasattr(cluster, name)
        setattr(cluster, name, value)
    progress.PLAIN_EVERY = 0.0
    sys.argv = ["prep", *sys.argv[2:]]
    run_cli(command, "prep")


if __name__ == "__main__":
    main()
