"""What was measured."""

from __future__ import annotations

from rich.table import Table

from bitconvert.report.evaluation import EvalReport
from bitconvert.ui.console import in_ppl, stdout


def show_eval(report: EvalReport) -> None:
    """Perplexity with all that it depends on."""
    table = Table.grid(padding=(0, 2))
    beside = f", with {report.lora}" if report.lora else ""
    table.add_row("model", f"{report.model} ({report.kind}, computed by {report.runtime}{beside})")
    if report.perplexity is not None:
        p = report.perplexity
        windows = f" (± {in_ppl(p.window_stderr)} if only whole windows are independent)" if p.window_stderr else ""
        table.add_row("perplexity", f"{in_ppl(p.ppl)} ± {in_ppl(p.stderr)}{windows}")
        table.add_row("bits per byte", f"{p.bits_per_byte:.4f}")
        table.add_row(
            "convention", f"{p.convention}, context {p.context}, stride {p.stride}, {'with' if p.bos else 'no'} BOS"
        )
        table.add_row("text", f"{report.data}: {p.tokens_scored:,} tokens scored, sha256 {p.text_sha256[:16]}…")
    if report.comparison is not None:
        c = report.comparison
        table.add_row("against", f"{c.original}, perplexity {in_ppl(c.original_ppl)}")
        table.add_row("ppl ratio", f"{c.ppl_ratio:.4f} ± {c.ppl_ratio_stderr:.4f}")
        table.add_row("KL(original || model)", f"{c.kl:.5f} ± {c.kl_stderr:.5f} nats per token")
        table.add_row("top-1 agreement", f"{c.top1_agreement:.2%}")
    for task, metrics in report.tasks.items():
        table.add_row(task, ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    stdout.print(table)
