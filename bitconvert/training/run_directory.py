"""The directory that a run lives in until it is finished: what it was begun with, and what of it is done."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path

from pydantic import BaseModel

from bitconvert.atomic import atomic_directory, atomic_file, discard
from bitconvert.errors import BitconvertError, UsageError
from bitconvert.models.location import locate
from bitconvert.models.manifest import require_free
from bitconvert.models.record import read_record, save_record
from bitconvert.ranks import is_main
from bitconvert.recipe import OptionsT, differing, read_options
from bitconvert.report.reporter import Reporter
from bitconvert.training.layers import FittedLayers
from bitconvert.training.metrics import METRICS
from bitconvert.training.trainer import FITTED, last_checkpoint

RECIPE = "recipe.yaml"
PLOT = "training.png"
_RUN = "run.json"

_MAY_CHANGE = frozenset(
    {
        "distill.teacher_offload",
        "optimizer.lr",
        "training.activation_checkpointing",
        "training.compile",
        "training.keep_checkpoints",
        "training.log_every",
        "training.micro_batch_size",
        "training.save_every",
    }
)
"""Options that may be others when a run is resumed: what ends a loss that diverged, too little memory, a full disk."""


class Interrupted(BitconvertError):
    """Stopped by a signal, with everything saved (exit code 128 + signal)."""


class Begun(BaseModel):
    """What a run was begun with, beside its recipe.

    Attributes:
        model: as it was named.
        texts: keys of the tokens to train on and of those to measure on; empty until they are made.
    """

    model: str
    texts: list[str] = []


def partial_directory(output: Path) -> Path:
    """Where a run lives until it is finished."""
    named = output if output.name else output.resolve()
    return named.with_name(named.name + ".partial")


def unfinished_run(output: Path, kind: type[OptionsT]) -> tuple[str, OptionsT]:
    """The model and the options that the unfinished run behind ``output`` was begun with.

    Args:
        output: what the run is to make.
        kind: of options: whose run it is.

    Raises:
        UsageError: there is no such run, or it is another command's.
    """
    run_directory = partial_directory(output)
    _require_unfinished(run_directory, output)
    if not has_unfinished_run(output):
        raise UsageError(f"{run_directory}: no unfinished run to resume", "start one without --resume")
    return _begun(run_directory).model, read_options(kind, run_directory / RECIPE)


def has_unfinished_run(output: Path) -> bool:
    """Whether there is a run behind ``output`` that ``resume`` goes on with."""
    return (partial_directory(output) / _RUN).exists()


def begin_or_resume(
    run_directory: Path,
    output: Path,
    model: str,
    options: OptionsT,
    resume: bool,
    overwrite: bool,
    reporter: Reporter,
) -> None:
    """Make the run's directory, or see that it is of the same run as before.

    Raises:
        UsageError: it is not, or something else is in the way.
    """
    if resume:
        begun_with, begun_options = unfinished_run(output, type(options))
        if begun_with != model:
            raise UsageError(f"{run_directory}: was begun with {begun_with}", "resume it with that, or without --model")
        require_free(output, overwrite=overwrite, source=locate(model))
        go_on_with(run_directory, begun_options, options, reporter)
        return
    require_free(output, overwrite=overwrite, source=locate(model))
    if _has_progress(run_directory):
        raise UsageError(
            f"{run_directory}: an unfinished run is here", "continue it with --resume, or remove the directory"
        )
    if run_directory.exists() and not (run_directory / _RUN).exists():
        raise UsageError(f"{run_directory}: exists, and is no run", "choose another --output, or remove it")
    with atomic_directory(run_directory) as directory:
        (directory / RECIPE).write_text(options.to_yaml(), encoding="utf-8")
        save_record(Begun(model=model), directory / _RUN)


def require_same_texts(run_directory: Path, texts: list[str]) -> None:
    """See that a resumed run goes on with the text that it began with.

    Args:
        run_directory: of the run.
        texts: keys of the tokens, see ``Begun``.

    Raises:
        BitconvertError: the text is another one by now.
    """
    begun = _begun(run_directory)
    if begun.texts and begun.texts != texts:
        which = " and ".join(
            name
            for name, before, now in zip(("training", "held-out"), begun.texts, texts, strict=True)
            if before != now
        )
        raise BitconvertError(
            f"{run_directory}: the {which} text is not what the run began with",
            "put the old text back and resume, or remove the directory and start again",
        )
    if not begun.texts:
        with atomic_file(run_directory / _RUN) as temporary:
            save_record(begun.model_copy(update={"texts": texts}), temporary)


@contextmanager
def tidied(run_directory: Path, going_on: str) -> Iterator[None]:
    """Leave no run behind that failed before anything of it was done; one that was interrupted can be resumed.

    Args:
        run_directory: of the run.
        going_on: what to do about an interruption, see ``resuming``.

    Raises:
        Interrupted: by Ctrl-C or SIGTERM, outside of the training's steps.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        raise Interrupted(
            f"interrupted; what is done is in {run_directory}",
            going_on,
            exit_code=stop.code if isinstance(stop, SystemExit) and isinstance(stop.code, int) else 130,
        ) from stop
    except Interrupted:
        raise
    except Exception:
        if is_main() and not _has_progress(run_directory):
            discard(run_directory)
        raise


def resuming(command: str, output: Path, *words: str) -> str:
    """What to do about an interruption: the command that goes on."""
    return " ".join([f"continue with: bitconvert {command} --resume --output", shlex.quote(str(output)), *words])


def fitted_layers(run_directory: Path) -> FittedLayers:
    """The layers of a run whose initialisation is done."""
    return FittedLayers(run_directory / FITTED)


def _begun(run_directory: Path) -> Begun:
    found = read_record(run_directory / _RUN, Begun, "remove the directory and start again")
    assert found is not None, "whoever asks has seen that it is there"
    return found


def _has_progress(run_directory: Path) -> bool:
    return last_checkpoint(run_directory) is not None or not fitted_layers(run_directory).is_empty


def _require_unfinished(run_directory: Path, output: Path) -> None:
    """Refuse to resume what is finished; a run that was killed after its last rename still has its directory."""
    saved, made = output / METRICS, run_directory / METRICS
    if saved.exists() and made.exists() and saved.read_bytes() == made.read_bytes():
        discard(run_directory)
    if not run_directory.exists() and saved.exists():
        raise UsageError(f"{output}: the run is finished, there is nothing to resume", f"bitconvert pack {output} …")


def go_on_with(run_directory: Path, begun: OptionsT, options: OptionsT, reporter: Reporter) -> None:
    """Go on with other options where that is possible, and write them down.

    Raises:
        UsageError: it is not, with some of them.
    """
    changed = differing(begun, options)
    if not changed.keys() <= _MAY_CHANGE:
        raise UsageError(
            f"{run_directory}: was begun with other options ({', '.join(sorted(changed.keys() - _MAY_CHANGE))})",
            f"resume it as it was begun: {run_directory / RECIPE}; what may change is {', '.join(sorted(_MAY_CHANGE))}",
        )
    if not changed:
        return
    told = "resumed with " + ", ".join(f"{key}={new} (was {old})" for key, (old, new) in changed.items())
    reporter.note(told)
    if "training.micro_batch_size" in changed:
        fitted_layers(run_directory).forget()  # micro-batches are the steps of their fit
    with atomic_file(run_directory / RECIPE) as temporary:
        comments = f"{history(run_directory)}# {told}{_where(run_directory)}\n"
        temporary.write_text(comments + options.to_yaml(), encoding="utf-8")


def history(run_directory: Path) -> str:
    """With which other options a run has gone on: comments, a line each, at the beginning of its recipe."""
    lines = (run_directory / RECIPE).read_text(encoding="utf-8").splitlines(keepends=True)
    return "".join(takewhile(lambda line: line.startswith("#"), lines))


def _where(run_directory: Path) -> str:
    checkpoint = last_checkpoint(run_directory)
    return f" from step {checkpoint.name.rpartition('-')[2]} on" if checkpoint else ""
