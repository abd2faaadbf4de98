"""Curves as paths of an SVG, and the numbers behind them as rows of a table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

WIDTH, HEIGHT = 420, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 408, 10, 192
"""The plot's place in the picture, in its own units."""

_MOST_POINTS = 300  # of a curve; more are no longer told apart, and make the page large
_TICKS = 5


@dataclass(frozen=True)
class Column:
    """One number of metrics.jsonl.

    Attributes:
        key: its name there.
        label: what it is called on the page.
        percent: whether it is a share, shown in percent.
    """

    key: str
    label: str
    percent: bool = False

    def value(self, line: dict[str, Any]) -> float:
        """The number of a line, as it is shown; NaN where there is none."""
        value = float(line.get(self.key, math.nan))
        return 100 * value if self.percent else value


@dataclass(frozen=True)
class Tick:
    """A place on an axis, in the picture's units, and its label."""

    place: float
    label: str


@dataclass(frozen=True)
class Series:
    """A curve: its column in the table, its path, and what a reader who cannot see it should know."""

    label: str
    column: int
    path: str
    points: Sequence[tuple[float, float]]
    told: str


@dataclass(frozen=True)
class Chart:
    """A picture of some columns of a table.

    Attributes:
        title: what is shown, with its unit.
        series: at least one.
        x_ticks: steps.
        y_ticks: values.
        first: step at the left end.
        last: step at the right end.
        reference: a level to compare with, and its name, or None.
        told: all of it in words.
    """

    title: str
    series: Sequence[Series]
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    first: float
    last: float
    reference: Tick | None
    told: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "told", f"{self.title} over steps. " + " ".join(series.told for series in self.series))


@dataclass(frozen=True)
class Numbers:
    """Lines of metrics.jsonl as a table.

    Attributes:
        columns: the first is the step.
        rows: a number for each column; each is the mean of ``lines_a_row`` lines.
        lines_a_row: 1 unless there were too many lines.
    """

    columns: Sequence[Column]
    rows: Sequence[Sequence[float]]
    lines_a_row: int

    @classmethod
    def of(cls, lines: Sequence[dict[str, Any]], columns: Iterable[Column]) -> Numbers:
        """A table of the columns that the lines hold at all."""
        present = [column for column in columns if any(column.key in line for line in lines)]
        lines_a_row = max(1, math.ceil(len(lines) / _MOST_POINTS))
        starts = range(0, len(lines), lines_a_row)
        rows = [_means(lines[start : start + lines_a_row], present) for start in starts]
        return cls(present, rows, lines_a_row)

    def texts(self) -> list[list[str]]:
        """The rows as they are read."""
        return [[_written(value) for value in row] for row in self.rows]

    def chart(
        self,
        title: str,
        *keys: str,
        including: Sequence[float] = (),
        logarithmic: bool = False,
        reference: tuple[str, float] | None = None,
    ) -> Chart | None:
        """A picture of some of the columns; None where the table has none of them.

        Args:
            title: what is shown, with its unit.
            keys: of the columns.
            including: values that the axis must show.
            logarithmic: whether equal ratios are equal distances.
            reference: name and value of a level to compare with.
        """
        shown = [index for index, column in enumerate(self.columns) if column.key in keys]
        if not shown:
            return None
        values = [row[index] for row in self.rows for index in shown]
        levels = [reference[1]] if reference else []
        x = _Axis([row[0] for row in self.rows], LEFT, RIGHT)
        y = _Axis([*values, *including, *levels], BOTTOM, TOP, logarithmic)
        return Chart(
            title,
            [self._series(index, x, y) for index in shown],
            x.ticks(),
            y.ticks(),
            x.low,
            x.high,
            Tick(y.place(reference[1]), f"{reference[0]} {_written(reference[1])}") if reference else None,
        )

    def _series(self, index: int, x: _Axis, y: _Axis) -> Series:
        label, values = self.columns[index].label, [row[index] for row in self.rows]
        finite = [value for value in values if math.isfinite(value)]
        told = f"{label}: first {_written(values[0])}, last {_written(values[-1])}"
        if finite:
            told += f", lowest {_written(min(finite))}, highest {_written(max(finite))}"
        points = [
            (x.place(row[0]), y.place(value))
            for row, value in zip(self.rows, values, strict=True)
            if math.isfinite(value)
        ]
        return Series(label, index, _path(points), points, f"{told}.")


class _Axis:
    """Values and their places in the picture: steps to the right, others up, where a hundredth of them is seen."""

    def __init__(self, values: Sequence[float], begin: float, end: float, logarithmic: bool = False) -> None:
        from matplotlib.ticker import LogLocator, MaxNLocator

        finite = [value for value in values if math.isfinite(value)] or [0.0]
        is_step = begin < end
        low, high = min(finite), max(finite)
        wanting = max(0.01 * max(abs(low), abs(high)) - (high - low), 0.0) or float(low == high)
        ticked = (low, high) if is_step or logarithmic else (low - wanting / 2, high + wanting / 2)
        self._begin, self._end = begin, end
        self._scale = math.log if logarithmic else float
        if logarithmic:
            ticks = LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0), numticks=100).tick_values(*ticked)
        else:
            ticks = MaxNLocator(_TICKS, integer=is_step).tick_values(*ticked)
        self.low = low if is_step else max((tick for tick in ticks if tick <= low), default=low)
        self.high = high if is_step else min((tick for tick in ticks if tick >= high), default=high)
        self._ticks = [float(tick) for tick in ticks if self.low <= tick <= self.high]

    def place(self, value: float) -> float:
        """Of a value, in the picture's units."""
        low, high = self._scale(self.low), self._scale(self.high)
        share = (self._scale(value) - low) / (high - low) if high > low else 0.5
        return round(self._begin + share * (self._end - self._begin), 1)

    def ticks(self) -> list[Tick]:
        """Few enough to be read."""
        every = math.ceil(len(self._ticks) / (_TICKS + 1))
        return [Tick(self.place(tick), f"{tick:,.10g}") for tick in self._ticks[::every]]


def _means(lines: Sequence[dict[str, Any]], columns: Sequence[Column]) -> list[float]:
    """Of each column; of the first, which is the step, the last one."""
    step, *others = columns
    means = (math.fsum(column.value(line) for line in lines) / len(lines) for column in others)
    return [step.value(lines[-1]), *means]


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g},{y:g}" for x, y in points) if points else ""


def _written(value: float) -> str:
    if not math.isfinite(value):
        return "—" if math.isnan(value) else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"
