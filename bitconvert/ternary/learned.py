"""The gradients of a ternary weight whose scale is learned with it.

Sources: Liu et al., "ParetoQ" (arXiv 2502.02631, StretchedElasticQuant in github.com/facebookresearch/ParetoQ), whose
parameter alpha is 1.5 scales, after Esser et al., "Learned step size quantization" (arXiv 1902.08153).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_RANGE = 0.99 * 1.5
"""In scales: beyond it a weight is clipped, and no gradient moves it."""


def learned_gradients(gradient: Tensor, weight: Tensor, scale: Tensor, lam: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the gradient of ``w' = w + λ (Q(w, scale) - w)`` means for the weight and for its scale.

    Args:
        gradient: of w', float32 (out, in).
        weight: latent, float32 (out, in).
        scale: see TernaryTensor.
        lam: scalar tensor; None for 1.

    Returns:
        Of the weight, (out, in); of the scale, in its shape, divided by the root of the number of weights.
    """
    latent = weight.view(scale.numel(), -1) / scale.view(-1, 1)
    through = gradient.reshape(latent.shape)
    within = latent.abs() <= _RANGE
    codes = latent.round().clamp(-1, 1)
    by_scale = (through * torch.where(within, codes - latent, codes)).sum(1).view(scale.shape)
    for_weight = (through * within).view(weight.shape)
    for_scale = by_scale / math.sqrt(weight.numel())
    return (for_weight, for_scale) if lam is None else (torch.lerp(gradient, for_weight, lam), for_scale * lam)
