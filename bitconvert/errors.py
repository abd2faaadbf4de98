"""The one exception that a user is meant to see."""

from __future__ import annotations


class BitconvertError(Exception):
    """A failure the user can mend: shown as one ``error:`` line and one ``hint:`` line, never as a traceback.

    Args:
        message: What is wrong, naming the file, tensor or key.
        hint: What to do about it.
        exit_code: 1 for a failure, 2 for wrong arguments or a wrong recipe.
    """

    def __init__(self, message: str, hint: str, *, exit_code: int = 1) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = exit_code


class UsageError(BitconvertError):
    """Arguments or a recipe that cannot be followed (exit code 2)."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message, hint, exit_code=2)
