"""Perplexity, bits per byte, KL divergence and top-1 agreement over the windows of a text, and how sure they are.

Log-softmax is float32, as the models compute; every sum over tokens is float64.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from bitconvert.errors import BitconvertError
from bitconvert.evaluation.windows import Convention, TokenizedText, Window
from bitconvert.report.evaluation import Comparison, Perplexity
from bitconvert.report.reporter import Reporter

Predictor = Callable[[Tensor, int], Iterator[Tensor]]
"""A model: token ids int64 (windows, length) and how many tokens at the end of each to predict -> the logits that
predict them, float32 (positions, vocabulary), window after window in ``pieces``. Every window has an empty cache."""

_TOKENS_AT_ONCE = 2**11
_POSITIONS_AT_ONCE = 2**7  # 64 MiB of logits where the vocabulary holds 128k
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
        reporter: told how many windows are done, and how fast.
    """
    parts: list[Scores] = []
    tokens = sum(len(cut.ids) for cut in cuts)
    done, read, started = 0, 0, time.monotonic()
    for batch in _batches(cuts):
        parts.append(_score_batch(batch, done, model, original))
        done += len(batch)
        read += sum(len(cut.ids) for cut in batch)
        speed = read / max(time.monotonic() - started, 1e-9)
        told = {
            "window": done,
            "windows": len(cuts),
            "tokens_per_second": speed,
            "eta_seconds": (tokens - read) / speed,
        }
        reporter.metrics(told)
    return _joined(parts)


def _batches(cuts: list[Window]) -> Iterator[list[Window]]:
    """Neighbouring windows of one shape, as many as a forward pass should hold."""
    for (length, _), alike in groupby(cuts, key=lambda cut: (len(cut.ids), cut.scored)):
        group, size = list(alike), max(1, _TOKENS_AT_ONCE // length)
        for begin in range(0, len(group), size):
            yield group[begin : begin + size]


def _score_batch(batch: list[Window], number: int, model: Predictor, original: Predictor | None) -> Scores:
    ids, scored = torch.stack([cut.ids for cut in batch]), batch[0].scored
    rows: list[tuple[Tensor, ...]]
    targets = pieces(ids[:, -scored:])
    if original is None:
        alone = zip(model(ids, scored), targets, strict=True)
        rows = [(nll_of(logits, wanted),) for logits, wanted in alone]
    else:
        both = zip(model(ids, scored), original(ids, scored), targets, strict=True)
        rows = [_distances(logits, reference.to(logits.device), wanted) for logits, reference, wanted in both]
    measures = (torch.cat(column).cpu().double() for column in zip(*rows, strict=True))
    window = torch.arange(number, number + len(batch)).repeat_interleave(scored)
    return Scores(next(measures), window, sum(cut.bytes_scored for cut in batch), *measures)


def _distances(logits: Tensor, reference: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """Per position, as ``Scores`` has them: nll under the model and under the original, KL, agreement."""
    return (
        nll_of(logits, targets),
        nll_of(reference, targets),
        kl_of(reference, logits),
        agreement_of(reference, logits),
    )


def pieces(windows: Tensor) -> Iterator[Tensor]:
    """What a batch holds per position, (windows, positions, ...), a bounded number of one window's positions at a time.

    A head that is given no more never makes all logits of a window at once: (positions x vocabulary) may be gigabytes.
    """
    for window in windows:
        yield from window.split(_POSITIONS_AT_ONCE)


def nll_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood in nats: logits (rows, vocabulary), targets int64 (rows,) -> (rows,)."""
    return torch.nn.functional.cross_entropy(logits.float(), targets.to(logits.device), reduction="none")


def kl_of(original: Tensor, model: Tensor) -> Tensor:
    """KL(original || model) in nats from logits (rows, vocabulary), over the whole vocabulary -> (rows,)."""
    log_p, log_q = original.float().log_softmax(-1), model.float().log_softmax(-1)
    log_ratio = torch.sub(log_p, log_q, out=log_q)
    return log_p.exp_().mul_(log_ratio).sum(-1).clamp(min=0)


def agreement_of(original: Tensor, model: Tensor) -> Tensor:
    """Whether the most probable token is the same: logits (rows, vocabulary) twice -> (rows,) of 0 and 1."""
    return (original.argmax(-1) == model.argmax(-1)).float()


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
    ratio, original_ppl = _exp(float(worse.mean())), _exp(float(scores.original_nll.mean()))
    return Comparison(
        original=original,
        original_ppl=original_ppl,
        original_stderr=original_ppl * standard_error(scores.original_nll),
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
