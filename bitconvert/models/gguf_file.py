"""A GGUF file, opened: metadata on request, tensors as views of the mapped file."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGUFReader, ReaderField, ReaderTensor

from bitconvert.errors import BitconvertError
from bitconvert.models.families import Family, gguf_family_of
from bitconvert.models.gguf_types import register_q2_0


class GgufFile(NamedTuple):
    """An opened file: its metadata, and its tensors as views of the mapped file."""

    path: Path
    fields: dict[str, ReaderField]
    tensors: dict[str, ReaderTensor]

    def get(self, key: str, default: Any = None) -> Any:
        """A metadata value; floats come with the digits of their float32."""
        try:
            value = self.fields[key].contents() if key in self.fields else default
        except (UnicodeDecodeError, ValueError, IndexError) as error:
            raise BitconvertError(f"{self.path}: key {key} is damaged", "download or pack it again") from error
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def require(self, key: str) -> Any:
        """A metadata value that no model can do without."""
        if key not in self.fields:
            raise BitconvertError(f"{self.path}: key {key} is missing", "convert the model to GGUF again")
        return self.get(key)


def open_gguf(path: Path) -> GgufFile:
    """Map a file and parse its metadata; the same file is parsed once.

    Raises:
        BitconvertError: it cannot be read, is truncated or damaged, or holds types that nothing here decodes.
    """
    try:
        status = path.stat()
        return _parse(path, status.st_mtime_ns, status.st_size)
    except OSError as error:
        raise BitconvertError(f"{path}: {error.strerror}", "check the path and its permissions") from error


@lru_cache(maxsize=2)  # parsing a vocabulary of 100,000 tokens takes seconds, and every function here needs it
def _parse(path: Path, _modified: int, _size: int) -> GgufFile:
    register_q2_0()
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError, UnicodeDecodeError) as error:
        raise BitconvertError(
            f"{path}: truncated, damaged or not a GGUF file that can be read ({error})", "download or pack it again"
        ) from error
    return GgufFile(path, dict(reader.fields), {tensor.name: tensor for tensor in reader.tensors})


def gguf_family(file: GgufFile) -> Family:
    """The architecture's row.

    Raises:
        BitconvertError: the architecture is not supported.
    """
    return gguf_family_of(str(file.require("general.architecture")), str(file.path))
