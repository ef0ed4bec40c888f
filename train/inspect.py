"""`train inspect RUN --step N`: what a step sees, made or still to come, from the run's config and the data set alone.

Which sequences those are is a pure function of the step (order.py); the index of the data set says which documents
their tokens belong to. Nothing of this was logged, and no checkpoint is read.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shared.manifest import TOKENIZER, load_manifest, open_stream
from shared.passages import Passage, passages
from shared.terminal import printable
from shared.tokenizer import load_tokenizer
from train.order import Order
from train.run_folder import RunFolder


@dataclass(frozen=True)
class Row:
    """One row of a global batch: sequence number `sequence` of the train split, its T + 1 tokens by document."""

    sequence: int
    passages: list[Passage]


@dataclass(frozen=True)
class Seen:
    """What one step sees: the rows of its global batch, in order."""

    step: int
    rows: list[Row]

    def json(self) -> dict[str, Any]:
        """The object of --json. `documents` holds an object for each document of each row, in order.

        Of these, id to text_sha256 are the document's row in the index; first_token and last_token say which tokens of
        the split are read here; text is theirs.
        """
        documents = [
            {"sequence": row.sequence, **document_of(passage)} for row in self.rows for passage in row.passages
        ]
        return {"step": self.step, "sequences": [row.sequence for row in self.rows], "documents": documents}

    def lines(self) -> Iterator[str]:
        """The same for people: a line a row of the batch, with every document's origin and text."""
        for row in self.rows:
            first, last = row.passages[0].start, row.passages[-1].stop - 1
            yield " | ".join([f"sequence {row.sequence}", f"tokens {first} to {last}", *map(_told, row.passages)])


def inspect(path: Path, step: int, data: Path | None = None) -> Seen:
    """Look up a step of the run at `path`; `data` is where its data set is, if it has moved since the last start.

    ValueError when the run or its data set is not there, or when neither schedule nor data have such a step.
    """
    folder = RunFolder(path)
    facts = folder.facts()
    total = facts.config.schedule.total_steps
    if not 1 <= step <= total:
        raise ValueError(f"--step {step}: the schedule of {path} has the steps 1 to {total}")
    data = folder.data(data)
    manifest = load_manifest(data)
    if manifest.id != facts.data_id:
        raise ValueError(f"{data}: data set {manifest.id}, and {path} is of {facts.data_id}; give --data")
    order = Order(manifest.id, facts.config.seed, manifest.splits["train"].sequences, facts.config.batch.sequences)
    if step > order.steps:
        raise ValueError(f"--step {step}: {data} has the sequences of {order.steps} steps")
    length = manifest.sequence_length
    try:
        stream = open_stream(data, manifest, "train")
    except OSError as error:
        raise ValueError(f"{error.filename}: {error.strerror}; run python -m prep verify {data}") from None
    tokenizer = load_tokenizer(data / TOKENIZER, manifest.tokenizer.sha256)
    rows = []
    for i in order.indices(step).tolist():
        first = i * length
        rows.append(Row(i, passages(data, "train", stream, tokenizer, first, first + length + 1)))
    return Seen(step, rows)


def document_of(passage: Passage) -> dict[str, Any]:
    """A document as --json shows it."""
    return {
        **asdict(passage.document),
        "text_sha256": passage.document.text_sha256.hex(),
        "first_token": passage.start,
        "last_token": passage.stop - 1,
        "text": passage.text,
    }


def _told(passage: Passage) -> str:
    document = passage.document
    first, last = passage.start - document.start, passage.stop - 1 - document.start
    origin = f"{document.file} row {document.row}, tokens {first} to {last} of {document.length}"
    url = f" {document.url}" if document.url else ""
    text = json.dumps(passage.text, ensure_ascii=False)
    return printable(f"{document.id}{url} ({origin}) {text}").replace("\n", "\\n")  # a line, whatever the url holds
