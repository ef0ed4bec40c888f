"""What a SentencePiece .model file says of itself that the library's own interface does not tell.

The file is a protocol buffer (sentencepiece_model.proto, ModelProto). Only a handful of its fields are needed, so they
are read off the wire format (protobuf.dev/programming-guides/encoding) and the protobuf package is not.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from shared.tokenizer import Tokenizer

BPE = 2
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
PIECES, TRAINER, NORMALIZER = 1, 2, 3  # fields of ModelProto
PIECE_TEXT, PIECE_SCORE, PIECE_TYPE = 1, 2, 3
SCORE_KEY = PIECE_SCORE << 3 | 5  # a key is a field's number and its wire type: 2 has a length, 5 has four bytes
MODEL_TYPE, BYTE_FALLBACK, WHITESPACE_SUFFIX = 3, 35, 24  # of TrainerSpec
CHARSMAP, STRIP_SPACES, ESCAPE_SPACES = 2, 4, 5  # of NormalizerSpec


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; `type` is a number of ModelProto.SentencePiece.Type (NORMAL, UNKNOWN, ...)."""

    text: str
    score: float  # exactly an fp32
    type: int


def pieces(model: bytes) -> list[Piece]:
    """The vocabulary of a .model file's bytes, by id."""
    found = []
    for field, value in _fields(model):
        if field == PIECES and isinstance(value, bytes):
            entry = dict(_fields(value))
            text, score, kind = entry[PIECE_TEXT], entry.get(PIECE_SCORE, bytes(4)), entry.get(PIECE_TYPE, NORMAL)
            assert isinstance(text, bytes) and isinstance(score, bytes) and isinstance(kind, int)
            found.append(Piece(text.decode(), struct.unpack("<f", score)[0], kind))
    return found


def unsafe_reason(tokenizer: Tokenizer) -> str | None:
    """Why a text's ids are not the plain result of merging its characters by score; None when they are.

    What prep.encoder proves, and what llama.cpp does with a vocabulary, holds for models without such a reason.
    """
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    types = []
    for field, value in _fields(tokenizer.model):
        if field == PIECES and isinstance(value, bytes):
            types.append(_type_of(value))
        elif field == TRAINER and isinstance(value, bytes):
            trainer.update(_fields(value))
        elif field == NORMALIZER and isinstance(value, bytes):
            normalizer.update(_fields(value))
    checks = {
        "it is not a BPE model": trainer.get(MODEL_TYPE, 1) != BPE,
        "it has no byte fallback": not trainer.get(BYTE_FALLBACK, 0) or types.count(BYTE) != 256,
        "it marks spaces behind words": bool(trainer.get(WHITESPACE_SUFFIX, 0)),
        "it normalises text": bool(normalizer.get(CHARSMAP)),
        "it strips spaces": bool(normalizer.get(STRIP_SPACES, 1)),
        "it does not escape spaces": not normalizer.get(ESCAPE_SPACES, 1),
        "it has user-defined or unused pieces": bool(set(types) - {NORMAL, UNKNOWN, CONTROL, BYTE}),
    }
    return next((reason for reason, fails in checks.items() if fails), None)


def _type_of(piece: bytes) -> int | bytes:
    """The type that a piece's message states. Most end after a short text and a score, which shows without parsing."""
    if piece[1] < 0x80 and piece[1] == len(piece) - 7 and piece[0] == PIECE_TEXT << 3 | 2 and piece[-5] == SCORE_KEY:
        return NORMAL
    return dict(_fields(piece)).get(PIECE_TYPE, NORMAL)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of one message: an int for varints, bytes for all else."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        else:
            size = {1: 8, 5: 4}[kind]
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    if data[at] < 0x80:  # nearly always
        return data[at], at + 1
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
