"""Text files as lines: plain or zstandard, UTF-8, a document a line (.txt) or a JSON object a line (.jsonl)."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

READ_BYTES = 1 << 20
ZST_READ_BYTES = 1 << 15  # small, because text packed this far may unpack to a hundred times as much
Parsed = tuple[str | None, str | None, str]  # text, id, url


@contextmanager
def chunks_of(path: Path, offset: int = 0, size: int = READ_BYTES) -> Iterator[Iterator[bytes]]:
    """The bytes of a file from `offset` on, in chunks."""
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        yield iter(lambda: file.read(size), b"")


def plain_lines(path: Path, offset: int) -> Iterator[bytes]:
    with chunks_of(path, offset) as chunks:
        yield from _lines(chunks)


def zst_lines(path: Path) -> Iterator[bytes]:
    with chunks_of(path, size=ZST_READ_BYTES) as chunks:
        yield from _lines(_unpacked(chunks, path))


def parse_text(line: bytes) -> Parsed:
    return line.decode(), None, ""


def parse_json(line: bytes) -> Parsed:
    if not line.strip():
        return None, None, ""
    text = line.decode()
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"bad JSON: {error.msg} at character {error.pos}") from None
    if not isinstance(value, dict):
        raise ValueError("bad JSON: expected an object with the key 'text'")
    if "text" not in value:
        raise ValueError("has no key 'text'")
    if not isinstance(value["text"], str | None):
        raise ValueError(f"'text' is {type(value['text']).__name__}, not a string")
    names = []
    for key in ("id", "url"):
        name = value.get(key)
        if not isinstance(name, str | int | None) or isinstance(name, bool):
            raise ValueError(f"{key!r} is {type(name).__name__}, not a string")
        names.append(None if name is None else str(name))
        (names[-1] or "").encode()
    return value["text"], names[0], names[1] or ""


def _unpacked(chunks: Iterable[bytes], path: Path) -> Iterator[bytes]:
    """Zstandard frames, one after another. Garbage and a cut-off last frame are errors."""
    import zstandard

    frame = None
    try:
        for chunk in chunks:
            while chunk:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(chunk)
                chunk = frame.unused_data
                if frame.eof:
                    frame = None
    except zstandard.ZstdError as error:
        raise ValueError(f"{path}: not readable as zstandard: {error}") from None
    if frame is not None:
        raise ValueError(f"{path}: cut off: its last zstandard frame does not end; fetch the file again")


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines without their line break, which is \\n alone; a last line may lack it."""
    rest: list[bytes] = []
    for chunk in chunks:
        *whole, last = chunk.split(b"\n")
        for line in whole:
            yield b"".join([*rest, line]) if rest else line
            rest = []
        if last:
            rest.append(last)
    if rest:
        yield b"".join(rest)
