"""A model whose weights, gradients and optimizer state are split over the processes that train it (FSDP2).

A weight is gathered whole, in float32, where a layer needs it, so that its scale is that of the whole matrix and its
codes are those of the latent: of shards, or of weights gathered in bf16, they would be others than those that are
packed. Source: Zhao et al., "PyTorch FSDP" (arXiv 2304.11277); torch.distributed.fsdp.fully_shard.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from bitconvert.errors import UsageError
from bitconvert.models.head import decoder_layers
from bitconvert.ranks import world_size
from bitconvert.recipe import Recipe

_BY_ACCELERATE = "ACCELERATE_USE_FSDP"  # what `accelerate launch` sets for the processes of an FSDP configuration


def is_sharded(recipe: Recipe) -> bool:
    """Whether several processes train, and split the model: as the recipe says, or accelerate's configuration."""
    accelerate_asks = _accelerate_asks()
    return world_size() > 1 and (recipe.training.shard or accelerate_asks)


@cache
def _accelerate_asks() -> bool:
    """What accelerate's configuration says; it is taken from accelerate itself, which would split the model its way."""
    return os.environ.pop(_BY_ACCELERATE, "").lower() == "true"


def require_shardable(recipe: Recipe) -> None:
    """Refuse what needs the whole model in one process.

    Raises:
        UsageError: naming the key.
    """
    in_one_process = {
        "init.method": (recipe.initialises, "none"),
        "keep.budget": (recipe.keep.budget > 0, "0"),
        "scaling.estimator": (recipe.scaling.estimator == "learned", "mse"),
        "optimizer.name": (recipe.optimizer.name not in ("adamw", "muon"), "muon"),
        "distill.cache": (recipe.distill.cache, "false"),
        "distill.teacher_offload": (recipe.distill.teacher_offload, "false"),
        "training.compile": (recipe.training.compile, "false"),
    }
    for key, (is_wanted, instead) in in_one_process.items():
        if is_wanted:
            raise UsageError(
                f"{key}: needs the whole model in each process, and training.shard splits it",
                f"--set {key}={instead}, or leave the model whole (training.shard=false)",
            )


def require_text(recipe: Recipe) -> None:
    """Refuse to sample a text from a model that is split.

    Raises:
        UsageError: the recipe names none.
    """
    if not recipe.data.sources:
        raise UsageError("data.sources: a model that is split cannot sample a text of its own", "give one with --data")


def shard(model: PreTrainedModel, device: torch.device) -> None:
    """Split a student, layer by layer; embedding, last norm and head are gathered while the model computes."""
    mesh = _mesh(device)
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def shard_teacher(model: PreTrainedModel, device: torch.device) -> None:
    """Split the layers of a frozen model; embedding, last norm and head, which each loss needs, stay whole."""
    mesh = _mesh(device)
    layers = decoder_layers(model)
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    decoder: nn.Module = model.get_decoder()  # type: ignore[no-untyped-call]
    split = set(layers.parameters())
    fully_shard(decoder, mesh=mesh, ignored_params={each for each in decoder.parameters() if each not in split})


def _mesh(device: torch.device) -> DeviceMesh:
    return init_device_mesh(device.type, (world_size(),))


def fill(model: PreTrainedModel, read: Callable[[str], Tensor], device: torch.device, dtype: torch.dtype) -> None:
    """Give a model without storage its weights, of which no process keeps more than its part.

    Args:
        model: on the meta device but for its buffers, and split.
        read: gives a whole weight by its name.
        device: where the parts go.
        dtype: of the weights.
    """
    parts: dict[Tensor, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        part = read(name)[rows_of(parameter)].to(device, dtype)
        parts[parameter] = nn.Parameter(like(parameter, part), parameter.requires_grad)
    names = model.named_parameters(remove_duplicate=False)
    model.load_state_dict({name: parts[parameter] for name, parameter in names}, assign=True)
    for module in model.modules():
        module._buffers.update({name: each.to(device) for name, each in module._buffers.items() if each is not None})


def rows_of(parameter: Tensor) -> slice:
    """Which rows of a parameter this process has; all of one that is not split."""
    if not isinstance(parameter, DTensor):
        return slice(0, len(parameter))
    mesh = parameter.device_mesh
    step = -(-len(parameter) // mesh.size())
    begin, end = step * mesh.get_local_rank(), step * (mesh.get_local_rank() + 1)
    return slice(min(begin, len(parameter)), min(end, len(parameter)))


def like(parameter: Tensor, part: Tensor) -> Tensor:
    """A tensor that is split as a parameter of its shape is, of the rows that this process has of it."""
    if not isinstance(parameter, DTensor):
        return part
    return DTensor.from_local(
        part, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )


def whole(tensor: Tensor) -> Tensor:
    """All rows of a tensor, which every process has to ask for together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_split(model: PreTrainedModel) -> bool:
    """Whether a model's layers are split."""
    return isinstance(decoder_layers(model)[0], FSDPModule)


@contextmanager
def gathered(layer: nn.Module) -> Iterator[None]:
    """A layer's whole weights, for a block that every process has to enter together."""
    if not isinstance(layer, FSDPModule):
        yield
        return
    layer.unshard()
    try:
        yield
    finally:
        layer.reshard()


def layers_that_are_split(model: nn.Module) -> dict[str, nn.Module]:
    """Those by name; of a model that is whole, the model itself."""
    split = {name: each for name, each in model.named_modules() if name and _is_fsdp(each)}
    return split or {"": model}


def _is_fsdp(module: nn.Module) -> bool:
    return isinstance(module, FSDPModule)


def reshard(model: nn.Module) -> None:
    """Let go of what a forward pass without a backward pass has gathered."""
    if isinstance(model, FSDPModule):
        model.reshard()
