"""``bitconvert warmup``: train a model's linear layers down to {-1, 0, +1}."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitconvert.cli.arguments import (
    HeldOutTexts,
    Json,
    LoraRank,
    Original,
    Overrides,
    Overwrite,
    RecipeName,
    Texts,
    beside_name,
    print_json,
    resolve,
    resumed,
    warn_of_formats,
)
from bitconvert.cli.plan import foretell
from bitconvert.errors import UsageError
from bitconvert.models.location import locate
from bitconvert.models.texts import hub_dataset
from bitconvert.ranks import is_main

if TYPE_CHECKING:
    from bitconvert.recipe import Recipe


def warmup(
    model: Original = None,
    recipe: RecipeName = None,
    data: Texts = None,
    held_out: HeldOutTexts = None,
    output: Annotated[Path | None, typer.Option(help="Directory to make. Default: NAME-ternary here.")] = None,
    lora_rank: LoraRank = None,
    overrides: Overrides = None,
    trackers: Annotated[
        list[str] | None,
        typer.Option("--tracker", help="Write metrics to tensorboard, trackio or wandb too. Repeatable."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Make nothing: foresee it, as `bitconvert plan` does.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the unfinished run behind --output.")] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Train a model's linear layers down to {-1, 0, +1}."""
    if resume:
        with redirect_stdout(sys.stderr):  # see below
            from bitconvert.recipe import Recipe
            from bitconvert.training.run_directory import unfinished_run

        output = output or _default_output(model)
        begun = unfinished_run(output, Recipe)
        model, resolved = resumed(begun, model, recipe, data, held_out, lora_rank, overrides)
    else:
        resolved = resolve(recipe, data, held_out, lora_rank, overrides)
    if model is None:
        raise UsageError("--model is missing", "give a hub id, a Hugging Face directory or a GGUF file")
    resolved = _tracked(resolved, trackers)
    locate(model)
    for texts in (resolved.data.sources, resolved.data.held_out):
        hub_dataset(texts)
    output = output or _default_output(model)
    if dry_run:
        foretell(model, resolved, output=output, as_json=as_json)
        return

    from bitconvert.ui.progress import progress
    from bitconvert.ui.warmup import show_warmup

    with progress() as reporter, redirect_stdout(sys.stderr):  # trackers print, and transformers tells of wandb
        from bitconvert.training.warmup import warmup as run

        warn_of_formats(model, resolved, reporter)
        report = run(model, output, resolved, resume=resume, overwrite=overwrite, reporter=reporter)
    if is_main():
        print_json(report) if as_json else show_warmup(report)


def _tracked(recipe: Recipe, trackers: list[str] | None) -> Recipe:
    """The recipe with these trackers beside its own."""
    from bitconvert.recipe import load_recipe

    if not trackers:
        return recipe
    all_ = list(dict.fromkeys([*recipe.training.trackers, *trackers]))
    return load_recipe(None, [f"training.trackers={json.dumps(all_)}"], beneath=recipe)


def _default_output(model: str | None) -> Path:
    if model is None:
        raise UsageError("--output is missing", "name the directory of the run")
    return Path(f"{beside_name(model)}-ternary")
