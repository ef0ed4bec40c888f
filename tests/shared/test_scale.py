"""The arithmetic holds at 1.3e12 tokens and 1.3e9 sequences: sparse files, nothing in memory whole, nothing 32-bit."""

import resource
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.index import SCHEMA, documents_between
from shared.manifest import (
    Index,
    LastDocument,
    Manifest,
    Skipped,
    Source,
    SourceFile,
    Split,
    load_manifest,
    manifest_dict,
    seal,
    text_of,
)
from shared.permutation import Permutation
from shared.shards import HEADER_BYTES, Shard, TokenStream, shard_bytes, shard_header, shard_name
from shared.tokenizer import Identity
from train.order import Order, rows

SEQUENCES, LENGTH, SHARD = 1_300_000_000, 1024, 1 << 26
TOKENS = SEQUENCES * LENGTH + 1
ZEROS = "0" * 64


def shards() -> list[Shard]:
    """As a build would make them: 19,837 of 2^26 tokens and the rest."""
    counts = [SHARD] * (TOKENS // SHARD) + [TOKENS % SHARD]
    return [Shard(shard_name("train", i), n, shard_bytes(n), ZEROS) for i, n in enumerate(counts)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All shards as sparse files, with a token written at each end of some."""
    folder = tmp_path_factory.mktemp("large")
    (folder / "train").mkdir()
    for shard in shards():
        with (folder / shard.file).open("wb") as file:
            file.write(shard_header(shard.tokens))
            file.truncate(shard.bytes)
    return folder


@pytest.fixture
def few_files() -> Iterator[None]:
    """As many open files as a plain shell allows."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, before[1]), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def put(folder: Path, token: int, value: int) -> None:
    with (folder / shard_name("train", token // SHARD)).open("r+b") as file:
        file.seek(HEADER_BYTES + token % SHARD * 2)
        file.write(value.to_bytes(2, "little"))


def test_any_token_of_a_trillion_is_read_with_a_thousand_open_files(folder: Path, few_files: None) -> None:
    places = np.linspace(0, TOKENS - 1, 3000).astype(np.int64)
    for value, token in enumerate(places.tolist()):
        put(folder, token, value + 1)
    stream = TokenStream(folder, shards())
    assert len(stream) == TOKENS
    wanted = list(range(1, 3001))
    assert [int(stream[token : token + 1][0]) for token in places.tolist()] == wanted
    assert stream.take(places[::-1]).tolist() == wanted[::-1]
    last = rows(stream, np.array([0, SEQUENCES - 1]), LENGTH)
    assert last.shape == (2, LENGTH + 1) and last[0, 0] == 1 and last[1, -1] == 3000
    border = 12_345 * SHARD
    put(folder, border - 1, 7)
    put(folder, border, 8)
    assert stream[border - 1 : border + 1].tolist() == [7, 8]


def test_the_order_of_a_billion_sequences_is_a_permutation_that_costs_nothing() -> None:
    tracemalloc.start()
    order = Order(data_id=ZEROS, seed=0, sequences=SEQUENCES, batch=4096)
    for step in (1, order.steps // 2, order.steps):
        found = order.indices(step)
        assert found.dtype == np.int64 and len(set(found.tolist())) == 4096
        assert found.min() >= 0 and found.max() < SEQUENCES
        parts = [order.indices(step, rank, 8) for rank in range(8)]
        assert np.array_equal(np.stack(parts, axis=1).reshape(-1), found)
    assert order.steps == SEQUENCES // 4096
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("n", [SEQUENCES, TOKENS, (1 << 32) + 1])
def test_a_large_permutation_fills_its_range(n: int) -> None:
    """A sample cannot prove a bijection, but a range cut at 2^31 or 2^32 or a repeated value would show in it."""
    sample = Permutation(n, tag="order/1", data_id=ZEROS, seed=0)(np.arange(n - 200_000, n))
    assert len(np.unique(sample)) == 200_000
    shares = np.histogram(sample, bins=16, range=(0, n))[0]
    assert shares.min() > 11_500 and shares.max() < 13_500


def test_a_manifest_of_twenty_thousand_shards_and_2410_files_is_read_and_checked(tmp_path: Path) -> None:
    files = [SourceFile(f"data/CC/{i:05d}.parquet", 2 << 30, ZEROS) for i in range(2410)]
    documents = 1_270_000_000
    split = Split(
        SEQUENCES, TOKENS, documents, 5 * 10**12, LastDocument("x", 9, 0), shards(),
        Index("train/documents.parquet", documents, ZEROS),
    )  # fmt: skip
    source = Source("hf", "O/N", "default", "a" * 40, files, "shuffled", 0, 8 << 20, str(1 << 50))
    made = Manifest(1, source, Identity(ZEROS, 32000, 0, 1, 2), LENGTH, SHARD, {"train": split}, Skipped(0, 0, 0), "")
    (tmp_path / "manifest.json").write_bytes(text_of(seal(manifest_dict(made), "id")))
    read = load_manifest(tmp_path)
    assert read.splits["train"] == split and read.source.files == files


def test_documents_far_behind_2_to_the_31_are_found_without_reading_the_index_whole(tmp_path: Path) -> None:
    """Row groups as a build writes them; tokens from 10^12 on."""
    (tmp_path / "train").mkdir()
    groups, size, length = 40, 1 << 12, 1000
    with pq.ParquetWriter(tmp_path / "train/documents.parquet", SCHEMA, write_statistics=["start"]) as writer:
        for group in range(groups):
            numbers = range(group * size, (group + 1) * size)
            columns = [
                pa.array([10**12 + i * length for i in numbers], pa.int64()), pa.array([length] * size, pa.int32()),
                pa.array([str(i) for i in numbers]), pa.array([""] * size), pa.array(["f"] * size),
                pa.array([2**40 + i for i in numbers], pa.int64()), pa.array([bytes(32)] * size, pa.binary(32)),
            ]  # fmt: skip
            writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
    at = 10**12 + 77_777 * length
    found = documents_between(tmp_path, "train", at + 500, at + 1500)
    assert [(d.id, d.row) for d in found] == [("77777", 2**40 + 77_777), ("77778", 2**40 + 77_778)]
