"""What stands at a token or in a sequence: the decoded text, and the documents and source rows that it comes from."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.index import documents_between
from shared.manifest import TOKENIZER, load_manifest, open_stream
from shared.passages import Passage, passages
from shared.terminal import printable
from shared.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class View:
    """What was asked for. Of a token: its document, whole. Of a sequence: a part for each document in it.

    `framed` is the text of all parts with `<s>` and `</s>` where they stand in the stream; `piece` is the token's.
    """

    split: str
    token: int
    sequence: int
    of_sequence: bool
    piece: str
    parts: list[Passage]
    framed: str

    def json(self) -> dict[str, Any]:
        """The keys of --json. `document` is the token's, or the list of a sequence's; `text` is theirs."""
        documents = [{**asdict(part.document), "text_sha256": part.document.text_sha256.hex()} for part in self.parts]
        return {
            "split": self.split,
            "token": self.token,
            "sequence": self.sequence,
            "document": documents if self.of_sequence else documents[0],
            "text": self.framed if self.of_sequence else self.parts[0].text,
        }

    def lines(self) -> Iterator[str]:
        """The same for people: where it is, then each document's origin and its text."""
        return map(printable, self._lines())

    def _lines(self) -> Iterator[str]:
        if self.of_sequence:
            yield f"{self.split} sequence {self.sequence}: tokens {self.token} to {self.parts[-1].stop - 1}"
        else:
            place = self.token - self.parts[0].start
            here = f"token {place} of its document, in sequence {self.sequence}"
            yield f"{self.split} token {self.token}: {self.piece!r}, {here}"
        for part in self.parts:
            document, first = part.document, part.start - part.document.start
            yield ""
            yield f"document {document.id}"
            yield f"url {document.url}"
            yield f"source {document.file} row {document.row}"
            yield f"tokens {first} to {part.stop - 1 - document.start} of its {document.length}"
            yield ""
            yield part.text


def inspect(folder: Path, split: str, *, token: int | None = None, sequence: int | None = None) -> View:
    """Look up a token, or a sequence of T + 1 tokens, of a split. ValueError when there is no such thing."""
    assert (token is None) != (sequence is None)
    manifest = load_manifest(folder)
    length = manifest.sequence_length
    try:
        stream = open_stream(folder, manifest, split)
    except OSError as error:
        raise ValueError(f"{error.filename}: {error.strerror}; run prep verify {folder}") from None
    tokenizer = load_tokenizer(folder / TOKENIZER, manifest.tokenizer.sha256)
    sequences = manifest.splits[split].sequences
    if sequence is not None:
        _require_within(folder, split, "sequence", sequence, sequences)
        token = sequence * length
        start, stop = token, token + length + 1
    else:
        assert token is not None
        _require_within(folder, split, "token", token, len(stream))
        start, stop = token, token + 1
        for document in documents_between(folder, split, token, token + 1):  # one; `passages` tells if there is none
            start, stop = document.start, document.start + document.length
    parts = passages(folder, split, stream, tokenizer, start, stop)
    return View(
        split=split,
        token=token,
        sequence=min(token // length, sequences - 1),  # the last token is a label only
        of_sequence=sequence is not None,
        piece=tokenizer.processor.id_to_piece(int(stream[token : token + 1][0])),
        parts=parts,
        framed="".join(_framed(tokenizer, part.text, stream[part.start : part.stop]) for part in parts),
    )


def _framed(tokenizer: Tokenizer, text: str, ids: npt.NDArray[np.uint16]) -> str:
    bos, eos = tokenizer.identity.bos_id, tokenizer.identity.eos_id
    before = tokenizer.processor.id_to_piece(bos) if ids[0] == bos else ""
    after = tokenizer.processor.id_to_piece(eos) if ids[-1] == eos else ""
    return before + text + after


def _require_within(folder: Path, split: str, what: str, number: int, count: int) -> None:
    if not 0 <= number < count:
        raise ValueError(f"{folder}: {split} has no {what} {number}, only 0 to {count - 1}")
