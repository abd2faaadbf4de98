"""What a directory of ternary weights in float says of itself: ``baked.json`` beside them.

Nothing in such weights tells which of them were meant to share a scale, nor that they must not be rounded again under
another one, nor what the model was called; and the lineage belongs to the training, not to the file.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from bitconvert.errors import BitconvertError
from bitconvert.recipe import Scaling

BAKED_FILE = "baked.json"


class Baked(BaseModel):
    """The record that ``unpack`` leaves.

    Attributes:
        title: what the model calls itself, whatever its files are called.
        source: the file that was unpacked, as the user named it.
        license: of the model, as it names it itself; empty where it does not.
        scaling: which weights share a scale. Nothing is estimated again: ternary weights keep their scales.
    """

    model_config = ConfigDict(extra="forbid")

    title: str
    source: str
    license: str = ""
    scaling: Scaling

    def save(self, directory: Path) -> None:
        """Write ``baked.json`` into a directory."""
        (directory / BAKED_FILE).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read_baked(directory: Path) -> Baked | None:
    """The record beside a model's weights, or None if they are not baked, or do not say so.

    Raises:
        BitconvertError: the file is there and cannot be read.
    """
    path = directory / BAKED_FILE
    if not path.exists():
        return None
    try:
        return Baked.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        raise BitconvertError(
            f"{path}: not written by this version's unpack ({str(error).splitlines()[0]})", "unpack the model again"
        ) from error
