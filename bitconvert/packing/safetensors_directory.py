"""A Hugging Face directory with packed safetensors, in one of the formats that stock loaders know."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from torch import Tensor, nn

from bitconvert.atomic import atomic_directory
from bitconvert.errors import BitconvertError
from bitconvert.models.checkpoint import Checkpoint
from bitconvert.packing.directory import copy_companions, require_replaceable, write_config
from bitconvert.packing.formats.directory import PLAIN_DTYPE, DirectoryFormat
from bitconvert.packing.job import Container, PackJob
from bitconvert.packing.readback import ReadBack
from bitconvert.packing.safetensors_file import TensorSpec
from bitconvert.packing.shards import Shards
from bitconvert.packing.source import SourceTensor, packed_file, read_ternary, with_progress
from bitconvert.report import PackedFile, PackedTensor


class SafetensorsDirectory(Container[DirectoryFormat]):
    """A packed model that is there already is replaced, anything else is not."""

    def target(self, job: PackJob, form: DirectoryFormat) -> Path:
        """See ``Container``."""
        return job.output / f"{job.checkpoint.base_name}-{form.directory}"

    def require(self, job: PackJob, form: DirectoryFormat) -> None:
        """See ``Container``: shapes that the format can pack, and a place that is free."""
        for tensor in job.tensors:
            if tensor.ternary and (reason := form.shape_refusal(tensor.shape)):
                raise BitconvertError(
                    f"tensor {tensor.name} cannot be packed as {form.name}: {reason}", "use another format"
                )
        require_replaceable(self.target(job, form), form.method)

    def write(self, job: PackJob, form: DirectoryFormat) -> PackedFile:
        """See ``Container``."""
        started = time.monotonic()
        target = self.target(job, form)
        with atomic_directory(target) as directory:
            specs = {name: spec for tensor in job.tensors for name, spec in _specs(job, form, tensor).items()}
            shards = Shards(directory, specs, job.options.max_shard_size)
            expected = _write(job, form, shards, ReadBack(target))
            _read_back(job, form, shards, expected)
            quantization = form.quantization(job.scaling, _plain_linears(job.checkpoint))
            write_config(job.checkpoint, directory, {"quantization_config": quantization})
            copy_companions(job.checkpoint.path, directory)
            nbytes = shards.nbytes
        packed = [_packed(job, form, tensor) for tensor in job.tensors]
        return packed_file(target, form.name, packed, nbytes, time.monotonic() - started)


def _write(job: PackJob, form: DirectoryFormat, shards: Shards, expected: ReadBack) -> ReadBack:
    """Stream the tensors to the files, one at a time, and note what each must read back as."""
    with shards:
        for tensor in with_progress(job.tensors, job.reporter):
            if tensor.ternary:
                ternary = read_ternary(job.checkpoint, tensor.name)
                parts = form.encode(ternary)
                for suffix, part in parts.items():
                    shards.write(_part_name(tensor, suffix), part)
                expected.expect(tensor.name, *_meaning(form, ternary.codes, parts))
            else:
                values = job.checkpoint.read(tensor.name).to(PLAIN_DTYPE)
                shards.write(tensor.name, values)
                expected.expect(tensor.name, values.numpy())
    return expected


def _read_back(job: PackJob, form: DirectoryFormat, shards: Shards, expected: ReadBack) -> None:
    for tensor in job.tensors:
        if tensor.ternary:
            suffixes = form.specs(tensor.shape, job.scaling)
            parts = {suffix: shards.read(_part_name(tensor, suffix)) for suffix in suffixes}
            expected.check(tensor.name, *_meaning(form, form.decode(parts).codes, parts))
        else:
            expected.check(tensor.name, shards.read(tensor.name).numpy())
    expected.finish()


def _meaning(form: DirectoryFormat, codes: Tensor, parts: Mapping[str, Tensor]) -> list[NDArray[Any]]:
    """The codes themselves, and every part that is stored as it is."""
    return [codes.numpy(), *(part.numpy() for suffix, part in parts.items() if suffix != form.codes)]


def _specs(job: PackJob, form: DirectoryFormat, tensor: SourceTensor) -> dict[str, TensorSpec]:
    """The tensors that one of the model becomes, by their full names."""
    if not tensor.ternary:
        return {tensor.name: TensorSpec(PLAIN_DTYPE, tensor.shape)}
    specs = form.specs(tensor.shape, job.scaling)
    return {_part_name(tensor, suffix): spec for suffix, spec in specs.items()}


def _packed(job: PackJob, form: DirectoryFormat, tensor: SourceTensor) -> PackedTensor:
    nbytes = sum(spec.nbytes for spec in _specs(job, form, tensor).values())
    return PackedTensor(
        tensor.name, form.codes_dtype if tensor.ternary else "F32", tensor.shape, nbytes, tensor.ternary
    )


def _part_name(tensor: SourceTensor, suffix: str) -> str:
    return tensor.name.removesuffix("weight") + suffix


def _plain_linears(checkpoint: Checkpoint) -> list[str]:
    """The linear layers that stay as they are, for readers that would take each for a packed one."""
    linears = [name for name, module in checkpoint.skeleton().named_modules() if isinstance(module, nn.Linear)]
    return [name for name in linears if not checkpoint.family.is_ternary_module(name)]
