"""A directory as transformers.js wants it: ``onnx/model_q2.onnx`` and its data, config and tokenizer above them.

Needs the onnx package, which is why the modules that import it are imported late.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray
from torch import Tensor

from bitconvert.errors import BitconvertError
from bitconvert.models.manifest import write_manifest
from bitconvert.packing.directory import copy_companions, write_config
from bitconvert.packing.formats.onnx import Onnx
from bitconvert.packing.job import Container, Encoder, Output, PackJob, Parts, WholeEncoder
from bitconvert.packing.source import SourceTensor, packed_file
from bitconvert.report.packing import PackedFile, PackedTensor
from bitconvert.ternary.quantize import TernaryTensor

if TYPE_CHECKING:
    from bitconvert.packing.onnx_data import OnnxData
    from bitconvert.packing.onnx_graph import Decoder

_MODEL = "model_q2.onnx"
_MARK = "transformers.js_config"
_UNSPLIT = "its weights are one file, whatever --max-shard-size says"
_TOLD = {_MARK: {"dtype": "q2", "use_external_data_format": True}}
"""For transformers.js: the suffix of the model's file, and that its weights are in ``model_q2.onnx_data``."""


class OnnxDirectory(Container[Onnx]):
    """A directory of the files that transformers.js reads."""

    def target(self, job: PackJob, form: Onnx) -> Path:
        """See ``Container``."""
        return job.output / f"{job.checkpoint.base_name}-onnx"

    def require(self, job: PackJob, form: Onnx) -> None:
        """See ``Container``: the onnx package, a tokenizer, and a model whose graph is known here."""
        if importlib.util.find_spec("onnx") is None:
            raise BitconvertError("format onnx needs the onnx package", "pip install 'bitconvert[onnx]'")
        if job.has_vocabulary:
            _ = job.tokenizer
        _decoder(job, form)

    def nbytes(self, job: PackJob, form: Onnx) -> int:
        """See ``Container``: the graph and the data beside it."""
        decoder = _decoder(job, form)
        data = _data(self.target(job, form), decoder)
        return data.file_bytes + len(_graph(decoder, data))

    @contextmanager
    def open(self, job: PackJob, form: Onnx) -> Iterator[Output]:
        """See ``Container``."""
        target = self.target(job, form)
        decoder = _decoder(job, form)
        directory = job.directory / target.name
        with ExitStack() as files:
            _model(directory).parent.mkdir(parents=True)
            data = files.enter_context(_data(directory, decoder))
            yield _OnnxOutput(job, form, target, files, decoder, data, directory)


class _OnnxOutput(Output):
    def __init__(
        self,
        job: PackJob,
        form: Onnx,
        target: Path,
        files: ExitStack,
        decoder: Decoder,
        data: OnnxData,
        directory: Path,
    ) -> None:
        super().__init__(target, files)
        self._job, self._form, self._decoder, self._data, self._directory = job, form, decoder, data, directory

    def encoder(self, tensor: SourceTensor) -> Encoder:
        """See ``Output``."""
        return WholeEncoder(tensor, partial(self._encoded, tensor))

    def _encoded(self, tensor: SourceTensor, ternary: TernaryTensor) -> Parts:
        packed, scales = self._form.encode(ternary, self._form.block(self._job.scaling))
        decoded = self._form.decode(packed, scales, tensor.shape[-1])
        self.read_back.compare(tensor.name, ternary.codes.numpy(), decoded.codes.numpy())
        return {tensor.name: packed, _scale_name(tensor): scales}

    def plain(self, tensor: SourceTensor, rows: Tensor) -> Parts:
        """See ``Output``."""
        return {tensor.name: rows.float().numpy()}

    def put(self, name: str, data: NDArray[Any]) -> None:
        """See ``Output``."""
        self._data.write(name, data)

    def finish(self) -> PackedFile:
        """See ``Output``."""
        self.files.close()
        for name in self._decoder.graph.stored:
            self.read_back.check(name, self._data.read(name))
        self.read_back.finish()
        job, model = self._job, _model(self._directory)
        model.write_bytes(_graph(self._decoder, self._data))
        write_config(job.checkpoint, self._directory, _TOLD)
        copy_companions(job.checkpoint.path, self._directory)
        write_manifest(self._directory)
        nbytes = sum(file.stat().st_size for file in model.parent.iterdir())
        packed = [_packed(self._data, tensor) for tensor in job.tensors]
        note = _UNSPLIT if job.options.max_shard_size else ""
        return packed_file(self.target, self._form.name, packed, nbytes, self.seconds, note)


def _decoder(job: PackJob, form: Onnx) -> Decoder:
    """The graph of the model; every tensor of the checkpoint has a place in it.

    Raises:
        BitconvertError: it is another kind of model.
    """
    from bitconvert.packing.onnx_graph import Decoder

    shapes = {tensor.name: tensor.shape for tensor in job.tensors}
    decoder = Decoder(job.checkpoint, shapes, form.block(job.scaling))
    homeless = sorted(shapes.keys() - decoder.graph.stored.keys())
    if homeless:
        raise BitconvertError(
            f"{job.checkpoint.name}: tensor {homeless[0]} has no place in the graph of format onnx",
            "use another format",
        )
    return decoder


def _model(directory: Path) -> Path:
    return directory / "onnx" / _MODEL


def _data(directory: Path, decoder: Decoder) -> OnnxData:
    from bitconvert.packing.onnx_data import OnnxData

    return OnnxData(_model(directory).with_name(f"{_MODEL}_data"), decoder.graph.stored)


def _graph(decoder: Decoder, data: OnnxData) -> bytes:
    return bytes(decoder.model(data.references()).SerializeToString())


def _packed(data: OnnxData, tensor: SourceTensor) -> PackedTensor:
    if not tensor.ternary:
        return PackedTensor(tensor.name, "F32", tensor.shape, data.nbytes(tensor.name), ternary=False, kept=tensor.kept)
    nbytes = data.nbytes(tensor.name) + data.nbytes(_scale_name(tensor))
    return PackedTensor(tensor.name, "U8", tensor.shape, nbytes, ternary=True)


def _scale_name(tensor: SourceTensor) -> str:
    return f"{tensor.name}_scale"
