"""What ``verify`` tells when it is done."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class VerifyReport:
    """What ``bitconvert verify`` found of a directory, held against the hashes that were written with it.

    Attributes:
        directory: as the user named it.
        intact: files that are as they were written.
        changed: files that hold something else now.
        missing: files that are gone.
        extra: files that bitconvert did not write.
        nbytes: that were hashed.
        seconds: it took.
    """

    directory: str
    intact: int
    changed: list[str]
    missing: list[str]
    extra: list[str]
    nbytes: int
    seconds: float

    @property
    def problems(self) -> dict[str, list[str]]:
        """What is wrong, in a word, and the files of which it is."""
        found = {"changed": self.changed, "missing": self.missing, "not written by bitconvert": self.extra}
        return {what: names for what, names in found.items() if names}
