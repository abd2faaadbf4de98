"""``bitconvert warmup``: a full-precision model in, a latent ternary checkpoint out."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import cast

from pydantic import TypeAdapter
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainingArguments, set_seed

from bitconvert.atomic import atomic_directory, atomic_file, discard, only_one_at
from bitconvert.errors import BitconvertError
from bitconvert.heap import keep_freed_memory
from bitconvert.models.checkpoint import Checkpoint, open_checkpoint
from bitconvert.models.latent import save_latent
from bitconvert.models.lineage import HeldOut, Lineage, Origin
from bitconvert.models.manifest import write_manifest
from bitconvert.models.record import read_record, save_record
from bitconvert.ranks import is_main
from bitconvert.recipe import Recipe
from bitconvert.report.reporter import Reporter
from bitconvert.report.training import WarmupReport
from bitconvert.ternary.bitlinear import Lambda, merge_low_rank, settle_scales
from bitconvert.ternary.schedule import lambda_at
from bitconvert.training.card import training_card
from bitconvert.training.data import (
    ShuffledWindows,
    Text,
    Tokens,
    TrainingWindows,
    Windows,
    model_key,
)
from bitconvert.training.initialisation import initialise
from bitconvert.training.keep import Kept, choose_kept, foreseen_kept
from bitconvert.training.metrics import METRICS, read_metrics
from bitconvert.training.page.render import Run, render_page
from bitconvert.training.plot import plot_metrics
from bitconvert.training.run import memory_errors_named, resume_point, train_to_end
from bitconvert.training.run_directory import (
    PLOT,
    RECIPE,
    begin_or_resume,
    fitted_layers,
    history,
    partial_directory,
    resuming,
    tidied,
)
from bitconvert.training.sharding import is_sharded, is_split, reshard
from bitconvert.training.snapshot import Snapshot, take_snapshot
from bitconvert.training.state import WEIGHTS
from bitconvert.training.student import is_trained_on, make_student, require_trainable, settle, split_student
from bitconvert.training.teacher import (
    LiveTeacher,
    Teacher,
    frozen_copy,
    has_teacher,
    products_dtype,
    split_original,
)
from bitconvert.training.teacher_cache import CachedTeacher, TaughtWindows
from bitconvert.training.text import training_text
from bitconvert.training.trainer import TRACKED, Diverged, WarmupTrainer, last_checkpoint, training_arguments

PAGE = "report.html"
REPORT = "warmup.json"
_KEPT = "kept.json"
_ORIGINAL = "original"
_ORIGIN = "origin.json"


def warmup(
    model: str, output: Path, recipe: Recipe, *, resume: bool = False, overwrite: bool = False, reporter: Reporter
) -> WarmupReport:
    """Train a model's linear layers down to {-1, 0, +1}.

    While it runs, everything lies in ``OUTPUT.partial``; ``output`` appears by rename when the model is done. Under
    ``torchrun`` or ``accelerate launch`` every process calls this, and the main one writes.

    Args:
        model: hub id, Hugging Face directory or GGUF file of the original; a latent or baked checkpoint only with a
            recipe that trains it on as the ternary model that it is.
        output: directory of the latent checkpoint, to be made.
        recipe: resolved options. With ``resume`` they must be those of the run that is continued.
        resume: go on from the newest checkpoint in ``OUTPUT.partial``.
        overwrite: replace what an earlier run wrote to ``output``, once this one is done.
        reporter: receives stages, metrics and warnings.

    Raises:
        Interrupted: by Ctrl-C or SIGTERM, after saving.
        BitconvertError: for input that cannot be used, or a loss that diverges.
    """
    started = time.monotonic()
    keep_freed_memory()
    run_directory = partial_directory(output)
    with only_one_at(run_directory) if is_main() else nullcontext():
        arguments = training_arguments(recipe, run_directory)
        with arguments.main_process_first(local=False):
            if is_main():
                begin_or_resume(run_directory, output, model, recipe, resume, overwrite, reporter)
        with tidied(run_directory, resuming("warmup", output)), memory_errors_named(), ExitStack() as stack:
            return _run(model, output, recipe, arguments, run_directory, overwrite, stack, reporter, started)


def _run(
    model: str,
    output: Path,
    recipe: Recipe,
    arguments: TrainingArguments,
    run_directory: Path,
    overwrite: bool,
    stack: ExitStack,
    reporter: Reporter,
    started: float,
) -> WarmupReport:
    set_seed(recipe.training.seed)
    reporter.stage(f"loading {model}")
    checkpoint = open_checkpoint(model)
    recipe = settle(recipe, checkpoint)
    checkpoint.keeping = foreseen_kept(checkpoint, recipe)
    require_trainable(checkpoint, recipe)
    with arguments.main_process_first(local=False):
        origin = _origin(checkpoint, run_directory)
    tokenizer = checkpoint.tokenizer()
    original = None if is_sharded(recipe) else checkpoint.load_latent()

    with arguments.main_process_first():  # what it keeps on disk, the others find there
        text, order, held_out = training_text(original, tokenizer, recipe, run_directory, stack, reporter)
    teacher, taught = _teacher(original, checkpoint, order, text, arguments, recipe, reporter)
    kept = _kept(original, checkpoint, order, arguments, recipe, run_directory, reporter)
    checkpoint.keeping = kept.modules
    student, lam = _student(original, checkpoint, recipe, arguments)

    trainer = WarmupTrainer(student, teacher, lam, recipe, arguments, taught, held_out, reporter)
    with _divergence_traced(order, recipe, run_directory, output):
        before = _train(
            trainer, tokenizer, order, text, run_directory, output, reporter, trained_on=is_trained_on(checkpoint)
        )

    reporter.stage(f"saving {output}")
    after = _snapshot(trainer, tokenizer, lam=1.0)
    report = _report(output, recipe, trainer, run_directory, kept, seconds=time.monotonic() - started)
    trainer.accelerator.wait_for_everyone()  # until all have read what goes with the run
    if is_main():
        lineage = None if recipe.control else _lineage(checkpoint, origin, recipe, text, kept, report)
        metrics = read_metrics(run_directory / METRICS)
        comments = history(run_directory)
        run = Run(checkpoint.name, text.identity, report, recipe, lineage, metrics, before, after, comments)
        _save(_finished(student, checkpoint, run_directory), tokenizer, run, run_directory, output, overwrite)
    trainer.accelerator.wait_for_everyone()
    return report


@contextmanager
def _divergence_traced(order: TrainingWindows, recipe: Recipe, run_directory: Path, output: Path) -> Iterator[None]:
    """Say after which text a loss was not finite any more, and how to go on from before."""
    try:
        yield
    except Diverged as error:
        if not error.step:
            raise
        lower = f"--set optimizer.lr={recipe.optimizer.lr / 2:g}"
        going_on = f"{resuming('warmup', output, lower)}; or " if last_checkpoint(run_directory) else ""
        raise BitconvertError(
            f"{error.message}; its batch: {_batch_of(error.step, order, recipe)}", going_on + error.hint
        ) from error


def _batch_of(step: int, order: TrainingWindows, recipe: Recipe) -> str:
    """Which windows a step was about; of a text that is streamed, by their place in the order of the training."""
    size, context = recipe.training.batch_size, recipe.training.context
    places = range((step - 1) * size, step * size)
    if not isinstance(order, ShuffledWindows):
        return f"windows {places.start} to {places.stop - 1} of the training, of {context} tokens each, counted from 0"
    windows = ", ".join(str(order.window_at(place)) for place in places)
    return f"windows {windows} of the training text, of {context} tokens each, counted from 0"


def _origin(checkpoint: Checkpoint, run_directory: Path) -> Origin:
    """The original's files; a resumed run must go on with the same.

    Raises:
        BitconvertError: one of them has changed.
    """
    record, found = run_directory / _ORIGIN, checkpoint.origin()
    begun = read_record(record, Origin, f"remove {run_directory} and start again")
    if begun is None:
        with atomic_file(record) as temporary:
            save_record(found, temporary)
        return found
    changed = sorted(dict(found.files.items() ^ begun.files.items()))
    if changed:
        raise BitconvertError(
            f"{checkpoint.name}: {changed[0]} is not the one that this run was begun with",
            f"restore it, or remove {run_directory} and start again",
        )
    return begun


def finished_run(output: Path) -> WarmupReport:
    """What the run that made ``output`` reported.

    Raises:
        BitconvertError: its report is missing or damaged.
    """
    try:
        return TypeAdapter(WarmupReport).validate_json((output / REPORT).read_bytes())
    except (OSError, ValueError) as error:
        raise BitconvertError(
            f"{output / REPORT}: missing or damaged", "remove the directory and start again"
        ) from error


def _student(
    original: PreTrainedModel | None, checkpoint: Checkpoint, recipe: Recipe, arguments: TrainingArguments
) -> tuple[PreTrainedModel, Lambda]:
    """The model with its BitLinears, and their λ."""
    if original is None:
        return split_student(checkpoint, recipe, arguments.device)
    return original, make_student(original, checkpoint, recipe)


def _teacher(
    original: PreTrainedModel | None,
    checkpoint: Checkpoint,
    order: TrainingWindows,
    text: Text,
    arguments: TrainingArguments,
    recipe: Recipe,
    reporter: Reporter,
) -> tuple[Teacher | None, Dataset[dict[str, Tensor]]]:
    """Who teaches, if anybody does, and the windows as they are needed for it; the original stays as it is."""
    options = recipe.distill
    dtype = products_dtype(arguments)

    def live() -> LiveTeacher:
        frozen = frozen_copy(original, dtype) if original else split_original(checkpoint, arguments.device, dtype)
        return LiveTeacher(frozen, options, arguments.device, dtype)

    if not has_teacher(recipe):
        return None, order
    if not options.cache or original is None:
        return live(), order
    assert isinstance(order, ShuffledWindows), "a recipe that streams has no distill.cache"
    assert isinstance(text, Tokens)
    key = f"{model_key(original)} {text.key} {dtype}"
    taught = TaughtWindows(order, key, original.config.vocab_size, options.cache_top_k, options.temperature)
    with arguments.main_process_first():
        taught.fill(live, recipe.training.micro_batch_size, reporter)
    return CachedTeacher(), taught


def _kept(
    original: PreTrainedModel | None,
    checkpoint: Checkpoint,
    order: TrainingWindows,
    arguments: TrainingArguments,
    recipe: Recipe,
    run_directory: Path,
    reporter: Reporter,
) -> Kept:
    """Which linears stay plain: chosen once, since a resumed run must go on with the same."""
    if recipe.control or not recipe.keep.budget or original is None:
        return Kept(modules=checkpoint.kept)
    record = run_directory / _KEPT
    if chosen := read_record(record, Kept, f"remove {run_directory} and start again"):
        return chosen
    home = original.device
    original.to(arguments.device)  # type: ignore[arg-type]
    chosen = choose_kept(original, checkpoint, order, recipe, reporter)
    original.to(home)  # type: ignore[arg-type]
    if is_main():
        with atomic_file(record) as temporary:
            save_record(chosen, temporary)
    return chosen


def _train(
    trainer: WarmupTrainer,
    tokenizer: PreTrainedTokenizerFast,
    order: TrainingWindows,
    text: Text,
    run_directory: Path,
    output: Path,
    reporter: Reporter,
    *,
    trained_on: bool,
) -> Snapshot:
    """Measure the original, train, and return what the original was like."""
    checkpoint = resume_point(trainer, run_directory)
    if checkpoint is None:
        reporter.stage("measuring the original model on held-out text")
        ternary = trainer.ternary_ppl()
        trainer.record({"original_ppl": ternary if trained_on else trainer.latent_ppl(), "held_out_ppl": ternary})
        original = _snapshot(trainer, tokenizer, lam=1.0 if trained_on else 0.0)
        if is_main():
            original.save(run_directory / _ORIGINAL)
        trainer.accelerator.wait_for_everyone()
        if trainer.recipe.initialises:
            _initialise(trainer, order, run_directory, reporter)
    original = Snapshot.load(run_directory / _ORIGINAL)
    reporter.stage(f"warmup: {trainer.recipe.training.steps} steps, {text.amount}")
    train_to_end(trainer, checkpoint, run_directory, resuming("warmup", output))
    return original


def _snapshot(trainer: WarmupTrainer, tokenizer: PreTrainedTokenizerFast, lam: float) -> Snapshot:
    """The model as it is now at a λ, computed as it is measured; by all processes together."""
    student, held_out = cast(PreTrainedModel, trainer.model), cast(Windows, trainer.eval_dataset)
    with trainer.lam.at(lam), trainer.accelerator.autocast():
        snapshot = take_snapshot(student, tokenizer, held_out)
    reshard(student)
    return snapshot


def _initialise(trainer: WarmupTrainer, order: TrainingWindows, run_directory: Path, reporter: Reporter) -> None:
    """Make better latents to begin with; an interrupted run goes on at the first layer that was not done."""
    reporter.stage(f"initialising the latents: {trainer.recipe.init.method}")
    student, dtype = cast(PreTrainedModel, trainer.model), products_dtype(trainer.args)
    fitted = fitted_layers(run_directory)
    tokens = initialise(student, trainer.lam, trainer.recipe, order, dtype, reporter, fitted)
    trainer.record({"held_out_ppl": trainer.ternary_ppl(), "init_tokens": tokens})


def _lineage(
    checkpoint: Checkpoint, origin: Origin, recipe: Recipe, text: Text, kept: Kept, report: WarmupReport
) -> Lineage:
    return Lineage(
        source=checkpoint.unpinned_name,
        origin=origin,
        lam=lambda_at(1.0, recipe.lam.curve, recipe.lam.reach_one_at),
        scaling=recipe.scaling,
        kept=kept.modules,
        keep_tokens=kept.tokens,
        tokens_seen=report.tokens,
        init_tokens=report.init_tokens,
        steps=report.steps,
        data=text.identity,
        data_files=dict(text.files),
        seed=recipe.training.seed,
        license=checkpoint.license,
        held_out=HeldOut(original=report.original_ppl, rounded=report.rounded_ppl, ternary=report.held_out_ppl),
    )


def _report(
    output: Path, recipe: Recipe, trainer: WarmupTrainer, run_directory: Path, kept: Kept, seconds: float
) -> WarmupReport:
    lines = read_metrics(run_directory / METRICS)
    return WarmupReport(
        output=str(output),
        steps=trainer.state.global_step,
        tokens=trainer.state.global_step * trainer.tokens_per_step,
        init_tokens=sum(line.get("init_tokens", 0) for line in lines),
        control=recipe.control,
        scaling="full precision" if recipe.control else str(recipe.scaling),
        kept=list(kept.modules),
        original_ppl=lines[0]["original_ppl"],
        rounded_ppl=lines[0]["held_out_ppl"],
        held_out_ppl=trainer.ternary_ppl(),
        seconds=seconds,
    )


def _finished(student: PreTrainedModel, checkpoint: Checkpoint, run_directory: Path) -> PreTrainedModel:
    """The trained model as it is to be saved; one that is split comes back from its last checkpoint, page by page."""
    if not is_split(student):
        settle_scales(student)
        merge_low_rank(student)
        return student
    model, newest = checkpoint.without_weights(), last_checkpoint(run_directory)
    assert newest is not None  # the last step has written it
    model.load_state_dict(load_file(newest / WEIGHTS), strict=False, assign=True)  # a tied head is not in it
    model.tie_weights()
    return model


def _save(
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    run: Run,
    run_directory: Path,
    output: Path,
    overwrite: bool,
) -> None:
    """Make ``output`` appear; a control run has no lineage, since nothing in it is ternary."""
    with atomic_directory(output, overwrite=overwrite) as directory:
        if run.lineage is None:
            student.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
        else:
            save_latent(student, tokenizer, run.lineage, training_card(run.lineage, run.report), directory)
        (directory / RECIPE).write_text(run.history + run.recipe.to_yaml(), encoding="utf-8")
        shutil.copyfile(run_directory / METRICS, directory / METRICS)
        plot_metrics(directory / METRICS, directory / PLOT)
        (directory / PAGE).write_text(render_page(run), encoding="utf-8")
        (directory / REPORT).write_text(json.dumps(asdict(run.report), indent=2) + "\n", encoding="utf-8")
        if (run_directory / TRACKED).is_dir():
            shutil.copytree(run_directory / TRACKED, directory / TRACKED.name)
        write_manifest(directory)
    discard(run_directory)
