"""Models side by side: what they answered, then what was measured."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table
from rich.text import Text

from bitconvert.report.evaluation import ComparedModel, CompareReport
from bitconvert.ui.console import in_bytes, in_ppl, new_table, show_text, stdout

_NARROWEST_COLUMN = 24


def show_compare(report: CompareReport) -> None:
    """The answers to each prompt, a column for each model where the terminal has room for it, and the numbers."""
    names = _short_names(report.models)
    fits = stdout.width >= _NARROWEST_COLUMN * (1 + len(names))
    stdout.print(_side_by_side(report, names) if fits else _one_below_the_other(report, names))
    stdout.print()
    stdout.print(_numbers(report, names))
    if report.data is not None:
        show_text(f"on {report.data}, {report.tokens_scored:,} tokens; KL(first || model) in nats per token")


def _short_names(models: tuple[ComparedModel, ...]) -> list[str]:
    """The last part of each name, unless two have the same."""
    short = [Path(model.model).name for model in models]
    return short if len(set(short)) == len(short) else [model.model for model in models]


def _side_by_side(report: CompareReport, names: list[str]) -> Table:
    table = new_table("prompt", *names, left=1 + len(names))
    table.expand, table.leading = True, 1
    for column in table.columns:
        column.ratio = 1
    for number, prompt in enumerate(report.prompts):
        table.add_row(Text(prompt, "bold"), *(_answer(model, number) for model in report.models))
    return table


def _one_below_the_other(report: CompareReport, names: list[str]) -> Table:
    table = new_table("prompt, model", "answer", left=2)
    for number, prompt in enumerate(report.prompts):
        table.add_row("", Text(prompt, "bold"))
        for name, model in zip(names, report.models, strict=True):
            table.add_row(name, _answer(model, number))
    return table


def _answer(model: ComparedModel, number: int) -> Text:
    return Text(model.answers[number].strip() or "(nothing)")


def _numbers(report: CompareReport, names: list[str]) -> Table:
    measures = ["ppl", "ratio", "KL", "top-1 agreement"] if report.data is not None else []
    table = new_table("model", "kind", "answered by", "size", *measures, left=3)
    for name, model in zip(names, report.models, strict=True):
        table.add_row(name, model.kind, model.runtime, in_bytes(model.file_bytes), *_measures(model))
    return table


def _measures(model: ComparedModel) -> list[str]:
    if model.ppl is None:
        return []
    return [
        f"{in_ppl(model.ppl)} ± {in_ppl(model.ppl_stderr or 0)}",
        f"{model.ppl_ratio:.4f}",
        f"{model.kl:.5f} ± {model.kl_stderr:.5f}",
        f"{model.top1_agreement:.2%}",
    ]
