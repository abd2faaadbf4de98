"""What a directory of ternary weights in float says of itself: ``baked.json`` beside them.

Nothing in such weights tells which of them were meant to share a scale, nor that they must not be rounded again under
another one, nor what the model was called; and the lineage belongs to the training, not to the file.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from bitconvert.models.lineage import Origin
from bitconvert.models.record import read_record, save_record
from bitconvert.recipe import Scaling

BAKED_FILE = "baked.json"


class Baked(BaseModel):
    """The record that ``unpack`` leaves.

    Attributes:
        title: what the model calls itself, whatever its files are called.
        source: the file that was unpacked, as the user named it, without its revision.
        origin: that file's hash.
        license: of the model, as it names it itself; empty where it does not.
        scaling: which weights share a scale. Nothing is estimated again: ternary weights keep their scales.
    """

    model_config = ConfigDict(extra="forbid")

    title: str
    source: str
    origin: Origin = Field(default_factory=Origin)
    license: str = ""
    scaling: Scaling

    def save(self, directory: Path) -> None:
        """Write ``baked.json`` into a directory."""
        save_record(self, directory / BAKED_FILE)


def read_baked(directory: Path) -> Baked | None:
    """The record beside a model's weights, or None if they are not baked, or do not say so.

    Raises:
        BitconvertError: the file is there and cannot be read.
    """
    return read_record(directory / BAKED_FILE, Baked, "unpack the model again")
