"""A trial: one cell on one bed with one learning rate and one seed, as two command lines."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

from benchmarks.quality.bed import Bed
from benchmarks.quality.grid import Cell, Grid
from benchmarks.quality.places import Places
from benchmarks.quality.texts import Texts, prepare
from bitconvert.errors import UsageError
from bitconvert.models.checkpoint import Checkpoint, open_checkpoint
from bitconvert.recipe import Recipe, load_recipe
from bitconvert.report.reporter import Silent
from bitconvert.training.data import ShuffledWindows, first_windows, tokenize
from bitconvert.training.student import settle

_NOT_THE_METHOD = {"description", "data", "pack"}
_NOT_OF_A_CONTROL = {"scaling", "lam", "keep", "init", "distill"}


@dataclass(frozen=True)
class Trial:
    """What is run, and what it is called.

    Attributes:
        bed: the model and its texts.
        cell: name of the method.
        about: the method in a line.
        lr: peak learning rate.
        seed: of the data's order.
        recipe: resolved, without the texts.
        warmup: arguments of ``bitconvert``.
        evaluation: the same for the trained model.
        output: directory of the trained model.
        order: hash of all that is trained on, in order.
    """

    bed: Bed
    cell: str
    about: str
    lr: float
    seed: int
    recipe: Recipe
    warmup: tuple[str, ...]
    evaluation: tuple[str, ...]
    output: Path
    order: str

    @property
    def name(self) -> str:
        """Also where its files lie."""
        return f"{self.bed.name}/{self.cell}/lr-{self.lr:g}-seed-{self.seed}"

    def method(self) -> dict[str, Any]:
        """The recipe as far as it decides the result, key by key: ``optimizer.lr`` -> value."""
        unused = _NOT_THE_METHOD | (_NOT_OF_A_CONTROL if self.recipe.control else set())
        sections = self.recipe.model_dump(mode="json", exclude=unused)
        if not self.recipe.control and self.recipe.init.method == "none":
            sections["init"] = {"method": "none"}  # its options decide nothing then
        return dict(_flat(sections))


def trials_of(grid: Grid, bed: Bed, places: Places, tell: Callable[[str], None]) -> list[Trial]:
    """All that a grid may ask of a bed: each cell with each learning rate and each seed.

    Args:
        grid: the cells.
        bed: the model and its texts, which are written if need be.
        places: where everything lies.
        tell: told which cells are left out because their methods were removed.

    Raises:
        UsageError: a cell's recipe is refused, or would train on other tokens than the others'.
    """
    tokens = load_recipe(bed.recipe, _overrides(bed.set)).training.tokens
    texts = prepare(bed, tokens, places)
    made: list[Trial] = []
    for name, cell in grid.cells_on(bed).items():
        if cell.gone:
            tell(f"{bed.name}/{name} is left out: it can be trained up to commit {cell.gone}")
            continue
        rates = cell.lr or bed.lr
        made += [_trial(bed, name, cell, lr, seed, texts, places) for seed in bed.seeds for lr in rates]
    _require_same_data(made)
    return made


def _trial(bed: Bed, name: str, cell: Cell, lr: float, seed: int, texts: Texts, places: Places) -> Trial:
    own = {"optimizer.lr": lr, "training.seed": seed}
    overrides = _overrides({**bed.set, **cell.set, **own})
    recipe = settle(load_recipe(cell.recipe or bed.recipe, overrides), _checkpoint(places.model(bed)))
    output = places.runs / bed.name / name / f"lr-{lr:g}-seed-{seed}"
    return Trial(
        bed=bed,
        cell=name,
        about=cell.about,
        lr=lr,
        seed=seed,
        recipe=recipe,
        warmup=_warmup(places.model(bed), cell.recipe or bed.recipe, overrides, texts, output),
        evaluation=_evaluation(bed, recipe, output, texts.judged, places.model(bed)),
        output=output,
        order=_order(
            places.model(bed),
            texts.training,
            recipe.training.context,
            recipe.training.steps * recipe.training.batch_size,
            seed,
        ),
    )


def _warmup(model: Path, recipe: str, overrides: Sequence[str], texts: Texts, output: Path) -> tuple[str, ...]:
    data = [word for path in texts.training for word in ("--data", str(path))]
    changes = [word for override in overrides for word in ("--set", override)]
    places = ["--held-out", str(texts.watched), "--output", str(output)]
    return ("warmup", "--model", str(model), "--recipe", recipe, *data, *places, *changes, "--json")


def _evaluation(bed: Bed, recipe: Recipe, output: Path, judged: Path, original: Path) -> tuple[str, ...]:
    how = ["--context", str(recipe.training.context), "--max-tokens", str(bed.judged_tokens)]
    return ("eval", str(output), "--ppl", "--data", str(judged), *how, "--against", str(original), "--json")


def _overrides(changes: dict[str, Any]) -> list[str]:
    """As ``--set`` takes them."""
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in changes.items()]


@lru_cache
def _checkpoint(model: Path) -> Checkpoint:
    return open_checkpoint(str(model))


@lru_cache
def _order(model: Path, training: tuple[Path, ...], context: int, windows: int, seed: int) -> str:
    """sha256 of the tokens' content and of the order in which warmup takes windows out of them."""
    tokens = tokenize([str(path) for path in training], _checkpoint(model).tokenizer(), Silent())
    order = ShuffledWindows(first_windows(tokens, len(tokens), context), windows, seed)
    numbers = [order.window_at(index) for index in range(windows)]
    return hashlib.sha256(f"{tokens.key} {context} {numbers}".encode()).hexdigest()


def _require_same_data(trials: list[Trial]) -> None:
    """Equal tokens, and the same order for the same seed, in every cell."""
    if pair := unequal(trials):
        raise UsageError(
            f"{pair[1].name}: would train on other tokens than {pair[0].name}, or in another order",
            "cells may not change training.tokens, context, or batch sizes that do not divide them alike",
        )


class _Ordered(Protocol):
    @property
    def seed(self) -> int: ...

    @property
    def order(self) -> str: ...


_AnyOrdered = TypeVar("_AnyOrdered", bound=_Ordered)


def unequal(trained: Iterable[_AnyOrdered]) -> tuple[_AnyOrdered, _AnyOrdered] | None:
    """Two of the same seed that are trained on different tokens, or in another order, if there are any."""
    firsts: dict[int, _AnyOrdered] = {}
    for one in trained:
        first = firsts.setdefault(one.seed, one)
        if one.order != first.order:
            return first, one
    return None


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
