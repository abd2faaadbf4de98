"""Distillation of hidden states: after each decoder layer, the student is to be where the teacher is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class LayerOutputs:
    """What the decoder layers of a model give, kept when asked for.

    Its hooks are there from the beginning to the end, and compiled layers break their graphs for them: a graph does
    not look again at which hooks there are.

    Args:
        model: gets the hooks.
        wanted: whether it gets them at all; without them nothing is ever kept.
    """

    def __init__(self, model: PreTrainedModel, *, wanted: bool) -> None:
        self._kept: list[Tensor] | None = None
        for layer in model.get_decoder().layers if wanted else ():  # type: ignore[no-untyped-call]
            layer.register_forward_hook(self._keep)

    @contextmanager
    def kept(self) -> Iterator[list[Tensor]]:
        """A list to which forward passes within the block append, layer by layer, shape (batch, context, hidden)."""
        outputs: list[Tensor] = []
        self._kept = outputs
        try:
            yield outputs
        finally:
            self._kept = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _keep(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if self._kept is not None:
            self._kept.append(output)


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
