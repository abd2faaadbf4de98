"""What was packed and unpacked."""

from __future__ import annotations

import shlex

from bitconvert.report.packing import PackReport, UnpackReport
from bitconvert.ui.console import in_bytes, in_hours, new_table, show_text, stdout


def show_pack(report: PackReport) -> None:
    """What was packed, and every tensor that is not in the type asked for."""
    kept = ["with the kept matrices"] if any(file.kept for file in report.files) else []
    table = new_table("file", "size", "bits per weight", "of the ternary part", *kept, "seconds")
    for file in report.files:
        table.add_row(
            file.path,
            in_bytes(file.nbytes),
            f"{file.bits_per_weight:.3f}",
            f"{file.ternary_bits_per_weight:.4f}",
            *(f"{file.linear_bits_per_weight:.4f} (+ {in_bytes(file.kept_bytes)})" for _ in kept),
            f"{file.seconds:.1f}",
        )
    stdout.print(table)
    for file in report.files:
        for note in file.notes():
            show_text(f"{file.format}: {note}")
    if report.companions:
        show_text(f"beside them: {', '.join(report.companions)}")
    if report.refusals:
        show_refusals(report.refusals)


def show_refusals(refusals: dict[str, str]) -> None:
    """The formats that were left out, and why."""
    table = new_table("not written", "why", left=2)
    for name, reason in refusals.items():
        table.add_row(name, reason)
    stdout.print(table)


def show_unpack(report: UnpackReport) -> None:
    """Where the weights are, and what can be done with them."""
    show_text(
        f"{report.ternary_parameters:,} ternary weights ({report.scaling}) as float32, {in_bytes(report.nbytes)}, "
        f"in {in_hours(report.seconds)}\nsaved {report.output}"
    )
    if report.formats:
        show_text(f"next: bitconvert pack {shlex.quote(report.output)} --format {report.formats[0]}")
