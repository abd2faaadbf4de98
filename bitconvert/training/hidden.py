"""Distillation of hidden states: after each decoder layer, the student is to be where the teacher is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def hidden_error(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """The squared error of hidden states relative to the teacher's, summed over predicting positions; a scalar.

    A position counts ``|s - t|^2 / |t|^2``, the mean over layers. Models of this kind have positions, often the first
    of a text, whose states are a thousand times as large as others: divided by what it is at the position itself, no
    error counts more for that. The output of the decoder's last norm is not one of the states, since it is made of the
    last layer's. Source of the term, without the normalization: Jiao et al., "TinyBERT" (arXiv 1909.10351).

    Args:
        student: states after each decoder layer, shape (batch, context, hidden).
        teacher: the same of the teacher, taken as constant.
    """
    return torch.stack([_relative_error(*states) for states in zip(student, teacher, strict=True)]).mean()


def _relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    teacher = teacher.to(torch.promote_types(teacher.dtype, torch.float32))
    squares = (student - teacher).square().sum(-1) / teacher.square().sum(-1)
    return squares[:, :-1].sum()
