"""What ``convert`` tells when it is done."""

from __future__ import annotations

from dataclasses import dataclass

from bitconvert.report.evaluation import EvalReport
from bitconvert.report.packing import PackReport
from bitconvert.report.training import WarmupReport


@dataclass(frozen=True)
class ConvertReport:
    """What ``bitconvert convert`` made.

    Attributes:
        model: the original as the user named it.
        output: directory with everything.
        warmup: the latent checkpoint, and what it cost.
        packed: the files.
        measured: each file that can be read back, on the held-out text, against the original.
        pushed_to: address on the hub; None where it was not asked for.
        seconds: wall time (since the resume, for a resumed conversion).
    """

    model: str
    output: str
    warmup: WarmupReport
    packed: PackReport
    measured: list[EvalReport]
    pushed_to: str | None
    seconds: float
