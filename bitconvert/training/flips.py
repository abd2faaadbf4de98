"""How many codes change while a model is trained, in a sample of every ternary matrix: whole rows, evenly spread."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bitconvert.ternary.bitlinear import BitLinear
from bitconvert.training.sharding import gathered, layers_that_are_split

_SAMPLED = 2**16
"""Codes that are looked at in a matrix, at least a row. A share of one half has a standard error of 0.2 % then."""


def sampled_codes(model: nn.Module) -> dict[str, Tensor]:
    """The codes of a sample of each BitLinear's rows, by its name: int8, (rows, in), on its device.

    Of a model that is split over processes each layer is gathered for it: all of them have to ask together.
    """
    codes: dict[str, Tensor] = {}
    for prefix, layer in layers_that_are_split(model).items():
        with gathered(layer):
            linears = ((name, each) for name, each in layer.named_modules(prefix=prefix) if isinstance(each, BitLinear))
            codes |= {name: _sample(linear) for name, linear in linears}
    return codes


def _sample(module: BitLinear) -> Tensor:
    rows = max(1, _SAMPLED // module.in_features)
    return module.ternary_rows(math.ceil(module.out_features / rows)).codes


class Change(NamedTuple):
    """What became of some codes.

    Attributes:
        flips: share of them that is another now, 0 to 1.
        sign_flips: share that has gone from -1 to +1 or back.
        sparsity: share that is zero now.
    """

    flips: float
    sign_flips: float
    sparsity: float


@torch.no_grad()
def change(before: dict[str, Tensor], after: dict[str, Tensor]) -> Change:
    """What has become of all the sampled codes of a model together."""
    counts = torch.stack([_counts(before[name], codes) for name, codes in after.items()]).sum(0).tolist()
    total = sum(codes.numel() for codes in after.values())
    return Change(*(count / total for count in counts))


def _counts(before: Tensor, after: Tensor) -> Tensor:
    difference = after - before
    flips, nonzero = torch.count_nonzero(difference), torch.count_nonzero(after)
    return torch.stack([flips, torch.count_nonzero(difference.abs() == 2), after.numel() - nonzero])


class FlipMeter:
    """Tells at each look what has changed since the one before; it holds the codes of one look.

    A resumed run begins with the weights of its checkpoint, so that there is nothing to save.

    Args:
        model: with BitLinears, or without any, as that of a control run.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._codes: dict[str, Tensor] = {}

    def begin(self) -> None:
        """Take the codes as they are now for those to compare with."""
        self._codes = sampled_codes(self._model)

    def look(self, steps: int) -> dict[str, float]:
        """Flips and sign flips per step, over the steps since the last look, and the sparsity now."""
        codes = sampled_codes(self._model)
        if not codes:
            return {}
        changed = change(self._codes, codes)
        self._codes = codes
        return {
            "flips": changed.flips / steps,
            "sign_flips": changed.sign_flips / steps,
            "sparsity": changed.sparsity,
        }
