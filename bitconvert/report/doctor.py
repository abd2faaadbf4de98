"""What ``doctor`` tells when it is done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "missing", "broken"]
"""``missing`` is what can be done without, ``broken`` what does not work, or is needed and not there."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: of a package, a program, a device, a directory.
        state: whether it is there and works.
        found: its version, or what was seen; of what is broken, why.
        use: what it is good for; empty where the name says it.
        remedy: the command, or what else to do, where it is not there; empty where nothing is to be done.
    """

    name: str
    state: State
    found: str
    use: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class DoctorReport:
    """What ``bitconvert doctor`` found.

    Attributes:
        healthy: whether nothing that bitconvert needs is broken.
        needed: Python, and the packages without which nothing works.
        hardware: processors, memory, GPUs, their instructions, the compiler.
        optional: packages behind extras.
        runtimes: programs that run packed models.
        disk: free space, where models, caches and outputs go.
    """

    healthy: bool
    needed: tuple[Finding, ...]
    hardware: tuple[Finding, ...]
    optional: tuple[Finding, ...]
    runtimes: tuple[Finding, ...]
    disk: tuple[Finding, ...]
