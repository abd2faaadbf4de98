"""``bitconvert demo``: the whole way on an embedded model, in minutes, with nothing to download.

Four models are measured on the same held-out stories: the original, the original rounded without training, the original
warmed up, and a control that got the same extra tokens in full precision, since part of any recovery is mere training.
"""

from __future__ import annotations

import json
import time
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from bitconvert.atomic import set_aside
from bitconvert.demo.stories import HELD_OUT_SEED, WARMUP_SEED, stories, text
from bitconvert.evaluation.arguments import RuntimeName
from bitconvert.evaluation.evaluate import evaluate
from bitconvert.evaluation.generate import generate
from bitconvert.evaluation.inspect import inspect
from bitconvert.evaluation.subjects import has_llama_cpp
from bitconvert.models.checkpoint import open_checkpoint
from bitconvert.models.manifest import require_free, write_manifest
from bitconvert.packing.pack import pack
from bitconvert.recipe import Packing, Recipe
from bitconvert.report.demo import DemoReport, DemoRow
from bitconvert.report.packing import PackedFile
from bitconvert.report.reporter import Reporter
from bitconvert.training.warmup import warmup

MODEL = Path(__file__).parent / "model"
PROMPT = "Once, there was a"

_TOKENS_PER_STORY = 100  # fewer than the shortest, so that no training story is seen twice
_JUDGED_CHARACTERS = 150_000
_SPOKEN_TOKENS = 60


class _Stories(NamedTuple):
    """Files of generated text: to train on, to watch the training by, to judge the results by."""

    training: Path
    held_out: Path
    judged: Path


def demo(output: Path, recipe: Recipe, reporter: Reporter, *, overwrite: bool = False) -> DemoReport:
    """Convert the embedded model and compare.

    Args:
        output: directory for everything that is made.
        recipe: as ``recipes/demo.yaml``; its data section is filled with generated stories.
        reporter: receives the stages of all commands.
        overwrite: replace what an earlier demo wrote to ``output``.

    Raises:
        UsageError: ``output`` is there already.
    """
    require_free(output, overwrite=overwrite)
    with set_aside(output):
        return _demo(output, recipe, reporter)


def _demo(output: Path, recipe: Recipe, reporter: Reporter) -> DemoReport:
    started = time.monotonic()
    written = _write_stories(output, recipe)
    recipe = _on_stories(recipe, written)

    warmup(str(MODEL), output / "ternary", recipe, reporter=reporter)
    warmup(str(MODEL), output / "control", _control(recipe), reporter=reporter)

    original = open_checkpoint(str(MODEL))
    original.rounding = recipe.scaling  # as the warmed-up model is rounded, so that the rows differ by training alone
    tq2_0 = Packing(formats=("tq2_0",))
    rounded = pack(original, tq2_0, output / "rounded", round_plain=True, reporter=reporter)
    packed = pack(open_checkpoint(str(output / "ternary")), recipe.pack, output / "packed", reporter=reporter)

    judge = _Judge(written.judged, recipe.training.context, reporter)
    rows = (
        judge.float_row("original", MODEL),
        judge.packed_row("rounded only", rounded.files[0]),
        *(judge.packed_row(f"warmed up, {file.format}", file) for file in packed.files),
        judge.float_row("control", output / "control"),
    )
    spoken = generate(packed.files[0].path, PROMPT, max_tokens=_SPOKEN_TOKENS)
    write_manifest(output)
    return DemoReport(
        output=str(output),
        rows=rows,
        tokens_scored=judge.tokens_scored,
        prompt=PROMPT,
        text=spoken.text,
        spoken_by=f"{Path(packed.files[0].path).name} through {spoken.runtime}",
        seconds=time.monotonic() - started,
    )


def _write_stories(output: Path, recipe: Recipe) -> _Stories:
    """Training and held-out stories, from seeds that share no story with the model's own training."""
    written = _Stories(*(output / "stories" / name for name in ("training.jsonl", "held-out.jsonl", "held-out.txt")))
    written.training.parent.mkdir(parents=True)
    _write_json_lines(written.training, WARMUP_SEED, recipe.training.tokens // _TOKENS_PER_STORY)
    _write_json_lines(written.held_out, HELD_OUT_SEED, recipe.data.held_out_tokens // _TOKENS_PER_STORY)
    written.judged.write_text(text(HELD_OUT_SEED, _JUDGED_CHARACTERS), encoding="utf-8")
    return written


def _write_json_lines(file: Path, seed: int, count: int) -> None:
    lines = (json.dumps({"text": story}) + "\n" for story in islice(stories(seed), count))
    file.write_text("".join(lines), encoding="utf-8")


def _on_stories(recipe: Recipe, written: _Stories) -> Recipe:
    texts = {"sources": (str(written.training),), "held_out": (str(written.held_out),)}
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=texts)})


def _control(recipe: Recipe) -> Recipe:
    """The same tokens in full precision, at a tenth of the learning rate: the full one would harm these weights."""
    optimizer = recipe.optimizer.model_copy(update={"lr": recipe.optimizer.lr / 10})
    return recipe.model_copy(update={"control": True, "optimizer": optimizer})


class _Judge:
    """Measures every model of the demo on the same text in the same way."""

    def __init__(self, held_out: Path, context: int, reporter: Reporter) -> None:
        self._held_out = held_out
        self._context = context
        self._reporter = reporter
        self.tokens_scored = 0

    def float_row(self, name: str, model: Path) -> DemoRow:
        """A full-precision model, with the size it has in float16."""
        parameters = inspect(str(model)).parameters
        return DemoRow(name, self._ppl(model, "torch"), None, 2 * parameters, 16.0)

    def packed_row(self, name: str, file: PackedFile) -> DemoRow:
        """A packed model: the number of torch and, for a GGUF file, that of llama.cpp."""
        path = Path(file.path)
        by_llama_cpp = self._ppl(path, "llama.cpp") if path.suffix == ".gguf" and has_llama_cpp() else None
        return DemoRow(name, self._ppl(path, "torch"), by_llama_cpp, file.nbytes, file.bits_per_weight)

    def _ppl(self, model: Path, runtime: RuntimeName) -> float:
        report = evaluate(
            str(model), data=self._held_out, context=self._context, runtime=runtime, reporter=self._reporter
        )
        assert report.perplexity is not None, "a text was given"
        self.tokens_scored = report.perplexity.tokens_scored
        return report.perplexity.ppl
