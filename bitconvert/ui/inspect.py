"""What is in a model."""

from __future__ import annotations

from bitconvert.report.evaluation import InspectReport
from bitconvert.ui.console import in_bytes, new_table, show_text, stdout


def show_inspect(report: InspectReport) -> None:
    """Every tensor, then the totals."""
    table = new_table("tensor", "type", "shape", "bits/weight", "zeros", "scale", left=2)
    for tensor in report.tensors:
        scale = f"{tensor.scale.mean:.5g}" if tensor.scale else ""
        if tensor.scale and tensor.scale.count > 1:
            scale += f" ({tensor.scale.min:.3g} to {tensor.scale.max:.3g})"
        table.add_row(
            tensor.name,
            f"{tensor.type}, kept" if tensor.kept else tensor.type,
            " x ".join(map(str, tensor.shape)),
            f"{tensor.bits_per_weight:.4g}",
            f"{tensor.zero_fraction:.1%}",
            scale,
        )
    stdout.print(table)
    for key, value in report.metadata.items():
        show_text(f"{key}: {value}")
    show_text(
        f"{report.kind}, {report.parameters:,} parameters, {report.ternary_share:.1%} of them ternary, "
        f"{in_bytes(report.file_bytes)}, {report.bits_per_weight:.3f} bits per weight"
    )
    if report.kept_bytes:
        show_text(
            f"{sum(tensor.kept for tensor in report.tensors)} matrices are kept from being ternary and take "
            f"{in_bytes(report.kept_bytes)}; linear layers with them {report.linear_bits_per_weight:.3f} bits per "
            "weight"
        )
