"""A grid: the cells that are compared, each a name and what its recipe does otherwise than the bed's."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from benchmarks.quality.bed import Bed
from benchmarks.quality.files import Section

CONTROL = "control"
"""The cell that every other one is held against: the same tokens in full precision. It is part of every grid."""


DEFAULT = "default"
"""The cell that does nothing otherwise than the bed's recipe."""


class Cell(Section):
    """One method."""

    about: str = Field(description="one line: what it is, and where it was published")
    set: dict[str, Any] = Field({}, description="what is otherwise than in the bed's recipe: section.key -> value")
    recipe: str | None = Field(None, description="a recipe to start from instead of the bed's")
    gone: str = Field("", description="the last commit that can train it, where its method was removed since")
    lr: tuple[float, ...] = Field((), description="learning rates to try instead of the bed's")


class Grid(Section):
    """Cells to compare. A cell of the same name in two grids is one cell, and is trained once."""

    name: str = Field(description="of the file")
    about: str = Field(description="the question that it answers")
    cells: dict[str, Cell] = Field(min_length=1)

    def cells_on(self, bed: Bed) -> dict[str, Cell]:
        """The cells as they are on a bed, and its control before them."""
        control = Cell(about=_CONTROL, set={"control": True}, lr=bed.control_lr)
        return {CONTROL: control, **self.cells}


_CONTROL = "full precision, cross-entropy, the same extra tokens: tells what rounding costs from what training gains"
