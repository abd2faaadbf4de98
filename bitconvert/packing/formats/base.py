"""What an output type is, and what all the block types of GGUF have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitconvert.errors import BitconvertError
from bitconvert.models.gguf_types import GgufType
from bitconvert.recipe import Scaling
from bitconvert.ternary.quantize import TernaryTensor, fp16_scale

Codes = NDArray[np.int8]
Bytes = NDArray[np.uint8]

_LARGEST_ROUNDING = 0.005
"""Relative error that rounding a scale to float16 may bring; ordinary scales lose at most 2**-11."""


EVERYWHERE = "everything that reads GGUF"


class Format(ABC):
    """One way to store a ternary matrix.

    Attributes:
        name: as the user types it after ``--format``.
        container: the kind of output that holds it, a key of ``pack.CONTAINERS``.
        bits_per_weight: storage per weight, scales included.
        row_multiple: the row length (``in``) must be a multiple of this.
        runs_in: the runtimes that compute with it, in words.
        reads_back: whether bitconvert itself opens what was packed so.
    """

    name: str
    runs_in: ClassVar[str]
    reads_back: ClassVar[bool] = True
    container: ClassVar[Literal["gguf", "directory", "onnx"]]
    bits_per_weight: float
    row_multiple: int

    @abstractmethod
    def refusal(self, scaling: Scaling) -> str | None:
        """Why the scales of this scaling cannot be stored; None if they can."""

    @abstractmethod
    def usage(self, path: str) -> str:
        """Markdown that tells how to run an output; ``path`` is where it lies, seen from the card."""


@dataclass(frozen=True)
class Demands:
    """What the runtimes of a type demand of the rest of the file, where they are not llama.cpp.

    Attributes:
        architecture: the only ``general.architecture`` that they compute right with this type.
        embedding: the only type that they read embeddings and heads in.
    """

    architecture: str
    embedding: GgufType


class GgufFormat(Format):
    """A GGUF type: here one whose blocks each hold their own scale ``d`` (float16) and codes in some order.

    ``d`` of a block without any nonzero code is 0, as in ggml's reference quantizers. So a decoded scale is exact
    wherever it matters, and 0 where a zero block left no trace of it.

    Attributes:
        type: what GGUF calls it.
        demands: what else must hold for a file of this type; then no other type may stand in for it either.
        note: what a user of such a file should know; empty when there is nothing.
    """

    container = "gguf"
    type: ClassVar[GgufType]
    demands: ClassVar[Demands | None] = None
    note: ClassVar[str] = ""

    def __init__(self) -> None:
        self.name = self.type.name.lower()
        self.bits_per_weight = self.type.bits_per_weight
        self.row_multiple = self.type.block

    def refusal(self, scaling: Scaling) -> str | None:
        """A scale per tensor or per row is repeated in each block; a group must be a whole number of blocks."""
        group = scaling.group_size
        if group is None or group % self.type.block == 0:
            return None
        return f"{self.type.name} has one scale for {self.type.block} weights, and a group is {group}"

    def usage(self, path: str) -> str:
        """See ``Format``."""
        return f'```sh\nllama-cli -m {path} -p "Once upon a time"\n```'

    @abstractmethod
    def encode(self, tensor: TernaryTensor) -> Bytes:
        """Codes and scales to bytes.

        Args:
            tensor: codes (out, in), ``in`` a multiple of ``row_multiple``, with scales that float16 holds exactly (see
                ``with_stored_scale``) and a scaling that ``refusal`` accepts.

        Returns:
            uint8, shape (out, bytes per row); flat where a tensor is more than its rows.
        """

    @abstractmethod
    def decode(self, data: Bytes, shape: tuple[int, int]) -> TernaryTensor:
        """What ``encode`` gave back to codes (out, in) and the scales that the type holds, float32."""

    def stored_scales(self, tensor: TernaryTensor) -> NDArray[np.float32]:
        """The scales that ``decode`` finds in an encoded tensor: here one per block, shape (out, in / block)."""
        return block_scales(tensor, self.type.block)


class BlockFormat(GgufFormat):
    """A GGUF type that keeps codes and scale apart. Packing is integer arithmetic only: numpy's float16 is slow.

    A new type says how one block's trits (code + 1) become bytes; the rest is here.

    Attributes:
        scale_first: whether ``d`` stands before the codes, or after them.
    """

    scale_first: ClassVar[bool]

    def encode(self, tensor: TernaryTensor) -> Bytes:
        """See ``GgufFormat``."""
        rows, columns = tensor.codes.shape
        trits = (tensor.codes.numpy().reshape(-1, self.type.block) + np.int8(1)).view(np.uint8)
        blocks = np.empty((len(trits), self.type.block_bytes), np.uint8)
        packed, scale = self._parts(blocks)
        packed[:] = self._pack(trits)
        scale[:] = block_scales(tensor, self.type.block).reshape(-1, 1).astype(np.float16).view(np.uint8)
        return blocks.reshape(rows, self.type.row_bytes(columns))

    def decode(self, data: Bytes, shape: tuple[int, int]) -> TernaryTensor:
        """See ``GgufFormat``."""
        packed, scale = self._parts(data.reshape(-1, self.type.block_bytes))
        codes = self._unpack(np.ascontiguousarray(packed)).view(np.int8)
        codes -= np.int8(1)
        scales = np.ascontiguousarray(scale).view(np.float16).astype(np.float32).reshape(shape[0], -1)
        return TernaryTensor(torch.from_numpy(codes.reshape(shape)), torch.from_numpy(scales))

    def _parts(self, blocks: Bytes) -> tuple[Bytes, Bytes]:
        """The codes and the scale of each block."""
        return (blocks[:, 2:], blocks[:, :2]) if self.scale_first else (blocks[:, :-2], blocks[:, -2:])

    @abstractmethod
    def _pack(self, trits: Bytes) -> Bytes:
        """Trits (blocks, block) to bytes (blocks, block_bytes - 2)."""

    @abstractmethod
    def _unpack(self, packed: Bytes) -> Bytes:
        """The inverse of ``_pack``; a new array."""


def block_scales(tensor: TernaryTensor, block: int) -> NDArray[np.float32]:
    """The scale that each block of a GGUF type stores: that of its tensor, row or group, and 0 for an all-zero block.

    Args:
        tensor: codes (out, in) and their scales.
        block: weights per block; divides ``in`` and the group size.

    Returns:
        float32, shape (out, in / block).
    """
    rows, columns = tensor.codes.shape
    scale = tensor.scale.numpy().reshape(-1, tensor.scale.shape[-1])
    repeated = np.repeat(scale, columns // block // scale.shape[1], axis=1)
    codes = tensor.codes.numpy().reshape(rows, columns // block, block)
    occupied = (codes if block % 8 else codes.view(np.int64)).any(axis=-1)
    return np.where(occupied, repeated, np.float32(0))


def with_stored_scale(tensor: TernaryTensor, name: str) -> TernaryTensor:
    """The same codes with scales as ``stored_scale`` has them."""
    return tensor._replace(scale=stored_scale(tensor.scale, name))


def stored_scale(scale: Tensor, name: str) -> Tensor:
    """Round scales to float16, as every format stores them, so that all files of one model hold the same weights.

    Args:
        scale: as ``ternarize`` gives it.
        name: of the tensor, for the error line.

    Raises:
        BitconvertError: a scale is NaN or infinite, or float16 cannot hold it within 0.5 % (below about 6e-6, or above
            65504). The reference quantizers write such scales without a word.
    """
    stored = fp16_scale(scale)
    faithful = (stored - scale).abs() <= _LARGEST_ROUNDING * scale  # false for NaN and infinity
    if not bool(faithful.all()):
        worst = scale[~faithful].flatten()[0].item()
        raise BitconvertError(
            f"tensor {name}: its scale {worst:.3g} cannot be stored as float16",
            "the weights are damaged, or so small or large that their model must be rescaled first",
        )
    return stored
