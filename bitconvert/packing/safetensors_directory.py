"""A Hugging Face directory with packed safetensors, in one of the formats that stock loaders know."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bitconvert.errors import BitconvertError
from bitconvert.models.checkpoint import Checkpoint
from bitconvert.models.manifest import write_manifest
from bitconvert.models.safetensors_file import TensorSpec
from bitconvert.packing.directory import copy_companions, write_config
from bitconvert.packing.formats.directory import PLAIN_DTYPE, DirectoryFormat
from bitconvert.packing.job import Container, Encoder, Output, PackJob, Parts, WholeEncoder
from bitconvert.packing.shards import Shards
from bitconvert.packing.source import SourceTensor, packed_file
from bitconvert.report.packing import PackedFile, PackedTensor
from bitconvert.ternary.quantize import TernaryTensor


class SafetensorsDirectory(Container[DirectoryFormat]):
    """A directory of the files that transformers reads."""

    def target(self, job: PackJob, form: DirectoryFormat) -> Path:
        """See ``Container``."""
        return job.output / f"{job.checkpoint.base_name}-{form.directory}"

    def require(self, job: PackJob, form: DirectoryFormat) -> None:
        """See ``Container``: shapes that the format can pack, and a tokenizer."""
        if job.has_vocabulary:
            _ = job.tokenizer
        for tensor in job.tensors:
            if tensor.ternary and (reason := form.shape_refusal(tensor.shape)):
                raise BitconvertError(
                    f"tensor {tensor.name} cannot be packed as {form.name}: {reason}", "use another format"
                )

    def nbytes(self, job: PackJob, form: DirectoryFormat) -> int:
        """See ``Container``."""
        return _shards(job, form, self.target(job, form)).nbytes

    @contextmanager
    def open(self, job: PackJob, form: DirectoryFormat) -> Iterator[Output]:
        """See ``Container``."""
        target = self.target(job, form)
        directory = job.directory / target.name
        directory.mkdir()
        with ExitStack() as files:
            shards = files.enter_context(_shards(job, form, directory))
            yield _DirectoryOutput(job, form, target, files, shards, directory)


class _DirectoryOutput(Output):
    def __init__(
        self, job: PackJob, form: DirectoryFormat, target: Path, files: ExitStack, shards: Shards, directory: Path
    ) -> None:
        super().__init__(target, files)
        self._job, self._form, self._shards, self._directory = job, form, shards, directory

    def encoder(self, tensor: SourceTensor) -> Encoder:
        """See ``Output``."""
        return WholeEncoder(tensor, partial(self._encoded, tensor))

    def _encoded(self, tensor: SourceTensor, ternary: TernaryTensor) -> Parts:
        parts = self._form.encode(ternary)
        self.read_back.compare(tensor.name, ternary.codes.numpy(), self._form.decode(parts).codes.numpy())
        return {_part_name(tensor, suffix): part.numpy() for suffix, part in parts.items()}

    def plain(self, tensor: SourceTensor, rows: Tensor) -> Parts:
        """See ``Output``."""
        return {tensor.name: rows.to(PLAIN_DTYPE).numpy()}

    def put(self, name: str, data: NDArray[Any]) -> None:
        """See ``Output``."""
        self._shards.write(name, torch.from_numpy(data))

    def finish(self) -> PackedFile:
        """See ``Output``."""
        job, form, directory = self._job, self._form, self._directory
        self.files.close()
        for tensor in job.tensors:
            for name in _specs(job, form, tensor):
                self.read_back.check(name, (rows.numpy() for rows in self._shards.read(name)))
        self.read_back.finish()
        quantization = form.quantization(job.scaling, _plain_linears(job.checkpoint))
        write_config(job.checkpoint, directory, {"quantization_config": quantization})
        copy_companions(job.checkpoint.path, directory)
        write_manifest(directory)
        packed = [_packed(job, form, tensor) for tensor in job.tensors]
        note = form.note([tensor.name.removesuffix(".weight") for tensor in job.tensors if tensor.kept])
        return packed_file(self.target, form.name, packed, self._shards.nbytes, self.seconds, note)


def _shards(job: PackJob, form: DirectoryFormat, directory: Path) -> Shards:
    specs = {name: spec for tensor in job.tensors for name, spec in _specs(job, form, tensor).items()}
    return Shards(directory, specs, job.options.max_shard_size)


def _specs(job: PackJob, form: DirectoryFormat, tensor: SourceTensor) -> dict[str, TensorSpec]:
    """The tensors that one of the model becomes, by their full names."""
    if not tensor.ternary:
        return {tensor.name: TensorSpec(PLAIN_DTYPE, tensor.shape)}
    specs = form.specs(tensor.shape, job.scaling)
    return {_part_name(tensor, suffix): spec for suffix, spec in specs.items()}


def _packed(job: PackJob, form: DirectoryFormat, tensor: SourceTensor) -> PackedTensor:
    nbytes = sum(spec.nbytes for spec in _specs(job, form, tensor).values())
    dtype = form.codes_dtype if tensor.ternary else "F32"
    return PackedTensor(tensor.name, dtype, tensor.shape, nbytes, tensor.ternary, tensor.kept)


def _part_name(tensor: SourceTensor, suffix: str) -> str:
    return tensor.name.removesuffix("weight") + suffix


def _plain_linears(checkpoint: Checkpoint) -> list[str]:
    """The linear layers that stay as they are, for readers that would take each for a packed one."""
    linears = [name for name, module in checkpoint.skeleton().named_modules() if isinstance(module, nn.Linear)]
    return [name for name in linears if not checkpoint.is_ternary_module(name)]
