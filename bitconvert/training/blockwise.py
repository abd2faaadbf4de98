"""Block-wise reconstruction: each decoder layer, ternary, learns to give what the original's layer gave.

It is fitted on what the ternary layers before it make of the text, to the outputs of the original, which saw the text
as the original makes it: so a layer also mends what those before it left wrong. Sources: Li et al., "BRECQ" (arXiv
2102.05426) for blocks as the unit; Chen et al., "EfficientQAT" (arXiv 2407.11062) for training all weights of a block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bitconvert.errors import BitconvertError
from bitconvert.recipe import Initialisation
from bitconvert.report.reporter import Reporter
from bitconvert.ternary.bitlinear import Lambda
from bitconvert.ternary.schedule import lr_at
from bitconvert.training.layers import FittedLayers, Layer

_LR_SCHEDULE, _LR_WARMUP, _LR_FINAL = "cosine", 0.05, 0.05


def fit_layers(
    layers: Sequence[Layer],
    states: list[Tensor],
    lam: Lambda,
    options: Initialisation,
    seed: int,
    reporter: Reporter,
    fitted: FittedLayers,
) -> None:
    """Train the latents, norms and biases of one layer after the other at λ = 1.

    Args:
        layers: of the decoder, in order; changed in place.
        states: what goes into the first one, batch by batch; a batch is a step.
        lam: of their BitLinears.
        options: rate and epochs of each layer.
        seed: of the batches' order.
        reporter: told how many layers are done.
        fitted: those that are done already; gets the others.

    Raises:
        BitconvertError: the loss is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    given = wanted = states
    for done, layer in enumerate(layers, start=1):
        with lam.at(0.0):
            wanted = layer.all(wanted)
        with lam.at(1.0):
            order = _order(len(given), options.epochs, generator)
            if not fitted.restore(done, layer):
                _fit(layer, given, wanted, order, options.lr)
                fitted.keep(done, layer)
            given = layer.all(given)
        reporter.advance(done, len(layers))


def _order(batches: int, epochs: int, generator: torch.Generator) -> list[int]:
    """Of the steps at one layer; drawn for one that is done too, so that the next has the order it would have had."""
    order: list[int] = torch.cat([torch.randperm(batches, generator=generator) for _ in range(epochs)]).tolist()
    return order


def _fit(
    layer: Layer, inputs: Sequence[Tensor], outputs: Sequence[Tensor], order: Sequence[int], peak_rate: float
) -> None:
    optimizer = torch.optim.Adam(layer.module.parameters())
    for step, index in enumerate(order):
        rate = peak_rate * lr_at((step + 0.5) / len(order), _LR_SCHEDULE, _LR_WARMUP, _LR_FINAL)
        for group in optimizer.param_groups:
            group["lr"] = rate
        error = _relative_error(layer(inputs[index]), outputs[index])
        error.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    if not torch.isfinite(error):
        raise BitconvertError("init.method blockwise: the loss is not finite", "lower init.lr")


def _relative_error(given: Tensor, wanted: Tensor) -> Tensor:
    """The mean of ``|g - w|^2 / |w|^2`` over predicting positions; states have shape (batch, context, hidden).

    Models of this kind have positions, often the first of a text, whose states are a thousand times as large as others:
    divided by what it is at the position itself, no error counts more for that.
    """
    wanted = wanted.to(torch.promote_types(wanted.dtype, torch.float32))
    squares: Tensor = (given - wanted).square().sum(-1) / wanted.square().sum(-1)
    return squares[:, :-1].mean()
