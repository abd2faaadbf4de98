"""Which type each tensor of a GGUF file gets, decided before anything is written."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from bitconvert.errors import BitconvertError, UsageError
from bitconvert.models import gguf_types
from bitconvert.models.gguf_tensors import gguf_names
from bitconvert.models.gguf_types import GgufType
from bitconvert.models.llama_cpp_library import find_library
from bitconvert.packing.formats import FALLBACKS, GgufFormat
from bitconvert.packing.formats.base import Demands
from bitconvert.packing.job import PackJob
from bitconvert.packing.source import EMBEDDING, HEAD, SourceTensor
from bitconvert.recipe import Packing

PLAIN_TYPES = {
    kind.name.lower(): kind
    for kind in (
        gguf_types.F32,
        gguf_types.F16,
        gguf_types.BF16,
        gguf_types.Q8_0,
        gguf_types.Q6_K,
        gguf_types.Q4_K,
    )
}
"""What ``--embedding-type``, ``--output-type`` and ``--kept-type`` accept."""

BY_LLAMA_CPP = (gguf_types.Q6_K, gguf_types.Q4_K)
"""Those that llama.cpp itself must quantize."""

_INSTEAD = (gguf_types.Q8_0, gguf_types.F16)
"""What a matrix that is not ternary gets whose rows its type does not divide, best first."""


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the file to be.

    Attributes:
        source: name in the checkpoint.
        name: in the file.
        shape: (out, in), or (n,).
        type: how it is stored.
        form: encodes it, if it is ternary.
        option: of ``Packing``, that decides its type, if one does.
        kept: whether it is a linear's that was kept from being ternary.
        note: why it is not stored in the type asked for; empty when it is.
    """

    source: str
    name: str
    shape: tuple[int, ...]
    type: GgufType
    form: GgufFormat | None = None
    option: str = ""
    kept: bool = False
    note: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        rows = self.shape[0] if len(self.shape) > 1 else 1
        return rows * self.type.row_bytes(self.shape[-1]) + self.type.trailer


def plan_tensors(job: PackJob, form: GgufFormat) -> list[PlannedTensor]:
    """Choose the type of each tensor: ternary matrices ``form`` or a fallback, others their own, vectors F32."""
    names = gguf_names([tensor.name for tensor in job.tensors], job.checkpoint.complete, job.checkpoint.family)
    return [_planned(job, form, tensor, names[tensor.name]) for tensor in job.tensors]


def main_type(plan: list[PlannedTensor]) -> GgufType:
    """The type that most ternary weights have: some runtimes choose their kernels by ``general.file_type``."""
    weights: Counter[GgufType] = Counter()
    for tensor in plan:
        if tensor.form is not None:
            weights[tensor.type] += math.prod(tensor.shape)
    return weights.most_common(1)[0][0]


def require_types(job: PackJob, form: GgufFormat) -> None:
    """Refuse types that there are not, or no matrices for, or that nothing here can make; and what the format refuses.

    Raises:
        UsageError: no such type; or no head, or no kept matrix, that could have one of its own.
        BitconvertError: the format's runtimes cannot hold this model; or llama.cpp is needed, and not installed.
    """
    if job.options.output_type is not None and all(tensor.name != HEAD for tensor in job.tensors):
        raise UsageError(
            f"{job.checkpoint.name}: its head is the embedding, so it has no type of its own",
            "leave out --output-type; --embedding-type decides for both",
        )
    if job.options.kept_type != Packing().kept_type and not any(tensor.kept for tensor in job.tensors):
        raise UsageError(
            f"{job.checkpoint.name}: none of its matrices is kept from being ternary", "leave out --kept-type"
        )
    for option in dict.fromkeys(filter(None, map(_option, job.tensors))):
        kind = _asked(job, option)
        if kind in BY_LLAMA_CPP and form.demands is None:
            _require_llama_cpp(kind)
    if form.demands is not None:
        _require_demands(job, form, form.demands)


def _require_llama_cpp(kind: GgufType) -> None:
    try:
        find_library()
    except BitconvertError as error:
        raise BitconvertError(
            f"llama.cpp itself must quantize to {kind.name}, and {error.message}", error.hint
        ) from error


def _require_demands(job: PackJob, form: GgufFormat, demands: Demands) -> None:
    arch = job.checkpoint.family.gguf_arch
    if arch != demands.architecture:
        raise BitconvertError(
            f"format {form.name} cannot hold a model of architecture {arch}: its runtimes ({form.runs_in}) "
            f"compute only {demands.architecture} right with it",
            "use tq2_0 or another format that llama.cpp runs",
        )
    for tensor in job.tensors:
        if tensor.kept:
            raise BitconvertError(
                f"tensor {tensor.name} is kept from being ternary, and format {form.name} cannot hold it: its runtimes "
                f"({form.runs_in}) agree on no other type for a linear layer",
                "use tq2_0 or another format that llama.cpp runs",
            )
        if tensor.ternary and tensor.shape[-1] % form.row_multiple:
            raise BitconvertError(
                f"tensor {tensor.name} cannot be packed as {form.name}: its rows of {tensor.shape[-1]} do not divide "
                f"by {form.row_multiple}, and its runtimes know no other type for them",
                "use q2_0 or tq2_0, which store such rows in another type",
            )


def _planned(job: PackJob, form: GgufFormat, tensor: SourceTensor, name: str) -> PlannedTensor:
    columns = tensor.shape[-1]
    if tensor.ternary:
        home = next(row for row in (form, *FALLBACKS) if columns % row.row_multiple == 0)
        note = _misfit(columns, form.type, home.type)
        return PlannedTensor(tensor.name, name, tensor.shape, home.type, home, note=note)
    if option := _option(tensor):
        kind, note = _plain_type(job, form, option, columns)
        return PlannedTensor(tensor.name, name, tensor.shape, kind, option=option, kept=tensor.kept, note=note)
    return PlannedTensor(tensor.name, name, tensor.shape, gguf_types.F32)


def _option(tensor: SourceTensor) -> str:
    """The option that decides the type of a matrix that is not ternary; none decides that of a vector."""
    return "kept_type" if tensor.kept else {EMBEDDING: "embedding_type", HEAD: "output_type"}.get(tensor.name, "")


def _plain_type(job: PackJob, form: GgufFormat, option: str, columns: int) -> tuple[GgufType, str]:
    """The type of a matrix that is not ternary, and why it is not the one asked for."""
    asked = _asked(job, option)
    if form.demands is not None:
        only = form.demands.embedding
        return only, "" if asked == only else f"its runtimes ({form.runs_in}) agree on {only.name} only"
    stored = next(kind for kind in (asked, *_INSTEAD) if columns % kind.block == 0)
    return stored, _misfit(columns, asked, stored)


def _asked(job: PackJob, option: str) -> GgufType:
    """What the user wants; for the head that is what the embedding has, unless said otherwise."""
    name = getattr(job.options, option) or job.options.embedding_type
    if name.lower() not in PLAIN_TYPES:
        raise UsageError(f"unknown {option.replace('_', ' ')} '{name}'", f"types: {', '.join(PLAIN_TYPES)}")
    return PLAIN_TYPES[name.lower()]


def _misfit(columns: int, wanted: GgufType, stored: GgufType) -> str:
    return "" if stored == wanted else f"rows of {columns} do not divide by {wanted.block}, as {wanted.name} requires"
