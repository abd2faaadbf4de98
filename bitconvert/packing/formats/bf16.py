"""BF16: 16 bits per weight, the product codes * scale itself, with the scale rounded to 8 bits of mantissa."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from bitconvert.models import gguf_types
from bitconvert.packing.formats.base import EVERYWHERE, Bytes, GgufFormat, block_scales
from bitconvert.ternary.quantize import TernaryTensor


class BF16(GgufFormat):
    """A bfloat16 per weight: a block of one, whose scale is the weight's magnitude, as near as bfloat16 has it."""

    type = gguf_types.BF16
    runs_in = EVERYWHERE
    note = "bfloat16 rounds each scale by up to 0.4 %: the codes are those of the other formats, the weights are not"

    def encode(self, tensor: TernaryTensor) -> Bytes:
        """See ``GgufFormat``; the scales change, the codes do not."""
        weights = self.stored_scales(tensor) * tensor.codes.numpy()
        data: Bytes = torch.from_numpy(weights).bfloat16().view(torch.uint8).numpy()
        return data

    def decode(self, data: Bytes, shape: tuple[int, int]) -> TernaryTensor:
        """See ``GgufFormat``; one scale per weight."""
        weights = torch.from_numpy(np.array(data)).view(torch.bfloat16).float().view(shape)
        return TernaryTensor(weights.sign().to(torch.int8), weights.abs())

    def stored_scales(self, tensor: TernaryTensor) -> NDArray[np.float32]:
        """See ``GgufFormat``; rounded to the nearest bfloat16."""
        return torch.from_numpy(block_scales(tensor, 1)).bfloat16().float().numpy()
