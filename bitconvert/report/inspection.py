"""What ``inspect`` tells when it is done: of one model, or of what differs between two."""

from __future__ import annotations

from dataclasses import dataclass

Scalar = str | int | float | bool


@dataclass(frozen=True)
class ScaleSummary:
    """The scales of one tensor.

    Attributes:
        count: how many it has.
        mean: of them.
        min: the least.
        max: the largest.
    """

    count: int
    mean: float
    min: float
    max: float


@dataclass(frozen=True)
class TensorReport:
    """One tensor of a model.

    Attributes:
        name: as its file names it.
        type: how it is stored: F32, BF16, TQ2_0, "latent ternary", "packed ternary" …
        shape: (out, in) of the weight that it means, not of its bytes.
        ternary: whether it means codes and scales: stored so, or to be rounded so.
        parameters: number of weights.
        bytes: what it takes in the file, its scales included.
        bits_per_weight: the same per weight.
        zero_fraction: share of zeros, 0 to 1: among the codes of a ternary tensor, among the values of another.
        scale: of a ternary tensor, as it would be when rounded if it is latent; None otherwise.
        kept: whether it is a linear's that was kept from being ternary.
        hf_name: its name in Hugging Face's form, whatever the file calls it; empty for one that has none there.
        error: ||w - original|| / ||original|| of a ternary tensor: against its own latents, or the model asked for;
            None where there are neither.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    ternary: bool
    parameters: int
    bytes: int
    bits_per_weight: float
    zero_fraction: float
    scale: ScaleSummary | None
    kept: bool = False
    hf_name: str = ""
    error: float | None = None


@dataclass(frozen=True)
class EnergyRow:
    """The arithmetic of one part of a model, for a token.

    Attributes:
        part: ternary linears, other linears, attention, output head.
        arithmetic: numbers it is done in.
        additions: of a token.
        multiplications: of a token.
        joules: of a token.
        fp16_joules: of the same matrices in FP16.
    """

    part: str
    arithmetic: str
    additions: int
    multiplications: int
    joules: float
    fp16_joules: float


@dataclass(frozen=True)
class EnergyReport:
    """An estimate of the energy of a model's matrix products, and of its memory, beside those of an FP16 model.

    Attributes:
        context: tokens of the text; each of them attends to all.
        rows: the parts.
        joules_per_token: of all of them.
        fp16_joules_per_token: of the same model in FP16.
        weight_bytes: of all tensors as they are stored.
        fp16_weight_bytes: of the same in FP16.
        kv_bytes_per_token: keys and values that are kept of a token, in FP16.
        source: of the energies of an operation.
        assumptions: what the estimate takes for granted and leaves out, a line each.
    """

    context: int
    rows: tuple[EnergyRow, ...]
    joules_per_token: float
    fp16_joules_per_token: float
    weight_bytes: int
    fp16_weight_bytes: int
    kv_bytes_per_token: int
    source: str
    assumptions: tuple[str, ...]


@dataclass(frozen=True)
class InspectReport:
    """What ``bitconvert inspect`` found.

    Attributes:
        model: as the user named it.
        kind: plain, latent, baked, packed or gguf.
        metadata: what the files say about the model: architecture, sizes, tokenizer, lineage.
        tensors: in the files' order.
        parameters: weights of all tensors.
        ternary_share: share of them that is ternary, 0 to 1.
        file_bytes: size of the weight files.
        bits_per_weight: bits of all tensors over all parameters.
        linear_bits_per_weight: the same of the ternary and the kept matrices; 0 where there are none.
        kept_bytes: what the kept matrices take.
        error_against: what the tensors' errors were measured against; None where none was.
        energy: of the arithmetic, where it was asked for.
    """

    model: str
    kind: str
    metadata: dict[str, Scalar]
    tensors: tuple[TensorReport, ...]
    parameters: int
    ternary_share: float
    file_bytes: int
    bits_per_weight: float
    linear_bits_per_weight: float
    kept_bytes: int
    error_against: str | None = None
    energy: EnergyReport | None = None


@dataclass(frozen=True)
class CodeChanges:
    """How the codes of two ternary tensors differ: shares of all codes, 0 to 1.

    Attributes:
        changed: codes that are not the same.
        sign_flips: -1 that became +1, or +1 that became -1.
        to_zero: others that became 0.
        from_zero: 0 that became another.
        scale_ratio: mean scale of the second over that of the first, over their nonzero weights; None without any.
    """

    changed: float
    sign_flips: float
    to_zero: float
    from_zero: float
    scale_ratio: float | None


@dataclass(frozen=True)
class TensorDifference:
    """A tensor whose values are not the same in two models.

    Attributes:
        name: in Hugging Face's form.
        types: how each model stores it.
        parameters: number of weights.
        relative: ||second - first|| / ||first||; None where the first is all zeros.
        codes: how the codes differ, where both are ternary.
    """

    name: str
    types: tuple[str, str]
    parameters: int
    relative: float | None
    codes: CodeChanges | None


@dataclass(frozen=True)
class DifferenceReport:
    """What ``bitconvert inspect MODEL OTHER`` found: what differs between two models.

    Attributes:
        models: as the user named them.
        kinds: of each: plain, latent, baked, packed or gguf.
        metadata: what they say otherwise of themselves, by key; None for what only the other says.
        only_in_first: tensors by their names in Hugging Face's form.
        only_in_second: likewise.
        shapes: of tensors that have not the same shape in both, by name.
        tensors: those of one shape whose values differ.
        same_tensors: how many have the same values.
        changed_codes: share of the codes of all tensors that are ternary in both; None where none is.
    """

    models: tuple[str, str]
    kinds: tuple[str, str]
    metadata: dict[str, tuple[Scalar | None, Scalar | None]]
    only_in_first: tuple[str, ...]
    only_in_second: tuple[str, ...]
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    tensors: tuple[TensorDifference, ...]
    same_tensors: int
    changed_codes: float | None
