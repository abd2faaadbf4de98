"""``bitconvert pack``: from a checkpoint whose weights mean ternary ones to files that stock runtimes load."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from bitconvert.atomic import atomic_directory
from bitconvert.errors import BitconvertError, UsageError
from bitconvert.models.checkpoint import Checkpoint
from bitconvert.models.manifest import require_free, write_manifest
from bitconvert.packing.companions import write_companions
from bitconvert.packing.fill import fill
from bitconvert.packing.formats import FORMATS, Format, find_format, formats_that_hold, runs_in
from bitconvert.packing.gguf_file import GgufFile
from bitconvert.packing.job import Container, PackJob
from bitconvert.packing.onnx_directory import OnnxDirectory
from bitconvert.packing.safetensors_directory import SafetensorsDirectory
from bitconvert.packing.source import meant_tensors, promised_tensors
from bitconvert.recipe import Packing, Scaling
from bitconvert.report.evaluation import EvalReport
from bitconvert.report.packing import ForeseenFile, PackedFile, PackReport
from bitconvert.report.reporter import Reporter, Silent

CONTAINERS: Mapping[str, Container[Any]] = {
    "gguf": GgufFile(),
    "directory": SafetensorsDirectory(),
    "onnx": OnnxDirectory(),
}
"""What carries out a format, by ``Format.container``."""

EVERY_FORMAT = "all"

_NOWHERE = Path(os.devnull)
"""Output of a job that is only asked about."""

_ROUNDED = (
    "the weights were rounded without any training: a real model forgets what it knows (SmolLM2-135M goes from a "
    "perplexity of 22 to 170 million); this file is a baseline to compare with, not a model to use"
)


def pack(
    checkpoint: Checkpoint,
    options: Packing,
    output: Path,
    *,
    round_plain: bool = False,
    overwrite: bool = False,
    reporter: Reporter,
) -> PackReport:
    """Write a checkpoint in one or more formats, each file whole and read back, into a directory that appears at once.

    Everything that can be refused is refused before the first byte is written. Each tensor is read once, whatever the
    number of formats, and memory holds a few at a time: see ``fill``.

    Args:
        checkpoint: the latent checkpoint that warmup wrote, or what unpack made; a plain model with ``round_plain``.
        options: the formats (keys of ``FORMATS``, or "all" for those that can hold this model) and their variants.
        output: directory to make; gets ``<model>-TQ2_0.gguf`` and the like, ``<model>-bitnet/`` for safetensors, a
            model card, a Modelfile where Ollama reads one of the files, and the hashes of all these.
        round_plain: round a model that was never trained to be ternary, as a baseline.
        overwrite: replace what an earlier run wrote to ``output``.
        reporter: told the progress, the fallbacks and the warnings.

    Raises:
        UsageError: no such format or option, or the output is there already.
        BitconvertError: the checkpoint is not ready, a format cannot hold it, or the output cannot be written.
    """
    asked = _formats(options)
    require_free(output, overwrite=overwrite, source=checkpoint.path)
    warnings = _require_ternary(checkpoint, round_plain)
    job = PackJob(checkpoint, meant_tensors(checkpoint), checkpoint.scaling, options, output, _NOWHERE, reporter)
    refusals = _refusals(job, asked)
    able = [form for form in asked if form.name not in refusals]
    if refusals and (EVERY_FORMAT not in options.formats or not able):
        raise next(iter(refusals.values()))
    if any(form.container == "gguf" for form in able):
        warnings += job.vocabulary.caveats
    for warning in warnings:
        reporter.warn(warning)
    with atomic_directory(output, overwrite=overwrite) as directory:
        job = replace(job, directory=directory)
        files = _write(job, able)
        origin = checkpoint.origin()
        companions = [*write_companions(job, files, origin), write_manifest(directory)]
    reasons = {name: error.message for name, error in refusals.items()}
    placed = [str(output / path.relative_to(directory)) for path in companions]
    return PackReport(checkpoint.name, str(job.scaling), files, warnings, reasons, placed, origin.files)


def foresee_refusals(checkpoint: Checkpoint, options: Packing, scaling: Scaling) -> dict[str, str]:
    """What packing would refuse once a model is trained, so that it can be said before the training.

    Args:
        checkpoint: the original; its config is enough.
        options: the formats, and their variants.
        scaling: under which it will be trained.

    Returns:
        Format name -> reason, for the formats that will not do.

    Raises:
        UsageError: no such format or option.
    """
    job = _foreseen(checkpoint, options, scaling)
    return {name: error.message for name, error in _refusals(job, _formats(options)).items()}


def foresee_files(checkpoint: Checkpoint, options: Packing, scaling: Scaling) -> list[ForeseenFile]:
    """How large a trained model's files will be, by the plans that the writers themselves follow.

    Args:
        checkpoint: as for ``foresee_refusals``, like all that follows.
        options: the formats that are wanted, and the variants of all.
        scaling: under which it will be trained.

    Returns:
        One per format that there is, with its size, or the reason why it will not do.

    Raises:
        UsageError: no such format or option.
    """
    wanted, job = {form.name for form in _formats(options)}, _foreseen(checkpoint, options, scaling)
    refusals = _refusals(job, list(FORMATS.values()))
    return [_foreseen_file(job, form, form.name in wanted, refusals.get(form.name)) for form in FORMATS.values()]


def _foreseen_file(job: PackJob, form: Format, wanted: bool, refusal: BitconvertError | None) -> ForeseenFile:
    if refusal is not None:
        return ForeseenFile(form.name, wanted, nbytes=None, refusal=refusal.message, runs_in=form.runs_in)
    container = CONTAINERS[form.container]
    nbytes, types = container.nbytes(job, form), container.types(job, form)
    return ForeseenFile(form.name, wanted, nbytes, refusal="", runs_in=runs_in(form, types))


def _foreseen(checkpoint: Checkpoint, options: Packing, scaling: Scaling) -> PackJob:
    tensors = promised_tensors(checkpoint)
    return PackJob(checkpoint, tensors, scaling, options, _NOWHERE, _NOWHERE, Silent(), foreseen=True)


def write_measured_card(
    checkpoint: Checkpoint,
    options: Packing,
    output: Path,
    files: list[PackedFile],
    measured: Sequence[EvalReport],
    reporter: Reporter,
) -> None:
    """Write the card of packed files again, with what was measured on them since.

    Args:
        checkpoint: as for ``pack``, like all that follows.
        options: as they were packed.
        output: where they lie.
        files: what ``pack`` reported.
        measured: some of them, on one text, against the original.
        reporter: told the progress.
    """
    job = PackJob(checkpoint, meant_tensors(checkpoint), checkpoint.scaling, options, output, output, reporter)
    write_companions(job, files, checkpoint.origin(), measured)
    write_manifest(output)


def _write(job: PackJob, forms: Sequence[Format]) -> list[PackedFile]:
    """All outputs from one reading of the weights."""
    job.reporter.stage(f"packing {', '.join(form.name for form in forms)}")
    with ExitStack() as stack:
        outputs = [stack.enter_context(CONTAINERS[form.container].open(job, form)) for form in forms]
        fill(job, outputs)
        files = [output.finish() for output in outputs]
    for file in files:
        for note in file.notes():
            job.reporter.note(note)
    return files


def _formats(options: Packing) -> list[Format]:
    if EVERY_FORMAT in options.formats:
        return list(FORMATS.values())
    return [find_format(name) for name in dict.fromkeys(options.formats)]


# ---- what is refused -------------------------------------------------------------------------------------------------


def _require_ternary(checkpoint: Checkpoint, round_plain: bool) -> list[str]:
    """Refuse weights that are not, or no longer, latents of ternary ones; what must be said about the others."""
    if checkpoint.kind == "packed" or (checkpoint.kind == "gguf" and checkpoint.lineage is not None):
        raise BitconvertError(
            f"{checkpoint.name}: already packed",
            "pack the latent checkpoint that warmup wrote, or what `bitconvert unpack` makes of this file",
        )
    if checkpoint.kind == "gguf":
        raise BitconvertError(
            f"{checkpoint.name}: GGUF files are not packed",
            "run `bitconvert warmup` on it, or `bitconvert unpack` if it is ternary, then pack what that makes",
        )
    if checkpoint.lineage is not None and checkpoint.lineage.lam < 1:
        raise BitconvertError(
            f"{checkpoint.name}: not ternary yet, its training stopped at λ = {checkpoint.lineage.lam:.3g}",
            "warm the original up until λ is 1, then pack",
        )
    if checkpoint.kind in ("latent", "baked"):
        return []
    if not round_plain:
        raise BitconvertError(
            f"{checkpoint.name}: never trained to be ternary, so rounding would ruin it",
            "run `bitconvert warmup` first, or pass --round for the naive baseline",
        )
    return [_ROUNDED]


def _refusals(job: PackJob, forms: Sequence[Format]) -> dict[str, BitconvertError]:
    """Why some of the formats cannot hold this model, by name."""
    return {form.name: error for form in forms if (error := _refusal(job, form))}


def _refusal(job: PackJob, form: Format) -> BitconvertError | None:
    try:
        _require_scaling(job, form)
        CONTAINERS[form.container].require(job, form)
    except UsageError:
        raise  # by whatever format, it is the command line that is wrong
    except BitconvertError as error:
        return error
    return None


def _require_scaling(job: PackJob, form: Format) -> None:
    if reason := form.refusal(job.scaling):
        raise BitconvertError(
            f"format {form.name} cannot hold scales per {job.scaling.granularity}: {reason}",
            f"formats that can: {', '.join(formats_that_hold(job.scaling))}",
        )
    group = job.scaling.group_size or 1
    for tensor in job.tensors:
        if tensor.ternary and tensor.shape[-1] % group:
            raise BitconvertError(
                f"tensor {tensor.name}: its rows of {tensor.shape[-1]} do not divide into groups of {group}",
                "the checkpoint's bitconvert.json does not belong to its weights",
            )
