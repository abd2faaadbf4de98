"""Weights as a model computes with them, one at a time, and how far those of two models are apart."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from bitconvert.errors import BitconvertError
from bitconvert.models.checkpoint import Checkpoint
from bitconvert.ternary.quantize import ternarize

_WEIGHTS_AT_ONCE = 2**22  # in float64, twice, and what is made of them: 128 MiB


def read_meant(checkpoint: Checkpoint, name: str) -> Tensor:
    """One of ``checkpoint.weights()`` as the model computes with it, float32: codes decoded, latent weights rounded.

    Raises:
        BitconvertError: as ``Checkpoint.read``.
    """
    weight = checkpoint.read_weight(name)
    if checkpoint.kind == "latent" and checkpoint.is_ternary_module(name.removesuffix(".weight")):
        return ternarize(weight, checkpoint.scaling).dequantize()
    return weight


def relative_distance(original: Tensor, weight: Tensor) -> float | None:
    """``||weight - original|| / ||original||`` (Frobenius), of one shape; None where the original is all zeros."""
    norm = distance = 0.0
    for theirs, ours in row_pairs(original, weight):
        norm += float(theirs.double().square().sum())
        distance += float((ours.double() - theirs.double()).square().sum())
    return math.sqrt(distance / norm) if norm else None


def row_pairs(first: Tensor, second: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The same rows of two tensors of one shape, a bounded number of weights at a time."""
    rows = max(1, _WEIGHTS_AT_ONCE // max(1, first[:1].numel()))
    return zip(torch.split(first, rows), torch.split(second, rows), strict=True)


def require_same_shapes(original: Checkpoint, checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """Refuse two models whose weights do not correspond.

    Raises:
        BitconvertError: one of the named weights is missing in the original, or has another shape there.
    """
    theirs, ours = original.weights(), checkpoint.weights()
    for name in names:
        if theirs.get(name) != ours[name]:
            there = f"has shape {theirs[name]}" if name in theirs else "is missing"
            raise BitconvertError(
                f"{checkpoint.name} does not come from {original.name}: tensor {name} {there} in the latter",
                "give the model that this one was made from",
            )
