"""Proof that a data set on disk is the one that its manifest names.

Every file is hashed once, in parallel, and the same pass over the disk shows what the tokens are: whether each is in
the vocabulary, and where documents begin and end. That is then held against the index, which is read meanwhile. A file
that is known to be bad is not reasoned about further, so that one flipped byte names one file.
"""

from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prep.deep import reencode
from prep.job import reopen
from prep.scan import Positions, ShardScan
from shared.durable import sha256_file
from shared.index import ContentHash, index_name, read_index
from shared.manifest import BUILD, MANIFEST, TOKENIZER, Manifest, Problem, check_files, load_build, load_manifest
from shared.progress import Progress
from shared.tokenizer import Tokenizer, has_dummy_prefix, load_tokenizer, piece_bytes


@dataclass(frozen=True)
class Result:
    """What verify found: a problem a bad file. `id` is None when the manifest is bad, `reencoded` counts --deep's."""

    id: str | None
    bad: list[Problem]
    reencoded: int = 0

    @property
    def ok(self) -> bool:
        return not self.bad

    def json(self) -> dict[str, Any]:
        return {"ok": self.ok, "id": self.id, "bad": [asdict(problem) for problem in self.bad]}


def verify(folder: Path, *, deep: int = 0, source: str | None = None, progress: Progress | None = None) -> Result:
    """Check every file of a data set; with `deep`, also count its text anew and encode that many documents anew.

    --deep reads `source`, by default what build.json says the data set was made from; `progress` shows what it waits
    for. Memory: 32 bytes a document.
    ValueError when there is no folder, or not the source for --deep; what is wrong with the data set is in the result.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; build a data set there with prep tokenize")
    try:
        manifest = load_manifest(folder)
    except ValueError as error:
        problems = [*_without_manifest(folder), Problem(MANIFEST, _less_path(error, folder / MANIFEST))]
        return Result(None, sorted(problems, key=_file))
    bad: dict[str, Problem] = {}

    def note(problems: list[Problem]) -> None:
        for problem in problems:
            bad.setdefault(problem.file, problem)

    tokenizer, misfit = _tokenizer(folder, manifest)
    sizes = piece_bytes(tokenizer.processor) if deep and tokenizer else None
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    scans = {shard.file: ShardScan(shard, manifest.tokenizer, sizes) for shard in shards}
    with ThreadPoolExecutor() as pool:  # the indexes are read while the shards are hashed
        starts = {split: pool.submit(_starts, folder, split, manifest) for split in manifest.splits}
        note(check_files(folder, manifest, observe=scans.get))
    note(misfit)
    note([Problem(file, scan.problem) for file, scan in scans.items() if scan.problem])
    for split in sorted(manifest.splits, reverse=True):  # val first: train is held against it
        note(_check_split(folder, split, manifest, starts[split], scans, bad.keys()))
    reencoded = 0
    if deep and tokenizer and not bad:
        note([problem for split in manifest.splits for problem in _check_text_bytes(split, manifest, scans, tokenizer)])
        texts = reopen(folder, manifest, source, progress=progress)
        reencoded, problems = reencode(folder, manifest, tokenizer, texts, deep)
        note(problems)
    return Result(manifest.id, sorted(bad.values(), key=_file), reencoded)


def _without_manifest(folder: Path) -> list[Problem]:
    """What can be said without a manifest: whether build.json is whole, and the indexes that it names."""
    try:
        build = load_build(folder)
    except ValueError as error:
        return [Problem(BUILD, _less_path(error, folder / BUILD))]
    problems = []
    for file, stated in sorted(build["indexes"].items()):
        if not (folder / file).is_file():
            problems.append(Problem(file, "missing"))
        elif sha256_file(folder / file) != stated["sha256"]:
            problems.append(Problem(file, "its sha256 is not the recorded one; some of its bytes have changed"))
    return problems


def _tokenizer(folder: Path, manifest: Manifest) -> tuple[Tokenizer | None, list[Problem]]:
    try:
        tokenizer = load_tokenizer(folder / TOKENIZER)
    except ValueError as error:
        return None, [Problem(TOKENIZER, _less_path(error, folder / TOKENIZER))]
    if tokenizer.identity != manifest.tokenizer:
        return None, [Problem(TOKENIZER, "is not the tokenizer that the manifest describes")]
    return tokenizer, []


def _check_split(
    folder: Path,
    split: str,
    manifest: Manifest,
    starts: "Future[Positions]",
    scans: Mapping[str, ShardScan],
    bad: Collection[str],
) -> list[Problem]:
    """The index against the manifest and against val, then the shards against the index."""
    name = index_name(split)
    if name in bad:
        return []
    try:
        found = starts.result()
        if split == "train" and "val" in manifest.splits and index_name("val") not in bad:
            _require_disjoint(folder)
    except ValueError as error:
        return [Problem(name, _less_path(error, folder / name))]
    return list(_check_frames(split, manifest, found, scans))


def _starts(folder: Path, split: str, manifest: Manifest) -> Positions:
    """Where each document starts, (documents,). ValueError says what is wrong with the index."""
    stated = manifest.splits[split]
    files = pa.array([file.name for file in manifest.source.files], pa.string())
    content, found, rows, at = ContentHash(), [], 0, 0
    last: dict[str, Any] = {}
    for batch in read_index(folder, split):
        if any(column.null_count for column in batch.columns):
            raise ValueError("has empty cells")
        content.update(batch)
        starts, lengths = batch["start"].to_numpy(), batch["length"].to_numpy()
        wanted = at + np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        if not np.array_equal(starts, wanted[:-1]) or (lengths < 1).any():
            raise ValueError(f"its rows do not follow each other without gaps, from row {rows} on")
        if not pc.all(pc.is_in(batch["file"], value_set=files)).as_py() or (batch["row"].to_numpy() < 0).any():
            raise ValueError(f"names rows that the source does not have, from row {rows} on")
        found.append(starts)
        rows, at = rows + len(batch), int(wanted[-1])
        last = batch.slice(len(batch) - 1).to_pylist()[0]
    if content.hexdigest() != stated.index.content_sha256:
        raise ValueError("its content is not what the manifest says")
    if rows != stated.index.rows or at != stated.tokens:
        raise ValueError(f"has {rows} documents and {at} tokens, not {stated.index.rows} and {stated.tokens}")
    if (last["id"], last["length"]) != (stated.last_document.id, stated.last_document.tokens_used):
        raise ValueError("its last document is not the one that the manifest says")
    return np.concatenate(found)


def _require_disjoint(folder: Path) -> None:
    held = pa.chunked_array([batch["text_sha256"] for batch in read_index(folder, "val")])
    for batch in read_index(folder, "train"):
        both = pc.index(pc.is_in(batch["text_sha256"], value_set=held), True).as_py()
        if both >= 0:
            raise ValueError(f"the text of its document {batch['id'][both].as_py()!r} stands in val as well")


def _check_frames(
    split: str, manifest: Manifest, starts: Positions, scans: Mapping[str, ShardScan]
) -> Iterator[Problem]:
    """`<s>` stands where documents start and `</s>` where complete ones end, and nowhere else."""
    stated = manifest.splits[split]
    ends = np.append(starts[1:], stated.tokens) - 1
    if stated.last_document.tokens_dropped:
        ends = ends[:-1]
    first = 0
    for shard in stated.shards:
        for piece, wanted, found in (("<s>", starts, scans[shard.file].starts), ("</s>", ends, scans[shard.file].ends)):
            here = wanted[slice(*np.searchsorted(wanted, [first, first + shard.tokens]))] - first
            if not np.array_equal(here, found):
                odd = int(np.setxor1d(here, found)[0])
                where = "is missing at" if odd in here else "stands inside a document, at"
                yield Problem(shard.file, f"{piece} {where} token {odd} of the shard")
        first += shard.tokens


def _check_text_bytes(
    split: str, manifest: Manifest, scans: Mapping[str, ShardScan], tokenizer: Tokenizer
) -> list[Problem]:
    """utf8_bytes, counted from the tokens: the bytes of each piece, less the dummy prefix of each document."""
    stated = manifest.splits[split]
    total = sum(scans[shard.file].text_bytes for shard in stated.shards)
    if has_dummy_prefix(tokenizer.processor):
        total -= stated.documents - (stated.last_document.tokens_used == 1)
    if total == stated.utf8_bytes:
        return []
    return [Problem(MANIFEST, f"utf8_bytes of {split} is {stated.utf8_bytes}, its tokens stand for {total}")]


def _file(problem: Problem) -> str:
    return problem.file


def _less_path(error: Exception, path: Path) -> str:
    return str(error).removeprefix(f"{path}: ")
