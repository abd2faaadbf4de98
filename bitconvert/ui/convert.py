"""What a conversion made."""

from __future__ import annotations

from bitconvert.report.conversion import ConvertReport
from bitconvert.report.packing import PackedFile
from bitconvert.ui.console import in_bytes, in_hours, in_ppl, new_table, show_text, stdout
from bitconvert.ui.pack import show_refusals


def show_convert(report: ConvertReport) -> None:
    """Each file with its size and what it is worth, then where everything is."""
    table = new_table("file", "size", "bits per weight", "ppl", "ratio", "KL", "agreement")
    original = next((each.comparison for each in report.measured if each.comparison), None)
    if original:
        table.add_row(report.model, "", "", in_ppl(original.original_ppl), "1.0000", "", "")
    for file in report.packed.files:
        table.add_row(file.path, in_bytes(file.nbytes), f"{file.bits_per_weight:.3f}", *_worth(report, file))
    stdout.print(table)
    for file in report.packed.files:
        for note in file.notes():
            show_text(f"{file.format}: {note}")
    if report.packed.refusals:
        show_refusals(report.packed.refusals)
    warmup = report.warmup
    show_text(
        f"{warmup.steps:,} steps, {warmup.tokens:,} tokens, {warmup.scaling}; latent checkpoint in {warmup.output}\n"
        f"saved {report.output} in {in_hours(report.seconds)}"
    )
    if report.pushed_to:
        show_text(f"pushed to {report.pushed_to}")


def _worth(report: ConvertReport, file: PackedFile) -> tuple[str, ...]:
    measured = next((each for each in report.measured if each.model == file.path), None)
    if measured is None or measured.perplexity is None or measured.comparison is None:
        return ("not read back", "", "", "")
    against = measured.comparison
    return (
        in_ppl(measured.perplexity.ppl),
        f"{against.ppl_ratio:.4f}",
        f"{against.kl:.4f}",
        f"{against.top1_agreement:.1%}",
    )
