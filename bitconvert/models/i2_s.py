"""I2_S tensors, as bitnet.cpp stores them. Reading only; packing/ writes.

Layout of a tensor of n weights: n / 4 bytes of codes, then 32 bytes that begin with the scale (float32); what follows
it means nothing. Rows come one after another. Of each 128 weights, byte m < 32 holds the elements m, 32 + m, 64 + m and
96 + m, two bits each, the first in the highest bits; a stored v means v - 1.

Source: ``quantize_i2_s`` and ``ggml_vec_dot_i2_i8_s`` of bitnet.cpp (src/ggml-bitnet-mad.cpp).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from bitconvert.ternary.quantize import TernaryTensor

TRAILER = 32
"""Bytes behind the codes."""

SHIFTS = np.array([6, 4, 2, 0], np.uint8)[:, np.newaxis]
"""Where in a byte the four elements lie that share it."""

_UNUSED = 3


def unpack_i2_s(data: NDArray[np.uint8], rows: int, columns: int) -> TernaryTensor:
    """Codes and scale of a tensor.

    Args:
        data: all bytes of the tensor, flat.
        rows: the matrix's height.
        columns: its width; rows * columns is a multiple of 128.

    Returns:
        Codes int8 (rows, columns) and the scale, shape (1,).

    Raises:
        ValueError: a code is none, or the scale no finite number.
    """
    packed = data[:-TRAILER].reshape(-1, 1, TRAILER)
    values = (packed >> SHIFTS & np.uint8(3)).reshape(rows, columns)
    if (values == _UNUSED).any():
        raise ValueError("it holds codes other than -1, 0 and 1")
    scale = np.frombuffer(data[-TRAILER:].tobytes(), "<f4", 1).copy()
    if not np.isfinite(scale).all():
        raise ValueError("its scale is not finite")
    return TernaryTensor(torch.from_numpy(values.view(np.int8) - np.int8(1)), torch.from_numpy(scale))
