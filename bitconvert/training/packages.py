"""What a recipe asks for beyond bitconvert's own dependencies: refused before any work where it is not there."""

from __future__ import annotations

import importlib.util
import os

from bitconvert.errors import UsageError
from bitconvert.recipe import Recipe

_WITHOUT_ACCOUNT = ("offline", "disabled", "dryrun")


def require_packages(recipe: Recipe) -> None:
    """Refuse a recipe whose optimizer or trackers cannot be had here.

    Raises:
        UsageError: a package is not installed, or wandb has no account to write to.
    """
    if recipe.optimizer.name == "adamw8bit":
        _require("bitsandbytes", "optimizer.name: adamw8bit needs bitsandbytes, which", extra="optim8bit")
    for tracker in recipe.training.trackers:
        _require(tracker, f"training.trackers: {tracker}", extra=tracker)
    if "wandb" in recipe.training.trackers:
        _require_account()


def _require(package: str, wanted_by: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UsageError(f"{wanted_by} is not installed", f"pip install 'bitconvert[{extra}]'")


def _require_account() -> None:
    """Ask before the run: wandb would ask at its first step, or fail there where nobody can answer."""
    import wandb

    if os.environ.get("WANDB_MODE") not in _WITHOUT_ACCOUNT and not wandb.login(prompt=False, verify=False):
        raise UsageError("training.trackers: wandb is not logged in", "wandb login, or set WANDB_MODE=offline")
