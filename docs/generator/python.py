"""The public Python names in Markdown, from their signatures and docstrings."""

from __future__ import annotations

import logging
import re
from functools import cache
from typing import Any

import griffe

import bitconvert
from bitconvert.recipe import recipe_sections
from docs.generator.markdown import one_line, page, paragraphs, prose, table
from docs.generator.schemas import results

_WIDTH = 100


def python_page() -> str:
    """Every public name with its signature, arguments, errors and methods."""
    return page(
        "Python",
        "`import bitconvert` costs nothing: a name is loaded when it is first used. The package is typed (`py.typed`). "
        "What fails for a reason that you can mend raises `BitconvertError`.",
        *(_name(target, f"bitconvert.{name}") for name, target in public_objects().items()),
    )


@cache
def public_objects() -> dict[str, Any]:
    """Every public name with its definition, as griffe reads it from the source."""
    logging.getLogger("griffe").setLevel(logging.ERROR)  # it misses types in Attributes that the code gives
    package: Any = griffe.load("bitconvert", docstring_parser="google")
    homes = {name: getattr(bitconvert, name).__module__ for name in bitconvert.__all__}
    return {name: package[f"{home}.{name}".removeprefix("bitconvert.")] for name, home in homes.items()}


def told_parameters(target: Any) -> dict[str, str]:
    """What the docstring of a function says of its parameters."""
    return {each.name: one_line(each.description) for each in _section(target, griffe.DocstringSectionKind.parameters)}


def _name(target: Any, title: str) -> str:
    return paragraphs(f"## {title}", _body(target), _methods(target) if target.is_class else "")


def _methods(target: Any) -> str:
    public = (method for name, method in target.functions.items() if not name.startswith("_") and method.docstring)
    return table(("method", ""), ((f"`{method.signature()}`", one_line(_text(method))) for method in public))


def _text(target: Any) -> str:
    """What a docstring says before its sections."""
    return paragraphs(*(prose(each.value) for each in _parsed(target) if each.kind is griffe.DocstringSectionKind.text))


def _body(target: Any) -> str:
    kinds = griffe.DocstringSectionKind
    raised = (f"- `{each.annotation}`: {one_line(each.description)}" for each in _section(target, kinds.raises))
    return paragraphs(
        _signature(target) if target.is_function else "",
        _text(target),
        _link_to_keys(target.name),
        _parameters(target),
        table(("attribute", "type", ""), map(_attribute, _section(target, kinds.attributes))),
        "Raises:\n\n" + "\n".join(raised) if _section(target, kinds.raises) else "",
        _returned(target) if target.is_function else "",
    )


def _signature(target: Any) -> str:
    """In one line, or a parameter a line."""
    whole = str(target.signature())
    if len(whole) > _WIDTH:
        inner = whole[whole.index("(") + 1 : whole.rindex(") ->")]
        whole = whole.replace(inner, "\n    " + ",\n    ".join(_split(inner)) + ",\n")
    return f"```python\n{whole}\n```"


def _split(parameters: str) -> list[str]:
    """At the commas that are in no bracket."""
    return re.split(r",\s*(?![^\[(]*[\])])", parameters)


def _link_to_keys(name: str) -> str:
    """Where the keys of a recipe or of one of its sections are told."""
    anchors = {section.__name__: f"#{key}" for key, section in recipe_sections().items()}
    anchor = {**anchors, "Recipe": ""}.get(name)
    return "" if anchor is None else f"Its fields are [these keys](recipe.md{anchor})."


def _parameters(target: Any) -> str:
    told = told_parameters(target)
    return table(("parameter", ""), ((f"`{name}`", text) for name, text in told.items()))


def _attribute(attribute: Any) -> tuple[str, str, str]:
    kind = f"`{attribute.annotation}`" if attribute.annotation else ""
    return f"`{attribute.name}`", kind, one_line(attribute.description)


def _returned(target: Any) -> str:
    """Which of the commands' documents its result is, if it is one."""
    command = next((name for name, classes in results().items() if str(target.returns) in classes), None)
    return f"The fields of `{target.returns}` are [the keys of this document](json.md#{command})." if command else ""


def _section(target: Any, kind: griffe.DocstringSectionKind) -> list[Any]:
    return [each for section in _parsed(target) if section.kind is kind for each in section.value]


def _parsed(target: Any) -> list[Any]:
    return target.docstring.parsed if target.docstring else []
