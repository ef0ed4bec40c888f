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

KillAt = tuple[Path, int, float]  # so many seconds after this log has so many lines


@dataclass(frozen=True)
class Done:
    """How a command ended; a negative code is the signal that killed it."""

    code: int
    out: str
    err: str


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

    def __call__(self, *args: object, faults: Iterable[Sequence[object]] = (), kill_at: KillAt | None = None) -> Done:
        """Run `python -m train ARGS`; and SIGKILL it or put faults into it (server.FAULTS)."""
        assert self._server.stdin and self._server.stdout
        out, err = Path(self._folder.name) / "out", Path(self._folder.name) / "err"
        request = {
            "args": [str(a) for a in args],
            "faults": [list(fault) for fault in faults],
            "kill_at": [str(kill_at[0]), *kill_at[1:]] if kill_at else None,
            "out": str(out),
            "err": str(err),
        }
        print(json.dumps(request), file=self._server.stdin, flush=True)
        code = json.loads(self._server.stdout.readline())
        return Done(code, out.read_text(), err.read_text())

    def run(
        self,
        data: Path,
        run: Path,
        *args: object,
        settings: dict[str, object] | None = None,
        faults: Iterable[Sequence[object]] = (),
        kill_at: KillAt | None = None,
    ) -> Done:
        """`train run --preset tiny` with the settings TINY, and `settings` on top."""
        chosen = [f"--set={name}={value}" for name, value in {**TINY, **(settings or {})}.items()]
        command = ["run", "--preset", "tiny", "--device", "cpu", "--data", data, "--run", run, *chosen, *args]
        return self(*command, faults=faults, kill_at=kill_at)

    def close(self) -> None:
        assert self._server.stdin
        self._server.stdin.close()
        self._server.wait(30)
        self._folder.cleanup()
