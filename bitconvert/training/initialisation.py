"""What is done to the latents before the first step, decoder layer by decoder layer, with the text to be trained on."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bitconvert.recipe import Recipe
from bitconvert.report.reporter import Reporter
from bitconvert.ternary.bitlinear import Lambda
from bitconvert.training.blockwise import fit_layers
from bitconvert.training.data import TrainingWindows
from bitconvert.training.gptq import compensate_layers
from bitconvert.training.layers import FittedLayers, taken_apart


def initialise(
    student: PreTrainedModel,
    lam: Lambda,
    recipe: Recipe,
    windows: TrainingWindows,
    dtype: torch.dtype,
    reporter: Reporter,
    fitted: FittedLayers,
) -> int:
    """Change the student's latents as ``recipe.init`` says; the same recipe makes the same of them each time.

    Args:
        student: with the original's weights in its BitLinears.
        lam: theirs.
        recipe: resolved options.
        windows: the training windows in their order; those at its beginning are looked at.
        dtype: of products, as in training.
        reporter: told how many layers are done.
        fitted: those that an interrupted run did; gets the others as they are done.

    Returns:
        How many tokens of text were looked at.
    """
    batches = [batch.to(student.device) for batch in _batches(windows, recipe)]
    student.train(False)
    with torch.compiler.set_stance("force_eager"):  # compiled layers know neither hooks nor gradients of their own
        with lam.at(0.0):
            layers, states = taken_apart(student, batches, dtype)
        if recipe.init.method == "gptq":
            compensate_layers(layers, states, lam, reporter, fitted)
        else:
            fit_layers(layers, states, lam, recipe.init, recipe.training.seed, reporter, fitted)
    return sum(batch.numel() for batch in batches)


def micro_batches(recipe: Recipe) -> int:
    """How many micro-batches of text a recipe's initialisation looks at, where the text is long enough."""
    options = recipe.training
    windows = min(recipe.init.tokens // options.context, options.steps * options.batch_size)
    return max(1, windows // options.micro_batch_size)


def _batches(windows: TrainingWindows, recipe: Recipe) -> list[Tensor]:
    """At most ``init.tokens`` tokens of those to be trained on, none twice, as micro-batches of one size."""
    count = max(1, min(recipe.init.tokens // recipe.training.context, windows.distinct))
    size = min(recipe.training.micro_batch_size, count)
    tokens = torch.stack([windows[index]["input_ids"] for index in range(count // size * size)])
    return list(torch.split(tokens, size))
