"""What ``pack`` and ``unpack`` tell when they are done."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field


@dataclass(frozen=True)
class PackedTensor:
    """One tensor of a packed file.

    Attributes:
        name: in the file.
        type: how it is stored, as the runtime spells it.
        shape: of the weights it stands for.
        nbytes: of its data.
        ternary: whether it holds ternary codes.
        kept: whether it is a linear's that was kept from being ternary.
        note: why it is not stored in the type asked for; empty when it is.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    nbytes: int
    ternary: bool
    kept: bool = False
    note: str = ""

    @property
    def weights(self) -> int:
        """Number of weights it stands for."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class PackedFile:
    """One output of ``bitconvert pack``.

    Attributes:
        path: the GGUF file, or the first shard of it; or the directory.
        format: as given to ``--format``.
        tensors: in the file's order.
        nbytes: size of the weight file, or of all shards of it.
        seconds: it took to write and to read back.
        bits_per_weight: of the whole file, embeddings and metadata included.
        ternary_bits_per_weight: of the ternary matrices alone.
        linear_bits_per_weight: of the ternary and the kept matrices.
        note: what its user should know; empty when there is nothing.
    """

    path: str
    format: str
    tensors: list[PackedTensor]
    nbytes: int
    seconds: float
    bits_per_weight: float
    ternary_bits_per_weight: float
    linear_bits_per_weight: float
    note: str = ""

    @property
    def kept(self) -> list[PackedTensor]:
        """Matrices of linears that were kept from being ternary."""
        return [tensor for tensor in self.tensors if tensor.kept]

    @property
    def kept_bytes(self) -> int:
        """What they take of the file."""
        return sum(tensor.nbytes for tensor in self.kept)

    @property
    def fallbacks(self) -> list[PackedTensor]:
        """Tensors that are not stored in the type asked for."""
        return [tensor for tensor in self.tensors if tensor.note]

    def notes(self) -> list[str]:
        """All that its user should know, a line each."""
        return [*filter(None, [self.note]), *self._kept_notes(), *self._fallback_notes()]

    def _kept_notes(self) -> list[str]:
        if not self.kept:
            return []
        types = ", ".join(dict.fromkeys(tensor.type for tensor in self.kept))
        return [
            f"{len(self.kept)} matrices are kept from being ternary, as {types}: {self.kept_bytes / 1e6:.2f} MB of "
            f"{self.nbytes / 1e6:.2f}; the linear layers take {self.linear_bits_per_weight:.3f} bits per weight with "
            f"them ({', '.join(tensor.name for tensor in self.kept)})"
        ]

    def _fallback_notes(self) -> list[str]:
        """A line for each reason; the same tensor of all blocks is one name, since a large model has hundreds."""
        reasons: dict[tuple[str, str], list[str]] = {}
        for tensor in self.fallbacks:
            reasons.setdefault((tensor.type, tensor.note), []).append(re.sub(r"\d+", "*", tensor.name, count=1))
        return [
            f"{len(names)} tensors are stored as {stored}: {reason} ({', '.join(dict.fromkeys(names))})"
            for (stored, reason), names in reasons.items()
        ]


@dataclass(frozen=True)
class ForeseenFile:
    """What a model would be in one format.

    Attributes:
        format: as given to ``--format``.
        wanted: whether the recipe asks for it.
        nbytes: of its weight file, or of all shards of it; None where the format cannot hold the model.
        refusal: why it cannot; empty where it can.
        runs_in: the runtimes that compute with it, in words.
    """

    format: str
    wanted: bool
    nbytes: int | None
    refusal: str
    runs_in: str


@dataclass(frozen=True)
class PackReport:
    """What ``bitconvert pack`` wrote.

    Attributes:
        model: as the user named it.
        scaling: of the ternary weights, in words.
        files: one per format.
        warnings: what the user may not want, such as weights that were rounded without training.
        refusals: why the other formats cannot hold this model, by name, where all were asked for.
        companions: what lies beside the files: the model card, a Modelfile, the hashes of all that was written.
        inputs: SHA-256 of the files that were packed, by name.
    """

    model: str
    scaling: str
    files: list[PackedFile]
    warnings: list[str]
    refusals: dict[str, str] = field(default_factory=dict)
    companions: list[str] = field(default_factory=list)
    inputs: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class UnpackReport:
    """What ``bitconvert unpack`` wrote.

    Attributes:
        model: as the user named it.
        kind: of the model: plain, latent, packed or gguf.
        output: the directory.
        scaling: of the ternary weights, in words; in a file that does not say it, the coarsest that fits.
        ternary_parameters: weights of the ternary linears.
        nbytes: size of the weight file.
        formats: those that can hold such scales.
        seconds: it took to write and to read back.
    """

    model: str
    kind: str
    output: str
    scaling: str
    ternary_parameters: int
    nbytes: int
    formats: list[str]
    seconds: float
