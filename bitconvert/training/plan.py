"""``bitconvert plan``: what a warmup would do, and how much memory, time and disk it takes, here and on named GPUs."""

from __future__ import annotations

import importlib.util
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import torch

from bitconvert.errors import BitconvertError, UsageError
from bitconvert.models.checkpoint import Checkpoint
from bitconvert.recipe import Recipe, differing, load_recipe, shipped_recipes
from bitconvert.report.reporter import Reporter
from bitconvert.report.training import Forecast, WarmupPlan
from bitconvert.training.gpus import CONTEXT_BYTES, Cluster
from bitconvert.training.initialisation import micro_batches
from bitconvert.training.keep import foreseen_kept
from bitconvert.training.parts import Parts
from bitconvert.training.rehearsal import Account, account, phases, timing
from bitconvert.training.student import is_trained_on, require_trainable, settle, settle_split
from bitconvert.training.teacher import has_teacher

_PROGRAM, _ALLOCATOR = "program", "allocator"
_INITIALISATION = "initialisation"
_UPDATES, _EVALUATIONS, _CHECKPOINTS = "optimizer", "evaluations", "checkpoints"
_COMMUNICATION = "communication that computing does not hide"

_TOUCHED_LATER = 60 * 2**20  # pages of libraries, tokenizer and text that a process touches once it trains
_NOT_RETURNED = 0.08  # of the tensors' memory: freed pieces that an allocator holds, and kernels' scratch (measured)

_LEAST_BYTES_A_WEIGHT = 8  # of any recipe: latents and gradients in float32

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

_SAVINGS_SPLIT = tuple(
    savings for savings in _SAVINGS if not any(each.startswith(("distill.", "optimizer.")) for each in savings)
)
"""The same where GPUs split the model: the rest needs it whole (``training.sharding``)."""


def plan_warmup(
    checkpoint: Checkpoint,
    recipe: Recipe,
    clusters: Sequence[Cluster] = (),
    *,
    price: float | None = None,
    reporter: Reporter,
    clock: Callable[[], float] = time.perf_counter,
) -> WarmupPlan:
    """Foresee a warmup without loading a weight.

    Memory is counted in a rehearsal with the real trainer on fake tensors. The time of this machine is measured on a
    few layers, that of other GPUs estimated from the counted work.

    Args:
        checkpoint: the original; of it, a config is enough.
        recipe: resolved options.
        clusters: other devices to foresee it for (``cluster_of`` knows them by name).
        price: of a GPU for an hour.
        reporter: receives the stages.
        clock: seconds by which this machine is measured.

    Raises:
        BitconvertError: the model is not one to train.
        UsageError: the recipe cannot be had on one of the clusters.
    """
    split = _split(recipe, checkpoint, clusters)
    recipe = settle(recipe, checkpoint)
    checkpoint.keeping = foreseen_kept(checkpoint, recipe)
    require_trainable(checkpoint, recipe)
    forecaster = _Forecaster(checkpoint, recipe, reporter)
    of_split = _Forecaster(checkpoint, split, reporter)
    forecasts = [
        forecaster.here(clock),
        *((of_split if cluster.count > 1 else forecaster).on(cluster, price) for cluster in clusters),
    ]

    skeleton, options = checkpoint.skeleton(), recipe.training
    names = checkpoint.ternary_modules(name for name, _ in skeleton.named_modules())
    return WarmupPlan(
        model=checkpoint.name,
        architecture=checkpoint.family.model_type,
        parameters=checkpoint.parameters,
        ternary_parameters=sum(skeleton.get_parameter(f"{name}.weight").numel() for name in names),
        ternary_modules=len(names),
        steps=options.steps,
        steps_by_phase={phase.name: phase.steps for phase in phases(recipe)},
        tokens=forecaster.tokens,
        accumulation=options.accumulation,
        disk_bytes=forecaster.disk_bytes,
        free_disk_bytes=None,
        files=[],
        forecasts=forecasts,
        notes=list(_notes(recipe, split, forecasts)),
        recipe=recipe.model_dump(mode="json"),
    )


def _split(recipe: Recipe, checkpoint: Checkpoint, clusters: Sequence[Cluster]) -> Recipe:
    """The recipe as GPUs follow it that split the model, if there are some among those that are asked about."""
    for cluster in clusters:
        if cluster.count > 1:
            try:
                return settle_split(recipe, checkpoint)
            except UsageError as error:
                raise UsageError(f"--gpu {cluster.name}: {error.message}", error.hint) from error
    return settle(recipe, checkpoint)


def disk_of_training(checkpoint: Checkpoint, recipe: Recipe, reporter: Reporter) -> int:
    """Bytes on disk that a training has at a time, its result included; see ``plan_warmup``."""
    return _Forecaster(checkpoint, recipe, reporter).disk_bytes


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

    @property
    def disk_bytes(self) -> int:
        """Of the checkpoints that exist at once, one of them being written, and of the result in float32."""
        checkpoints = self._recipe.training.keep_checkpoints + 1
        return checkpoints * self.checkpoint_bytes + 4 * self._checkpoint.parameters

    def here(self, clock: Callable[[], float]) -> Forecast:
        """On this machine; on its GPU if there is one."""
        memory, capacity = self._memory(None, self._program), _free_bytes()
        fits = sum(memory.values()) <= capacity
        seconds = self._measured(clock) if fits else {}
        return Forecast(
            device=torch.cuda.get_device_name() if torch.cuda.is_available() else f"this machine, {_cpus()}",
            memory=memory,
            capacity_bytes=capacity,
            seconds=seconds,
            measured=True,
            remedies={} if fits else self._remedies(None, self._program, capacity),
            tokens_per_second=self._tokens_per_second(seconds) if fits else None,
        )

    def on(self, cluster: Cluster, price: float | None = None) -> Forecast:
        """On GPUs that are not here; several split the model, so that each holds its part of it."""
        bf16 = self._recipe.training.precision != "float32"
        memory, capacity = self._memory(bf16, CONTEXT_BYTES, gpus=cluster.count), cluster.gpu.memory * 2**30
        fits = sum(memory.values()) <= capacity
        seconds = self._estimated(cluster, self._account(bf16))
        return Forecast(
            device=cluster.name,
            memory=memory,
            capacity_bytes=capacity,
            seconds=seconds,
            measured=False,
            kernels=cluster.gpu.kernels.device if cluster.gpu.kernels else None,
            remedies={} if fits else self._remedies(bf16, CONTEXT_BYTES, capacity, cluster.count),
            gpus=cluster.count,
            tokens_per_second=self._tokens_per_second(seconds),
            cost=None if price is None else price * cluster.count * sum(seconds.values()) / 3600,
        )

    def _tokens_per_second(self, seconds: dict[str, float]) -> float | None:
        """While it trains."""
        training = sum(seconds.get(kind, 0.0) for kind in (*self._phase_names, _UPDATES, _COMMUNICATION))
        return self.tokens / training if training else None

    def _memory(
        self, bf16: bool | None, program: int, overrides: tuple[str, ...] = (), gpus: int = 1
    ) -> dict[str, int]:
        counted = self._account(bf16, overrides)
        tensors = counted.peak if gpus == 1 else self._parts.memory(counted, gpus)
        return _needed(tensors, program)

    def _account(self, bf16: bool | None, overrides: tuple[str, ...] = ()) -> Account:
        if (bf16, overrides) not in self._accounts:
            self._reporter.stage(f"counting memory{''.join(f' with {override}' for override in overrides)}")
            self._accounts[bf16, overrides] = account(self._checkpoint, _changed(self._recipe, overrides), bf16)
        return self._accounts[bf16, overrides]

    def _remedies(self, bf16: bool | None, program: int, capacity: int, gpus: int = 1) -> dict[str, int]:
        """Changes to the recipe with which it would fit, each with the memory that it takes then."""
        if _LEAST_BYTES_A_WEIGHT * self._checkpoint.parameters > capacity * gpus:
            return {}
        needed = {
            " ".join(overrides): sum(self._memory(bf16, program, overrides, gpus).values())
            for overrides in (_SAVINGS if gpus == 1 else _SAVINGS_SPLIT)
            if _changes(self._recipe, overrides) and _at_hand(overrides)
        }
        if gpus == 1:
            needed |= self._nearest_recipe(bf16, program, capacity)
        return {change: nbytes for change, nbytes in needed.items() if nbytes <= capacity}

    def _nearest_recipe(self, bf16: bool | None, program: int, capacity: int) -> dict[str, int]:
        """Of the shipped recipes that would fit, the one whose number of tokens is nearest."""

        def distance(recipe: Recipe) -> float:
            return abs(math.log(recipe.training.tokens / self._recipe.training.tokens))

        shipped = {name: load_recipe(name) for name in shipped_recipes()}
        for name in sorted(shipped, key=lambda name: distance(shipped[name])):
            with suppress(BitconvertError):  # it does not go with this model
                recipe = settle(shipped[name], self._checkpoint)
                require_trainable(self._checkpoint, recipe)
                self._reporter.stage(f"counting memory with --recipe {name}")
                needed = _needed(account(self._checkpoint, recipe, bf16).peak, program)
                if sum(needed.values()) <= capacity:
                    return {f"--recipe {name}": sum(needed.values())}
        return {}

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

    def _estimated(self, cluster: Cluster, counted: Account) -> dict[str, float]:
        gpu, steps = cluster.gpu, self._recipe.training.steps
        micro_batches = self._micro_batches_on(cluster)
        computing = {phase.name: gpu.seconds(counted.micro_step[phase.name]) for phase in phases(self._recipe)}
        evaluation = gpu.seconds(counted.evaluation)

        def fitting() -> float:
            return self._fitted_as_steps * computing[self._last_phase]

        seconds = {
            **({} if cluster.count > 1 else self._initialisation(fitting)),
            **{phase.name: phase.steps * micro_batches * computing[phase.name] for phase in phases(self._recipe)},
            _UPDATES: steps * gpu.seconds(counted.update) / cluster.count,
            _EVALUATIONS: self._evaluations * -(-self._held_out_batches // cluster.count) * evaluation,
            _CHECKPOINTS: self._saves * counted.checkpoint_bytes / _BYTES_SAVED_PER_SECOND,
        }
        if cluster.count == 1:
            return seconds
        gathering = cluster.gathering_seconds(self._parts.traffic)
        exposed = {phase.name: max(0.0, gathering - computing[phase.name]) for phase in phases(self._recipe)}
        hidden_by_nothing = sum(phase.steps * micro_batches * exposed[phase.name] for phase in phases(self._recipe))
        return {**seconds, _COMMUNICATION: hidden_by_nothing}

    def _micro_batches_on(self, cluster: Cluster) -> int:
        """Of an optimizer step, on each GPU.

        Raises:
            UsageError: the step's batch does not divide by the GPUs.
        """
        options = self._recipe.training
        at_once = cluster.count * options.micro_batch_size
        if options.batch_size % at_once:
            raise UsageError(
                f"--gpu {cluster.name}: training.batch_size {options.batch_size} is not a multiple of {at_once}: "
                f"{cluster.count} GPUs with {options.micro_batch_size} windows each",
                f"--set training.batch_size={-(-options.batch_size // at_once) * at_once}, or fewer GPUs, or a smaller "
                "training.micro_batch_size",
            )
        return options.batch_size // at_once

    @cached_property
    def _parts(self) -> Parts:
        return Parts.of(self._checkpoint, self._recipe)

    @property
    def tokens(self) -> int:
        """Training tokens, after rounding to whole steps."""
        options = self._recipe.training
        return options.steps * options.batch_size * options.context

    @property
    def _phase_names(self) -> list[str]:
        return [phase.name for phase in phases(self._recipe)]

    def _initialisation(self, seconds: Callable[[], float]) -> dict[str, float]:
        return {_INITIALISATION: seconds()} if self._recipe.initialises else {}

    @property
    def _fitted_as_steps(self) -> int:
        """Micro-batches of training that cost somewhat more than the initialisation does."""
        return micro_batches(self._recipe) * self._recipe.init.passes

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


def _needed(tensors: dict[str, int], program: int) -> dict[str, int]:
    """What a process needs of a device's memory, of the tensors in it."""
    return {_PROGRAM: program, **tensors, _ALLOCATOR: round(_NOT_RETURNED * sum(tensors.values()))}


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


def _notes(recipe: Recipe, split: Recipe, forecasts: list[Forecast]) -> Iterator[str]:
    if others := differing(recipe, split):
        decided = ", ".join(f"{key}={value}" for key, (_, value) in others.items())
        yield f"GPUs that split the model train with {decided}: none of them could fit its layers, which it lacks."
    if any(forecast.gpus > 1 for forecast in forecasts):
        yield (
            "Several GPUs split the model (FSDP2): layers are gathered in float32 while others compute, at 75 % of "
            "what data sheets say of links and network adapters; what takes longer counts. Memory is somewhat "
            "overestimated: each kind at its own peak. One process writes the checkpoints, at 1 GB/s."
        )
    for device, kernels in {forecast.device: forecast.kernels for forecast in forecasts if forecast.kernels}.items():
        yield f"Times of {device} are estimates: counted work at the rates of kernels that were measured on {kernels}."
    if any(not forecast.measured and not forecast.kernels for forecast in forecasts):
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
        yield "The time to sample a text from the model comes on top; --data gives one, and split models need one."
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
