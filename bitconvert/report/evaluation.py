"""What ``eval``, ``inspect`` and ``generate`` tell when they are done."""

from __future__ import annotations

from dataclasses import dataclass


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
