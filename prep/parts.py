"""The distinct parts of texts, numbered, each with its ids: what prep.encoder looks parts up in.

A part is looked up by a 64-bit *key*, because a table of integers answers some three times as fast as one of strings.

- Of a part of at most 8 bytes the key is the part: its bytes as a little-endian integer, filled up with 0xFF.
- Of a longer one it is 0xFF + 256 x its number among the longer ones, which a table of strings gives.

No two parts share a key: 0xFF stands in no UTF-8, so that the filling tells the length of a short part, and a key whose
lowest byte is 0xFF belongs to a longer one.
"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from shared.tokenizer import SPACE

MAX_PARTS = 1 << 18  # remembered from block to block, and
LONG_PART = 64  # bytes of the longest, as longer ones are hardly ever seen again: together 16 MB at most
KEY_BYTES = 8
AT_ONCE = 1 << 16  # keys made in one go, so that what lies between stays in the processor's cache
FILL = 0xFF
FILLING = np.array([(1 << 64) - (1 << 8 * n) for n in range(KEY_BYTES + 1)], dtype=np.uint64)  # behind n bytes
Keys = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.int32]


class Parts:
    """Parts numbered from 0; the first `pinned` ones are never forgotten."""

    def __init__(self, pinned: int) -> None:
        self._pinned = pinned
        self._keys: Keys = np.empty(0, np.uint64)
        self._long = pa.array([], pa.binary())
        self._with_space = np.empty(0, np.int64)  # numbers of the parts that hold a literal U+2581
        self.ids = pa.array([], pa.binary())  # of each part, as little-endian uint16

    def __len__(self) -> int:
        return len(self.ids)

    def number(self, data: npt.NDArray[np.uint8], cuts: npt.NDArray[np.int32]) -> tuple[Numbers, list[bytes]]:
        """The number of every part of `data`, which begin at `cuts` (its end among them), and the new parts.

        The new ones have the numbers from len(self) on and wait for `add`.
        """
        keys = self._keys_of(data, cuts)
        encoded = _numbered(pa.array(self._keys), pa.array(keys))
        which, self._keys = encoded.indices.to_numpy(), encoded.dictionary.to_numpy()
        return which, self._bytes_of(self._keys[len(self) :])

    def add(self, new: list[bytes], ids: pa.Array) -> None:
        """Give the new parts that `number` returned their `ids`."""
        space = SPACE.encode()
        found = np.array([i for i, part in enumerate(new, len(self)) if space in part], dtype=np.int64)
        self._with_space = np.append(self._with_space, found)
        self.ids = pa.concat_arrays([self.ids, ids])
        assert len(self.ids) == len(self._keys)

    def any_with_space(self, which: Numbers) -> bool:
        """Whether any of the parts `which` holds a literal U+2581."""
        return len(self._with_space) > 0 and bool(np.isin(which, self._with_space).any())

    def trim(self, used: Numbers) -> None:
        """Forget the long parts, and when there are too many of all, those that are not among the `used` ones."""
        long = np.flatnonzero(_is_long(self._keys))
        sizes = pc.binary_length(self._long).to_numpy()
        keep = np.ones(len(self), dtype=np.bool_)
        keep[long] = sizes[_long_number(self._keys[long])] <= LONG_PART
        if keep.sum() > MAX_PARTS:
            lately = np.zeros(len(self), dtype=np.bool_)
            lately[used] = True
            keep &= lately
            if keep.sum() > MAX_PARTS:
                keep[:] = False
        keep[: self._pinned] = True
        if not keep.all():
            self._keep(keep)

    def _keep(self, keep: npt.NDArray[np.bool_]) -> None:
        self._keys, self.ids = self._keys[keep], self.ids.filter(pa.array(keep))
        moved = np.cumsum(keep) - 1
        self._with_space = moved[self._with_space[keep[self._with_space]]]
        long = np.flatnonzero(_is_long(self._keys))
        self._long = self._long.take(pa.array(_long_number(self._keys[long])))
        self._keys[long] = _long_keys(np.arange(len(long)))

    def _keys_of(self, data: npt.NDArray[np.uint8], cuts: npt.NDArray[np.int32]) -> Keys:
        keys, long = np.empty(len(cuts) - 1, np.uint64), []
        for first in range(0, len(keys), AT_ONCE):
            at = cuts[first : first + AT_ONCE + 1]
            lengths, at = np.diff(at), at[:-1]
            keys[first : first + len(at)] = _words(data, at) | FILLING[np.minimum(lengths, KEY_BYTES)]
            long.append(np.flatnonzero(lengths > KEY_BYTES) + first)
        where = np.concatenate(long)
        if len(where):
            parts = pa.Array.from_buffers(pa.binary(), len(keys), [None, pa.py_buffer(cuts), pa.py_buffer(data)])
            found = _numbered(self._long, parts.take(pa.array(where)))
            self._long = found.dictionary
            keys[where] = _long_keys(found.indices.to_numpy())
        return keys

    def _bytes_of(self, keys: Keys) -> list[bytes]:
        joined = keys.astype("<u8").tobytes()
        lengths = (np.frombuffer(joined, np.uint8).reshape(-1, KEY_BYTES) != FILL).sum(axis=1).tolist()
        parts = [joined[at : at + n] for at, n in zip(range(0, len(joined), KEY_BYTES), lengths, strict=True)]
        long = np.flatnonzero(_is_long(keys))
        for i, part in zip(long.tolist(), self._long.take(pa.array(_long_number(keys[long]))).to_pylist(), strict=True):
            parts[i] = part
        return parts


def _numbered(known: pa.Array, values: pa.Array) -> pa.DictionaryArray:
    """`values` as numbers into a dictionary that starts with `known`, so that each of those keeps its number."""
    encoded = pc.dictionary_encode(pa.chunked_array([known, values]))
    return encoded.chunk(encoded.num_chunks - 1)  # an empty one has no chunk


def _words(data: npt.NDArray[np.uint8], at: npt.NDArray[np.int32]) -> Keys:
    """The 8 bytes from each of the ascending positions on as little-endian integers, with 0xFF beyond the end."""
    words = np.empty(len(at), np.uint64)
    inside = int(np.searchsorted(at, len(data) - KEY_BYTES, side="right"))
    if inside:
        everywhere = np.ndarray((len(data) - KEY_BYTES + 1,), "<u8", data.data, strides=(1,))
        words[:inside] = everywhere[at[:inside]]
    for i in range(inside, len(at)):  # at most 7
        words[i] = int.from_bytes(data[at[i] :].tobytes().ljust(KEY_BYTES, b"\xff"), "little")
    return words


def _is_long(keys: Keys) -> npt.NDArray[np.bool_]:
    return np.asarray((keys & np.uint64(FILL)) == FILL)


def _long_keys(numbers: npt.NDArray[np.integer]) -> Keys:
    return (numbers.astype(np.uint64) << np.uint64(8)) | np.uint64(FILL)


def _long_number(keys: Keys) -> npt.NDArray[np.int64]:
    return (keys >> np.uint64(8)).astype(np.int64)
