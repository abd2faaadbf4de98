"""Losses of the warmup: the original model is the teacher, its distribution the target.

They are computed from hidden states, a chunk of positions at a time, so that the logits of a large vocabulary never
exist for all positions at once. The gradient is computed with the loss, while a chunk's logits are there, instead of
computing them again on the way back. Source of the idea: Hsu et al., "Liger Kernel" (arXiv 2410.10989).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from bitconvert.models.head import Head
from bitconvert.recipe import Distillation
from bitconvert.ternary.products import product_dtype

CROSS_ENTROPY = Distillation(kl=0.0, ce=1.0)
"""The loss of a text alone."""

IGNORED = -100
"""The label of a token that is not to be predicted, as everywhere in torch and transformers."""

CHUNK_BYTES = 64 * 2**20  # float32 logits of a chunk, of which there are five tensors at the peak


class DistillationLoss(NamedTuple):
    """The loss and its parts, each a scalar tensor in nats; the parts carry no gradient."""

    loss: Tensor
    kl: Tensor
    ce: Tensor


class Target(Protocol):
    """What the teacher makes of the predicted positions of a batch."""

    def log_probs(self, positions: slice, student: Tensor) -> Tensor:
        """The teacher's log-probabilities at the loss's temperature.

        Args:
            positions: which of the predicted positions, batch and context flattened.
            student: the student's log-probabilities there, shape (positions, vocab), at the same temperature.

        Returns:
            A new tensor of that shape, to be taken as constant.
        """


class FullTarget(NamedTuple):
    """The distribution over the whole vocabulary.

    Attributes:
        hidden: the teacher's hidden states, shape (positions, hidden).
        head: what makes logits of them.
        temperature: of the loss.
    """

    hidden: Tensor
    head: Head
    temperature: float

    def log_probs(self, positions: slice, student: Tensor) -> Tensor:
        """See ``Target``."""
        return self.at(positions)

    def at(self, positions: slice) -> Tensor:
        """The teacher's log-probabilities, whatever the student's are; shape (positions, vocab)."""
        return _log_softmax(self.head.logits(self.hidden[positions]), self.temperature)


class TopTarget(NamedTuple):
    """The distribution over the teacher's k likeliest tokens and the rest taken together.

    With p for the teacher, q for the student, K for the k tokens and R for the rest, the divergence is that of the
    coarser distributions: sum over K of p log(p / q), plus p(R) log(p(R) / q(R)). It is at most the full divergence, is
    equal to it where K is the whole vocabulary, and grows with k (data processing inequality). The full formula gives
    it, value and gradient, for a target that shares p(R) among the rest as the student does.

    Attributes:
        tokens: ids of K, int64, shape (positions, k).
        shares: log-probabilities of K and, last, of R, at the loss's temperature; shape (positions, k + 1).
    """

    tokens: Tensor
    shares: Tensor

    def log_probs(self, positions: slice, student: Tensor) -> Tensor:
        """See ``Target``."""
        tokens, shares = self.tokens[positions], self.shares[positions].to(student.dtype)
        shares = functional.log_softmax(shares, dim=-1)  # sums to 1 again after having been rounded
        rest = student.scatter(-1, tokens, -torch.inf).logsumexp(-1, keepdim=True)
        return (student + (shares[:, -1:] - rest)).scatter_(-1, tokens, shares[:, :-1])


def top_shares(log_probs: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``tokens`` and ``shares`` of a ``TopTarget`` of log-probabilities, shape (positions, vocab)."""
    shares, tokens = log_probs.topk(k, dim=-1, sorted=False)
    rest = log_probs.scatter(-1, tokens, -torch.inf).logsumexp(-1, keepdim=True)
    return tokens, torch.cat([shares, rest], dim=-1)


def distillation_loss(
    hidden: Tensor,
    head: Head,
    target: Target | None,
    tokens: Tensor,
    options: Distillation,
    items: Tensor | int,
    chunk_bytes: int = CHUNK_BYTES,
) -> DistillationLoss:
    """``kl * T^2 * KL(teacher || student) + ce * CE``, summed over predicted tokens and divided by ``items``.

    Dividing the sums by the count of the whole accumulated batch, rather than taking a mean per micro-batch, is what
    makes accumulation give the gradient of one large batch. Source of the KL term: Hinton et al., "Distilling the
    Knowledge in a Neural Network" (arXiv 1503.02531), whose T^2 keeps its gradient's size independent of T.

    Under autocast the products with the head are computed in its type; everything after them is at least float32.

    Args:
        hidden: the student's hidden states, shape (batch, context, hidden).
        head: the student's; the gradient reaches its weight unless that is frozen.
        target: the teacher at all positions but each window's last; None where ``options.kl`` is 0.
        tokens: the text, int64, shape (batch, context); position i predicts token i + 1.
        options: weights and temperature.
        items: predicted tokens in the whole optimizer step, over all micro-batches.
        chunk_bytes: of float32 logits at a time.
    """
    labels = tokens[:, 1:].flatten()
    sums = _sums(predicting_positions(hidden), head, target, labels, options, chunk_bytes)
    return DistillationLoss(*(each / items for each in sums))


def cross_entropy(hidden: Tensor, head: Head, labels: Tensor, items: Tensor | float) -> Tensor:
    """Cross-entropy with some of a text's tokens, summed and divided by ``items``, a chunk of positions at a time.

    Args:
        hidden: the model's hidden states, shape (batch, context, hidden).
        head: the model's.
        labels: the text, int64, shape (batch, context); ``IGNORED`` where a token is not to be predicted.
        items: as for ``distillation_loss``.
    """
    predicted = labels[:, 1:] != IGNORED
    sums = _sums(hidden[:, :-1][predicted], head, None, labels[:, 1:][predicted], CROSS_ENTROPY, CHUNK_BYTES)
    return sums[0] / items


def _sums(
    predicting: Tensor, head: Head, target: Target | None, labels: Tensor, options: Distillation, chunk_bytes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, KL and CE over positions, shape (positions, hidden), and the tokens that come after them."""
    weight = head.weight
    if not torch.is_grad_enabled():
        predicting, weight = predicting.detach(), weight.detach()  # the function below looks at nothing else
    rows = chunk_rows(weight.shape[0], chunk_bytes)
    sums: tuple[Tensor, Tensor, Tensor] = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        predicting, weight, head, target, labels, options, rows
    )
    return sums


def predicting_positions(hidden: Tensor) -> Tensor:
    """Those of (batch, context, hidden) that predict a token of their window, flattened to (positions, hidden)."""
    return hidden[:, :-1].flatten(0, 1)


def chunk_rows(vocabulary: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    """Positions whose float32 logits fill a chunk, at least one."""
    return max(1, chunk_bytes // (4 * vocabulary))


def chunks(positions: int, rows: int) -> Iterator[slice]:
    """Consecutive slices of at most ``rows`` positions."""
    return (slice(start, min(start + rows, positions)) for start in range(0, positions, rows))


class _ChunkedLoss(torch.autograd.Function):
    """Sums of loss, KL and CE over positions; their gradient is ready when they are."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        head: Head,
        target: Target | None,
        labels: Tensor,
        options: Distillation,
        rows: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wanted = ctx.needs_input_grad[:2]
        of_hidden, of_weight = (
            torch.zeros_like(each) if needed else None for each, needed in zip((hidden, weight), wanted, strict=True)
        )
        dtype = product_dtype(weight)
        inputs, weight = hidden.to(dtype), weight.to(dtype)  # once, where autocast would do it for each chunk
        kl, ce = (torch.zeros((), dtype=_at_least_float32(dtype), device=hidden.device) for _ in range(2))
        with torch.autocast(hidden.device.type, enabled=False):
            for chunk in chunks(len(inputs), rows):
                products = functional.linear(inputs[chunk], weight).requires_grad_(any(wanted))
                kl_part, ce_part, gradient = _loss_of_products(products, head, target, chunk, labels, options)
                del products
                kl += kl_part
                ce += ce_part
                if of_hidden is not None:
                    of_hidden[chunk] = gradient @ weight
                if of_weight is not None:
                    _add_product(of_weight, gradient.T, inputs[chunk])
                del gradient  # or it would stand beside the next chunk
        ctx.save_for_backward(of_hidden, of_weight)
        ctx.mark_non_differentiable(kl, ce)
        kl_weight, ce_weight = options.weights
        return kl_weight * kl + ce_weight * ce, kl, ce

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Scale in place: this is the peak of memory, where the head's gradient must not be there twice."""
        scaled = (None if gradient is None else gradient.mul_(of_loss) for gradient in ctx.saved_tensors)
        return (*scaled, None, None, None, None, None)


def _loss_of_products(
    products: Tensor,
    head: Head,
    target: Target | None,
    chunk: slice,
    labels: Tensor,
    options: Distillation,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of KL and CE over a chunk, and the gradient of the loss by the head's products, if they require one."""
    with torch.enable_grad():  # through what the family does with the products, which may be nothing
        logits = head.scaled(products)
    kl, ce, of_logits = _loss_of_logits(logits.detach(), target, chunk, labels[chunk], options)
    if not products.requires_grad:
        return kl, ce, of_logits
    (of_products,) = torch.autograd.grad(logits, products, of_logits.to(logits.dtype))
    return kl, ce, of_products


def _loss_of_logits(
    logits: Tensor, target: Target | None, chunk: slice, labels: Tensor, options: Distillation
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of KL and CE over a chunk, and the gradient of the loss by the logits.

    By logits z the gradient of CE is softmax(z) - onehot, that of T^2 * KL is T times that by z / T.
    """
    log_probs = _log_softmax(logits, 1.0)
    softened = log_probs if options.temperature == 1.0 else _log_softmax(logits, options.temperature)
    ce = -log_probs.gather(-1, labels[:, None]).sum()
    kl_weight, ce_weight = options.weights
    gradient = log_probs.exp().mul_(ce_weight)
    gradient[torch.arange(len(labels), device=labels.device), labels] -= ce_weight
    if target is None:
        return torch.zeros_like(ce), ce, gradient
    log_target = target.log_probs(chunk, softened)
    p = log_target.exp()
    kl = log_target.sub_(softened).mul_(p).sum()
    gradient.add_(softened.exp_().sub_(p), alpha=kl_weight * options.temperature)
    return kl * options.temperature**2, ce, gradient


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    logits = logits.to(_at_least_float32(logits.dtype))
    return functional.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)


def _add_product(total: Tensor, first: Tensor, second: Tensor) -> None:
    """``total += first @ second``, in the dtype of total where it differs from theirs."""
    if total.dtype == first.dtype:
        total.addmm_(first, second)
    else:
        total.add_(first @ second)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
