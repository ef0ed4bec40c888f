"""Text -> ids: what SentencePiece gives, several times faster, by encoding each distinct part of the text once.

A *cut* between two neighbouring bytes is safe when no piece of the vocabulary has them side by side and the second one
starts a character. The ids of a text are then the ids of its parts, end to end. Proof, for a BPE model:

1. SentencePiece's BPE starts from single characters and merges two neighbouring symbols only when their concatenation
   is a piece. A symbol is a substring of the text, so a merge over a cut would give a piece with both bytes side by
   side, of which there is none. No merge ever crosses a cut.
2. It always takes the merge of highest score, the leftmost of equals. A merge changes only its own two neighbours,
   which lie in the same part. So the merges inside a part come in the same order whatever stands around it.
3. Characters outside the vocabulary become byte pieces one by one; nothing else looks at the neighbours.

1 needs a BPE model; 2 and 3 need byte fallback with all 256 byte pieces (without it SentencePiece joins neighbouring
unknowns), normal pieces only (user-defined ones are matched before the merges, unused ones are taken apart after them)
and the identity normalisation (another one may change bytes near a cut). `unsafe_reason` checks all of that on the
loaded model; one that fails is encoded whole by SentencePiece: the same answer, slower. See Sennrich et al., ACL 2016
(BPE) and Kudo and Richardson, EMNLP 2018 (SentencePiece).

The dummy prefix is a space before the text, and a part alone has none: parts are handed to SentencePiece joined by a
*guard*, a character that stands beside no other in any piece. Both of its sides are then safe cuts, so the ids between
two guards are the ids of the part between them.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from shared.sentencepiece_model import unsafe_reason
from shared.tokenizer import SPACE, Tokenizer, has_dummy_prefix, piece_bytes

BLOCK_BYTES = 32 << 20  # text that is cut and looked up at once: longer blocks have fewer distinct parts
CACHE_PARTS = 1 << 18  # distinct parts remembered from block to block, and
CACHE_BYTES = 16 << 20  # their bytes; both bound memory and never change what comes out
PINNED = 3  # the marks of <s> and </s> and the guard are always remembered
BATCH = 16  # distinct parts that one call of SentencePiece encodes
LONG_PART = 256  # longer parts are hardly ever seen again and are not remembered
GUARDS = "\n\t\r\x01\x02"
# Bytes that UTF-8 never has: they stand for <s> and </s> among the parts.
BOS_MARK, EOS_MARK = b"\xfe", b"\xff"
Ids = npt.NDArray[np.uint16]
Offsets = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Encoded:
    """The ids of some documents, `<s>` ids `</s>` each, end to end.

    `tokens` (N,) uint16; `offsets` (D+1,) int64 into it; `utf8_bytes` (D,) int64: the text behind each document's ids,
    the dummy prefix left out (shared.tokenizer.piece_bytes).
    """

    tokens: Ids
    offsets: Offsets
    utf8_bytes: npt.NDArray[np.int64]


class Encoder:
    """Encodes documents as `tokenizer` would, one call of SentencePiece a distinct part."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._processor = tokenizer.processor
        self._bos, self._eos = tokenizer.identity.bos_id, tokenizer.identity.eos_id
        self._piece_bytes = piece_bytes(tokenizer.processor)
        self._prefix = has_dummy_prefix(tokenizer.processor)
        self.slow_reason = unsafe_reason(tokenizer)  # why SentencePiece encodes whole documents here, if it does
        if self.slow_reason is not None:
            return
        guard = _find_guard(tokenizer)
        if tokenizer.processor.piece_to_id(SPACE) == tokenizer.identity.unk_id:
            self.slow_reason = "the space is no piece of its vocabulary"
            return
        if guard is None:
            self.slow_reason = "no character stands alone in its vocabulary"
            return
        self._guard = guard
        *prefix, self._guard_id = tokenizer.processor.encode(guard)
        self._guard_at = len(prefix)  # the dummy prefix's ids come before the first guard
        self._is_cut = pa.array(np.ascontiguousarray(~unsafe_pairs(tokenizer).T).reshape(-1).view(np.uint8))
        self._forget()

    def encode(self, texts: pa.Array) -> Encoded:
        """`texts`: string or large_string without nulls or empty ones. Memory: about 10 times BLOCK_BYTES on top."""
        if not len(texts):
            return Encoded(np.empty(0, np.uint16), np.zeros(1, np.int64), np.empty(0, np.int64))
        encode = self._encode_block if self.slow_reason is None else self._encode_whole
        blocks = [encode(block) for block in _blocks(texts)]
        if len(blocks) == 1:
            return blocks[0]
        shifts = np.cumsum([0, *(len(block.tokens) for block in blocks)])
        return Encoded(
            np.concatenate([block.tokens for block in blocks]),
            np.concatenate([[0], *(block.offsets[1:] + shift for block, shift in zip(blocks, shifts, strict=False))]),
            np.concatenate([block.utf8_bytes for block in blocks]),
        )

    def text_bytes(self, tokens: Ids) -> int:
        """Bytes of text behind the first tokens of a document, `<s>` among them (a document that is cut)."""
        prefix = self._prefix and len(tokens) > 1
        return int(self._piece_bytes[tokens].sum()) - prefix

    def reference(self, text: str) -> Ids:
        """The definition: plain SentencePiece on the whole text."""
        return np.array([self._bos, *self._processor.encode(text), self._eos], dtype=np.uint16)

    def _forget(self) -> None:
        # The distinct parts seen so far and their ids. The first three never leave.
        parts = [BOS_MARK, EOS_MARK, self._guard.encode()]
        ids = [self._bos, self._eos, self._guard_id]
        self._parts = pa.array(parts, pa.binary())
        self._ids = pa.array([np.array([i], dtype="<u2").tobytes() for i in ids], pa.binary())

    def _encode_block(self, texts: pa.Array) -> Encoded:
        framed = _framed(texts, BOS_MARK + (b" " if self._prefix else b""), EOS_MARK)
        data, starts = _data(framed)
        cuts = self._cuts(data, starts)
        parts = pa.Array.from_buffers(pa.binary(), len(cuts) - 1, [None, pa.py_buffer(cuts), pa.py_buffer(data)])
        # The known parts go first, so that each keeps its number and the new ones follow.
        encoded = pc.dictionary_encode(pa.chunked_array([self._parts, parts]))
        which, distinct = encoded.chunk(1).indices, encoded.chunk(1).dictionary
        if len(distinct) > len(self._parts):
            new = self._encode_parts(distinct.slice(len(self._parts)))
            self._parts, self._ids = distinct, pa.concat_arrays([self._ids, new])
        gathered = pc.take(self._ids, which, boundscheck=False)
        tokens, ends = _data(gathered)
        first_part = np.searchsorted(cuts, starts)  # the part that each document starts with, and one past the last
        offsets = ends[first_part].astype(np.int64) // 2
        ids = tokens.view("<u2")
        self._trim(which)
        return Encoded(ids, offsets, self._text_bytes(ids, offsets, data, starts))

    def _encode_whole(self, texts: pa.Array) -> Encoded:
        documents = [self.reference(text) for text in texts.to_pylist()]
        offsets = np.cumsum([0, *(len(ids) for ids in documents)])
        tokens = np.concatenate(documents)
        return Encoded(tokens, offsets, self._count_bytes(tokens, offsets))

    def _cuts(self, data: npt.NDArray[np.uint8], starts: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """Positions at which the parts of `data` begin, and its end."""
        n = len(data)
        is_cut = np.empty(n + 1, dtype=np.uint8)
        for shift in (0, 1):  # pairs (0, 1), (2, 3) ... and (1, 2), (3, 4) ...: a pair is a little-endian uint16
            pairs = data[shift : shift + (n - shift) // 2 * 2].view("<u2")
            is_cut[1 + shift : 1 + shift + 2 * len(pairs) : 2] = pc.take(
                self._is_cut, pa.array(pairs), boundscheck=False
            ).to_numpy()
        is_cut[0] = is_cut[n] = 1
        is_cut[starts] = 1
        return np.flatnonzero(is_cut.view(np.bool_)).astype(np.int32)

    def _encode_parts(self, parts: pa.Array) -> pa.Array:
        """The ids of distinct parts, as little-endian bytes: binary array -> binary array."""
        guard, raw = self._guard.encode(), parts.to_pylist()
        # Short texts, because SentencePiece keeps all possible merges of a text in one heap.
        texts = [(guard + guard.join(raw[i : i + BATCH])).decode() for i in range(0, len(raw), BATCH)]
        encoded = self._processor.encode(texts, num_threads=1)
        flat = itertools.chain.from_iterable(ids[self._guard_at :] for ids in encoded)
        ids = np.fromiter(flat, dtype="<u2")
        at = np.flatnonzero(ids == self._guard_id)
        # The guard is pinned, so it is none of these parts, and a one-byte character has its id to itself.
        assert len(at) == len(parts), "a guard inside a part"
        ends = np.append(at[1:], len(ids))
        lengths = ends - at - 1
        keep = np.repeat(at + 1 - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())
        offsets = np.concatenate([[0], np.cumsum(lengths) * 2]).astype(np.int32)
        return pa.Array.from_buffers(
            pa.binary(), len(parts), [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(ids[keep]))]
        )

    def _trim(self, used: pa.Array) -> None:
        """Keep the cache inside its bounds: long parts go at once, the ones the latest block did not use when full."""
        lengths = np.diff(_data(self._parts)[1])
        keep = lengths <= LONG_PART
        if len(keep) > CACHE_PARTS or lengths.sum() > CACHE_BYTES:
            lately = np.zeros(len(keep), dtype=np.bool_)
            lately[used.to_numpy()] = True
            keep &= lately
            if keep.sum() > CACHE_PARTS or lengths[keep].sum() > CACHE_BYTES:
                keep[:] = False
        keep[:PINNED] = True
        if not keep.all():
            self._parts, self._ids = self._parts.filter(pa.array(keep)), self._ids.filter(pa.array(keep))

    def _text_bytes(
        self, ids: Ids, offsets: Offsets, data: npt.NDArray[np.uint8], starts: npt.NDArray[np.int32]
    ) -> npt.NDArray[np.int64]:
        """Bytes of text a document: all of its bytes, but a literal U+2581 counts as the space that its id says."""
        if data.tobytes().find(SPACE.encode()) >= 0:
            return self._count_bytes(ids, offsets)
        frame = len(BOS_MARK) + len(EOS_MARK) + (1 if self._prefix else 0)
        return np.diff(starts).astype(np.int64) - frame

    def _count_bytes(self, ids: Ids, offsets: Offsets) -> npt.NDArray[np.int64]:
        sums = np.add.reduceat(self._piece_bytes[ids], offsets[:-1])
        return np.asarray(sums - (1 if self._prefix else 0), dtype=np.int64)


def unsafe_pairs(tokenizer: Tokenizer) -> npt.NDArray[np.bool_]:
    """(256, 256) bool: [a, b] is True where byte b must not be cut from byte a before it.

    So it is when b continues a character, or a piece has a character that ends in a right before one that starts with
    b. U+2581 in a piece stands for a space or for itself.
    """
    unsafe = np.zeros((256, 256), dtype=np.bool_)
    unsafe[:, 0x80:0xC0] = True
    for piece in _normal_pieces(tokenizer):
        forms = [(b" ", character.encode()) if character == SPACE else (character.encode(),) for character in piece]
        for left, right in itertools.pairwise(forms):
            for a in left:
                for b in right:
                    unsafe[a[-1], b[0]] = True
    # The marks of <s> and </s> belong to no character: cut on both sides.
    for mark in (BOS_MARK[0], EOS_MARK[0]):
        unsafe[mark, :] = unsafe[:, mark] = False
    return unsafe


def _normal_pieces(tokenizer: Tokenizer) -> list[str]:
    p = tokenizer.processor
    ids = range(p.vocab_size())
    return [p.id_to_piece(i) for i in ids if not (p.is_byte(i) or p.is_control(i) or p.is_unknown(i))]


def _find_guard(tokenizer: Tokenizer) -> str | None:
    """An ASCII character that no piece has beside another one."""
    joined = set("".join(piece for piece in _normal_pieces(tokenizer) if len(piece) > 1))
    return next((c for c in GUARDS if c not in joined), None)


def _blocks(texts: pa.Array) -> list[pa.Array]:
    """Consecutive documents of at most BLOCK_BYTES each, or a single longer one."""
    if isinstance(texts, pa.ChunkedArray):
        return [block for chunk in texts.chunks for block in _blocks(chunk)]
    starts = _offsets(texts)
    blocks, first = [], 0
    while first < len(texts):
        stop = int(np.searchsorted(starts, starts[first] + BLOCK_BYTES, side="right")) - 1
        stop = max(first + 1, min(stop, len(texts)))
        blocks.append(texts.slice(first, stop - first))
        first = stop
    return blocks


def _framed(texts: pa.Array, before: bytes, after: bytes) -> pa.Array:
    """Every text with `before` and `after` around it: binary, 32-bit offsets."""
    raw = texts.cast(pa.large_binary()).cast(pa.binary()) if pa.types.is_large_string(texts.type) else texts
    raw = raw.cast(pa.binary())
    return pc.binary_join_element_wise(pa.scalar(before), raw, pa.scalar(after), pa.scalar(b""))


def _offsets(array: pa.Array) -> npt.NDArray[np.int64]:
    large = pa.types.is_large_string(array.type) or pa.types.is_large_binary(array.type)
    width = np.dtype("<i8" if large else "<i4")
    return np.frombuffer(array.buffers()[1], dtype=width)[array.offset : array.offset + len(array) + 1]


def _data(array: pa.Array) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32]]:
    """The bytes of a binary array, and where each value starts in them, the end among it: (N,) uint8, (D+1,) int32."""
    offsets = _offsets(array)
    first, last = int(offsets[0]), int(offsets[-1])
    data = np.frombuffer(array.buffers()[2], dtype=np.uint8)[first:last]
    return data, (offsets - first).astype(np.int32, copy=False)
