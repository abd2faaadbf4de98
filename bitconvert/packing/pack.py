"""``bitconvert pack``: from a checkpoint whose weights mean ternary ones to files that stock runtimes load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bitconvert.errors import BitconvertError, UsageError
from bitconvert.models.checkpoint import Checkpoint
from bitconvert.packing.bitnet_directory import write_bitnet_directory
from bitconvert.packing.formats import FORMATS, Format, GgufFormat, find_format, formats_that_hold
from bitconvert.packing.formats.hf_bitnet import HfBitnet
from bitconvert.packing.gguf.hparams import require_expressible
from bitconvert.packing.gguf.vocabulary import vocabulary_of
from bitconvert.packing.gguf_file import EMBEDDING_TYPES, write_gguf
from bitconvert.packing.source import SourceTensor, source_tensors
from bitconvert.recipe import Scaling
from bitconvert.report import PackedFile, PackReport, Reporter

_ROUNDED = (
    "the weights were rounded without any training: a real model forgets what it knows (SmolLM2-135M goes from a "
    "perplexity of 22 to 170 million); this file is a baseline to compare with, not a model to use"
)


def pack(
    checkpoint: Checkpoint,
    formats: Sequence[str],
    output: Path,
    *,
    round_plain: bool = False,
    embedding_type: str = "f16",
    reporter: Reporter,
) -> PackReport:
    """Write a checkpoint in one or more formats, each file whole and read back.

    Everything that can be refused is refused before the first byte is written. Memory holds one tensor at a time.

    Args:
        checkpoint: the latent checkpoint that warmup wrote; a plain model only with ``round_plain``.
        formats: keys of ``FORMATS``.
        output: directory; gets ``<model>-TQ2_0.gguf`` and the like, and ``<model>-bitnet/`` for safetensors.
        round_plain: round a model that was never trained to be ternary, as a baseline.
        embedding_type: key of ``EMBEDDING_TYPES``, for the embeddings of GGUF files.
        reporter: told the progress, the fallbacks and the warnings.

    Raises:
        UsageError: no such format or embedding type.
        BitconvertError: the checkpoint is not ready, a format cannot hold it, or the output cannot be written.
    """
    chosen = [find_format(name) for name in dict.fromkeys(formats)]
    _require_embedding_type(embedding_type)
    warnings = _require_ternary(checkpoint, round_plain)
    tensors = source_tensors(checkpoint)
    for form in chosen:
        _require_scaling(form, checkpoint.scaling)
        _require_shapes(form, checkpoint.scaling, tensors)
        _require_replaceable(_target(checkpoint, form, output))
    for warning in warnings:
        reporter.warn(warning)
    files = [_write(checkpoint, tensors, form, output, embedding_type, reporter) for form in chosen]
    return PackReport(checkpoint.name, str(checkpoint.scaling), files, warnings)


def foresee_refusals(checkpoint: Checkpoint, formats: Sequence[str], scaling: Scaling) -> dict[str, str]:
    """What packing would refuse once a model is trained, so that it can be said before the training.

    Args:
        checkpoint: the original.
        formats: keys of ``FORMATS``.
        scaling: under which it will be trained.

    Returns:
        Format name -> reason, for the formats that will not do.

    Raises:
        UsageError: no such format.
    """
    chosen = [find_format(name) for name in dict.fromkeys(formats)]
    refusals = {form.name: reason for form in chosen if (reason := form.refusal(scaling))}
    gguf = [form.name for form in chosen if isinstance(form, GgufFormat)]
    if gguf and (reason := _gguf_refusal(checkpoint)):
        refusals |= dict.fromkeys(gguf, reason)
    return refusals


def _gguf_refusal(checkpoint: Checkpoint) -> str | None:
    """Why no GGUF file can hold this model's hyperparameters or vocabulary."""
    try:
        config = checkpoint.complete
        require_expressible(config, checkpoint.name)
        vocabulary_of(checkpoint.tokenizer(), config.vocab_size, checkpoint.config)
    except BitconvertError as error:
        return error.message
    return None


def _write(
    checkpoint: Checkpoint,
    tensors: list[SourceTensor],
    form: Format,
    output: Path,
    embedding_type: str,
    reporter: Reporter,
) -> PackedFile:
    target = _target(checkpoint, form, output)
    reporter.stage(f"packing {form.name}")
    if isinstance(form, GgufFormat):
        file = write_gguf(checkpoint, tensors, form, embedding_type, target, reporter)
    else:
        file = write_bitnet_directory(checkpoint, tensors, target, reporter)
    for note in file.fallback_notes():
        reporter.note(note)
    return file


def _target(checkpoint: Checkpoint, form: Format, output: Path) -> Path:
    model = checkpoint.base_name
    return output / (f"{model}-{form.type.name}.gguf" if isinstance(form, GgufFormat) else f"{model}-bitnet")


# ---- what is refused -------------------------------------------------------------------------------------------------


def _require_embedding_type(name: str) -> None:
    if name not in EMBEDDING_TYPES:
        raise UsageError(f"unknown embedding type '{name}'", f"embedding types: {', '.join(EMBEDDING_TYPES)}")


def _require_ternary(checkpoint: Checkpoint, round_plain: bool) -> list[str]:
    """Refuse weights that are not, or no longer, latents of ternary ones; what must be said about the others."""
    if checkpoint.kind == "packed" or (checkpoint.kind == "gguf" and checkpoint.lineage is not None):
        raise BitconvertError(
            f"{checkpoint.name}: already packed", "pack the latent checkpoint that warmup wrote, in all formats at once"
        )
    if checkpoint.kind == "gguf":
        raise BitconvertError(
            f"{checkpoint.name}: GGUF files are not packed", "run `bitconvert warmup` on it, then pack what that makes"
        )
    if checkpoint.lineage is not None and checkpoint.lineage.lam < 1:
        raise BitconvertError(
            f"{checkpoint.name}: not ternary yet, its training stopped at λ = {checkpoint.lineage.lam:.3g}",
            "warm the original up until λ is 1, then pack",
        )
    if checkpoint.kind == "latent":
        return []
    if not round_plain:
        raise BitconvertError(
            f"{checkpoint.name}: never trained to be ternary, so rounding would ruin it",
            "run `bitconvert warmup` first, or pass --round for the naive baseline",
        )
    return [_ROUNDED]


def _require_replaceable(target: Path) -> None:
    """A packed model that is there already may be replaced; a directory of anything else may not."""
    if not target.is_dir() or not any(target.iterdir()):
        return
    config = target / "config.json"
    if not config.exists() or '"bitnet"' not in config.read_text(encoding="utf-8", errors="replace"):
        raise UsageError(f"{target}: exists, and is no packed model", "choose another --output, or remove it")


def _require_scaling(form: Format, scaling: Scaling) -> None:
    reason = form.refusal(scaling)
    if reason is None:
        return
    able = ", ".join(formats_that_hold(scaling))
    raise BitconvertError(
        f"format {form.name} cannot hold scales per {scaling.granularity}: {reason}",
        f"formats that can: {able}" if able else "no format can: train with a group that is a multiple of 64",
    )


def _require_shapes(form: Format, scaling: Scaling, tensors: list[SourceTensor]) -> None:
    group = scaling.group_size or 1
    for tensor in tensors:
        if not tensor.ternary:
            continue
        if tensor.shape[-1] % group:
            raise BitconvertError(
                f"tensor {tensor.name}: its rows of {tensor.shape[-1]} do not divide into groups of {group}",
                "the checkpoint's bitconvert.json does not belong to its weights",
            )
        reason = form.shape_refusal(tensor.shape) if isinstance(form, HfBitnet) else None
        if reason is not None:
            gguf = ", ".join(name for name, row in FORMATS.items() if row.container == "gguf")
            raise BitconvertError(f"tensor {tensor.name} cannot be packed as {form.name}: {reason}", f"use {gguf}")
