"""What the demo showed."""

from __future__ import annotations

from bitconvert.report.demo import DemoReport
from bitconvert.ui.console import in_bytes, in_hours, new_table, show_text, stdout


def show_demo(report: DemoReport) -> None:
    """The demo's one table, and what the ternary model said."""
    table = new_table("model", "ppl (torch)", "ratio", "ppl (llama.cpp)", "size", "bits per weight")
    for row in report.rows:
        table.add_row(
            row.name,
            f"{row.ppl:.3f}",
            f"{row.ppl / report.rows[0].ppl:.3f}",
            f"{row.llama_cpp_ppl:.3f}" if row.llama_cpp_ppl else "",
            in_bytes(row.nbytes),
            f"{row.bits_per_weight:.2f}",
        )
    stdout.print(table)
    show_text(f"{report.spoken_by} says: {report.prompt}{report.text}")
    show_text(f"everything is in {report.output} ({in_hours(report.seconds)})")
