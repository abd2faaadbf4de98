"""The weights of an ONNX model in a file beside its graph (``external data``), written one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from bitconvert.models.streamed_file import StreamedFile

Stored = tuple[int, tuple[int, ...]]
"""Type (of ``TensorProto``) and shape."""

_BYTES_AT_ONCE = 2**20
"""When a file is read back."""

_PAGE = 4096  # a tensor that begins on one can be mapped into memory


class OnnxData(StreamedFile):
    """Write every tensor once, in any order, inside the ``with`` block; read them by name after.

    Args:
        path: of the file; an existing one is overwritten.
        stored: type and shape of every tensor.

    Attributes:
        file_bytes: of the finished file.
    """

    def __init__(self, path: Path, stored: Mapping[str, Stored]) -> None:
        self._stored = stored
        super().__init__(path, {name: self.nbytes(name) for name in stored})
        self._offsets: dict[str, int] = {}
        self.file_bytes = 0
        for name in stored:
            self._offsets[name] = -(-self.file_bytes // _PAGE) * _PAGE
            self.file_bytes = self._offsets[name] + self.nbytes(name)

    def write(self, name: str, values: NDArray[Any]) -> None:
        """Write one tensor, or the next rows of it, to its place; its type and shape must be as announced."""
        if (values.dtype, values.shape[1:]) != (self._dtype(name), self._stored[name][1][1:]):
            raise ValueError(f"{self._path}: tensor {name} is {values.dtype} {values.shape}, not as announced")
        self._put(name, self._offsets[name], np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)

    def read(self, name: str) -> Iterator[NDArray[np.uint8]]:
        """The bytes that the finished file holds under a name, in parts."""
        end = self._offsets[name] + self.nbytes(name)
        for begin in range(self._offsets[name], end, _BYTES_AT_ONCE):
            yield np.fromfile(self._path, np.uint8, min(_BYTES_AT_ONCE, end - begin), offset=begin)

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor."""
        return math.prod(self._stored[name][1]) * self._dtype(name).itemsize

    def references(self) -> list[TensorProto]:
        """The tensors as the graph knows them: where in this file each one is."""
        return [self._reference(name) for name in self._stored]

    def _reference(self, name: str) -> TensorProto:
        dtype, shape = self._stored[name]
        tensor = TensorProto(name=name, data_type=dtype, dims=shape, data_location=TensorProto.EXTERNAL)
        place = {"location": self._path.name, "offset": self._offsets[name], "length": self.nbytes(name)}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        return tensor

    def _dtype(self, name: str) -> np.dtype[Any]:
        return helper.tensor_dtype_to_np_dtype(self._stored[name][0])
