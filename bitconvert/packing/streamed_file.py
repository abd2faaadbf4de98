"""A file of tensors whose places are known before their values: each is written once, in any order."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class StreamedFile:
    """Open inside a ``with`` block, which fails if it ends well without every tensor.

    Args:
        path: of the file; an existing one is overwritten.
        names: of all tensors.
    """

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        self._path = path
        self._unwritten = set(names)

    def __enter__(self) -> Self:
        self._file = self._path.open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None and self._unwritten:
            raise ValueError(f"{self._path}: tensor {min(self._unwritten)} was never written")

    def _put(self, name: str, offset: int, data: Any) -> None:
        """Write the bytes of one tensor to their place."""
        self._file.seek(offset)
        self._file.write(data)
        self._unwritten.discard(name)
