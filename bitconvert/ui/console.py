"""The two consoles, the error line, and how tables and numbers look."""

from __future__ import annotations

import sys
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bitconvert.errors import BitconvertError, one_line, printable


class _Console(Console):
    """Shows what it is given: names in files are no markup, and no orders to the terminal."""

    def render_str(self, text: str, **options: Any) -> Text:
        """What becomes of strings in tables."""
        return super().render_str(one_line(text), **options)


stdout = _Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200)
stderr = _Console(stderr=True, highlight=False, markup=False)


def show_error(error: BitconvertError) -> None:
    """Print the error line and the hint line."""
    stderr.print(Text.assemble(("error: ", "bold red"), error.message), soft_wrap=True)
    stderr.print(Text.assemble(("hint: ", "bold cyan"), error.hint), soft_wrap=True)


def show_text(text: str) -> None:
    """Print text as it is."""
    stdout.print(Text(printable(text)), soft_wrap=True)


def new_table(*columns: str, left: int = 1) -> Table:
    """An empty table of the one look, with the first columns aligned to the left."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", overflow="fold")
    return table


def in_ppl(value: float) -> str:
    """A perplexity in words."""
    return f"{value:,.3f}" if value < 1e4 else f"{value:.3g}"


def in_bytes(count: int) -> str:
    """A size in words."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} bytes"


def in_seconds(seconds: float) -> str:
    """A time in words, with tenths of a second where they matter."""
    return f"{seconds:.1f} s" if seconds < 60 else in_hours(seconds)


def in_hours(seconds: float) -> str:
    """A time as h:mm:ss."""
    return str(timedelta(seconds=round(seconds)))
