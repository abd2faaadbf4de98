"""A GGUF file with ternary weights: the way from checkpoint to disk and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitconvert.errors import BitconvertError
from bitconvert.models import gguf_types
from bitconvert.models.ggml_quantize import quantize_by_ggml
from bitconvert.models.gguf_parse import GgufTensor, parse_gguf
from bitconvert.models.gguf_tensors import to_gguf_rows
from bitconvert.models.gguf_types import register_i2_s, register_q2_0
from bitconvert.packing.formats import GgufFormat
from bitconvert.packing.formats.base import Bytes
from bitconvert.packing.gguf.container import GgufContainer
from bitconvert.packing.gguf.hparams import note_on_graph, require_expressible
from bitconvert.packing.gguf.plan import BY_LLAMA_CPP, PlannedTensor, main_type, plan_tensors, require_types
from bitconvert.packing.job import Container, Encoder, Output, PackJob, Parts
from bitconvert.packing.readback import ReadBack
from bitconvert.packing.source import SourceTensor, packed_file
from bitconvert.report.packing import PackedFile, PackedTensor
from bitconvert.ternary.quantize import TernaryTensor

_BYTES_AT_ONCE = 2**20
"""When a file is read back."""


class GgufFile(Container[GgufFormat]):
    """One GGUF file, or the shards of one."""

    def target(self, job: PackJob, form: GgufFormat) -> Path:
        """See ``Container``; shards are named after it."""
        return job.output / f"{job.checkpoint.base_name}-{form.type.name}.gguf"

    def require(self, job: PackJob, form: GgufFormat) -> None:
        """See ``Container``: types that can be had, and a graph and a vocabulary that llama.cpp has."""
        require_types(job, form)
        require_expressible(job.checkpoint.complete, job.checkpoint.name)
        if job.has_vocabulary:
            _ = job.vocabulary

    def nbytes(self, job: PackJob, form: GgufFormat) -> int:
        """See ``Container``; without a tokenizer, of the tensors alone."""
        plan = plan_tensors(job, form)
        if not job.has_vocabulary:
            return sum(tensor.nbytes for tensor in plan)
        target = self.target(job, form)
        with TemporaryDirectory() as directory, closing(_container(job, plan, Path(directory, target.name))) as file:
            file.begin()
            return file.nbytes

    def types(self, job: PackJob, form: GgufFormat) -> set[str]:
        """See ``Container``."""
        return {tensor.type.name for tensor in plan_tensors(job, form) if tensor.form is not None}

    @contextmanager
    def open(self, job: PackJob, form: GgufFormat) -> Iterator[Output]:
        """See ``Container``; a matrix whose rows the format does not divide gets the next best, with a note."""
        register_q2_0()
        register_i2_s()
        target = self.target(job, form)
        plan = plan_tensors(job, form)
        with ExitStack() as files:
            container = files.enter_context(closing(_container(job, plan, job.directory / target.name)))
            container.begin()
            yield _GgufOutput(job, form, target, files, plan, container)


class _GgufOutput(Output):
    def __init__(
        self,
        job: PackJob,
        form: GgufFormat,
        target: Path,
        files: ExitStack,
        plan: list[PlannedTensor],
        container: GgufContainer,
    ) -> None:
        super().__init__(target, files)
        self._job, self._form, self._container = job, form, container
        self._plan = {tensor.source: tensor for tensor in plan}

    def encoder(self, tensor: SourceTensor) -> Encoder:
        """See ``Output``."""
        return _RowEncoder(self._job, self._plan[tensor.name], self.read_back)

    def plain(self, tensor: SourceTensor, rows: Tensor) -> Parts:
        """See ``Output``."""
        planned = self._plan[tensor.name]
        return {planned.name: _plain_values(self._job, planned, rows)}

    def put(self, name: str, data: NDArray[Any]) -> None:
        """See ``Output``; the container counts on the order."""
        self._container.write(data)

    def finish(self) -> PackedFile:
        """See ``Output``."""
        self.files.close()
        files = self._container.files
        stored = {name: tensor for file in files for name, tensor in parse_gguf(file).tensors.items()}
        for tensor in self._plan.values():
            self.read_back.check(tensor.name, _stored_bytes(stored[tensor.name]))
        self.read_back.finish()
        tensors = self._plan.values()
        packed = [
            PackedTensor(t.name, t.type.name, t.shape, t.nbytes, t.form is not None, t.kept, t.note) for t in tensors
        ]
        nbytes = sum(file.stat().st_size for file in files)
        first = self.target.with_name(files[0].name)
        note = "; ".join(filter(None, (self._form.note, note_on_graph(self._job.checkpoint.complete))))
        return packed_file(first, self._form.name, packed, nbytes, self.seconds, note)


class _RowEncoder(Encoder):
    """Rows of codes to rows of bytes; where llama.cpp has rows in another order, the bytes change places in the end."""

    def __init__(self, job: PackJob, tensor: PlannedTensor, read_back: ReadBack) -> None:
        assert tensor.form is not None
        self._job, self._tensor, self._form, self._read_back = job, tensor, tensor.form, read_back
        self._rows: list[Bytes] = []
        self._trailer = np.empty(0, np.uint8)

    def add(self, rows: TernaryTensor) -> None:
        """See ``Encoder``."""
        height, columns = rows.codes.shape
        data = self._form.encode(rows)
        decoded = self._form.decode(data, (height, columns))
        self._read_back.compare(self._tensor.name, rows.codes.numpy(), decoded.codes.numpy())
        self._read_back.compare(self._tensor.name, self._form.stored_scales(rows), decoded.scale.numpy())
        self._rows.append(data.reshape(-1)[: data.size - self._tensor.type.trailer].reshape(height, -1))
        self._trailer = data.reshape(-1)[data.size - self._tensor.type.trailer :]

    def finish(self) -> Parts:
        """See ``Encoder``; what is behind the rows of a tensor is the same for any of them."""
        checkpoint = self._job.checkpoint
        rows = torch.from_numpy(np.concatenate(self._rows))
        ordered = to_gguf_rows(rows, self._tensor.source, checkpoint.complete, checkpoint.family).contiguous().numpy()
        return {self._tensor.name: np.append(ordered, self._trailer) if len(self._trailer) else ordered}


def _container(job: PackJob, plan: list[PlannedTensor], path: Path) -> GgufContainer:
    """A file that knows of all its tensors; nothing is written yet."""
    container = GgufContainer(
        path, job.checkpoint, job.vocabulary, main_type(plan).file_type, job.options.max_shard_size
    )
    for tensor in plan:
        container.add_tensor(tensor.name, tensor.shape, tensor.type.type_id, tensor.nbytes)
    return container


def _plain_values(job: PackJob, tensor: PlannedTensor, rows: Tensor) -> NDArray[Any]:
    """Rows of a tensor that is not ternary, as they are stored."""
    checkpoint = job.checkpoint
    values = to_gguf_rows(rows.float(), tensor.source, checkpoint.complete, checkpoint.family).contiguous()
    low, high = torch.aminmax(values)
    if tensor.type == gguf_types.F16 and max(-low, high) > torch.finfo(torch.float16).max:
        raise BitconvertError(
            f"{checkpoint.name}: tensor {tensor.source} holds values that float16 cannot",
            f"store it in float32 with --{tensor.option.replace('_', '-')} f32",
        )
    if tensor.type in BY_LLAMA_CPP:
        return quantize_by_ggml(values.numpy(), tensor.type)
    data: NDArray[Any] = gguf.quantize(values.numpy(), tensor.type.ggml())
    return data


def _stored_bytes(tensor: GgufTensor) -> Iterator[Bytes]:
    """The data of a tensor from its file, which is not mapped: of that, all that was read would stay in memory."""
    end = tensor.data_offset + tensor.n_bytes
    for begin in range(tensor.data_offset, end, _BYTES_AT_ONCE):
        yield np.fromfile(tensor.path, np.uint8, min(_BYTES_AT_ONCE, end - begin), offset=begin)
