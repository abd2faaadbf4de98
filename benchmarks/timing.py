"""Compare two ways of doing one thing: in turn, several times, by the median of the ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def ratio(ours: Callable[[], object], peer: Callable[[], object], rounds: int = 9) -> tuple[float, float, float]:
    """CPU seconds of ours, of the peer (medians), and the median of ours / peer, after one warm-up of each."""
    ours(), peer()
    pairs = [(_cpu_seconds(ours), _cpu_seconds(peer)) for _ in range(rounds)]
    first, second = zip(*pairs, strict=True)
    return statistics.median(first), statistics.median(second), statistics.median(a / b for a, b in pairs)


def _cpu_seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started
