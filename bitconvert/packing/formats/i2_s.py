"""I2_S: 2 bits per weight and one scale per tensor, for bitnet.cpp and 0xBitNet. The layout: ``models/i2_s.py``.

bitnet.cpp counts on rows of whole groups of 128, and misaligns all others without a word; its graph of arch llama is
the one that it and 0xBitNet compute alike; and 0xBitNet takes embeddings of other types for F16. bitnet.cpp's own
quantizer leaves what follows the scale undefined and no reader looks at it; here it is zeros.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bitconvert.models import gguf_types
from bitconvert.models.i2_s import SHIFTS, TRAILER, unpack_i2_s
from bitconvert.packing.formats.base import Bytes, Demands, GgufFormat
from bitconvert.recipe import Scaling
from bitconvert.ternary.quantize import TernaryTensor


class I2S(GgufFormat):
    """Four trits a byte, 32 elements apart, the first in the highest bits; the scale behind them all."""

    type = gguf_types.I2_S
    runs_in = "bitnet.cpp, 0xBitNet"
    demands = Demands(architecture="llama", embedding=gguf_types.F16)
    note = (
        "runs in bitnet.cpp and 0xBitNet only; 0xBitNet also wants a byte-level BPE vocabulary, "
        "head_dim = hidden_size / heads and no rope scaling"
    )

    def usage(self, path: str) -> str:
        """See ``Format``."""
        return (
            "With [bitnet.cpp](https://github.com/microsoft/BitNet), in its directory:\n\n"
            f'```sh\npython run_inference.py -m {path} -p "Once upon a time"\n```'
        )

    def refusal(self, scaling: Scaling) -> str | None:
        """There is room for one number behind the codes."""
        if scaling.granularity == "tensor":
            return None
        return f"I2_S has one scale per tensor, and this model has one per {scaling.granularity}"

    def encode(self, tensor: TernaryTensor) -> Bytes:
        """See ``GgufFormat``; flat, n / 4 + 32 bytes."""
        trits = (tensor.codes.numpy().reshape(-1, 4, TRAILER) + np.int8(1)).view(np.uint8) << SHIFTS
        packed = trits[:, 0] | trits[:, 1] | trits[:, 2] | trits[:, 3]
        trailer = np.zeros(TRAILER, np.uint8)
        trailer[:4] = self.stored_scales(tensor).astype("<f4").view(np.uint8)
        return np.concatenate([packed.ravel(), trailer])

    def decode(self, data: Bytes, shape: tuple[int, int]) -> TernaryTensor:
        """See ``GgufFormat``; one scale, shape (1,)."""
        return unpack_i2_s(data, *shape)

    def stored_scales(self, tensor: TernaryTensor) -> NDArray[np.float32]:
        """See ``GgufFormat``: the tensor's own, shape (1,)."""
        scale: NDArray[np.float32] = tensor.scale.numpy().reshape(1)
        return scale
