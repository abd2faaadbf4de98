"""Error-compensated rounding: what rounding one weight does to a layer's output, those not yet rounded make up for.

Source: Frantar et al., "GPTQ" (arXiv 2210.17323), whose order is kept: column by column, in blocks, by the Cholesky
factor of the inverse Hessian. Codes and scales are those of ``ternarize``. What is kept is not the rounded weight but
the compensated one, as it is just before its rounding: a latent weight that rounds to the compensating codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from bitconvert.recipe import Scaling
from bitconvert.report.reporter import Reporter
from bitconvert.ternary.bitlinear import BitLinear, Lambda, bitlinears
from bitconvert.ternary.quantize import rounded, scale_of
from bitconvert.training.layers import FittedLayers, Layer

_DAMPING = 0.01  # of the mean of the Hessian's diagonal, added to it (GPTQ's)
_BLOCK = 128  # columns after which all that follow are told (GPTQ's)
_ROUNDS = 3  # the scale is that of the latents, which are known once they were made with a scale


@torch.no_grad()
def compensate_layers(
    layers: Sequence[Layer], states: list[Tensor], lam: Lambda, reporter: Reporter, fitted: FittedLayers
) -> None:
    """Replace the latents of one layer after the other; each is given what the ternary layers before it make.

    Args:
        layers: of the decoder, in order; their latents are changed in place.
        states: what goes into the first one.
        lam: of their BitLinears.
        reporter: told how many layers are done.
        fitted: those that are done already; gets the others.
    """
    for done, layer in enumerate(layers, start=1):
        if not fitted.restore(done, layer):
            _compensate(layer, states, lam)
            fitted.keep(done, layer)
        with lam.at(1.0):
            states = layer.all(states)
        reporter.advance(done, len(layers))


def _compensate(layer: Layer, states: Sequence[Tensor], lam: Lambda) -> None:
    with lam.at(0.0), _input_products(bitlinears(layer.module)) as products:
        layer.all(states)
    for linear, of_inputs in products.items():
        linear.weight.copy_(compensated(linear.weight, of_inputs, linear.scaling))
        if linear.learned_scale is not None:
            linear.learn_scale()  # anew, from where the latents are now


@contextmanager
def _input_products(linears: Sequence[BitLinear]) -> Iterator[dict[BitLinear, Tensor]]:
    """X^T X of the inputs X (tokens, in) that linears are given within the block: float32, (in, in)."""
    products: dict[BitLinear, Tensor] = {}
    last: tuple[BitLinear, Tensor] | None = None

    def add(linear: BitLinear, args: tuple[Tensor]) -> None:
        nonlocal last
        if last is not None and args[0] is last[1]:
            products[linear] = products[last[0]]  # q, k and v have one input, and so have gate and up
            return
        last = linear, args[0]
        rows = args[0].flatten(0, -2).float()
        products.setdefault(linear, rows.new_zeros(rows.shape[1], rows.shape[1])).addmm_(rows.t(), rows)

    hooks = [linear.register_forward_pre_hook(add) for linear in linears]
    try:
        yield products
    finally:
        for hook in hooks:
            hook.remove()


def compensated(weight: Tensor, products: Tensor, scaling: Scaling) -> Tensor:
    """A latent weight whose rounding changes the layer's output less than that of the given one.

    Args:
        weight: shape (out, in), float32.
        products: X^T X of the layer's inputs X (tokens, in).
        scaling: by which it is rounded. Groups come in the order of their columns, each with the scale that it has when
            those before it are done.
    """
    factor = _factor(products)
    remaining, latent = weight.clone(), torch.empty_like(weight)
    size = scaling.group_size or weight.shape[1]
    within = Scaling(estimator=scaling.estimator, granularity="row") if scaling.group_size else scaling
    for group in _slices(weight.shape[1], size):
        latent[:, group], errors = _with_its_scale(remaining[:, group].contiguous(), factor[group, group], within)
        remaining[:, group.stop :] -= errors @ factor[group, group.stop :]
    return latent


def _factor(products: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped Hessian; in float64, since it is ill-conditioned."""
    hessian = products.double()
    mean = hessian.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    hessian.diagonal().add_(_DAMPING * mean)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()


def _with_its_scale(weight: Tensor, factor: Tensor, scaling: Scaling) -> tuple[Tensor, Tensor]:
    """Latents and errors (see ``_by_columns``) under the scale that the latents themselves have, or nearly."""
    scale = scale_of(weight, scaling)
    for _ in range(_ROUNDS):
        latent, errors = _by_columns(weight, factor, scale)
        scale = scale_of(latent, scaling)
    return latent, errors


def _by_columns(weight: Tensor, factor: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Latents, and their rounding errors, each divided by its column's factor: both (out, in)."""
    columns = weight.t().contiguous()
    errors = torch.empty_like(columns)
    for block in _slices(len(columns), _BLOCK):
        for index in range(block.start, block.stop):
            column = columns[index]
            errors[index] = (column - rounded(column[:, None], scale)[:, 0]) / factor[index, index]
            columns[index + 1 : block.stop].addr_(factor[index, index + 1 : block.stop], errors[index], alpha=-1)
        columns[block.stop :].addmm_(factor[block, block.stop :].t(), errors[block], alpha=-1)
    return columns.t(), errors.t()


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))
