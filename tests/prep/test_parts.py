"""Every distinct part has one number, from block to block, whatever bytes it is made of."""

import itertools

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prep import parts as parts_module
from prep.parts import Parts

# Bytes that keys could be confused by: zero, small counts, what fills up a key, and the marks that are parts alone.
PART = st.one_of(
    st.binary(min_size=1, max_size=20),
    st.lists(st.sampled_from([b"\0", b"\x01", b"\x08", b"a", b"\xfe"]), min_size=1, max_size=11).map(b"".join),
    st.sampled_from(["\u2581".encode(), "a\u2581".encode(), b"x" * 60 + "\u2581".encode()]),
).map(lambda part: part.replace(b"\xff", b"\xfe"))
BLOCKS = st.lists(st.lists(PART, min_size=1, max_size=30), min_size=1, max_size=5)


def number(parts: Parts, block: list[bytes]) -> tuple[list[int], list[bytes]]:
    """Number the parts of a block and add the new ones, each with itself in the place of its ids."""
    cuts = np.array([0, *itertools.accumulate(map(len, block))], np.int32)
    which, new = parts.number(np.frombuffer(b"".join(block), np.uint8), cuts)
    if new:
        parts.add(new, pa.array(new, pa.binary()))
    return which.tolist(), new


@settings(max_examples=300, deadline=None)
@given(blocks=BLOCKS)
def test_a_number_stands_for_the_same_bytes_in_every_block(blocks: list[list[bytes]]) -> None:
    parts = Parts(pinned=0)
    seen: set[bytes] = set()
    for block in blocks:
        which, new = number(parts, block)
        assert [parts.ids[i].as_py() for i in which] == block
        assert len(new) == len(set(new)) and set(new) == set(block) - seen
        seen |= set(block)
        spaced = any("\u2581".encode() in part for part in block)
        assert parts.any_with_space(np.array(which, np.int32)) == spaced


@settings(max_examples=300, deadline=None)
@given(blocks=BLOCKS, most=st.integers(1, 12), longest=st.integers(1, 30))
def test_what_is_forgotten_changes_no_number_that_is_given_afterwards(
    blocks: list[list[bytes]], most: int, longest: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts_module, "MAX_PARTS", most)
        patch.setattr(parts_module, "LONG_PART", longest)
        parts = Parts(pinned=1)
        number(parts, [b"pinned"])
        for block in blocks:
            which, _ = number(parts, block)
            assert [parts.ids[i].as_py() for i in which] == block
            spaced = any("\u2581".encode() in part for part in block)
            assert parts.any_with_space(np.array(which, np.int32)) == spaced
            parts.trim(np.array(which, np.int32))
            assert len(parts) <= most + 1 and parts.ids[0].as_py() == b"pinned"
            assert all(len(part) <= max(longest, parts_module.KEY_BYTES) for part in parts.ids[1:].to_pylist())
