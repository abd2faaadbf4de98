"""What lies beside the files: a model card for people, a Modelfile for Ollama."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from gguf import TokenType
from huggingface_hub import ModelCardData

from bitconvert.models.checkpoint import HUB_ID
from bitconvert.models.gguf_file import SHARD_NAME
from bitconvert.models.lineage import HeldOut, Origin, library_versions
from bitconvert.packing.formats import FORMATS, runs_in
from bitconvert.packing.job import PackJob
from bitconvert.report.evaluation import EvalReport
from bitconvert.report.packing import PackedFile

CARD = "README.md"
MODELFILE = "Modelfile"

_OUR_TAG = "bitconvert"
_RECIPE = "recipe.yaml"

_OLLAMA_READS = ("q2_0", "q8_0", "f16", "bf16")
"""Formats whose tensor types Ollama's own GGUF parser knows, the smallest first. It refuses TQ1_0 and TQ2_0 ("size
overflows"), and Q2_0 in versions of before autumn 2026 (ollama/fs/gguf/tensor.go)."""

_OLLAMA_CONTEXT = 4096  # Ollama's own default; more than the model was made for would be nonsense


def write_companions(
    job: PackJob, files: list[PackedFile], origin: Origin, measured: Sequence[EvalReport] = ()
) -> list[Path]:
    """Write the card, and the Modelfile if Ollama reads one of the files.

    Args:
        job: what was packed.
        files: what came of it.
        origin: the files that were packed.
        measured: some of them, on one text, against the original.

    Returns:
        What was written.
    """
    written = [_write(job.directory / CARD, model_card(job, files, origin, measured))]
    if content := modelfile(job, files):
        written.append(_write(job.directory / MODELFILE, content))
    return written


def model_card(job: PackJob, files: list[PackedFile], origin: Origin, measured: Sequence[EvalReport] = ()) -> str:
    """Markdown with a YAML header that the Hugging Face hub understands: what the files are, cost, and run in."""
    sections = [
        f"---\n{_header(job)}\n---",
        f"# {job.checkpoint.base_name} at 1.58 bits",
        _origin(job),
        f"## Files\n\n{_file_table(job, files)}",
        _kept(job, files),
        _cost(job),
        _measured(job, measured),
        f"## How to run\n\n{_usage(job, files)}",
        _training(job),
        _hashes(job, origin),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def modelfile(job: PackJob, files: list[PackedFile]) -> str:
    """What ``ollama create NAME -f Modelfile`` reads; empty if Ollama reads none of the files."""
    whole = (file for file in files if not SHARD_NAME.fullmatch(Path(file.path).name))  # Ollama takes no shards
    readable = {file.format: file for file in whole if file.format in _OLLAMA_READS}
    best = next((readable[name] for name in _OLLAMA_READS if name in readable), None)
    if best is None:
        return ""
    vocabulary, stop = job.vocabulary, []
    end = vocabulary.special_ids.get("eos")
    if end is not None and vocabulary.types[end] == TokenType.CONTROL:  # others are text that an answer may hold
        stop = [f'PARAMETER stop "{vocabulary.tokens[end]}"']
    lines = [
        f"# ollama create {job.checkpoint.base_name.lower()} -f {MODELFILE}",
        f"FROM ./{_relative(job, best.path)}",
        f"PARAMETER num_ctx {min(job.checkpoint.max_context, _OLLAMA_CONTEXT)}",
        *stop,
        *([f"# {best.note}"] if best.note else []),
    ]
    return "\n".join(lines) + "\n"


# ---- the card's parts ------------------------------------------------------------------------------------------------


def _header(job: PackJob) -> str:
    source = _source(job)
    data = ModelCardData(
        base_model=source if re.fullmatch(HUB_ID, source) else None,
        license=job.checkpoint.license or None,
        pipeline_tag="text-generation",
        tags=["ternary", "bitnet", "1.58-bit", _OUR_TAG],
    )
    return str(data.to_yaml())


def _source(job: PackJob) -> str:
    """What the model was made from: a hub id, or the name of a file or directory, but not the way to it."""
    checkpoint = job.checkpoint
    if checkpoint.lineage:
        named = checkpoint.lineage.source
    else:
        named = checkpoint.baked.source if checkpoint.baked else checkpoint.name
    return named if re.fullmatch(HUB_ID, named) and not Path(named).exists() else Path(named).name


def _origin(job: PackJob) -> str:
    made = f"Made from {_source(job)} by bitconvert {library_versions()['bitconvert']}"
    if job.checkpoint.kind == "plain":
        return (
            f"{made} by rounding alone, without any training: a baseline to compare with. Such a model has forgotten "
            "what the original knew."
        )
    trained = ", and were trained with int8 activations" if job.checkpoint.lineage else ""
    all_but = f", all but {len(job.checkpoint.kept)}," if job.checkpoint.kept else ""
    return (
        f"{made}: the linear layers of every block{all_but} are ternary ({{-1, 0, +1}} times a scale, "
        f"{job.scaling}){trained}."
    )


def _file_table(job: PackJob, files: list[PackedFile]) -> str:
    rows = [
        f"| `{_relative(job, file.path)}` | {file.nbytes / 1e6:.1f} MB | {file.bits_per_weight:.2f} "
        f"({_linear_bits(file)}) | {_runs_in(file)} |"
        for file in files
    ]
    return "\n".join(["| file | size | bits per weight | runs in |", "|---|---|---|---|", *rows])


def _runs_in(file: PackedFile) -> str:
    return runs_in(FORMATS[file.format], {tensor.type for tensor in file.tensors if tensor.ternary})


def _linear_bits(file: PackedFile) -> str:
    with_kept = f", {file.linear_bits_per_weight:.2f} with the kept ones" if file.kept else ""
    return f"{file.ternary_bits_per_weight:.2f} in the ternary layers{with_kept}"


def _kept(job: PackJob, files: list[PackedFile]) -> str:
    """Which matrices are not ternary, and what that costs."""
    modules = job.checkpoint.kept
    if not modules:
        return ""
    rows = [
        f"| `{_relative(job, file.path)}` | {', '.join(dict.fromkeys(tensor.type for tensor in file.kept))} "
        f"| {file.kept_bytes / 1e6:.2f} MB | {file.kept_bytes / file.nbytes:.1%} |"
        for file in files
    ]
    return "\n".join(
        [
            f"## Kept from being ternary\n\n{', '.join(f'`{module}`' for module in modules)}\n",
            "| file | stored as | they take | of the file |\n|---|---|---|---|",
            *rows,
        ]
    )


def _cost(job: PackJob) -> str:
    lineage = job.checkpoint.lineage
    if lineage is None or lineage.held_out is None:
        return ""
    ppl: HeldOut = lineage.held_out
    return (
        "## What it costs\n\n| perplexity on held-out text | |\n|---|---|\n"
        f"| {_source(job)} | {ppl.original:.2f} |\n"
        f"| the same, rounded without training | {ppl.rounded:.4g} |\n"
        f"| this model | {ppl.ternary:.2f} (ratio {ppl.ternary / ppl.original:.2f}) |"
    )


def _measured(job: PackJob, measured: Sequence[EvalReport]) -> str:
    """What the files themselves are worth, on text that was held out of the training."""
    rows = [
        f"| `{_relative(job, report.model)}` | {ppl.ppl:.3f} ± {ppl.stderr:.3f} | {against.ppl_ratio:.4f} | "
        f"{against.kl:.4f} ± {against.kl_stderr:.4f} | {against.top1_agreement:.1%} |"
        for report in measured
        if (ppl := report.perplexity) and (against := report.comparison)
    ]
    if not rows:
        return ""
    ppl, against = measured[0].perplexity, measured[0].comparison
    assert ppl
    assert against
    return "\n".join(
        [
            f"## Measured against the original\n\n{ppl.tokens_scored:,} tokens of held-out text in windows of "
            f"{ppl.context}, the files themselves through torch; {_source(job)}: ppl {against.original_ppl:.3f}. "
            "KL(original \\|\\| file) in nats per token; agreement: of the likeliest tokens.\n",
            "| file | ppl | ratio | KL | agreement |\n|---|---|---|---|---|",
            *rows,
        ]
    )


def _usage(job: PackJob, files: list[PackedFile]) -> str:
    return "\n\n".join(_usage_of(_relative(job, file.path), file) for file in files)


def _usage_of(path: str, file: PackedFile) -> str:
    parts = [f"`{path}`:", FORMATS[file.format].usage(path), file.note]
    return "\n\n".join(part for part in parts if part)


def _training(job: PackJob) -> str:
    lineage = job.checkpoint.lineage
    if lineage is None:
        return ""
    versions = ", ".join(f"{name} {version}" for name, version in lineage.versions.items())
    recipe = job.checkpoint.path / _RECIPE
    shown = (
        f"\n\n```yaml\n{recipe.read_text(encoding='utf-8', errors='replace').rstrip()}\n```" if recipe.is_file() else ""
    )
    return (
        f"## How it was made\n\n{lineage.tokens_seen:,} tokens in {lineage.steps:,} steps, seed {lineage.seed}, on "
        f"{lineage.data or 'unknown text'}, with {versions}.{shown}"
    )


def _hashes(job: PackJob, origin: Origin) -> str:
    """Which bytes it was made from, so that anybody can tell whether they have the same."""
    lineage = job.checkpoint.lineage
    of = {f"{job.checkpoint.base_name}, packed here": origin}
    if lineage is not None:
        of = {f"{_source(job)}, the original": lineage.origin, "texts": Origin(files=_names(lineage.data_files)), **of}
    rows = [
        f"| {what}{f' at {made.revision}' if made.revision else ''} | `{name}` | `{digest}` |"
        for what, made in of.items()
        for name, digest in made.files.items()
    ]
    return "\n".join(
        [
            "## Made from\n\n`SHA256SUMS` holds the hashes of the files here; these are of what they were made from.\n",
            "| | file | SHA-256 |\n|---|---|---|",
            *rows,
        ]
    )


def _names(files: Mapping[str, str]) -> dict[str, str]:
    """Without the way to them, which is nobody's business."""
    return {Path(path).name: digest for path, digest in files.items()}


def _relative(job: PackJob, path: str) -> str:
    return Path(path).relative_to(job.output).as_posix()


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path
