"""A GGUF file with ternary weights: the way from checkpoint to disk and back."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from bitconvert.atomic import atomic_files, glob_escape
from bitconvert.errors import BitconvertError
from bitconvert.models import gguf_types
from bitconvert.models.checkpoint import Checkpoint
from bitconvert.models.ggml_quantize import quantize_by_ggml
from bitconvert.models.gguf_parse import parse_gguf
from bitconvert.models.gguf_tensors import to_gguf_rows
from bitconvert.models.gguf_types import register_i2_s, register_q2_0
from bitconvert.packing.formats import GgufFormat
from bitconvert.packing.gguf.container import GgufContainer
from bitconvert.packing.gguf.hparams import note_on_graph, require_expressible
from bitconvert.packing.gguf.plan import BY_LLAMA_CPP, PlannedTensor, main_type, plan_tensors, require_types
from bitconvert.packing.job import Container, PackJob
from bitconvert.packing.readback import ReadBack
from bitconvert.packing.source import packed_file, read_ternary, with_progress
from bitconvert.report import PackedFile, PackedTensor
from bitconvert.ternary.quantize import TernaryTensor


class GgufFile(Container[GgufFormat]):
    """One GGUF file, or the shards of one; those that exist are replaced."""

    def target(self, job: PackJob, form: GgufFormat) -> Path:
        """See ``Container``; shards are named after it."""
        return job.output / f"{job.checkpoint.base_name}-{form.type.name}.gguf"

    def require(self, job: PackJob, form: GgufFormat) -> None:
        """See ``Container``: types that can be had, and a graph and a vocabulary that llama.cpp has."""
        require_types(job, form)
        require_expressible(job.checkpoint.complete, job.checkpoint.name)
        _ = job.vocabulary

    def write(self, job: PackJob, form: GgufFormat) -> PackedFile:
        """See ``Container``; a matrix whose rows the format does not divide gets the next best, with a note."""
        started = time.monotonic()
        register_q2_0()
        register_i2_s()
        target = self.target(job, form)
        plan = plan_tensors(job, form)
        shards = f"{glob_escape(target.stem)}-[0-9][0-9][0-9][0-9][0-9]-of-[0-9][0-9][0-9][0-9][0-9].gguf"
        with atomic_files(target, siblings=shards) as temporary:
            expected = _write(job, plan, temporary / target.name, ReadBack(target))
            files = sorted(temporary.iterdir())
            _read_back(files, plan, expected)
            nbytes = sum(file.stat().st_size for file in files)
        packed = [PackedTensor(t.name, t.type.name, t.shape, t.nbytes, t.form is not None, t.note) for t in plan]
        first = target.with_name(files[0].name)
        note = "; ".join(filter(None, (form.note, note_on_graph(job.checkpoint.complete))))
        return packed_file(first, form.name, packed, nbytes, time.monotonic() - started, note)


def _write(job: PackJob, plan: list[PlannedTensor], path: Path, expected: ReadBack) -> ReadBack:
    """Stream the tensors to a file, one at a time, and note what each must read back as."""
    file_type, shard_size = main_type(plan).file_type, job.options.max_shard_size
    with closing(GgufContainer(path, job.checkpoint, job.vocabulary, file_type, shard_size)) as container:
        for tensor in plan:
            container.add_tensor(tensor.name, tensor.shape, tensor.type.type_id, tensor.nbytes)
        container.begin()
        for tensor in with_progress(plan, job.reporter):
            if tensor.form is not None:
                ternary = _ternary_rows(job.checkpoint, tensor.source)
                expected.expect(tensor.name, ternary.codes.numpy(), tensor.form.stored_scales(ternary))
                container.write(tensor.form.encode(ternary))
            else:
                values = _plain_values(job.checkpoint, tensor)
                expected.expect(tensor.name, values)
                container.write(values)
    return expected


def _ternary_rows(checkpoint: Checkpoint, name: str) -> TernaryTensor:
    """Codes and scales in llama.cpp's row order."""
    codes, scale = (
        to_gguf_rows(part, name, checkpoint.complete, checkpoint.family).contiguous()
        for part in read_ternary(checkpoint, name)
    )
    return TernaryTensor(codes, scale)


def _plain_values(checkpoint: Checkpoint, tensor: PlannedTensor) -> NDArray[Any]:
    """A tensor that is not ternary, as it is stored."""
    values = checkpoint.read(tensor.source).float()
    rows = to_gguf_rows(values, tensor.source, checkpoint.complete, checkpoint.family).contiguous()
    low, high = torch.aminmax(rows)
    if tensor.type == gguf_types.F16 and max(-low, high) > torch.finfo(torch.float16).max:
        raise BitconvertError(
            f"{checkpoint.name}: tensor {tensor.source} holds values that float16 cannot",
            "store it in float32 with --embedding-type f32",
        )
    if tensor.type in BY_LLAMA_CPP:
        return quantize_by_ggml(rows.numpy(), tensor.type)
    data: NDArray[Any] = gguf.quantize(rows.numpy(), tensor.type.ggml())
    return data


def _read_back(files: list[Path], plan: list[PlannedTensor], expected: ReadBack) -> None:
    stored = {name: tensor.data for file in files for name, tensor in parse_gguf(file).tensors.items()}
    for tensor in plan:
        data = np.asarray(stored[tensor.name])
        if tensor.form is not None:
            decoded = tensor.form.decode(data.view(np.uint8), (tensor.shape[0], tensor.shape[1]))
            expected.check(tensor.name, decoded.codes.numpy(), decoded.scale.numpy())
        else:
            expected.check(tensor.name, data)
    expected.finish()
