"""docs/reference says what the code says: pages, schemas, and the docstrings that they are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from bitconvert.errors import ExitCode
from bitconvert.packing.formats import FORMATS
from bitconvert.recipe import recipe_defaults, recipe_directory
from docs.generator.commands import commands, prints_json
from docs.generator.python import public_objects, told_parameters
from docs.generator.reference import reference
from docs.generator.schemas import schema_files, schemas

ROOT = Path(__file__).parent.parent.parent
COMMITTED = ROOT / "docs" / "reference"
PAGES = reference()


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_the_code_says(name: str) -> None:
    assert (COMMITTED / name).read_text(encoding="utf-8") == PAGES[name], "run `make reference`"


def test_no_page_is_left_of_what_is_no_more() -> None:
    files = {path.relative_to(COMMITTED).as_posix() for path in COMMITTED.rglob("*") if path.is_file()}
    assert files == set(PAGES)


def test_every_command_and_option_is_told() -> None:
    for name, command in commands().items():
        assert f"## bitconvert {name}\n" in PAGES["commands.md"]
        for option in (spelled for parameter in command.params for spelled in parameter.opts):
            assert f"`{option}" in PAGES["commands.md"] or f", {option}" in PAGES["commands.md"]


def test_every_command_prints_json_and_has_a_schema() -> None:
    assert [name for name, command in commands().items() if not prints_json(command)] == []
    assert set(schemas()) == set(commands()), 'a result\'s docstring begins with "What ``bitconvert COMMAND``"'


def test_every_key_format_and_exit_code_is_told() -> None:
    assert all(f"| `{key}` |" in PAGES["recipe.md"] for key in recipe_defaults())
    assert all(f"| `{name}` |" in PAGES["formats.md"] for name in FORMATS)
    assert all(f"| {code.value} |" in PAGES["exit-codes.md"] for code in ExitCode)


def _objects(schema: Any) -> list[dict[str, Any]]:
    """Every schema of an object with keys, at any depth."""
    if isinstance(schema, list):
        return [found for each in schema for found in _objects(each)]
    if not isinstance(schema, dict):
        return []
    inner = [found for each in schema.values() for found in _objects(each)]
    return [schema, *inner] if "properties" in schema else inner


@pytest.mark.parametrize("command", sorted(set(commands()) - {"recipes"}))
def test_a_schema_describes_every_key_and_allows_no_other(command: str) -> None:
    schema = schemas()[command]
    jsonschema.Draft202012Validator.check_schema(schema)
    found = _objects(schema)
    assert found
    for each in found:
        assert each["additionalProperties"] is False
        assert set(each["required"]) == set(each["properties"])
        assert [key for key, of_key in each["properties"].items() if not of_key.get("description")] == []


def test_shipped_recipes_are_what_the_schema_for_editors_describes() -> None:
    schema = yaml.safe_load(schema_files()["recipe.schema.json"])
    for file in recipe_directory().glob("*.yaml"):
        jsonschema.validate(yaml.safe_load(file.read_text(encoding="utf-8")), schema)
    with pytest.raises(jsonschema.ValidationError, match="frobnicate"):
        jsonschema.validate({"training": {"frobnicate": 1}}, schema)


@pytest.mark.parametrize("name", [name for name, target in public_objects().items() if target.is_function])
def test_a_public_function_is_typed_and_tells_of_each_parameter(name: str) -> None:
    function = public_objects()[name]
    assert function.returns is not None
    assert [each.name for each in function.parameters if each.annotation is None] == []
    assert list(told_parameters(function)) == [each.name for each in function.parameters]
