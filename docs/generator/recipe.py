"""The recipe's keys in Markdown, with values, defaults and descriptions, from the models of recipe.py."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from bitconvert.recipe import Recipe, recipe_sections
from docs.generator.markdown import page, paragraphs, prose, table

_WORDS = {"string": "text", "boolean": "true or false", "number": "number", "integer": "whole number", "null": "none"}
_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def recipe_page() -> str:
    """Every key, section by section."""
    sections = recipe_sections()
    own = {name: field for name, field in Recipe.model_fields.items() if name not in sections}
    return page(
        "Recipe keys",
        "A recipe is YAML with these keys. What it leaves out has its default; a key that is not here is refused. "
        "`--set section.key=value` changes one on the command line, and `bitconvert recipes NAME` shows a shipped "
        "recipe whole. For editors that check YAML: [json/recipe.schema.json](json/recipe.schema.json).",
        _keys("", own, Recipe),
        *(_section(name, model) for name, model in sections.items()),
    )


def _section(name: str, model: type[BaseModel]) -> str:
    return paragraphs(f"## {name}", prose(model.__doc__ or ""), _keys(f"{name}.", model.model_fields, model))


def _keys(prefix: str, fields: Mapping[str, FieldInfo], model: type[BaseModel]) -> str:
    schemas = model.model_json_schema()["properties"]
    return table(
        ("key", "values", "default", ""),
        (
            (f"`{prefix}{name}`", _values(schemas[name]), _default(field), prose(field.description or ""))
            for name, field in fields.items()
        ),
    )


def _values(schema: dict[str, Any]) -> str:
    """What a key accepts, in words."""
    if "anyOf" in schema:
        return " or ".join(map(_values, schema["anyOf"]))
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if "prefixItems" in schema:
        return "; ".join(map(_values, schema["prefixItems"]))
    if "items" in schema:
        return f"list of {_values(schema['items'])}"
    bounds = (f" {sign} {schema[bound]:g}" for bound, sign in _BOUNDS.items() if bound in schema)
    return _WORDS[schema["type"]] + ",".join(bounds)


def _default(field: FieldInfo) -> str:
    return "none" if field.default in (None, (), "") else f"`{json.dumps(field.default, ensure_ascii=False)}`"
