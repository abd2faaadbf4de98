"""What a warmup would do and take."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rich.table import Table
from rich.text import Text

from bitconvert.report.packing import ForeseenFile
from bitconvert.report.training import Forecast, WarmupPlan
from bitconvert.ui.console import in_bytes, in_seconds, new_table, show_text, stdout

_IF_KNOWN: dict[str, Callable[[Forecast], str]] = {
    "tokens/s": lambda forecast: f"{forecast.tokens_per_second:,.0f}" if forecast.tokens_per_second else "",
    "cost": lambda forecast: "" if forecast.cost is None else f"{forecast.cost:,.2f}",
}


def show_plan(plan: WarmupPlan) -> None:
    """What a warmup would do and take."""
    table = Table.grid(padding=(0, 2))
    table.add_row("model", f"{plan.model} ({plan.architecture}, {plan.parameters:,} parameters)")
    table.add_row(
        "becomes ternary",
        f"{plan.ternary_modules} linears, {plan.ternary_parameters:,} parameters "
        f"({plan.ternary_parameters / plan.parameters:.1%})",
    )
    by_phase = ", ".join(f"{steps:,} of {name}" for name, steps in plan.steps_by_phase.items())
    table.add_row("steps", f"{plan.steps:,} ({by_phase})")
    table.add_row("tokens", f"{plan.tokens:,}; {plan.accumulation} micro-batches a step")
    table.add_row("disk", _disk(plan))
    stdout.print(table)
    stdout.print()
    if plan.files:
        stdout.print(_file_table(plan.files))
        stdout.print()
    stdout.print(_forecast_table(plan.forecasts))
    for forecast in plan.forecasts:
        _show_remedies(forecast)
    for note in plan.notes:
        show_text(f"\n{note}" if note is plan.notes[0] else note)


def _disk(plan: WarmupPlan) -> Text:
    needed = in_bytes(plan.disk_bytes)
    if plan.free_disk_bytes is None:
        return Text(needed)
    fits = plan.disk_bytes <= plan.free_disk_bytes
    free = f"{needed} of {in_bytes(plan.free_disk_bytes)} that are free"
    return Text(free) if fits else Text(f"{free}: does not fit on this disk", "bold red")


def _file_table(files: list[ForeseenFile]) -> Table:
    """A row for each format: its size, and whether it can be, and is to be, written."""
    table = new_table("format", "size", "", left=1)
    table.columns[2].justify = "left"
    for file in files:
        size = "" if file.nbytes is None else in_bytes(file.nbytes)
        wanted = "wanted; " if file.wanted else ""
        table.add_row(
            file.format, size, f"{wanted}cannot be: {file.refusal}" if file.refusal else wanted + file.runs_in
        )
    return table


def _forecast_table(forecasts: list[Forecast]) -> Table:
    """A column for each device: memory by kind, time by kind."""
    table = new_table("at the peak of memory", *(forecast.device for forecast in forecasts))
    for kind in _merged(forecast.memory for forecast in forecasts):
        table.add_row(f"  {kind}", *(in_bytes(f.memory[kind]) if kind in f.memory else "" for f in forecasts))
    memory = "memory of each" if any(forecast.gpus > 1 for forecast in forecasts) else "memory"
    table.add_row(memory, *(Text(in_bytes(f.peak_bytes), "bold" if f.fits else "bold red") for f in forecasts))
    table.add_row("  of", *(in_bytes(f.capacity_bytes) + ("" if f.fits else ": too little") for f in forecasts))
    for kind in _merged(forecast.seconds for forecast in forecasts):
        table.add_row(f"  {kind}", *(in_seconds(f.seconds[kind]) if kind in f.seconds else "" for f in forecasts))
    table.add_row("time", *(Text(_forecast_time(f), "bold") for f in forecasts))
    for name, told in _IF_KNOWN.items():
        if any(told(forecast) for forecast in forecasts):
            table.add_row(name, *map(told, forecasts))
    return table


def _merged(orders: Iterable[Iterable[str]]) -> list[str]:
    """All names, each before what comes after it where it is told."""
    merged: list[str] = []
    for order in orders:
        following = len(merged)
        for name in reversed(list(order)):
            if name not in merged:
                merged.insert(following, name)
            following = merged.index(name)
    return merged


def _forecast_time(forecast: Forecast) -> str:
    if forecast.total_seconds is None:
        return "not measured"
    return in_seconds(forecast.total_seconds) + ("" if forecast.measured else " (estimate)")


def _show_remedies(forecast: Forecast) -> None:
    if forecast.fits:
        return
    if not forecast.remedies:
        show_text(f"{forecast.device}: no option of the recipe makes it fit")
    for change, nbytes in forecast.remedies.items():
        show_text(f"{forecast.device}: fits with {change} ({in_bytes(nbytes)})")
