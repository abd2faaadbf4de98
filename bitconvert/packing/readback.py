"""Remember what was meant to be written, in a few bytes per tensor, and hold the finished file against it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitconvert.errors import BitconvertError

_DIGEST_BYTES = 16


class ReadBack:
    """Digests of codes, scales and plain values, taken before they are encoded.

    The file is decoded by name and must give the same values: that catches a wrong encoder, a tensor at another
    tensor's offset, and a bad disk alike, and the model need not be ternarized a second time.

    Args:
        path: of the output, for the error line.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._digests: dict[str, bytes] = {}

    def expect(self, name: str, *values: NDArray[Any]) -> None:
        """Note what tensor ``name`` must hold."""
        self._digests[name] = _digest(values)

    def check(self, name: str, *values: NDArray[Any]) -> None:
        """Compare what the file holds.

        Raises:
            BitconvertError: it is something else.
        """
        if self._digests.pop(name, None) != _digest(values):
            raise self._broken(f"tensor {name} does not read back as it was written")

    def finish(self) -> None:
        """Say that the file ends here.

        Raises:
            BitconvertError: a tensor is missing.
        """
        if self._digests:
            raise self._broken(f"tensor {next(iter(self._digests))} is missing")

    def _broken(self, what: str) -> BitconvertError:
        return BitconvertError(
            f"{self._path}: {what}", "nothing was kept; try again on another disk, and report it if it happens again"
        )


def _digest(values: tuple[NDArray[Any], ...]) -> bytes:
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for value in values:
        digest.update(f"{value.dtype}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value).data)
    return digest.digest()
