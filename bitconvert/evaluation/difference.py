"""``bitconvert inspect A B``: what differs between two models in whatever files: metadata, tensors, codes, scales."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from bitconvert.errors import BitconvertError
from bitconvert.evaluation.inspect import Metadata, lineage_metadata
from bitconvert.evaluation.weights import read_meant, relative_distance, row_pairs
from bitconvert.models.checkpoint import Checkpoint, open_checkpoint
from bitconvert.report.inspection import CodeChanges, DifferenceReport, Scalar, TensorDifference
from bitconvert.report.reporter import Reporter, Silent
from bitconvert.ternary.quantize import is_baked

_OF_THE_CONTAINER = {
    "_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "quantization_config",
}
"""Keys of a config that tell how a model is stored, not what it is."""


def difference(first: str, second: str, reporter: Reporter | None = None) -> DifferenceReport:
    """Compare two models tensor by tensor, as they compute: latent weights are rounded, codes and blocks decoded.

    No more than one tensor of each is in memory.

    Args:
        first: hub id, Hugging Face directory (plain, latent, baked or packed) or GGUF file.
        second: another one.
        reporter: told about the progress.

    Raises:
        BitconvertError: one of them cannot be read.
    """
    reporter = reporter or Silent()
    both = open_checkpoint(first), open_checkpoint(second)
    theirs, ours = (checkpoint.weights() for checkpoint in both)
    common = [name for name in theirs if name in ours]
    reporter.stage(f"compare {first} with {second}")
    found = list(_compared(both, [name for name in common if theirs[name] == ours[name]], reporter))
    return DifferenceReport(
        models=(first, second),
        kinds=(both[0].kind, both[1].kind),
        metadata=_different_metadata(*both),
        only_in_first=tuple(name for name in theirs if name not in ours),
        only_in_second=tuple(name for name in ours if name not in theirs),
        shapes={name: (theirs[name], ours[name]) for name in common if theirs[name] != ours[name]},
        tensors=tuple(one.told for one in found if not one.same),
        same_tensors=sum(one.same for one in found),
        changed_codes=_changed_codes([one.told for one in found]),
    )


# ---- tensors ------------------------------------------------------------------------------------------------------


class _Compared(NamedTuple):
    """What differs in a tensor, and whether nothing does."""

    told: TensorDifference
    same: bool


def _compared(both: tuple[Checkpoint, Checkpoint], names: list[str], reporter: Reporter) -> Iterator[_Compared]:
    for done, name in enumerate(names):
        reporter.advance(done, len(names))
        first, second = (read_meant(checkpoint, name) for checkpoint in both)
        told = TensorDifference(
            name=name,
            types=(both[0].stored_as(name), both[1].stored_as(name)),
            parameters=first.numel(),
            relative=relative_distance(first, second),
            codes=_code_changes(first, second) if _is_ternary(first) and _is_ternary(second) else None,
        )
        yield _Compared(told, first.equal(second))
    reporter.advance(len(names), len(names))


def _is_ternary(weight: Tensor) -> bool:
    """Whether a weight is codes times scales, of whatever granularity: a scale per tensor is one per row, too.

    The first rows tell for nearly all that are not, and spare the memory.
    """
    granularity = "row" if weight.shape[-1] % 32 else "group:32"
    return weight.dim() == 2 and is_baked(weight[:8], granularity) and is_baked(weight, granularity)


def _code_changes(first: Tensor, second: Tensor) -> CodeChanges:
    """How the codes, which are the signs, differ between two ternary weights."""
    flips = to_zero = from_zero = 0
    sums, counts = [0.0, 0.0], [0, 0]
    for pair in row_pairs(first, second):
        before, after = (rows.sign() for rows in pair)
        flips += int((before * after < 0).count_nonzero())
        to_zero += int(((before != 0) & (after == 0)).count_nonzero())
        from_zero += int(((before == 0) & (after != 0)).count_nonzero())
        sums = [total + float(rows.double().abs().sum()) for total, rows in zip(sums, pair, strict=True)]
        counts = [count + int(rows.count_nonzero()) for count, rows in zip(counts, pair, strict=True)]
    return CodeChanges(
        changed=(flips + to_zero + from_zero) / first.numel(),
        sign_flips=flips / first.numel(),
        to_zero=to_zero / first.numel(),
        from_zero=from_zero / first.numel(),
        scale_ratio=(sums[1] / counts[1]) / (sums[0] / counts[0]) if all(counts) else None,
    )


def _changed_codes(tensors: list[TensorDifference]) -> float | None:
    """Share of all codes that are not the same."""
    ternary = [(tensor.parameters, tensor.codes.changed) for tensor in tensors if tensor.codes]
    if not ternary:
        return None
    return sum(count * changed for count, changed in ternary) / sum(count for count, _ in ternary)


# ---- metadata -----------------------------------------------------------------------------------------------------


def _different_metadata(first: Checkpoint, second: Checkpoint) -> dict[str, tuple[Scalar | None, Scalar | None]]:
    theirs, ours = _metadata(first, second), _metadata(second, first)
    keys = dict.fromkeys((*theirs, *ours))
    return {key: (theirs.get(key), ours.get(key)) for key in keys if theirs.get(key) != ours.get(key)}


def _metadata(checkpoint: Checkpoint, other: Checkpoint) -> Metadata:
    """What a model says of itself, under the names that config.json uses.

    A GGUF file has no place for some keys of a config, so that only what both can say is compared with it.
    """
    said = checkpoint.config.keys() | other.config.keys()
    if "gguf" in (checkpoint.kind, other.kind):
        said = checkpoint.config.keys() & other.config.keys()
    config = checkpoint.complete.to_dict()
    told = {key: _in_words(config[key]) for key in sorted(said - _OF_THE_CONTAINER) if config.get(key) is not None}
    about = {"license": checkpoint.license, "tokenizer": _tokenizer(checkpoint)}
    return told | about | lineage_metadata(checkpoint)


def _in_words(value: Any) -> Scalar:
    return value if isinstance(value, Scalar) else json.dumps(value, sort_keys=True, default=str)


def _tokenizer(checkpoint: Checkpoint) -> str:
    """Its vocabulary, so that two that differ in one token are told apart."""
    try:
        vocabulary = checkpoint.tokenizer().get_vocab()
    except BitconvertError as error:
        return f"none: {error.message}"
    digest = hashlib.sha256(json.dumps(vocabulary, sort_keys=True).encode()).hexdigest()
    return f"{len(vocabulary)} tokens, sha256 {digest[:16]}…"
