"""A stateless seeded permutation of 0 ... n-1: what comes at position i is a pure function of (tag, data id, seed, n).

An 8-round balanced Feistel network over uint64 with cycle walking (Black and Rogaway, "Ciphers with arbitrary finite
domains", CT-RSA 2002). Round keys are the SHA-512 of "tag:data_id:seed" read as eight little-endian uint64; the round
function is splitmix64's finaliser. Nothing is stored, so resuming at any position costs nothing and no element can be
seen twice: a Feistel network is a bijection on 2^(2h) values, and walking a cycle until it re-enters 0 ... n-1 is a
bijection on those.
"""

import hashlib

import numpy as np
import numpy.typing as npt

ROUNDS = 8


class Permutation:
    """The permutation of 0 ... n-1 that (tag, data_id, seed) names.

    `permutation[i]` maps one position; `permutation(positions)` maps an array of them, int64 in, int64 out.
    """

    def __init__(self, n: int, *, tag: str, data_id: str, seed: int) -> None:
        if n < 1:
            raise ValueError(f"a permutation needs at least 1 element, not {n}")
        self.n = n
        digest = hashlib.sha512(f"{tag}:{data_id}:{seed}".encode()).digest()
        self._keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
        half = max(1, ((n - 1).bit_length() + 1) // 2)
        self._half = np.uint64(half)
        self._mask = np.uint64((1 << half) - 1)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, position: int) -> int:
        return int(self(np.array([position]))[0])

    def __call__(self, positions: npt.ArrayLike) -> npt.NDArray[np.int64]:
        values = np.asarray(positions, dtype=np.int64)
        if values.size and not (values.min() >= 0 and values.max() < self.n):
            raise IndexError(f"positions must lie in 0 ... {self.n - 1}")
        out = self._rounds(values.astype(np.uint64))
        outside = np.flatnonzero(out >= self.n)
        while outside.size:  # the domain is at most 4n, so this walks few steps
            out.flat[outside] = self._rounds(out.flat[outside])
            outside = outside[out.flat[outside] >= self.n]
        return out.astype(np.int64)

    def _rounds(self, x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = x >> self._half, x & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & self._mask)
        return (left << self._half) | right


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64's finaliser (Steele, Lea and Flood, OOPSLA 2014), modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
