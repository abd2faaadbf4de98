"""What ``eval`` and ``generate`` refuse before anything is opened; nothing heavy is imported for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from bitconvert.errors import UsageError

RuntimeName = Literal["torch", "llama.cpp"]


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
