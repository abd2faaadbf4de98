"""What can be known of a conversion before it begins: whether it is possible at all, and what it takes."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from bitconvert.errors import BitconvertError, UsageError
from bitconvert.models.checkpoint import Checkpoint, open_checkpoint
from bitconvert.packing.pack import EVERY_FORMAT, foresee_files
from bitconvert.recipe import Recipe
from bitconvert.report.packing import ForeseenFile
from bitconvert.report.reporter import Reporter
from bitconvert.report.training import WarmupPlan
from bitconvert.training.gpus import Cluster
from bitconvert.training.keep import foreseen_kept
from bitconvert.training.plan import disk_of_training, plan_warmup
from bitconvert.training.student import require_trainable, settle


def plan(
    model: str,
    recipe: Recipe,
    clusters: Sequence[Cluster] = (),
    *,
    output: Path,
    price: float | None = None,
    reporter: Reporter,
    clock: Callable[[], float] = time.perf_counter,
) -> WarmupPlan:
    """Foresee a conversion without loading a weight; of the model, a config is enough.

    Args:
        model: hub id, Hugging Face directory or GGUF file.
        recipe: as for ``warmup``.
        clusters: GPUs to foresee it for, beside this machine.
        output: where the result will lie; need not exist.
        price: of a GPU for an hour.
        reporter: receives the stages.
        clock: seconds by which this machine is measured.

    Raises:
        BitconvertError: the model cannot be opened, or is not one to train.
    """
    checkpoint = open_checkpoint(model, weights=False)
    foreseen = plan_warmup(checkpoint, recipe, clusters, price=price, reporter=reporter, clock=clock)
    checkpoint.keeping = foreseen_kept(checkpoint, recipe)
    files = [] if recipe.control else foresee_files(checkpoint, recipe.pack, recipe.scaling)
    return replace(
        foreseen,
        disk_bytes=disk_bytes(files, foreseen.disk_bytes, checkpoint),
        free_disk_bytes=free_disk_bytes(output),
        files=files,
    )


def require_possible(model: str, recipe: Recipe, output: Path, reporter: Reporter) -> None:
    """Refuse a conversion that would fail at its end: in a format that cannot hold the result, or on a full disk.

    Args:
        model: the original.
        recipe: as for ``warmup``.
        output: where it will lie; need not exist.
        reporter: told what is counted.

    Raises:
        BitconvertError: the model cannot be read or trained, a format cannot hold it, the disk is too small.
        UsageError: the recipe does not make a ternary model, or does not go with this one.
    """
    if recipe.control:
        raise UsageError("control: a model trained in full precision is not ternary", "use warmup for it, and eval")
    checkpoint = open_checkpoint(model, weights=False)
    recipe = settle(recipe, checkpoint)
    checkpoint.keeping = foreseen_kept(checkpoint, recipe)
    require_trainable(checkpoint, recipe)
    files = foresee_files(checkpoint, recipe.pack, recipe.scaling)
    _require_formats(files, recipe)
    _require_disk(disk_bytes(files, disk_of_training(checkpoint, recipe, reporter), checkpoint), output)


def disk_bytes(files: list[ForeseenFile], of_training: int, checkpoint: Checkpoint) -> int:
    """The most that a conversion has on disk at a time: while it trains, or later the result and its packed files."""
    latent = 4 * checkpoint.parameters
    return max(of_training, latent + sum(file.nbytes or 0 for file in files if file.wanted))


def free_disk_bytes(output: Path) -> int:
    """Free bytes where something will lie, which need not exist yet."""
    place = output.absolute()
    return shutil.disk_usage(next(parent for parent in place.parents if parent.exists())).free


def _require_formats(files: list[ForeseenFile], recipe: Recipe) -> None:
    wanted = [file for file in files if file.wanted]
    refused = [file for file in wanted if file.refusal]
    if refused and (EVERY_FORMAT not in recipe.pack.formats or refused == wanted):
        able = ", ".join(file.format for file in files if not file.refusal)
        raise BitconvertError(
            f"{refused[0].format} cannot hold what this run makes: {refused[0].refusal}",
            f"choose others with --format: {able}" if able else "no format can hold this model",
        )


def _require_disk(needed: int, output: Path) -> None:
    free = free_disk_bytes(output)
    if needed > free:
        raise BitconvertError(
            f"{output}: {needed / 1e9:.1f} GB are needed there, and {free / 1e9:.1f} GB are free",
            "choose an --output on another disk, or fewer checkpoints: --set training.keep_checkpoints=1",
        )
