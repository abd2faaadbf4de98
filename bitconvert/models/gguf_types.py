"""What bitconvert knows about GGUF tensor types: ids, file types and block sizes, in one place for writers and readers.

Sources: ``ggml.h`` (ggml_type), ``ggml-common.h`` (block structs), ``llama.h`` (llama_ftype).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import constants, quants
from gguf.constants import GGMLQuantizationType, LlamaFileType
from numpy.typing import NDArray


@dataclass(frozen=True)
class GgufType:
    """One way to store a tensor in a GGUF file.

    Attributes:
        name: as llama.cpp prints it.
        type_id: ``ggml_type`` of a tensor.
        file_type: ``general.file_type`` of a file that mostly holds this type (``llama_ftype``).
        block: weights per block; a row must be a whole number of blocks.
        block_bytes: bytes per block.
        activation_block: where its runtime rounds activations to int8, how many of them share a scale (llama.cpp's
            ``vec_dot_type``: Q8_K for TQ1_0 and TQ2_0, Q8_0 for Q2_0 and Q8_0); None for all of a token's, as
            bitnet.cpp has it.
        trailer: bytes behind a tensor's last row, for what belongs to the tensor as a whole.
    """

    name: str
    type_id: int
    file_type: int
    block: int
    block_bytes: int
    activation_block: int | None = None
    trailer: int = 0

    @property
    def bits_per_weight(self) -> float:
        """Storage per weight, scales included; without the trailer, which is nothing in a matrix of any size."""
        return 8 * self.block_bytes / self.block

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of ``columns`` weights, which must be a multiple of ``block``."""
        return columns // self.block * self.block_bytes

    def ggml(self) -> GGMLQuantizationType:
        """The type as the ``gguf`` package knows it (Q2_0 and I2_S only after they are registered)."""
        return GGMLQuantizationType(self.type_id)


F32 = GgufType("F32", 0, 0, 1, 4)
F16 = GgufType("F16", 1, 1, 1, 2)
BF16 = GgufType("BF16", 30, 32, 1, 2)
Q8_0 = GgufType("Q8_0", 8, 7, 32, 34, activation_block=32)
Q6_K = GgufType("Q6_K", 14, 18, 256, 210, activation_block=256)
Q4_K = GgufType("Q4_K", 12, 15, 256, 144, activation_block=256)
TQ1_0 = GgufType("TQ1_0", 34, 36, 256, 54, activation_block=256)
TQ2_0 = GgufType("TQ2_0", 35, 37, 256, 66, activation_block=256)
Q2_0 = GgufType("Q2_0", 42, 41, 64, 18, activation_block=32)
I2_S = GgufType("I2_S", 36, 40, 128, 32, trailer=32)

TERNARY = (TQ1_0, TQ2_0, Q2_0, I2_S)
"""Types that hold nothing but codes and scales."""


def register_q2_0() -> None:
    """Teach the ``gguf`` package the type Q2_0, unless it already knows it.

    The PyPI package 0.19.0 lacks it, while llama.cpp has it. Afterwards ``GGUFReader``, ``GGUFWriter``,
    ``gguf.quantize`` and ``gguf.dequantize``, and with them transformers' own GGUF loader, take Q2_0 like any other
    type. May be called any number of times.
    """
    if Q2_0.name not in GGMLQuantizationType.__members__:
        _add_member(GGMLQuantizationType, Q2_0.name, Q2_0.type_id)
    if f"MOSTLY_{Q2_0.name}" not in LlamaFileType.__members__:
        _add_member(LlamaFileType, f"MOSTLY_{Q2_0.name}", Q2_0.file_type)
    constants.GGML_QUANT_SIZES.setdefault(Q2_0.ggml(), (Q2_0.block, Q2_0.block_bytes))
    if Q2_0.ggml() not in quants._type_traits:
        _define_quantizer()


def register_i2_s() -> None:
    """Teach the ``gguf`` package the name of I2_S, unless it already knows it.

    No more than the name: the package counts a tensor's bytes from its rows, and I2_S has its scale behind them.
    ``gguf_parse`` reads it. May be called any number of times.
    """
    if I2_S.name not in GGMLQuantizationType.__members__:
        _add_member(GGMLQuantizationType, I2_S.name, I2_S.type_id)
    if f"MOSTLY_{I2_S.name}" not in LlamaFileType.__members__:
        _add_member(LlamaFileType, f"MOSTLY_{I2_S.name}", I2_S.file_type)


def _add_member(enum: Any, name: str, value: int) -> None:
    """Add a member to an IntEnum that is already closed; the enum module offers no public way."""
    member = int.__new__(enum, value)
    member._name_, member._value_ = name, value
    setattr(enum, name, member)  # before the maps below, which make the metaclass refuse the assignment
    enum._member_names_.append(name)
    enum._member_map_[name] = member
    enum._value2member_map_[value] = member


def _define_quantizer() -> None:
    base: Any = quants.TQ2_0.__base__  # the package's own base class, whose name is mangled

    class _Q2_0(base, qtype=Q2_0.ggml()):  # type: ignore[call-arg, misc]
        """Blocks of 64: d (fp16), then codes + 1, four a byte, low bits first. As ggml's reference: d = absmax."""

        @classmethod
        def quantize_blocks(cls, blocks: NDArray[np.float32]) -> NDArray[np.uint8]:
            d = np.abs(blocks).max(axis=-1, keepdims=True)
            with np.errstate(divide="ignore"):
                inverse = np.where(d == 0, 0, 1 / d)
            values = (quants.np_roundf(blocks * inverse).astype(np.int8) + 1).view(np.uint8).reshape(len(blocks), -1, 4)
            codes = values[..., 0] | values[..., 1] << 2 | values[..., 2] << 4 | values[..., 3] << 6
            return np.concatenate([d.astype(np.float16).view(np.uint8), codes], axis=-1)

        @classmethod
        def dequantize_blocks(cls, blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
            d, codes = np.hsplit(blocks, [2])
            values = codes[..., np.newaxis] >> np.array([0, 2, 4, 6], np.uint8) & 3
            scaled: NDArray[np.float32] = np.ascontiguousarray(d).view(np.float16).astype(np.float32) * (
                values.reshape(len(blocks), -1).astype(np.float32) - 1
            )
            return scaled
