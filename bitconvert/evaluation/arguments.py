"""What commands refuse before anything is opened; nothing heavy is imported for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from bitconvert.errors import UsageError

RuntimeName = Literal["torch", "llama.cpp"]

PICTURES = (".png", ".svg", ".pdf")


def check_evaluation(data: Path | None, against: str | None, runtime: RuntimeName, tasks: Sequence[str]) -> None:
    """Refuse arguments of ``evaluate`` that contradict each other.

    Raises:
        UsageError: they do, or there is nothing to measure.
    """
    if runtime == "llama.cpp" and tasks:
        raise UsageError("lm-eval's tasks run through torch only", "leave out --runtime llama.cpp or --tasks")
    if data is None and not tasks:
        raise UsageError("nothing to measure: no text and no tasks", "give a text with --data FILE, or --tasks NAME")
    if data is None and against is not None:
        raise UsageError("a comparison with the original needs a text", "give one with --data FILE")


def check_generation(max_tokens: int, temperature: float) -> None:
    """Refuse arguments of ``generate`` that make no sense.

    Raises:
        UsageError: naming the argument.
    """
    if max_tokens < 1:
        raise UsageError(f"--max-tokens is {max_tokens}", "give at least 1")
    if not 0 <= temperature < math.inf:
        raise UsageError(f"--temperature is {temperature}", "give 0 for the most probable text, or more")


def check_comparison(models: Sequence[str]) -> None:
    """Refuse a comparison of a model with nothing.

    Raises:
        UsageError: there are fewer than two.
    """
    if len(models) < 2:
        raise UsageError("one model cannot be compared", "give the original first, then those made from it")


def check_inspection(other: str | None, against: str | None, energy: bool, plot: Path | None) -> None:
    """Refuse arguments of ``inspect`` that contradict each other, and pictures of unknown kinds.

    Raises:
        UsageError: they do, or it is one.
    """
    if other is not None and (against is not None or energy or plot is not None):
        raise UsageError(
            "--against, --energy and --plot tell of one model, and two are given",
            "leave out the second, or the options",
        )
    if plot is not None and plot.suffix.lower() not in PICTURES:
        raise UsageError(f"--plot {plot}: not a kind of picture that is known", f"let it end in {', '.join(PICTURES)}")
