"""The pictures of a directory of results: ratios by cell, and held-out ppl over tokens."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.quality.grid import CONTROL
from benchmarks.quality.record import Record
from benchmarks.quality.summary import RATIO, Row, by_bed, summarize
from bitconvert.atomic import atomic_file

_COLOURS = {"best": "tab:green", "tied": "tab:olive", "": "tab:blue"}


def plot(records: Sequence[Record], directory: Path, name: str, cells: Sequence[str] = ()) -> list[Path]:
    """Draw both pictures, a panel for each bed.

    Args:
        records: of any beds.
        directory: where the pictures go.
        name: what their names begin with.
        cells: the only ones to show; none for all.

    Returns:
        The pictures.
    """
    beds = {bed: summarize(of_bed) for bed, of_bed in by_bed(records, cells).items()}
    return [
        _save(_ratios(beds), directory / f"{name}-ratios.png"),
        _save(_curves(beds), directory / f"{name}-curves.png"),
    ]


def _ratios(beds: dict[str, list[Row]]) -> Figure:
    height = 1 + 0.3 * max(len(rows) for rows in beds.values())
    figure, panels = _panels(len(beds), (6.5, height))
    for axes, (bed, rows) in zip(panels, beds.items(), strict=True):
        _draw_ratios(axes, rows)
        axes.set(title=bed, xlabel="ppl / ppl of the original (dots: seeds; bar: their range; line: mean)")
    return figure


def _draw_ratios(axes: Axes, rows: list[Row]) -> None:
    measured = [row for row in rows if row.numbers]
    for y, row in enumerate(measured):
        values, colour = row.numbers[RATIO].values, "black" if row.cell == CONTROL else _COLOURS[row.mark]
        axes.plot([min(values), max(values)], [y, y], color=colour, linewidth=4, alpha=0.3, solid_capstyle="round")
        axes.plot(values, [y] * len(values), "o", color=colour, markersize=4)
        axes.plot([row.numbers[RATIO].mean], [y], "|", color=colour, markersize=14)
    axes.set_yticks(range(len(measured)), [row.cell for row in measured])
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    if measured and measured[-1].place > 2 * measured[0].place:
        axes.set_xscale("log")


def _curves(beds: dict[str, list[Row]]) -> Figure:
    figure, panels = _panels(len(beds), (7.5, 5))
    for axes, (bed, rows) in zip(panels, beds.items(), strict=True):
        _draw_curves(axes, [row for row in rows if row.numbers])
        axes.set(title=bed, xlabel="tokens", ylabel="ppl on the watched text, ternary, mean of the seeds", yscale="log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    return figure


def _draw_curves(axes: Axes, rows: list[Row]) -> None:
    for row in rows:
        curves = [dict(record.watched.curve) for record in row.records if record.watched]
        tokens = sorted(set.intersection(*(set(curve) for curve in curves)))
        means = [statistics.fmean(curve[at] for curve in curves) for at in tokens]
        style = "k--" if row.cell == CONTROL else "-"
        axes.plot(tokens, means, style, label=row.cell, linewidth=2.5 if row.mark == "best" else 1.2)
    originals = [record.watched.original_ppl for row in rows for record in row.records if record.watched]
    if originals:
        axes.axhline(originals[0], color="black", linestyle=":", label="original")
    axes.legend(fontsize="small", ncols=2)
    axes.grid(alpha=0.3)


def _panels(count: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """Two beside each other: more would be too small to read on a page."""
    columns = min(count, 2)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, place) for place in range(1, count + 1)]


def _save(figure: Figure, path: Path) -> Path:
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return path
