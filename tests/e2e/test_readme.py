"""What the README says of make, of formats and of recipes is so; that its commands run is in test_docs.py."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

from bitconvert.packing.formats import FORMATS
from bitconvert.recipe import shipped_recipes
from tests.pages import ROOT, blocks, read

README = read("README.md")


def commands(name: str) -> list[list[str]]:
    lines = [line for block in blocks("README.md") if block.language == "sh" for line in block.text.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith(name)]


def run(arguments: list[str], directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, cwd=directory, capture_output=True, text=True, check=False)


def test_its_make_targets_exist() -> None:
    for (target,) in [words[1:2] for words in commands("make")]:
        assert run(["make", "--dry-run", "--assume-old=.venv/.ready", target], ROOT).returncode == 0
    listed = run(["make", "help"], ROOT).stdout
    for target in ("demo", "test", "test-all", "check", "lint", "bench"):
        assert f"make {target} " in listed


def test_ci_runs_the_command_for_tests() -> None:
    assert ["make", "test"] in commands("make")
    assert "make test" in (ROOT / ".ci/run").read_text()


def test_its_tables_name_every_format_and_recipe() -> None:
    for name in FORMATS:
        assert f"| `{name}` |" in README
    for name in shipped_recipes():
        assert f"| `{name}` |" in README


def test_the_diffs_in_contributing_are_real() -> None:
    """Every added line that CONTRIBUTING.md shows stands in the file that it names."""
    diffs = re.findall(r"```diff\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)
    shown = 0
    for diff in diffs:
        lines: set[str] = set()
        for line in diff.splitlines():
            if line.startswith("+++ b/"):
                lines = set((ROOT / line.removeprefix("+++ b/")).read_text(encoding="utf-8").splitlines())
            elif line.startswith("+"):
                assert line[1:] in lines, line
                shown += 1
    assert len(diffs) == 2
    assert shown > 20
