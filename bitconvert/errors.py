"""The one exception that a user is meant to see."""

from __future__ import annotations

import re

_BREAKS = re.compile(r"[\t-\r\x1c-\x1f\x85\u2028\u2029]+")


class BitconvertError(Exception):
    """A failure the user can mend: shown as one ``error:`` line and one ``hint:`` line, never as a traceback.

    Args:
        message: What is wrong, naming the file, tensor or key.
        hint: What to do about it.
        exit_code: 1 for a failure, 2 for wrong arguments or a wrong recipe.
    """

    def __init__(self, message: str, hint: str, *, exit_code: int = 1) -> None:
        self.message = one_line(message)
        super().__init__(self.message)
        self.hint = hint
        self.exit_code = exit_code


class UsageError(BitconvertError):
    """Arguments or a recipe that cannot be followed (exit code 2)."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message, hint, exit_code=2)


def one_line(text: str) -> str:
    """A text without line breaks, and ``printable``."""
    return printable(_BREAKS.sub(" ", text))


def printable(text: str) -> str:
    """A text in which characters that a terminal would obey are spelled out: names in a model's files may hold any."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else ascii(letter)[1:-1] for letter in text)
