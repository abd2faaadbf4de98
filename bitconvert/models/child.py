"""Child processes of ours: for code that may crash, hang or take all memory, which must not take this process along."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def child_command(module: str, *arguments: str) -> list[str]:
    """The command line of ``python -m module``, for a module of this package."""
    # -P: a module of its folder must not shadow one of the standard library
    return [sys.executable, "-P", "-m", module, *arguments]


def child_environment(**changes: str) -> dict[str, str]:
    """The environment of this process, in which the child finds the same package."""
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), **changes}
