"""What the commands tell: progress while they run (Reporter), and a result when they are done (dataclasses)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


class Reporter(Protocol):
    """Where a command's progress goes; ui.py renders it, tests record it."""

    def stage(self, title: str) -> None:
        """Begin a named part of the work."""

    def advance(self, done: int, total: int) -> None:
        """Say how far the current part is."""

    def note(self, text: str) -> None:
        """Tell something worth knowing."""

    def warn(self, text: str) -> None:
        """Tell something the user may not want."""

    def metrics(self, values: Mapping[str, float]) -> None:
        """Show the current numbers of a training run or a measurement."""


class Silent:
    """A Reporter that says nothing."""

    def stage(self, title: str) -> None:
        """Ignore."""

    def advance(self, done: int, total: int) -> None:
        """Ignore."""

    def note(self, text: str) -> None:
        """Ignore."""

    def warn(self, text: str) -> None:
        """Ignore."""

    def metrics(self, values: Mapping[str, float]) -> None:
        """Ignore."""


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and everything that it depends on.

    Attributes:
        ppl: exp of the mean negative log-likelihood per token.
        stderr: its standard error if tokens were independent (llama-perplexity's own ±).
        window_stderr: its standard error if only whole windows are; None when there is one window.
        bits_per_byte: negative log-likelihood in bits per byte of UTF-8: comparable between vocabularies.
        convention: ``hf`` or ``llama.cpp``: which tokens of a window are scored.
        context: tokens per window.
        stride: tokens from the begin of one window to the next's.
        bos: whether BOS was prepended: to the text (hf) or to each window (llama.cpp).
        tokens_scored: tokens that the mean is over.
        bytes_scored: bytes of the text that they stand for.
        text_sha256: of the whole text, hexadecimal.
    """

    ppl: float
    stderr: float
    window_stderr: float | None
    bits_per_byte: float
    convention: str
    context: int
    stride: int
    bos: bool
    tokens_scored: int
    bytes_scored: int
    text_sha256: str


@dataclass(frozen=True)
class Comparison:
    """How far a model is from its original on the same windows.

    Attributes:
        original: the original as the user named it; always evaluated through torch.
        original_ppl: its perplexity.
        ppl_ratio: the model's perplexity over the original's.
        ppl_ratio_stderr: its standard error, tokens paired.
        kl: mean KL(original || model) per token, in nats.
        kl_stderr: its standard error.
        top1_agreement: share of tokens, 0 to 1, for which both put the same one first.
    """

    original: str
    original_ppl: float
    ppl_ratio: float
    ppl_ratio_stderr: float
    kl: float
    kl_stderr: float
    top1_agreement: float


@dataclass(frozen=True)
class EvalReport:
    """What ``bitconvert eval`` found.

    Attributes:
        model: as the user named it.
        kind: plain, latent, baked, packed or gguf.
        runtime: which program computed: torch, or llama.cpp with its client and version.
        data: the text's file or directory; None when only tasks were run.
        perplexity: None when only tasks were run.
        comparison: None without ``--against``.
        tasks: lm-eval's numbers: task -> metric -> value.
    """

    model: str
    kind: str
    runtime: str
    data: str | None
    perplexity: Perplexity | None
    comparison: Comparison | None
    tasks: dict[str, dict[str, float]]


@dataclass(frozen=True)
class ScaleSummary:
    """The scales of one tensor: how many, and their mean, least and largest."""

    count: int
    mean: float
    min: float
    max: float


@dataclass(frozen=True)
class TensorReport:
    """One tensor of a model.

    Attributes:
        name: as its file names it.
        type: how it is stored: F32, BF16, TQ2_0, "latent ternary", "packed ternary" …
        shape: (out, in) of the weight that it means, not of its bytes.
        ternary: whether it means codes and scales: stored so, or to be rounded so.
        parameters: number of weights.
        bytes: what it takes in the file, its scales included.
        bits_per_weight: the same per weight.
        zero_fraction: share of zeros, 0 to 1: among the codes of a ternary tensor, among the values of another.
        scale: of a ternary tensor, as it would be when rounded if it is latent; None otherwise.
        kept: whether it is a linear's that was kept from being ternary.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    ternary: bool
    parameters: int
    bytes: int
    bits_per_weight: float
    zero_fraction: float
    scale: ScaleSummary | None
    kept: bool = False


@dataclass(frozen=True)
class InspectReport:
    """What ``bitconvert inspect`` found.

    Attributes:
        model: as the user named it.
        kind: plain, latent, baked, packed or gguf.
        metadata: what the files say about the model: architecture, sizes, tokenizer, lineage.
        tensors: in the files' order.
        parameters: weights of all tensors.
        ternary_share: share of them that is ternary, 0 to 1.
        file_bytes: size of the weight files.
        bits_per_weight: bits of all tensors over all parameters.
        linear_bits_per_weight: the same of the ternary and the kept matrices; 0 where there are none.
        kept_bytes: what the kept matrices take.
    """

    model: str
    kind: str
    metadata: dict[str, str | int | float | bool]
    tensors: tuple[TensorReport, ...]
    parameters: int
    ternary_share: float
    file_bytes: int
    bits_per_weight: float
    linear_bits_per_weight: float
    kept_bytes: int


@dataclass(frozen=True)
class GenerateReport:
    """What ``bitconvert generate`` wrote.

    Attributes:
        model: as the user named it.
        runtime: which program computed: torch, or llama.cpp with its client and version.
        prompt: what the model was given, chat template applied.
        text: what it wrote after it.
        temperature: 0 for the most probable token at each step.
        seed: of the random numbers.
    """

    model: str
    runtime: str
    prompt: str
    text: str
    temperature: float
    seed: int


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
    """

    device: str
    memory: dict[str, int]
    peak_bytes: int = field(init=False)
    capacity_bytes: int
    seconds: dict[str, float]
    total_seconds: float | None = field(init=False)
    measured: bool
    remedies: dict[str, int]

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
        disk_bytes: of the checkpoints that exist at once, and the result.
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
    forecasts: list[Forecast]
    notes: list[str]
    recipe: dict[str, Any]


@dataclass(frozen=True)
class PackedTensor:
    """One tensor of a packed file.

    Attributes:
        name: in the file.
        type: how it is stored, as the runtime spells it.
        shape: of the weights it stands for.
        nbytes: of its data.
        ternary: whether it holds ternary codes.
        kept: whether it is a linear's that was kept from being ternary.
        note: why it is not stored in the type asked for; empty when it is.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    nbytes: int
    ternary: bool
    kept: bool = False
    note: str = ""

    @property
    def weights(self) -> int:
        """Number of weights it stands for."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class PackedFile:
    """One output of ``bitconvert pack``.

    Attributes:
        path: the GGUF file, or the first shard of it; or the directory.
        format: as given to ``--format``.
        tensors: in the file's order.
        nbytes: size of the weight file, or of all shards of it.
        seconds: it took to write and to read back.
        bits_per_weight: of the whole file, embeddings and metadata included.
        ternary_bits_per_weight: of the ternary matrices alone.
        linear_bits_per_weight: of the ternary and the kept matrices.
        note: what its user should know; empty when there is nothing.
    """

    path: str
    format: str
    tensors: list[PackedTensor]
    nbytes: int
    seconds: float
    bits_per_weight: float
    ternary_bits_per_weight: float
    linear_bits_per_weight: float
    note: str = ""

    @property
    def kept(self) -> list[PackedTensor]:
        """Matrices of linears that were kept from being ternary."""
        return [tensor for tensor in self.tensors if tensor.kept]

    @property
    def kept_bytes(self) -> int:
        """What they take of the file."""
        return sum(tensor.nbytes for tensor in self.kept)

    @property
    def fallbacks(self) -> list[PackedTensor]:
        """Tensors that are not stored in the type asked for."""
        return [tensor for tensor in self.tensors if tensor.note]

    def notes(self) -> list[str]:
        """All that its user should know, a line each."""
        return [*filter(None, [self.note]), *self._kept_notes(), *self._fallback_notes()]

    def _kept_notes(self) -> list[str]:
        if not self.kept:
            return []
        types = ", ".join(dict.fromkeys(tensor.type for tensor in self.kept))
        return [
            f"{len(self.kept)} matrices are kept from being ternary, as {types}: {self.kept_bytes / 1e6:.2f} MB of "
            f"{self.nbytes / 1e6:.2f}; the linear layers take {self.linear_bits_per_weight:.3f} bits per weight with "
            f"them ({', '.join(tensor.name for tensor in self.kept)})"
        ]

    def _fallback_notes(self) -> list[str]:
        """A line for each reason; the same tensor of all blocks is one name, since a large model has hundreds."""
        reasons: dict[tuple[str, str], list[str]] = {}
        for tensor in self.fallbacks:
            reasons.setdefault((tensor.type, tensor.note), []).append(re.sub(r"\d+", "*", tensor.name, count=1))
        return [
            f"{len(names)} tensors are stored as {stored}: {reason} ({', '.join(dict.fromkeys(names))})"
            for (stored, reason), names in reasons.items()
        ]


@dataclass(frozen=True)
class PackReport:
    """What ``bitconvert pack`` wrote.

    Attributes:
        model: as the user named it.
        scaling: of the ternary weights, in words.
        files: one per format.
        warnings: what the user may not want, such as weights that were rounded without training.
        refusals: why the other formats cannot hold this model, by name, where all were asked for.
        companions: what lies beside the files: the model card, a Modelfile.
    """

    model: str
    scaling: str
    files: list[PackedFile]
    warnings: list[str]
    refusals: dict[str, str] = field(default_factory=dict)
    companions: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class UnpackReport:
    """What ``bitconvert unpack`` wrote.

    Attributes:
        model: as the user named it.
        kind: of the model: plain, latent, packed or gguf.
        output: the directory.
        scaling: of the ternary weights, in words; in a file that does not say it, the coarsest that fits.
        ternary_parameters: weights of the ternary linears.
        nbytes: size of the weight file.
        formats: those that can hold such scales.
        seconds: it took to write and to read back.
    """

    model: str
    kind: str
    output: str
    scaling: str
    ternary_parameters: int
    nbytes: int
    formats: list[str]
    seconds: float


@dataclass(frozen=True)
class DemoRow:
    """One model of the demo.

    Attributes:
        name: original, rounded only, warmed up or control.
        ppl: on held-out stories, computed by torch.
        llama_cpp_ppl: the same computed by llama.cpp from the GGUF; None for a model that was not packed.
        nbytes: of its weight file.
        bits_per_weight: of that file, embeddings included.
    """

    name: str
    ppl: float
    llama_cpp_ppl: float | None
    nbytes: int
    bits_per_weight: float


@dataclass(frozen=True)
class DemoReport:
    """What ``bitconvert demo`` showed.

    Attributes:
        output: directory with everything it made.
        rows: original first.
        tokens_scored: per model.
        prompt: given to the packed model.
        text: what it went on with.
        spoken_by: which program computed that text.
        seconds: wall time.
    """

    output: str
    rows: tuple[DemoRow, ...]
    tokens_scored: int
    prompt: str
    text: str
    spoken_by: str
    seconds: float
