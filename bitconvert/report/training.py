"""What ``warmup``, ``plan`` and ``adapt`` tell when they are done."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bitconvert.report.packing import ForeseenFile


@dataclass(frozen=True)
class WarmupReport:
    """What ``bitconvert warmup`` made.

    Attributes:
        output: directory of the latent checkpoint.
        steps: optimizer steps.
        tokens: training tokens.
        init_tokens: tokens that were looked at before the first step, to begin with better latents.
        scaling: estimator and granularity, in words.
        kept: linears that were kept from being ternary.
        control: whether it was trained in full precision, for comparison.
        original_ppl: of the original model on the held-out text.
        rounded_ppl: of the original, rounded without training, with int8 activations.
        held_out_ppl: of the result at λ = 1.
        seconds: wall time of this run (since the resume, for a resumed one).
    """

    output: str
    steps: int
    tokens: int
    init_tokens: int
    scaling: str
    kept: list[str]
    control: bool
    original_ppl: float
    rounded_ppl: float
    held_out_ppl: float
    seconds: float


@dataclass(frozen=True)
class AdaptReport:
    """What ``bitconvert adapt`` made.

    Attributes:
        model: as the user named it.
        output: directory of the adapter, as peft keeps it.
        gguf: the same as a GGUF file, in it.
        steps: optimizer steps.
        rank: of the adapter.
        parameters: how many numbers it holds.
        modules: beside how many linears.
        original_ppl: of the model without it, on held-out examples.
        held_out_ppl: of the model with it.
        seconds: wall time of this run (since the resume, for a resumed one).
    """

    model: str
    output: str
    gguf: str
    steps: int
    rank: int
    parameters: int
    modules: int
    original_ppl: float
    held_out_ppl: float
    seconds: float


@dataclass(frozen=True)
class Forecast:
    """What a warmup takes on one device.

    Attributes:
        device: its name.
        memory: bytes by kind when there are most of them: program, weights, teacher, codes, gradients, optimizer,
            activations, allocator.
        peak_bytes: all of them.
        capacity_bytes: what the device has.
        seconds: by kind of work; empty where a training does not fit, so that nothing could be measured.
        total_seconds: all of them; None where there are none.
        measured: whether the seconds come from this very device.
        remedies: changes to the recipe with which it would fit, where it does not, each with its bytes.
        gpus: how many of the device there are; memory is that of each.
        tokens_per_second: of the training itself, by all of them; None where there are no seconds.
        kernels: the device whose kernels were measured for the seconds; None where a data sheet tells them.
        cost: of all seconds, in the currency of the price that was given; None without one.
    """

    device: str
    memory: dict[str, int]
    peak_bytes: int = field(init=False)
    capacity_bytes: int
    seconds: dict[str, float]
    total_seconds: float | None = field(init=False)
    measured: bool
    remedies: dict[str, int]
    gpus: int = 1
    tokens_per_second: float | None = None
    kernels: str | None = None
    cost: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "peak_bytes", sum(self.memory.values()))
        object.__setattr__(self, "total_seconds", sum(self.seconds.values()) if self.seconds else None)

    @property
    def fits(self) -> bool:
        """Whether the device has that much memory."""
        return self.peak_bytes <= self.capacity_bytes


@dataclass(frozen=True)
class WarmupPlan:
    """What ``bitconvert plan`` foresees.

    Attributes:
        model: as the user named it.
        architecture: model type.
        parameters: of the whole model.
        ternary_parameters: those that become ternary.
        ternary_modules: how many linear layers that is.
        steps: optimizer steps.
        steps_by_phase: the same, before and after λ has reached 1.
        tokens: training tokens, after rounding to whole steps.
        accumulation: micro-batches per step on one device.
        disk_bytes: the most at a time: the checkpoints that exist at once and the result, or later that and its files.
        free_disk_bytes: where the result will lie; None where that is not known.
        files: the result packed, in each format that there is; those of the recipe are marked.
        forecasts: memory and time, for this machine and the GPUs asked for.
        notes: what the numbers assume.
        recipe: resolved, every option.
    """

    model: str
    architecture: str
    parameters: int
    ternary_parameters: int
    ternary_modules: int
    steps: int
    steps_by_phase: dict[str, int]
    tokens: int
    accumulation: int
    disk_bytes: int
    free_disk_bytes: int | None
    files: list[ForeseenFile]
    forecasts: list[Forecast]
    notes: list[str]
    recipe: dict[str, Any]
