"""transformers.Trainer with what warmup adds: λ, a teacher, schedules by progress, checkpoints by rename."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
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
from transformers.trainer_utils import get_last_checkpoint, sort_checkpoints

from bitconvert.atomic import atomic_file, discard, disk_full_names, sync_tree
from bitconvert.errors import BitconvertError, UsageError
from bitconvert.models.head import head_of, hidden_states
from bitconvert.ranks import is_main, world_size
from bitconvert.recipe import Distillation, LambdaRamp, Recipe
from bitconvert.report.reporter import Reporter
from bitconvert.ternary.bitlinear import Lambda, compile_blocks
from bitconvert.ternary.blocks import all_finite
from bitconvert.ternary.machine import cpp_compiler, has_fast_bf16
from bitconvert.ternary.schedule import lambda_at, lr_at, weight_decay_at
from bitconvert.training.distill import CROSS_ENTROPY, DistillationLoss, distillation_loss
from bitconvert.training.flips import FlipMeter
from bitconvert.training.metrics import METRICS, line_of, read_metrics
from bitconvert.training.optimizers import make_optimizer
from bitconvert.training.packages import require_packages
from bitconvert.training.sharding import is_sharded, is_split, part_of, reshard
from bitconvert.training.state import damage_named, load_optimizer, load_weights, save_state
from bitconvert.training.teacher import Teacher

_SURPASSED = "better than the original on held-out text: the text alone teaches now"
_FELL_BEHIND = "no longer better than the original on held-out text: it teaches again"

_PATIENCE_SECONDS = 24 * 3600  # that processes wait while one of them tokenizes, or asks the original for its cache
_LARGEST_LOSS = 700.0  # beyond it perplexity overflows; a model this wrong, or NaN, has diverged

CHECKPOINTS = "checkpoints"
FITTED = "fitted"  # the layers that an initialisation is done with, until there is a checkpoint
_PROJECT = "bitconvert"  # under which trackers file a run, unless the user's environment names another
TRACKED = Path(CHECKPOINTS, "runs")  # where Trainer lets TensorBoard write


class Diverged(BitconvertError):
    """The loss, or what came of it, is not finite.

    Attributes:
        step: after which that was seen.
    """

    def __init__(self, step: int) -> None:
        super().__init__(
            f"the loss is not finite at step {step}",
            "start again with a lower optimizer.lr or a longer lam.reach_one_at (another --output keeps this run)",
        )
        self.step = step


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
        self.is_distributed_loading_by_transformers = is_split(student)  # then Trainer has nothing to wrap
        self.lam = lam
        self.recipe = recipe
        self.reporter = reporter
        self.stop_requested = False
        self._checkpoints = Path(cast(str, arguments.output_dir))
        self._metrics_file = self._checkpoints.parent / METRICS
        self._distill = CROSS_ENTROPY if recipe.control else recipe.distill
        self._text_alone = self._distill.model_copy(update={"kl": 0.0})
        self._original_ppl = self._held_out_ppl = math.nan  # until they are measured
        self._teacher = teacher
        self._parts: dict[str, Tensor | float] = {}
        self._began = self._last_log = (time.monotonic(), 0)
        self._flips = FlipMeter(student)
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
        options = self._terms if model.training else CROSS_ENTROPY
        items = num_items_in_batch if model.training and num_items_in_batch else tokens[:, 1:].numel()
        target = self._teacher.target(inputs) if self._teacher and options.asks_the_original else None

        def loss_of_student() -> DistillationLoss:
            hidden = hidden_states(self._student, tokens)
            return distillation_loss(hidden, head_of(self._student), target, tokens, options, items)

        with self.accelerator.autocast(), _forward_of(self._student, loss_of_student):
            loss, kl, ce = model()
        parts = {"kl": kl, "ce": ce}
        if model.training:
            self._parts = {name: self._parts.get(name, 0.0) + part for name, part in parts.items()}
            loss = loss * self.args.world_size  # gradients are averaged over the processes, and items are those of all
        return (loss, {}) if return_outputs else loss

    @property
    def _terms(self) -> Distillation:
        """Of the loss at this step: the text's alone while the original has nothing to teach."""
        is_better = self._held_out_ppl < self._original_ppl
        return self._text_alone if is_better and self._distill.ce and self._distill.until_surpassed else self._distill

    def end_step(self) -> bool:
        """Refuse to go on, or to save, after a loss that is not finite. One look per optimizer step, of all processes.

        Returns:
            Whether any of them was asked to stop.
        """
        loss, stops = self._of_all(float(sum(self._parts.values())), float(self.stop_requested))
        if not math.isfinite(loss):
            raise self._diverged()
        return stops > 0

    def _of_all(self, *numbers: float) -> list[float]:
        """Sums over all processes."""
        if self.args.world_size == 1:
            return list(numbers)
        mine = torch.tensor(numbers, device=self.args.device)
        return cast(Tensor, self.accelerator.reduce(mine, "sum")).tolist()

    def _diverged(self) -> Diverged:
        return Diverged(self.state.global_step)

    def _ppl(self, loss: float) -> float:
        if not loss < _LARGEST_LOSS:
            raise self._diverged()
        return math.exp(loss)

    # ---- evaluation -----------------------------------------------------------------------------------------------

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Measure the model that will be packed: λ = 1, whatever the training is at."""
        with self.lam.at(1.0), self._clock_stopped():
            return self._measure(*args, **kwargs)

    def _measure(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            reshard(self._student)
            if not self.is_in_train:  # or accelerate takes it for one that has been made ready to be trained
                vars(self._student)["_is_accelerate_prepared"] = False

    def ternary_ppl(self) -> float:
        """Perplexity of the model on the held-out windows at λ = 1."""
        return self._ppl(self.evaluation_loop(self.get_eval_dataloader(), "held out", True).metrics["eval_loss"])

    def latent_ppl(self) -> float:
        """Perplexity of the model on the held-out windows at λ = 0: before training, that of the original."""
        with self.lam.at(0.0):
            return self._ppl(self._measure(self.get_eval_dataloader(), "held out", True).metrics["eval_loss"])

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
        """Trainer's own checkpoint, written aside and renamed: one that has its name is whole, and finite."""
        finite = all(all_finite(part_of(parameter.detach())) for parameter in model.parameters())
        if self._of_all(float(not finite))[0]:
            raise self._diverged()  # by the gradients of a loss that still was finite
        final = self._checkpoints / f"checkpoint-{self.state.global_step}"
        with (
            disk_full_names(final),
            self._clock_stopped(),
            self._output_moved_to(final.parent / "unfinished") as staging,
        ):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # each process has written a file of its own
        if is_main():
            self._take_place(staging / final.name, final)
        self.accelerator.wait_for_everyone()

    def _take_place(self, unfinished: Path, final: Path) -> None:
        with disk_full_names(final):
            sync_tree(unfinished)
        unfinished.replace(final)
        unfinished.parent.rmdir()
        for old in sort_checkpoints(str(self._checkpoints))[: -self.recipe.training.keep_checkpoints]:
            discard(Path(old))
        shutil.rmtree(self._checkpoints.parent / FITTED, ignore_errors=True)

    @contextmanager
    def _output_moved_to(self, directory: Path) -> Iterator[Path]:
        if is_main():
            shutil.rmtree(directory, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        before, self.args.output_dir = self.args.output_dir, str(directory)
        try:
            yield directory
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)  # half a checkpoint, which may have filled the disk
            raise
        finally:
            self.args.output_dir = before

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Nothing of its own: weights are saved with the optimizer's state."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """All that is trained. Rates are functions of the progress, so there is no scheduler to save."""
        save_state(self._student, self._optimizer, Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with damage_named(resume_from_checkpoint):
            load_weights(self._student, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with damage_named(checkpoint):
                load_optimizer(self._student, self._optimizer, Path(checkpoint))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with damage_named(checkpoint):
                super()._load_rng_state(checkpoint)

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
        self.state.log_history.clear()  # it would be in each checkpoint, and longer each time: metrics.jsonl has it all
        self.record(logs)

    def record(self, metrics: dict[str, float]) -> None:
        """Append one line to metrics.jsonl and show it."""
        line = {"step": self.state.global_step, "tokens": self.state.global_step * self.tokens_per_step, **metrics}
        line.pop("epoch", None)
        was_taught = self._terms.asks_the_original
        self._compare(line)
        if is_main():
            with self._metrics_file.open("a", encoding="utf-8") as file:
                file.write(line_of(line))
        self.reporter.metrics({**line, **self._outlook()})
        if self._terms.asks_the_original != was_taught:
            self.reporter.note(_SURPASSED if was_taught else _FELL_BEHIND)

    def _compare(self, metrics: dict[str, float]) -> None:
        self._original_ppl = metrics.get("original_ppl", self._original_ppl)
        self._held_out_ppl = metrics.get("held_out_ppl", self._held_out_ppl)

    def _outlook(self) -> dict[str, float]:
        """What the display adds to the numbers: how far the run is and what comes next."""
        options, step = self.recipe.training, self.state.global_step
        following = min(options.steps, (step // options.save_every + 1) * options.save_every)
        outlook: dict[str, float] = {"steps": options.steps, "next_checkpoint": following}
        began, first = self._began
        if step > first:
            outlook["eta_seconds"] = (options.steps - step) * (time.monotonic() - began) / (step - first)
        return outlook

    def forget_metrics_after(self, step: int) -> None:
        """Drop the lines of steps that a resumed run will do again, and take up what the others tell."""
        if self._metrics_file.exists():
            kept = [line for line in read_metrics(self._metrics_file) if line["step"] <= step]
            self.accelerator.wait_for_everyone()  # until all have read it
            if is_main():
                with atomic_file(self._metrics_file) as temporary:
                    temporary.write_text("".join(map(line_of, kept)), encoding="utf-8")
            for line in kept:
                self._compare(line)

    @property
    def tokens_per_step(self) -> int:
        """Tokens in an optimizer step."""
        return self.recipe.training.batch_size * self.recipe.training.context

    def _training_metrics(self, logs: dict[str, float]) -> dict[str, float]:
        now, step = time.monotonic(), self.state.global_step
        before, last_step = self._last_log
        steps = max(1, step - last_step)
        sums = self._of_all(*map(float, self._parts.values()))
        parts = {name: total / steps for name, total in zip(self._parts, sums, strict=True)}
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
            **self._flips.look(steps),
        }

    def start_counting(self) -> None:
        """Begin to count tokens per second, and codes that change, from the current step."""
        self._flips.begin()
        self._began = self._last_log = time.monotonic(), self.state.global_step

    def track_beginning(self) -> None:
        """Tell the trackers, which begin with the training, what was measured before it."""
        measured = {"original_ppl": self._original_ppl, "held_out_ppl": self._held_out_ppl}
        super().log({name: ppl for name, ppl in measured.items() if not math.isnan(ppl)})

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
        self._trainer.start_counting()
        if state.global_step == 0:
            self._trainer.track_beginning()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._trainer.set_progress(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._trainer.end_step():
            control.should_save = True
            control.should_training_stop = True


@contextmanager
def _forward_of(model: PreTrainedModel, function: Callable[[], DistillationLoss]) -> Iterator[None]:
    """Let calling a model call a function: DDP and FSDP2 look after weights only while their module's forward runs."""
    before = model.__dict__.get("forward")
    model.forward = function
    try:
        yield
    finally:
        del model.forward
        if before is not None:
            model.forward = before


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
        UsageError: its batch does not divide among the processes, or it lacks a compiler or the package of its
            optimizer or of a tracker.
    """
    options, processes = recipe.training, world_size()
    require_packages(recipe)
    if options.accumulation % processes:
        raise UsageError(
            f"training.batch_size: {options.batch_size} windows do not divide into micro-batches of "
            f"{options.micro_batch_size} for {processes} processes",
            f"--set training.batch_size={_next_multiple(options.batch_size, options.micro_batch_size * processes)}, "
            "or smaller micro-batches, or fewer processes",
        )
    if options.compile:
        _require_compiler()
    if bf16 is None:
        bf16 = uses_bf16(recipe)
    os.environ.setdefault("WANDB_PROJECT", _PROJECT)  # Trainer tells wandb no other
    arguments = TrainingArguments(
        output_dir=str(run_directory / CHECKPOINTS),
        max_steps=options.steps,
        per_device_train_batch_size=options.micro_batch_size,
        per_device_eval_batch_size=options.micro_batch_size,
        gradient_accumulation_steps=options.accumulation // processes,
        accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": is_sharded(recipe)}},  # or all is whole
        max_grad_norm=recipe.optimizer.max_grad_norm,
        bf16=bf16,
        use_cpu=(bf16 or processes > 1) and not torch.cuda.is_available(),  # else Trainer refuses bf16 without a GPU
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        ddp_timeout=_PATIENCE_SECONDS,
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
        project=_PROJECT,
        run_name=run_directory.stem,  # trackers know a run by the name of its output
        use_cache=True,  # kept in the config for generation; the training forward asks for none
        seed=options.seed,
        disable_tqdm=True,
        log_level_replica="error",  # what the first process is not told, the others are not told either
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # else Trainer splits each batch over all GPUs it sees, whose losses do not add up to ours
    return arguments


def _next_multiple(number: int, of: int) -> int:
    return -(-number // of) * of


def _require_compiler() -> None:
    if cpp_compiler() is None:
        raise UsageError(
            "training.compile: torch.compile needs a C++ compiler, and there is none", "install g++, or leave it off"
        )


def uses_bf16(recipe: Recipe) -> bool:
    """Whether the forward runs under bf16 autocast: on request, or where the device has instructions for it."""
    return recipe.training.precision == "bf16" or (recipe.training.precision == "auto" and has_fast_bf16())
