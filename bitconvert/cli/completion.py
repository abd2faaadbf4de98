"""What a shell offers after TAB: names that are known without loading a model, or torch."""

from __future__ import annotations


def recipe_names(incomplete: str) -> list[str]:
    """The shipped recipes; the shell itself offers files where none of them begins so."""
    from bitconvert.recipe import shipped_recipes

    return _that_begin(incomplete, shipped_recipes())


def recipe_keys(incomplete: str) -> list[str]:
    """The keys that ``--set`` changes, each with its ``=``."""
    from bitconvert.recipe import recipe_keys

    return _that_begin(incomplete, [f"{key}=" for key in recipe_keys()])


def format_names(incomplete: str) -> list[str]:
    """What ``--format`` takes."""
    from bitconvert.packing.names import FORMAT_NAMES

    return _that_begin(incomplete, [*FORMAT_NAMES, "all"])


def gpu_names(incomplete: str) -> list[str]:
    """The GPUs that ``plan`` knows."""
    from bitconvert.training.gpus import GPUS

    return _that_begin(incomplete, list(GPUS))


def _that_begin(incomplete: str, names: list[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
