"""The one exception that a user is meant to see, and what a process exits with."""

from __future__ import annotations

import re
from enum import IntEnum

_BREAKS = re.compile(r"[\t-\r\x1c-\x1f\x85\u2028\u2029]+")


class ExitCode(IntEnum):
    """What ``bitconvert`` exits with.

    Attributes:
        meaning: in words, for the reference.
    """

    meaning: str

    DONE = 0, "done"
    FAILED = 1, "failed for a reason you can mend: one `error:` line and one `hint:` line on stderr"
    USAGE = 2, "wrong arguments, or a recipe that cannot be followed; told the same way"
    INTERRUPTED = 130, "interrupted by Ctrl-C (SIGINT); what trains has saved, and its hint says how to go on"
    TERMINATED = 143, "ended by SIGTERM; nothing half-written is left behind, and what trains has saved"

    def __new__(cls, value: int, meaning: str) -> ExitCode:
        """An int with its meaning."""
        code = int.__new__(cls, value)
        code._value_ = value
        code.meaning = meaning
        return code


class BitconvertError(Exception):
    """A failure the user can mend: shown as one ``error:`` line and one ``hint:`` line, never as a traceback.

    Args:
        message: What is wrong, naming the file, tensor or key.
        hint: What to do about it.
        exit_code: What the command line exits with.
    """

    def __init__(self, message: str, hint: str, *, exit_code: int = ExitCode.FAILED) -> None:
        self.message = one_line(message)
        super().__init__(self.message)
        self.hint = hint
        self.exit_code = exit_code


class UsageError(BitconvertError):
    """Arguments or a recipe that cannot be followed."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message, hint, exit_code=ExitCode.USAGE)


def one_line(text: str) -> str:
    """A text without line breaks, and ``printable``."""
    return printable(_BREAKS.sub(" ", text))


def printable(text: str) -> str:
    """A text in which characters that a terminal would obey are spelled out: names in a model's files may hold any."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else ascii(letter)[1:-1] for letter in text)
