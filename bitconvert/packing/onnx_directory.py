"""A directory as transformers.js wants it: ``onnx/model_q2.onnx`` and its data, config and tokenizer above them.

Needs the onnx package, which is why the modules that import it are imported late.
"""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import TYPE_CHECKING

from bitconvert.atomic import atomic_directory
from bitconvert.errors import BitconvertError
from bitconvert.packing.directory import copy_companions, require_replaceable, write_config
from bitconvert.packing.formats.onnx import Onnx
from bitconvert.packing.job import Container, PackJob
from bitconvert.packing.readback import ReadBack
from bitconvert.packing.source import SourceTensor, packed_file, read_ternary, with_progress
from bitconvert.report import PackedFile, PackedTensor

if TYPE_CHECKING:
    from bitconvert.packing.onnx_data import OnnxData
    from bitconvert.packing.onnx_graph import Decoder

_MODEL = "model_q2.onnx"
_MARK = "transformers.js_config"
_UNSPLIT = "its weights are one file, whatever --max-shard-size says"
_TOLD = {_MARK: {"dtype": "q2", "use_external_data_format": True}}
"""For transformers.js: the suffix of the model's file, and that its weights are in ``model_q2.onnx_data``."""


class OnnxDirectory(Container[Onnx]):
    """A packed model that is there already is replaced, anything else is not."""

    def target(self, job: PackJob, form: Onnx) -> Path:
        """See ``Container``."""
        return job.output / f"{job.checkpoint.base_name}-onnx"

    def require(self, job: PackJob, form: Onnx) -> None:
        """See ``Container``: the onnx package, a model whose graph is known here, and a place that is free."""
        if importlib.util.find_spec("onnx") is None:
            raise BitconvertError("format onnx needs the onnx package", "pip install 'bitconvert[onnx]'")
        _decoder(job, form)
        require_replaceable(self.target(job, form), _MARK)

    def write(self, job: PackJob, form: Onnx) -> PackedFile:
        """See ``Container``."""
        from bitconvert.packing.onnx_data import OnnxData

        started = time.monotonic()
        target = self.target(job, form)
        decoder = _decoder(job, form)
        with atomic_directory(target) as directory:
            model = directory / "onnx" / _MODEL
            model.parent.mkdir()
            data = OnnxData(model.with_name(f"{_MODEL}_data"), decoder.graph.stored)
            expected = _write(job, form, data, ReadBack(target))
            _read_back(job, form, data, expected)
            model.write_bytes(decoder.model(data.references()).SerializeToString())
            write_config(job.checkpoint, directory, _TOLD)
            copy_companions(job.checkpoint.path, directory)
            nbytes = sum(file.stat().st_size for file in model.parent.iterdir())
        packed = [_packed(data, tensor) for tensor in job.tensors]
        note = _UNSPLIT if job.options.max_shard_size else ""
        return packed_file(target, form.name, packed, nbytes, time.monotonic() - started, note)


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


def _write(job: PackJob, form: Onnx, data: OnnxData, expected: ReadBack) -> ReadBack:
    """Stream the tensors to the data file, one at a time, and note what each must read back as."""
    with data:
        for tensor in with_progress(job.tensors, job.reporter):
            if tensor.ternary:
                ternary = read_ternary(job.checkpoint, tensor.name)
                packed, scales = form.encode(ternary, form.block(job.scaling))
                data.write(tensor.name, packed)
                data.write(_scale_name(tensor), scales)
                expected.expect(tensor.name, ternary.codes.numpy(), scales)
            else:
                values = job.checkpoint.read(tensor.name).float().numpy()
                data.write(tensor.name, values)
                expected.expect(tensor.name, values)
    return expected


def _read_back(job: PackJob, form: Onnx, data: OnnxData, expected: ReadBack) -> None:
    for tensor in job.tensors:
        stored = data.read(tensor.name)
        if tensor.ternary:
            decoded = form.decode(stored, data.read(_scale_name(tensor)), tensor.shape[-1])
            expected.check(tensor.name, decoded.codes.numpy(), decoded.scale.numpy())
        else:
            expected.check(tensor.name, stored)
    expected.finish()


def _packed(data: OnnxData, tensor: SourceTensor) -> PackedTensor:
    if not tensor.ternary:
        return PackedTensor(tensor.name, "F32", tensor.shape, data.nbytes(tensor.name), ternary=False)
    nbytes = data.nbytes(tensor.name) + data.nbytes(_scale_name(tensor))
    return PackedTensor(tensor.name, "U8", tensor.shape, nbytes, ternary=True)


def _scale_name(tensor: SourceTensor) -> str:
    return f"{tensor.name}_scale"
