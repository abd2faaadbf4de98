"""Ternarize a stored weight a few rows at a time, from its bits, while they are in the cache: for files of any size.

What comes out is what ``quantize.ternarize`` gives, bit for bit. A code is nonzero where |w| / scale rounds to 1 or
more, and that is where |w| > scale / 2. Floats of one sign are ordered as their bits are, so that a comparison needs no
float32 of a float16 or bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitconvert.recipe import Scaling
from bitconvert.ternary.quantize import SMALLEST_SCALE, TernaryTensor, row_blocks, scale_of

Bits = NDArray[Any]
"""Floats as the signed integers (int16, int32) that their bits are; negative ones are negative."""

_INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
_INFINITY = {torch.float32: 0x7F80_0000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}

_BLOCK = 2**19  # weights at a time: they and what is made of them stay in the cache, and Python is called seldom


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity: ``torch.isfinite`` at memory speed, and without a copy."""
    if tensor.device.type != "cpu":
        return not tensor.numel() or bool(torch.stack(tensor.aminmax()).isfinite().all())
    if tensor.dtype not in _INTEGERS:
        return bool(torch.isfinite(tensor).all())
    parts = (_bits(part) for part in torch.split(tensor.reshape(-1), _BLOCK) if len(part))
    return all(_is_finite(part, _INFINITY[tensor.dtype]) for part in parts)


def ternary_blocks(weight: Tensor, scaling: Scaling) -> Iterator[TernaryTensor]:
    """``ternarize(weight, scaling)`` in blocks of consecutive rows; a scale per tensor comes with each of them.

    Args:
        weight: shape (out, in), any float dtype, on the CPU.
        scaling: estimator and granularity of the scale.

    Raises:
        ValueError: the group size does not divide the row length.
    """
    shared = scale_of(weight, scaling) if scaling.granularity == "tensor" else None
    for block in _row_blocks(weight, scaling):
        scale = scale_of(block, scaling) if shared is None else shared
        yield TernaryTensor(_rounded(block, scale), scale)


def baked_blocks(weight: Tensor, scaling: Scaling) -> Iterator[TernaryTensor]:
    """The same for a weight that is ternary already, in one pass.

    Raises:
        ValueError: what shares a scale s holds other values than -s, 0 and s; or as ``ternary_blocks``.
    """
    if scaling.granularity == "tensor":
        magnitude = _first_magnitude(weight, scaling)
        scale = _scale_of_magnitude(magnitude, weight.dtype).view(1)
        for block in _row_blocks(weight, scaling):
            yield TernaryTensor(_as_it_is(_bits(block), magnitude), scale)
        return
    for block in _row_blocks(weight, scaling):
        groups = _bits(block).reshape(-1, scaling.group_size or block.shape[1])
        magnitude = _magnitudes(groups).max(axis=1, keepdims=True)
        scale = _scale_of_magnitude(magnitude, weight.dtype).view(len(block), -1)
        yield TernaryTensor(_as_it_is(groups, magnitude).view(block.shape), scale)


# ---- scales ----------------------------------------------------------------------------------------------------------


def _first_magnitude(weight: Tensor, scaling: Scaling) -> Bits:
    """What should be the only magnitude of a whole weight, shape (1, 1); 0 if it is all zeros."""
    for block in _row_blocks(weight, scaling):
        magnitude: Bits = _magnitudes(_bits(block)).max().reshape(1, 1)
        if magnitude > 0:
            break
    return magnitude


def _scale_of_magnitude(magnitude: Bits, dtype: torch.dtype) -> Tensor:
    """The float32 that the bits mean, as a scale: among zeros it is the floor of every scale."""
    scale = torch.from_numpy(magnitude).view(dtype if dtype in _INTEGERS else torch.float32).float()
    return torch.where(scale > 0, scale, SMALLEST_SCALE)


# ---- codes -----------------------------------------------------------------------------------------------------------


def _rounded(block: Tensor, scale: Tensor) -> Tensor:
    """Codes of rows, int8 (rows, in), by their scales."""
    bits = _bits(block).reshape(scale.numel() if scale.dim() > 1 else 1, -1)
    zero = _bits_not_above(scale.view(-1, 1) / 2, block.dtype)  # the largest magnitudes whose code is 0
    return _codes(bits > zero, _unsigned(bits) > _unsigned(_negative(zero))).view(block.shape)


def _as_it_is(groups: Bits, magnitude: Bits) -> Tensor:
    """Codes of ternary values, int8, whose nonzero magnitudes are known."""
    nonzero = np.where(magnitude > 0, magnitude, np.iinfo(groups.dtype).max)  # among zeros none is found
    plus, minus = groups == nonzero, groups == _negative(nonzero)
    known = plus | minus
    known |= groups == 0
    if not known.all() and not (known | (groups == np.iinfo(groups.dtype).min)).all():  # -0.0 is rare
        raise ValueError("there are other values than -s, 0 and s for one scale s")
    return _codes(plus, minus)


def _codes(plus: NDArray[np.bool_], minus: NDArray[np.bool_]) -> Tensor:
    return torch.from_numpy(np.subtract(plus.view(np.int8), minus.view(np.int8)))


# ---- rows and bits ---------------------------------------------------------------------------------------------------


def _row_blocks(weight: Tensor, scaling: Scaling) -> Iterator[Tensor]:
    """Consecutive rows of a weight, in a dtype whose bits are known."""
    if weight.shape[1] % (scaling.group_size or 1):
        raise ValueError(f"rows of {weight.shape[1]} do not divide into groups of {scaling.group_size}")
    for rows in row_blocks(weight):
        yield weight[rows] if weight.dtype in _INTEGERS else weight[rows].float()


def _bits(values: Tensor) -> Bits:
    integers: Bits = values.detach().contiguous().view(_INTEGERS[values.dtype]).numpy()
    return integers


def _is_finite(bits: Bits, infinity: int) -> bool:
    """Whether no magnitude, of positive or of negative values, reaches infinity; those of NaN are larger still."""
    return bool(bits.max() < infinity and _unsigned(bits).max() < _unsigned(_negative(bits.dtype.type(infinity))))


def _unsigned(bits: Bits) -> Bits:
    """The same bits: magnitudes of positive values first, then magnitudes of negative ones."""
    return bits.view(f"u{bits.itemsize}")


def _magnitudes(bits: Bits) -> Bits:
    magnitudes: Bits = bits & np.iinfo(bits.dtype).max
    return magnitudes


def _negative(magnitudes: Bits) -> Bits:
    negative: Bits = magnitudes | np.iinfo(magnitudes.dtype).min
    return negative


def _bits_not_above(values: Tensor, dtype: torch.dtype) -> Bits:
    """The largest numbers of a dtype that are not above some nonnegative float32 values."""
    stored = values.to(dtype)
    bits: Bits = _bits(stored) - (stored.float() > values).numpy()
    return bits
