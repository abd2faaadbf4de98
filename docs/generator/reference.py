"""The pages of docs/reference."""

from __future__ import annotations

from docs.generator.commands import commands_page, exit_codes_page
from docs.generator.formats import formats_page
from docs.generator.markdown import page
from docs.generator.python import python_page
from docs.generator.recipe import recipe_page
from docs.generator.schemas import json_page, schema_files


def reference() -> dict[str, str]:
    """File name, below docs/reference -> text."""
    return {
        "README.md": _index(),
        "commands.md": commands_page(),
        "exit-codes.md": exit_codes_page(),
        "recipe.md": recipe_page(),
        "formats.md": formats_page(),
        "json.md": json_page(),
        "python.md": python_page(),
        **{f"json/{name}": text for name, text in schema_files().items()},
    }


def _index() -> str:
    return page(
        "Reference",
        "- [Commands](commands.md): every option\n"
        "- [Recipe keys](recipe.md): every key, its values and its default\n"
        "- [Formats](formats.md): what `--format` writes and who reads it\n"
        "- [JSON](json.md): what `--json` prints, with schemas\n"
        "- [Exit codes and errors](exit-codes.md)\n"
        "- [Python](python.md): the public names",
    )
