"""The tensors of a checkpoint as packing sees them: which ones go into a file, and which of them are ternary."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from bitconvert.errors import BitconvertError
from bitconvert.models.baked import BAKED_FILE
from bitconvert.models.checkpoint import Checkpoint, require_alive
from bitconvert.packing.formats.base import stored_scale
from bitconvert.report.packing import PackedFile, PackedTensor
from bitconvert.report.reporter import Reporter
from bitconvert.ternary.blocks import baked_blocks, ternary_blocks
from bitconvert.ternary.quantize import TernaryTensor

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


class _Shaped(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


ShapedT = TypeVar("ShapedT", bound=_Shaped)


@dataclass(frozen=True)
class SourceTensor:
    """One tensor that goes into a packed file.

    Attributes:
        name: in the checkpoint.
        shape: likewise.
        ternary: whether it is to be stored as codes and scales.
        kept: whether it is a linear's as those are, but was kept from being ternary.
    """

    name: str
    shape: tuple[int, ...]
    ternary: bool
    kept: bool = False


def meant_tensors(checkpoint: Checkpoint) -> list[SourceTensor]:
    """The tensors of a model under the shapes that they mean, whatever they are stored as.

    Raises:
        BitconvertError: they are not those that the config describes.
    """
    return [_source_tensor(checkpoint, name, shape) for name, shape in checkpoint.weights().items()]


def promised_tensors(checkpoint: Checkpoint) -> list[SourceTensor]:
    """The tensors that a model's config promises, whatever kind of file holds them."""
    promised = checkpoint.skeleton().named_parameters()
    return [_source_tensor(checkpoint, name, tuple(value.shape)) for name, value in promised]


def ternary_rows(checkpoint: Checkpoint, name: str) -> Iterator[TernaryTensor]:
    """Codes and scales of one linear, a few rows at a time, rounded as in training, with the scale as files store it.

    Raises:
        BitconvertError: its scale cannot be stored, its weights are damaged, or baked weights are no longer ternary.
    """
    weight = checkpoint.read(name)
    require_alive(checkpoint.name, name, weight)
    blocks = baked_blocks if checkpoint.kind == "baked" else ternary_blocks
    last = stored = torch.empty(0)
    try:
        for codes, scale in blocks(weight, checkpoint.scaling):
            if scale is not last:  # one per tensor comes with all rows
                last, stored = scale, stored_scale(scale, name)
            yield TernaryTensor(codes, stored)
    except ValueError as error:
        raise BitconvertError(
            f"{checkpoint.name}: tensor {name} is not ternary with one scale per {checkpoint.scaling.granularity}, "
            f"as {BAKED_FILE} says",
            f"weights that were trained on are latents: remove {BAKED_FILE}, and pack what warmup makes of them",
        ) from error


def read_ternary(checkpoint: Checkpoint, name: str) -> TernaryTensor:
    """All rows of ``ternary_rows``."""
    codes, scales = zip(*ternary_rows(checkpoint, name), strict=True)
    shared = checkpoint.scaling.granularity == "tensor"
    return TernaryTensor(torch.cat(codes), scales[0] if shared else torch.cat(scales))


def with_progress(tensors: Sequence[ShapedT], reporter: Reporter) -> Iterator[ShapedT]:
    """Go through tensors and report the weights done: matrices of one model differ a thousandfold in size."""
    total = sum(math.prod(tensor.shape) for tensor in tensors)
    done = 0
    for tensor in tensors:
        yield tensor
        done += math.prod(tensor.shape)
        reporter.advance(done, total)


def packed_file(
    path: Path, form: str, tensors: list[PackedTensor], nbytes: int, seconds: float, note: str = ""
) -> PackedFile:
    """The report of a finished file, with its effective bits per weight."""
    ternary = [tensor for tensor in tensors if tensor.ternary]
    linear = [tensor for tensor in tensors if tensor.ternary or tensor.kept]
    return PackedFile(
        path=str(path),
        format=form,
        tensors=tensors,
        nbytes=nbytes,
        seconds=seconds,
        bits_per_weight=8 * nbytes / sum(tensor.weights for tensor in tensors),
        ternary_bits_per_weight=_bits_per_weight(ternary),
        linear_bits_per_weight=_bits_per_weight(linear),
        note=note,
    )


def _bits_per_weight(tensors: list[PackedTensor]) -> float:
    return 8 * sum(tensor.nbytes for tensor in tensors) / sum(tensor.weights for tensor in tensors)


def _source_tensor(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> SourceTensor:
    module, _, parameter = name.rpartition(".")
    is_weight = parameter == "weight"
    ternary, kept = is_weight and checkpoint.is_ternary_module(module), is_weight and module in checkpoint.kept
    return SourceTensor(name, shape, ternary, kept)
