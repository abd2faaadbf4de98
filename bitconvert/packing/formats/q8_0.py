"""Q8_0: 8.5 bits per weight. Every runtime computes with it; a fallback for rows that 64 does not divide.

Layout of a block of 32 (``block_q8_0`` in ggml-common.h): d, qs[32] (int8). ggml's reference quantizer would store
+-127 with d = s / 127 and round d; the codes themselves with d = s are as valid, and lose nothing.
"""

from __future__ import annotations

import numpy as np

from bitconvert.models import gguf_types
from bitconvert.packing.formats.base import EVERYWHERE, BlockFormat, Bytes


class Q8_0(BlockFormat):
    """One code a byte, scale first."""

    type = gguf_types.Q8_0
    runs_in = EVERYWHERE
    scale_first = True

    def _pack(self, trits: Bytes) -> Bytes:
        return trits - np.uint8(1)

    def _unpack(self, packed: Bytes) -> Bytes:
        return packed + np.uint8(1)
