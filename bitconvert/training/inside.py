"""Terms of the loss that compare what a student and a teacher compute on their way to the logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitconvert.models.head import decoder_layers
from bitconvert.recipe import Distillation
from bitconvert.training.hidden import hidden_error
from bitconvert.training.relations import attention_projections, relation_divergence


class Term(NamedTuple):
    """One term: of which modules it wants the outputs, and what it makes of the student's and the teacher's."""

    modules: Callable[[PreTrainedModel], Iterable[nn.Module]]
    error: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]


TERMS = {
    "hidden": Term(decoder_layers, hidden_error),
    "relations": Term(attention_projections, relation_divergence),
}
"""By the names of their weights among the options of distillation."""

Outputs = dict[str, list[Tensor]]
"""What the modules gave, by term, in the order of the forward pass."""


class Inside:
    """What a model computes inside, kept when asked for.

    Its hooks are there from the beginning to the end, and compiled layers break their graphs for them: a graph does
    not look again at which hooks there are.

    Args:
        model: gets the hooks that the terms need.
        options: terms without weight need none.
    """

    def __init__(self, model: PreTrainedModel, options: Distillation) -> None:
        self._terms = [name for name in TERMS if getattr(options, name)]
        self._kept: Outputs | None = None
        for name in self._terms:
            for module in TERMS[name].modules(model):
                module.register_forward_hook(partial(self._keep, name))

    @contextmanager
    def kept(self) -> Iterator[Outputs]:
        """Outputs to which forward passes within the block append."""
        outputs: Outputs = {name: [] for name in self._terms}
        self._kept = outputs
        try:
            yield outputs
        finally:
            self._kept = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _keep(self, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if self._kept is not None:
            self._kept[name].append(output)


def inside_errors(
    student: Mapping[str, Sequence[Tensor]], teacher: Mapping[str, Sequence[Tensor]]
) -> dict[str, Tensor]:
    """Each term's error, summed over predicting positions; scalars, whose gradient reaches the student."""
    return {name: TERMS[name].error(student[name], teacher[name]) for name in teacher}
