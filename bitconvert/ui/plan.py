"""What a warmup would do and take."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from bitconvert.report.training import Forecast, WarmupPlan
from bitconvert.ui.console import in_bytes, in_seconds, new_table, show_text, stdout


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
    table.add_row("disk", in_bytes(plan.disk_bytes))
    stdout.print(table)
    stdout.print()
    stdout.print(_forecast_table(plan.forecasts))
    for forecast in plan.forecasts:
        _show_remedies(forecast)
    for note in plan.notes:
        show_text(f"\n{note}" if note is plan.notes[0] else note)


def _forecast_table(forecasts: list[Forecast]) -> Table:
    """A column for each device: memory by kind, time by kind."""
    table = new_table("at the peak of memory", *(forecast.device for forecast in forecasts))
    for kind in dict.fromkeys(kind for forecast in forecasts for kind in forecast.memory):
        table.add_row(f"  {kind}", *(in_bytes(f.memory[kind]) if kind in f.memory else "" for f in forecasts))
    table.add_row("memory", *(Text(in_bytes(f.peak_bytes), "bold" if f.fits else "bold red") for f in forecasts))
    table.add_row("  of", *(in_bytes(f.capacity_bytes) + ("" if f.fits else ": too little") for f in forecasts))
    for kind in dict.fromkeys(kind for forecast in forecasts for kind in forecast.seconds):
        table.add_row(f"  {kind}", *(in_seconds(f.seconds[kind]) if kind in f.seconds else "" for f in forecasts))
    table.add_row("time", *(Text(_forecast_time(f), "bold") for f in forecasts))
    return table


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
