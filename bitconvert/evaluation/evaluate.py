"""``bitconvert eval``: perplexity of anything, distance to its original, task suites."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from bitconvert.errors import BitconvertError
from bitconvert.evaluation import perplexity, runtimes
from bitconvert.evaluation.arguments import RuntimeName, check_evaluation
from bitconvert.evaluation.subjects import (
    Subject,
    TorchModel,
    has_llama_cpp,
    llama_cpp_subject,
    require_gguf,
    tokenize_by,
)
from bitconvert.evaluation.tasks import TaskResults, run_tasks
from bitconvert.evaluation.windows import Convention, TokenizedText, Window, first_tokens, windows
from bitconvert.models.checkpoint import Checkpoint, open_checkpoint
from bitconvert.models.texts import BETWEEN_DOCUMENTS, read_texts
from bitconvert.report.evaluation import Comparison, EvalReport, Perplexity
from bitconvert.report.reporter import Reporter, Silent

DEFAULT_CONTEXT = 512
"""Tokens per window, as in llama-perplexity; less where the model cannot."""


def evaluate(
    model: str,
    *,
    data: Path | None = None,
    context: int | None = None,
    stride: int | None = None,
    convention: Convention = "hf",
    bos: bool | None = None,
    against: str | None = None,
    runtime: RuntimeName = "torch",
    tasks: Sequence[str] = (),
    max_tokens: int | None = None,
    threads: int | None = None,
    lora: Path | None = None,
    reporter: Reporter | None = None,
) -> EvalReport:
    """Measure a model.

    Args:
        model: hub id, Hugging Face directory (plain, latent, baked or packed) or GGUF file.
        data: the text: a file or a directory that ``models.texts`` can read; needed unless there are tasks.
        context: tokens per window; None for 512, or the model's limit if that is less.
        stride: tokens from one window to the next (hf only); None for windows that do not overlap.
        convention: ``hf`` or ``llama.cpp``: see ``evaluation.windows``.
        bos: whether BOS comes first; None for what the model's own tokenizer does.
        against: the original: adds KL divergence, top-1 agreement and the ratio of perplexities. It always goes
            through torch, so with ``runtime="llama.cpp"`` the comparison also holds what llama.cpp itself adds.
        runtime: ``torch``, or ``llama.cpp`` for the number that llama.cpp itself computes (GGUF only).
        tasks: names or YAML files for lm-eval (torch only).
        max_tokens: measure on the first so many tokens of the text; None for all.
        threads: CPU threads; None for the libraries' own choice.
        lora: an adapter beside the model's weights (not the original's): a directory of peft's, or a GGUF file (for
            llama.cpp, the latter or a directory that ``adapt`` made).
        reporter: told about the progress.

    Raises:
        BitconvertError: a model, the text or a task cannot be read; the text is too short for a window; the
            original has another vocabulary.
        UsageError: the arguments contradict each other.
    """
    reporter = reporter or Silent()
    check_evaluation(data, against, runtime, tasks)
    checkpoint = open_checkpoint(model)
    text = "" if data is None else BETWEEN_DOCUMENTS.join(read_texts([str(data)]))
    conditions = Conditions(data, text, convention, _context(checkpoint, context), stride, bos, max_tokens, lora)
    with _torch_threads(threads):
        if data is None:
            loaded = _loaded(checkpoint, reporter, lora)
            return _report(checkpoint, conditions, tasks=_run_tasks(loaded, tasks, reporter))
        if runtime == "llama.cpp":
            return _through_llama_cpp(checkpoint, conditions, against, threads, reporter)
        return _through_torch(checkpoint, conditions, against, tasks, reporter)


@dataclass(frozen=True)
class Conditions:
    """Under which a perplexity is measured: ``evaluate``'s arguments, with the text read and the context known."""

    data: Path | None
    text: str
    convention: Convention
    context: int
    stride: int | None
    bos: bool | None
    max_tokens: int | None
    lora: Path | None

    def tokens(self, subject: Subject) -> TokenizedText:
        """The tokens that count."""
        whole = subject.tokenize(self.text, self.bos)
        return whole if self.max_tokens is None else first_tokens(whole, self.max_tokens)

    def windows(self, tokens: TokenizedText) -> list[Window]:
        """The windows that they are scored in."""
        return windows(tokens, self.convention, self.context, self.stride)


def _through_torch(
    checkpoint: Checkpoint,
    conditions: Conditions,
    against: str | None,
    tasks: Sequence[str],
    reporter: Reporter,
) -> EvalReport:
    loaded = _loaded(checkpoint, reporter, conditions.lora)
    measured, comparison = _measure(loaded.as_subject(checkpoint.name), conditions, against, reporter)
    results = _run_tasks(loaded, tasks, reporter) if tasks else {}
    return _report(checkpoint, conditions, "torch", measured, comparison, results)


def _through_llama_cpp(
    checkpoint: Checkpoint,
    conditions: Conditions,
    against: str | None,
    threads: int | None,
    reporter: Reporter,
) -> EvalReport:
    require_gguf(checkpoint)
    if _only_llama_perplexity(conditions, against):
        measured = _by_llama_perplexity(checkpoint, conditions, threads, reporter)
        return _report(checkpoint, conditions, "llama-perplexity", measured)
    with llama_cpp_subject(checkpoint, conditions.context, threads, conditions.lora) as subject:
        measured, comparison = _measure(subject, conditions, against, reporter)
        return _report(checkpoint, conditions, subject.runtime, measured, comparison)


def _measure(
    subject: Subject, conditions: Conditions, against: str | None, reporter: Reporter
) -> tuple[Perplexity, Comparison | None]:
    """Perplexity of a model, and with an original the distance to it over the same windows."""
    tokens = conditions.tokens(subject)
    cuts = conditions.windows(tokens)
    original = None if against is None else _original(against, subject, tokens, conditions, reporter)
    reporter.stage(f"perplexity of {subject.name}")
    scores = perplexity.score(cuts, subject.predict, original.predict if original else None, reporter)
    measured = perplexity.summarize(scores, tokens, conditions.convention, conditions.context, conditions.stride)
    return measured, perplexity.compare(scores, original.name) if original else None


def _original(
    name: str, subject: Subject, tokens: TokenizedText, conditions: Conditions, reporter: Reporter
) -> Subject:
    """Load what a model is compared with.

    Raises:
        BitconvertError: it reads the text as other tokens, or its vocabulary has another size.
    """
    original = _loaded(open_checkpoint(name), reporter).as_subject(name)
    theirs = conditions.tokens(original)
    if theirs.ids.tolist() != tokens.ids.tolist():
        raise incomparable(subject.name, original.name, "their tokenizers cut the text differently")
    probe = tokens.ids[:2].unsqueeze(0)
    sizes = [next(one.predict(probe, 1)).shape[-1] for one in (subject, original)]
    if sizes[0] != sizes[1]:
        raise incomparable(subject.name, original.name, f"their vocabularies hold {sizes[0]} and {sizes[1]} tokens")
    return original


def incomparable(model: str, original: str, why: str) -> BitconvertError:
    """The error of two models whose probabilities are not of the same tokens."""
    return BitconvertError(
        f"{model} cannot be compared with {original}: {why}",
        "give the model that this one was made from; bits per byte compare across vocabularies",
    )


def _loaded(checkpoint: Checkpoint, reporter: Reporter, lora: Path | None = None) -> TorchModel:
    reporter.stage(f"load {checkpoint.name}")
    return TorchModel.load(checkpoint, lora)


def _run_tasks(loaded: TorchModel, tasks: Sequence[str], reporter: Reporter) -> TaskResults:
    reporter.stage(f"tasks {', '.join(tasks)}")
    return run_tasks(loaded, tasks)


def _only_llama_perplexity(conditions: Conditions, against: str | None) -> bool:
    """Whether the user's llama-perplexity is the only llama.cpp here, and can measure what is asked."""
    asked = (conditions.convention, conditions.bos, conditions.max_tokens, against, conditions.lora)
    binary = shutil.which(os.environ.get("LLAMA_PERPLEXITY", "llama-perplexity"))
    return asked == ("llama.cpp", None, None, None, None) and binary is not None and not has_llama_cpp()


def _by_llama_perplexity(
    checkpoint: Checkpoint, conditions: Conditions, threads: int | None, reporter: Reporter
) -> Perplexity:
    """The number of the user's own binary. It tells no more than ppl ± error; the rest follows from our tokens."""
    reporter.stage(f"llama-perplexity of {checkpoint.name}")
    tokens = tokenize_by(checkpoint.tokenizer(), conditions.text, bos=None)
    cuts = conditions.windows(tokens)
    with tempfile.NamedTemporaryFile(suffix=".txt") as file:
        file.write(conditions.text.encode() + b"\n")  # llama-perplexity takes one newline off the end
        file.flush()
        told = runtimes.llama_perplexity(checkpoint.path, file.name, conditions.context, threads)
    scored, size = sum(cut.scored for cut in cuts), sum(cut.bytes_scored for cut in cuts)
    return Perplexity(
        ppl=told.ppl,
        stderr=told.stderr,
        window_stderr=None,
        bits_per_byte=scored * math.log2(told.ppl) / size,
        convention=conditions.convention,
        context=conditions.context,
        stride=conditions.context,
        bos=tokens.bos is not None,
        tokens_scored=scored,
        bytes_scored=size,
        text_sha256=tokens.sha256,
    )


def _report(
    checkpoint: Checkpoint,
    conditions: Conditions,
    runtime: str = "torch",
    measured: Perplexity | None = None,
    comparison: Comparison | None = None,
    tasks: TaskResults | None = None,
) -> EvalReport:
    data = None if conditions.data is None else str(conditions.data)
    lora = None if conditions.lora is None else str(conditions.lora)
    return EvalReport(checkpoint.name, checkpoint.kind, runtime, data, measured, comparison, tasks or {}, lora)


def _context(checkpoint: Checkpoint, asked: int | None) -> int:
    """Tokens per window, held against what the model was made for."""
    if asked is None:
        return min(DEFAULT_CONTEXT, checkpoint.max_context)
    checkpoint.require_context(asked, f"give at most {checkpoint.max_context}")
    return asked


@contextmanager
def _torch_threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
