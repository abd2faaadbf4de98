"""Losses of the warmup: the original model is the teacher, its distribution the target."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from bitconvert.recipe import Distillation


class DistillationLoss(NamedTuple):
    """The loss and its parts, each a scalar tensor in nats; the parts carry no gradient."""

    loss: Tensor
    kl: Tensor
    ce: Tensor


def distillation_loss(
    student: Tensor, teacher: Tensor | None, tokens: Tensor, options: Distillation, items: Tensor | int
) -> DistillationLoss:
    """``kl * T^2 * KL(teacher || student) + ce * CE``, summed over predicted tokens and divided by ``items``.

    Dividing the sums by the count of the whole accumulated batch, rather than taking a mean per micro-batch, is what
    makes accumulation give the gradient of one large batch. Source of the KL term: Hinton et al., "Distilling the
    Knowledge in a Neural Network" (arXiv 1503.02531), whose T^2 keeps its gradient's size independent of T.

    Args:
        student: logits, shape (batch, context, vocab).
        teacher: logits of the same shape; None where ``options.kl`` is 0.
        tokens: the text, int64, shape (batch, context); position i predicts token i + 1.
        options: weights and temperature.
        items: predicted tokens in the whole optimizer step, over all micro-batches.
    """
    predicted = student[:, :-1].float().flatten(0, 1)
    ce = functional.cross_entropy(predicted, tokens[:, 1:].flatten(), reduction="sum") / items
    kl = torch.zeros_like(ce)
    if teacher is not None:
        kl = _kl_sum(predicted, teacher[:, :-1].float().flatten(0, 1), options.temperature) / items
    return DistillationLoss(options.kl * kl + options.ce * ce, kl.detach(), ce.detach())


def _kl_sum(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(teacher || student) summed over positions: both (positions, vocab)."""
    log_student = functional.log_softmax(student / temperature, dim=-1)
    log_teacher = functional.log_softmax(teacher / temperature, dim=-1)
    return functional.kl_div(log_student, log_teacher, log_target=True, reduction="sum") * temperature**2
