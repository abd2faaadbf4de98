"""``--dry-run``: what a warmup would do and need, from the config alone."""

from __future__ import annotations

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
        BitconvertError: it has been warmed up already: its latents are no teacher, and at λ = 0 no model.
        UsageError: its context is shorter than the recipe's windows.
    """
    if checkpoint.kind == "latent":
        source = f", {checkpoint.lineage.source}," if checkpoint.lineage else ""
        raise BitconvertError(
            f"{checkpoint.name}: was warmed up already", f"give the original{source} and more training.tokens"
        )
    checkpoint.require_context(recipe.training.context, f"--set training.context={checkpoint.max_context}")


def _memory(parameters: int, vocabulary: int, recipe: Recipe) -> int:
    teacher = parameters * (2 if uses_bf16(recipe) else 4) if recipe.distill.kl and not recipe.control else 0
    logits = recipe.training.micro_batch_size * recipe.training.context * vocabulary * 4 * _LOGIT_COPIES
    return parameters * _LATENT_BYTES + teacher + logits
