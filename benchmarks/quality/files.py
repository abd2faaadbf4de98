"""The YAML files of this package, and what reads them."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from bitconvert.errors import UsageError

HERE = Path(__file__).parent


class Section(BaseModel):
    """Data as a file holds it: every key known, nothing changed after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Kind = TypeVar("Kind", bound=Section)


def names(directory: str) -> list[str]:
    """What ``load`` finds in a directory of this package."""
    return sorted(path.stem for path in (HERE / directory).glob("*.yaml"))


def load(kind: type[Kind], directory: str, name: str) -> Kind:
    """Read a file by the name it has in a directory of this package, or any other by its path.

    Raises:
        UsageError: there is no such file, or it says something else than ``kind`` knows.
    """
    path = Path(name) if name.endswith(".yaml") else HERE / directory / f"{name}.yaml"
    if not path.is_file():
        raise UsageError(f"{name}: no such file in {directory}", f"there are {', '.join(names(directory))}")
    try:
        return kind.model_validate({"name": path.stem, **yaml.safe_load(path.read_text(encoding="utf-8"))})
    except (yaml.YAMLError, ValidationError, TypeError) as error:
        raise UsageError(f"{path}: {' '.join(str(error).split())}", "mend the file") from error
