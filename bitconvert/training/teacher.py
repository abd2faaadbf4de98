"""The original model as the teacher: frozen, run beside the student at each step."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import chain
from typing import Protocol

import torch
from accelerate import cpu_offload
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from bitconvert.models.checkpoint import Checkpoint
from bitconvert.models.head import decoder_layers, head_of, hidden_states
from bitconvert.recipe import Distillation, Recipe
from bitconvert.training.distill import FullTarget, Target, predicting_positions
from bitconvert.training.sharding import fill, is_split, shard_teacher


class Teacher(Protocol):
    """Whatever knows what the original model makes of the training windows."""

    def target(self, inputs: Mapping[str, Tensor]) -> Target:
        """The target of a batch of training windows, collated."""


def has_teacher(recipe: Recipe) -> bool:
    """Whether anything of a recipe's loss is asked of the original."""
    return recipe.distill.asks_the_original and not recipe.control


def products_dtype(arguments: TrainingArguments) -> torch.dtype:
    """In what a teacher computes: as the student does, without a float32 copy of its weights."""
    return torch.bfloat16 if arguments.bf16 else torch.float32


def split_original(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The original, of which each process reads and keeps its part alone."""
    model = checkpoint.without_weights()
    shard_teacher(model, device)
    fill(model, checkpoint.read_latent, device, dtype)
    return model


def frozen_copy(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A copy whose weights are in a dtype at once: bf16 ones never take four bytes a weight on the way."""
    cast = {id(weight): nn.Parameter(weight.detach().to(dtype, copy=True), False) for weight in model.parameters()}
    return copy.deepcopy(model, cast)


class LiveTeacher:
    """The model itself.

    Args:
        model: the original; frozen, cast and moved here, unless it is split and so has been already.
        options: the loss's temperature; whether the weights of the layers stay in CPU memory and come to the device one
            layer at a time. The embedding and the head, which every chunk of the loss needs, are always there.
        device: where it computes.
        dtype: of its weights and products; its buffers stay as they are, since rotary frequencies need their float32.
    """

    def __init__(self, model: PreTrainedModel, options: Distillation, device: torch.device, dtype: torch.dtype) -> None:
        model.requires_grad_(False).train(False)
        self._is_split = is_split(model)
        if not self._is_split:
            _place(model, options, device, dtype)
        self._model = model
        self._device = device
        self._temperature = options.temperature

    def target(self, inputs: Mapping[str, Tensor]) -> FullTarget:
        """See ``Teacher``. Nothing of it is kept for a backward pass, so inference mode, the cheapest, will do.

        Where weights are gathered for a layer, they have to be tensors that remember their changes.
        """
        with torch.inference_mode(not self._is_split):
            hidden = hidden_states(self._model, inputs["input_ids"].to(self._device))
        return FullTarget(predicting_positions(hidden), head_of(self._model), self._temperature)


def _place(model: PreTrainedModel, options: Distillation, device: torch.device, dtype: torch.dtype) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    if options.teacher_offload:
        for layer in decoder_layers(model):
            cpu_offload(layer, execution_device=device)
    for tensor in chain(model.parameters(), model.buffers()):
        if not tensor.is_meta:  # which stands for a weight that waits in CPU memory
            tensor.data = tensor.data.to(device)
