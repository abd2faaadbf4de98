"""A reporter for tests that look at what a command says while it works."""

from __future__ import annotations

from collections.abc import Mapping

from bitconvert.report.reporter import Silent


class Recorder(Silent):
    """A reporter that remembers what it was told."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.progress: list[tuple[int, int]] = []
        self.lines: list[dict[str, float]] = []

    def stage(self, title: str) -> None:
        self.stages.append(title)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def advance(self, done: int, total: int) -> None:
        self.progress.append((done, total))

    def metrics(self, values: Mapping[str, float]) -> None:
        self.lines.append(dict(values))
