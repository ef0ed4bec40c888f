"""Tokenising on a Dask cluster: an executor whose processes are the workers of a scheduler (extra `cluster`).

The pipeline stays as it is: steps go out through distributed's concurrent.futures interface, and what they give comes
back to the parent, which alone writes, in the order of the plan. So the bytes are those of a local build. With each
step travels what a worker needs to do it (the tokenizer by its content, the names of the files, 0.3 MB in all), so that
any worker can take any step at any time; it is unpacked once. Workers see the source at the same path as the parent.

- A worker that dies: Dask has its steps done elsewhere, and after its own limit of such deaths we ask again.
- A worker that is silent, because it is stopped, cut off or waits for its disk: its steps are given to another one,
  too, and the first answer counts. It gets no new ones while there are others, until it answers.
- A scheduler that restarts is asked again; one that is gone ends the build, and the same command goes on.
- A worker that might encode otherwise, having other code or packages, is refused.
"""

import logging
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from prep.cluster_worker import GO_ON, Setup, pack, perform
from prep.worker import Worker

if TYPE_CHECKING:
    from distributed import Client

SCHEME = "dask://"
# A step without an answer for so many seconds, or so many times as long as the slowest took, whichever is more, is
# given to another worker, too; for each further one the time doubles.
PATIENCE, TIMES_THE_SLOWEST = 60.0, 10
MAX_DEATHS = 3  # times that Dask may give a step up because its workers died (each time, by default, four of them)
LOOK = 1.0  # seconds between two questions to the scheduler
TIMEOUT = 20.0  # seconds in which the scheduler must answer, or come back
CLOSE = 3.0  # seconds to say good-bye in


@dataclass(eq=False)
class _Call:
    """A step under way. `tries` are its Dask keys, with the worker that was found to be silent on each."""

    work: tuple[Callable[..., Any], tuple[Any, ...]]
    answer: "Future[Any]" = field(default_factory=Future)
    tries: dict[str, str | None] = field(default_factory=dict)
    sent: float = 0.0  # the last try
    lost: bool = False  # the last try will give no answer
    deaths: int = 0


@contextmanager
def connect(spec: str, workers: int, make: "partial[Worker]") -> Iterator["Cluster"]:
    """The workers of the scheduler at `spec`, dask://HOST[:PORT]. ValueError when there is none, or it has none.

    `workers` counts on so many, some of which may come later; 0 on those that are there.
    """
    cluster = Cluster(spec, _client(spec), make)
    try:
        cluster.begin(workers)
        yield cluster
    finally:
        cluster.shutdown(cancel_futures=True)


class Cluster(Executor):
    """An executor on `client`'s workers. `num_workers` are counted on, `present` are there now."""

    def __init__(self, spec: str, client: "Client", make: "partial[Worker]") -> None:
        self._spec, self._client, self._make = spec, client, make
        self._dask = client.get_executor(pure=False)
        self._calls: set[_Call] = set()
        self._slowest = 0.0
        self._silent: set[str] = set()
        self._failure: str | None = None
        self._closed = threading.Event()
        self._lock = threading.RLock()  # Dask answers in a thread of its own, and we watch in another
        self.present: set[str] = set()
        self.num_workers = 0

    def begin(self, workers: int) -> None:
        self._look()
        self.num_workers = workers or len(self.present)
        if not self.num_workers:
            raise ValueError(
                f"{self._spec}: the scheduler has no workers; start some, or say with --workers how many will come"
            )
        threading.Thread(target=self._watch, daemon=True).start()

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> "Future[Any]":
        assert not named
        call = _Call((function, arguments))
        with self._lock:
            if self._failure:
                raise ValueError(self._failure)
            self._calls.add(call)
            self._send(call)
        return call.answer

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Leave the cluster, which then drops what is still under way there."""
        self._closed.set()
        with self._lock:
            for call in self._calls:
                call.answer.cancel()
            self._calls.clear()
        with suppress(OSError, RuntimeError):  # a scheduler that does not answer learns it from the closed connection
            self._client.close(timeout=CLOSE)

    @cached_property
    def _setup(self) -> Setup:
        return pack(self._make)

    def _send(self, call: _Call) -> None:
        key = f"prep-{uuid.uuid4().hex}"
        others = sorted(self.present - self._silent) if self._silent else []
        where = {"workers": others, "allow_other_workers": True} if others else {}
        call.tries[key], call.sent, call.lost = None, time.monotonic(), False
        try:
            future = self._dask.submit(perform, self._setup, *call.work, key=key, priority=len(call.tries), **where)
        except _closed_client():
            call.lost = True  # the watch ends the build
            return
        future.add_done_callback(partial(self._answered, call, key))

    def _answered(self, call: _Call, key: str, future: "Future[Any]") -> None:
        from distributed import KilledWorker

        with self._lock:
            self._silent.discard(call.tries[key] or "")
            if call.answer.done():
                return  # another try was faster
            error = None if future.cancelled() else future.exception()
            call.deaths += isinstance(error, KilledWorker)
            if future.cancelled() or (isinstance(error, KilledWorker) and call.deaths < MAX_DEATHS):
                call.lost = key == list(call.tries)[-1]
                return
            self._calls.discard(call)
            if error is None:
                self._slowest = max(self._slowest, time.monotonic() - call.sent)
                call.answer.set_result(future.result())
            else:
                call.answer.set_exception(self._told(error))

    def _told(self, error: BaseException) -> BaseException:
        """What went wrong in words of ours, where it is Dask that speaks."""
        from distributed import KilledWorker

        if isinstance(error, KilledWorker):
            return ValueError(
                f"{self._spec}: the workers that took one step died, the last at {error.last_worker.address} "
                f"(out of memory?); {GO_ON}"
            )
        if isinstance(error, ImportError | AttributeError) or "deserializ" in str(error):
            return ValueError(
                f"{self._spec}: its scheduler or workers cannot load prep; start them all with this folder on "
                f"PYTHONPATH and the same packages; {GO_ON}"
            )
        return error

    def _watch(self) -> None:
        while not self._closed.wait(LOOK):
            try:
                self._look()
            except ValueError as error:
                with self._lock:
                    self._failure = str(error)
                    for call in self._calls:
                        call.answer.set_exception(error)
                    self._calls.clear()
                return
            except (RuntimeError, AttributeError):  # from a client that is being closed
                if not self._closed.is_set():
                    raise

    def _look(self) -> None:
        """See who is there; send what was lost again, and what is late to someone else, too."""
        if self._client.status == "connecting":
            return  # for at most TIMEOUT
        processing = self._ask("processing", workers=None)
        if processing is None:
            return
        with self._lock:
            self.present = set(processing)
            self._silent &= self.present
            now = time.monotonic()
            known = self._client.futures  # not what was sent while the connection broke, which nobody answers
            for call in [call for call in self._calls if call.lost or not any(key in known for key in call.tries)]:
                self._send(call)
            late = [call for call in self._calls if now - call.sent > self._patience(call)]
        if late:
            self._send_elsewhere(late, processing)

    def _patience(self, call: _Call) -> float:
        return float(max(PATIENCE, TIMES_THE_SLOWEST * self._slowest) * 2 ** (len(call.tries) - 1))

    def _send_elsewhere(self, late: list[_Call], processing: dict[str, list[str]]) -> None:
        """What is late on some worker, or done there and not to be had, goes to another one. The rest only waits."""
        places = {key: address for address, keys in processing.items() for key in keys}
        holders = self._ask("who_has", keys=[key for call in late for key in call.tries])
        places |= {key: addresses[0] for key, addresses in (holders or {}).items() if addresses}
        with self._lock:
            for call in late:
                at = {key: places[key] for key in call.tries if key in places}
                if at and call in self._calls and self.present - self._silent - set(at.values()):
                    call.tries.update(at)
                    self._silent.update(at.values())
                    self._send(call)

    def _ask(self, question: str, **named: Any) -> Any:
        """What the scheduler answers; None when the connection just broke. ValueError when it is gone."""
        scheduler = self._client.scheduler
        if self._client.status in ("closing", "closed") or scheduler is None:
            raise ValueError(f"{self._spec}: the Dask scheduler is gone; {GO_ON}")
        try:
            return self._client.sync(getattr(scheduler, question), callback_timeout=TIMEOUT, **named)
        except TimeoutError:
            raise ValueError(
                f"{self._spec}: the Dask scheduler has not answered for {TIMEOUT:.0f} s; {GO_ON}"
            ) from None
        except OSError:
            return None


def _client(spec: str) -> "Client":
    try:
        import dask
        from distributed import Client
    except ImportError:
        raise ValueError(
            "--executor dask://... needs the package distributed, which is not installed here: pip install '.[cluster]'"
        ) from None
    for name in ("distributed", "distributed.client", "tornado", "tornado.application", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)  # what matters of it is said in a line of ours
    warnings.filterwarnings("ignore", module="distributed")
    host, _, port = spec.removeprefix(SCHEME).partition(":")
    scheme = "tls" if dask.config.get("distributed.comm.require-encryption") else "tcp"
    try:
        return Client(f"{scheme}://{host}:{port or 8786}", timeout=TIMEOUT, set_as_default=False)
    except OSError as error:
        raise ValueError(f"{spec}: no Dask scheduler answers there ({error}); start one: dask scheduler") from None


def _closed_client() -> type[Exception]:
    from distributed.client import ClosedClientError

    return ClosedClientError
