"""``bitconvert inspect``: what is in a file, tensor by tensor: types, bits per weight, zeros, scales."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from bitconvert.errors import BitconvertError
from bitconvert.evaluation.energy import estimate_energy
from bitconvert.evaluation.weights import read_meant, relative_distance, require_same_shapes
from bitconvert.models.checkpoint import Checkpoint, open_checkpoint
from bitconvert.models.gguf_file import open_gguf
from bitconvert.models.gguf_parse import GgufTensor
from bitconvert.models.gguf_source import LINEAGE_KEY, open_weights
from bitconvert.models.gguf_types import TERNARY
from bitconvert.models.pre_tokenizers import pre_tokenizer_of
from bitconvert.models.tokenizers import backend_json, vocabulary_model
from bitconvert.report.inspection import InspectReport, Scalar, ScaleSummary, TensorReport
from bitconvert.report.reporter import Reporter, Silent
from bitconvert.ternary.quantize import is_baked, ternarize

_SHOWN_CONFIG = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "vocab_size",
    "tie_word_embeddings",
)
_HIDDEN_GGUF = ("tokenizer.chat_template", LINEAGE_KEY)  # long; told in other words

Metadata = dict[str, Scalar]


def inspect(
    name: str, reporter: Reporter | None = None, *, against: str | None = None, energy: bool = False
) -> InspectReport:
    """Look into a model without loading it as a whole: one tensor at a time.

    Args:
        name: hub id, Hugging Face directory (plain, latent, baked or packed) or GGUF file.
        reporter: told about the progress.
        against: the model whose weights the ternary ones came from, to say how far they are from it.
        energy: whether to estimate the energy of the arithmetic.

    Raises:
        BitconvertError: a model cannot be read, or the other one has no such tensors.
    """
    reporter = reporter or Silent()
    checkpoint = open_checkpoint(name)
    original = None if against is None else open_checkpoint(against)
    reporter.stage(f"inspect {name}")
    found = _gguf_tensors(checkpoint, reporter) if checkpoint.kind == "gguf" else _tensors(checkpoint, reporter)
    tensors = tuple(replace(tensor, kept=_is_kept(checkpoint, tensor)) for tensor in found)
    if original is not None:
        tensors = tuple(_with_errors(tensors, checkpoint, original, reporter))
    parameters = max(sum(tensor.parameters for tensor in tensors), 1)
    ternary = sum(tensor.parameters for tensor in tensors if tensor.ternary)
    linear = [tensor for tensor in tensors if tensor.ternary or tensor.kept]
    return InspectReport(
        model=name,
        kind=checkpoint.kind,
        metadata=_metadata(checkpoint),
        tensors=tensors,
        parameters=parameters,
        ternary_share=ternary / parameters,
        file_bytes=checkpoint.file_bytes,
        bits_per_weight=8 * sum(tensor.bytes for tensor in tensors) / parameters,
        linear_bits_per_weight=8 * sum(one.bytes for one in linear) / max(sum(one.parameters for one in linear), 1),
        kept_bytes=sum(tensor.bytes for tensor in tensors if tensor.kept),
        error_against=_error_against(checkpoint, original),
        energy=estimate_energy(checkpoint, tensors) if energy else None,
    )


def _is_kept(checkpoint: Checkpoint, tensor: TensorReport) -> bool:
    return tensor.hf_name.endswith(".weight") and tensor.hf_name.removesuffix(".weight") in checkpoint.kept


# ---- what rounding cost -------------------------------------------------------------------------------------------


def _with_errors(
    tensors: tuple[TensorReport, ...], checkpoint: Checkpoint, original: Checkpoint, reporter: Reporter
) -> Iterator[TensorReport]:
    """The tensors, the ternary ones with their distance from the original's."""
    require_same_shapes(original, checkpoint, [tensor.hf_name for tensor in tensors if tensor.ternary])
    reporter.stage(f"against {original.name}")
    for done, tensor in enumerate(tensors):
        reporter.advance(done, len(tensors))
        yield _with_error(tensor, checkpoint, original) if tensor.ternary else tensor
    reporter.advance(len(tensors), len(tensors))


def _with_error(tensor: TensorReport, checkpoint: Checkpoint, original: Checkpoint) -> TensorReport:
    weight = read_meant(checkpoint, tensor.hf_name)
    return replace(tensor, error=relative_distance(original.read_weight(tensor.hf_name), weight))


def _error_against(checkpoint: Checkpoint, original: Checkpoint | None) -> str | None:
    if original is not None:
        return original.name
    return "its own latent weights" if checkpoint.kind == "latent" else None


# ---- Hugging Face directories -------------------------------------------------------------------------------------


def _tensors(checkpoint: Checkpoint, reporter: Reporter) -> Iterator[TensorReport]:
    names = checkpoint.tensor_names()
    packed = {parts[0]: weight for weight, parts in checkpoint.packed.items()}
    beside = {part for parts in checkpoint.packed.values() for part in parts[1:]}  # told with the codes
    for done, name in enumerate(names):
        reporter.advance(done, len(names))
        if name in packed:
            yield replace(_packed(checkpoint, packed[name]), hf_name=packed[name])
        elif name not in beside:
            yield replace(_stored(checkpoint, name), hf_name=name)
    reporter.advance(len(names), len(names))


def _stored(checkpoint: Checkpoint, name: str) -> TensorReport:
    """A float tensor, which in a latent or baked checkpoint may mean a ternary one."""
    values, dtype = checkpoint.read(name), checkpoint.dtype(name)
    size = values.nbytes
    means_ternary = {"latent": "latent ternary", "baked": "ternary values"}.get(checkpoint.kind)
    if means_ternary and checkpoint.is_ternary_module(name.removesuffix(".weight")):
        rounded = ternarize(values, checkpoint.scaling)
        told = _ternary(name, f"{dtype}, {means_ternary}", size, rounded.codes, rounded.scale)
        latent = checkpoint.kind == "latent"
        return replace(told, error=relative_distance(values, rounded.dequantize())) if latent else told
    return _plain(name, dtype, size, values)


def _packed(checkpoint: Checkpoint, name: str) -> TensorReport:
    """Codes, in two bits or in floats, and what stands beside them."""
    codes, scale = checkpoint.unpack(name)
    nbytes = sum(checkpoint.read(part).nbytes for part in checkpoint.packed[name])
    return _ternary(name, f"{checkpoint.stored_as(name)}, packed ternary", nbytes, codes, scale)


# ---- GGUF ---------------------------------------------------------------------------------------------------------


def _gguf_tensors(checkpoint: Checkpoint, reporter: Reporter) -> Iterator[TensorReport]:
    tensors = open_gguf(checkpoint.path).tensors.values()
    hf_names = {tensor.name: name for name, tensor in open_weights(checkpoint.path).stored.items()}
    for done, tensor in enumerate(tensors):
        reporter.advance(done, len(tensors))
        yield replace(_gguf_tensor(tensor), hf_name=hf_names.get(tensor.name, ""))
    reporter.advance(len(tensors), len(tensors))


def _gguf_tensor(tensor: GgufTensor) -> TensorReport:
    """A tensor by what its bytes mean. A block whose codes are all 0 has lost its scale, and tells none."""
    kind, values = str(tensor.tensor_type.name), torch.from_numpy(tensor.values())
    ternary = next((known for known in TERNARY if known.name == kind), None)
    if ternary is None:
        return _plain(tensor.name, kind, tensor.n_bytes, values)
    weights_of_a_scale = values.numel() if ternary.trailer else ternary.block
    largest = values.view(-1, weights_of_a_scale).abs().amax(dim=-1)
    return _ternary(tensor.name, kind, tensor.n_bytes, values, largest[largest > 0])


# ---- one tensor ---------------------------------------------------------------------------------------------------


def _plain(name: str, kind: str, size: int, values: Tensor) -> TensorReport:
    """A tensor of floats, unless they turn out to be codes times scales."""
    if _holds_codes(values):
        largest = values.float().abs().amax(dim=-1)
        return _ternary(name, f"{kind}, ternary values", size, values, largest[largest > 0])
    return _report(name, kind, size, values, None)


def _ternary(name: str, kind: str, size: int, codes: Tensor, scale: Tensor) -> TensorReport:
    """A tensor that means codes and scales; of ``codes`` only the zeros count, so codes * scale will do."""
    scale = scale.double()
    summary = ScaleSummary(scale.numel(), 0.0, 0.0, 0.0)
    if scale.numel():
        summary = ScaleSummary(scale.numel(), float(scale.mean()), float(scale.min()), float(scale.max()))
    return _report(name, kind, size, codes, summary)


def _report(name: str, kind: str, size: int, values: Tensor, scale: ScaleSummary | None) -> TensorReport:
    count = values.numel()
    return TensorReport(
        name=name,
        type=kind,
        shape=tuple(values.shape),
        ternary=scale is not None,
        parameters=count,
        bytes=size,
        bits_per_weight=8 * size / max(count, 1),
        zero_fraction=1 - int(values.count_nonzero()) / max(count, 1),
        scale=scale,
    )


def _holds_codes(values: Tensor) -> bool:
    """Whether a matrix of floats is baked. A few rows tell for nearly all that are not, and spare the memory."""
    return values.dim() == 2 and is_baked(values[:8]) and bool(values.any()) and is_baked(values)


# ---- the model ----------------------------------------------------------------------------------------------------


def _metadata(checkpoint: Checkpoint) -> Metadata:
    told = _gguf_metadata(checkpoint) if checkpoint.kind == "gguf" else _directory_metadata(checkpoint)
    return told | lineage_metadata(checkpoint)


def _directory_metadata(checkpoint: Checkpoint) -> Metadata:
    told: Metadata = {key: checkpoint.config[key] for key in _SHOWN_CONFIG if key in checkpoint.config}
    quantization = checkpoint.config.get("quantization_config") or {}
    told |= {f"quantization.{key}": value for key, value in quantization.items() if isinstance(value, str)}
    return told | {"tokenizer.pre": _pre(checkpoint)}


def _pre(checkpoint: Checkpoint) -> str:
    """The name llama.cpp has for the pre-tokenizer, or why it has none: to be known before packing."""
    try:
        document = backend_json(checkpoint.tokenizer())
        return pre_tokenizer_of(document).name if vocabulary_model(document) == "gpt2" else "default (SentencePiece)"
    except BitconvertError as error:
        return f"none: {error.message}"


def _gguf_metadata(checkpoint: Checkpoint) -> Metadata:
    file = open_gguf(checkpoint.path)
    hidden = {name for name, value in file.fields.items() if isinstance(value, list)} | set(_HIDDEN_GGUF)
    return {name: value for name, value in file.fields.items() if name not in hidden}


def lineage_metadata(checkpoint: Checkpoint) -> Metadata:
    """What bitconvert recorded of a model that it made, or nothing."""
    lineage = checkpoint.lineage
    if lineage is None:
        return {}
    return {
        "lineage.source": lineage.source,
        "lineage.lam": lineage.lam,
        "lineage.scaling": str(lineage.scaling),
        "lineage.kept": ", ".join(lineage.kept),
        "lineage.tokens_seen": lineage.tokens_seen,
        "lineage.steps": lineage.steps,
    }
