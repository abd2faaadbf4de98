"""F16: 16 bits per weight, the product codes * scale itself. For every runtime, every shape and every scaling."""

from __future__ import annotations

import numpy as np
import torch

from bitconvert.models import gguf_types
from bitconvert.packing.formats.base import EVERYWHERE, Bytes, GgufFormat
from bitconvert.ternary.quantize import TernaryTensor


class F16(GgufFormat):
    """A float16 per weight: a block of one, whose scale is the weight's magnitude."""

    type = gguf_types.F16
    runs_in = EVERYWHERE

    def encode(self, tensor: TernaryTensor) -> Bytes:
        """See ``GgufFormat``; exact, because +-scale is a float16."""
        weights = self.stored_scales(tensor) * tensor.codes.numpy()
        data: Bytes = weights.astype(np.float16).view(np.uint8)
        return data

    def decode(self, data: Bytes, shape: tuple[int, int]) -> TernaryTensor:
        """See ``GgufFormat``; one scale per weight."""
        weights = np.ascontiguousarray(data).view(np.float16).astype(np.float32).reshape(shape)
        return TernaryTensor(torch.from_numpy(np.sign(weights).astype(np.int8)), torch.from_numpy(np.abs(weights)))
