"""A training's state on disk: weights and what the optimizer keeps beside them, each tensor whole, one at a time.

The files are the same whoever writes them, one process or many, and each process reads its own rows of them: a run goes
on with another number of processes. Nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bitconvert.errors import BitconvertError
from bitconvert.heap import is_out_of_memory
from bitconvert.models.checkpoint import open_safetensors
from bitconvert.models.safetensors_file import SafetensorsFile, TensorSpec
from bitconvert.ranks import is_main
from bitconvert.training.sharding import like, part_of, rows_of, whole

WEIGHTS = "model.safetensors"
_OPTIMIZER = "optimizer.safetensors"
_NUMBERS = "numbers"


def save_state(model: nn.Module, optimizer: Optimizer, directory: Path) -> None:
    """Write a checkpoint's files into a directory; every process has to call this, the main one writes."""
    _save(_trained(model), directory / WEIGHTS, {})
    kept, numbers = {}, {}
    for name, state in _states(model, optimizer):
        for key, value in state.items():
            if isinstance(value, Tensor):
                kept[f"{name}/{key}"] = value
            else:
                numbers[f"{name}/{key}"] = value
    _save(kept, directory / _OPTIMIZER, {_NUMBERS: json.dumps(numbers)})


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that change; those that are frozen are what a run begins with."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _states(model: nn.Module, optimizer: Optimizer) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is kept beside each parameter, by its name."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return ((names[parameter], state) for parameter, state in optimizer.state.items())


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    if not is_main():
        for tensor in tensors.values():
            whole(tensor)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with SafetensorsFile(path, specs, metadata) as file:
        for name, tensor in tensors.items():
            file.write(name, whole(tensor).detach().cpu())


@contextmanager
def damage_named(checkpoint: str | Path) -> Iterator[None]:
    """Name the checkpoint that the block reads, should a file of it not be what was written.

    Raises:
        BitconvertError: it is damaged; the hint says how to do without it.
    """
    remedy = "remove this checkpoint: --resume goes on from the one before it, or from the start"
    try:
        yield
    except BitconvertError as error:
        raise BitconvertError(error.message, remedy) from error
    except Exception as error:  # each library that reads a file of it has exceptions of its own
        if is_out_of_memory(error):
            raise
        raise BitconvertError(f"{checkpoint}: damaged, it cannot be read", remedy) from error


@torch.no_grad()
def load_weights(model: nn.Module, directory: Path) -> None:
    """Read the weights of a checkpoint into a model, each process its own rows of those that are split."""
    with open_safetensors(directory / WEIGHTS) as file:
        for name, parameter in _trained(model).items():
            part_of(parameter).copy_(_rows(file, name, parameter))


def load_optimizer(model: nn.Module, optimizer: Optimizer, directory: Path) -> None:
    """Read what an optimizer keeps beside a model's parameters."""
    parameters = dict(model.named_parameters())
    with open_safetensors(directory / _OPTIMIZER) as file:
        numbers = json.loads(file.metadata()[_NUMBERS])
        for entry in file.keys():  # noqa: SIM118 - not a dictionary
            name, _, key = entry.rpartition("/")
            parameter = parameters[name]
            optimizer.state[parameter][key] = _kept_beside(parameter, file, entry)
    for entry, number in numbers.items():
        name, _, key = entry.rpartition("/")
        optimizer.state[parameters[name]][key] = number


def _kept_beside(parameter: Tensor, file: Any, entry: str) -> Tensor:
    """A tensor of an optimizer's: of the parameter's shape, and split as it is, or small and where it was."""
    if tuple(file.get_slice(entry).get_shape()) == tuple(parameter.shape):
        return like(parameter, _rows(file, entry, parameter).to(part_of(parameter).device))
    value: Tensor = file.get_tensor(entry)
    return value if value.dim() == 0 else value.to(part_of(parameter).device)


def _rows(file: Any, name: str, parameter: Tensor) -> Tensor:
    rows: Tensor = file.get_slice(name)[rows_of(parameter)]
    return rows
