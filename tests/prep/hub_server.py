"""A Hub on the loopback device, as far as its clients need one, whose moods can be set; it counts what it serves.

Files are served as the real one does: HEAD says what a file is, GET sends one to another host ("localhost" instead of
"127.0.0.1"), which serves ranges and refuses whoever shows it the token.
"""

import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LFS_BYTES = 5000  # a larger file is kept as an LFS object: its ETag is its sha256


@dataclass(frozen=True)
class Tail:
    """A file of `size` bytes of which only the last ones are here."""

    size: int
    data: bytes

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, span: slice) -> bytes:
        before = self.size - len(self.data)
        assert span.start >= before, "only the end of this file was to be read"
        return self.data[span.start - before : span.stop - before]


@dataclass
class Repository:
    """Files by commit, and commits by branch."""

    kind: str  # "datasets" or "models"
    commits: dict[str, dict[str, bytes | Tail]]
    branches: dict[str, str] = field(default_factory=dict)
    needs_token: str | None = None  # 401 without one, 403 with another


@dataclass
class Hub:
    """`faults` are asked in turn for each request: the first that answers with something spoils it."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    faults: list[Callable[["Request"], "Fault | None"]] = field(default_factory=list)
    requests: list["Request"] = field(default_factory=list)
    served: Counter[str] = field(default_factory=Counter)  # bytes of files, by name
    port: int = 0

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ranges(self, name: str) -> list[tuple[int, int]]:
        """The ranges of a file that were asked of the storage host, in order."""
        return [r.range for r in self.requests if r.storage and r.name == name and r.range is not None]


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    storage: bool = False
    name: str | None = None
    range: tuple[int, int] | None = None


@dataclass(frozen=True)
class Fault:
    """`status` is answered; or the body ends after `cut` bytes; or comes with `pause` seconds between its pieces."""

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    pause: float | None = None


def once(fault: Fault, wanted: Callable[[Request], bool], times: int = 1) -> Callable[[Request], Fault | None]:
    """The fault for the first `times` requests that are `wanted`."""
    left, lock = [times], threading.Lock()

    def choose(request: Request) -> Fault | None:
        with lock:
            if not left[0] or not wanted(request):
                return None
            left[0] -= 1
            return fault

    return choose


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def digest_of(data: bytes | Tail, algorithm: Callable[[bytes], Any]) -> str:
    """Of a `Tail`, some digest that stays the same."""
    digest: str = algorithm(data.data if isinstance(data, Tail) else data).hexdigest()
    return digest


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._send(404, {"X-Error-Code": "EntryNotFound"})

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        storage = self.headers["Host"].startswith("localhost")
        name = path.partition("/resolve/")[2].partition("/")[2] or None
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        request = Request(self.command, path, storage, name, (int(span[1]), int(span[2]) + 1) if span else None)
        self.hub.requests.append(request)
        fault = next((found for choose in self.hub.faults if (found := choose(request))), Fault())
        if fault.status is not None:
            return self._send(fault.status, fault.headers)
        found = re.fullmatch(
            r"/(api/)?(?:(datasets|models)/)?([^/]+/[^/]+)(?:/(revision|tree|resolve)/([^/]+)(/.*)?)?", path
        )
        repository = self.hub.repositories.get(found[3]) if found else None
        if found is None or repository is None or repository.kind != (found[2] or "models"):
            return self._send(404, {"X-Error-Code": "RepoNotFound"})
        if storage and self.headers.get("Authorization"):
            return self._send(400, {})
        if repository.needs_token and not storage:
            shown = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if shown != repository.needs_token:
                return self._send(403 if shown else 401, {"X-Error-Code": "GatedRepo"})
        commit = repository.branches.get(found[5] or "main", found[5] or "main")
        files = repository.commits.get(commit)
        if files is None:
            return self._send(404, {"X-Error-Code": "RevisionNotFound"})
        rest = (found[6] or "").strip("/")
        if found[4] == "resolve":
            self._file(files, rest, commit, request, fault)
        elif found[4] == "tree":
            self._tree(files, rest)
        else:
            self._json({"id": found[3], "sha": commit, "siblings": [{"rfilename": name} for name in files]})

    def _tree(self, files: dict[str, bytes | Tail], folder: str) -> None:
        entries = []
        for name, data in files.items():
            if folder and not name.startswith(folder + "/"):
                continue
            entry = {"type": "file", "path": name, "size": len(data), "oid": digest_of(data, hashlib.sha1)}
            if len(data) > LFS_BYTES:
                entry["lfs"] = {"oid": digest_of(data, hashlib.sha256), "size": len(data), "pointerSize": 130}
            entries.append(entry)
        if folder and not entries:
            return self._send(404, {"X-Error-Code": "EntryNotFound"})
        self._json(entries)

    def _file(self, files: dict[str, bytes | Tail], name: str, commit: str, request: Request, fault: Fault) -> None:
        if name not in files:
            return self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        data = files[name]
        digest = digest_of(data, hashlib.sha256 if len(data) > LFS_BYTES else hashlib.sha1)
        if not request.storage and len(data) > LFS_BYTES:
            return self._send(
                302,
                {
                    "Location": f"http://localhost:{self.hub.port}{self.path}",
                    "X-Repo-Commit": commit,
                    "X-Linked-Etag": f'"{digest}"',
                    "X-Linked-Size": str(len(data)),
                },
            )
        first, stop = request.range or (0, len(data))
        if first >= len(data):
            return self._send(416, {})
        stop = min(stop, len(data))
        headers = {"ETag": f'"{digest}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if request.range:
            headers["Content-Range"] = f"bytes {first}-{stop - 1}/{len(data)}"
        self._send(206 if request.range else 200, headers, data[first:stop], fault)

    def _json(self, value: object) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _send(self, status: int, headers: dict[str, str], body: bytes = b"", fault: Fault | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = fault.cut if fault else None
        body = body if cut is None else body[:cut]
        name = unquote(urlsplit(self.path).path).partition("/resolve/")[2].partition("/")[2]
        try:
            for start in range(0, len(body), 1 << 14):
                piece = body[start : start + (1 << 14)]
                self.wfile.write(piece)
                self.hub.served[name] += len(piece)
                if fault and fault.pause:
                    self.wfile.flush()
                    time.sleep(fault.pause)
        except OSError:
            self.close_connection = True  # the client left
        if cut is not None:
            self.close_connection = True
