"""transformers.Trainer with what warmup adds: λ, a teacher, schedules by progress, checkpoints by rename."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from bitconvert.atomic import atomic_file, disk_full_names, sync_tree
from bitconvert.errors import BitconvertError, UsageError
from bitconvert.models.head import head_of, hidden_states
from bitconvert.recipe import Distillation, LambdaRamp, Recipe
from bitconvert.report.reporter import Reporter
from bitconvert.ternary.bitlinear import Lambda, compile_blocks
from bitconvert.ternary.schedule import lambda_at, lr_at, weight_decay_at
from bitconvert.training.distill import distillation_loss
from bitconvert.training.optimizers import make_optimizer
from bitconvert.training.teacher import Teacher

_CROSS_ENTROPY = Distillation(kl=0.0, ce=1.0)

_SURPASSED = "better than the original on held-out text: the text alone teaches now"
_FELL_BEHIND = "no longer better than the original on held-out text: it teaches again"

_LARGEST_LOSS = 700.0  # beyond it perplexity overflows; a model this wrong, or NaN, has diverged

CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
TRACKED = Path(CHECKPOINTS, "runs")  # where Trainer lets TensorBoard write


class WarmupTrainer(Trainer):
    """Trains a student full of BitLinears toward its own full-precision original.

    Args:
        student: model whose BitLinears share ``lam``.
        teacher: knows what the original makes of the windows; None where the loss has no KL term.
        lam: the shared λ, moved at the start of each step.
        recipe: everything else.
        arguments: of ``training_arguments``; checkpoints go to their output directory, metrics beside it.
        windows: training windows in their final order, as many as the run needs.
        held_out: windows to measure on, always at λ = 1.
        reporter: where the numbers go.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: Teacher | None,
        lam: Lambda,
        recipe: Recipe,
        arguments: TrainingArguments,
        windows: Dataset[dict[str, Tensor]],
        held_out: Dataset[dict[str, Tensor]],
        reporter: Reporter,
    ) -> None:
        super().__init__(
            student,
            arguments,
            train_dataset=windows,
            eval_dataset=held_out,
            callbacks=[_Progress(self)],
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = (
            True  # our loss divides by num_items_in_batch, so Trainer must not divide again
        )
        self.lam = lam
        self.recipe = recipe
        self.reporter = reporter
        self.stop_requested = False
        self._checkpoints = Path(cast(str, arguments.output_dir))
        self._metrics_file = self._checkpoints.parent / METRICS
        self._distill = _CROSS_ENTROPY if recipe.control else recipe.distill
        self._text_alone = self._distill.model_copy(update={"kl": 0.0})
        self._original_ppl = self._held_out_ppl = math.nan  # until they are measured
        self._teacher = teacher
        self._parts: dict[str, Tensor | float] = {}
        self._last_log = (time.monotonic(), 0)
        if recipe.training.activation_checkpointing:
            student.activation_checkpointing_enable({"use_reentrant": False})
        if recipe.training.compile:
            compile_blocks(student.get_decoder())  # type: ignore[no-untyped-call]

    # ---- one step -------------------------------------------------------------------------------------------------

    def set_progress(self, step: int) -> None:
        """Set λ, learning rate and decay for an optimizer step: each is a function of the progress alone."""
        t = (step + 0.5) / self.recipe.training.steps
        options = self.recipe.optimizer
        self.lam.set(*lambdas_at(t, self.recipe.lam))
        for group in self._optimizer.param_groups:
            group["lr"] = options.lr * lr_at(t, options.lr_schedule, options.lr_warmup, options.lr_final)
            if group["decays"]:
                group["weight_decay"] = weight_decay_at(t, options.weight_decay_schedule, options.weight_decay)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The distillation loss in training; plain cross-entropy, the logarithm of ppl, in evaluation."""
        tokens = inputs["input_ids"]
        options = self._terms if model.training else _CROSS_ENTROPY
        items = num_items_in_batch or tokens[:, 1:].numel()
        target = self._teacher.target(inputs) if self._teacher and options.asks_the_original else None
        with self.accelerator.autocast():
            hidden = hidden_states(self._student, tokens)
            loss, kl, ce = distillation_loss(hidden, head_of(self._student), target, tokens, options, items)
        parts = {"kl": kl, "ce": ce}
        if model.training:
            self._parts = {name: self._parts.get(name, 0.0) + part for name, part in parts.items()}
        return (loss, {}) if return_outputs else loss

    @property
    def _terms(self) -> Distillation:
        """Of the loss at this step: the text's alone while the original has nothing to teach."""
        is_better = self._held_out_ppl < self._original_ppl
        return self._text_alone if is_better and self._distill.ce and self._distill.until_surpassed else self._distill

    def stop_if_diverged(self) -> None:
        """Refuse to go on, or to save, after a loss that is not finite. One look per optimizer step."""
        if not math.isfinite(float(sum(self._parts.values()))):
            raise self._diverged()

    def _diverged(self) -> BitconvertError:
        return BitconvertError(
            f"the loss is not finite at step {self.state.global_step}",
            "start again with a lower optimizer.lr or a longer lam.reach_one_at (another --output keeps this run)",
        )

    def _ppl(self, loss: float) -> float:
        if not loss < _LARGEST_LOSS:
            raise self._diverged()
        return math.exp(loss)

    # ---- evaluation -----------------------------------------------------------------------------------------------

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Measure the model that will be packed: λ = 1, whatever the training is at."""
        with self.lam.at(1.0), self._clock_stopped():
            return super().evaluation_loop(*args, **kwargs)

    def ternary_ppl(self) -> float:
        """Perplexity of the model on the held-out windows at λ = 1."""
        return self._ppl(self.evaluation_loop(self.get_eval_dataloader(), "held out", True).metrics["eval_loss"])

    def latent_ppl(self) -> float:
        """Perplexity of the model on the held-out windows at λ = 0: before training, that of the original."""
        with self.lam.at(0.0):
            metrics = super().evaluation_loop(self.get_eval_dataloader(), "held out", True).metrics
        return self._ppl((metrics or {})["eval_loss"])

    # ---- optimizer ------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The recipe's."""
        if self.optimizer is None:
            self.optimizer = make_optimizer(self._student, self.recipe.optimizer)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """A scheduler that leaves the rate alone: ``set_progress`` sets it, however often accelerate steps this one."""
        scheduler = _KeepRate(optimizer or self._optimizer)
        self.lr_scheduler = scheduler  # type: ignore[assignment]
        return scheduler

    @property
    def _student(self) -> PreTrainedModel:
        return cast(PreTrainedModel, self.model)

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        return cast(torch.optim.Optimizer, self.optimizer)

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Trainer's own checkpoint, written aside and renamed: one that has its name is whole."""
        name = f"checkpoint-{self.state.global_step}"
        final = self._checkpoints / name
        with (
            disk_full_names(final),
            self._clock_stopped(),
            self._output_moved_to(final.parent / "unfinished") as staging,
        ):
            super()._save_checkpoint(model, trial)
        sync_tree(staging / name)
        (staging / name).replace(final)
        staging.rmdir()
        rotate_checkpoints(str(final.parent), save_total_limit=self.args.save_total_limit, use_mtime=False)

    @contextmanager
    def _output_moved_to(self, directory: Path) -> Iterator[Path]:
        shutil.rmtree(directory, ignore_errors=True)
        before, self.args.output_dir = self.args.output_dir, str(directory)
        try:
            yield directory
        finally:
            self.args.output_dir = before

    # ---- metrics --------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Pass Trainer's numbers on, with ours beside them."""
        if "loss" in logs:
            logs = self._training_metrics(logs)
        elif "eval_loss" in logs:
            logs = {"held_out_ppl": self._ppl(logs["eval_loss"])}
        else:
            return  # Trainer's closing summary: the report says it better
        super().log(logs, start_time)
        self.record(logs)

    def record(self, metrics: dict[str, float]) -> None:
        """Append one line to metrics.jsonl and show it."""
        line = {"step": self.state.global_step, "tokens": self.state.global_step * self.tokens_per_step, **metrics}
        line.pop("epoch", None)
        was_taught = self._terms.asks_the_original
        self._compare(line)
        with self._metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.reporter.metrics({**line, **self._outlook(metrics.get("tokens_per_second"))})
        if self._terms.asks_the_original != was_taught:
            self.reporter.note(_SURPASSED if was_taught else _FELL_BEHIND)

    def _compare(self, metrics: dict[str, float]) -> None:
        self._original_ppl = metrics.get("original_ppl", self._original_ppl)
        self._held_out_ppl = metrics.get("held_out_ppl", self._held_out_ppl)

    def _outlook(self, tokens_per_second: float | None) -> dict[str, float]:
        """What the display adds to the numbers: how far the run is and what comes next."""
        options, step = self.recipe.training, self.state.global_step
        following = min(options.steps, (step // options.save_every + 1) * options.save_every)
        outlook: dict[str, float] = {"steps": options.steps, "next_checkpoint": following}
        if tokens_per_second:
            outlook["eta_seconds"] = (options.steps - step) * self.tokens_per_step / tokens_per_second
        return outlook

    def forget_metrics_after(self, step: int) -> None:
        """Drop the lines of steps that a resumed run will do again, and take up what the others tell."""
        if self._metrics_file.exists():
            lines = self._metrics_file.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            with atomic_file(self._metrics_file) as temporary:
                temporary.write_text("".join(kept), encoding="utf-8")
            for line in kept:
                self._compare(json.loads(line))

    @property
    def tokens_per_step(self) -> int:
        """Tokens in an optimizer step."""
        return self.recipe.training.batch_size * self.recipe.training.context

    def _training_metrics(self, logs: dict[str, float]) -> dict[str, float]:
        now, step = time.monotonic(), self.state.global_step
        before, last_step = self._last_log
        steps = max(1, step - last_step)
        parts = {name: float(total) / steps for name, total in self._parts.items()}
        self._parts = dict.fromkeys(self._parts, 0.0)
        self._last_log = now, step
        group = self._optimizer.param_groups[0]
        return {
            "loss": logs["loss"],
            **parts,
            "lam": self.lam.value.item(),
            "lr": group["lr"],
            "weight_decay": group["weight_decay"],
            "grad_norm": logs["grad_norm"],
            "tokens_per_second": steps * self.tokens_per_step / (now - before),
        }

    def start_clock(self) -> None:
        """Begin counting tokens per second from the current step."""
        self._last_log = time.monotonic(), self.state.global_step

    @contextmanager
    def _clock_stopped(self) -> Iterator[None]:
        """Leave the time of a block out of the tokens per second."""
        stopped = time.monotonic()
        try:
            yield
        finally:
            since, step = self._last_log
            self._last_log = since + time.monotonic() - stopped, step


class _Progress(TrainerCallback):
    """Moves λ and the schedules before each step, and stops after one when asked to."""

    def __init__(self, trainer: WarmupTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._trainer.start_clock()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._trainer.set_progress(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._trainer.stop_if_diverged()
        if self._trainer.stop_requested:
            control.should_save = True
            control.should_training_stop = True


class _KeepRate(torch.optim.lr_scheduler.LRScheduler):
    def get_lr(self) -> list[float | Tensor]:
        return [group["lr"] for group in self.optimizer.param_groups]


def last_checkpoint(run_directory: Path) -> Path | None:
    """The newest whole checkpoint of a run, if it has one."""
    directory = run_directory / CHECKPOINTS
    found: str | None = get_last_checkpoint(str(directory)) if directory.is_dir() else None  # type: ignore[no-untyped-call]
    return Path(found) if found else None


def lambdas_at(t: float, ramp: LambdaRamp) -> tuple[float, float]:
    """λ of the weights and of the activations at progress t."""
    of_activations = min(ramp.activations_reach_one_at, ramp.reach_one_at)
    return lambda_at(t, ramp.curve, ramp.reach_one_at), lambda_at(t, ramp.curve, of_activations)


def training_arguments(recipe: Recipe, run_directory: Path, bf16: bool | None = None) -> TrainingArguments:
    """What Trainer has to know of a recipe.

    Args:
        recipe: resolved options.
        run_directory: where its checkpoints go.
        bf16: whether to compute in bf16, whatever this machine is good at; None for what the recipe means on it.

    Raises:
        UsageError: it is one of several processes, asks for bf16 in vain, or lacks a compiler or the package of its
            optimizer or of a tracker.
    """
    options = recipe.training
    if recipe.optimizer.name == "adamw8bit":
        _require("bitsandbytes", "optimizer.name: adamw8bit needs bitsandbytes, which")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("warmup trains in one process, on one device, so far", "start it without a launcher")
    if options.compile:
        _require_compiler()
    if bf16 is None:
        bf16 = uses_bf16(recipe)
    for tracker in options.trackers:
        _require(tracker, f"training.trackers: {tracker}")
    arguments = TrainingArguments(
        output_dir=str(run_directory / CHECKPOINTS),
        max_steps=options.steps,
        per_device_train_batch_size=options.micro_batch_size,
        per_device_eval_batch_size=options.micro_batch_size,
        gradient_accumulation_steps=options.accumulation,
        max_grad_norm=recipe.optimizer.max_grad_norm,
        bf16=bf16,
        use_cpu=bf16 and not torch.cuda.is_available(),  # else Trainer refuses bf16 without a GPU
        train_sampling_strategy="sequential",
        logging_strategy="steps",
        logging_steps=options.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=options.eval_every,
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=options.save_every,
        save_total_limit=options.keep_checkpoints,
        report_to=list(options.trackers) or "none",
        use_cache=True,  # kept in the config for generation; the training forward asks for none
        seed=options.seed,
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # else Trainer splits each batch over all GPUs it sees, whose losses do not add up to ours
    return arguments


def _require(package: str, wanted_by: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UsageError(f"{wanted_by} is not installed", f"pip install {package}")


def _require_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise UsageError(
            "training.compile: torch.compile needs a C++ compiler, and there is none", "install g++, or leave it off"
        ) from error


def uses_bf16(recipe: Recipe) -> bool:
    """Whether the forward runs under bf16 autocast: on request, or where the device has instructions for it."""
    return recipe.training.precision == "bf16" or (recipe.training.precision == "auto" and _is_fast_in_bf16())


def _is_fast_in_bf16() -> bool:
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    instructions = torch.cpu.get_capabilities()
    return bool(instructions.get("avx512_bf16") or instructions.get("amx_bf16"))
