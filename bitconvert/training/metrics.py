"""``metrics.jsonl``: what a run measures, a JSON object a line, the oldest first."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitconvert.errors import BitconvertError

METRICS = "metrics.jsonl"


def line_of(metrics: Mapping[str, Any]) -> str:
    """A line of the file, with its end."""
    return json.dumps(metrics) + "\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """What its lines hold. A last one without an end, of a run that was killed while it wrote, does not count.

    Raises:
        BitconvertError: a line is not what ``line_of`` makes, or the file cannot be read.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise BitconvertError(f"{path}: cannot be read ({error.strerror})", "restore the file") from error
    return [_parsed(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def _parsed(line: bytes, place: str) -> dict[str, Any]:
    try:
        metrics = json.loads(line)
    except (ValueError, RecursionError):
        metrics = None
    if not isinstance(metrics, dict) or not isinstance(metrics.get("step"), int):
        raise BitconvertError(
            f"{place}: damaged, it holds no metrics of a step", "restore the file, or cut the line out"
        )
    return metrics
