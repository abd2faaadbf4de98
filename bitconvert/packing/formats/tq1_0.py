"""TQ1_0: 1.6875 bits per weight, five trits a byte. The smallest file; AVX2, NEON and Vulkan compute with it.

Layout of a block of 256 (``block_tq1_0`` in ggml-common.h): qs[48], qh[4], d. Byte m < 32 holds the elements m + 32 n,
n = 0..4; byte 32 + m (m < 16) the elements 160 + m + 16 n; byte 48 + m (m < 4) the elements 240 + m + 4 n, n = 0..3,
and a fifth trit that is 0.
"""

from __future__ import annotations

import numpy as np

from bitconvert.models import gguf_types
from bitconvert.packing.formats.base import BlockFormat, Bytes

_PARTS = ((160, 32), (80, 16), (16, 4))
"""How a block's elements are cut: (elements, bytes they go to)."""

_POWERS = np.array([1, 3, 9, 27, 81], np.uint8)

_BYTE_OF_NUMBER = ((np.arange(243) * 256 + 242) // 243).astype(np.uint8)
"""A byte is the five-digit base-3 number v as the fixed-point fraction ceil(256 v / 243), so that a runtime reads the
first trit as (3 * byte) >> 8 and shifts to the next one by multiplying with 3."""


class TQ1_0(BlockFormat):
    """Five trits a byte, scale last."""

    type = gguf_types.TQ1_0
    runs_in = "llama.cpp (CPU, Vulkan), QVAC Fabric"
    scale_first = False

    def _pack(self, trits: Bytes) -> Bytes:
        numbers = np.empty((len(trits), 52), np.uint8)
        element = byte = 0
        for elements, width in _PARTS:
            part = trits[:, element : element + elements].reshape(len(trits), -1, width)
            numbers[:, byte : byte + width] = _base3(part)
            element, byte = element + elements, byte + width
        return _BYTE_OF_NUMBER[numbers]

    def _unpack(self, packed: Bytes) -> Bytes:
        trits = np.empty((len(packed), 256), np.uint8)
        element = byte = 0
        for elements, width in _PARTS:
            shifted = packed[:, np.newaxis, byte : byte + width] * _POWERS[: elements // width, np.newaxis]
            trits[:, element : element + elements] = _first_trit(shifted).reshape(len(packed), -1)
            element, byte = element + elements, byte + width
        return trits


def _base3(digits: Bytes) -> Bytes:
    """Read up to five digits (blocks, digits, width), the first most significant, as numbers (blocks, width)."""
    number = digits[:, 0].copy()
    for position in range(1, 5):
        number *= 3
        if position < digits.shape[1]:
            number += digits[:, position]
    return number


def _first_trit(fraction: Bytes) -> Bytes:
    """(3 * byte) >> 8 without leaving bytes: 3 b reaches 256 at 86 and 512 at 171."""
    return (fraction >= 86).view(np.uint8) + (fraction >= 171).view(np.uint8)
