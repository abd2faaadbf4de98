"""SubLN: a norm of what enters the projections that end attention and MLP."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from bitconvert.models.head import hidden_states
from bitconvert.ternary.bitlinear import Lambda

_ENDS = "o_proj", "down_proj"
_EPSILON = 1e-8  # the authors' own


class SubLN(nn.Module):
    """An RMS norm that comes with λ: nothing at λ = 0, the norm itself at λ = 1."""

    def __init__(self, gain: Tensor, lam: Lambda) -> None:
        super().__init__()
        self.weight = nn.Parameter(gain)
        self.lam = lam

    def forward(self, x: Tensor) -> Tensor:
        """Normalize activations of shape (..., in)."""
        if self.lam.is_latent:
            return x
        normed = functional.rms_norm(x.float(), self.weight.shape, self.weight, _EPSILON).to(x.dtype)
        return normed if self.lam.has_ternary_weights else torch.lerp(x, normed, self.lam.value.to(x.dtype))


def insert_subln(model: PreTrainedModel, names: Iterable[str], lam: Lambda, sample: Tensor) -> None:
    """Put a SubLN before each of the named linear layers that ends attention or MLP.

    Its gain starts as the mean root mean square of what enters the layer of the original model. Of all gains that are
    the same for all channels that one changes the activations least. Source: Wu et al., "BitNet Distillation"
    (arXiv 2510.13998), equations 4 and 5, where the gain starts as 1.

    Args:
        model: changed in place; at λ = 0.
        names: of its ternary layers.
        lam: theirs.
        sample: token ids to measure on, shape (batch, context).
    """
    ends = [model.get_submodule(name) for name in names if name.endswith(_ENDS)]
    for linear, rms in zip(ends, _mean_rms(model, ends, sample), strict=True):
        columns = linear.get_parameter("weight").shape[1]
        linear.add_module("subln", SubLN(rms.expand(columns).clone(), lam))
        linear.register_forward_pre_hook(_normalize)


def _normalize(linear: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    normed: Tensor = linear.get_submodule("subln")(*inputs)
    return normed


@torch.no_grad()
def _mean_rms(model: PreTrainedModel, linears: list[nn.Module], sample: Tensor) -> list[Tensor]:
    found: dict[nn.Module, Tensor] = {}

    def measure(linear: nn.Module, inputs: tuple[Tensor]) -> None:
        found[linear] = inputs[0].square().mean(-1).sqrt().mean()

    handles = [linear.register_forward_pre_hook(measure) for linear in linears]
    hidden_states(model, sample)
    for handle in handles:
        handle.remove()
    return [found[linear] for linear in linears]
