"""The pages of the documentation, and their code blocks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
HOW_TO = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs/how-to").glob("*.md"))
PAGES = ("README.md", "docs/README.md", "docs/tutorial.md", "docs/explanation.md", *HOW_TO)
"""Those whose commands a reader follows. Results and benchmarks are records of commands that took hours."""

_BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>[^\n]*) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```", re.M | re.S)


class Block(NamedTuple):
    """A block of code.

    Attributes:
        language: sh, python, text …
        text: the code.
        reason: why it cannot run in a test; None if it does.
    """

    language: str
    text: str
    reason: str | None

    @property
    def runs(self) -> bool:
        """Whether a test runs it."""
        return self.reason is None and self.language in ("sh", "python")


def read(page: str) -> str:
    """A page's text."""
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    """A page's blocks, in order."""
    return [Block(found["language"], found["text"], found["reason"]) for found in _BLOCK.finditer(read(page))]
