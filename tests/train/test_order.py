"""The order is a pure function of (data id, seed, step), uses each sequence once, and ranks share a batch out."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.shards import Shard, TokenStream, shard_bytes, shard_header
from train.order import Order, rows

ZEROS = "0" * 64


def test_the_order_of_the_full_job_starts_with_the_golden_values() -> None:
    order = Order(ZEROS, 0, 1_920_000, 2)
    assert order.indices(1).tolist() + order.indices(2).tolist() == [1240725, 1565439, 796866, 213359]


@given(st.integers(1, 200), st.integers(1, 16), st.integers(0, 2**63))
def test_every_sequence_is_used_once_and_whole_batches_only(sequences: int, batch: int, seed: int) -> None:
    order = Order(ZEROS, seed, sequences, batch)
    seen = [i for step in range(1, order.steps + 1) for i in order.indices(step).tolist()]
    assert len(seen) == len(set(seen)) == sequences // batch * batch
    assert all(0 <= i < sequences for i in seen)


@given(st.integers(1, 9), st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_ranks_interleave_to_the_global_batch(step: int, world_size: int) -> None:
    order = Order(ZEROS, 7, 120, 12)
    whole = order.indices(step)
    shares = np.empty_like(whole)
    for rank in range(world_size):
        shares[rank::world_size] = order.indices(step, rank, world_size)
    assert (shares == whole).all()


def test_seed_and_data_id_both_shape_the_order() -> None:
    orders = [Order(data, seed, 1000, 100).indices(3).tolist() for data in (ZEROS, "1" * 64) for seed in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize("step", [0, 11, -1])
def test_there_is_no_step_beyond_the_split(step: int) -> None:
    with pytest.raises(IndexError):
        Order(ZEROS, 0, 109, 10).indices(step)


def test_too_few_sequences_are_refused_with_both_numbers() -> None:
    order = Order(ZEROS, 0, 109, 10)
    order.require(10)
    with pytest.raises(ValueError, match=r"110 sequences, the train split has 109 .*--steps 10 "):
        order.require(11)


def test_rows_overlap_by_one_token_and_cross_shards(tmp_path: Path) -> None:
    tokens = np.arange(41, dtype="<u2")
    for name, part in (("a.npy", tokens[:13]), ("b.npy", tokens[13:])):
        (tmp_path / name).write_bytes(shard_header(len(part)) + part.tobytes())
    stream = TokenStream(tmp_path, [Shard("a.npy", 13, shard_bytes(13), ""), Shard("b.npy", 28, shard_bytes(28), "")])
    got = rows(stream, np.array([1, 0, 9]), 4)
    assert got.dtype == np.int64
    assert got.tolist() == [[4, 5, 6, 7, 8], [0, 1, 2, 3, 4], [36, 37, 38, 39, 40]]
    assert rows(stream, np.array([3]), 4).tolist() == [[12, 13, 14, 15, 16]]
