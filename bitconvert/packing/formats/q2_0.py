"""Q2_0: 2.25 bits per weight, four trits a byte in blocks of 64. For rows that 256 does not divide, and for CUDA.

Layout of a block of 64 (``block_q2_0`` in ggml-common.h): d, qs[16]. Bits 2n and 2n + 1 of byte m hold element 4 m + n;
a stored v means v - 1 (3, that is +2, is never written here).
"""

from __future__ import annotations

import numpy as np

from bitconvert.models import gguf_types
from bitconvert.packing.formats.base import BlockFormat, Bytes

_BYTES = np.arange(256, dtype=np.uint32)
_WORD_OF_BYTE = _BYTES & 3 | (_BYTES >> 2 & 3) << 8 | (_BYTES >> 4 & 3) << 16 | (_BYTES >> 6) << 24
"""Four trits as one little-endian word with a trit in each byte."""


class Q2_0(BlockFormat):
    """Four neighbouring trits a byte, scale first."""

    type = gguf_types.Q2_0
    runs_in = "recent llama.cpp (CPU, CUDA, Metal, Vulkan), recent Ollama"
    scale_first = True

    def _pack(self, trits: Bytes) -> Bytes:
        words = trits.view(np.uint32)
        pairs = words | words >> 6
        lowest: Bytes = (pairs | pairs >> 12).astype(np.uint8)  # folded twice, the four trits meet in the lowest byte
        return lowest

    def _unpack(self, packed: Bytes) -> Bytes:
        return _WORD_OF_BYTE[packed].view(np.uint8)
