"""Which matrices are kept from being ternary: those that a recipe names, or those that lose most by being rounded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitconvert.errors import UsageError
from bitconvert.models.checkpoint import Checkpoint
from bitconvert.models.head import head_of, hidden_states
from bitconvert.recipe import Distillation, Recipe, Scaling
from bitconvert.report.reporter import Reporter
from bitconvert.ternary.bitlinear import insert_bitlinear
from bitconvert.training.data import TrainingWindows
from bitconvert.training.distill import FullTarget, distillation_loss, predicting_positions

_DIVERGENCE = Distillation(kl=1.0, ce=0.0)


class Kept(BaseModel):
    """A choice that was made.

    Attributes:
        modules: linears of the blocks that stay out of the ternary ones, by their dotted names.
        tokens: that went forward through the original to make it.
    """

    model_config = ConfigDict(extra="forbid")

    modules: tuple[str, ...]
    tokens: int = 0


def foreseen_kept(checkpoint: Checkpoint, recipe: Recipe) -> tuple[str, ...]:
    """The linears that a recipe names; for a budget the first that fill it, as long as nothing has been measured.

    Raises:
        UsageError: a pattern matches no linear, or every linear is matched, or the budget is too small for any.
    """
    if recipe.control or not (recipe.keep.modules or recipe.keep.budget):
        return ()
    weights = _weights(checkpoint)
    if recipe.keep.modules:
        return _named(weights, recipe.keep.modules)
    return within_budget(weights, weights, recipe.keep.budget)


def choose_kept(
    model: PreTrainedModel, checkpoint: Checkpoint, order: TrainingWindows, recipe: Recipe, reporter: Reporter
) -> Kept:
    """The linears that cost most when they are rounded, by weight, as far as the recipe's budget goes.

    It takes one forward pass for each linear, over the first windows of the training.

    Args:
        model: the original, with plain linears; it is the same afterwards.
        checkpoint: where it came from.
        order: the windows of the training.
        recipe: resolved options, with a budget.
        reporter: told the progress, and what was chosen.
    """
    weights = _weights(checkpoint)
    count = max(1, min(recipe.keep.tokens // recipe.training.context, order.distinct))
    tokens = torch.stack([order[index]["input_ids"] for index in range(count)]).to(model.device)
    reporter.stage(f"measuring what it costs to round each of {len(weights)} linears")
    costs = rounding_costs(model, weights, tokens, recipe.scaling, reporter)
    modules = within_budget(costs, weights, recipe.keep.budget)
    for module in modules:
        share = weights[module] / sum(weights.values())
        reporter.note(
            f"kept: {module}, {share:.2%} of the linear weights; rounded alone it costs {costs[module]:.4g} nats"
        )
    return Kept(modules=modules, tokens=(1 + len(weights)) * tokens.numel())


@torch.no_grad()
def rounding_costs(
    model: PreTrainedModel, modules: Iterable[str], tokens: Tensor, scaling: Scaling, reporter: Reporter
) -> dict[str, float]:
    """KL(original || model) per token, in nats, when one linear alone has ternary weights and int8 activations.

    Source: Cai et al., "ZeroQ" (arXiv 2001.00281), which calls this the sensitivity of a layer.

    Args:
        model: the original, with plain linears; it is the same afterwards.
        modules: names of linears.
        tokens: int64, shape (windows, context), on the model's device.
        scaling: of the ternary weights.
        reporter: told the progress.
    """
    original = FullTarget(predicting_positions(hidden_states(model, tokens)), head_of(model), _DIVERGENCE.temperature)
    costs, modules = {}, list(modules)
    for module in modules:
        with _rounded_alone(model, module, scaling):
            hidden = hidden_states(model, tokens)
        loss = distillation_loss(hidden, head_of(model), original, tokens, _DIVERGENCE, tokens[:, 1:].numel())
        costs[module] = float(loss.kl)
        reporter.advance(len(costs), len(modules))
    return costs


def within_budget(costs: Mapping[str, float], weights: Mapping[str, int], budget: float) -> tuple[str, ...]:
    """The modules that cost most by weight, each that still fits, in the model's order.

    Args:
        costs: of rounding a module.
        weights: how many a module has, in the model's order.
        budget: share of all weights that the chosen ones may have.

    Raises:
        UsageError: not one fits.
    """
    room, chosen = budget * sum(weights.values()), set()
    for module in sorted(weights, key=lambda module: costs[module] / weights[module], reverse=True):
        if weights[module] <= room:
            room -= weights[module]
            chosen.add(module)
    if not chosen:
        smallest = min(weights, key=lambda module: weights[module])
        share = weights[smallest] / sum(weights.values())
        raise UsageError(
            f"keep.budget: {budget:g} of the linear weights are fewer than the smallest matrix has",
            f"{smallest} has {share:.2g} of them; 0 keeps nothing",
        )
    return tuple(module for module in weights if module in chosen)


def _named(modules: Iterable[str], patterns: Sequence[str]) -> tuple[str, ...]:
    modules = list(modules)
    for pattern in patterns:
        if not any(fnmatchcase(module, pattern) for module in modules):
            raise UsageError(
                f"keep.modules: no linear layer is called {pattern}", f"they are called like {modules[-1]}"
            )
    named = tuple(module for module in modules if any(fnmatchcase(module, pattern) for pattern in patterns))
    if len(named) == len(modules):
        raise UsageError(
            "keep.modules: every linear layer would be kept", "name some; control=true trains none ternary"
        )
    return named


def _weights(checkpoint: Checkpoint) -> dict[str, int]:
    """How many weights each linear has that could become ternary, in the model's order."""
    skeleton = checkpoint.skeleton()
    linears = checkpoint.family.ternary_modules(name for name, _ in skeleton.named_modules())
    return {name: skeleton.get_parameter(f"{name}.weight").numel() for name in linears}


@contextmanager
def _rounded_alone(model: nn.Module, module: str, scaling: Scaling) -> Iterator[None]:
    """Put a BitLinear at λ = 1 in place of one linear for the duration of a block."""
    linear = model.get_submodule(module)
    insert_bitlinear(model, [module], scaling, lam=1.0)
    try:
        yield
    finally:
        model.set_submodule(module, linear)
