"""A reporter for tests that look at the progress."""

from __future__ import annotations

from bitconvert.report import Silent


class Recorder(Silent):
    """A reporter that remembers the progress."""

    def __init__(self) -> None:
        self.progress: list[tuple[int, int]] = []

    def advance(self, done: int, total: int) -> None:
        self.progress.append((done, total))
