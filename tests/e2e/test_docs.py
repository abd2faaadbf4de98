"""The documentation as a reader would follow it: its commands run, in order, on a tiny model of the real one's name."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections import Counter
from pathlib import Path

import pytest

import bitconvert as api
from bitconvert.training.trainer import WarmupTrainer
from docs.generator.commands import commands
from docs.generator.pictures import PICTURES
from tests.commands import Command
from tests.models import write_model
from tests.pages import PAGES, ROOT, blocks, read

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
CHECKPOINT = "smollm2-ternary"
SMALL = (
    "training.tokens=256",
    "training.context=32",
    "training.batch_size=4",
    "training.compile=false",
    "data.held_out_tokens=64",
    "init.tokens=128",
    "init.epochs=1",
)

FEW_CONVERSATIONS = ("training.context=32", "training.batch_size=2")

NOT_RUN = {
    ("README.md", "installs packages"): 1,
    ("docs/how-to/adapt.md", "needs llama.cpp's own programs"): 1,
    ("docs/tutorial.md", "installs packages"): 1,
    ("docs/tutorial.md", "needs an Android phone"): 1,
    ("docs/how-to/cluster.md", "needs several GPUs"): 1,
    ("docs/how-to/cluster.md", "needs a SLURM cluster"): 1,
    ("docs/how-to/complete-with-tab.md", "writes into the shell's start-up files"): 1,
    ("docs/how-to/complete-with-tab.md", "asks which shell has started it"): 1,
    ("docs/how-to/evaluate-honestly.md", "downloads data sets"): 1,
    ("docs/how-to/run-offline.md", "downloads a model"): 1,
}
"""Every block of commands that no test runs: its page, why, and how many of them."""

FROM_THE_BEGINNING = ("README.md", "docs/tutorial.md")
"""Pages that make the checkpoint themselves; the others begin with it, and with its TQ2_0 file."""


@pytest.mark.parametrize("page", [page for page in PAGES if any(block.runs for block in blocks(page))])
def test_what_a_page_says_can_be_done(page: str, reader: Reader, converted: Path) -> None:
    if page not in FROM_THE_BEGINNING:
        shutil.copytree(converted, Path(), dirs_exist_ok=True)
    if page == "docs/how-to/resume.md":
        reader.is_interrupted()
    for block in blocks(page):
        if block.runs:
            reader.follows(page, block.language, block.text)


def test_what_is_not_run_is_known() -> None:
    found = Counter((page, block.reason) for page in PAGES for block in blocks(page) if block.reason)
    assert found == NOT_RUN


@pytest.mark.parametrize("page", PAGES)
def test_its_links_lead_somewhere(page: str) -> None:
    here = (ROOT / page).parent
    for target, _, anchor in (link.partition("#") for link in re.findall(r"\]\(([^)\s]+)\)", read(page))):
        if "://" not in target:
            file = here / target if target else ROOT / page
            assert file.exists(), f"{page}: {target}"
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
            assert not anchor or anchor in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]


def test_every_page_is_found_from_the_index() -> None:
    linked = {Path("docs") / target for target in re.findall(r"\]\(([^)\s#]+)\)", read("docs/README.md"))}
    assert {Path(page) for page in PAGES if page.startswith("docs/")} - linked == {Path("docs/README.md")}


def test_every_picture_is_drawn_and_shown() -> None:
    shown = set(re.findall(r"\(pictures/([\w-]+)\.png\)", read("docs/explanation.md")))
    committed = {path.stem for path in (ROOT / "docs/pictures").iterdir()}
    assert shown == committed == set(PICTURES)


@pytest.mark.slow
@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_can_be_drawn_again(name: str, tmp_path: Path) -> None:
    PICTURES[name]().savefig(tmp_path / "picture.png")


def test_every_option_that_a_page_names_exists() -> None:
    """Also on the pages whose commands took hours."""
    known = {option for command in commands().values() for each in command.params for option in each.opts}
    for page in (ROOT / "docs").rglob("*.md"):
        for line in re.findall(r"^ *bitconvert \w+ .*$", page.read_text(encoding="utf-8"), re.MULTILINE):
            assert set(re.findall(r" (--[a-z][\w-]*)", line)) <= known | {"--help"}, f"{page}: {line}"


class Reader:
    """Types what pages say, in a directory with the model and the texts that they speak of."""

    def __init__(self, bitconvert: Command, monkeypatch: pytest.MonkeyPatch) -> None:
        self._bitconvert = bitconvert
        self._monkeypatch = monkeypatch

    def follows(self, page: str, language: str, text: str) -> None:
        """Run one block."""
        if language == "python":
            exec(compile(text, page, "exec"), {})
            return
        for line in filter(None, text.replace("\\\n", " ").splitlines()):
            self._types(shlex.split(line, comments=True))

    def is_interrupted(self) -> None:
        """Begin the page's run, and stop it after a step."""
        step = WarmupTrainer.set_progress

        def stop_after_this_step(trainer: WarmupTrainer, number: int) -> None:
            step(trainer, number)
            trainer.stop_requested = True

        shutil.rmtree(CHECKPOINT)
        with self._monkeypatch.context() as patch:
            patch.setattr(WarmupTrainer, "set_progress", stop_after_this_step)
            arguments = ["--model", HUB_ID, "--data", "texts.jsonl", "--output", CHECKPOINT]
            assert self._bitconvert("warmup", *arguments, *_small("warmup")).code == 130

    def _types(self, words: list[str]) -> None:
        if words[0] == "make":
            return  # tests/e2e/test_readme.py asks make what it would do
        outcomes = [self._runs(attempt) for attempt in _attempts(words)]
        assert any(outcome == "" for outcome in outcomes), "\n".join([shlex.join(words), *outcomes])

    def _runs(self, words: list[str]) -> str:
        """Run a command line; what it says on failing."""
        while "=" in words[0]:
            self._monkeypatch.setenv(*words.pop(0).split("=", 1))
        words, target = (words[:-2], words[-1]) if ">" in words else (words, None)
        assert words[0] == "bitconvert", f"{words}: no test can run it; mark its block <!-- not run: reason -->"
        outcome = self._bitconvert(*words[1:], *_small(words[1], resumes="--resume" in words))
        if target:
            Path(target).write_text(outcome.out, encoding="utf-8")
        return "" if outcome.code == 0 else outcome.err


def _attempts(words: list[str]) -> list[list[str]]:
    """``A || B`` as A and B."""
    if "||" not in words:
        return [words]
    first = words.index("||")
    return [words[:first], words[first + 1 :]]


def _small(command: str, *, resumes: bool = False) -> list[str]:
    """Few tokens, for what trains; a run that is resumed has them already."""
    parameters = commands()[command].params if command in commands() else []
    if resumes or not any("--set" in each.opts for each in parameters):
        return []
    overrides = FEW_CONVERSATIONS if command == "adapt" else SMALL
    return [word for override in overrides for word in ("--set", override)]


@pytest.fixture
def reader(world: Path, bitconvert: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reader:
    """A reader in a directory of their own."""
    shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Reader(bitconvert, monkeypatch)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, story: Path) -> Path:
    """A model and texts, by the names that the pages give them."""
    directory = tmp_path_factory.mktemp("world")
    model = write_model(directory / HUB_ID, "smollm2")
    (model / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}")
    talk = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello."}]
    (directory / "chats.jsonl").write_text(f"{json.dumps({'messages': talk})}\n" * 4)
    shutil.copy(story, directory / "heldout.txt")
    documents = story.read_text(encoding="utf-8").split("\n\n")
    (directory / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return directory


@pytest.fixture(scope="module")
def converted(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the tutorial makes of them."""
    directory = tmp_path_factory.mktemp("converted")
    recipe = api.load_recipe(None, [*SMALL, f"data.sources=[{world / 'texts.jsonl'}]"])
    api.warmup(str(world / HUB_ID), directory / CHECKPOINT, recipe, reporter=api.Silent())
    packing = api.Packing(formats=("tq2_0",))
    checkpoint = api.open_checkpoint(str(directory / CHECKPOINT))
    api.pack(checkpoint, packing, directory / f"{CHECKPOINT}-packed", reporter=api.Silent())
    return directory
