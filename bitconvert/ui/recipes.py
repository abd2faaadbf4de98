"""The shipped recipes."""

from __future__ import annotations

from collections.abc import Mapping

from bitconvert.ui.console import new_table, stdout


def show_recipes(recipes: Mapping[str, str]) -> None:
    """The shipped recipes, one line each."""
    table = new_table("recipe", "for", left=2)
    for name, description in recipes.items():
        table.add_row(name, description)
    stdout.print(table)
