"""The table of a directory of results, as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from benchmarks.quality.record import Record
from benchmarks.quality.summary import CONTROL_RATIO, RATIO, Row, Spread, by_bed, summarize

_MARKS = {"best": "**best**", "tied": "tied", "": ""}
_COLUMNS = (
    ("ppl / original", RATIO, ".4f"),
    ("ppl / control", CONTROL_RATIO, ".4f"),
    ("KL, nats", "kl", ".4f"),
    ("top-1", "top1_agreement", ".4f"),
    ("bits/byte", "bits_per_byte", ".4f"),
)
_LEGEND = """\
Mean ± standard deviation over n seeds; a seed is an order of the data, the same for all rows. The control is the same
tokens in full precision; a ratio to it compares equal seeds. **best**: the lowest ppl of a ternary model; tied: no
further from it than the larger of both deviations. A learning rate is the best of those tried on the first seed, by ppl
on a text of its own (watched); `<` and `>` say that the lowest or the highest won, so that others may be better."""


def table(records: Sequence[Record], cells: Sequence[str] = ()) -> str:
    """Everything that can be said of some records.

    Args:
        records: of any beds.
        cells: the only ones to show; none for all.
    """
    parts = [_bed(of_bed) for of_bed in by_bed(records, cells).values()]
    return "\n\n".join([*parts, _LEGEND]) + "\n"


def _bed(records: list[Record]) -> str:
    rows = summarize(records)
    parts = [f"## {records[0].bed}", _facts(records), _results(rows), _tries(rows), _abouts(rows), _failures(rows)]
    return "\n\n".join(part for part in [*parts, _commands(rows)] if part)


def _facts(records: list[Record]) -> str:
    """Under which conditions; several values where the records differ."""

    def of_all(tell: Callable[[Record], object]) -> str:
        return ", ".join(sorted({str(tell(record)) for record in records}))

    facts = [f"{of_all(lambda of: f'{of.tokens:,}')} tokens of training"]
    if measured := [record.measured for record in records if record.measured]:
        told = f"judged on {measured[0].tokens_scored:,} tokens (ppl of the original: {measured[0].original_ppl:.4f})"
        facts.append(told)
    facts += [
        of_all(lambda of: of.hardware),
        f"threads: {of_all(lambda of: of.cost.threads)}",
        of_all(lambda of: of.precision),
    ]
    facts += [f"torch {of_all(lambda of: of.versions['torch'])}", f"commit {of_all(lambda of: of.commit)}"]
    return "; ".join(facts) + "."


def _results(rows: list[Row]) -> str:
    head = ["", "cell", *(title for title, _, _ in _COLUMNS), "lr", "n", "CPU s", "peak MiB"]
    return _markdown(head, [_line(row) for row in rows])


def _line(row: Row) -> list[str]:
    if not row.numbers:
        told = "diverged" if "not finite" in row.failures[0] else "failed"
        return ["", row.cell, told, *[""] * (len(_COLUMNS) + 3)]
    numbers = [_number(row.numbers.get(name), form) for _, name, form in _COLUMNS]
    cpu_seconds = statistics.fmean(record.cost.cpu_seconds for record in row.records)
    peak = max(record.cost.peak_bytes for record in row.records) / 2**20
    return [_MARKS[row.mark], row.cell, *numbers, _rate(row), _count(row), f"{cpu_seconds:.0f}", f"{peak:.0f}"]


def _number(spread: Spread | None, form: str) -> str:
    if spread is None:
        return ""
    return f"{spread.mean:{form}}" + (f" ± {spread.deviation:{form}}" if len(spread.values) > 1 else "")


def _rate(row: Row) -> str:
    edge = "" if not row.at_edge else "<" if row.lr == min(row.tries) else ">"
    return f"{edge}{row.lr:g}"


def _count(row: Row) -> str:
    """Seeds that the numbers are of, and how many of those that were tried failed."""
    failed = sum(1 for record in row.records if record.error)
    return str(len(row.records) - failed) + (f" ({failed} failed)" if failed else "")


def _tries(rows: list[Row]) -> str:
    rates = sorted({rate for row in rows for rate in row.tries})
    lines = [[row.cell, *(_try(row, rate) for rate in rates)] for row in rows if len(row.tries) > 1]
    told = "Learning rates tried: ppl on the watched text, first seed."
    return f"{told}\n\n{_markdown(['cell', *(f'{rate:g}' for rate in rates)], lines)}" if lines else ""


def _try(row: Row, rate: float) -> str:
    if rate not in row.tries:
        return ""
    ppl = row.tries[rate]
    told = "failed" if ppl is None else f"{ppl:.4f}"
    return f"**{told}**" if rate == row.lr else told


def _abouts(rows: list[Row]) -> str:
    return "\n".join(f"- {row.cell}: {row.about}" for row in rows)


def _failures(rows: list[Row]) -> str:
    return "\n".join(f"- {row.cell}, {failure}" for row in rows for failure in row.failures)


def _commands(rows: list[Row]) -> str:
    """Of the first seed; the others differ by training.seed and the name of the output."""
    commands = [f"    {command}" for row in rows for record in row.records[:1] for command in record.commands]
    return "The commands of the first seed:\n\n" + "\n".join(commands) if commands else ""


def _markdown(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
