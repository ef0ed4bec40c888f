"""The contract on disk: what a data set is, its identity, and the proof that its bytes are the ones it names.

`id` is the SHA-256 of the manifest's other fields in canonical JSON. It holds no times, machine paths or versions, so
two people with the same inputs get the same id. build.json, which does hold those, seals itself the same way, so that
a flipped byte in either file shows.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import numpy as np

from shared.durable import sha256_file
from shared.shards import HEADER_BYTES, Shard, TokenStream, shard_bytes, shard_header, shard_name
from shared.tokenizer import Identity

FORMAT_VERSION = 1
MANIFEST, BUILD, TOKENIZER = "manifest.json", "build.json", "tokenizer.model"
T = TypeVar("T")


@dataclass(frozen=True)
class SourceFile:
    """One file of the source; `name` is relative to the source, `sha256` of the whole file."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Source:
    """Where the text came from and in what order. `holdout_threshold` is a decimal string: it needs 64 bits."""

    kind: str
    repository: str | None
    config: str | None
    revision: str | None
    files: list[SourceFile]
    order: str
    seed: int
    unit_bytes: int
    holdout_threshold: str


@dataclass(frozen=True)
class LastDocument:
    """The document that fills a split, cut where the budget ends; both counts include `<s>` and `</s>`."""

    id: str
    tokens_used: int
    tokens_dropped: int


@dataclass(frozen=True)
class Index:
    """documents.parquet: its rows, and the hash of its content (its own bytes depend on the library that writes it)."""

    file: str
    rows: int
    content_sha256: str


@dataclass(frozen=True)
class Split:
    """One split: sequences x sequence_length + 1 tokens. `utf8_bytes` is the text of all labels, for bits per byte."""

    sequences: int
    tokens: int
    documents: int
    utf8_bytes: int
    last_document: LastDocument
    shards: list[Shard]
    index: Index


@dataclass(frozen=True)
class Skipped:
    """Documents that were read and are in no split."""

    empty: int
    in_val: int
    after_full: int


@dataclass(frozen=True)
class Manifest:
    """manifest.json, whole."""

    format_version: int
    source: Source
    tokenizer: Identity
    sequence_length: int
    shard_tokens: int
    splits: dict[str, Split]
    skipped: Skipped
    id: str


@dataclass(frozen=True)
class Problem:
    """A bad file, relative to the data set, and what is wrong with it."""

    file: str
    problem: str


def canonical(value: object) -> bytes:
    """The one JSON text of a value: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def seal(value: Mapping[str, Any], key: str) -> dict[str, Any]:
    """`value` with `key` added: the SHA-256 of all other fields in canonical JSON."""
    body = {k: v for k, v in value.items() if k != key}
    return {**body, key: hashlib.sha256(canonical(body)).hexdigest()}


def text_of(value: Mapping[str, Any]) -> bytes:
    """How a sealed object is laid out in its file. A file of any other layout is damaged."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def manifest_dict(manifest: Manifest) -> dict[str, Any]:
    return asdict(manifest)


def load_manifest(folder: Path) -> Manifest:
    """Read and check manifest.json: its layout, its fields, its id, its arithmetic. ValueError says what is wrong."""
    manifest = _parse(Manifest, read_sealed(folder / MANIFEST, "id"), str(folder / MANIFEST))
    problem = _inconsistent(manifest)
    if problem:
        raise ValueError(f"{folder / MANIFEST}: {problem}")
    return manifest


def load_build(folder: Path) -> dict[str, Any]:
    """Read build.json and check its seal."""
    return read_sealed(folder / BUILD, "sha256")


def read_sealed(path: Path, key: str) -> dict[str, Any]:
    """Read a JSON object that `seal` and `text_of` wrote. ValueError when one byte of it is not as written."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path}: missing; is this a finished data set?") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from None
    try:
        value = json.loads(data)
        intact = isinstance(value, dict) and text_of(value) == data and value == seal(value, key)
    except ValueError:
        intact = False
    if not intact:
        raise ValueError(f"{path}: damaged: its content does not match its own {key}; tokenize again or copy it again")
    assert isinstance(value, dict)
    return value


def check_files(
    folder: Path,
    manifest: Manifest,
    *,
    observe: Callable[[str], Callable[[memoryview], None] | None] = lambda file: None,
    threads: int | None = None,
) -> list[Problem]:
    """Hash every file of the data set against the manifest and build.json, in parallel; name all that are bad.

    `observe(file)` may return a function that is shown the file's bytes in order while they are hashed.
    """
    expected: dict[str, tuple[int | None, str]] = {TOKENIZER: (None, manifest.tokenizer.sha256)}
    problems = []
    for split in manifest.splits.values():
        expected.update({shard.file: (shard.bytes, shard.sha256) for shard in split.shards})
    try:
        indexes = load_build(folder)["indexes"]
        expected.update({i.index.file: _stated(indexes, i.index.file) for i in manifest.splits.values()})
    except (ValueError, KeyError, TypeError) as error:
        problems.append(Problem(BUILD, _without(folder / BUILD, error)))
    known = {*expected, MANIFEST, BUILD, *(split.index.file for split in manifest.splits.values())}
    problems += [Problem(file, "not part of this data set; remove it") for file in _files(folder) if file not in known]
    with ThreadPoolExecutor(threads) as pool:
        largest_first = sorted(expected, key=lambda file: -(expected[file][0] or 0))
        found = pool.map(lambda file: _check(folder, file, *expected[file], observe(file)), largest_first)
        problems += [problem for problem in found if problem]
    return sorted(problems, key=lambda problem: problem.file)


def open_stream(folder: Path, manifest: Manifest, split: str) -> TokenStream:
    """The tokens of one split, memory-mapped. ValueError when the data set has no such split."""
    if split not in manifest.splits:
        raise ValueError(f"{folder}: this data set has no {split} split, only {', '.join(manifest.splits)}")
    return TokenStream(folder, manifest.splits[split].shards)


def _check(
    folder: Path, file: str, size: int | None, sha256: str, observe: Callable[[memoryview], None] | None
) -> Problem | None:
    path = folder / file
    try:
        if path.is_symlink() or not path.is_file():
            return Problem(file, "missing" if not path.exists() else "not a plain file")
        actual = path.stat().st_size
        if size is not None and actual != size:
            return Problem(file, f"has {actual} bytes, not {size}")
        if sha256_file(path, observe) != sha256:
            return Problem(file, "its sha256 is not the recorded one; some of its bytes have changed")
    except OSError as error:
        return Problem(file, f"cannot be read: {error.strerror or error}")
    return None


def _stated(indexes: Mapping[str, Any], file: str) -> tuple[int, str]:
    return int(indexes[file]["bytes"]), str(indexes[file]["sha256"])


def _without(path: Path, error: Exception) -> str:
    """What an error says, less the path it starts with."""
    if isinstance(error, KeyError):
        return f"does not state {error}"
    return str(error).removeprefix(f"{path}: ")


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())


def _inconsistent(m: Manifest) -> str | None:
    """The first thing in which a manifest contradicts itself or the format."""
    if m.format_version != FORMAT_VERSION:
        return f"format_version is {m.format_version}, this program reads {FORMAT_VERSION}; use the matching release"
    if "train" not in m.splits or set(m.splits) - {"train", "val"}:
        return f"splits are {sorted(m.splits)}, expected train and perhaps val"
    for name, split in m.splits.items():
        if split.tokens != split.sequences * m.sequence_length + 1:
            return f"{name} has {split.tokens} tokens, not sequences x {m.sequence_length} + 1"
        if sum(shard.tokens for shard in split.shards) != split.tokens:
            return f"the shards of {name} do not add up to its {split.tokens} tokens"
        for i, shard in enumerate(split.shards):
            last = i == len(split.shards) - 1
            if shard.file != shard_name(name, i) or shard.bytes != shard_bytes(shard.tokens):
                return f"{shard.file} is not a possible shard {i} of {name}"
            if shard.tokens > m.shard_tokens or (shard.tokens < m.shard_tokens and not last):
                return f"{shard.file} has {shard.tokens} tokens where shards have {m.shard_tokens}"
        if split.index.file != f"{name}/documents.parquet" or split.index.rows != split.documents:
            return f"the index of {name} does not fit its {split.documents} documents"
    return None


def _parse(kind: type[T], value: object, where: str) -> T:
    """Build a dataclass (or list, dict, int, str, None of them) from JSON, exactly: no field missing, none unknown."""
    origin, arguments = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        if not isinstance(value, dict) or set(value) != {field.name for field in fields(kind)}:
            raise ValueError(f"{where}: expected the fields {', '.join(field.name for field in fields(kind))}")
        hints = get_type_hints(kind)
        return kind(**{name: _parse(hints[name], item, f"{where}: {name}") for name, item in value.items()})
    if origin is list and isinstance(value, list):
        return [_parse(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value)]  # type: ignore[return-value]
    if origin is dict and isinstance(value, dict):
        return {key: _parse(arguments[1], item, f"{where}.{key}") for key, item in value.items()}  # type: ignore[return-value]
    allowed = arguments if origin is UnionType else (kind,)
    if type(value) in allowed or (value is None and NoneType in allowed):
        return value  # type: ignore[return-value]
    raise ValueError(f"{where}: {value!r} is not of the expected type")


def check_header(file: str, tokens: int, chunk: memoryview) -> str | None:
    """What is wrong with the first chunk of a shard, if anything: its header states the dtype and the length."""
    if bytes(chunk[:HEADER_BYTES]) != shard_header(tokens):
        return f"{file}: its header does not say {tokens} little-endian uint16 tokens"
    return None


def largest_id(chunk: memoryview) -> int:
    """The largest token id in a chunk of token bytes, -1 for an empty one."""
    ids = np.frombuffer(chunk, dtype="<u2")
    return int(ids.max()) if len(ids) else -1
