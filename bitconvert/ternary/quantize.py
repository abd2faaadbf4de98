"""The arithmetic of BitNet b1.58: scales and codes. Nothing outside this package rounds a weight.

Sources: Ma et al., "The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits" (arXiv 2402.17764) for absmean
weights and absmax int8 activations; Li et al., "Ternary Weight Networks" (arXiv 1605.04711) for the least-squares
scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from bitconvert.recipe import Scaling

SMALLEST_SCALE = 1e-5
"""Floor of every absmean and absmax, as in transformers' bitnet integration: a zero tensor stays zero, not NaN."""

GRANULARITIES = ("tensor", "row", "group:256", "group:128", "group:64", "group:32")
"""What may share a scale in a file that does not say it, coarsest first. Any 32 weights of one magnitude are no chance:
that is the shortest block of ggml."""

INT8_MAX = 127

_WEIGHTS_AT_ONCE = 2**18  # in float32 they and what is made of them stay in a core's cache
_SMALLEST_PRODUCTS = 1e-18  # two smaller numbers have a product that float32 does not know from 0
_LLOYD_STEPS = 4  # each shrinks the distance to the optimum about 0.4-fold, where the error is flat anyway
_GAUSSIAN_START = 1.534  # least-squares scale / absmean of a Gaussian: 1.2240 sigma / 0.7979 sigma


class TernaryTensor(NamedTuple):
    """A ternary matrix: ``weight = codes * scale``.

    Attributes:
        codes: int8, shape (out, in), each -1, 0 or +1.
        scale: float32, shape (1,) for one scale per tensor, (out, 1) per row, (out, in / N) per group of N.
    """

    codes: Tensor
    scale: Tensor

    def dequantize(self) -> Tensor:
        """The weights that the codes and scales mean: float32, shape (out, in)."""
        rows, columns = self.codes.shape
        groups = self.codes.float().view(rows, self.scale.shape[-1], -1)
        return groups.mul_(self.scale.view(-1, self.scale.shape[-1], 1)).view(rows, columns)

    def with_fp16_scale(self) -> TernaryTensor:
        """The same codes with each scale rounded to the nearest float16, as every file format stores it."""
        return self._replace(scale=fp16_scale(self.scale))


class Int8Tensor(NamedTuple):
    """Activations in eight bits: ``x = codes * scale``.

    Attributes:
        codes: int8, shape (..., features), -127 to 127.
        scale: float32, shape (..., blocks): one for each token, or for each of its blocks.
    """

    codes: Tensor
    scale: Tensor

    def dequantize(self) -> Tensor:
        """The activations that the codes and scales mean: float32, shape (..., features)."""
        blocks = self.codes.float().reshape(*self.scale.shape, self.codes.shape[-1] // self.scale.shape[-1])
        return blocks.mul_(self.scale.unsqueeze(-1)).reshape(self.codes.shape)


def ternarize(weight: Tensor, scaling: Scaling) -> TernaryTensor:
    """Round a weight to ternary codes and scales.

    Idempotent: a weight that already is {-s, 0, +s} keeps its codes and its s.

    Args:
        weight: latent weight, shape (out, in), any float dtype; the arithmetic is float32.
        scaling: estimator and granularity of the scale.

    Raises:
        ValueError: the group size does not divide the row length.
    """
    scale = scale_of(weight, scaling)
    return TernaryTensor(codes_of(weight, scale), scale)


def scale_of(weight: Tensor, scaling: Scaling) -> Tensor:
    """The scale of a weight, of ``scale_shape``: float32. It is estimated in a few passes over each block of rows."""
    columns = weight.shape[-1]
    if columns % (scaling.group_size or 1):
        raise ValueError(f"rows of {columns} do not divide into groups of {scaling.group_size}")
    blocks = [weight.detach()[rows] for rows in row_blocks(weight)]
    if scaling.granularity == "tensor":
        each = partial(map, lambda block: block.float().abs(), blocks)
        return _estimate(_Magnitudes(each, (len(weight), columns), weight.device, True), scaling.estimator).view(1)
    size = scaling.group_size or columns
    scales = torch.empty(len(weight) * columns // size, 1, device=weight.device)
    begin = 0
    for block in blocks:
        groups = block.float().abs().view(-1, size)
        own = _Magnitudes(partial(iter, (groups,)), (len(groups), size), weight.device, False)
        scales[begin : (begin := begin + len(groups))] = _estimate(own, scaling.estimator)
    return scales.view(scale_shape(len(weight), columns, scaling))


def fp16_scale(scale: Tensor) -> Tensor:
    """A scale rounded to the nearest float16, as float32: what every file format stores."""
    return scale.half().float()


def codes_of(weight: Tensor, scale: Tensor) -> Tensor:
    """The codes of a weight under its scale: int8, shape (out, in)."""
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for rows in row_blocks(weight):
        of_rows = scale if scale.dim() == 1 else scale[rows]
        groups = weight.detach()[rows].float().view(-1, weight.shape[1] // scale.shape[-1])
        codes[rows] = (groups / of_rows.view(-1, 1)).round_().clamp_(-1, 1).view(-1, weight.shape[1])
    return codes


def rounded(weight: Tensor, scale: Tensor) -> Tensor:
    """What the codes of a weight under its scale mean: float32, shape (out, in)."""
    return TernaryTensor(codes_of(weight, scale), scale).dequantize()


def row_blocks(weight: Tensor) -> Iterator[slice]:
    """Consecutive rows to work on at once: on a CPU as many as its cache holds; all, elsewhere and for a compiler.

    Never one row alone, if there are more: torch may sum that in another order, depending on the threads it has.
    """
    rows, columns = weight.shape
    whole = weight.device.type != "cpu" or torch.compiler.is_compiling()
    step = rows + 1 if whole else max(2, _WEIGHTS_AT_ONCE // max(1, columns))
    starts = range(0, max(1, rows - 1), step)
    return (slice(begin, end) for begin, end in zip(starts, (*starts[1:], rows), strict=True))


def quantize_int8(x: Tensor, block: int | None = None) -> Int8Tensor:
    """Round activations to int8, one absmax scale per token or block; equal values get transformers' bitnet's codes.

    Args:
        x: activations, shape (..., features), any float dtype; the arithmetic is float32.
        block: how many consecutive features share a scale, as in llama.cpp; None for all of a token's, as in BitNet.
    """
    size = block or x.shape[-1]
    groups = x.detach().float().reshape(*x.shape[:-1], x.shape[-1] // size, size)
    largest = torch.maximum(groups.amax(dim=-1, keepdim=True), -groups.amin(dim=-1, keepdim=True))
    largest = largest.clamp_(min=SMALLEST_SCALE)
    codes = (groups * (INT8_MAX / largest)).round_().to(torch.int8).reshape(x.shape)
    return Int8Tensor(codes, (largest / INT8_MAX).squeeze(-1))


def is_baked(weight: Tensor, granularity: str = "row") -> bool:
    """Whether a weight already is ternary: what shares a scale holds no other magnitude than 0 and one more.

    A checkpoint whose matrices look like this has lost its latent weights and cannot be warmed up.

    Args:
        weight: shape (out, in), any float dtype.
        granularity: what shares a scale, as ``Scaling`` names it.
    """
    scaling = Scaling(estimator="absmean", granularity=granularity)
    if weight.shape[-1] % (scaling.group_size or 1):
        return False
    magnitude = _grouped(weight.detach().abs(), scaling)
    largest = magnitude.amax(dim=-1, keepdim=True)
    return bool(((magnitude == 0) | (magnitude == largest)).all())


def scale_shape(rows: int, columns: int, scaling: Scaling) -> tuple[int, ...]:
    """Shape of the scale of a (rows, columns) weight: (1,), (rows, 1) or (rows, columns / N)."""
    if scaling.granularity == "tensor":
        return (1,)
    return (rows, columns // (scaling.group_size or columns))


def _grouped(weight: Tensor, scaling: Scaling) -> Tensor:
    """View a (out, in) weight as (groups that share nothing, members that share one scale)."""
    if scaling.granularity == "tensor":
        return weight.reshape(1, -1)
    size = scaling.group_size or weight.shape[-1]
    if weight.shape[-1] % size:
        raise ValueError(f"rows of {weight.shape[-1]} do not divide into groups of {size}")
    return weight.reshape(-1, size)


class _Magnitudes(NamedTuple):
    """Groups of magnitudes that have a scale in common, or each one of its own; given in blocks, as often as asked.

    Attributes:
        blocks: gives float32 tensors (groups, members).
        shape: groups and members of all blocks together.
        device: of them.
        shared: whether all groups have one scale.
    """

    blocks: Callable[[], Iterable[Tensor]]
    shape: tuple[int, int]
    device: torch.device
    shared: bool

    def measured(self, measure: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Two numbers for each group, (groups, 1). Their place is made before: small pieces would break up the heap."""
        first, second = (torch.empty(self.shape[0], 1, device=self.device) for _ in range(2))
        begin = 0
        for block in self.blocks():
            rows = slice(begin, begin := begin + len(block))
            first[rows], second[rows] = measure(block)
        return first, second

    def summed(self, each: Tensor) -> Tensor:
        """What the groups of a scale have together: (scales, 1)."""
        return each.sum(dim=0, keepdim=True) if self.shared else each


def _estimate(magnitudes: _Magnitudes, estimator: str) -> Tensor:
    """Scales, shape (groups, 1) or (1, 1), float32; of an estimator that learns, where it starts."""
    sums, maxima = magnitudes.measured(lambda m: (m.sum(-1, keepdim=True), m.amax(-1, keepdim=True)))
    groups, members = magnitudes.shape
    mean = (magnitudes.summed(sums) / (members * groups if magnitudes.shared else members)).clamp_(min=SMALLEST_SCALE)
    scale = mean if estimator == "absmean" else _least_squares(magnitudes, mean)
    # What already is ternary keeps its scale: estimating again would shrink it to its density. The sum of
    # m * (max - m) is 0 exactly when every magnitude is 0 or the largest.
    largest = maxima.amax(dim=0, keepdim=True) if magnitudes.shared else maxima
    between, _ = magnitudes.measured(lambda m: ((largest - m).mul_(m).sum(-1, keepdim=True), m[:, :1]))
    return torch.where((magnitudes.summed(between) == 0) & (largest > _SMALLEST_PRODUCTS), largest, scale)


def _least_squares(magnitudes: _Magnitudes, mean: Tensor) -> Tensor:
    """The scale s that minimizes ||w - s * round(w / s)||^2, by Lloyd's iteration.

    For fixed codes the best s is the mean magnitude of the nonzero ones; for fixed s the codes round at s / 2. Both
    steps only lower the error, and from the Gaussian optimum a few of them settle on trained weights.
    """
    scale = _GAUSSIAN_START * mean
    for _ in range(_LLOYD_STEPS):
        sums, counts = map(magnitudes.summed, magnitudes.measured(partial(_sum_above, scale / 2)))
        scale = (sums / counts.clamp(min=1)).clamp_(min=SMALLEST_SCALE)
    return scale


def _sum_above(threshold: Tensor, magnitudes: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and number, in each row, of the magnitudes above a threshold."""
    above = (magnitudes - threshold).sign_().clamp_(min=0)  # several times as fast as a comparison
    count = above.sum(-1, keepdim=True)
    return above.mul_(magnitudes).sum(-1, keepdim=True), count
