"""A small data set made straight from the contract in shared/, so that the trainer's tests do not need prep."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import cycle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shared.durable import sha256_file
from shared.index import SCHEMA, ContentHash, index_name
from shared.manifest import BUILD, MANIFEST, TOKENIZER, Index, LastDocument, Skipped, Source, Split, seal, text_of
from shared.shards import Shard, shard_bytes, shard_header, shard_name
from shared.tokenizer import load_tokenizer, piece_bytes

GOLDEN = Path(__file__).parent.parent / "golden"
SHARD_TOKENS = 1500  # so that sequences cross shards


def build(
    folder: Path,
    *,
    train: int,
    val: int,
    length: int = 32,
    seed: int = 0,
    texts: Sequence[str] | None = None,
    url: str = "",
) -> Path:
    """A valid data set of `train` and `val` sequences of `length` tokens at `folder`. Another seed, another id.

    Its documents are `texts`, by default the golden prose, again and again, each with the same `url`.
    """
    tokenizer = load_tokenizer(GOLDEN / "tokenizer.model")
    identity = tokenizer.identity
    lines = (GOLDEN / "source" / "prose.jsonl").read_text().splitlines()
    written = cycle(texts or [text for line in lines if (text := json.loads(line)["text"])])
    sizes = piece_bytes(tokenizer.processor)
    splits, indexes = {}, {}
    folder.mkdir(parents=True)
    for name, sequences in (("train", train), ("val", val)):
        if not sequences:
            continue
        budget, tokens, documents = sequences * length + 1, [], []
        while len(tokens) < budget:
            ids = [identity.bos_id, *tokenizer.processor.encode(next(written)), identity.eos_id]
            documents.append((len(tokens), min(len(ids), budget - len(tokens)), len(ids)))
            tokens += ids
        stream = np.array(tokens[:budget], dtype="<u2")
        shards = []
        (folder / name).mkdir()
        for i in range(0, budget, SHARD_TOKENS):
            part, file = stream[i : i + SHARD_TOKENS], shard_name(name, i // SHARD_TOKENS)
            (folder / file).write_bytes(shard_header(len(part)) + part.tobytes())
            shards.append(Shard(file, len(part), shard_bytes(len(part)), sha256_file(folder / file)))
        first = np.flatnonzero(stream[:-1] == identity.bos_id)
        utf8_bytes = int(sizes[stream[1:]].sum()) - len(first)  # a label behind <s> begins with the dummy space
        rows = [
            {"start": start, "length": kept, "id": f"{name}-{i}", "url": url, "file": "prose.jsonl", "row": i,
             "text_sha256": bytes(32)}
            for i, (start, kept, _) in enumerate(documents)
        ]  # fmt: skip
        batch = pa.RecordBatch.from_pylist(rows, schema=SCHEMA)
        pq.write_table(pa.Table.from_batches([batch]), folder / index_name(name))
        content = ContentHash()
        content.update(batch)
        index = folder / index_name(name)
        indexes[index_name(name)] = {"bytes": index.stat().st_size, "sha256": sha256_file(index)}
        _, kept, whole = documents[-1]
        splits[name] = Split(
            sequences=sequences,
            tokens=budget,
            documents=len(documents),
            utf8_bytes=utf8_bytes,
            last_document=LastDocument(rows[-1]["id"], kept, whole - kept),
            shards=shards,
            index=Index(index_name(name), len(rows), content.hexdigest()),
        )
    manifest = {
        "format_version": 1,
        "source": asdict(Source("files", None, None, None, [], "listed", seed, 1 << 23, "0")),
        "tokenizer": asdict(identity),
        "sequence_length": length,
        "shard_tokens": SHARD_TOKENS,
        "splits": {name: asdict(split) for name, split in splits.items()},
        "skipped": asdict(Skipped(0, 0, 0)),
    }
    (folder / TOKENIZER).write_bytes(tokenizer.model)
    (folder / MANIFEST).write_bytes(text_of(seal(manifest, "id")))
    (folder / BUILD).write_bytes(text_of(seal({"indexes": indexes}, "sha256")))
    return folder
