"""``bitconvert plan``: foresee a warmup."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitconvert.cli.arguments import HeldOutTexts, Json, LoraRank, Overrides, RecipeName, print_json, resolve
from bitconvert.cli.completion import gpu_names
from bitconvert.models.location import locate

if TYPE_CHECKING:
    from bitconvert.recipe import Recipe
    from bitconvert.training.gpus import Cluster


def plan(
    model: Annotated[str, typer.Option(help="The original, as warmup takes it.")],
    recipe: RecipeName = None,
    data: Annotated[list[str] | None, typer.Option(help="Text, as warmup takes it. Repeatable.")] = None,
    held_out: HeldOutTexts = None,
    lora_rank: LoraRank = None,
    output: Annotated[
        Path | None, typer.Option(help="Where the result would lie, whose disk is looked at. Default: here.")
    ] = None,
    overrides: Overrides = None,
    gpus: Annotated[
        list[str] | None,
        typer.Option(
            "--gpu",
            help="Foresee it for this GPU too, or for several: rtx-4090, 64xh100 … Repeatable.",
            autocompletion=gpu_names,
        ),
    ] = None,
    measured: Annotated[
        Path | None,
        typer.Option(help="Rates of kernels on one of these GPUs: what `python -m benchmarks.kernels` wrote."),
    ] = None,
    price: Annotated[
        float | None, typer.Option("--price-per-gpu-hour", min=0.0, help="Of one GPU, in whatever currency.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Foresee memory, time, disk, cost and the files' sizes.

    Here, and on GPUs that --gpu names.
    """
    from bitconvert.training.gpus import cluster_of, read_kernels, with_kernels

    resolved = resolve(recipe, data, held_out, lora_rank, overrides)
    devices = [cluster_of(name) for name in gpus or ()]
    locate(model)
    if measured:
        devices = with_kernels(devices, read_kernels(measured))
    foretell(model, resolved, devices, output=output or Path("here"), price=price, as_json=as_json)


def foretell(
    model: str,
    recipe: Recipe,
    devices: Sequence[Cluster] = (),
    *,
    output: Path,
    price: float | None = None,
    as_json: bool,
) -> None:
    """Foresee a conversion, and show it; ``warmup --dry-run`` does the same."""
    from bitconvert.conversion.foresight import plan as run
    from bitconvert.ui.plan import show_plan
    from bitconvert.ui.progress import progress

    with progress() as reporter:
        report = run(model, recipe, devices, output=output, price=price, reporter=reporter)
    print_json(report) if as_json else show_plan(report)
