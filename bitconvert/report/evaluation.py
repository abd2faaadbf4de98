"""What ``eval``, ``generate`` and ``compare`` tell when they are done."""

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
        original_stderr: the standard error of that, as of ``Perplexity``.
        ppl_ratio: the model's perplexity over the original's.
        ppl_ratio_stderr: its standard error, tokens paired.
        kl: mean KL(original || model) per token, in nats.
        kl_stderr: its standard error.
        top1_agreement: share of tokens, 0 to 1, for which both put the same one first.
    """

    original: str
    original_ppl: float
    original_stderr: float
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
        lora: the adapter beside the model's weights, as the user named it; None without one.
    """

    model: str
    kind: str
    runtime: str
    data: str | None
    perplexity: Perplexity | None
    comparison: Comparison | None
    tasks: dict[str, dict[str, float]]
    lora: str | None = None


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
class ComparedModel:
    """One model of a comparison.

    Attributes:
        model: as the user named it.
        kind: plain, latent, baked, packed or gguf.
        file_bytes: size of the weight files.
        runtime: which program wrote the answers.
        answers: one to each prompt, in their order.
        ppl: on the held-out text, computed by torch; None without one, as all that follows.
        ppl_stderr: its standard error if tokens were independent.
        ppl_ratio: over the first model's perplexity.
        kl: mean KL(first model || this one) per token, in nats; 0 for the first.
        kl_stderr: its standard error.
        top1_agreement: share of tokens, 0 to 1, for which both put the same one first.
    """

    model: str
    kind: str
    file_bytes: int
    runtime: str
    answers: tuple[str, ...]
    ppl: float | None = None
    ppl_stderr: float | None = None
    ppl_ratio: float | None = None
    kl: float | None = None
    kl_stderr: float | None = None
    top1_agreement: float | None = None


@dataclass(frozen=True)
class CompareReport:
    """What ``bitconvert compare`` found.

    Attributes:
        prompts: as the user gave them, without a chat template.
        chat: whether they were put into each model's chat template.
        temperature: 0 for the most probable token at each step.
        seed: of the random numbers.
        data: the held-out text's file or directory; None without one.
        tokens_scored: of that text, by each model.
        models: the reference first.
    """

    prompts: tuple[str, ...]
    chat: bool
    temperature: float
    seed: int
    data: str | None
    tokens_scored: int
    models: tuple[ComparedModel, ...]
