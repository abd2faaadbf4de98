"""Progress on stderr: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from bitconvert.errors import one_line
from bitconvert.ranks import is_main
from bitconvert.report.reporter import Reporter, Silent
from bitconvert.ui.console import in_hours, in_ppl, stderr

_SECONDS_BETWEEN_PLAIN_LINES = 10.0


@contextmanager
def progress() -> Iterator[Reporter]:
    """A Reporter on stderr: a live display on a terminal, plain lines elsewhere; of several processes one speaks."""
    if not is_main():
        yield Silent()
        return
    if not stderr.is_terminal:
        yield PlainReporter()
        return
    reporter = LiveReporter()
    with Live(get_renderable=reporter.render, console=stderr, refresh_per_second=4, transient=True):
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
        stderr.print(Text(one_line(text)), soft_wrap=True)


class LiveReporter:
    """Progress as a panel that is drawn in place."""

    def __init__(self) -> None:
        self._title = ""
        self._done = self._total = 0
        self._metrics: dict[str, float] = {}

    def stage(self, title: str) -> None:
        """Begin a part; the one before stays as a line."""
        if self._title:
            stderr.print(Text(f"✓ {self._title}", style="dim"))
        self._title, self._done, self._total, self._metrics = title, 0, 0, {}

    def advance(self, done: int, total: int) -> None:
        """Move the bar."""
        self._done, self._total = done, total

    def note(self, text: str) -> None:
        """Print a note above the panel."""
        stderr.print(Text.assemble(("note: ", "bold cyan"), one_line(text)))

    def warn(self, text: str) -> None:
        """Print a warning above the panel."""
        stderr.print(Text.assemble(("warning: ", "bold yellow"), one_line(text)))

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
        "eta_seconds": lambda v: f"ETA {in_hours(v)}",
        "lam": lambda v: f"λ {v:.3f}",
        "loss": lambda v: f"loss {v:.4f}",
        "kl": lambda v: f"KL {v:.4f}",
        "original_ppl": lambda v: f"original ppl {in_ppl(v)}",
        "held_out_ppl": lambda v: f"held-out ppl at λ = 1: {in_ppl(v)}",
        "next_checkpoint": lambda v: f"next checkpoint at {int(v):,}",
    }
    return [word(values[key]) for key, word in told.items() if key in values]
