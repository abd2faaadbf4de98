"""What is in a model, and what differs between two."""

from __future__ import annotations

from bitconvert.errors import one_line
from bitconvert.report.inspection import (
    DifferenceReport,
    EnergyReport,
    InspectReport,
    Scalar,
    TensorDifference,
    TensorReport,
)
from bitconvert.ui.console import in_bytes, new_table, show_text, stdout


def show_inspect(report: InspectReport) -> None:
    """Every tensor, then the totals."""
    error = ["error"] if report.error_against else []
    table = new_table("tensor", "type", "shape", "bits/weight", "zeros", "scale", *error, left=2)
    for tensor in report.tensors:
        table.add_row(
            tensor.name,
            f"{tensor.type}, kept" if tensor.kept else tensor.type,
            " x ".join(map(str, tensor.shape)),
            f"{tensor.bits_per_weight:.4g}",
            f"{tensor.zero_fraction:.1%}",
            _scale(tensor),
            *("" if tensor.error is None else f"{tensor.error:.4f}" for _ in error),
        )
    stdout.print(table)
    for key, value in report.metadata.items():
        show_text(one_line(f"{key}: {value}"))
    show_text(
        f"{report.kind}, {report.parameters:,} parameters, {report.ternary_share:.1%} of them ternary, "
        f"{in_bytes(report.file_bytes)}, {report.bits_per_weight:.3f} bits per weight"
    )
    if report.kept_bytes:
        show_text(
            f"{sum(tensor.kept for tensor in report.tensors)} matrices are kept from being ternary and take "
            f"{in_bytes(report.kept_bytes)}; "
            f"linear layers with them {report.linear_bits_per_weight:.3f} bits per weight"
        )
    if report.error_against:
        show_text(f"error: ||w - original|| / ||original||, against {report.error_against}")
    if report.energy:
        _show_energy(report.energy)


def _scale(tensor: TensorReport) -> str:
    if not tensor.scale:
        return ""
    low, high = f"{tensor.scale.min:.3g}", f"{tensor.scale.max:.3g}"
    spread = f" ({low} to {high})" if low != high else ""
    return f"{tensor.scale.mean:.5g}{spread}"


def _show_energy(energy: EnergyReport) -> None:
    """The arithmetic of a token part by part, then the memory."""
    stdout.print()
    table = new_table("of a token", "arithmetic", "additions", "multiplications", "energy", "in FP16", "ratio", left=2)
    for row in energy.rows:
        table.add_row(
            row.part,
            row.arithmetic,
            f"{row.additions:,}",
            f"{row.multiplications:,}",
            _joules(row.joules),
            _joules(row.fp16_joules),
            f"{row.fp16_joules / row.joules:.1f}",
        )
    total, fp16 = energy.joules_per_token, energy.fp16_joules_per_token
    table.add_row("all", "", "", "", _joules(total), _joules(fp16), f"{fp16 / total:.1f}")
    weights, fp16_weights = energy.weight_bytes, energy.fp16_weight_bytes
    ratio = f"{fp16_weights / weights:.1f}"
    table.add_row("memory of weights", "", "", "", in_bytes(weights), in_bytes(fp16_weights), ratio)
    kept = in_bytes(energy.kv_bytes_per_token)
    table.add_row("memory of keys and values", "FP16", "", "", kept, kept, "1.0")
    stdout.print(table)
    show_text(f"an estimate, for a text of {energy.context} tokens; {energy.source}")
    for assumption in energy.assumptions:
        show_text(f"- {assumption}")


def _joules(joules: float) -> str:
    for unit, size in (("J", 1.0), ("mJ", 1e-3), ("µJ", 1e-6)):
        if joules >= size:
            return f"{joules / size:.3g} {unit}"
    return f"{joules / 1e-9:.3g} nJ"


# ---- two models ---------------------------------------------------------------------------------------------------


def show_difference(report: DifferenceReport) -> None:
    """What the two say, what only one has, then every tensor whose values differ."""
    first, second = report.models
    show_text(f"first:  {first} ({report.kinds[0]})\nsecond: {second} ({report.kinds[1]})")
    for key, (before, after) in report.metadata.items():
        show_text(f"{key}: {_said(before)} -> {_said(after)}")
    for name, names in (("first", report.only_in_first), ("second", report.only_in_second)):
        for tensor in names:
            show_text(f"only in the {name}: {tensor}")
    for tensor, shapes in report.shapes.items():
        show_text(f"other shape: {tensor}: {' -> '.join(' x '.join(map(str, shape)) for shape in shapes)}")
    if report.tensors:
        _show_tensors(report.tensors)
    show_text(f"{len(report.tensors)} tensors hold other values, {report.same_tensors} the same")
    if report.changed_codes is not None:
        show_text(f"{report.changed_codes:.4%} of the codes of what is ternary in both are not the same")


def _show_tensors(tensors: tuple[TensorDifference, ...]) -> None:
    coded = any(tensor.codes for tensor in tensors)
    codes = ["codes changed", "sign flips", "to zero", "from zero", "scale ratio"] if coded else []
    table = new_table("tensor", "type", "relative difference", *codes, left=2)
    for tensor in tensors:
        relative = "" if tensor.relative is None else f"{tensor.relative:.3g}"
        types = dict.fromkeys(tensor.types)
        table.add_row(tensor.name, " -> ".join(types), relative, *_codes(tensor))
    stdout.print(table)


def _codes(tensor: TensorDifference) -> list[str]:
    changes = tensor.codes
    if changes is None:
        return []
    shares = (changes.changed, changes.sign_flips, changes.to_zero, changes.from_zero)
    ratio = "" if changes.scale_ratio is None else f"{changes.scale_ratio:.5f}"
    return [*(f"{share:.3%}" for share in shares), ratio]


def _said(value: Scalar | None) -> str:
    return "nothing" if value is None else str(value)
