"""The result of a warmup."""

from __future__ import annotations

import shlex

from bitconvert.report.training import WarmupReport
from bitconvert.ui.console import in_hours, in_ppl, new_table, show_text, stdout


def show_warmup(report: WarmupReport) -> None:
    """The result of a warmup."""
    table = new_table("held-out text", "ppl", "ratio")
    rows = [("original", report.original_ppl), ("rounded only", report.rounded_ppl), ("warmed up", report.held_out_ppl)]
    if report.control:
        rows = [("original", report.original_ppl), ("control", report.held_out_ppl)]
    for name, ppl in rows:
        table.add_row(name, in_ppl(ppl), f"{ppl / report.original_ppl:,.2f}")
    stdout.print(table)
    initialised = f" (and {report.init_tokens:,} before the first step)" if report.init_tokens else ""
    kept = f"kept from being ternary: {', '.join(report.kept)}\n" if report.kept else ""
    next_step = "" if report.control else f"\nnext: bitconvert pack {shlex.quote(report.output)} --format tq2_0"
    show_text(
        f"{report.steps:,} steps, {report.tokens:,} tokens{initialised}, {report.scaling}, "
        f"in {in_hours(report.seconds)}\n"
        f"{kept}saved {report.output}{next_step}"
    )
