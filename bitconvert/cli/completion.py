"""What a shell offers after TAB: names that are known without loading a model, or torch."""

from __future__ import annotations


def recipe_names(incomplete: str) -> list[str]:
    """The shipped recipes; the shell itself offers files where none of them begins so."""
    from bitconvert.recipe import shipped_recipes

    return _that_begin(incomplete, shipped_recipes())


def recipe_keys(incomplete: str) -> list[str]:
    """The keys that ``--set`` changes, each with its ``=``; the only one that is left also with its default.

    Two that begin alike keep a shell from writing a space behind the ``=``.
    """
    from bitconvert.recipe import recipe_defaults

    defaults = recipe_defaults()
    keys = _that_begin(incomplete, [f"{key}=" for key in defaults])
    return [*keys, f"{keys[0]}{defaults[keys[0][:-1]]}"] if len(keys) == 1 else keys


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
