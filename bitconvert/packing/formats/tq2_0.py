"""TQ2_0: 2.0625 bits per weight, four trits a byte. The fastest on CPUs; Metal and Vulkan compute with it too.

Layout of a block of 256 (``block_tq2_0`` in ggml-common.h): qs[64], d. Bits 2n and 2n + 1 of byte 32 g + m hold element
128 g + 32 n + m.
"""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import as_strided

from bitconvert.models import gguf_types
from bitconvert.packing.formats.base import BlockFormat, Bytes

_LANE = 4
"""Words of 8 bytes that hold 32 elements, one a byte: these share their bytes with the next three lanes."""

_LOWEST = np.uint64(0x0303_0303_0303_0303)


class TQ2_0(BlockFormat):
    """Four trits a byte, 32 elements apart, scale last.

    Lanes are folded onto each other by operations on all words, since those on lanes alone would be short loops; only
    every fourth lane of what comes out means something.
    """

    type = gguf_types.TQ2_0
    runs_in = "llama.cpp (CPU, Metal, Vulkan), QVAC Fabric"
    scale_first = False

    def _pack(self, trits: Bytes) -> Bytes:
        words = trits.reshape(-1).view(np.uint64)
        pairs = words[_LANE:] << np.uint64(2)
        pairs |= words[:-_LANE]
        quads = pairs[2 * _LANE :] << np.uint64(4)
        quads |= pairs[: -2 * _LANE]
        folded = as_strided(quads, (len(words) // 16, _LANE), (128, 8))
        return np.ascontiguousarray(folded).view(np.uint8).reshape(len(trits), 64)

    def _unpack(self, packed: Bytes) -> Bytes:
        lanes = np.zeros((packed.size // 32, 4, _LANE), np.uint64)
        lanes[:, 0] = packed.reshape(-1, 32).view(np.uint64)
        words = lanes.reshape(-1)
        words[2 * _LANE :] |= words[: -2 * _LANE] >> np.uint64(4)
        words[_LANE:] |= words[:-_LANE] >> np.uint64(2)
        words &= _LOWEST
        return words.view(np.uint8).reshape(len(packed), 256)
