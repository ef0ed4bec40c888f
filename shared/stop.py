"""How a command ends: exit codes, signals, and one line on stderr for whatever went wrong."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import click

DONE = 0
FAILED = 1  # a check failed or the work could not be done
USAGE = 2
ANOMALIES = 3  # training stopped on non-finite losses
INTERRUPTED = 75  # EX_TEMPFAIL: the same command resumes


class Interrupted(Exception):
    """The work stopped at a signal with nothing lost. The message says how to go on."""


class Stop:
    """SIGTERM and SIGINT as a flag that a loop looks at between two units of work. A second signal exits at once.

    Not under torchrun: where a scheduler signals all processes of a job, torchrun passes the same on to its own, who
    have it twice then. It kills after a while (--shutdown-timeout) whoever goes on.
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def check(self, message: str) -> None:
        """Raise Interrupted with `message` if a signal has come."""
        if self:
            raise Interrupted(message)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and "TORCHELASTIC_RUN_ID" not in os.environ:
            os._exit(INTERRUPTED)
        self.signal = number

    @contextmanager
    def listening(self) -> Iterator["Stop"]:
        """Listen for the length of the block, then put the former handlers back."""
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def one_line(text: object) -> str:
    return " ".join(str(text).split())


def run_cli(command: click.Command, name: str) -> NoReturn:
    """Run a click command as the program `name`, turn every failure of the user's into one line, and exit.

    ValueError and OSError are what our code raises for bad input and bad disks; anything else is a fault of ours and
    keeps its traceback.
    """
    try:
        with command.make_context(name, sys.argv[1:]) as context:
            result = command.invoke(context)
        code = result if isinstance(result, int) else DONE
        sys.stdout.flush()
    except click.exceptions.Exit as done:
        code = done.exit_code
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else name
        code = _say(f"{error.format_message()} (see {path} --help)", USAGE)
    except click.ClickException as error:
        code = _say(error.format_message(), FAILED)
    except Interrupted as error:
        code = _say(error, INTERRUPTED)
    except (KeyboardInterrupt, click.Abort):
        code = _say("interrupted; the same command goes on where it stopped", INTERRUPTED)
    except BrokenPipeError:  # the reader of our stdout left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = FAILED
    except (ValueError, OSError, MemoryError) as error:
        code = _say(error, FAILED)
    sys.exit(code)


def _say(message: object, code: int) -> int:
    text = one_line(message) or type(message).__name__
    sys.stdout.flush()
    print(text if code == INTERRUPTED else f"error: {text}", file=sys.stderr, flush=True)
    return code
