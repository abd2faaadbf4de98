"""Markdown from tables and docstrings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_GENERATED = "<!-- Written by `make reference`. Change the code that it tells of, not this page. -->"


def page(title: str, *parts: str) -> str:
    """A page of the reference."""
    return paragraphs(_GENERATED, f"# {title}", *parts) + "\n"


def paragraphs(*parts: str) -> str:
    """Parts with an empty line between them; empty ones are left out."""
    return "\n\n".join(filter(None, parts))


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; empty without rows."""
    lines = [[_cell(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [columns, ["---"] * len(columns), *lines]) if lines else ""


def prose(docstring: str) -> str:
    """A docstring's text: its double backquotes are single ones in Markdown."""
    return docstring.replace("``", "`").strip()


def one_line(docstring: str) -> str:
    """The same in one line."""
    return " ".join(prose(docstring).split())


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
