"""Makes one step of a build fail: `python tests/prep/faults.py ACTION N -- ARGUMENTS` runs `prep ARGUMENTS`.

The N-th call (from 1) of the parent that changes or flushes the disk is the victim. ACTION: `kill-before` and
`kill-after` end the process by SIGKILL there; `full` raises ENOSPC; `short` writes one byte, then raises ENOSPC;
`count` does nothing and prints how many calls there were. The real code runs; only os and pathlib are wrapped.
"""

import errno
import os
import signal
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

CALLS = ("write", "fsync", "truncate", "unlink", "mkdir")
PATH_CALLS = ("replace", "rename", "unlink", "mkdir", "rmdir")


class Faults:
    def __init__(self, action: str, victim: int) -> None:
        self.action, self.victim, self.count, self.parent = action, victim, 0, os.getpid()

    def wrap(self, real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            if os.getpid() != self.parent or (name == "write" and not stat.S_ISREG(os.fstat(arguments[0]).st_mode)):
                return real(*arguments, **options)  # a worker, or a pipe
            self.count += 1
            if self.count != self.victim:
                return real(*arguments, **options)
            if self.action == "kill-before":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.action == "full" or (self.action == "short" and name != "write"):
                raise OSError(errno.ENOSPC, "No space left on device", name)
            if self.action == "short":
                real(arguments[0], bytes(arguments[1][:1]))
                raise OSError(errno.ENOSPC, "No space left on device", name)
            result = real(*arguments, **options)
            if self.action == "kill-after":
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    def install(self) -> None:
        for name in CALLS:
            setattr(os, name, self.wrap(getattr(os, name), name))
        for name in PATH_CALLS:
            setattr(Path, name, self.wrap(getattr(Path, name), name))


def main() -> None:
    action, victim, dashes, *arguments = sys.argv[1:]
    assert dashes == "--"
    faults = Faults(action, int(victim))
    from prep.cli import main as command
    from shared.stop import run_cli

    sys.argv = ["prep", *arguments]
    faults.install()
    try:
        run_cli(command, "prep")
    finally:
        if action == "count":
            print(f"calls: {faults.count}")


if __name__ == "__main__":
    main()
