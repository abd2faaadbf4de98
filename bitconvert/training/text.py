"""What a recipe trains on and measures on: text tokenized once, streamed, or sampled from the model itself."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from bitconvert.errors import UsageError
from bitconvert.recipe import Recipe
from bitconvert.report.reporter import Reporter
from bitconvert.training.corpus import Corpus, hold_out, open_corpus
from bitconvert.training.data import (
    ShuffledWindows,
    Text,
    Tokens,
    TrainingWindows,
    Windows,
    first_windows,
    sample_tokens,
    split_held_out,
    tokenize,
)
from bitconvert.training.run_directory import require_same_texts
from bitconvert.training.streaming import streamed_windows


def training_text(
    original: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    run_directory: Path,
    stack: ExitStack,
    reporter: Reporter,
) -> tuple[Text, TrainingWindows, Windows]:
    """What is trained on, its windows in the order of the training, and those to measure on."""
    if recipe.data.streaming:
        corpus, held_out = _corpus(tokenizer, recipe, reporter)
        return corpus, stack.enter_context(streamed_windows(corpus, tokenizer, recipe, run_directory)), held_out
    tokens, measured = _tokens(original, tokenizer, recipe, reporter)
    require_same_texts(run_directory, [tokens.key, measured.key])
    windows, held_out = _split(tokens, measured, recipe)
    count = recipe.training.steps * recipe.training.batch_size
    return tokens, ShuffledWindows(windows, count, recipe.training.seed), held_out


def held_out_windows(
    original: PreTrainedModel | None, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, reporter: Reporter
) -> Windows:
    """Those to measure on alone; the original is needed only where its own text is trained on."""
    if recipe.data.streaming:
        return _corpus(tokenizer, recipe, reporter)[1]
    return _split(*_tokens(original, tokenizer, recipe, reporter), recipe)[1]


def _corpus(tokenizer: PreTrainedTokenizerFast, recipe: Recipe, reporter: Reporter) -> tuple[Corpus, Windows]:
    """A text that is streamed, and windows to measure on: of a text of their own, or of its first documents."""
    options, context = recipe.data, recipe.training.context
    if not options.sources:
        raise UsageError("data.streaming: there is no text to stream", "give one with --data")
    corpus = open_corpus(options.sources)
    if not options.held_out:
        return hold_out(corpus, tokenizer, options.held_out_tokens, context)
    return corpus, first_windows(tokenize(options.held_out, tokenizer, reporter), options.held_out_tokens, context)


def _tokens(
    original: PreTrainedModel | None, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, reporter: Reporter
) -> tuple[Tokens, Tokens]:
    """Of the text to train on, and of that to measure on, which may be the same."""
    tokens = _training_tokens(original, tokenizer, recipe, reporter)
    return tokens, tokenize(recipe.data.held_out, tokenizer, reporter) if recipe.data.held_out else tokens


def _training_tokens(
    original: PreTrainedModel | None, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, reporter: Reporter
) -> Tokens:
    if recipe.data.sources or original is None:
        return tokenize(recipe.data.sources, tokenizer, reporter)
    reporter.warn("no --data: training on text sampled from the original model (its own distribution, not yours)")
    return sample_tokens(original, tokenizer, recipe.data, recipe.training.context, recipe.training.seed, reporter)


def _split(tokens: Tokens, measured: Tokens, recipe: Recipe) -> tuple[Windows, Windows]:
    """Windows to train on and to measure on, of one text or of two."""
    context = recipe.training.context
    if measured is tokens:
        return split_held_out(tokens, recipe.data.held_out_tokens, context)
    return first_windows(tokens, len(tokens), context), first_windows(measured, recipe.data.held_out_tokens, context)
