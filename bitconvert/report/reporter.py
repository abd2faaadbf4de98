"""Where a command's progress goes while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Reporter(Protocol):
    """Where a command's progress goes; ui/progress.py renders it, tests record it."""

    def stage(self, title: str) -> None:
        """Begin a named part of the work."""

    def advance(self, done: int, total: int) -> None:
        """Say how far the current part is."""

    def note(self, text: str) -> None:
        """Tell something worth knowing."""

    def warn(self, text: str) -> None:
        """Tell something the user may not want."""

    def metrics(self, values: Mapping[str, float]) -> None:
        """Show the current numbers of a training run or a measurement."""


class Silent:
    """A Reporter that says nothing."""

    def stage(self, title: str) -> None:
        """Ignore."""

    def advance(self, done: int, total: int) -> None:
        """Ignore."""

    def note(self, text: str) -> None:
        """Ignore."""

    def warn(self, text: str) -> None:
        """Ignore."""

    def metrics(self, values: Mapping[str, float]) -> None:
        """Ignore."""
