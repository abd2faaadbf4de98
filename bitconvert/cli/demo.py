"""``bitconvert demo``: the whole way, in minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitconvert.cli.arguments import Json, Overwrite, print_json
from bitconvert.cli.completion import recipe_keys


def demo(
    output: Annotated[Path, typer.Option(help="Directory to make.")] = Path("demo-output"),
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a key of recipes/demo.yaml.", autocompletion=recipe_keys),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Warm up, pack and measure a small embedded model, in minutes."""
    from bitconvert.recipe import load_recipe

    recipe = load_recipe("demo", overrides or ())

    from bitconvert.demo.demo import demo as run
    from bitconvert.ui.demo import show_demo
    from bitconvert.ui.progress import progress

    with progress() as reporter:
        report = run(output, recipe, reporter, overwrite=overwrite)
    print_json(report) if as_json else show_demo(report)
