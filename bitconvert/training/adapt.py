"""``bitconvert adapt``: a ternary model in, a low-rank adapter out, trained on text or on conversations."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from transformers import set_seed

from bitconvert.atomic import atomic_directory, discard, only_one_at
from bitconvert.errors import BitconvertError, UsageError
from bitconvert.heap import keep_freed_memory
from bitconvert.models.adapter import Adapter, adapter_of, with_new_adapter, write_gguf_adapter
from bitconvert.models.checkpoint import Checkpoint, open_checkpoint
from bitconvert.models.gguf_source import activation_blocks
from bitconvert.models.manifest import write_manifest
from bitconvert.ranks import world_size
from bitconvert.recipe import Adaptation
from bitconvert.report.reporter import Reporter
from bitconvert.report.training import AdaptReport
from bitconvert.training.adapter_trainer import AdapterTrainer
from bitconvert.training.card import adapter_card
from bitconvert.training.data import ShuffledWindows
from bitconvert.training.examples import Lessons, read_lessons
from bitconvert.training.metrics import METRICS, read_metrics
from bitconvert.training.plot import plot_metrics
from bitconvert.training.run import memory_errors_named, resume_point, train_to_end
from bitconvert.training.run_directory import (
    PLOT,
    RECIPE,
    begin_or_resume,
    history,
    partial_directory,
    resuming,
    tidied,
)
from bitconvert.training.trainer import training_arguments


def adapt(
    model: str, output: Path, options: Adaptation, *, resume: bool = False, overwrite: bool = False, reporter: Reporter
) -> AdaptReport:
    """Train a low-rank adapter (LoRA, arXiv 2106.09685) beside the frozen ternary weights of a model.

    The model computes as its file means it, int8 activations included. While the run lasts, everything lies in
    ``OUTPUT.partial``; ``output`` appears by rename when the adapter is done: as peft keeps it, and as a GGUF file for
    llama.cpp's ``--lora``.

    Args:
        model: hub id, directory (latent at λ = 1, baked or packed) or GGUF file of a model that is ternary.
        output: directory of the adapter, to be made.
        options: resolved. With ``resume`` they must be those of the run that is continued.
        resume: go on from the newest checkpoint in ``OUTPUT.partial``.
        overwrite: replace what an earlier run wrote to ``output``, once this one is done.
        reporter: receives stages, metrics and warnings.

    Raises:
        Interrupted: by Ctrl-C or SIGTERM, after saving.
        BitconvertError: for input that cannot be used, or a loss that diverges.
    """
    started = time.monotonic()
    if not options.data.sources:
        raise UsageError("nothing to learn from", "give conversations or a text with --data FILE")
    if world_size() > 1:
        raise UsageError("adapt trains in one process, on one device", "start it without a launcher")
    keep_freed_memory()
    run_directory = partial_directory(output)
    with only_one_at(run_directory):
        begin_or_resume(run_directory, output, model, options, resume, overwrite, reporter)
        with tidied(run_directory, resuming("adapt", output)), memory_errors_named():
            return _run(model, output, options, run_directory, overwrite, reporter, started)


def _run(
    model: str,
    output: Path,
    options: Adaptation,
    run_directory: Path,
    overwrite: bool,
    reporter: Reporter,
    started: float,
) -> AdaptReport:
    set_seed(options.training.seed)
    checkpoint = open_checkpoint(model)
    _require_ternary(checkpoint)
    checkpoint.require_context(options.training.context, f"--set training.context={checkpoint.max_context}")
    lessons = read_lessons(options, checkpoint.tokenizer(), checkpoint.name, reporter)
    recipe = options.as_recipe(len(lessons.training))
    arguments = training_arguments(recipe, run_directory)

    reporter.stage(f"loading {model}")
    adapted = with_new_adapter(checkpoint.load(), checkpoint, options.lora)
    order = ShuffledWindows(lessons.training, recipe.training.steps * recipe.training.batch_size, recipe.training.seed)
    trainer = AdapterTrainer(adapted, recipe, arguments, order, lessons.held_out, reporter)
    _train(trainer, lessons, run_directory, output, reporter)

    reporter.stage(f"saving {output}")
    adapter = adapter_of(adapted)
    report = _report(checkpoint, output, trainer, adapter, run_directory, time.monotonic() - started)
    with atomic_directory(output, overwrite=overwrite) as directory:
        adapted.save_pretrained(str(directory), save_embedding_layers=False)
        write_gguf_adapter(adapter, checkpoint, directory / Path(report.gguf).name)
        (directory / "README.md").write_text(
            adapter_card(checkpoint, options, lessons.description, report), encoding="utf-8"
        )
        (directory / RECIPE).write_text(history(run_directory) + options.to_yaml(), encoding="utf-8")
        shutil.copyfile(run_directory / METRICS, directory / METRICS)
        plot_metrics(directory / METRICS, directory / PLOT)
        write_manifest(directory)
    discard(run_directory)
    return report


def _require_ternary(checkpoint: Checkpoint) -> None:
    """Refuse a model whose weights are not ternary, or not yet.

    Raises:
        BitconvertError: saying what to do with it first.
    """
    lam = checkpoint.lineage.lam if checkpoint.lineage else 1.0
    if lam < 1:
        raise BitconvertError(f"{checkpoint.name}: its training ended at λ = {lam:g}", "train it to λ = 1 first")
    by_others = checkpoint.kind == "gguf" and checkpoint.lineage is None
    if checkpoint.kind == "plain" or (by_others and not activation_blocks(checkpoint.path)):
        raise BitconvertError(
            f"{checkpoint.name}: it is not ternary", "make it so with `bitconvert warmup`; plain models are peft's own"
        )


def _train(trainer: AdapterTrainer, lessons: Lessons, run_directory: Path, output: Path, reporter: Reporter) -> None:
    checkpoint = resume_point(trainer, run_directory)
    if checkpoint is None:
        reporter.stage("measuring the model on held-out examples")
        ppl = trainer.ternary_ppl()
        trainer.record({"original_ppl": ppl, "held_out_ppl": ppl})
    reporter.stage(f"adapt: {trainer.recipe.training.steps} steps, {len(lessons.training):,} examples")
    train_to_end(trainer, checkpoint, run_directory, resuming("adapt", output))


def _report(
    checkpoint: Checkpoint, output: Path, trainer: AdapterTrainer, adapter: Adapter, run_directory: Path, seconds: float
) -> AdaptReport:
    first = read_metrics(run_directory / METRICS)[0]
    return AdaptReport(
        model=checkpoint.name,
        output=str(output),
        gguf=str(output / f"{checkpoint.base_name.removesuffix('.gguf')}-lora.gguf"),
        steps=trainer.state.global_step,
        rank=adapter.rank,
        parameters=adapter.parameters,
        modules=len(adapter.factors),
        original_ppl=first["original_ppl"],
        held_out_ppl=trainer.ternary_ppl(),
        seconds=seconds,
    )
