"""``bitconvert compare``: several models side by side: what they answer, and how far they are from the first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bitconvert.evaluation.arguments import check_comparison, check_generation
from bitconvert.evaluation.evaluate import DEFAULT_CONTEXT, evaluate, incomparable
from bitconvert.evaluation.generate import Choice, Wish, generate_all, prompt_texts
from bitconvert.evaluation.prompts import ASKED, CONTINUED
from bitconvert.evaluation.subjects import require_gguf, tokenize_by
from bitconvert.models.checkpoint import Checkpoint, open_checkpoint
from bitconvert.models.llama_cpp_library import find_library
from bitconvert.models.texts import BETWEEN_DOCUMENTS, read_texts
from bitconvert.report.evaluation import ComparedModel, CompareReport, EvalReport
from bitconvert.report.reporter import Reporter, Silent


def compare(
    models: Sequence[str],
    prompts: Sequence[str] = (),
    *,
    data: Path | None = None,
    max_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
    runtime: Choice = "auto",
    reporter: Reporter | None = None,
) -> CompareReport:
    """Let several models answer the same prompts, and measure each on a text against the first.

    One model is in memory at a time while they write, and two, the first and another, while they are measured.

    Args:
        models: hub ids, Hugging Face directories (plain, latent, baked or packed) or GGUF files; the first is the
            reference.
        prompts: texts to go on from, or with ``chat`` the user's messages; by default a few of ours.
        data: a held-out text for perplexity, KL divergence and agreement, computed by torch.
        max_tokens: the most to write to a prompt.
        temperature: 0 takes the most probable token at each step.
        seed: of the draws, for each prompt anew.
        chat: put the prompts into each model's chat template.
        runtime: who writes: see ``generate``.
        reporter: told about the progress.

    Raises:
        BitconvertError: one of the models cannot be read, cannot chat, or reads the text as other tokens; all this is
            said before any model is loaded.
        UsageError: the arguments make no sense.
    """
    reporter = reporter or Silent()
    check_comparison(models)
    check_generation(max_tokens, temperature)
    prompts = tuple(prompts) or (ASKED if chat else CONTINUED)
    reporter.stage("open the models")
    checkpoints = [_opened(name, prompts, chat, runtime) for name in models]
    if data is not None:
        _require_comparable(checkpoints, data)
    wish = Wish(chat, max_tokens, temperature, seed)
    compared = [_answering(checkpoint, prompts, wish, runtime, reporter) for checkpoint in checkpoints]
    measured = [] if data is None else _measured(checkpoints, data, reporter)
    return CompareReport(
        prompts=prompts,
        chat=chat,
        temperature=temperature,
        seed=seed,
        data=None if data is None else str(data),
        tokens_scored=measured[0].perplexity.tokens_scored if measured and measured[0].perplexity else 0,
        models=tuple(_with_measures(compared, measured) if measured else compared),
    )


# ---- before any work ----------------------------------------------------------------------------------------------


def _opened(name: str, prompts: Sequence[str], chat: bool, runtime: Choice) -> Checkpoint:
    """A model of which everything is there that will be asked for; no weight is read yet."""
    checkpoint = open_checkpoint(name)
    checkpoint.weights()
    prompt_texts(checkpoint, prompts, chat)
    if runtime == "llama.cpp":
        require_gguf(checkpoint)
        find_library()
    return checkpoint


def _require_comparable(checkpoints: Sequence[Checkpoint], data: Path) -> None:
    """Refuse models whose probabilities are not of the same tokens."""
    text = BETWEEN_DOCUMENTS.join(read_texts([str(data)]))
    reference, *others = checkpoints
    tokens, size = tokenize_by(reference.tokenizer(), text, None), _vocabulary(reference)
    for other in others:
        if tokenize_by(other.tokenizer(), text, None).ids.tolist() != tokens.ids.tolist():
            raise incomparable(other.name, reference.name, "their tokenizers cut the text differently")
        if _vocabulary(other) != size:
            sizes = f"their vocabularies hold {_vocabulary(other)} and {size} tokens"
            raise incomparable(other.name, reference.name, sizes)


def _vocabulary(checkpoint: Checkpoint) -> int:
    return checkpoint.weights()["model.embed_tokens.weight"][0]


# ---- the work -----------------------------------------------------------------------------------------------------


def _answering(
    checkpoint: Checkpoint, prompts: Sequence[str], wish: Wish, runtime: Choice, reporter: Reporter
) -> ComparedModel:
    written = generate_all(checkpoint, prompts, wish, runtime=runtime, reporter=reporter)
    return ComparedModel(
        model=checkpoint.name,
        kind=checkpoint.kind,
        file_bytes=checkpoint.file_bytes,
        runtime=written[0].runtime,
        answers=tuple(one.text for one in written),
    )


def _measured(checkpoints: Sequence[Checkpoint], data: Path, reporter: Reporter) -> list[EvalReport]:
    """All but the first, each against the first, in windows that every one of them can take."""
    reference, *others = (checkpoint.name for checkpoint in checkpoints)
    context = min(DEFAULT_CONTEXT, *(checkpoint.max_context for checkpoint in checkpoints))
    return [evaluate(name, data=data, context=context, against=reference, reporter=reporter) for name in others]


def _with_measures(compared: list[ComparedModel], measured: list[EvalReport]) -> list[ComparedModel]:
    first = measured[0].comparison
    assert first is not None, "measured against the reference"
    reference = replace(
        compared[0],
        ppl=first.original_ppl,
        ppl_stderr=first.original_stderr,
        ppl_ratio=1.0,
        kl=0.0,
        kl_stderr=0.0,
        top1_agreement=1.0,
    )
    others = [_with_measure(model, report) for model, report in zip(compared[1:], measured, strict=True)]
    return [reference, *others]


def _with_measure(model: ComparedModel, report: EvalReport) -> ComparedModel:
    ppl, distance = report.perplexity, report.comparison
    assert ppl is not None, "there is a text"
    assert distance is not None, "measured against the reference"
    return replace(
        model,
        ppl=ppl.ppl,
        ppl_stderr=ppl.stderr,
        ppl_ratio=distance.ppl_ratio,
        kl=distance.kl,
        kl_stderr=distance.kl_stderr,
        top1_agreement=distance.top1_agreement,
    )
