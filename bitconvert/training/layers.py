"""A decoder one layer at a time: what goes into a layer is there for a whole text, what went into others is not."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitconvert.atomic import atomic_file
from bitconvert.errors import BitconvertError
from bitconvert.heap import is_out_of_memory
from bitconvert.models.head import decoder_layers, hidden_states
from bitconvert.ranks import is_main


@dataclass(frozen=True)
class Layer:
    """A decoder layer, to be called outside of its decoder.

    Attributes:
        module: the layer itself.
        call: what its decoder gives it besides hidden states: masks, rotations. They are the same for all windows.
        dtype: of its products, by autocast unless it is float32; and in which hidden states wait for the next layer.
    """

    module: nn.Module
    call: dict[str, Any]
    dtype: torch.dtype

    def __call__(self, hidden: Tensor) -> Tensor:
        """Hidden states after the layer, of those before it; shape (batch, context, hidden)."""
        with torch.autocast(hidden.device.type, self.dtype, enabled=self.dtype != torch.float32):
            output: Tensor = self.module(hidden.float(), **self.call)
        return output

    @torch.no_grad()
    def all(self, states: Sequence[Tensor]) -> list[Tensor]:
        """The same for each of several batches, as they wait."""
        return [self(hidden).to(self.dtype) for hidden in states]


class FittedLayers:
    """Layers that are done, on disk: an interrupted initialisation goes on after them, and ends with the same weights.

    Args:
        directory: a file a layer; None keeps nothing.
    """

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory

    @property
    def is_empty(self) -> bool:
        """Whether no layer is done."""
        return self._directory is None or not any(self._directory.glob("layer-*"))

    def restore(self, index: int, layer: Layer) -> bool:
        """Give a layer the weights that it was left with, if it was done.

        Raises:
            BitconvertError: its file is damaged.
        """
        file = self._file(index)
        if file is None or not file.exists():
            return False
        try:
            layer.module.load_state_dict(load_file(file, device=str(next(layer.module.parameters()).device)))
        except (SafetensorError, RuntimeError) as error:  # of torch, for tensors that are not the layer's
            if is_out_of_memory(error):
                raise
            raise BitconvertError(f"{file}: damaged", "remove it: --resume fits this layer again") from error
        return True

    def keep(self, index: int, layer: Layer) -> None:
        """Write a layer down that is done."""
        if (file := self._file(index)) is None or not is_main():
            return
        state = {name: tensor.detach().contiguous() for name, tensor in layer.module.state_dict().items()}
        with atomic_file(file) as temporary:
            save_file(state, temporary)

    def forget(self) -> None:
        """Begin with the first layer again."""
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _file(self, index: int) -> Path | None:
        return self._directory / f"layer-{index:05}.safetensors" if self._directory else None


@torch.no_grad()
def taken_apart(
    model: PreTrainedModel, batches: Sequence[Tensor], dtype: torch.dtype
) -> tuple[list[Layer], list[Tensor]]:
    """The layers of a model's decoder, and what goes into the first one.

    Args:
        model: a causal language model.
        batches: token ids, all of one shape (batch, context).
        dtype: of products and waiting hidden states.
    """
    modules = list(decoder_layers(model))
    calls = _calls(model, modules, batches[0])
    layers = [Layer(module, call, dtype) for module, call in zip(modules, calls, strict=True)]
    return layers, [_first_input(model, modules[0], batch).to(dtype) for batch in batches]


def _calls(model: PreTrainedModel, modules: list[nn.Module], batch: Tensor) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []

    def see(_module: nn.Module, _args: tuple[Tensor, ...], call: dict[str, Any]) -> None:
        calls.append(call)

    hooks = [module.register_forward_pre_hook(see, with_kwargs=True) for module in modules]
    hidden_states(model, batch)
    for hook in hooks:
        hook.remove()
    return calls


class _Seen(Exception):
    """Ends a forward pass whose rest nobody needs."""


def _first_input(model: PreTrainedModel, module: nn.Module, batch: Tensor) -> Tensor:
    seen: list[Tensor] = []

    def see(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])
        raise _Seen

    hook = module.register_forward_pre_hook(see)
    try:
        hidden_states(model, batch)
    except _Seen:
        pass
    finally:
        hook.remove()
    return seen[0]
