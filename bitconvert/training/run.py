"""A training from its first step, or its newest checkpoint, to its last: how it is resumed and stopped."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from bitconvert.errors import BitconvertError
from bitconvert.heap import is_out_of_memory
from bitconvert.training.metrics import METRICS, read_metrics
from bitconvert.training.run_directory import Interrupted
from bitconvert.training.state import damage_named
from bitconvert.training.trainer import WarmupTrainer, last_checkpoint


def resume_point(trainer: WarmupTrainer, run_directory: Path) -> Path | None:
    """The checkpoint to go on from, after which the metrics are forgotten; None at the start of a run.

    Raises:
        BitconvertError: the metrics of the run's beginning are gone, or metrics or checkpoint are damaged.
    """
    checkpoint = last_checkpoint(run_directory)
    if checkpoint is not None:
        with damage_named(checkpoint):
            TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    trainer.forget_metrics_after(_step_of(checkpoint))
    if checkpoint is not None and not _measured_at_start(run_directory):
        raise BitconvertError(
            f"{run_directory / METRICS}: its beginning is gone", "remove the directory and start again"
        )
    return checkpoint


def train_to_end(trainer: WarmupTrainer, checkpoint: Path | None, run_directory: Path, going_on: str) -> None:
    """Train until all steps are done.

    Args:
        trainer: ready to take a step.
        checkpoint: to go on from.
        run_directory: where checkpoints go.
        going_on: what to do about an interruption, see ``resuming``.

    Raises:
        Interrupted: by Ctrl-C or SIGTERM, after saving.
    """
    with _stop_on_signal(trainer) as caught:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.state.global_step < trainer.recipe.training.steps:
        raise Interrupted(
            f"interrupted at step {trainer.state.global_step}; everything is saved in {run_directory}",
            going_on,
            exit_code=128 + (caught or [signal.SIGINT])[0],
        )


def _measured_at_start(run_directory: Path) -> bool:
    metrics = run_directory / METRICS
    return metrics.exists() and any("original_ppl" in line for line in read_metrics(metrics)[:1])


def _step_of(checkpoint: Path | None) -> int:
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else -1


@contextmanager
def _stop_on_signal(trainer: WarmupTrainer) -> Iterator[list[int]]:
    """Let Ctrl-C and SIGTERM end the training after the current step; a second one ends the process at once."""
    caught: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        trainer.stop_requested = True
        caught.append(number)
        signal.signal(number, before[signal.Signals(number)])

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def memory_errors_named() -> Iterator[None]:
    """Make too little memory, wherever it is missed, one error that says what to lower."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise BitconvertError(
            f"out of memory ({str(error).strip().splitlines()[0]})",
            "lower training.micro_batch_size or training.context, set training.activation_checkpointing=true, or ask "
            "`bitconvert plan` what fits; a run that has checkpoints can be resumed with a smaller micro-batch",
        ) from error
