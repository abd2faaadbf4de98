"""JSON Schemas (draft 2020-12) of what the commands print with ``--json``, from the result dataclasses.

The class of a command's result is found by its docstring, which begins "What ``bitconvert COMMAND``".
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import pkgutil
import re
from collections.abc import Iterator
from functools import cache
from typing import Any, get_type_hints

import griffe
from pydantic import TypeAdapter

from bitconvert import report
from bitconvert.recipe import Recipe
from docs.generator.markdown import one_line, page, paragraphs, table

Schema = dict[str, Any]

_DIALECT = {"$schema": "https://json-schema.org/draft/2020-12/schema"}


def schema_files() -> dict[str, str]:
    """File name -> text: a schema for each command's document, and one for recipe files."""
    named = {**schemas(), "recipe": _DIALECT | Recipe.model_json_schema()}
    return {
        f"{name}.schema.json": json.dumps(each, indent=2, ensure_ascii=False) + "\n" for name, each in named.items()
    }


@cache
def schemas() -> dict[str, Schema]:
    """The schema of each command's document, by command."""
    of_results = {name: _any_of(name, classes) for name, classes in results().items()}
    return {name: _DIALECT | schema for name, schema in {**of_results, "recipes": _of_recipes()}.items()}


def results() -> dict[str, dict[str, type[Any]]]:
    """The dataclasses of each command's result, mostly one, by their names, by command."""
    found: dict[str, dict[str, type[Any]]] = {}
    for cls in _dataclasses():
        told = re.match(r"What ``bitconvert (\w+)", cls.__doc__ or "")
        if told:
            found.setdefault(told[1], {})[cls.__name__] = cls
    return found


def _dataclasses() -> Iterator[type[Any]]:
    """All that the package of results defines."""
    for module in pkgutil.iter_modules(report.__path__, f"{report.__name__}."):
        for _, cls in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            if dataclasses.is_dataclass(cls) and cls.__module__ == module.name:
                yield cls


def json_page() -> str:
    """Every document, key by key."""
    return page(
        "JSON",
        "With `--json` a command prints one JSON document on stdout and nothing else there. All its keys are always "
        "there, and no others. Until version 1.0 a document may change, with a line in the changelog.",
        *(_document(name, schema) for name, schema in schemas().items()),
    )


def _document(name: str, schema: Schema) -> str:
    parts = ((title, each) for title, each in schema.get("$defs", {}).items() if name != "recipes")
    return paragraphs(
        f"## {name}",
        f"{schema['description']} [Schema](json/{name}.schema.json).",
        _keys(schema),
        *(paragraphs(f"### {title}", each["description"], _keys(each)) for title, each in parts),
    )


def _keys(schema: Schema) -> str:
    keys = schema.get("properties", {})
    return table(
        ("key", "type", ""), ((f"`{key}`", _type(each), each.get("description", "")) for key, each in keys.items())
    )


def _type(schema: Schema) -> str:
    if "anyOf" in schema:
        return " or ".join(map(_type, schema["anyOf"]))
    if "$ref" in schema:
        return str(schema["$ref"].rsplit("/", 1)[-1])
    if "items" in schema:
        return f"array of {_type(schema['items'])}"
    if isinstance(schema.get("additionalProperties"), dict):
        return f"object of {_type(schema['additionalProperties'])}"
    return str(schema["type"])


def _any_of(command: str, classes: dict[str, type[Any]]) -> Schema:
    """Of a command's document, which may be one of several."""
    each = {name: _schema(cls) for name, cls in classes.items()}
    if len(each) == 1:
        return next(iter(each.values()))
    parts = {name: part for schema in each.values() for name, part in schema.pop("$defs", {}).items()}
    return {
        "title": command,
        "description": " Or: ".join(schema["description"] for schema in each.values()),
        "anyOf": [{"$ref": f"#/$defs/{name}"} for name in each],
        "$defs": {**each, **parts},
    }


def _schema(cls: type[Any]) -> Schema:
    """Of what ``asdict`` makes of a dataclass: every field, the computed ones too, and nothing else."""
    schema = TypeAdapter(cls).json_schema(mode="serialization")
    parts = {part.__name__: part for part in _parts(cls)}
    for title, definition in schema.get("$defs", {}).items():
        definition |= _closed(definition, parts[title])
    return schema | _closed(schema, cls)


def _closed(schema: Schema, cls: type[Any]) -> Schema:
    """An object's schema with all its keys described and required, and no others allowed."""
    hints, told = get_type_hints(cls), _told_of_fields(cls)
    properties = {}
    for field in dataclasses.fields(cls):
        of_field = schema["properties"].get(field.name) or TypeAdapter(hints[field.name]).json_schema()
        described = {"description": told[field.name]} if field.name in told else {}
        properties[field.name] = {key: value for key, value in of_field.items() if key != "title"} | described
    summary = one_line((inspect.getdoc(cls) or "").split("\n\n")[0])
    return {
        "description": summary,
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _told_of_fields(cls: type[Any]) -> dict[str, str]:
    """What the docstring's Attributes say, by field."""
    sections = griffe.Docstring(inspect.getdoc(cls) or "").parse("google", warnings=False)
    attributes = (section.value for section in sections if section.kind is griffe.DocstringSectionKind.attributes)
    return {attribute.name: one_line(attribute.description) for section in attributes for attribute in section}


def _parts(cls: Any) -> Iterator[type[Any]]:
    """The dataclasses that a type is made of, itself included."""
    if dataclasses.is_dataclass(cls) and isinstance(cls, type):
        yield cls
        for hint in get_type_hints(cls).values():
            yield from _parts(hint)
    for argument in getattr(cls, "__args__", ()):
        yield from _parts(argument)


def _of_recipes() -> Schema:
    recipe = Recipe.model_json_schema(mode="serialization")
    definitions = recipe.pop("$defs")
    listed = {"type": "object", "additionalProperties": {"type": "string"}, "description": "what each is for, by name"}
    return {
        "title": "recipes",
        "description": "What `bitconvert recipes` shows: a recipe with all its keys, or what each is for, by name.",
        "anyOf": [{"$ref": "#/$defs/Recipe"}, listed],
        "$defs": {**definitions, "Recipe": recipe},
    }
