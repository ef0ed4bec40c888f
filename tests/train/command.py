"""The trainer's command line as tests use it: `train("run", ...)` is a process that ends with code, out and err."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent

# A model whose step takes milliseconds, and a schedule of 24 steps.
TINY = {
    "model.hidden": 16,
    "model.layers": 1,
    "model.heads": 2,
    "model.kv_heads": 1,
    "model.head_dim": 8,
    "model.ffn": 24,
    "batch.sequences": 4,
    "batch.micro": 2,
    "schedule.warmup_steps": 4,
    "schedule.middle_step": 12,
    "schedule.total_steps": 24,
    "checkpoint.every": 5,
    "checkpoint.keep_last": 100,
    "eval.every": 4,
    "sample.every": 8,
    "probe.every": 6,
}

Faults = Iterable[Sequence[object]]
KillAt = tuple[Path, int, float]  # so many seconds after this log has so many lines


@dataclass(frozen=True)
class Done:
    """How a command ended; a negative code is the signal that killed it."""

    code: int
    out: str
    err: str


def tiny(data: Path, run: Path, *args: object, settings: dict[str, object] | None = None) -> list[object]:
    """The arguments of `train run --preset tiny` with the settings TINY, and `settings` on top."""
    chosen = [f"--set={name}={value}" for name, value in {**TINY, **(settings or {})}.items()]
    return ["run", "--preset", "tiny", "--device", "cpu", "--data", data, "--run", run, *chosen, *args]


class Command:
    """Commands of one server process (server.py)."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.train.server"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._folder = tempfile.TemporaryDirectory()

    def __call__(self, *args: object, faults: Faults = (), kill_at: KillAt | None = None) -> Done:
        """Run `python -m train ARGS`; and SIGKILL it or put faults into it (server.FAULTS)."""
        return self.ranks([faults], *args, kill_at=kill_at)[0]

    def ranks(
        self, faults: Sequence[Faults], *args: object, kill_at: KillAt | None = None, seconds: float = 120
    ) -> list[Done]:
        """The same as several processes, each with its faults, as torchrun starts them; killed after so many seconds.

        What torchrun itself does when one of them ends it does not do.
        """
        assert self._server.stdin and self._server.stdout
        folder = Path(self._folder.name)
        request = {
            "args": [str(a) for a in args],
            "ranks": [[list(fault) for fault in each] for each in faults],
            "kill_at": [str(kill_at[0]), *kill_at[1:]] if kill_at else None,
            "seconds": seconds,
            "out": str(folder / "out"),
            "err": str(folder / "err"),
        }
        print(json.dumps(request), file=self._server.stdin, flush=True)
        codes = json.loads(self._server.stdout.readline())
        return [
            Done(code, (folder / f"out-{rank}").read_text(), (folder / f"err-{rank}").read_text())
            for rank, code in enumerate(codes)
        ]

    def run(
        self,
        data: Path,
        run: Path,
        *args: object,
        settings: dict[str, object] | None = None,
        faults: Faults = (),
        kill_at: KillAt | None = None,
    ) -> Done:
        """`train run --preset tiny` with the settings TINY, and `settings` on top."""
        return self(*tiny(data, run, *args, settings=settings), faults=faults, kill_at=kill_at)

    def close(self) -> None:
        assert self._server.stdin
        self._server.stdin.close()
        self._server.wait(30)
        self._folder.cleanup()
