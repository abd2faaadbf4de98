"""A Hugging Face directory that stock transformers loads and runs with int8 activations.

Everything that is not ternary is stored in float32. Measured against a float64 BitLinear, the relative error of the
logits of tiny-llama (and of an untrained model of SmolLM2-135M's 30 layers) is

    stored in float32                       0.005 (0.009)   what is left: int8 activations that round the other way
    stored in bfloat16, run in float32      0.011 (0.020)   1/scale loses up to 0.4 % in every matrix
    stored and run in bfloat16              0.013 (0.024)
    stored and run in float16               0.009 (0.064)   BitLinear's 127/absmax * 1/scale overflows on quiet tokens

so float16 is unsafe, and bfloat16 would save half of the embedding at twice the error. Whoever wants to compute in
bfloat16 passes ``dtype=torch.bfloat16`` when loading.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from safetensors import safe_open

from bitconvert.atomic import atomic_directory
from bitconvert.errors import BitconvertError, UsageError
from bitconvert.models.checkpoint import Checkpoint
from bitconvert.packing.directory import copy_companions, write_config
from bitconvert.packing.formats.hf_bitnet import HfBitnet
from bitconvert.packing.job import Container, PackJob
from bitconvert.packing.readback import ReadBack
from bitconvert.packing.safetensors_file import SafetensorsFile, TensorSpec
from bitconvert.packing.source import SourceTensor, packed_file, read_ternary, with_progress
from bitconvert.report import PackedFile, PackedTensor, Reporter

_WEIGHTS = "model.safetensors"
_DTYPE = torch.float32
_FORMAT = HfBitnet()

_OFFLINE_BITLINEAR = {
    "quant_method": "bitnet",
    "linear_class": "bitlinear",
    "quantization_mode": "offline",
    "modules_to_not_convert": ["lm_head"],
}


class BitnetDirectory(Container[HfBitnet]):
    """A directory of Hugging Face bitnet; a packed model that is there already is replaced, anything else is not."""

    def target(self, job: PackJob, form: HfBitnet) -> Path:
        """See ``Container``."""
        return job.output / f"{job.checkpoint.base_name}-bitnet"

    def require(self, job: PackJob, form: HfBitnet) -> None:
        """See ``Container``: rows that four divides, and a place that is free."""
        for tensor in job.tensors:
            if tensor.ternary and (reason := form.shape_refusal(tensor.shape)):
                raise BitconvertError(
                    f"tensor {tensor.name} cannot be packed as {form.name}: {reason}", "use a GGUF format"
                )
        _require_replaceable(self.target(job, form))

    def write(self, job: PackJob, form: HfBitnet) -> PackedFile:
        """See ``Container``."""
        started = time.monotonic()
        target = self.target(job, form)
        with atomic_directory(target) as directory:
            weights = directory / _WEIGHTS
            expected = _write_weights(job.checkpoint, job.tensors, weights, ReadBack(target), job.reporter)
            _read_back(weights, job.tensors, expected)
            write_config(job.checkpoint, directory, {"quantization_config": _OFFLINE_BITLINEAR})
            copy_companions(job.checkpoint.path, directory)
            nbytes = weights.stat().st_size
        packed = [_packed(tensor) for tensor in job.tensors]
        return packed_file(target, form.name, packed, nbytes, time.monotonic() - started)


def _require_replaceable(target: Path) -> None:
    """A packed model that is there already may be replaced; a directory of anything else may not."""
    if not target.is_dir() or not any(target.iterdir()):
        return
    config = target / "config.json"
    if not config.exists() or '"bitnet"' not in config.read_text(encoding="utf-8", errors="replace"):
        raise UsageError(f"{target}: exists, and is no packed model", "choose another --output, or remove it")


def _write_weights(
    checkpoint: Checkpoint, tensors: list[SourceTensor], path: Path, expected: ReadBack, reporter: Reporter
) -> ReadBack:
    """Stream the tensors to a file, one at a time, and note what each must read back as."""
    specs = {name: spec for tensor in tensors for name, spec in _specs(tensor).items()}
    with SafetensorsFile(path, specs) as file:
        for tensor in with_progress(tensors, reporter):
            if tensor.ternary:
                ternary = read_ternary(checkpoint, tensor.name)
                weight, weight_scale = _FORMAT.encode(ternary, _DTYPE)
                file.write(tensor.name, weight)
                file.write(_scale_name(tensor.name), weight_scale)
                expected.expect(tensor.name, ternary.codes.numpy(), weight_scale.numpy())
            else:
                values = checkpoint.read(tensor.name).to(_DTYPE)
                file.write(tensor.name, values)
                expected.expect(tensor.name, values.numpy())
    return expected


def _read_back(path: Path, tensors: list[SourceTensor], expected: ReadBack) -> None:
    with safe_open(path, framework="pt") as file:
        for tensor in tensors:
            stored = file.get_tensor(tensor.name)
            if tensor.ternary:
                weight_scale = file.get_tensor(_scale_name(tensor.name))
                expected.check(tensor.name, _FORMAT.decode(stored, weight_scale).codes.numpy(), weight_scale.numpy())
            else:
                expected.check(tensor.name, stored.numpy())
    expected.finish()


def _specs(tensor: SourceTensor) -> dict[str, TensorSpec]:
    """The tensors that one of the model becomes."""
    if not tensor.ternary:
        return {tensor.name: TensorSpec(_DTYPE, tensor.shape)}
    return {
        tensor.name: TensorSpec(torch.uint8, _FORMAT.packed_shape(tensor.shape)),
        _scale_name(tensor.name): TensorSpec(_DTYPE, (1,)),
    }


def _packed(tensor: SourceTensor) -> PackedTensor:
    nbytes = sum(spec.nbytes for spec in _specs(tensor).values())
    return PackedTensor(tensor.name, "U8" if tensor.ternary else "F32", tensor.shape, nbytes, tensor.ternary)


def _scale_name(name: str) -> str:
    return f"{name}_scale"
