"""A SentencePiece model and its identity. SentencePiece is the definition of what ids a text has."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from sentencepiece import SentencePieceProcessor

SPACE = "\u2581"  # how SentencePiece writes a space inside a piece
MAX_VOCABULARY = 1 << 16  # ids are stored as uint16


@dataclass(frozen=True)
class Identity:
    """What the manifest says of a tokenizer."""

    sha256: str
    vocab_size: int
    unk_id: int
    bos_id: int
    eos_id: int


@dataclass(frozen=True)
class Tokenizer:
    """A loaded model, its bytes as they were on disk, and its identity."""

    processor: SentencePieceProcessor
    model: bytes
    identity: Identity


def load_tokenizer(path: Path, sha256: str | None = None) -> Tokenizer:
    """Load a .model file. ValueError when it is unreadable, not the one of `sha256`, or cannot frame documents."""
    try:
        model = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot read the tokenizer: {error.strerror or error}") from None
    digest = hashlib.sha256(model).hexdigest()
    if sha256 is not None and digest != sha256:
        raise ValueError(f"{path}: sha256 is {digest}, expected {sha256}; this is another tokenizer or a damaged file")
    try:
        processor = SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise ValueError(f"{path}: not a SentencePiece model ({error})") from None
    identity = Identity(
        sha256=digest,
        vocab_size=processor.vocab_size(),
        unk_id=processor.unk_id(),
        bos_id=processor.bos_id(),
        eos_id=processor.eos_id(),
    )
    for name, value in (("bos", identity.bos_id), ("eos", identity.eos_id)):
        if value < 0:
            raise ValueError(f"{path}: the model has no {name} piece, so documents could not be told apart")
    if identity.vocab_size > MAX_VOCABULARY:
        raise ValueError(f"{path}: {identity.vocab_size} pieces do not fit 16-bit ids (at most {MAX_VOCABULARY})")
    return Tokenizer(processor, model, identity)


def piece_bytes(processor: SentencePieceProcessor) -> npt.NDArray[np.int64]:
    """Bytes of text that each id stands for, (vocab,): the denominator of bits per byte.

    A control or unknown id counts 0, a byte piece 1, any other its UTF-8 length with U+2581 as a space.
    """
    ids = list(range(processor.vocab_size()))  # a list at a time: a call for each id takes ten times as long
    sizes = np.array([len(piece.replace(SPACE, " ").encode()) for piece in processor.id_to_piece(ids)], dtype=np.int64)
    sizes[np.array(processor.is_byte(ids))] = 1
    sizes[np.array(processor.is_control(ids)) | np.array(processor.is_unknown(ids))] = 0
    return sizes


def has_dummy_prefix(processor: SentencePieceProcessor) -> bool:
    """Whether the model puts a space before every text, which its first piece then holds."""
    return bool(processor.encode("a", out_type=str)[0].startswith(SPACE))
