"""Requests to the Hub that outlast its bad moments.

A rate limit (429) is waited out for as long as the Hub asks, by all threads together. Server errors and broken
connections are tried again with growing pauses; a transfer that was cut goes on at its byte. What cannot get better by
waiting (401, 403, 404) ends at once in one line.

The Hub's own client makes the requests for which it has functions. It has none for a part of a file that survive a cut
without starting over, so those are plain GETs to its URLs with its headers.
"""

import email.utils
import errno
import http.client
import importlib
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

from shared.progress import duration
from shared.stop import Interrupted, Stop

T = TypeVar("T")
PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0)  # seconds between tries that bring nothing
MAX_WAITS = 20  # rate limits in a row for one request
TIMEOUT = 30.0  # seconds without a byte
CHUNK = 1 << 18
POLL = 0.2  # seconds between two looks at the stop flag
RETRY_STATUS = (408, 429, 500, 502, 503, 504)


class Failure(Exception):
    """One try that failed: its HTTP status, the pause that the server asks for in seconds, if any of these."""

    def __init__(self, reason: str, status: int | None = None, pause: float | None = None) -> None:
        super().__init__(reason)
        self.status, self.pause = status, pause


class Transfers:
    """Makes requests. `say` shows a line about a wait, `instead` tells how to do without the Hub."""

    def __init__(
        self,
        stop: Stop,
        say: Callable[[str], None],
        instead: str,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stop, self._say, self._instead, self._sleep, self._clock = stop, say, instead, sleep, clock
        self._lock = threading.Lock()
        self._closed_until = 0.0  # by a rate limit
        self._ended = False

    def call(self, what: str, request: Callable[[], T], meanwhile: Callable[[], None] = lambda: None) -> T:
        """`request()`, which calls a function of huggingface_hub; its errors are told apart by what to do next.

        It runs in a thread; `meanwhile` is called every POLL seconds.
        """

        def attempt() -> T:
            try:
                return self._awaited(in_background(request), meanwhile)
            except hub_errors() as error:
                if _is_of_the_disk(error):
                    raise
                raise _failure_of(error) from None

        return self._patiently(what, attempt, lambda: 0)

    def read(
        self,
        what: str,
        url: str,
        headers: Mapping[str, str],
        first: int,
        stop: int,
        sink: BinaryIO,
        size: int,
        sha256: str,
    ) -> None:
        """Write bytes `first` ... `stop`-1 of `url`, a file of `size` bytes and of `sha256` as the Hub states it.

        ValueError when the Hub now states another size or sha256: the file is not the one that was listed.
        """
        at = first

        def attempt() -> None:
            nonlocal at
            for stated, chunk in self._chunks(url, headers, at, stop):
                if stated.size != size or (stated.sha256 and stated.sha256 != sha256):
                    raise ValueError(_changed(what))
                sink.write(chunk)
                at += len(chunk)

        self._patiently(what, attempt, lambda: at)

    def _chunks(self, url: str, headers: Mapping[str, str], first: int, stop: int) -> "Iterator[tuple[_Stated, bytes]]":
        request = urllib.request.Request(url, headers={**headers, "Range": f"bytes={first}-{stop - 1}"})
        redirects = _Redirects()
        try:
            with urllib.request.build_opener(redirects).open(request, timeout=TIMEOUT) as response:
                linked = response.headers.get("X-Linked-Etag") or redirects.linked
                stated = _Stated(_whole_size(response, first), (linked or "").strip('"'))
                while first < stop:
                    self._check_stop()
                    chunk = response.read1(min(CHUNK, stop - first))
                    if not chunk:
                        raise Failure("the connection was cut")
                    first += len(chunk)
                    yield stated, chunk
        except urllib.error.HTTPError as error:
            raise Failure(error.reason, error.code, asked_pause(dict(error.headers))) from None
        except urllib.error.URLError as error:
            raise Failure(str(error.reason)) from None
        except (http.client.HTTPException, OSError) as error:
            raise Failure(str(error) or type(error).__name__) from None

    def _patiently(self, what: str, attempt: Callable[[], T], progress: Callable[[], int]) -> T:
        """Try until it works. A try that moved `progress` on starts the pauses anew."""
        failures = waits = 0
        while True:
            self._wait_for_the_limit()
            before = progress()
            try:
                return attempt()
            except Failure as failure:
                if failure.status == 416:
                    raise ValueError(_changed(what)) from None
                if failure.status is not None and failure.status not in RETRY_STATUS:
                    raise ValueError(f"{what}: {self._advice(failure)}") from None
                if progress() > before:
                    failures = waits = 0
                if failure.status == 429 and failure.pause is not None and waits < MAX_WAITS:
                    waits += 1
                    self._limit(failure.pause)
                elif failures < len(PAUSES):
                    self._pause(PAUSES[failures])
                    failures += 1
                else:
                    reason = f"{failure.status} {failure}" if failure.status else str(failure)
                    raise ValueError(
                        f"{what}: {reason}; gave up after {failures + waits + 1} tries; nothing is lost: "
                        "the same command goes on where it stopped"
                    ) from None

    def _advice(self, failure: Failure) -> str:
        if failure.status in (401, 403):
            return (
                f"the Hub refuses access ({failure.status}): is the name right? If the repository is private or gated, "
                f"set HF_TOKEN to a token that may read it; or {self._instead}"
            )
        if failure.status == 404:
            return f"the Hub has no such repository, revision or file (404); or {self._instead}"
        return f"the Hub answers {failure.status} {failure}"

    def _limit(self, seconds: float) -> None:
        """A rate limit counts for the address, so no thread asks again before its time."""
        with self._lock:
            until = self._clock() + seconds
            if until > self._closed_until + 1:
                self._say(f"the Hub's rate limit (429): waiting {duration(seconds)} as it asks")
            self._closed_until = max(until, self._closed_until)

    def _wait_for_the_limit(self) -> None:
        self._pause(self._closed_until - self._clock())

    def _pause(self, seconds: float) -> None:
        until = self._clock() + seconds
        while (left := until - self._clock()) > 0:
            self._check_stop()
            self._sleep(min(left, POLL))

    def _awaited(self, future: "Future[T]", meanwhile: Callable[[], None]) -> T:
        while not wait([future], timeout=POLL).done:
            self._check_stop()
            meanwhile()
        return future.result()

    def close(self) -> None:
        """End all requests that are under way in threads."""
        self._ended = True

    def _check_stop(self) -> None:
        if self._ended:
            raise Interrupted("not needed any more")
        self._stop.check("interrupted; the same command goes on where it stopped")


@dataclass(frozen=True)
class _Stated:
    """What a response says of the whole file; `sha256` is empty where it does not say."""

    size: int
    sha256: str


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to another host without the token: storage hosts refuse it, and it is none of theirs.

    `linked` is the sha256 that the Hub states when it sends us there.
    """

    linked: str | None = None

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        self.linked = headers.get("X-Linked-Etag") or self.linked
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and urlsplit(newurl).netloc != urlsplit(req.full_url).netloc:
            request.remove_header("Authorization")
        return request


def in_background(work: Callable[[], T]) -> "Future[T]":
    """Run `work` in a thread that a stop does not wait for."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 (handed to whoever asks for the result)
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def hub_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises when a request fails: its own errors, and those of the HTTP client it stands on."""
    from huggingface_hub.utils import get_session

    client = importlib.import_module(type(get_session()).__module__.partition(".")[0])
    return (OSError, client.HTTPError)


def asked_pause(headers: Mapping[str, str]) -> float | None:
    """Seconds that a response asks to wait: Retry-After (seconds or a date), else RateLimit's reset; at least one."""
    retry, limit = headers.get("Retry-After"), headers.get("RateLimit") or ""
    if retry and retry.strip().isdigit():
        return max(1.0, float(retry))
    if retry and (date := email.utils.parsedate_tz(retry)):
        return max(1.0, email.utils.mktime_tz(date) - time.time())
    if reset := re.search(r";\s*t\s*=\s*(\d+)", limit):
        return max(1.0, float(reset[1]))
    return None


def _failure_of(error: BaseException) -> Failure:
    """What a failed call of huggingface_hub comes to: the first HTTP status in its chain of causes."""
    link: BaseException | None = error
    while link is not None:
        response = getattr(link, "response", None)
        if response is not None:
            return Failure(_first_line(link), response.status_code, asked_pause(response.headers))
        error, link = link, link.__cause__
    return Failure(_first_line(error))


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _is_of_the_disk(error: BaseException) -> bool:
    """A full disk or a cache that may not be written: trying again does not help."""
    if not isinstance(error, OSError) or isinstance(error, ConnectionError | TimeoutError):
        return False
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


def _whole_size(response: Any, first: int) -> int:
    """The size of the whole file, of which `response` holds the part from `first` on."""
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
    if response.status != 206 or found is None or int(found[1]) != first:
        raise Failure(f"asked for a part of the file, got status {response.status}", response.status)
    return int(found[2])


def _changed(what: str) -> str:
    return f"{what}: changed at the Hub since its files were listed; start again with --restart"
