"""``--dry-run``: what a warmup would do and need, from the config alone."""

from __future__ import annotations

from functools import reduce

from bitconvert.errors import BitconvertError
from bitconvert.models.checkpoint import Checkpoint, open_checkpoint
from bitconvert.recipe import Recipe
from bitconvert.report import WarmupPlan
from bitconvert.training.trainer import uses_bf16

_LATENT_BYTES = 4 + 4 + 8  # float32 latent and gradient, two float32 moments of AdamW
_LOGIT_COPIES = 9  # float32 tensors of the logits' size at the peak of the backward pass, measured with KL and CE


def plan_warmup(model: str, recipe: Recipe) -> WarmupPlan:
    """Foresee a warmup without loading a weight.

    Raises:
        BitconvertError: the model cannot be opened, or is not one to train.
    """
    checkpoint = open_checkpoint(model)
    require_trainable(checkpoint, recipe)
    skeleton = checkpoint.skeleton()
    names = checkpoint.family.ternary_modules(name for name, _ in skeleton.named_modules())
    parameters = sum(p.numel() for p in skeleton.parameters())
    options = recipe.training
    return WarmupPlan(
        model=model,
        architecture=checkpoint.family.model_type,
        parameters=parameters,
        ternary_parameters=sum(skeleton.get_parameter(f"{name}.weight").numel() for name in names),
        ternary_modules=len(names),
        steps=options.steps,
        tokens=options.steps * options.batch_size * options.context,
        accumulation=options.batch_size // options.micro_batch_size,
        memory_bytes=_memory(parameters, checkpoint.complete.vocab_size, recipe),
        recipe=recipe.model_dump(mode="json"),
    )


def require_trainable(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Refuse a model that a recipe cannot train, as far as its config tells.

    Raises:
        BitconvertError: it is ternary already, and the recipe would not train it on as that.
        UsageError: its context is shorter than the recipe's windows.
    """
    if is_trained_on(checkpoint):
        _require_trained_on(checkpoint, recipe)
    checkpoint.require_context(recipe.training.context, f"--set training.context={checkpoint.max_context}")


def is_trained_on(checkpoint: Checkpoint) -> bool:
    """Whether a model is ternary already, so that training goes on with it instead of making it ternary."""
    return checkpoint.kind in ("latent", "baked")


def _require_trained_on(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """A ternary model is no teacher, computes nothing at λ < 1, and has scales that must not change at once.

    Baked weights need the estimator mse: it finds their scale again when they have moved a little, while absmean
    shrinks it to their density, and all that was learned is gone after one step.
    """
    scaling = checkpoint.scaling
    wanted: dict[str, object] = {
        "control": False,
        "lam.curve": "instant",
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


def _memory(parameters: int, vocabulary: int, recipe: Recipe) -> int:
    teacher = parameters * (2 if uses_bf16(recipe) else 4) if recipe.distill.kl and not recipe.control else 0
    logits = recipe.training.micro_batch_size * recipe.training.context * vocabulary * 4 * _LOGIT_COPIES
    return parameters * _LATENT_BYTES + teacher + logits
