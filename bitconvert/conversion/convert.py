"""``bitconvert convert``: warmup, pack, eval and the model card in one; what is done is not done again."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter

from bitconvert.atomic import atomic_directory, atomic_file, discard, only_one_at, take_place
from bitconvert.conversion.foresight import require_possible
from bitconvert.errors import BitconvertError, UsageError
from bitconvert.evaluation.evaluate import evaluate
from bitconvert.models.checkpoint import Checkpoint
from bitconvert.models.hub import Repository, push, require_pushable
from bitconvert.models.location import locate
from bitconvert.models.manifest import require_free, write_manifest
from bitconvert.packing.formats import FORMATS
from bitconvert.packing.pack import pack, write_measured_card
from bitconvert.ranks import world_size
from bitconvert.recipe import Recipe, load_recipe
from bitconvert.report.conversion import ConvertReport
from bitconvert.report.evaluation import EvalReport
from bitconvert.report.packing import PackedFile, PackReport
from bitconvert.report.reporter import Reporter, Silent
from bitconvert.report.training import WarmupReport
from bitconvert.training.held_out import held_out_text
from bitconvert.training.run_directory import (
    RECIPE,
    Interrupted,
    go_on_with,
    has_unfinished_run,
    partial_directory,
    resuming,
)
from bitconvert.training.warmup import finished_run, warmup

LATENT, PACKED = "latent", "packed"
HELD_OUT = "held-out.txt"
REPORT = "report.json"
_RUN = "convert.json"
_STAGES = "stages"

ResultT = TypeVar("ResultT")


def convert(
    model: str,
    output: Path,
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    repository: Repository | None = None,
    reporter: Reporter,
) -> ConvertReport:
    """Make a ternary model of a full-precision one: trained, packed, measured against its original, described.

    While it runs, everything lies in ``OUTPUT.partial``; ``output`` appears by rename when all is done. It holds
    ``packed``, the files with their card; ``latent``, the checkpoint that they were packed from; ``report.json``; and
    the text that they were measured on.

    Args:
        model: as for ``warmup``.
        output: directory to make. The files are called after it.
        recipe: resolved options; ``recipe.pack`` names the formats.
        resume: go on with the unfinished conversion behind ``output``.
        overwrite: replace what an earlier run wrote to ``output``, once this one is done.
        repository: where on the hub the packed files go.
        reporter: receives the stages of all commands.

    Raises:
        Interrupted: by Ctrl-C or SIGTERM, with everything so far saved.
        BitconvertError: as by ``warmup``, ``pack`` and ``evaluate``; what can be refused is refused before any work.
    """
    started = time.monotonic()
    require_free(output, overwrite=overwrite, source=locate(model))
    if world_size() > 1:
        raise UsageError("convert: one process does it all", "under a launcher, run warmup; then pack and eval alone")
    directory = partial_directory(output)
    with only_one_at(directory):
        _go_on(output, model, recipe) if resume else _require_new(directory)
        if repository:
            require_pushable(repository)
        if not resume:
            require_possible(model, recipe, directory, reporter)
            _begin(directory, model, recipe)
        with _resumable(directory, output):
            report = _Conversion(model, output, recipe, directory, reporter).run(started, overwrite=overwrite)
    if repository is None:
        return report
    reporter.stage(f"pushing to {repository.name}")
    return replace(report, pushed_to=_push(output, repository))


class _Conversion:
    """The stages; of each there is a record when it is done."""

    def __init__(self, model: str, output: Path, recipe: Recipe, directory: Path, reporter: Reporter) -> None:
        self._model = model
        self._output = output
        self._recipe = recipe
        self._directory = directory
        self._reporter = reporter

    def run(self, started: float, *, overwrite: bool) -> ConvertReport:
        """All of them, and the rename at the end."""
        warmed = self._warmed_up()
        packed = self._once("pack", PackReport, self._pack)
        readable = [file for file in packed.files if FORMATS[file.format].reads_back]
        measured = [self._once(f"eval-{file.format}", EvalReport, partial(self._evaluate, file)) for file in readable]
        write_measured_card(self._latent, self._recipe.pack, self._packed, packed.files, measured, self._reporter)
        report = ConvertReport(
            model=self._model,
            output=str(self._output),
            warmup=replace(warmed, output=self._renamed(warmed.output)),
            packed=self._pack_renamed(packed),
            measured=[replace(each, model=self._renamed(each.model)) for each in measured],
            pushed_to=None,
            seconds=time.monotonic() - started,
        )
        self._finish(report, overwrite=overwrite)
        return report

    def _warmed_up(self) -> WarmupReport:
        latent = self._directory / LATENT
        if latent.exists():
            if has_unfinished_run(latent):  # killed after its last rename
                discard(partial_directory(latent))
            return finished_run(latent)
        return warmup(self._model, latent, self._recipe, resume=has_unfinished_run(latent), reporter=self._reporter)

    @property
    def _latent(self) -> Checkpoint:
        """The trained model, under the name that the packed ones are to have."""
        return Checkpoint(str(self._output), self._directory / LATENT)

    @property
    def _packed(self) -> Path:
        return self._directory / PACKED

    def _pack(self) -> PackReport:
        """Again from the start, if it was interrupted before it was written down."""
        shutil.rmtree(self._packed, ignore_errors=True)
        return pack(self._latent, self._recipe.pack, self._packed, reporter=self._reporter)

    def _evaluate(self, file: PackedFile) -> EvalReport:
        text = self._directory / HELD_OUT
        if not text.exists():
            with atomic_file(text) as temporary:
                temporary.write_text(held_out_text(self._model, self._recipe, self._reporter), encoding="utf-8")
        context = self._recipe.training.context
        report = evaluate(file.path, data=text, context=context, against=self._model, reporter=self._reporter)
        return replace(report, data=HELD_OUT)

    def _once(self, stage: str, kind: type[ResultT], work: Callable[[], ResultT]) -> ResultT:
        """What a stage gave when it was done, or gives now."""
        record, adapter = self._directory / _STAGES / f"{stage}.json", TypeAdapter(kind)
        if record.exists():
            return adapter.validate_json(record.read_bytes())
        result = work()
        with atomic_file(record) as temporary:
            temporary.write_bytes(adapter.dump_json(result))
        return result

    def _finish(self, report: ConvertReport, *, overwrite: bool) -> None:
        shutil.rmtree(self._directory / _STAGES)
        (self._directory / _RUN).unlink()
        (self._directory / REPORT).write_text(
            json.dumps(asdict(report), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        write_manifest(self._directory)
        take_place(self._directory, self._output, overwrite=overwrite)

    def _renamed(self, path: str) -> str:
        """Where something of the directory will be when it has its name."""
        return str(self._output / Path(path).relative_to(self._directory))

    def _pack_renamed(self, report: PackReport) -> PackReport:
        files = [replace(file, path=self._renamed(file.path)) for file in report.files]
        return replace(report, files=files, companions=[self._renamed(path) for path in report.companions])


# ---- beginning, going on, ending ------------------------------------------------------------------------------------


def unfinished_conversion(output: Path) -> tuple[str, Recipe]:
    """The model and recipe that the unfinished conversion behind ``output`` was begun with.

    Raises:
        UsageError: there is none.
    """
    directory = partial_directory(output)
    if not (directory / _RUN).exists():
        raise UsageError(f"{directory}: no unfinished conversion to resume", "start one without --resume")
    try:
        model: str = json.loads((directory / _RUN).read_text(encoding="utf-8"))["model"]
    except (ValueError, KeyError, TypeError) as error:
        raise BitconvertError(f"{directory / _RUN}: damaged", "remove the directory and start again") from error
    return model, load_recipe(str(directory / RECIPE))


def _go_on(output: Path, model: str, recipe: Recipe) -> None:
    """Refuse another model or other options, but for those that a training may go on with."""
    directory, (begun_with, begun) = partial_directory(output), unfinished_conversion(output)
    if model != begun_with:
        raise UsageError(f"{directory}: was begun with {begun_with}", "resume it with that, or without --model")
    if recipe != begun and (directory / LATENT).exists():
        raise UsageError(
            f"{directory}: was begun with other options, and is trained", "resume it without --set and --recipe"
        )
    go_on_with(directory, begun, recipe, Silent())  # the training tells of it


def _require_new(directory: Path) -> None:
    if (directory / _RUN).exists():
        raise UsageError(
            f"{directory}: an unfinished conversion is here", "continue it with --resume, or remove the directory"
        )
    if directory.exists():
        raise UsageError(f"{directory}: exists, and is no conversion", "choose another --output, or remove it")


def _begin(directory: Path, model: str, recipe: Recipe) -> None:
    with atomic_directory(directory) as temporary:
        (temporary / RECIPE).write_text(recipe.to_yaml(), encoding="utf-8")
        (temporary / _RUN).write_text(json.dumps({"model": model}), encoding="utf-8")


@contextmanager
def _resumable(directory: Path, output: Path) -> Iterator[None]:
    """Say how to go on after an interruption; leave nothing behind of what had not begun to train."""
    hint = resuming("convert", output)
    try:
        yield
    except BitconvertError as error:
        error.hint = error.hint.replace(resuming("warmup", directory / LATENT), hint)
        raise
    except (KeyboardInterrupt, SystemExit) as stop:
        message = f"interrupted; what was finished is saved in {directory}"
        code = stop.code if isinstance(stop, SystemExit) and isinstance(stop.code, int) else 128 + signal.SIGINT
        raise Interrupted(message, hint, exit_code=code) from stop
    finally:
        if directory.exists() and not any((directory / name).exists() for name in (LATENT, f"{LATENT}.partial")):
            shutil.rmtree(directory)


def _push(output: Path, repository: Repository) -> str:
    try:
        return push(output / PACKED, repository)
    except BitconvertError as error:
        again = f"hf upload {repository.name} {shlex.quote(str(output / PACKED))}"
        raise BitconvertError(
            error.message, f"the model is finished, in {output}; push it again with: {again}"
        ) from error
