"""Which units are read in which order, and when to stop: pure functions of the source's files and the settings."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from prep.holdout import threshold
from prep.sources import UNIT_LINES, Unit, unit_after
from shared.permutation import Permutation

PIECE_BYTES = 32 << 20  # unpacked bytes, of all columns, that one step reads at most


@dataclass(frozen=True)
class Settings:
    """What a user asks for. Together with the source's files and the tokenizer this decides every byte."""

    train_sequences: int
    val_sequences: int
    sequence_length: int
    shard_tokens: int
    order: str
    seed: int
    unit_bytes: int

    def budget(self) -> dict[str, int]:
        """Tokens a split: S sequences of length T take S x T + 1, none without sequences."""
        wanted = {"train": self.train_sequences, "val": self.val_sequences}
        return {split: n * self.sequence_length + 1 if n else 0 for split, n in wanted.items()}

    def holdout_threshold(self) -> int:
        budget = self.budget()
        return threshold(budget["train"], budget["val"])

    def fields(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True, order=True)
class Cursor:
    """How far the reading has come: the place in `Plan.tracks`, and the row of that file to go on at."""

    track: int = 0
    row: int = 0


@dataclass(frozen=True)
class Step:
    """One piece of work: rows `row` ... `stop`-1 of the file, all in `unit`, which is number `track` of the plan."""

    track: int
    unit: Unit
    row: int
    stop: int

    @property
    def cursor(self) -> Cursor:
        return Cursor(self.track, self.row)


class Plan:
    """The units of a source in the order they are read.

    A *track* is a unit that can be reached by itself, or a whole file of .zst text, whose units can only be read one
    after another. With order "shuffled" the tracks are permuted (shared.permutation, tag "units/1", no data id), so
    that a source of parquet has its units permuted and one of .zst text its files.
    """

    def __init__(self, tracks: list[Unit], order: str, seed: int) -> None:
        if order == "shuffled" and tracks:
            places = Permutation(len(tracks), tag="units/1", data_id="", seed=seed)(range(len(tracks)))
            tracks = [tracks[place] for place in places]
        self.tracks = tracks
        self._ended: set[int] = set()  # tracks of .zst text whose end has been seen

    def steps(self, start: Cursor) -> Iterator[Step]:
        """All steps from `start` on; those of a .zst file until `ended` has been told of it."""
        for track in range(start.track, len(self.tracks)):
            unit = self.tracks[track]
            row = start.row if track == start.track else 0
            if unit.rows is not None:
                yield from _pieces(track, unit, max(row, unit.row), unit.row + unit.rows)
                continue
            unit = Unit(unit.file, row // UNIT_LINES * UNIT_LINES, None)
            while track not in self._ended:
                yield Step(track, unit, max(row, unit.row), unit.row + UNIT_LINES)
                unit = unit_after(unit)

    def ended(self, track: int) -> None:
        self._ended.add(track)

    def after(self, step: Step, next_row: int) -> Cursor:
        """Where the reading stands once `step` is done up to row `next_row`."""
        unit = step.unit
        last = step.track in self._ended if unit.rows is None else next_row == unit.row + unit.rows
        return Cursor(step.track + 1) if last else Cursor(step.track, next_row)


def _pieces(track: int, unit: Unit, row: int, stop: int) -> Iterator[Step]:
    """The rest of a unit, whole, or in parts that fit in memory where it is one very large row group."""
    parts = max(1, -(-unit.unpacked // PIECE_BYTES))
    size = max(1, -(-(unit.rows or 0) // parts))
    for first in range(row, stop, size):
        yield Step(track, unit, first, min(stop, first + size))
    if row == stop:  # an empty row group
        yield Step(track, unit, row, stop)
