"""The public names: all there, none of them loaded before it is used."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import pytest

import bitconvert


def test_no_submodule_hides_a_name_of_the_api() -> None:
    """An import of ``bitconvert.NAME`` would put the module where the function is looked for."""
    modules = {module.name for module in pkgutil.iter_modules(bitconvert.__path__)}
    assert modules.isdisjoint(bitconvert.__all__)


@pytest.mark.parametrize("name", bitconvert.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(bitconvert, name).__doc__


def test_importing_costs_nothing() -> None:
    probe = "import bitconvert, sys; print({'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stdout.strip() == "set()"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="frobnicate"):
        bitconvert.frobnicate  # noqa: B018
