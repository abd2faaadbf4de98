"""``bitconvert recipes``: list recipes, or show one."""

from __future__ import annotations

from typing import Annotated

import typer

from bitconvert.cli.arguments import Json, print_json
from bitconvert.cli.completion import recipe_names


def recipes(
    name: Annotated[
        str | None, typer.Argument(help="Show this recipe whole, defaults included.", autocompletion=recipe_names)
    ] = None,
    as_json: Json = False,
) -> None:
    """List the shipped recipes, or show one."""
    from bitconvert.recipe import load_recipe, shipped_recipes
    from bitconvert.ui.console import show_text
    from bitconvert.ui.recipes import show_recipes

    if name is not None:
        recipe = load_recipe(name)
        print_json(recipe.model_dump(mode="json")) if as_json else show_text(recipe.to_yaml())
        return
    descriptions = {name: load_recipe(name).description for name in shipped_recipes()}
    print_json(descriptions) if as_json else show_recipes(descriptions)
