"""The student: which models a recipe can train, and how one is made of the original."""

from __future__ import annotations

from functools import reduce

import torch
from torch import nn
from transformers import PreTrainedModel

from bitconvert.errors import BitconvertError, UsageError
from bitconvert.models.checkpoint import Checkpoint
from bitconvert.recipe import Recipe
from bitconvert.ternary.bitlinear import Lambda, insert_bitlinear, learn_scales, train_low_rank
from bitconvert.training.sharding import fill, is_sharded, require_shardable, require_text, shard


def require_trainable(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Refuse a model that a recipe cannot train, as far as its config tells.

    Raises:
        BitconvertError: it is ternary already, and the recipe would not train it on as that.
        UsageError: its context is shorter than the recipe's windows, or a row does not divide into the recipe's groups.
    """
    if is_sharded(recipe):
        require_shardable(recipe)
        require_text(recipe)
    if is_trained_on(checkpoint):
        _require_trained_on(checkpoint, recipe)
    checkpoint.require_context(recipe.training.context, f"--set training.context={checkpoint.max_context}")
    if recipe.scaling.group_size and not recipe.control:
        _require_groups(checkpoint, recipe.scaling.group_size)


def is_trained_on(checkpoint: Checkpoint) -> bool:
    """Whether a model is ternary already, so that training goes on with it instead of making it ternary."""
    return checkpoint.kind in ("latent", "baked")


def settle(recipe: Recipe, checkpoint: Checkpoint) -> Recipe:
    """What a recipe says of a model, with each ``auto`` decided."""
    return recipe.settled(checkpoint.parameters, is_ternary=is_trained_on(checkpoint), is_sharded=is_sharded(recipe))


def settle_split(recipe: Recipe, checkpoint: Checkpoint) -> Recipe:
    """The same for processes that split the model, which need not be there.

    Raises:
        UsageError: the recipe asks for what needs the whole model in one of them.
    """
    is_ternary = is_trained_on(checkpoint)
    recipe = recipe.settled(checkpoint.parameters, is_ternary=is_ternary, is_sharded=True)
    require_shardable(recipe)
    return recipe


def _require_groups(checkpoint: Checkpoint, size: int) -> None:
    skeleton = checkpoint.skeleton()
    for name in _ternary_modules(skeleton, checkpoint):
        columns = int(skeleton.get_submodule(name).in_features)  # type: ignore[arg-type]
        if columns % size:
            raise UsageError(
                f"scaling.granularity: rows of {columns} ({name}) do not divide into groups of {size}",
                "choose a divisor, or row, or tensor",
            )


def _require_trained_on(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """A ternary model is no teacher, computes nothing at λ < 1, and has scales that must not change at once.

    What it keeps from being ternary is what it has kept so far. Baked weights need the estimator mse: it finds their
    scale again when they have moved a little, while absmean shrinks it to their density, and all that was learned is
    gone after one step.
    """
    if recipe.keep.modules or recipe.keep.budget:
        raise UsageError(
            f"{checkpoint.name}: keep: it is ternary already, so there is nothing more to keep",
            "leave keep.modules and keep.budget out; what it has kept so far stays as it is",
        )
    scaling = checkpoint.scaling
    wanted: dict[str, object] = {
        "control": False,
        "lam.curve": "instant",
        "init.method": "none",
        "distill.kl": 0.0,
        "scaling.granularity": scaling.granularity,
        "scaling.estimator": "mse" if checkpoint.kind == "baked" else scaling.estimator,
    }
    differing = [f"--set {key}={value}" for key, value in wanted.items() if _option(recipe, key) != value]
    if not differing and recipe.data.sources:
        return
    source = f", {checkpoint.lineage.source}," if checkpoint.lineage else ""
    state = "is ternary already (baked)" if checkpoint.kind == "baked" else "was warmed up already"
    raise BitconvertError(
        f"{checkpoint.name}: {state}",
        f"give the original{source} and more training.tokens; or train it on as it is, on text alone: "
        + " ".join([*differing, *([] if recipe.data.sources else ["--data TEXT"])]),
    )


def _option(recipe: Recipe, key: str) -> object:
    """A recipe's option by its dotted name."""
    return reduce(getattr, key.split("."), recipe)


def split_student(checkpoint: Checkpoint, recipe: Recipe, device: torch.device) -> tuple[PreTrainedModel, Lambda]:
    """A model with its BitLinears, of which each process reads and keeps its part alone, and their λ."""
    model = checkpoint.without_weights()
    lam = make_student(model, checkpoint, recipe)
    lam.to(device)
    shard(model, device)
    fill(model, checkpoint.read_latent, device, torch.float32)
    return model, lam


def make_student(model: PreTrainedModel, checkpoint: Checkpoint, recipe: Recipe) -> Lambda:
    """Put BitLinears into a model, as the recipe wants them.

    Args:
        model: changed in place; for a control run it stays as it is.
        checkpoint: where it came from.
        recipe: resolved options.

    Returns:
        The λ of its BitLinears.
    """
    if recipe.control:
        return Lambda()
    names = _ternary_modules(model, checkpoint)
    lam = insert_bitlinear(model, names, recipe.scaling)
    if recipe.scaling.estimator == "learned":
        learn_scales(model)
    if recipe.lora.rank:
        train_low_rank(model, recipe.lora.rank)
    return lam


def _ternary_modules(model: nn.Module, checkpoint: Checkpoint) -> list[str]:
    return checkpoint.ternary_modules(name for name, _ in model.named_modules())
