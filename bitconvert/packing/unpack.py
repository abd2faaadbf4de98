"""``bitconvert unpack``: from a file of ternary weights back to a Hugging Face directory of floats that are ternary.

Such a directory is *baked*: each linear holds codes * scale. Stock transformers loads it as a plain model; ``eval``,
``pack`` and ``warmup`` know from its ``baked.json`` what it is. What makes a file ternary are its values: it does not
matter which program wrote it, in which type.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from bitconvert.atomic import atomic_directory
from bitconvert.errors import BitconvertError
from bitconvert.models.baked import Baked
from bitconvert.models.checkpoint import Checkpoint, require_alive
from bitconvert.models.manifest import require_free, write_manifest
from bitconvert.models.safetensors_file import SafetensorsFile, TensorSpec
from bitconvert.packing.directory import copy_companions, write_config
from bitconvert.packing.formats import formats_that_hold
from bitconvert.packing.readback import ReadBack
from bitconvert.packing.source import SourceTensor, meant_tensors, read_ternary, with_progress
from bitconvert.recipe import Scaling
from bitconvert.report.packing import UnpackReport
from bitconvert.report.reporter import Reporter
from bitconvert.ternary.quantize import GRANULARITIES, is_baked

_WEIGHTS = "model.safetensors"
_DTYPE = torch.float32
"""float16 holds codes * scale of our own files, but not the scales and embeddings of every file of others."""


def unpack(checkpoint: Checkpoint, output: Path, *, overwrite: bool = False, reporter: Reporter) -> UnpackReport:
    """Write the ternary weights that a file means as plain floats. Memory holds one tensor at a time.

    Packing the directory again gives the bytes of a file that bitconvert packed: codes, scales and metadata are kept.

    Args:
        checkpoint: a packed directory, a GGUF file, or a plain directory of ternary weights, by whatever program; or a
            latent checkpoint, which is rounded.
        output: the directory to make.
        overwrite: replace what an earlier run wrote to ``output``.
        reporter: told the progress, and what to know of the result.

    Raises:
        UsageError: ``output`` is there already.
        BitconvertError: a linear is not ternary, the file is damaged, or the output cannot be written.
    """
    started = time.monotonic()
    _require_packed(checkpoint)
    require_free(output, overwrite=overwrite, source=checkpoint.path)
    reporter.stage(f"unpacking {checkpoint.name}")
    tensors = meant_tensors(checkpoint)
    with atomic_directory(output, overwrite=overwrite) as directory:
        scaling = _write_weights(checkpoint, tensors, directory / _WEIGHTS, ReadBack(output), reporter)
        write_config(checkpoint, directory, {})
        _write_companions(checkpoint, directory)
        Baked(
            title=checkpoint.title,
            source=checkpoint.unpinned_name,
            origin=checkpoint.origin(),
            license=checkpoint.license,
            scaling=scaling,
        ).save(directory)
        write_manifest(directory)
        nbytes = (directory / _WEIGHTS).stat().st_size
    _tell(checkpoint, output, reporter)
    return UnpackReport(
        model=checkpoint.name,
        kind=checkpoint.kind,
        output=str(output),
        scaling=str(scaling),
        ternary_parameters=sum(math.prod(tensor.shape) for tensor in tensors if tensor.ternary),
        nbytes=nbytes,
        formats=formats_that_hold(scaling),
        seconds=time.monotonic() - started,
    )


def _tell(checkpoint: Checkpoint, output: Path, reporter: Reporter) -> None:
    if checkpoint.kind == "latent":
        reporter.note(f"{output} holds what the latents round to; to train on, start from {checkpoint.name} itself")
    if checkpoint.kind == "gguf":
        reporter.note(
            "eval rounds the directory's activations as training does, to int8 with one scale per token; the runtimes "
            "of the GGUF file round them in blocks, or not at all"
        )


# ---- what is refused -------------------------------------------------------------------------------------------------


def _require_packed(checkpoint: Checkpoint) -> None:
    if checkpoint.kind == "baked":
        raise BitconvertError(f"{checkpoint.name}: unpacked already", "it can be evaluated, trained on and packed")
    if checkpoint.kind == "latent" and checkpoint.lineage is not None and checkpoint.lineage.lam < 1:
        raise BitconvertError(
            f"{checkpoint.name}: not ternary yet, its training stopped at λ = {checkpoint.lineage.lam:.3g}",
            "warm the original up until λ is 1",
        )


def _not_ternary(checkpoint: Checkpoint, name: str) -> BitconvertError:
    return BitconvertError(
        f"{checkpoint.name}: tensor {name} ({checkpoint.stored_as(name)}) is not ternary",
        "only models whose linears all are can be unpacked; `bitconvert warmup` makes such models",
    )


# ---- to disk and back ------------------------------------------------------------------------------------------------


def _write_weights(
    checkpoint: Checkpoint, tensors: list[SourceTensor], path: Path, expected: ReadBack, reporter: Reporter
) -> Scaling:
    """Stream the tensors to a file and find out which weights share a scale; the linears first, to refuse soon."""
    shared = list(GRANULARITIES) if checkpoint.lineage is None else [checkpoint.lineage.scaling.granularity]
    ordered = sorted(tensors, key=lambda tensor: not tensor.ternary)
    with SafetensorsFile(path, {tensor.name: TensorSpec(_DTYPE, tensor.shape) for tensor in tensors}) as file:
        for tensor in with_progress(ordered, reporter):
            values = _values(checkpoint, tensor)
            if tensor.ternary:
                require_alive(checkpoint.name, tensor.name, values)
                shared = [granularity for granularity in shared if is_baked(values, granularity)]
                if not shared:
                    raise _not_ternary(checkpoint, tensor.name)
            file.write(tensor.name, values)
            expected.expect(tensor.name, values.numpy())
    _read_back(path, expected)
    return checkpoint.scaling.model_copy(update={"granularity": shared[0]})


def _values(checkpoint: Checkpoint, tensor: SourceTensor) -> Tensor:
    if tensor.ternary and checkpoint.kind == "latent":
        return read_ternary(checkpoint, tensor.name).dequantize()
    return checkpoint.read_weight(tensor.name).contiguous()


def _read_back(path: Path, expected: ReadBack) -> None:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dictionary
            expected.check(name, [file.get_tensor(name).numpy()])
    expected.finish()


def _write_companions(checkpoint: Checkpoint, directory: Path) -> None:
    """Tokenizer and lineage: copied, or from the metadata of a GGUF file."""
    if checkpoint.kind != "gguf":
        copy_companions(checkpoint.path, directory)
        return
    checkpoint.tokenizer().save_pretrained(directory)
    if checkpoint.lineage is not None:
        checkpoint.lineage.save(directory)
