"""ONNX: two bits a weight through ``MatMulNBits``, an operator that ONNX Runtime adds (domain com.microsoft).

A linear layer's inputs (onnxruntime's ContribOperators.md): ``B``, uint8 (out, blocks, block / 4), four neighbours of a
row a byte, low bits first, each stored as code + 2, the zero point that is meant when none is given; ``scales``,
(out, blocks). A row's last block is filled up with zero codes. Activations stay floats.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from bitconvert.packing.formats.base import Bytes, Format
from bitconvert.recipe import Scaling
from bitconvert.ternary.quantize import TernaryTensor

BITS = 2
_ZERO_POINT = 2
_LARGEST_BLOCK = 128
_SMALLEST_BLOCK = 16


class Onnx(Format):
    """Four neighbouring codes a byte, a float32 scale per block."""

    name = "onnx"
    container = "onnx"
    bits_per_weight = BITS + 32 / _LARGEST_BLOCK
    row_multiple = 1
    runs_in = "ONNX Runtime, transformers.js"
    reads_back = False

    def refusal(self, scaling: Scaling) -> str | None:
        """Blocks are powers of two from 16 on; a scale per tensor, row or group is repeated in each of its blocks."""
        if self.block(scaling) >= _SMALLEST_BLOCK:
            return None
        return f"MatMulNBits has blocks of {_SMALLEST_BLOCK} or more, and a group is {scaling.group_size}"

    def usage(self, path: str) -> str:
        """See ``Format``."""
        return (
            "```js\nimport { pipeline } from '@huggingface/transformers';\n\n"
            f"const generator = await pipeline('text-generation', '{path}');\n```"
        )

    def block(self, scaling: Scaling) -> int:
        """Weights that share a stored scale: the largest power of two, up to 128, that divides a group."""
        group = scaling.group_size or _LARGEST_BLOCK
        return min(group & -group, _LARGEST_BLOCK)

    def encode(self, tensor: TernaryTensor, block: int) -> tuple[Bytes, NDArray[np.float32]]:
        """Codes (out, in) and scales to ``B`` and ``scales``."""
        rows, columns = tensor.codes.shape
        blocks = -(-columns // block)
        stored = functional.pad(tensor.codes + _ZERO_POINT, (0, blocks * block - columns), value=_ZERO_POINT)
        quads = stored.view(torch.uint8).view(rows, blocks, block // 4, 4)
        packed = quads[..., 0] | quads[..., 1] << 2 | quads[..., 2] << 4 | quads[..., 3] << 6
        scale = tensor.scale.view(-1, tensor.scale.shape[-1])
        repeated = scale.repeat_interleave(blocks // scale.shape[1], dim=1).expand(rows, blocks)
        return packed.numpy(), repeated.contiguous().numpy()

    def decode(self, packed: Bytes, scales: NDArray[np.float32], columns: int) -> TernaryTensor:
        """The inverse of ``encode``: codes, int8 (out, in), and one scale per block."""
        codes = packed[..., np.newaxis] >> np.array([0, 2, 4, 6], np.uint8) & np.uint8(3)
        rows = codes.reshape(len(packed), -1)[:, :columns].view(np.int8) - np.int8(_ZERO_POINT)
        return TernaryTensor(torch.from_numpy(rows), torch.from_numpy(scales))
