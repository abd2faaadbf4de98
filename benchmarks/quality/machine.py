"""What a number was measured with: hardware, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.quality.places import ROOT


@cache
def hardware() -> str:
    """Processor and, if there is one, GPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {models[0] if models else platform.machine()}"


@cache
def versions() -> dict[str, str]:
    """Of all that computes."""
    packages = ("bitconvert", "torch", "transformers", "accelerate")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


@cache
def commit() -> str:
    """Of this checkout when it was first asked for, with a + where tracked files differed from it."""
    head = _git("rev-parse", "--short=12", "HEAD")
    return f"{head}+" if head and _git("status", "--porcelain", "--untracked-files=no") else head


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()
