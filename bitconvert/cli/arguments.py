"""What several commands share: arguments, names beside a model, JSON."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitconvert.cli.completion import recipe_keys, recipe_names
from bitconvert.errors import UsageError

if TYPE_CHECKING:
    from bitconvert.models.checkpoint import Checkpoint
    from bitconvert.recipe import Recipe
    from bitconvert.report.reporter import Reporter


class AnyRuntime(StrEnum):
    """Who generates a text."""

    auto = "auto"
    torch = "torch"
    llama_cpp = "llama.cpp"


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace what an earlier run wrote to --output, once all is written.")
]
Model = Annotated[
    str, typer.Argument(help="Hub id, Hugging Face directory, latent, baked or packed checkpoint, or GGUF file.")
]
Original = Annotated[
    str | None, typer.Option(help="The original: hub id, Hugging Face directory or GGUF file; a resumed run knows it.")
]
Texts = Annotated[
    list[str] | None,
    typer.Option(
        help="Text: .txt, .jsonl, .parquet, a directory, or a hub dataset. Repeatable. Default: sampled from the model."
    ),
]
HeldOutTexts = Annotated[list[str] | None, typer.Option(help="Text to measure on. Repeatable.")]
RecipeName = Annotated[
    str | None,
    typer.Option(
        help="A shipped recipe's name, or a YAML file. Default: every key's default.", autocompletion=recipe_names
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a recipe's key: optimizer.lr=5e-4. Repeatable.", autocompletion=recipe_keys),
]

LoraRank = Annotated[
    int | None,
    typer.Option(min=0, help="Train changes of this rank inside the rounding, over weights frozen in bf16. 0: whole."),
]
LoraAdapter = Annotated[
    Path | None, typer.Option("--lora", help="Adapter beside the weights: what adapt made, peft's directory, GGUF.")
]


def print_json(report: Any) -> None:
    """Print a command's result, a dataclass or a dictionary, as one JSON document."""
    document = report if isinstance(report, dict) else asdict(report)
    print(json.dumps(document, indent=2, ensure_ascii=False))


def resolve(
    recipe: str | None,
    data: list[str] | None,
    held_out: list[str] | None,
    lora_rank: int | None,
    overrides: list[str] | None,
    formats: list[str] | None = None,
) -> Recipe:
    """The recipe with what the command line says on top."""
    from bitconvert.recipe import load_recipe

    given = {"data.sources": data, "data.held_out": held_out, "pack.formats": formats}
    options = [f"{key}={json.dumps(values)}" for key, values in given.items() if values]
    options += [] if lora_rank is None else [f"lora.rank={lora_rank}"]
    return load_recipe(recipe, [*options, *(overrides or [])])


def resumed(
    begun: tuple[str, Recipe],
    model: str | None,
    recipe: str | None,
    data: list[str] | None,
    held_out: list[str] | None,
    lora_rank: int | None,
    overrides: list[str] | None,
    formats: list[str] | None = None,
) -> tuple[str, Recipe]:
    """The model and recipe to go on with: the run's own, with what is set anew; or those of the command line again."""
    from bitconvert.recipe import load_recipe

    begun_with, begun_recipe = begun
    if recipe or data or held_out or formats or lora_rank is not None:
        return model or begun_with, resolve(recipe, data, held_out, lora_rank, overrides, formats)
    return model or begun_with, load_recipe(overrides=overrides or (), beneath=begun_recipe)


def require_adapter(lora: Path | None) -> None:
    """Refuse an adapter that is not there.

    Raises:
        UsageError: naming it.
    """
    if lora is not None and not lora.exists():
        raise UsageError(f"{lora}: no such file or directory", "give an adapter's directory, or its GGUF file")


def warn_of_formats(model: str, recipe: Recipe, reporter: Reporter) -> None:
    """Say before a long run, not after it, which formats cannot hold what it makes."""
    from bitconvert.models.checkpoint import open_checkpoint
    from bitconvert.packing.pack import foresee_refusals
    from bitconvert.training.keep import foreseen_kept

    checkpoint = open_checkpoint(model, weights=False)
    checkpoint.keeping = foreseen_kept(checkpoint, recipe)
    for name, reason in foresee_refusals(checkpoint, recipe.pack, recipe.scaling).items():
        reporter.warn(f"{name} cannot hold what this run makes: {reason}")


def beside_name(model: str) -> str:
    """What is made of a model, and lies beside it, is called after this."""
    path = Path(model).expanduser()
    name = path.resolve().name if path.exists() else Path(re.sub("@[^/]*", "", model)).name
    return re.sub(r"(-\d{5}-of-\d{5})?\.gguf$", "", name)


def beside(checkpoint: Checkpoint) -> Path:
    """The directory that a model lies in, or this one where it lies in the hub's cache."""
    return checkpoint.path.resolve().parent if Path(checkpoint.name).expanduser().exists() else Path()
