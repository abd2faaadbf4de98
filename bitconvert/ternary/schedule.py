"""λ, learning rate and weight decay as pure functions of progress t in [0, 1]. A new curve is one function and one row.

Sources: Mekkouri et al., "Fine-tuning LLMs to 1.58bit" (Hugging Face, 2024) for the λ curves; "The Era of 1-bit LLMs:
Training Tips, Code and FAQ" (Microsoft, 2024) for the two-stage learning rate and weight decay.
"""

from __future__ import annotations

import math
from collections.abc import Callable

_EXPONENTIAL_STEEPNESS = 5.0
_SIGMOID_STEEPNESS = 10.0


def _linear(u: float) -> float:
    return u


def _cosine(u: float) -> float:
    return (1 - math.cos(math.pi * u)) / 2


def _quadratic(u: float) -> float:
    """Slower and slower: what rounding breaks, it breaks as λ comes near 1, so that is where the time goes."""
    return 1 - (1 - u) ** 2


def _exponential(u: float) -> float:
    return math.expm1(_EXPONENTIAL_STEEPNESS * u) / math.expm1(_EXPONENTIAL_STEEPNESS)


def _sigmoid(u: float) -> float:
    """The logistic curve around 1/2, stretched so that it meets 0 and 1 at the ends."""
    half_height = math.tanh(_SIGMOID_STEEPNESS / 4)
    return (1 + math.tanh(_SIGMOID_STEEPNESS / 2 * (u - 0.5)) / half_height) / 2


def _instant(_: float) -> float:
    return 1.0


LAMBDA_CURVES: dict[str, Callable[[float], float]] = {
    "linear": _linear,
    "cosine": _cosine,
    "quadratic": _quadratic,
    "exponential": _exponential,
    "sigmoid": _sigmoid,
    "instant": _instant,
}


def lambda_at(t: float, curve: str, reach_one_at: float) -> float:
    """λ at progress t: rises from 0 along ``curve`` and is 1 from ``reach_one_at`` on.

    Args:
        t: share of the training done, 0 to 1.
        curve: a key of LAMBDA_CURVES.
        reach_one_at: share of the training at which λ becomes 1; 0 means at once.
    """
    if t >= reach_one_at:
        return 1.0
    return min(1.0, max(0.0, LAMBDA_CURVES[curve](t / reach_one_at)))


def _warmup_cosine(t: float, final: float) -> float:
    return final + (1 - final) * _cosine(1 - t)


def _warmup_linear(t: float, final: float) -> float:
    return 1 - (1 - final) * t


def _two_stage(t: float, final: float) -> float:
    """Falls on a line toward 0 at the end; from half on, the line starts at ``final`` of the peak instead of at 1."""
    return (1 - t) * (1.0 if t < 0.5 else final)


LR_SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "cosine": _warmup_cosine,
    "linear": _warmup_linear,
    "two_stage": _two_stage,
}


def lr_at(t: float, schedule: str, warmup: float, final: float) -> float:
    """Learning rate at progress t, as a fraction of its peak.

    Args:
        t: share of the training done, 0 to 1.
        schedule: a key of LR_SCHEDULES.
        warmup: share of the training over which the rate rises linearly from 0.
        final: for cosine and linear, the rate at the end over the peak; for two_stage, the second stage's peak over the
            first's (BitNet b1.58: 1e-3 / 1.5e-3 at 700M parameters).
    """
    if t < warmup:
        return t / warmup
    return LR_SCHEDULES[schedule]((t - warmup) / (1 - warmup) if schedule != "two_stage" else t, final)


def weight_decay_at(t: float, schedule: str, weight_decay: float) -> float:
    """Weight decay at progress t: constant, or dropped to 0 at half (two_stage, BitNet's own recipe)."""
    return 0.0 if schedule == "two_stage" and t >= 0.5 else weight_decay
