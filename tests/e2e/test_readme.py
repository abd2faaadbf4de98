"""The README as a newcomer would follow it: its commands run, its Python runs, its names exist."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bitconvert.packing.formats import FORMATS
from bitconvert.recipe import shipped_recipes
from tests.models import write_model

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_STEPS = ["training.tokens=256", "training.context=32", "data.held_out_tokens=64"]
SMALL = {"plan": _STEPS, "convert": _STEPS, "warmup": _STEPS, "adapt": ["training.context=32", "training.batch_size=2"]}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands(name: str) -> list[list[str]]:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith(name)]


def run(arguments: list[str], directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, cwd=directory, capture_output=True, text=True, check=False)


def test_its_commands_on_a_real_model_run_in_order(tmp_path: Path, story: Path) -> None:
    model = write_model(tmp_path / HUB_ID, "smollm2")
    (model / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}")
    shutil.copy(story, tmp_path / "heldout.txt")
    documents = story.read_text().split("\n\n")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    talk = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello."}]
    (tmp_path / "chats.jsonl").write_text(f"{json.dumps({'messages': talk})}\n" * 4)
    ran = []
    for words in commands("bitconvert"):
        small = [word for override in SMALL.get(words[1], ()) for word in ("--set", override)]
        done = run([sys.executable, "-m", *words, *small], tmp_path)
        assert done.returncode == 0, (words, done.stderr)
        ran.append(words[1])
    looks = ["generate", "inspect", "eval", "compare", "inspect", "inspect", "verify"]
    assert ran == ["doctor", "plan", "convert", "warmup", "pack", "eval", *looks, "adapt", "eval"]


def test_its_python_runs(tmp_path: Path) -> None:
    (code,) = blocks("python")
    done = run([sys.executable, "-c", code], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "tensor([-1,  0,  1], dtype=torch.int8)" in done.stdout


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


@pytest.mark.parametrize("file", sorted(set(re.findall(r"docs/[\w./-]+\.(?:md|png)", README))))
def test_its_links_lead_somewhere(file: str) -> None:
    assert (ROOT / file).exists()


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
