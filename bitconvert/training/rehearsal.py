"""The trainer at work without text and weights: on fake tensors to count memory and work, on real ones for the time.

Everything goes through the real trainer, model and optimizer, so that what is foreseen follows them whatever they do.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.data import Dataset
from transformers import PreTrainedModel, default_data_collator

from bitconvert.models.checkpoint import Checkpoint
from bitconvert.models.head import decoder_layers
from bitconvert.recipe import Recipe, load_recipe
from bitconvert.report.reporter import Silent
from bitconvert.ternary import quantize
from bitconvert.training.data import ShuffledWindows, Windows
from bitconvert.training.initialisation import initialise, micro_batches
from bitconvert.training.layers import FittedLayers
from bitconvert.training.ledger import ACTIVATIONS, Ledger, Work
from bitconvert.training.student import make_student
from bitconvert.training.teacher import LiveTeacher, Teacher, has_teacher, products_dtype
from bitconvert.training.teacher_cache import TEACHER_SHARES, TEACHER_TOKENS, CachedTeacher
from bitconvert.training.trainer import WarmupTrainer, lambdas_at, training_arguments

WEIGHTS, TEACHER, GRADIENTS, OPTIMIZER, CODES = "weights", "teacher", "gradients", "optimizer", "codes"
KINDS = WEIGHTS, TEACHER, CODES, GRADIENTS, OPTIMIZER, ACTIVATIONS
_ELSEWHERE = "in CPU memory"


@dataclass(frozen=True)
class Phase:
    """A stretch of the training in which each step costs the same.

    Attributes:
        name: in words.
        steps: how many steps it has.
        example: one of them.
    """

    name: str
    steps: int
    example: int


def phases(recipe: Recipe) -> list[Phase]:
    """The stretches that a recipe's training has, those with a step."""
    found = []
    for name, steps in groupby(range(recipe.training.steps), partial(_phase_of, recipe)):
        first, *_, last = (*steps,) * 2
        found.append(Phase(name, last - first + 1, (first + last) // 2))
    return found


def _phase_of(recipe: Recipe, step: int) -> str:
    if recipe.control:
        return "training"
    of_weights, of_activations = lambdas_at((step + 0.5) / recipe.training.steps, recipe.lam)
    if of_weights == of_activations == 1:
        return "training, λ = 1"
    if of_weights < 1 and of_activations < 1:
        return "training, λ < 1"
    return "training, λ = 1 of activations" if of_activations == 1 else "training, λ = 1 of weights"


class Rehearsal:
    """A trainer that is ready to take any step of a recipe, on made-up text.

    Args:
        checkpoint: of which the config is used, no weight.
        recipe: resolved options.
        directory: for what the trainer writes.
        layers: of how many decoder layers the model is to be; None for all of its own.
        bf16: whether the forward runs in bf16; None for what the recipe does on this machine.

    Attributes:
        trainer: the real one.
        student: the model that it trains.
        original: what teaches it, if that is a model at each step.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        recipe: Recipe,
        directory: Path,
        layers: int | None = None,
        bf16: bool | None = None,
    ) -> None:
        self._batch = recipe.training.micro_batch_size
        self._held_out = _Text(recipe.training.context)
        arguments = training_arguments(recipe, directory, bf16)
        self.student = _random_model(checkpoint, layers)
        self.original: PreTrainedModel | None = None
        self._windows = self._held_out
        teacher: Teacher | None = None
        if has_teacher(recipe) and recipe.distill.cache:
            top_k = min(recipe.distill.cache_top_k, self.student.config.vocab_size)
            self._windows, teacher = _Text(recipe.training.context, top_k), CachedTeacher()
        elif has_teacher(recipe):
            self.original = _random_model(checkpoint, layers)
            teacher = LiveTeacher(self.original, recipe.distill, arguments.device, products_dtype(arguments))
        lam = make_student(self.student, checkpoint, recipe)
        self.trainer = WarmupTrainer(
            self.student, teacher, lam, recipe, arguments, self._windows, self._held_out, Silent()
        )
        prepare: Any = self.trainer._prepare_for_training
        self._prepared, _ = prepare(recipe.training.steps, None, None)

    def micro_step(self, step: int) -> None:
        """Forward and backward pass of one micro-batch, at the λ of an optimizer step."""
        self.trainer.set_progress(step)
        batch = default_data_collator([self._windows[index] for index in range(self._batch)])
        self.trainer.training_step(self._prepared, batch, batch["input_ids"].numel())

    def update(self) -> None:
        """What follows the last micro-batch of an optimizer step."""
        self.trainer._clip_grad_norm(self._prepared)  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._prepared.zero_grad()

    def initialise(self, batches: int, epochs: int) -> None:
        """Do to the latents what the recipe does before the first step, with so many micro-batches of text."""
        recipe, dtype = self.trainer.recipe, products_dtype(self.trainer.args)
        size = batches * self._batch * recipe.training.context
        vocabulary = self.student.config.vocab_size
        text = np.random.default_rng(0).integers(vocabulary, size=size)  # not of padding, which has no states
        init = recipe.init.model_copy(update={"tokens": size, "epochs": epochs})
        windows = ShuffledWindows(Windows(text, recipe.training.context), batches * self._batch, recipe.training.seed)
        recipe = recipe.model_copy(update={"init": init})
        initialise(self.student, self.trainer.lam, recipe, windows, dtype, Silent(), FittedLayers(None))

    def evaluate(self, batches: int = 1) -> None:
        """Measure the model on held-out text, as it is measured during training."""
        self._held_out.windows = batches * self._batch
        self.trainer.ternary_ppl()

    def save(self) -> int:
        """Write a checkpoint. Returns its size in bytes."""
        self.trainer._save_checkpoint(self._prepared, None)
        return sum(file.stat().st_size for file in self.trainer._checkpoints.rglob("*") if file.is_file())

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        assert self.trainer.optimizer is not None
        return self.trainer.optimizer

    def states(self) -> Iterator[Tensor]:
        """What the optimizer keeps."""
        for state in self._optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


class _Text(Dataset[dict[str, Tensor]]):
    """As many windows as wanted, of token 0; with the answers of a teacher to it, of whom k tokens are known."""

    def __init__(self, context: int, top_k: int = 0) -> None:
        self._context = context
        self._top_k = top_k
        self.windows = 1

    def __len__(self) -> int:
        return self.windows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        window = torch.zeros(self._context, dtype=torch.int64)
        taught = {
            TEACHER_TOKENS: torch.arange(self._top_k).repeat(self._context - 1, 1),
            TEACHER_SHARES: torch.zeros(self._context - 1, self._top_k + 1, dtype=torch.float16),
        }
        return {"input_ids": window, "labels": window, **(taught if self._top_k else {})}


def _random_model(checkpoint: Checkpoint, layers: int | None) -> PreTrainedModel:
    """The model that a config describes, or its first layers, with random float32 weights."""
    config = copy.deepcopy(checkpoint.complete)
    whole = config.num_hidden_layers
    if layers is not None and layers < whole:
        for name, value in vars(config).items():
            if isinstance(value, list) and len(value) == whole:  # one entry per layer
                setattr(config, name, value[:layers])
        config.num_hidden_layers = layers
    model: PreTrainedModel = getattr(transformers, checkpoint.family.architecture)(config)
    return nn.Module.float(model)


# ---- without memory or time ----------------------------------------------------------------------------------------

_SLICES_COUNTED = 3, 5
"""Decoder layers of the two models that are counted where there are more."""

_WEIGHTS_COUNTED, _WEIGHTS_ON_GPU = 2**24, 2**62
"""Of how many weights scales and codes are made at once: all on a GPU; on a CPU those that its cache holds, and here
some more, since a step on fake tensors takes as long however large they are."""


@dataclass(frozen=True)
class Account:
    """What a training takes, counted on fake tensors.

    Attributes:
        peak: bytes by kind when there were most of them.
        highest: bytes of each kind when there were most of that kind.
        checkpoint_bytes: size of a checkpoint, weights and optimizer.
        micro_step: work of a micro-batch's forward and backward pass, by phase.
        update: work of the rest of an optimizer step.
        evaluation: work of measuring on one micro-batch of held-out text.
    """

    peak: dict[str, int]
    highest: dict[str, int]
    checkpoint_bytes: int
    micro_step: dict[str, Counter[Work]]
    update: Counter[Work]
    evaluation: Counter[Work]

    def extrapolated(self, fewer: Account, further: float) -> Account:
        """On the line that leads from another account to this one, so many times their distance further.

        Work that only the other knows counts less than nothing then: an optimizer goes over all weights in one
        operation, of which the larger one takes the place of the smaller.
        """

        def line(to: Mapping[Any, Any], begin: Mapping[Any, Any]) -> dict[Any, Any]:
            keys = dict.fromkeys((*to, *begin))
            return {key: to.get(key, 0) + further * (to.get(key, 0) - begin.get(key, 0)) for key in keys}

        def nbytes(to: Mapping[str, int], begin: Mapping[str, int]) -> dict[str, int]:
            return {kind: round(value) for kind, value in line(to, begin).items()}

        return Account(
            peak=nbytes(self.peak, fewer.peak),
            highest=nbytes(self.highest, fewer.highest),
            checkpoint_bytes=round(self.checkpoint_bytes + further * (self.checkpoint_bytes - fewer.checkpoint_bytes)),
            micro_step={name: Counter(line(self.micro_step[name], fewer.micro_step[name])) for name in self.micro_step},
            update=Counter(line(self.update, fewer.update)),
            evaluation=Counter(line(self.evaluation, fewer.evaluation)),
        )


def account(checkpoint: Checkpoint, recipe: Recipe, bf16: bool | None = None) -> Account:
    """Go through a step of each phase, and a measurement, on fake tensors.

    Layers cost the same, so those of a deep model are told from few. A teacher that waits in CPU memory is left out of
    a GPU's, also its one layer that is there for a moment.
    """
    layers = checkpoint.complete.num_hidden_layers
    few, many = (min(layers, slice_) for slice_ in _SLICES_COUNTED)
    counted = _counted(checkpoint, recipe, bf16, many)
    if many == layers:
        return counted
    return counted.extrapolated(_counted(checkpoint, recipe, bf16, few), (layers - many) / (many - few))


def _counted(checkpoint: Checkpoint, recipe: Recipe, bf16: bool | None, layers: int) -> Account:
    resident = load_recipe(None, ["distill.teacher_offload=false"], beneath=recipe)
    on_gpu = bf16 is not None or torch.cuda.is_available()
    with (
        tempfile.TemporaryDirectory() as directory,
        _fake_tensors(),
        _replaced(quantize, "_WEIGHTS_AT_ONCE", _WEIGHTS_ON_GPU if on_gpu else _WEIGHTS_COUNTED),
        Ledger() as ledger,
        torch.compiler.set_stance("force_eager"),
    ):
        rehearsal = Rehearsal(checkpoint, resident, Path(directory), layers, bf16)
        return _account(rehearsal, recipe, ledger, offloaded=recipe.distill.teacher_offload and on_gpu)


def _account(rehearsal: Rehearsal, recipe: Recipe, ledger: Ledger, *, offloaded: bool) -> Account:
    def work() -> Counter[Work]:
        done, ledger.work = ledger.work, Counter()
        return done

    student, original, ready = rehearsal.student, rehearsal.original, ledger.entries
    work()
    rehearsal.evaluate()
    evaluation = work()
    micro_step: dict[str, Counter[Work]] = {}
    for phase in phases(recipe):
        for _ in range(min(2, recipe.training.accumulation)):
            work()
            rehearsal.micro_step(phase.example)
            micro_step[phase.name] = work()
            ledger.book(GRADIENTS, (parameter.grad for parameter in student.parameters()))
        rehearsal.update()
        update = work()
        ledger.book(OPTIMIZER, rehearsal.states())
        rehearsal.evaluate()
        ledger.rename(ACTIVATIONS, CODES)  # nothing is under way: what is left is kept for the next step
        ledger.book(WEIGHTS, student.parameters())
        if original is not None:
            ledger.book(TEACHER, (*original.parameters(), *original.buffers()))
            if offloaded:
                ledger.book(_ELSEWHERE, decoder_layers(original).parameters())
        ledger.book(OPTIMIZER, rehearsal.states())
    trained = sum(each.numel() * each.itemsize for each in student.parameters() if each.requires_grad)
    nbytes = trained + ledger.nbytes(OPTIMIZER)
    peak, highest = (
        {kind: found[kind] for kind in KINDS if kind in found} for found in (ledger.peak(), ledger.highest(since=ready))
    )
    return Account(peak, highest, nbytes, micro_step, update, evaluation)


@contextmanager
def _fake_tensors() -> Iterator[None]:
    """Let tensors be made without memory, moved with their models, and read where a loss is averaged.

    ``nn.Module.to`` would swap a fake parameter for another, which torch refuses while it remembers the first.
    """
    with (
        _replaced(nn.Module, "_apply", _apply_to_data),
        _replaced(FakeTensor, "numpy", lambda tensor: np.ones(tensor.shape, np.float32)),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        yield


@contextmanager
def _replaced(owner: object, name: str, method: object) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, method)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _apply_to_data(self: nn.Module, fn: Any, *_: Any) -> nn.Module:
    for module in self.modules():
        for parameter in filter(None.__ne__, module._parameters.values()):
            applied = fn(parameter.data)  # type: ignore[union-attr]
            if applied is not parameter.data:  # type: ignore[union-attr]
                parameter.data = applied  # type: ignore[union-attr]
        module._buffers.update({name: fn(buffer) for name, buffer in module._buffers.items() if buffer is not None})
    return self


# ---- with a clock --------------------------------------------------------------------------------------------------

_SLICES = 1, 4
"""Decoder layers of the two models that are timed: the rest of the real one's is more of their difference."""

_MOST_ROUNDS = 3
_SECONDS_FOR_ROUNDS = 4.0


@dataclass(frozen=True)
class Timing:
    """Seconds that the parts of a training take on this machine.

    Attributes:
        initialisation: what is done to the latents before the first step.
        first: a step's first micro-batch, by phase; it rounds the weights that have changed.
        following: every other micro-batch of a step, by phase.
        update: the rest of an optimizer step.
        evaluation: to measure on held-out text, whatever its size.
        batch: on top of that for each micro-batch of it.
        saved_byte: to write a byte of a checkpoint.
    """

    initialisation: float
    first: dict[str, float]
    following: dict[str, float]
    update: float
    evaluation: float
    batch: float
    saved_byte: float


def timing(checkpoint: Checkpoint, recipe: Recipe, clock: Callable[[], float] = time.perf_counter) -> Timing:
    """Time two models of few layers at real work, and from their difference tell the time of all layers.

    Where other programs are busy, what takes longer may have been timed as shorter: no difference counts below 0.
    """
    layers = checkpoint.complete.num_hidden_layers
    few, many = (min(layers, slice_) for slice_ in _SLICES)
    of_few, of_many = (_times(checkpoint, recipe, count, clock) for count in (few, many))
    extrapolated = {
        name: seconds + max(0.0, seconds - of_few[name]) * (layers - many) / max(1, many - few)
        for name, seconds in of_many.items()
    }
    names = [phase.name for phase in phases(recipe)]
    return Timing(
        initialisation=_initialisation(extrapolated, recipe) if recipe.initialises else 0.0,
        first={name: extrapolated[f"{name}, first"] for name in names},
        following={name: extrapolated[f"{name}, following"] for name in names},
        update=extrapolated["update"],
        evaluation=max(0.0, extrapolated["one batch"] - extrapolated["batch"]),
        batch=extrapolated["batch"],
        saved_byte=of_many["saved byte"],
    )


def _times(checkpoint: Checkpoint, recipe: Recipe, layers: int, clock: Callable[[], float]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as directory, torch.random.fork_rng():
        rehearsal = Rehearsal(checkpoint, recipe, Path(directory), layers)
        times = {}
        for phase in phases(recipe):
            for name, seconds in _step_times(rehearsal, phase, clock).items():
                times[name if name == "update" else f"{phase.name}, {name}"] = seconds
        times |= _evaluation_times(rehearsal, clock)
        started = clock()
        times["saved byte"] = 1 / rehearsal.save() * (clock() - started)
        return times | (_initialisation_times(rehearsal, clock) if recipe.initialises else {})


def _step_times(rehearsal: Rehearsal, phase: Phase, clock: Callable[[], float]) -> dict[str, float]:
    """Median seconds of a step's parts, after one step that is not counted."""
    parts: dict[str, Callable[[], None]] = {
        "first": lambda: rehearsal.micro_step(phase.example),
        "following": lambda: rehearsal.micro_step(phase.example),
        "update": rehearsal.update,
    }
    rounds: list[dict[str, float]] = []
    begun = time.perf_counter()
    while len(rounds) < 3 or (len(rounds) <= _MOST_ROUNDS and time.perf_counter() - begun < _SECONDS_FOR_ROUNDS):
        rounds.append({name: _seconds(part, clock) for name, part in parts.items()})
    return {name: statistics.median(each[name] for each in rounds[1:]) for name in parts}


def _evaluation_times(rehearsal: Rehearsal, clock: Callable[[], float]) -> dict[str, float]:
    rehearsal.evaluate()
    one, three = (
        statistics.median(_seconds(partial(rehearsal.evaluate, count), clock) for _ in range(3)) for count in (1, 3)
    )
    return {"one batch": one, "batch": max(0.0, three - one) / 2}


def _initialisation_times(rehearsal: Rehearsal, clock: Callable[[], float]) -> dict[str, float]:
    """Of going over the text once, of each micro-batch in it, and of each further time over one micro-batch."""

    def seconds(batches: int, epochs: int) -> float:
        return statistics.median(_seconds(partial(rehearsal.initialise, batches, epochs), clock) for _ in range(3))

    rehearsal.initialise(1, 1)
    once, more_text, once_more = seconds(1, 1), seconds(2, 1), seconds(1, 2)
    differences = {"begun": 2 * once - more_text, "taken in": more_text - once, "gone over again": once_more - once}
    return {name: max(0.0, difference) for name, difference in differences.items()}


def _initialisation(seconds: dict[str, float], recipe: Recipe) -> float:
    of_a_batch = seconds["taken in"] + (recipe.init.passes - 1) * seconds["gone over again"]
    return seconds["begun"] + micro_batches(recipe) * of_a_batch


def _seconds(work: Callable[[], None], clock: Callable[[], float]) -> float:
    started = clock()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - started
