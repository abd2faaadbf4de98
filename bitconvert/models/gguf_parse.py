"""The bytes of one GGUF file, read with suspicion: every length is held against the file before anything is made of it.

``gguf.GGUFReader`` trusts lengths and nesting, so a damaged file can cost it all the memory or time there is, and it
refuses I2_S, whose scale stands behind a tensor's last row. Decoding itself is left to that package.

Source: the GGUF specification (ggml/docs/gguf.md).
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGUF_DEFAULT_ALIGNMENT, GGUF_MAGIC, GGMLQuantizationType, GGUFValueType, dequantize
from gguf.constants import GGML_QUANT_SIZES
from numpy.typing import NDArray

from bitconvert.errors import BitconvertError
from bitconvert.models.gguf_types import I2_S, Q2_0
from bitconvert.models.i2_s import unpack_i2_s

_VERSIONS = (2, 3)
_MOST_DIMENSIONS = 4
_LARGEST_ALIGNMENT = 2**20

_SCALARS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.FLOAT64: "<f8",
    GGUFValueType.BOOL: "?",
}

_FLOATS = {GGMLQuantizationType.F32: "<f4", GGMLQuantizationType.F16: "<f2"}
"""Types whose data are numbers to numpy; those of all others are bytes."""

_OWN_SIZES = {kind.type_id: (kind.block, kind.block_bytes, kind.trailer) for kind in (Q2_0, I2_S)}
"""(block, bytes of a block, bytes behind the last row) of what the ``gguf`` package does not know."""


class GgufTensor(NamedTuple):
    """One tensor of a file.

    Attributes:
        path: the file that holds it.
        name: in the file.
        tensor_type: how it is stored.
        shape: as GGUF counts, the row length first.
        n_bytes: of its data.
        data_offset: where they begin in the file.
        data: view of the mapped file: numbers of shape (out, in) for F32 and F16, bytes (out, bytes of a row) for other
            types, all bytes in one row for I2_S.
    """

    path: Path
    name: str
    tensor_type: GGMLQuantizationType
    shape: tuple[int, ...]
    n_bytes: int
    data_offset: int
    data: NDArray[Any]

    def values(self) -> NDArray[np.float32]:
        """The weights it means: float32, shape (out, in); a copy, since the file is mapped read-only.

        Raises:
            BitconvertError: nothing here decodes its type, or its bytes mean nothing.
        """
        try:
            if self.tensor_type == I2_S.type_id:
                return unpack_i2_s(self.data, self.shape[1], self.shape[0]).dequantize().numpy()
            with np.errstate(all="ignore"):  # what a damaged scale makes of the weights is judged by whoever loads them
                return np.array(dequantize(self.data, self.tensor_type), dtype=np.float32)
        except (ValueError, NotImplementedError) as error:
            raise damaged(self.path, f"tensor {self.name} at offset {self.data_offset}: {error}") from error


class ParsedFile(NamedTuple):
    """Metadata by key (numbers, texts, lists of them) and tensors by name."""

    fields: dict[str, Any]
    tensors: dict[str, GgufTensor]


def damaged(path: Path, what: str) -> BitconvertError:
    """The error for a file that is not what it should be."""
    return BitconvertError(f"{path}: {what}", "the file is cut off, damaged or no GGUF: download or pack it again")


def parse_gguf(path: Path) -> ParsedFile:
    """Map a file and read all of it but the tensors' data.

    Raises:
        BitconvertError: naming the key or tensor and the offset.
        OSError: it cannot be opened.
    """
    if path.stat().st_size == 0:
        raise damaged(path, "empty")
    cursor = _Cursor(path, np.memmap(path, np.uint8, mode="r"))
    tensor_count, field_count = _read_header(cursor)
    fields = _read_fields(cursor, field_count)
    announced = [_read_announcement(cursor) for _ in range(tensor_count)]
    return ParsedFile(fields, _located(cursor, announced, _alignment(cursor, fields)))


class _Cursor:
    """A place in a mapped file that cannot be moved beyond its end."""

    def __init__(self, path: Path, data: NDArray[np.uint8]) -> None:
        self.path = path
        self.data = data
        self.offset = 0
        self.reading = "the header"
        self._bytes = data.data

    def error(self, what: str) -> BitconvertError:
        return damaged(self.path, f"{self.reading}, at offset {self.offset}: {what}")

    def require(self, size: int) -> None:
        """Refuse to go on where fewer bytes are left."""
        left = max(0, len(self.data) - self.offset)
        if size > left:
            raise self.error(f"{size} bytes are announced where {left} are left")

    def number(self, code: str) -> int:
        """One number by its ``struct`` code."""
        size = struct.calcsize(code)
        self.require(size)
        value: int = struct.unpack_from(code, self._bytes, self.offset)[0]
        self.offset += size
        return value

    def text(self) -> str:
        """A length and as many bytes of UTF-8."""
        size = self.number("<Q")
        self.require(size)
        try:
            value = str(self._bytes[self.offset : self.offset + size], "utf-8")
        except UnicodeDecodeError as error:
            raise self.error("a text that is not UTF-8") from error
        self.offset += size
        return value

    def numbers(self, dtype: str, count: int) -> list[Any]:
        """Numbers in a row; floats come with the digits of their float32."""
        size = np.dtype(dtype).itemsize
        self.require(size * count)
        values = np.frombuffer(self.data, dtype, count, self.offset)
        self.offset += size * count
        return [float(str(value)) for value in values] if dtype == "<f4" else list(values.tolist())


def _read_header(cursor: _Cursor) -> tuple[int, int]:
    """(tensors, metadata fields)."""
    if cursor.number("<I") != GGUF_MAGIC:
        raise damaged(cursor.path, "not a GGUF file")
    version = cursor.number("<I")
    if version not in _VERSIONS:
        reason = "big-endian" if version & 0xFFFF == 0 else f"GGUF of version {version}"
        raise BitconvertError(f"{cursor.path}: {reason}", "read are little-endian files of version 2 and 3")
    return cursor.number("<Q"), cursor.number("<Q")


def _read_fields(cursor: _Cursor, count: int) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for index in range(count):
        cursor.reading = f"metadata field {index + 1} of {count}"
        key = cursor.text()
        cursor.reading = f"key {key[:80]}"
        if key in fields:
            raise cursor.error("it stands there twice")
        fields[key] = _read_value(cursor, _value_type(cursor))
    return fields


def _value_type(cursor: _Cursor) -> GGUFValueType:
    number = cursor.number("<I")
    try:
        return GGUFValueType(number)
    except ValueError as error:
        raise cursor.error(f"no value has the type {number}") from error


def _read_value(cursor: _Cursor, kind: GGUFValueType) -> Any:
    if kind == GGUFValueType.STRING:
        return cursor.text()
    if kind != GGUFValueType.ARRAY:
        return cursor.numbers(_SCALARS[kind], 1)[0]
    item, count = _value_type(cursor), cursor.number("<Q")
    if item == GGUFValueType.ARRAY:
        raise cursor.error("arrays of arrays are not read")
    if item == GGUFValueType.STRING:
        cursor.require(8 * count)  # each has a length of 8 bytes at least
        return [cursor.text() for _ in range(count)]
    return cursor.numbers(_SCALARS[item], count)


def _alignment(cursor: _Cursor, fields: dict[str, Any]) -> int:
    alignment = fields.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or not 0 < alignment <= _LARGEST_ALIGNMENT or alignment & (alignment - 1):
        raise damaged(cursor.path, f"general.alignment is {alignment}, not a power of two")
    return alignment


class _Announcement(NamedTuple):
    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int


def _read_announcement(cursor: _Cursor) -> _Announcement:
    cursor.reading = "the list of tensors"
    name = cursor.text()
    cursor.reading = f"tensor {name[:80]}"
    dimensions = cursor.number("<I")
    if not 1 <= dimensions <= _MOST_DIMENSIONS:
        raise cursor.error(f"it has {dimensions} dimensions")
    shape = tuple(cursor.number("<Q") for _ in range(dimensions))
    number = cursor.number("<I")
    try:
        kind = GGMLQuantizationType(number)
    except ValueError as error:
        raise cursor.error(f"nothing here reads the tensor type {number}") from error
    return _Announcement(name, shape, kind, cursor.number("<Q"))


def _located(cursor: _Cursor, announced: list[_Announcement], alignment: int) -> dict[str, GgufTensor]:
    """The tensors' data: each begins where the one before it ends, as llama.cpp demands too."""
    start = expected = _padded(cursor.offset, alignment)
    tensors: dict[str, GgufTensor] = {}
    for tensor in announced:
        cursor.reading, cursor.offset = f"tensor {tensor.name[:80]}", start + tensor.offset
        if tensor.name in tensors:
            raise cursor.error("it stands there twice")
        if cursor.offset != expected:
            raise cursor.error(f"it should begin at {expected}")
        size = _size(cursor, tensor)
        cursor.require(size)
        data = _data(cursor.data, tensor, cursor.offset, size)
        tensors[tensor.name] = GgufTensor(
            cursor.path, tensor.name, tensor.kind, tensor.shape, size, cursor.offset, data
        )
        expected = _padded(cursor.offset + size, alignment)
    return tensors


def _size(cursor: _Cursor, tensor: _Announcement) -> int:
    """Bytes of a tensor's data."""
    columns, weights = tensor.shape[0], math.prod(tensor.shape)
    block, block_bytes, trailer = _OWN_SIZES.get(tensor.kind) or (*GGML_QUANT_SIZES[tensor.kind], 0)
    if weights == 0 or columns % block or (trailer and len(tensor.shape) != 2):
        raise cursor.error(f"its shape {tensor.shape} does not fit the type {tensor.kind.name}")
    return weights // block * block_bytes + trailer


def _data(mapped: NDArray[np.uint8], tensor: _Announcement, offset: int, size: int) -> NDArray[Any]:
    data = mapped[offset : offset + size]
    if tensor.kind == I2_S.type_id:
        return data
    if tensor.kind in _FLOATS:
        data = data.view(_FLOATS[tensor.kind])
    return data.reshape(*reversed(tensor.shape[1:]), -1)


def _padded(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
