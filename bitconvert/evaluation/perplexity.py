"""Perplexity, bits per byte, KL divergence and top-1 agreement over the windows of a text, and how sure they are.

Log-softmax is float32, as the models compute; every sum over tokens is float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from bitconvert.errors import BitconvertError
from bitconvert.evaluation.windows import Convention, TokenizedText, Window
from bitconvert.report import Comparison, Perplexity, Reporter

Predictor = Callable[[Tensor, int], Tensor]
"""Logits of a model: token ids int64 (batch, length) and a count ``keep`` -> float32 (batch, keep, vocabulary), those
of the last ``keep`` positions, each from an empty cache."""

_LOGITS_AT_ONCE = 2**26  # 256 MiB of float32 per model
_TOKENS_AT_ONCE = 2**11
_LARGEST_EXPONENT = 700.0


@dataclass(frozen=True)
class Scores:
    """Numbers per scored token, in the order of the text; float64, shape (tokens,).

    Attributes:
        nll: negative log-likelihood under the model, in nats.
        window: the number of the window that scored the token, int64.
        bytes_scored: bytes of the text that the scored tokens stand for.
        original_nll: the same under the original; None without one.
        kl: KL(original || model) over the whole vocabulary, in nats; None without an original.
        agree: whether both put the same token first; None without an original.
    """

    nll: Tensor
    window: Tensor
    bytes_scored: int
    original_nll: Tensor | None = None
    kl: Tensor | None = None
    agree: Tensor | None = None


@torch.inference_mode()
def score(cuts: list[Window], model: Predictor, original: Predictor | None, reporter: Reporter) -> Scores:
    """Run the windows through a model, and through the original beside it.

    Args:
        cuts: from ``windows``.
        model: the one that is measured.
        original: the one it is compared with, on the same windows; may be None.
        reporter: told how many windows are done.
    """
    parts: list[Scores] = []
    done = 0
    for batch in _batches(cuts, model):
        reporter.advance(done, len(cuts))
        parts.append(_score_batch(batch, done, model, original))
        done += len(batch)
    reporter.advance(done, len(cuts))
    return _joined(parts)


def _batches(cuts: list[Window], model: Predictor) -> Iterator[list[Window]]:
    """Neighbouring windows of one shape, as many as the bound on logits allows."""
    vocabulary = model(cuts[0].ids[:1].unsqueeze(0), 1).shape[-1]
    for (length, scored), alike in groupby(cuts, key=lambda cut: (len(cut.ids), cut.scored)):
        size = max(1, min(_TOKENS_AT_ONCE // length, _LOGITS_AT_ONCE // ((scored + 1) * vocabulary)))
        group = list(alike)
        for begin in range(0, len(group), size):
            yield group[begin : begin + size]


def _score_batch(batch: list[Window], number: int, model: Predictor, original: Predictor | None) -> Scores:
    ids, scored = torch.stack([cut.ids for cut in batch]), batch[0].scored
    targets = ids[:, -scored:].flatten()
    window = torch.arange(number, number + len(batch)).repeat_interleave(scored)
    bytes_scored = sum(cut.bytes_scored for cut in batch)
    # The last position predicts a token outside the window, so it is dropped.
    logits = model(ids, scored + 1)[:, :-1].flatten(0, 1)
    if original is None:
        return Scores(_each_row(nll_of, logits, targets), window, bytes_scored)
    reference = original(ids, scored + 1)[:, :-1].flatten(0, 1).to(logits.device)
    return Scores(
        nll=_each_row(nll_of, logits, targets),
        window=window,
        bytes_scored=bytes_scored,
        original_nll=_each_row(nll_of, reference, targets),
        kl=_each_row(kl_of, reference, logits),
        agree=_each_row(agreement_of, reference, logits),
    )


def nll_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood in nats: logits (rows, vocabulary), targets int64 (rows,) -> (rows,)."""
    return torch.nn.functional.cross_entropy(logits.float(), targets.to(logits.device), reduction="none")


def kl_of(original: Tensor, model: Tensor) -> Tensor:
    """KL(original || model) in nats from logits (rows, vocabulary), over the whole vocabulary -> (rows,)."""
    log_p, log_q = original.float().log_softmax(-1), model.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0)


def agreement_of(original: Tensor, model: Tensor) -> Tensor:
    """Whether the most probable token is the same: logits (rows, vocabulary) twice -> (rows,) of 0 and 1."""
    return (original.argmax(-1) == model.argmax(-1)).float()


def _each_row(measure: Callable[[Tensor, Tensor], Tensor], left: Tensor, right: Tensor) -> Tensor:
    """A measure over rows, a few at a time since each makes copies of the logits; float64, on the CPU."""
    rows = max(1, _LOGITS_AT_ONCE // (8 * left.shape[-1]))
    parts = [slice(begin, begin + rows) for begin in range(0, len(left), rows)]
    return torch.cat([measure(left[part], right[part]).cpu().double() for part in parts])


def _joined(parts: list[Scores]) -> Scores:
    def column(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    return Scores(
        nll=torch.cat([part.nll for part in parts]),
        window=torch.cat([part.window for part in parts]),
        bytes_scored=sum(part.bytes_scored for part in parts),
        original_nll=column("original_nll"),
        kl=column("kl"),
        agree=column("agree"),
    )


def standard_error(values: Tensor) -> float:
    """Standard error of the mean of ``values`` (n,) if they were independent: llama-perplexity's own formula.

    Tokens of one text are not quite independent, so the truth is somewhat larger: see ``clustered_standard_error``.
    """
    n = len(values)
    return float(values.std(correction=1)) / math.sqrt(n) if n > 1 else 0.0


def clustered_standard_error(values: Tensor, window: Tensor) -> float | None:
    """Standard error of the mean of ``values`` (n,) when only whole windows are independent; None for one window.

    The sums of the residuals per window take the place of the residuals: Liang and Zeger, "Longitudinal data analysis
    using generalized linear models" (Biometrika 73, 1986), with the usual correction G / (G - 1) for G windows.
    """
    groups = int(window.max()) + 1
    if groups < 2:
        return None
    sums = torch.zeros(groups, dtype=torch.float64).index_add_(0, window, values - values.mean())
    return math.sqrt(float(sums.square().sum()) * groups / (groups - 1)) / len(values)


def summarize(
    scores: Scores, text: TokenizedText, convention: Convention, context: int, stride: int | None
) -> Perplexity:
    """The perplexity with everything that it depends on.

    A standard error of the mean negative log-likelihood becomes one of the perplexity by the derivative, which is ppl.
    """
    ppl = _exp(float(scores.nll.mean()))
    clustered = clustered_standard_error(scores.nll, scores.window)
    return Perplexity(
        ppl=ppl,
        stderr=ppl * standard_error(scores.nll),
        window_stderr=None if clustered is None else ppl * clustered,
        bits_per_byte=float(scores.nll.sum()) / math.log(2) / scores.bytes_scored,
        convention=convention,
        context=context,
        stride=context if stride is None else stride,
        bos=text.bos is not None,
        tokens_scored=len(scores.nll),
        bytes_scored=scores.bytes_scored,
        text_sha256=text.sha256,
    )


def compare(scores: Scores, original: str) -> Comparison:
    """How far the model is from the original named ``original``, which ``score`` ran beside it.

    Raises:
        ValueError: the scores were made without an original.
    """
    if scores.original_nll is None or scores.kl is None or scores.agree is None:
        raise ValueError("these scores were made without an original")
    worse = scores.nll - scores.original_nll
    ratio = _exp(float(worse.mean()))
    return Comparison(
        original=original,
        original_ppl=_exp(float(scores.original_nll.mean())),
        ppl_ratio=ratio,
        ppl_ratio_stderr=ratio * standard_error(worse),  # paired: what both find hard cancels out
        kl=float(scores.kl.mean()),
        kl_stderr=standard_error(scores.kl),
        top1_agreement=float(scores.agree.mean()),
    )


def _exp(nats: float) -> float:
    """The exponential of ``nats``, held below the end of float64: JSON knows no infinity.

    Raises:
        BitconvertError: not a number, so the model's logits were not finite.
    """
    if math.isnan(nats):
        raise BitconvertError("the model's logits are not finite", "the model is damaged, or its training diverged")
    return math.exp(min(nats, _LARGEST_EXPONENT))
