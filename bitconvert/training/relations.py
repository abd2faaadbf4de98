"""Distillation of attention: which positions are alike, by the queries, keys and values of one late layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from bitconvert.errors import UsageError
from bitconvert.models.head import decoder_layers

_DEPTH = 24 / 28  # the layer of Qwen3-1.7B that the method's authors take, counted from 0, of all
_HEADS = 32  # theirs; fewer where 32 do not divide a model's widths


def attention_projections(model: PreTrainedModel) -> Iterable[nn.Module]:
    """The modules whose outputs are queries, keys and values, each of shape (batch, context, heads * head size).

    Raises:
        UsageError: the model computes them in one.
    """
    layers = decoder_layers(model)
    attention = layers[int(_DEPTH * len(layers))].get_submodule("self_attn")
    if not hasattr(attention, "q_proj"):
        raise UsageError(
            f"distill.relations: {model.config.model_type} has no queries, keys and values of their own",
            "leave it at 0",
        )
    return [attention.get_submodule(name) for name in ("q_proj", "k_proj", "v_proj")]


def relation_divergence(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """KL(teacher || student) of the relations, the mean over heads, summed over predicting positions and q, k and v.

    A position's relation to all positions of its window, later ones too, is softmax(a_i . a_j) of its vectors, cut
    into heads and each divided by its length. Three matrices of (batch, heads, context, context) are kept for the way
    back, each a few times. Source: Wu et al., "BitNet Distillation" (arXiv 2510.13998), algorithm 1, after Wang et
    al., "MiniLMv2" (arXiv 2012.15828), and with them one layer alone. Equation 11 divides by heads and positions, as
    here, algorithm 1 by them too, the authors' code by the heads once more: its weight of 1e5 is 3125 here.

    Args:
        student: queries, keys and values as they are projected, shape (batch, context, width).
        teacher: the same of the teacher, taken as constant.
    """
    heads = math.gcd(_HEADS, *(states.shape[-1] for states in teacher))
    parts = [
        functional.kl_div(_relations(s, heads), _relations(t, heads), log_target=True, reduction="sum") / heads
        for s, t in zip(student, teacher, strict=True)
    ]
    return torch.stack(parts).sum()


def _relations(states: Tensor, heads: int) -> Tensor:
    """Logarithms of the predicting positions' relations, shape (batch, heads, context - 1, context)."""
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    directions = functional.normalize(states.view(*states.shape[:2], heads, -1).transpose(1, 2), dim=-1)
    return (directions[:, :, :-1] @ directions.mT).log_softmax(-1)
