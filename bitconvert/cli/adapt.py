"""``bitconvert adapt``: train a LoRA adapter of a ternary model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitconvert.cli.arguments import Json, Overwrite, beside_name, print_json
from bitconvert.errors import UsageError
from bitconvert.models.location import locate

if TYPE_CHECKING:
    from bitconvert.recipe import Adaptation


def adapt(
    model: Annotated[
        str | None, typer.Argument(help="A ternary model: latent, baked or packed checkpoint, hub id, or GGUF file.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Conversations (.jsonl with messages), or text as warmup takes it. Repeatable."),
    ] = None,
    held_out: Annotated[list[str] | None, typer.Option(help="The same, to measure on. Repeatable.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="A YAML file of options: recipe.yaml of an adapter.")] = None,
    output: Annotated[Path | None, typer.Option(help="Directory to make. Default: NAME-lora here.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Change an option: lora.rank=32. Repeatable.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the unfinished run behind --output.")] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Fine-tune a ternary model: a LoRA adapter beside its weights."""
    options = _resolve(recipe, data, held_out, overrides)
    if output is None:
        if model is None:
            raise UsageError("--output is missing", "name the directory of the run")
        output = Path(f"{beside_name(model)}-lora")
    if resume:
        model, options = _resumed(output, model, options, as_begun=not (recipe or data or held_out or overrides))
    if model is None:
        raise UsageError("MODEL is missing", "give a ternary model: a directory, a GGUF file or a hub id")
    if not options.data.sources:
        raise UsageError("nothing to learn from", "give conversations or a text with --data FILE")
    locate(model)

    from bitconvert.training.adapt import adapt as run
    from bitconvert.ui.adapt import show_adapt
    from bitconvert.ui.progress import progress

    with progress() as reporter:
        report = run(model, output, options, resume=resume, overwrite=overwrite, reporter=reporter)
    print_json(report) if as_json else show_adapt(report)


def _resolve(
    file: Path | None, data: list[str] | None, held_out: list[str] | None, overrides: list[str] | None
) -> Adaptation:
    """The options with what the command line says on top."""
    from bitconvert.recipe import load_adaptation

    texts = [f"data.sources={json.dumps(data)}"] if data else []
    texts += [f"data.held_out={json.dumps(held_out)}"] if held_out else []
    return load_adaptation(file, [*texts, *(overrides or [])])


def _resumed(output: Path, model: str | None, options: Adaptation, *, as_begun: bool) -> tuple[str, Adaptation]:
    """The model and options to go on with: the run's own, unless the command line names (the same) ones again."""
    from bitconvert.recipe import Adaptation
    from bitconvert.training.run_directory import unfinished_run

    begun_with, begun_options = unfinished_run(output, Adaptation)
    return model or begun_with, begun_options if as_begun else options
