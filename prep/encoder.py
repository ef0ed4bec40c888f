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

from prep.parts import Parts
from shared.sentencepiece_model import unsafe_reason
from shared.tokenizer import SPACE, Tokenizer, has_dummy_prefix, piece_bytes

BLOCK_BYTES = 32 << 20  # text that is cut and looked up at once: longer blocks have fewer distinct parts
BATCH = 16  # distinct parts that one call of SentencePiece encodes
GUARDS = "\n\t\r\x01\x02"
# Bytes that UTF-8 never has: they stand for <s> and </s> among the parts. (0xFF has a meaning in prep.parts.)
BOS_MARK, EOS_MARK = b"\xfd", b"\xfe"
NO_BYTE = b"\xff"  # nor has it this one
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
        if tokenizer.processor.piece_to_id(SPACE) == tokenizer.identity.unk_id:
            self.slow_reason = "the space is no piece of its vocabulary"
            return
        unsafe = unsafe_pairs(tokenizer)
        guard = _find_guard(unsafe)
        if guard is None:
            self.slow_reason = "no character stands alone in its vocabulary"
            return
        self._guard = guard
        *prefix, self._guard_id = tokenizer.processor.encode(guard)
        self._guard_at = len(prefix)  # the dummy prefix's ids come before the first guard
        self._is_cut = pa.array(np.ascontiguousarray(~unsafe.T).reshape(-1).view(np.uint8))
        self._parts = Parts(pinned=3)
        for part, i in ((BOS_MARK, self._bos), (EOS_MARK, self._eos), (self._guard.encode(), self._guard_id)):
            self._parts.number(np.frombuffer(part, np.uint8), np.array([0, len(part)], np.int32))
            self._parts.add([part], pa.array([np.array([i], "<u2").tobytes()], pa.binary()))

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

    def _encode_block(self, texts: pa.Array) -> Encoded:
        framed = _framed(texts, BOS_MARK + (b" " if self._prefix else b""), EOS_MARK)
        data, starts = _data(framed)
        cuts = self._cuts(data, starts)
        which, new = self._parts.number(data, cuts)
        if new:
            self._parts.add(new, self._encode_parts(new))
        tokens, ends = _data(pc.take(self._parts.ids, pa.array(which), boundscheck=False))
        first_part = np.searchsorted(cuts, starts)  # the part that each document starts with, and one past the last
        offsets = ends[first_part].astype(np.int64) // 2
        ids = tokens.view("<u2")
        if self._parts.any_with_space(which):  # a literal U+2581 counts as the space that its id says
            utf8_bytes = self._count_bytes(ids, offsets)
        else:
            frame = len(BOS_MARK) + len(EOS_MARK) + (1 if self._prefix else 0)
            utf8_bytes = np.diff(starts).astype(np.int64) - frame
        self._parts.trim(which)
        return Encoded(ids, offsets, utf8_bytes)

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

    def _encode_parts(self, parts: list[bytes]) -> pa.Array:
        """The ids of distinct parts, as little-endian uint16: binary array."""
        guard = self._guard.encode()
        # Short texts, because SentencePiece keeps all possible merges of a text in one heap.
        texts = [(guard + guard.join(parts[i : i + BATCH])).decode() for i in range(0, len(parts), BATCH)]
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
    pieces = NO_BYTE.join(piece.encode() for piece in _normal_pieces(tokenizer))
    literal = SPACE.encode()
    for joined in (pieces, pieces.replace(literal, b" ")):
        data = np.frombuffer(joined, dtype=np.uint8)
        unsafe[data[:-1], data[1:]] = True
    if unsafe[ord(" "), ord(" ")]:  # of two neighbours, either may be the space and the other one literal
        unsafe[ord(" "), literal[0]] = unsafe[literal[-1], ord(" ")] = True
    # The marks of <s> and </s> belong to no character: cut on both sides. (NO_BYTE stood between two pieces.)
    for mark in (*BOS_MARK, *EOS_MARK, *NO_BYTE):
        unsafe[mark, :] = unsafe[:, mark] = False
    return unsafe


def _normal_pieces(tokenizer: Tokenizer) -> list[str]:
    p, ids = tokenizer.processor, list(range(tokenizer.identity.vocab_size))
    others = zip(p.is_byte(ids), p.is_control(ids), p.is_unknown(ids), strict=True)
    return [piece for piece, other in zip(p.id_to_piece(ids), others, strict=True) if not any(other)]


def _find_guard(unsafe: npt.NDArray[np.bool_]) -> str | None:
    """An ASCII character that no piece has beside another one: `unsafe_pairs` has it safe on both sides."""
    starts = np.r_[0:0x80, 0xC0:0x100]  # bytes that start a character
    return next((c for c in GUARDS if not unsafe[ord(c), starts].any() and not unsafe[:, ord(c)].any()), None)


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
