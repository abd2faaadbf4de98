"""JSON beside a model's weights: what bitconvert writes down there, and what others have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

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
    except (ValidationError, UnicodeDecodeError, OSError) as error:
        what = f"not a {kind.__name__.lower()} record of this version"
        raise BitconvertError(f"{path}: {what} ({str(error).splitlines()[0]})", hint) from error


def read_json_object(path: Path, hint: str) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        BitconvertError: the file cannot be read, holds something else, or says a thing twice, of which each reader
            would believe another half.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_each_once)
    except RecursionError as error:
        raise BitconvertError(f"{path}: not valid JSON (nested too deeply)", hint) from error
    except (ValueError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise BitconvertError(f"{path}: not valid JSON ({reason})", hint) from error
    if not isinstance(document, dict):
        raise BitconvertError(f"{path}: not a JSON object", hint)
    return document


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} is said twice")
    return document
