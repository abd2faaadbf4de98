"""What a shell offers after TAB, asked as the shells ask; without torch, for which nobody waits at a prompt."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bitconvert.packing.formats import FORMATS
from bitconvert.packing.names import FORMAT_NAMES
from bitconvert.recipe import load_recipe, recipe_defaults, shipped_recipes
from bitconvert.training.gpus import GPUS

WITHOUT_TORCH = (
    "import sys\n"
    "sys.modules.update(dict.fromkeys(['torch', 'transformers', 'numpy']))  # an import of None fails\n"
    "from bitconvert.cli.main import main\n"
    "main()"
)


def asked(environment: dict[str, str], *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    return done.stdout


def offered(line: str) -> list[str]:
    """What bash gets for the last word of a command line."""
    words = line.split(" ")
    asks = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1), "_BITCONVERT_COMPLETE": "complete_bash"}
    return asked(asks).split()


def test_commands_and_options() -> None:
    assert {"warmup", "pack", "eval", "recipes"} <= set(offered("bitconvert "))
    assert offered("bitconvert pa") == ["pack"]
    assert {"--recipe", "--resume"} == set(offered("bitconvert warmup --re"))


def test_recipes() -> None:
    assert offered("bitconvert warmup --recipe ") == shipped_recipes()
    assert offered("bitconvert plan --recipe d") == ["demo"]
    assert offered("bitconvert recipes d") == ["demo"]


def test_recipe_keys() -> None:
    assert offered("bitconvert warmup --set lam.") == [
        "lam.curve=",
        "lam.reach_one_at=",
        "lam.activations_reach_one_at=",
    ]
    assert offered("bitconvert demo --set control") == ["control=", "control=false"]  # two, or the shell adds a space
    assert offered("bitconvert warmup --set training.tok") == ["training.tokens=", "training.tokens=1000000"]


def test_every_recipe_key_is_a_key() -> None:
    values = load_recipe().model_dump()
    for section, _, key in (each.partition(".") for each in recipe_defaults()):
        assert key in values[section] if key else section in values
    leaves = sum(len(each) if isinstance(each, dict) else 1 for each in values.values())
    assert len(recipe_defaults()) == leaves


def test_formats() -> None:
    assert offered("bitconvert pack x --format ") == [*FORMATS, "all"]
    assert offered("bitconvert pack x --format tq2_0 --format tq") == ["tq1_0", "tq2_0"]
    assert tuple(FORMATS) == FORMAT_NAMES


def test_gpus_and_runtimes() -> None:
    assert offered("bitconvert plan --gpu h") == [name for name in GPUS if name.startswith("h")]
    assert offered("bitconvert eval x --runtime ") == ["torch", "llama.cpp"]


@pytest.mark.parametrize(("shell", "extra"), [("zsh", {}), ("fish", {"_TYPER_COMPLETE_FISH_ACTION": "get-args"})])
def test_other_shells_are_offered_the_same(shell: str, extra: dict[str, str]) -> None:
    asks = {"_TYPER_COMPLETE_ARGS": "bitconvert pack x --format ", "_BITCONVERT_COMPLETE": f"complete_{shell}"}
    answer = asked({**asks, **extra})
    assert all(name in answer for name in FORMATS)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_has_a_script(shell: str) -> None:
    assert f"complete_{shell}" in asked({"_BITCONVERT_COMPLETE": f"source_{shell}"})


@pytest.fixture
def path(tmp_path: Path) -> dict[str, str]:
    """An environment in which ``bitconvert`` is a program."""
    program = tmp_path / "bitconvert"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m bitconvert "$@"\n')
    program.chmod(0o755)
    return os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}


def test_the_script_works_in_a_real_bash(tmp_path: Path, path: dict[str, str]) -> None:
    """The script is sourced, and its function called as readline calls it."""
    (tmp_path / "script").write_text(asked({"_BITCONVERT_COMPLETE": "source_bash"}))
    lines = [
        f"source {shlex.quote(str(tmp_path / 'script'))}",
        "COMP_WORDS=(bitconvert warmup --recipe smol) COMP_CWORD=3",
        "$(complete -p bitconvert | sed 's/.*-F \\([^ ]*\\).*/\\1/') bitconvert",
        'echo "${COMPREPLY[@]}"',
    ]
    done = subprocess.run(["bash", "-c", "\n".join(lines)], env=path, capture_output=True, text=True)
    assert done.stdout.split() == ["smollm2-135m-cpu"], done.stderr


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_the_script_works_in_a_real_fish(tmp_path: Path, path: dict[str, str]) -> None:
    (tmp_path / "script").write_text(asked({"_BITCONVERT_COMPLETE": "source_fish"}))
    lines = [f"source {shlex.quote(str(tmp_path / 'script'))}", 'complete -C "bitconvert warmup --set training.tok"']
    done = subprocess.run(["fish", "-c", "\n".join(lines)], env=path, capture_output=True, text=True)
    assert done.stdout.split() == ["training.tokens=", "training.tokens=1000000"], done.stderr
