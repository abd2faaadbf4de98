"""Everything that people see: progress on stderr, tables on stdout, one ``error:`` and one ``hint:`` line."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from bitconvert.errors import BitconvertError
from bitconvert.report import (
    EvalReport,
    Forecast,
    InspectReport,
    PackReport,
    Reporter,
    UnpackReport,
    WarmupPlan,
    WarmupReport,
)

if TYPE_CHECKING:
    from bitconvert.report import DemoReport

_stdout = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
_stderr = Console(stderr=True, highlight=False)

_SECONDS_BETWEEN_PLAIN_LINES = 10.0


def show_error(error: BitconvertError) -> None:
    """Print the error line and the hint line."""
    _stderr.print(Text.assemble(("error: ", "bold red"), error.message), soft_wrap=True)
    _stderr.print(Text.assemble(("hint: ", "bold cyan"), error.hint), soft_wrap=True)


# ---- progress ----


@contextmanager
def progress() -> Iterator[Reporter]:
    """A Reporter on stderr: a live display on a terminal, plain lines elsewhere."""
    if not _stderr.is_terminal:
        yield PlainReporter()
        return
    reporter = LiveReporter()
    with Live(get_renderable=reporter.render, console=_stderr, refresh_per_second=4, transient=True):
        yield reporter


class PlainReporter:
    """Progress as lines, few enough for a log file."""

    def __init__(self) -> None:
        self._next_line = 0.0

    def stage(self, title: str) -> None:
        """Print the part's name."""
        self._line(title)
        self._next_line = 0.0

    def advance(self, done: int, total: int) -> None:
        """Print the share done, now and then."""
        if self._is_time():
            self._line(f"  {done:,} of {total:,}")

    def note(self, text: str) -> None:
        """Print a note."""
        self._line(f"note: {text}")

    def warn(self, text: str) -> None:
        """Print a warning."""
        self._line(f"warning: {text}")

    def metrics(self, values: Mapping[str, float]) -> None:
        """Print measurements at once, training numbers now and then."""
        if "held_out_ppl" in values or self._is_time():
            self._line("  " + " · ".join(_metric_words(values)))

    def _is_time(self) -> bool:
        now = time.monotonic()
        if now < self._next_line:
            return False
        self._next_line = now + _SECONDS_BETWEEN_PLAIN_LINES
        return True

    def _line(self, text: str) -> None:
        _stderr.print(Text(text), soft_wrap=True)


class LiveReporter:
    """Progress as a panel that is drawn in place."""

    def __init__(self) -> None:
        self._title = ""
        self._done = self._total = 0
        self._metrics: dict[str, float] = {}

    def stage(self, title: str) -> None:
        """Begin a part; the one before stays as a line."""
        if self._title:
            _stderr.print(Text(f"✓ {self._title}", style="dim"))
        self._title, self._done, self._total, self._metrics = title, 0, 0, {}

    def advance(self, done: int, total: int) -> None:
        """Move the bar."""
        self._done, self._total = done, total

    def note(self, text: str) -> None:
        """Print a note above the panel."""
        _stderr.print(Text.assemble(("note: ", "bold cyan"), text))

    def warn(self, text: str) -> None:
        """Print a warning above the panel."""
        _stderr.print(Text.assemble(("warning: ", "bold yellow"), text))

    def metrics(self, values: Mapping[str, float]) -> None:
        """Show the newest value of each number."""
        self._metrics.update(values)
        for one, all_ in (("step", "steps"), ("window", "windows")):
            if all_ in values:
                self.advance(int(values[one]), int(values[all_]))

    def render(self) -> Panel | Text:
        """What the terminal shows now."""
        if not self._metrics:
            share = f"  {self._done:,} of {self._total:,}" if self._total else " …"
            return Text(f"{self._title}{share}")
        table = Table.grid(padding=(0, 3))
        words = _metric_words(self._metrics)
        for start in range(0, len(words), 4):
            table.add_row(*words[start : start + 4])
        bar = Table.grid()
        bar.add_row(ProgressBar(total=max(1, self._total), completed=self._done, width=72))
        bar.add_row(table)
        return Panel.fit(bar, title=self._title, title_align="left")


def _metric_words(values: Mapping[str, float]) -> list[str]:
    """The numbers of a run in words, in a fixed order, those that are there."""
    told: dict[str, Callable[[float], str]] = {
        "step": lambda v: f"step {int(v):,}" + (f"/{int(values['steps']):,}" if "steps" in values else ""),
        "window": lambda v: f"window {int(v):,}/{int(values['windows']):,}",
        "tokens_per_second": lambda v: f"{v:,.0f} tokens/s",
        "eta_seconds": lambda v: f"ETA {_duration(v)}",
        "lam": lambda v: f"λ {v:.3f}",
        "loss": lambda v: f"loss {v:.4f}",
        "kl": lambda v: f"KL {v:.4f}",
        "original_ppl": lambda v: f"original ppl {_ppl(v)}",
        "held_out_ppl": lambda v: f"held-out ppl at λ = 1: {_ppl(v)}",
        "next_checkpoint": lambda v: f"next checkpoint at {int(v):,}",
    }
    return [word(values[key]) for key, word in told.items() if key in values]


# ---- results ----


def show_text(text: str) -> None:
    """Print text as it is."""
    _stdout.print(Text(text), soft_wrap=True)


def show_warmup(report: WarmupReport) -> None:
    """The result of a warmup."""
    table = _table("held-out text", "ppl", "ratio")
    rows = [("original", report.original_ppl), ("rounded only", report.rounded_ppl), ("warmed up", report.held_out_ppl)]
    if report.control:
        rows = [("original", report.original_ppl), ("control", report.held_out_ppl)]
    for name, ppl in rows:
        table.add_row(name, _ppl(ppl), f"{ppl / report.original_ppl:,.2f}")
    _stdout.print(table)
    initialised = f" (and {report.init_tokens:,} before the first step)" if report.init_tokens else ""
    kept = f"kept from being ternary: {', '.join(report.kept)}\n" if report.kept else ""
    next_step = "" if report.control else f"\nnext: bitconvert pack {shlex.quote(report.output)} --format tq2_0"
    show_text(
        f"{report.steps:,} steps, {report.tokens:,} tokens{initialised}, {report.scaling}, "
        f"in {_duration(report.seconds)}\n"
        f"{kept}saved {report.output}{next_step}"
    )


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
    table.add_row("disk", _bytes(plan.disk_bytes))
    _stdout.print(table)
    _stdout.print()
    _stdout.print(_forecast_table(plan.forecasts))
    for forecast in plan.forecasts:
        _show_remedies(forecast)
    for note in plan.notes:
        show_text(f"\n{note}" if note is plan.notes[0] else note)


def _forecast_table(forecasts: list[Forecast]) -> Table:
    """A column for each device: memory by kind, time by kind."""
    table = _table("at the peak of memory", *(forecast.device for forecast in forecasts))
    for kind in dict.fromkeys(kind for forecast in forecasts for kind in forecast.memory):
        table.add_row(f"  {kind}", *(_bytes(f.memory[kind]) if kind in f.memory else "" for f in forecasts))
    table.add_row("memory", *(Text(_bytes(f.peak_bytes), "bold" if f.fits else "bold red") for f in forecasts))
    table.add_row("  of", *(_bytes(f.capacity_bytes) + ("" if f.fits else ": too little") for f in forecasts))
    for kind in dict.fromkeys(kind for forecast in forecasts for kind in forecast.seconds):
        table.add_row(f"  {kind}", *(_span(f.seconds[kind]) if kind in f.seconds else "" for f in forecasts))
    table.add_row("time", *(Text(_forecast_time(f), "bold") for f in forecasts))
    return table


def _forecast_time(forecast: Forecast) -> str:
    if forecast.total_seconds is None:
        return "not measured"
    return _span(forecast.total_seconds) + ("" if forecast.measured else " (estimate)")


def _show_remedies(forecast: Forecast) -> None:
    if forecast.fits:
        return
    if not forecast.remedies:
        show_text(f"{forecast.device}: no option of the recipe makes it fit")
    for change, nbytes in forecast.remedies.items():
        show_text(f"{forecast.device}: fits with {change} ({_bytes(nbytes)})")


def show_pack(report: PackReport) -> None:
    """What was packed, and every tensor that is not in the type asked for."""
    kept = ["with the kept matrices"] if any(file.kept for file in report.files) else []
    table = _table("file", "size", "bits per weight", "of the ternary part", *kept, "seconds")
    for file in report.files:
        table.add_row(
            file.path,
            _bytes(file.nbytes),
            f"{file.bits_per_weight:.3f}",
            f"{file.ternary_bits_per_weight:.4f}",
            *(f"{file.linear_bits_per_weight:.4f} (+ {_bytes(file.kept_bytes)})" for _ in kept),
            f"{file.seconds:.1f}",
        )
    _stdout.print(table)
    for file in report.files:
        for note in file.notes():
            show_text(f"{file.format}: {note}")
    if report.companions:
        show_text(f"beside them: {', '.join(report.companions)}")
    if report.refusals:
        _show_refusals(report.refusals)


def _show_refusals(refusals: dict[str, str]) -> None:
    table = _table("not written", "why", left=2)
    for name, reason in refusals.items():
        table.add_row(name, reason)
    _stdout.print(table)


def show_unpack(report: UnpackReport) -> None:
    """Where the weights are, and what can be done with them."""
    show_text(
        f"{report.ternary_parameters:,} ternary weights ({report.scaling}) as float32, {_bytes(report.nbytes)}, "
        f"in {_duration(report.seconds)}\nsaved {report.output}"
    )
    if report.formats:
        show_text(f"next: bitconvert pack {shlex.quote(report.output)} --format {report.formats[0]}")


def show_eval(report: EvalReport) -> None:
    """Perplexity with all that it depends on."""
    table = Table.grid(padding=(0, 2))
    table.add_row("model", f"{report.model} ({report.kind}, computed by {report.runtime})")
    if report.perplexity is not None:
        p = report.perplexity
        windows = f" (± {_ppl(p.window_stderr)} if only whole windows are independent)" if p.window_stderr else ""
        table.add_row("perplexity", f"{_ppl(p.ppl)} ± {_ppl(p.stderr)}{windows}")
        table.add_row("bits per byte", f"{p.bits_per_byte:.4f}")
        table.add_row(
            "convention", f"{p.convention}, context {p.context}, stride {p.stride}, {'with' if p.bos else 'no'} BOS"
        )
        table.add_row("text", f"{report.data}: {p.tokens_scored:,} tokens scored, sha256 {p.text_sha256[:16]}…")
    if report.comparison is not None:
        c = report.comparison
        table.add_row("against", f"{c.original}, perplexity {_ppl(c.original_ppl)}")
        table.add_row("ppl ratio", f"{c.ppl_ratio:.4f} ± {c.ppl_ratio_stderr:.4f}")
        table.add_row("KL(original || model)", f"{c.kl:.5f} ± {c.kl_stderr:.5f} nats per token")
        table.add_row("top-1 agreement", f"{c.top1_agreement:.2%}")
    for task, metrics in report.tasks.items():
        table.add_row(task, ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    _stdout.print(table)


def show_inspect(report: InspectReport) -> None:
    """Every tensor, then the totals."""
    table = _table("tensor", "type", "shape", "bits/weight", "zeros", "scale", left=2)
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
    _stdout.print(table)
    for key, value in report.metadata.items():
        show_text(f"{key}: {value}")
    show_text(
        f"{report.kind}, {report.parameters:,} parameters, {report.ternary_share:.1%} of them ternary, "
        f"{_bytes(report.file_bytes)}, {report.bits_per_weight:.3f} bits per weight"
    )
    if report.kept_bytes:
        show_text(
            f"{sum(tensor.kept for tensor in report.tensors)} matrices are kept from being ternary and take "
            f"{_bytes(report.kept_bytes)}; linear layers with them {report.linear_bits_per_weight:.3f} bits per weight"
        )


def show_recipes(recipes: Mapping[str, str]) -> None:
    """The shipped recipes, one line each."""
    table = _table("recipe", "for", left=2)
    for name, description in recipes.items():
        table.add_row(name, description)
    _stdout.print(table)


def show_demo(report: DemoReport) -> None:
    """The demo's one table, and what the ternary model said."""
    table = _table("model", "ppl (torch)", "ratio", "ppl (llama.cpp)", "size", "bits per weight")
    for row in report.rows:
        table.add_row(
            row.name,
            f"{row.ppl:.3f}",
            f"{row.ppl / report.rows[0].ppl:.3f}",
            f"{row.llama_cpp_ppl:.3f}" if row.llama_cpp_ppl else "",
            _bytes(row.nbytes),
            f"{row.bits_per_weight:.2f}",
        )
    _stdout.print(table)
    show_text(f"{report.spoken_by} says: {report.prompt}{report.text}")
    show_text(f"everything is in {report.output} ({_duration(report.seconds)})")


def _table(*columns: str, left: int = 1) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", overflow="fold")
    return table


def _ppl(value: float) -> str:
    return f"{value:,.3f}" if value < 1e4 else f"{value:.3g}"


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} bytes"


def _span(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else _duration(seconds)


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
