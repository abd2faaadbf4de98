"""TQ1_0: 1.6875 bits per weight, five trits a byte. The smallest file; AVX2, NEON and Vulkan compute with it.

Layout of a block of 256 (``block_tq1_0`` in ggml-common.h): qs[48], qh[4], d. Byte m < 32 holds the elements m + 32 n,
n = 0..4; byte 32 + m (m < 16) the elements 160 + m + 16 n; byte 48 + m (m < 4) the elements 240 + m + 4 n, n = 0..3,
and a fifth trit that is 0.
"""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import as_strided

from bitconvert.models import gguf_types
from bitconvert.packing.formats.base import BlockFormat, Bytes

_PARTS = ((0, 32, 5), (160, 16, 5), (240, 4, 4))
"""How a block's elements are cut: (first element, bytes they go to, trits a byte)."""

_DIGITS = 5


class TQ1_0(BlockFormat):
    """Five trits a byte, scale last.

    A byte is the five-digit base-3 number v as the fixed-point fraction ceil(256 v / 243), so that a runtime reads the
    first trit as (3 * byte) >> 8 and shifts to the next one by multiplying with 3.
    """

    type = gguf_types.TQ1_0
    runs_in = "llama.cpp (CPU, Vulkan), QVAC Fabric"
    scale_first = False

    def _pack(self, trits: Bytes) -> Bytes:
        numbers = [_folded(trits[:, first : first + width * count], width, count) for first, width, count in _PARTS]
        fractions = np.concatenate(numbers, axis=1).astype(np.uint16)
        fractions <<= 8
        fractions += 242
        fractions //= 243
        return fractions.astype(np.uint8)

    def _unpack(self, packed: Bytes) -> Bytes:
        trits = np.empty((len(packed), 256), np.uint8)
        byte = 0
        for first, width, count in _PARTS:
            trits[:, first : first + width * count] = _unfolded(packed[:, byte : byte + width], count)
            byte += width
        return trits


def _folded(elements: Bytes, width: int, count: int) -> Bytes:
    """Trits (blocks, count * width) to base-3 numbers of five digits (blocks, width), the first most significant.

    As in TQ2_0, a lane is added to the one before it everywhere, and only every ``count``-th sum means something.
    """
    flat = np.ascontiguousarray(elements).reshape(-1)
    pairs = flat[:-width] * np.uint8(3)
    pairs += flat[width:]
    quads = pairs[: -2 * width] * np.uint8(9)
    quads += pairs[2 * width :]
    shape, strides = (len(elements), width), (count * width, 1)
    numbers: Bytes = as_strided(quads, shape, strides) * np.uint8(3)
    if count == _DIGITS:
        numbers += as_strided(flat[4 * width :], shape, strides)
    return numbers


def _unfolded(fractions: Bytes, count: int) -> Bytes:
    """The inverse: the first ``count`` trits of fractions (blocks, width), as (blocks, count * width)."""
    blocks, width = fractions.shape
    lanes = np.zeros((blocks, count, width), np.uint8)
    lanes[:, 0] = fractions
    flat = lanes.reshape(-1)
    flat[width:] += flat[:-width] * np.uint8(3)
    flat[2 * width :] += flat[: -2 * width] * np.uint8(9)
    if count == _DIGITS:
        lanes[:, 4] = fractions * np.uint8(81)
    return _first_trit(flat).reshape(blocks, -1)


def _first_trit(fraction: Bytes) -> Bytes:
    """(3 * byte) >> 8 without leaving bytes: 3 b reaches 256 at 86 and 512 at 171."""
    return (fraction >= 86).view(np.uint8) + (fraction >= 171).view(np.uint8)
