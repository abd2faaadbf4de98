"""The text that a warmup measures on, as text: for whoever measures the result of it in another way."""

from __future__ import annotations

from bitconvert.models.checkpoint import open_checkpoint
from bitconvert.recipe import Recipe
from bitconvert.report.reporter import Reporter
from bitconvert.training.data import text_of
from bitconvert.training.text import held_out_windows


def held_out_text(model: str, recipe: Recipe, reporter: Reporter) -> str:
    """The documents of a recipe's held-out windows, an empty line between two.

    Args:
        model: the original; its weights are loaded only where its own text is trained on.
        recipe: as for ``warmup``.
        reporter: receives the stages.

    Raises:
        BitconvertError: the model or the text cannot be read.
    """
    checkpoint = open_checkpoint(model)
    tokenizer = checkpoint.tokenizer()
    original = None if recipe.data.sources else checkpoint.load_latent()
    return text_of(held_out_windows(original, tokenizer, recipe, reporter), tokenizer)
