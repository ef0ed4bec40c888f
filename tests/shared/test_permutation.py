"""The order of everything rests on this permutation, so its values are fixed here."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.permutation import Permutation

ZEROS = "0" * 64


def test_golden_values_of_the_design() -> None:
    small = Permutation(10, tag="order/1", data_id=ZEROS, seed=0)
    assert small(range(10)).tolist() == [1, 7, 2, 0, 4, 6, 9, 3, 5, 8]
    job = Permutation(1_920_000, tag="order/1", data_id=ZEROS, seed=0)
    assert job(range(4)).tolist() == [1240725, 1565439, 796866, 213359]


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**40))
def test_every_element_comes_exactly_once(n: int, seed: int) -> None:
    assert sorted(Permutation(n, tag="t", data_id="", seed=seed)(np.arange(n))) == list(range(n))


@given(n=st.integers(1, 2**40), data=st.data())
def test_one_position_alone_equals_the_same_position_in_an_array(n: int, data: st.DataObject) -> None:
    positions = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20))
    permutation = Permutation(n, tag="t", data_id="x", seed=1)
    assert permutation(positions).tolist() == [permutation[p] for p in positions]


def test_tag_data_id_and_seed_each_change_the_order() -> None:
    def order(tag: str, data_id: str, seed: int) -> list[int]:
        return Permutation(1000, tag=tag, data_id=data_id, seed=seed)(range(1000)).tolist()  # type: ignore[no-any-return]

    assert len({tuple(order(*key)) for key in [("a", "b", 0), ("b", "b", 0), ("a", "c", 0), ("a", "b", 1)]}) == 4


def test_a_position_outside_is_refused() -> None:
    with pytest.raises(IndexError):
        Permutation(10, tag="t", data_id="", seed=0)[10]
