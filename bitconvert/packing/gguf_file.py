"""A GGUF file with ternary weights: which type each tensor gets, and the way from checkpoint to disk and back."""

from __future__ import annotations

import math
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from bitconvert.atomic import atomic_file
from bitconvert.errors import BitconvertError, UsageError
from bitconvert.models import gguf_types
from bitconvert.models.checkpoint import Checkpoint
from bitconvert.models.gguf_tensors import gguf_names, to_gguf_rows
from bitconvert.models.gguf_types import GgufType, register_q2_0
from bitconvert.packing.formats import FALLBACKS, GgufFormat
from bitconvert.packing.formats.base import block_scales
from bitconvert.packing.gguf.container import GgufContainer
from bitconvert.packing.gguf.hparams import require_expressible
from bitconvert.packing.job import Container, PackJob
from bitconvert.packing.readback import ReadBack
from bitconvert.packing.source import EMBEDDING, HEAD, SourceTensor, packed_file, read_ternary, with_progress
from bitconvert.report import PackedFile, PackedTensor
from bitconvert.ternary.quantize import TernaryTensor

EMBEDDING_TYPES = {"f16": gguf_types.F16, "q8_0": gguf_types.Q8_0, "f32": gguf_types.F32}
"""What ``--embedding-type`` accepts, for the embedding and an untied head."""


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the file to be.

    Attributes:
        source: name in the checkpoint.
        name: in the file.
        shape: (out, in), or (n,).
        type: how it is stored.
        form: encodes it, if it is ternary.
        note: why it is not stored in the type asked for; empty when it is.
    """

    source: str
    name: str
    shape: tuple[int, ...]
    type: GgufType
    form: GgufFormat | None = None
    note: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        rows = self.shape[0] if len(self.shape) > 1 else 1
        return rows * self.type.row_bytes(self.shape[-1])


class GgufFile(Container[GgufFormat]):
    """One GGUF file; one that exists is replaced."""

    def target(self, job: PackJob, form: GgufFormat) -> Path:
        """See ``Container``."""
        return job.output / f"{job.checkpoint.base_name}-{form.type.name}.gguf"

    def require(self, job: PackJob, form: GgufFormat) -> None:
        """See ``Container``: a graph and a vocabulary that llama.cpp has, and an embedding type that there is."""
        _embedding_type(job)
        require_expressible(job.checkpoint.complete, job.checkpoint.name)
        _ = job.vocabulary

    def write(self, job: PackJob, form: GgufFormat) -> PackedFile:
        """See ``Container``; a matrix whose rows the format does not divide gets the next best, with a note."""
        started = time.monotonic()
        register_q2_0()
        target = self.target(job, form)
        plan = plan_tensors(job, form)
        with atomic_file(target) as temporary:
            expected = _write(job, plan, temporary, ReadBack(target))
            _read_back(temporary, plan, expected)
            nbytes = temporary.stat().st_size
        packed = [PackedTensor(t.name, t.type.name, t.shape, t.nbytes, t.form is not None, t.note) for t in plan]
        return packed_file(target, form.name, packed, nbytes, time.monotonic() - started)


def _embedding_type(job: PackJob) -> GgufType:
    name = job.options.embedding_type
    if name not in EMBEDDING_TYPES:
        raise UsageError(f"unknown embedding type '{name}'", f"embedding types: {', '.join(EMBEDDING_TYPES)}")
    return EMBEDDING_TYPES[name]


# ---- which type each tensor gets -------------------------------------------------------------------------------------


def plan_tensors(job: PackJob, form: GgufFormat) -> list[PlannedTensor]:
    """Choose the type of each tensor: ternary matrices ``form`` or a fallback, embeddings their own, the rest F32."""
    names = gguf_names([tensor.name for tensor in job.tensors], job.checkpoint.complete, job.checkpoint.family)
    return [_planned(tensor, names[tensor.name], form, _embedding_type(job)) for tensor in job.tensors]


def _planned(tensor: SourceTensor, name: str, form: GgufFormat, embedding: GgufType) -> PlannedTensor:
    columns = tensor.shape[-1]
    if tensor.ternary:
        home = next(row for row in (form, *FALLBACKS) if columns % row.row_multiple == 0)
        return PlannedTensor(tensor.name, name, tensor.shape, home.type, home, _misfit(columns, form.type, home.type))
    if tensor.name in (EMBEDDING, HEAD):
        stored = embedding if columns % embedding.block == 0 else gguf_types.F16
        return PlannedTensor(tensor.name, name, tensor.shape, stored, note=_misfit(columns, embedding, stored))
    return PlannedTensor(tensor.name, name, tensor.shape, gguf_types.F32)


def _misfit(columns: int, wanted: GgufType, stored: GgufType) -> str:
    return "" if stored == wanted else f"rows of {columns} do not divide by {wanted.block}, as {wanted.name} requires"


def _main_type(plan: list[PlannedTensor]) -> GgufType:
    """The type that most ternary weights have: some runtimes choose their kernels by ``general.file_type``."""
    weights: Counter[GgufType] = Counter()
    for tensor in plan:
        if tensor.form is not None:
            weights[tensor.type] += math.prod(tensor.shape)
    return weights.most_common(1)[0][0]


# ---- to disk and back ------------------------------------------------------------------------------------------------


def _write(job: PackJob, plan: list[PlannedTensor], path: Path, expected: ReadBack) -> ReadBack:
    """Stream the tensors to a file, one at a time, and note what each must read back as."""
    checkpoint = job.checkpoint
    with closing(GgufContainer(path, checkpoint, job.vocabulary, _main_type(plan).file_type)) as container:
        for tensor in plan:
            container.add_tensor(tensor.name, tensor.shape, tensor.type.type_id, tensor.nbytes)
        container.begin()
        for tensor in with_progress(plan, job.reporter):
            if tensor.form is not None:
                ternary = _ternary_rows(checkpoint, tensor.source)
                scales = block_scales(ternary, tensor.type.block)
                expected.expect(tensor.name, ternary.codes.numpy(), scales)
                container.write(tensor.form.encode(ternary))
            else:
                values = _plain_values(checkpoint, tensor)
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
    data: NDArray[Any] = gguf.quantize(rows.numpy(), tensor.type.ggml())
    return data


def _read_back(path: Path, plan: list[PlannedTensor], expected: ReadBack) -> None:
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    for tensor in plan:
        data = np.asarray(stored[tensor.name])
        if tensor.form is not None:
            decoded = tensor.form.decode(data.view(np.uint8), (tensor.shape[0], tensor.shape[1]))
            expected.check(tensor.name, decoded.codes.numpy(), decoded.scale.numpy())
        else:
            expected.check(tensor.name, data)
    expected.finish()
