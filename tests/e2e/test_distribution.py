"""What is published: the sdist and the wheel hold what they should and nothing else, and the wheel works alone."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

from bitconvert.recipe import shipped_recipes
from bitconvert.version import __version__
from tests.commands import document
from tests.pages import ROOT, read

PROJECT = tomllib.loads(read("pyproject.toml"))["project"]
NAME = f"bitconvert-{__version__}"


def run(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([*map(str, arguments)], cwd=cwd, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the sdist, and the wheel that is built from it."""
    directory = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", directory, ROOT)
    return directory


@pytest.fixture(scope="module")
def program(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``bitconvert`` in an environment that holds the wheel alone; what it depends on is seen through a path file."""
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment)
    python = environment / "bin" / "python"
    wheel = built / f"{NAME}-py3-none-any.whl"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet", wheel)
    (packages,) = (environment / "lib").glob("python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return environment / "bin" / "bitconvert"


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    with zipfile.ZipFile(built / f"{NAME}-py3-none-any.whl") as wheel:
        names = set(wheel.namelist())
        metadata = wheel.read(f"{NAME}.dist-info/METADATA").decode()
    package = {f"bitconvert/{each}" for each in _files(ROOT / "bitconvert")}
    recipes = {f"bitconvert/recipes/{each}" for each in _files(ROOT / "recipes")}
    about = {each for each in names if each.startswith(f"{NAME}.dist-info/")}
    assert names - about == package | recipes
    assert {"bitconvert/py.typed", "bitconvert/demo/model/model.safetensors"} <= names
    assert f"{NAME}.dist-info/licenses/LICENSE" in about
    assert "License-Expression: Apache-2.0" in metadata
    assert f"Requires-Python: {PROJECT['requires-python']}" in metadata


@pytest.mark.slow
def test_the_sdist_holds_what_is_tracked(built: Path) -> None:
    with tarfile.open(built / f"{NAME}.tar.gz") as sdist:
        names = {member.name.removeprefix(f"{NAME}/") for member in sdist.getmembers() if member.isfile()}
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout: nothing to compare with")
    tracked = set(run("git", "ls-files").stdout.splitlines())
    of_the_host = {each for each in tracked if each.startswith((".ci/", ".github/"))}
    assert names == tracked - of_the_host | {"PKG-INFO"}


@pytest.mark.slow
def test_the_wheel_works_anywhere(program: Path, tmp_path: Path) -> None:
    assert document("recipes", run(program, "recipes", "--json", cwd=tmp_path).stdout).keys() == set(shipped_recipes())
    where = "import bitconvert; print(bitconvert.__file__)"
    assert str(program.parent.parent) in run(program.parent / "python", "-c", where, cwd=tmp_path).stdout
    few = ("training.tokens=8192", "data.held_out_tokens=2048", "init.tokens=1024", "init.epochs=1")
    overrides = [word for override in few for word in ("--set", override)]
    report = document("demo", run(program, "demo", "--json", *overrides, cwd=tmp_path).stdout)
    assert report["rows"][0]["name"] == "original"
    assert {path.name for path in tmp_path.iterdir()} == {"demo-output"}


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load(read("CITATION.cff"))
    assert (citation["version"], citation["license"]) == (__version__, PROJECT["license"])
    assert citation["title"] == PROJECT["name"]


def test_the_changelog_has_this_version() -> None:
    assert f"## [{__version__}]" in read("CHANGELOG.md")


def test_what_it_says_of_python_is_what_ruff_and_mypy_check() -> None:
    tools = tomllib.loads(read("pyproject.toml"))["tool"]
    assert PROJECT["requires-python"] == f">={tools['mypy']['python_version']}"
    assert tools["ruff"]["target-version"] == f"py{tools['mypy']['python_version'].replace('.', '')}"


def _files(directory: Path) -> list[str]:
    paths = (path for path in directory.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return [path.relative_to(directory).as_posix() for path in paths]
