"""TQ2_0: 2.0625 bits per weight, four trits a byte. The fastest on CPUs; Metal and Vulkan compute with it too.

Layout of a block of 256 (``block_tq2_0`` in ggml-common.h): qs[64], d. Bits 2n and 2n + 1 of byte 32 g + m hold element
128 g + 32 n + m.
"""

from __future__ import annotations

import numpy as np

from bitconvert.models import gguf_types
from bitconvert.packing.formats.base import BlockFormat, Bytes

_SHIFTS = np.array([0, 2, 4, 6], np.uint8)[:, np.newaxis]
_TWO_BITS = np.uint8(3)


class TQ2_0(BlockFormat):
    """Four trits a byte, 32 elements apart, scale last."""

    type = gguf_types.TQ2_0
    runs_in = "llama.cpp (CPU, Metal, Vulkan), QVAC Fabric"
    scale_first = False

    def _pack(self, trits: Bytes) -> Bytes:
        lanes = trits.reshape(-1, 4, 32) << _SHIFTS
        packed: Bytes = lanes[:, 0] | lanes[:, 1] | lanes[:, 2] | lanes[:, 3]
        return packed.reshape(len(trits), 64)

    def _unpack(self, packed: Bytes) -> Bytes:
        lanes = packed.reshape(-1, 1, 32) >> _SHIFTS & _TWO_BITS
        return lanes.reshape(len(packed), 256)
