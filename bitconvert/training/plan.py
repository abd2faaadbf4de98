"""``bitconvert plan``: what a warmup would do, and how much memory, time and disk it takes, here and on named GPUs."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from bitconvert.errors import UsageError
from bitconvert.models.checkpoint import Checkpoint, open_checkpoint
from bitconvert.recipe import Recipe, load_recipe
from bitconvert.report.reporter import Reporter
from bitconvert.report.training import Forecast, WarmupPlan
from bitconvert.training.gpus import CONTEXT_BYTES, Gpu
from bitconvert.training.initialisation import micro_batches
from bitconvert.training.keep import foreseen_kept
from bitconvert.training.rehearsal import Account, account, phases, timing
from bitconvert.training.student import is_trained_on, require_trainable, settle
from bitconvert.training.teacher import has_teacher

_PROGRAM, _ALLOCATOR = "program", "allocator"
_INITIALISATION = "initialisation"
_UPDATES, _EVALUATIONS, _CHECKPOINTS = "optimizer", "evaluations", "checkpoints"

_TOUCHED_LATER = 60 * 2**20  # pages of libraries, tokenizer and text that a process touches once it trains
_NOT_RETURNED = 0.08  # of the tensors' memory: freed pieces that an allocator holds, and kernels' scratch (measured)

_BYTES_SAVED_PER_SECOND = 1e9  # assumed beside a GPU

_SAVINGS = (
    ("training.micro_batch_size=1",),
    ("distill.cache=true",),
    ("training.activation_checkpointing=true",),
    ("distill.teacher_offload=true",),
    ("optimizer.name=adamw8bit",),
    ("optimizer.name=adafactor",),
    ("training.micro_batch_size=1", "training.activation_checkpointing=true"),
    (
        "training.micro_batch_size=1",
        "distill.cache=true",
        "training.activation_checkpointing=true",
        "optimizer.name=adafactor",
    ),
)
"""What is tried where a training does not fit, what costs least first."""


def plan_warmup(
    model: str,
    recipe: Recipe,
    gpus: Sequence[Gpu] = (),
    *,
    reporter: Reporter,
    clock: Callable[[], float] = time.perf_counter,
) -> WarmupPlan:
    """Foresee a warmup without loading a weight.

    Memory is counted in a rehearsal with the real trainer on fake tensors. The time of this machine is measured on a
    few layers, that of other GPUs estimated from the counted work.

    Args:
        model: hub id, Hugging Face directory or GGUF file.
        recipe: resolved options.
        gpus: other devices to foresee it for (``gpu_of`` knows them by name).
        reporter: receives the stages.
        clock: seconds by which this machine is measured.

    Raises:
        BitconvertError: the model cannot be opened, or is not one to train.
    """
    checkpoint = open_checkpoint(model)
    recipe = settle(recipe, checkpoint)
    checkpoint.keeping = foreseen_kept(checkpoint, recipe)
    require_trainable(checkpoint, recipe)
    forecaster = _Forecaster(checkpoint, recipe, reporter)
    forecasts = [forecaster.here(clock), *map(forecaster.on, gpus)]

    skeleton, options = checkpoint.skeleton(), recipe.training
    names = checkpoint.ternary_modules(name for name, _ in skeleton.named_modules())
    return WarmupPlan(
        model=model,
        architecture=checkpoint.family.model_type,
        parameters=_count(skeleton),
        ternary_parameters=sum(skeleton.get_parameter(f"{name}.weight").numel() for name in names),
        ternary_modules=len(names),
        steps=options.steps,
        steps_by_phase={phase.name: phase.steps for phase in phases(recipe)},
        tokens=options.steps * options.batch_size * options.context,
        accumulation=options.accumulation,
        disk_bytes=(options.keep_checkpoints + 1) * forecaster.checkpoint_bytes + 4 * _count(skeleton),
        forecasts=forecasts,
        notes=list(_notes(recipe, forecasts)),
        recipe=recipe.model_dump(mode="json"),
    )


class _Forecaster:
    """Memory and time of one recipe, device by device."""

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe, reporter: Reporter) -> None:
        self._checkpoint = checkpoint
        self._recipe = recipe
        self._reporter = reporter
        self._program = CONTEXT_BYTES if torch.cuda.is_available() else _resident_bytes() + _TOUCHED_LATER
        self._accounts: dict[tuple[bool | None, tuple[str, ...]], Account] = {}

    @property
    def checkpoint_bytes(self) -> int:
        """Size of a checkpoint."""
        return self._account(None).checkpoint_bytes

    def here(self, clock: Callable[[], float]) -> Forecast:
        """On this machine; on its GPU if there is one."""
        memory, capacity = self._memory(None, self._program), _free_bytes()
        fits = sum(memory.values()) <= capacity
        return Forecast(
            device=torch.cuda.get_device_name() if torch.cuda.is_available() else f"this machine, {_cpus()}",
            memory=memory,
            capacity_bytes=capacity,
            seconds=self._measured(clock) if fits else {},
            measured=True,
            remedies={} if fits else self._remedies(None, self._program, capacity),
        )

    def on(self, gpu: Gpu) -> Forecast:
        """On a GPU that is not here."""
        bf16 = self._recipe.training.precision != "float32"
        memory, capacity = self._memory(bf16, CONTEXT_BYTES), gpu.memory * 2**30
        fits = sum(memory.values()) <= capacity
        return Forecast(
            device=gpu.name,
            memory=memory,
            capacity_bytes=capacity,
            seconds=self._estimated(gpu, self._account(bf16)),
            measured=False,
            remedies={} if fits else self._remedies(bf16, CONTEXT_BYTES, capacity),
        )

    def _memory(self, bf16: bool | None, program: int, overrides: tuple[str, ...] = ()) -> dict[str, int]:
        tensors = self._account(bf16, overrides).peak
        return {_PROGRAM: program, **tensors, _ALLOCATOR: round(_NOT_RETURNED * sum(tensors.values()))}

    def _account(self, bf16: bool | None, overrides: tuple[str, ...] = ()) -> Account:
        if (bf16, overrides) not in self._accounts:
            self._reporter.stage(f"counting memory{''.join(f' with {override}' for override in overrides)}")
            self._accounts[bf16, overrides] = account(self._checkpoint, _changed(self._recipe, overrides), bf16)
        return self._accounts[bf16, overrides]

    def _remedies(self, bf16: bool | None, program: int, capacity: int) -> dict[str, int]:
        """Changes to the recipe with which it would fit, each with the memory that it takes then."""
        needed = {
            " ".join(overrides): sum(self._memory(bf16, program, overrides).values())
            for overrides in _SAVINGS
            if _changes(self._recipe, overrides) and _at_hand(overrides)
        }
        return {change: nbytes for change, nbytes in needed.items() if nbytes <= capacity}

    def _measured(self, clock: Callable[[], float]) -> dict[str, float]:
        self._reporter.stage("timing a few layers")
        times, accumulation = timing(self._checkpoint, self._recipe, clock), self._recipe.training.accumulation
        return {
            **self._initialisation(lambda: times.initialisation),
            **{
                phase.name: phase.steps * (times.first[phase.name] + (accumulation - 1) * times.following[phase.name])
                for phase in phases(self._recipe)
            },
            _UPDATES: self._recipe.training.steps * times.update,
            _EVALUATIONS: self._evaluations * (times.evaluation + self._held_out_batches * times.batch),
            _CHECKPOINTS: self._saves * self.checkpoint_bytes * times.saved_byte,
        }

    def _estimated(self, gpu: Gpu, counted: Account) -> dict[str, float]:
        steps, accumulation = self._recipe.training.steps, self._recipe.training.accumulation
        return {
            **self._initialisation(lambda: self._fitted_as_steps * gpu.seconds(counted.micro_step[self._last_phase])),
            **{
                phase.name: phase.steps * accumulation * gpu.seconds(counted.micro_step[phase.name])
                for phase in phases(self._recipe)
            },
            _UPDATES: steps * gpu.seconds(counted.update),
            _EVALUATIONS: self._evaluations * self._held_out_batches * gpu.seconds(counted.evaluation),
            _CHECKPOINTS: self._saves * counted.checkpoint_bytes / _BYTES_SAVED_PER_SECOND,
        }

    def _initialisation(self, seconds: Callable[[], float]) -> dict[str, float]:
        return {_INITIALISATION: seconds()} if self._recipe.initialises else {}

    @property
    def _fitted_as_steps(self) -> int:
        """Micro-batches of training that cost somewhat more than the initialisation does."""
        return micro_batches(self._recipe) * (
            self._recipe.init.epochs if self._recipe.init.method == "blockwise" else 1
        )

    @property
    def _last_phase(self) -> str:
        return phases(self._recipe)[-1].name

    @property
    def _evaluations(self) -> int:
        """At the start (of the original too, unless it is ternary already), now and then, and at the end."""
        return 3 - is_trained_on(self._checkpoint) + _times(self._recipe.training.eval_every, self._recipe)

    @property
    def _saves(self) -> int:
        return _times(self._recipe.training.save_every, self._recipe)

    @property
    def _held_out_batches(self) -> int:
        windows = max(1, self._recipe.data.held_out_tokens // self._recipe.training.context)
        return -(-windows // self._recipe.training.micro_batch_size)


def _times(every: int, recipe: Recipe) -> int:
    """How often something is done that is done every so many steps, and after the last."""
    return -(-recipe.training.steps // every)


def _changed(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    return load_recipe(None, overrides, beneath=recipe) if overrides else recipe


def _changes(recipe: Recipe, overrides: Sequence[str]) -> bool:
    """Whether overrides change anything, and go with the rest of the recipe."""
    try:
        return _changed(recipe, overrides) != recipe
    except UsageError:
        return False


def _at_hand(overrides: Sequence[str]) -> bool:
    """Whether what a change needs is installed, so that it can be rehearsed."""
    return "optimizer.name=adamw8bit" not in overrides or importlib.util.find_spec("bitsandbytes") is not None


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _notes(recipe: Recipe, forecasts: list[Forecast]) -> Iterator[str]:
    if any(not forecast.measured for forecast in forecasts):
        yield (
            "Times of named GPUs are estimates that were never measured: counted work at 60 % of the data sheet's "
            "FLOP/s and 75 % of its memory bandwidth."
        )
    if recipe.training.compile:
        yield "Memory is counted without training.compile, which needs less of it; compiling takes minutes on top."
    if recipe.distill.cache and has_teacher(recipe):
        yield "Asking the original for distill.cache comes on top, in time and on disk, unless an earlier run has."
    if recipe.distill.teacher_offload and any(not forecast.measured for forecast in forecasts):
        yield "Times of named GPUs leave out the way of the teacher's layers to them (distill.teacher_offload)."
    if recipe.initialises and any(not forecast.measured for forecast in forecasts):
        yield "The initialisation on named GPUs is counted as steps of the training, which ask the original too."
    if recipe.keep.budget and not recipe.control:
        yield (
            f"Measuring what keep.budget is best spent on comes on top: {recipe.keep.tokens} tokens forward for each "
            "linear. Here the first linears that it pays for stand for those that it will find."
        )
    if not recipe.data.sources:
        yield "The time to sample a text from the model comes on top; --data gives one."
    yield "Loading, and tokenizing a new text, come on top; measuring assumes a text of ten times data.held_out_tokens."


def _cpus() -> str:
    threads = torch.get_num_threads()
    return f"{threads} CPU thread{'s' if threads > 1 else ''}"


def _resident_bytes() -> int:
    """Memory of this process, which has loaded all that a training process has."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _free_bytes() -> int:
    """What a training could have here: the GPU's memory, or what this machine can give without swapping."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    return int(meminfo["MemAvailable"].split()[0]) * 1024 + _resident_bytes()
