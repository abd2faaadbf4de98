"""What a weight looks like on its way from latent to ternary, at λ < 1. A new blend is one function and one row.

Each takes a latent weight, float32 (out, in), the scale of its ternary form (see TernaryTensor) and λ, a scalar tensor,
and gives the weights that are multiplied with: those of a straight-through layer unless the row names their slope.

Sources: Mekkouri et al., "Fine-tuning LLMs to 1.58bit" (Hugging Face, 2024) for the linear one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bitconvert.ternary.quantize import TernaryTensor, codes_of

_Blend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Blend(NamedTuple):
    """One way from latent to ternary.

    Attributes:
        weights: what is multiplied with, float32 (out, in).
        slope: its derivative by the latent weight, (out, in) or a scalar; None where the gradient passes straight
            through, as if it were 1.
    """

    weights: _Blend
    slope: _Blend | None = None


def _linear(weight: Tensor, scale: Tensor, lam: Tensor) -> Tensor:
    """``w + λ (Q(w) - w)``, exact at both ends."""
    ternary = TernaryTensor(codes_of(weight, scale), scale)
    return torch.lerp(weight, ternary.dequantize().to(weight.dtype), lam.to(weight.dtype))


def _levels(weight: Tensor, scale: Tensor, _: Tensor) -> Tensor:
    """Nine levels, half a scale apart, for as long as λ is not 1; the ternary ones are three of them."""
    step = scale / 2
    return TernaryTensor(codes_of(weight, step, largest=4), step).dequantize()


BLENDS: dict[str, Blend] = {
    "linear": Blend(_linear),
    "levels": Blend(_levels),
}
