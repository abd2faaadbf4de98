"""``bitconvert convert``: warmup, pack, eval and the model card in one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
)
from bitconvert.cli.completion import format_names
from bitconvert.errors import UsageError
from bitconvert.models.location import locate


def convert(
    model: Original = None,
    recipe: RecipeName = None,
    data: Texts = None,
    held_out: HeldOutTexts = None,
    output: Annotated[
        Path | None, typer.Option(help="Directory to make; the files are called after it. Default: NAME-1.58 here.")
    ] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format", help="As pack takes it. Default: the recipe's. Repeatable.", autocompletion=format_names
        ),
    ] = None,
    lora_rank: LoraRank = None,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the unfinished conversion behind --output.")
    ] = False,
    overwrite: Overwrite = False,
    push_to_hub: Annotated[
        str | None, typer.Option(help="Upload the finished files to owner/model, with the token of `hf auth login`.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make that repository private, if it is new.")] = False,
    as_json: Json = False,
) -> None:
    """Make a ternary model in one go: warmup, pack, eval, model card."""
    options = (recipe, data, held_out, lora_rank, overrides, formats)
    if private and push_to_hub is None:
        raise UsageError("--private is for --push-to-hub", "name a repository, or leave it out")
    if resume:
        from bitconvert.conversion.convert import unfinished_conversion

        output = output or _default_output(model)
        model, resolved = resumed(unfinished_conversion(output), model, *options)
    else:
        resolved = resolve(*options)
    if model is None:
        raise UsageError("--model is missing", "give a hub id, a Hugging Face directory or a GGUF file")
    locate(model)

    from bitconvert.conversion.convert import convert as run
    from bitconvert.models.hub import Repository
    from bitconvert.ui.convert import show_convert
    from bitconvert.ui.progress import progress

    repository = Repository(push_to_hub, private=private) if push_to_hub is not None else None
    with progress() as reporter:
        report = run(
            model,
            output or _default_output(model),
            resolved,
            resume=resume,
            overwrite=overwrite,
            repository=repository,
            reporter=reporter,
        )
    print_json(report) if as_json else show_convert(report)


def _default_output(model: str | None) -> Path:
    if model is None:
        raise UsageError("--output is missing", "name the directory of the conversion")
    return Path(f"{beside_name(model)}-1.58")
