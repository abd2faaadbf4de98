"""A file of tensors whose places are known before their values: each is written once, in any order and in parts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self


class StreamedFile:
    """Open inside a ``with`` block, which fails if it ends well without every tensor.

    Args:
        path: of the file; an existing one is overwritten.
        sizes: bytes of all tensors, by name.
    """

    def __init__(self, path: Path, sizes: Mapping[str, int]) -> None:
        self._path = path
        self._sizes = sizes
        self._written = dict.fromkeys(sizes, 0)

    def __enter__(self) -> Self:
        self._file = self._path.open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        unwritten = [name for name, size in self._sizes.items() if self._written[name] < size]
        if kind is None and unwritten:
            raise ValueError(f"{self._path}: tensor {min(unwritten)} was never written, or not all of it")

    def _put(self, name: str, offset: int, data: memoryview) -> None:
        """Write the next bytes of a tensor that begins at ``offset``."""
        if self._written[name] + data.nbytes > self._sizes[name]:
            raise ValueError(f"{self._path}: tensor {name} is larger than announced")
        self._file.seek(offset + self._written[name])
        self._file.write(data)
        self._written[name] += data.nbytes
