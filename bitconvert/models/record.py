"""What bitconvert writes down beside a model's weights, as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from bitconvert.errors import BitconvertError

RecordT = TypeVar("RecordT", bound=BaseModel)


def save_record(record: BaseModel, path: Path) -> None:
    """Write a record to a file."""
    path.write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read_record(path: Path, kind: type[RecordT], hint: str) -> RecordT | None:
    """The record in a file, or None if there is no such file.

    Args:
        path: of the file.
        kind: what it must hold.
        hint: what to do if it does not.

    Raises:
        BitconvertError: the file is there and cannot be read.
    """
    if not path.exists():
        return None
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        what = f"not a {kind.__name__.lower()} record of this version"
        raise BitconvertError(f"{path}: {what} ({str(error).splitlines()[0]})", hint) from error
