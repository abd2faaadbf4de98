"""From records to the rows of a table: learning rates chosen, means and spreads over seeds, the winner and its ties."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from benchmarks.quality.grid import CONTROL, DEFAULT
from benchmarks.quality.record import Record
from benchmarks.quality.trial import unequal
from bitconvert.errors import UsageError

RATIO, CONTROL_RATIO = "ppl_ratio", "control_ratio"
MEASURES = (RATIO, CONTROL_RATIO, "kl", "top1_agreement", "bits_per_byte", "ppl")


@dataclass(frozen=True)
class Spread:
    """A number over seeds.

    Attributes:
        values: one per seed, in the order of the seeds.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Of the seeds."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float:
        """Standard deviation between seeds (n - 1); 0 for a single one, which tells nothing of it."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0


@dataclass(frozen=True)
class Row:
    """A cell on a bed, with its best learning rate.

    Attributes:
        cell: its name.
        about: what it is.
        lr: the rate chosen; None where every training failed.
        tries: ppl of the first seed on the watched text by learning rate, rising; None for a training that failed.
        records: those of the chosen rate, by seed; those that failed too.
        numbers: by the names in MEASURES, over the seeds whose training did not fail. ``control_ratio`` is the ppl
            over that of the control of the same seed; missing without one, and from the control itself.
        failures: what became of the trainings that failed, at any rate.
        mark: "best", "tied" with it, or "".
    """

    cell: str
    about: str
    lr: float | None
    tries: dict[float, float | None]
    records: tuple[Record, ...]
    numbers: dict[str, Spread]
    failures: tuple[str, ...]
    mark: str = ""

    @property
    def at_edge(self) -> bool:
        """Whether a rate beyond those that were tried might have been better still."""
        return self.lr is not None and len(self.tries) > 1 and self.lr in (min(self.tries), max(self.tries))

    @property
    def place(self) -> float:
        """What rows are sorted by: the ratio to the original; those without one come last."""
        return self.numbers[RATIO].mean if self.numbers else math.inf


def by_bed(records: Iterable[Record], cells: Collection[str] = ()) -> dict[str, list[Record]]:
    """The records of some cells, or of all, by bed; without beds on which control and default stand alone."""
    beds: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if not cells or record.cell in cells:
            beds[record.bed].append(record)
    compared = {bed for bed, of_bed in beds.items() if {record.cell for record in of_bed} - {CONTROL, DEFAULT}}
    return {bed: beds[bed] for bed in sorted(beds) if bed in compared or not cells}


def best_lr(records: Iterable[Record]) -> float | None:
    """The learning rate with the lowest ppl on the watched text, of the first seed there is; None if all failed."""
    known = list(records)
    first = min((record.seed for record in known), default=None)
    scored = [(record.watched.ppl, record.lr) for record in known if record.seed == first and record.watched]
    return min(scored)[1] if scored else None


def summarize(records: Sequence[Record]) -> list[Row]:
    """The rows of one bed, best first; those that failed come last.

    Args:
        records: of one bed.

    Raises:
        UsageError: two of them with the same seed were trained on other tokens.
    """
    _require_comparable(records)
    by_cell: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_cell[record.cell].append(record)
    rate = best_lr(by_cell.get(CONTROL, ()))
    controls = {of.seed: of.measured.ppl for of in by_cell.get(CONTROL, ()) if of.lr == rate and of.measured}
    rows = [_row(cell, of_cell, {} if cell == CONTROL else controls) for cell, of_cell in by_cell.items()]
    return _marked(sorted(rows, key=lambda row: row.place))


def _row(cell: str, records: Sequence[Record], controls: dict[int, float]) -> Row:
    rate = best_lr(records)
    first = min(record.seed for record in records)
    tries = {record.lr: record.watched.ppl if record.watched else None for record in records if record.seed == first}
    chosen = sorted((record for record in records if record.lr == rate), key=lambda record: record.seed)
    return Row(
        cell=cell,
        about=records[0].about,
        lr=rate,
        tries=dict(sorted(tries.items())),
        records=tuple(chosen),
        numbers=_numbers(chosen, controls),
        failures=tuple(f"lr {of.lr:g}, seed {of.seed}: {of.error}" for of in records if of.error),
    )


def _numbers(records: Sequence[Record], controls: dict[int, float]) -> dict[str, Spread]:
    measured = {record.seed: record.measured for record in records if record.measured}
    if not measured:
        return {}
    over_control = tuple(of.ppl / controls[seed] for seed, of in measured.items() if seed in controls)
    return {
        name: Spread(over_control if name == CONTROL_RATIO else tuple(getattr(of, name) for of in measured.values()))
        for name in MEASURES
        if name != CONTROL_RATIO or over_control
    }


def _marked(rows: list[Row]) -> list[Row]:
    """Mark the best ternary row, and those that are no further from it than the larger of both deviations."""
    ternary = [row for row in rows if row.numbers and row.cell != CONTROL]
    if not ternary:
        return rows
    best = ternary[0].numbers[RATIO]
    tied = {row.cell for row in ternary if _ties(row.numbers[RATIO], best)}
    marks = {**dict.fromkeys(tied, "tied"), ternary[0].cell: "best"}
    return [replace(row, mark=marks.get(row.cell, "")) for row in rows]


def _ties(one: Spread, best: Spread) -> bool:
    return one.mean - best.mean <= max(one.deviation, best.deviation)


def _require_comparable(records: Sequence[Record]) -> None:
    """Equal tokens in the same order for the same seed, or there is nothing to compare."""
    if pair := unequal(records):
        first, other = pair
        raise UsageError(
            f"{other.bed}: {other.cell} and {first.cell} were trained on other tokens with seed {other.seed}",
            "remove the results of one of them",
        )
