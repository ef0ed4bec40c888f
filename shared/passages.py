"""What stands in a stretch of a split: the documents it is made of, and the text of each part, decoded."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from sentencepiece import SentencePieceProcessor

from shared.index import Document, documents_between
from shared.shards import TokenStream
from shared.tokenizer import SPACE, Tokenizer, has_dummy_prefix


@dataclass(frozen=True)
class Passage:
    """Tokens `start` ... `stop`-1 of a split, all of one document, and their text without `<s>` and `</s>`."""

    document: Document
    start: int
    stop: int
    text: str


def passages(
    folder: Path, split: str, stream: TokenStream, tokenizer: Tokenizer, start: int, stop: int
) -> list[Passage]:
    """Tokens start ... stop-1 of a split, a passage for each document that owns some. ValueError on a bad index."""
    documents = documents_between(folder, split, start, stop)
    if not documents:
        raise ValueError(f"{folder}: its index has no document at token {start} of {split}; run prep verify {folder}")
    found = []
    for document in documents:
        a, b = max(start, document.start), min(stop, document.start + document.length)
        found.append(Passage(document, a, b, decode(tokenizer, stream[a:b], a - document.start)))
    return found


def decode(tokenizer: Tokenizer, ids: npt.NDArray[np.uint16], place: int) -> str:
    """The text of ids that may begin and end anywhere in a document; the first is token `place` of it.

    SentencePiece's own decoding drops a space at the start of what it is given. Here it is dropped from the document's
    first piece, token 1, and nowhere else. Bytes that are no whole character, at a cut, and unknown ids give U+FFFD.
    """
    text = b"".join(_bytes_of(tokenizer.processor, i) for i in ids.tolist()).decode(errors="replace")
    return text.removeprefix(" ") if place <= 1 and has_dummy_prefix(tokenizer.processor) else text


def _bytes_of(processor: SentencePieceProcessor, i: int) -> bytes:
    if processor.is_control(i):
        return b""
    if processor.is_unknown(i):
        return "\ufffd".encode()
    piece: str = processor.id_to_piece(i)
    return bytes([int(piece[3:5], 16)]) if processor.is_byte(i) else piece.replace(SPACE, " ").encode()
