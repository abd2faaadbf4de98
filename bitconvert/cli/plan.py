"""``bitconvert plan``: foresee a warmup."""

from __future__ import annotations

from typing import Annotated

import typer

from bitconvert.cli.arguments import Json, LoraRank, print_json, resolve, warn_of_formats
from bitconvert.models.location import locate


def plan(
    model: Annotated[str, typer.Option(help="The original, as warmup takes it.")],
    recipe: Annotated[str | None, typer.Option(help="A shipped recipe's name, or a YAML file.")] = None,
    data: Annotated[list[str] | None, typer.Option(help="Text, as warmup takes it. Repeatable.")] = None,
    held_out: Annotated[list[str] | None, typer.Option(help="Text to measure on. Repeatable.")] = None,
    lora_rank: LoraRank = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Change a recipe's key. Repeatable.")] = None,
    gpus: Annotated[
        list[str] | None, typer.Option("--gpu", help="Foresee it for this GPU too: rtx-4090, h100 … Repeatable.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Foresee a warmup's memory, time and disk, also on GPUs."""
    from bitconvert.training.gpus import gpu_of

    resolved = resolve(recipe, data, held_out, lora_rank, overrides)
    locate(model)
    devices = [gpu_of(name) for name in gpus or ()]

    from bitconvert.training.plan import plan_warmup
    from bitconvert.ui.plan import show_plan
    from bitconvert.ui.progress import progress

    with progress() as reporter:
        warn_of_formats(model, resolved, reporter)
        report = plan_warmup(model, resolved, devices, reporter=reporter)
    print_json(report) if as_json else show_plan(report)
