"""The result of ``bitconvert adapt``."""

from __future__ import annotations

import shlex

from bitconvert.report.training import AdaptReport
from bitconvert.ui.console import in_hours, in_ppl, new_table, show_text, stdout


def show_adapt(report: AdaptReport) -> None:
    """What the adapter is worth, where it is, and how to try it."""
    table = new_table("held-out examples", "ppl", "ratio")
    for name, ppl in (("without the adapter", report.original_ppl), ("with it", report.held_out_ppl)):
        table.add_row(name, in_ppl(ppl), f"{ppl / report.original_ppl:,.2f}")
    stdout.print(table)
    show_text(
        f"{report.steps:,} steps in {in_hours(report.seconds)}; rank {report.rank} beside {report.modules} linears, "
        f"{report.parameters:,} parameters\n"
        f"saved {report.output} (peft) and {report.gguf} (llama.cpp)\n"
        f"next: bitconvert generate {shlex.quote(report.model)} --lora {shlex.quote(report.output)} --prompt …"
    )
