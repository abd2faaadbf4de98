"""Remember what was written, in a few bytes per tensor, and hold the finished file against it."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bitconvert.errors import BitconvertError


class _Sum(NamedTuple):
    crc: int
    nbytes: int

    def with_next(self, data: NDArray[Any]) -> _Sum:
        flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        return _Sum(zlib.crc32(flat.data, self.crc), self.nbytes + flat.nbytes)


_NOTHING = _Sum(0, 0)


class ReadBack:
    """What an encoder made is decoded and compared at once, and its bytes are summed (CRC-32) before they are written.

    The finished file must give bytes of the same sum under each name. Together that catches a wrong encoder, a tensor
    at another tensor's offset, and a bad disk alike, and nothing need be ternarized or decoded a second time.

    Args:
        path: of the output, for the error line.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sums: dict[str, _Sum] = {}

    def compare(self, name: str, meant: NDArray[Any], decoded: NDArray[Any]) -> None:
        """Hold what encoded values of tensor ``name`` decode to against what they mean.

        Raises:
            BitconvertError: they differ.
        """
        if not np.array_equal(meant, decoded):
            raise self._differing(name)

    def expect(self, name: str, data: NDArray[Any]) -> None:
        """Note what tensor ``name`` must hold, or the next part of it."""
        self._sums[name] = self._sums.get(name, _NOTHING).with_next(data)

    def check(self, name: str, parts: Iterable[NDArray[Any]]) -> None:
        """Compare what the file holds, in parts of any size.

        Raises:
            BitconvertError: it is something else.
        """
        found = _NOTHING
        for part in parts:
            found = found.with_next(part)
        if self._sums.pop(name, None) != found:
            raise self._differing(name)

    def finish(self) -> None:
        """Say that the file ends here.

        Raises:
            BitconvertError: a tensor is missing.
        """
        if self._sums:
            raise self._broken(f"tensor {next(iter(self._sums))} is missing")

    def _differing(self, name: str) -> BitconvertError:
        return self._broken(f"tensor {name} does not read back as it was written")

    def _broken(self, what: str) -> BitconvertError:
        return BitconvertError(
            f"{self._path}: {what}", "nothing was kept; try again on another disk, and report it if it happens again"
        )
