"""Rotary embeddings as the two worlds write them: the order of the rows, and Llama 3's slowed-down frequencies.

Hugging Face rotates element i of a head with element i + head_dim/2, llama.cpp's arch llama rotates neighbours 2i and
2i + 1 (ggml's NORM mode), so the rows of q and k change places within each head. Llama 3.1 divides every frequency by
a factor of its own; GGUF stores those factors as a tensor, Hugging Face the four numbers they come from.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Rope = dict[str, Any]
"""The rotary embedding of one kind of layer, as ``rope_parameters`` of a config describes it."""

_PUBLISHED_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What every published Llama 3.1, 3.2 and 3.3 uses; only ``factor`` differs between them."""

_RECOVERY_TOLERANCE = 1e-4  # relative; the factors are float32 and the bases of their exponents rounded


def global_rope(config: Any) -> Rope:
    """The parameters of the layers that see everything: all layers, but for models with sliding windows."""
    parameters: Rope = config.rope_parameters
    rope: Rope = parameters.get("full_attention", parameters)
    return rope


def local_rope(config: Any) -> Rope | None:
    """The parameters of the layers with a sliding window, where they have parameters of their own."""
    return config.rope_parameters.get("sliding_attention")  # type: ignore[no-any-return]


def in_older_words(config: Any) -> dict[str, Any]:
    """The same under the names that transformers 4 and mlx-lm read at the top of a config."""
    rope, local = global_rope(config), local_rope(config)
    words: dict[str, Any] = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    if local is not None:
        words["rope_local_base_freq"] = local["rope_theta"]
    if rope["rope_type"] != "default":
        words["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return words


def interleave_rows(rows: Tensor, heads: int) -> Tensor:
    """Bring the rows of q or k from Hugging Face's order into llama.cpp's.

    Args:
        rows: shape (heads * head_dim, ...): weights, ternary codes, row scales or a bias.
        heads: query heads for q, key/value heads for k.
    """
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def deinterleave_rows(rows: Tensor, heads: int) -> Tensor:
    """The inverse of ``interleave_rows``."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def llama3_factors(rope: Rope, head_dim: int) -> NDArray[np.float32]:
    """By how much ``rope_type: llama3`` divides each frequency: float32, shape (head_dim / 2,).

    Short wavelengths stay, long ones are slowed by ``factor``, those between are blended linearly in
    original context / wavelength (Llama 3.1's own formula, arXiv 2407.21783).
    """
    rotations = _rotations_per_position(float(rope["rope_theta"]), head_dim)
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    kept = np.clip((rope["original_max_position_embeddings"] * rotations - low) / (high - low), 0, 1)
    factors: NDArray[np.float32] = (1 / ((1 - kept) / float(rope["factor"]) + kept)).astype(np.float32)
    return factors


def recover_llama3(factors: NDArray[np.float32], theta: float, head_dim: int) -> Rope | None:
    """Rope parameters whose ``llama3_factors`` are the given ones, or None if there are none.

    The published parameters come first. Others are only determined up to a common scale (doubling the original
    context and both frequency factors changes nothing), so ``low_freq_factor`` is taken as 1.
    """
    fitted = _fit_llama3(factors, theta, head_dim)
    for guess in (_PUBLISHED_LLAMA3, _as_written(fitted), fitted):
        if guess is None:
            continue
        rope = {"rope_type": "llama3", "rope_theta": theta, "factor": float(str(factors.max())), **guess}
        if np.allclose(llama3_factors(rope, head_dim), factors, rtol=_RECOVERY_TOLERANCE, atol=0):
            return rope
    return None


def _as_written(fitted: dict[str, Any] | None) -> dict[str, Any] | None:
    """The numbers as a person would write them, so that they give the very same factors again."""
    return fitted and {**fitted, "high_freq_factor": round(fitted["high_freq_factor"], 3)}


def _rotations_per_position(theta: float, head_dim: int) -> NDArray[np.float64]:
    """1 / wavelength of each pair of dimensions, in turns per position."""
    return theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim) / (2 * math.pi)


def _fit_llama3(factors: NDArray[np.float32], theta: float, head_dim: int) -> Rope | None:
    """Fit the line that the blended factors lie on; None with fewer than two of them."""
    largest = float(factors.max())
    blended = (factors > 1 + _RECOVERY_TOLERANCE) & (factors < largest * (1 - _RECOVERY_TOLERANCE))
    if int(blended.sum()) < 2:
        return None
    kept = (1 / factors[blended].astype(np.float64) - 1 / largest) / (1 - 1 / largest)
    slope, offset = np.polyfit(_rotations_per_position(theta, head_dim)[blended], kept, 1)
    if offset >= 0:
        return None
    return {
        "low_freq_factor": 1.0,
        "high_freq_factor": 1 - 1 / float(offset),
        "original_max_position_embeddings": round(-float(slope) / float(offset)),
    }
