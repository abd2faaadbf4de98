"""A safetensors file written one tensor at a time, in the memory of one (``save_file`` wants all of them at once).

The format (huggingface.co/docs/safetensors): 8 bytes of header length, little-endian; the header, JSON padded with
spaces; the tensors' bytes without gaps, in the order of their offsets.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from bitconvert.models.streamed_file import StreamedFile

_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
    torch.int32: "I32",
    torch.int64: "I64",
}
_ALIGNMENT = 8


@dataclass(frozen=True)
class TensorSpec:
    """What is known of a tensor before it is computed."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * self.dtype.itemsize


_METADATA = {"format": "pt"}  # transformers insists on it


def file_bytes(specs: Mapping[str, TensorSpec]) -> int:
    """Bytes of a file that holds these tensors, and no texts besides."""
    return len(_header(specs, _offsets(specs), _METADATA)) + sum(spec.nbytes for spec in specs.values())


class SafetensorsFile(StreamedFile):
    """Write every tensor once, in any order, inside the ``with`` block.

    Args:
        path: of the file; an existing one is overwritten.
        specs: dtype and shape of every tensor.
        metadata: texts that the header holds besides.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(path, {name: spec.nbytes for name, spec in specs.items()})
        self._specs = specs
        self._offsets = _offsets(specs)
        self._metadata = {**_METADATA, **(metadata or {})}

    def __enter__(self) -> Self:
        super().__enter__()
        header = _header(self._specs, self._offsets, self._metadata)
        self._file.write(header)
        self._data_start = len(header)
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, or the next rows of it, to its place; its dtype and shape must be as announced."""
        announced, given = self._specs[name], TensorSpec(tensor.dtype, tuple(tensor.shape))
        if (given.dtype, given.shape[1:]) != (announced.dtype, announced.shape[1:]):
            raise ValueError(f"{self._path}: tensor {name} is {given}, announced as {announced}")
        data = tensor.contiguous().flatten().view(torch.uint8).numpy().data
        self._put(name, self._data_start + self._offsets[name], data)


def _offsets(specs: Mapping[str, TensorSpec]) -> dict[str, int]:
    """Where each tensor begins after the header: wider dtypes first, as in safetensors, so that each is aligned."""
    offsets, end = {}, 0
    for name in sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name)):
        offsets[name] = end
        end += specs[name].nbytes
    return offsets


def _header(specs: Mapping[str, TensorSpec], offsets: Mapping[str, int], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": metadata}
    for name, begin in offsets.items():
        spec = specs[name]
        entries[name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [begin, begin + spec.nbytes],
        }
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    return len(header).to_bytes(8, "little") + header
