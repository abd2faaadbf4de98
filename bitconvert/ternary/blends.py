"""What a weight looks like on its way from latent to ternary, at λ < 1. A new blend is one function and one row.

Each takes a latent weight, float32 (out, in), the scale of its ternary form (see TernaryTensor) and λ, a scalar tensor,
and gives the weights that are multiplied with: those of a straight-through layer unless the row names their slope.

Sources: Mekkouri et al., "Fine-tuning LLMs to 1.58bit" (Hugging Face, 2024) for the linear one; Wang et al., "Hestia"
(arXiv 2601.20745, github.com/hestia2026/Hestia) for the soft one; Huang et al., "Sherry" (arXiv 2601.07892, Arenas in
github.com/Tencent/AngelSlim) for the residual.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bitconvert.ternary.quantize import rounded

_SOFT_AT = 0.2
"""λ at which the soft blend has left the latent weights behind, and begins to harden."""

_SOFTEST = 0.351
"""The temperature that brings a Gaussian, in units of its absmean, nearest to itself."""

_HARDEST = 1e-6

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
    return torch.lerp(weight, rounded(weight, scale).to(weight.dtype), lam.to(weight.dtype))


def _levels(weight: Tensor, scale: Tensor, _: Tensor) -> Tensor:
    """Nine levels, half a scale apart, for as long as λ is not 1; the ternary ones are three of them."""
    return rounded(weight, scale / 2, largest=4)


def _soft(weight: Tensor, scale: Tensor, lam: Tensor) -> Tensor:
    """Toward the mean of the codes, each as likely as it is near, while λ is small; then they harden to the nearest.

    Hestia's schedule where λ rises linearly up to the end: a fifth of the training for the first, the rest for the
    second. Its temperatures per layer, by the trace of the Hessian, are left out, and no gradient passes through the
    scale.
    """
    mean, _, _ = _soft_codes(weight, scale, lam)
    return torch.lerp(weight, (mean * scale.view(-1, 1)).view(weight.shape), _softened(lam))


def _soft_slope(weight: Tensor, scale: Tensor, lam: Tensor) -> Tensor:
    _, variance, temperature = _soft_codes(weight, scale, lam)
    return torch.lerp(torch.ones_like(weight), (variance * 2 / temperature).view(weight.shape), _softened(lam))


def _soft_codes(weight: Tensor, scale: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance of a code under the softmax of -(w/s - code)^2 / T, and T; (groups, members) and a scalar."""
    annealed = ((lam - _SOFT_AT) / (1 - _SOFT_AT)).clamp(min=0)
    temperature = _SOFTEST * (1 + torch.cos(math.pi * annealed)) / 2 + _HARDEST
    latent = weight.view(scale.numel(), -1) / scale.view(-1, 1)
    nearness = torch.stack([-1 - 2 * latent, torch.zeros_like(latent), 2 * latent - 1])
    minus, zero, plus = nearness.div_(temperature).softmax(0)
    return plus - minus, zero * (plus + minus) + 4 * plus * minus, temperature


def _softened(lam: Tensor) -> Tensor:
    return (lam / _SOFT_AT).clamp(max=1)


def _residual(weight: Tensor, scale: Tensor, lam: Tensor) -> Tensor:
    """``Q(w) + (1 - λ) w``: ternary from the start, beside latent weights that fade."""
    return rounded(weight, scale) + (1 - lam) * weight


def _residual_slope(_weight: Tensor, _scale: Tensor, lam: Tensor) -> Tensor:
    """Straight through Q, and through the latent weights."""
    return 2 - lam


BLENDS: dict[str, Blend] = {
    "linear": Blend(_linear),
    "levels": Blend(_levels),
    "soft": Blend(_soft, _soft_slope),
    "residual": Blend(_residual, _residual_slope),
}
