"""report.html beside a trained model: one file that shows a run, and asks no network for anything."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from torch import Tensor

from bitconvert.models.lineage import Lineage
from bitconvert.recipe import Recipe
from bitconvert.report.training import WarmupReport
from bitconvert.training.flips import Change, change
from bitconvert.training.page import charts
from bitconvert.training.page.charts import Chart, Column, Numbers
from bitconvert.training.snapshot import Snapshot
from bitconvert.version import __version__

_PACKAGE = "bitconvert.training.page"

_TRAINING = (
    Column("step", "step"),
    Column("tokens", "tokens"),
    Column("loss", "loss"),
    Column("kl", "KL to the original"),
    Column("ce", "cross-entropy"),
    Column("lam", "λ"),
    Column("lr", "learning rate"),
    Column("grad_norm", "gradient norm"),
    Column("flips", "changed codes, %", percent=True),
    Column("sign_flips", "changed sign, %", percent=True),
    Column("sparsity", "zeros, %", percent=True),
    Column("tokens_per_second", "tokens/s"),
)
_MEASURED = (Column("step", "step"), Column("tokens", "tokens"), Column("held_out_ppl", "held-out ppl"))

_TINTS = 9  # classes of the style sheet


@dataclass(frozen=True)
class Run:
    """All that the page tells.

    Attributes:
        model: the original, as the user named it.
        data: what it was trained on, in words.
        report: what came out.
        recipe: every option.
        lineage: of the result; None of a control run.
        metrics: lines of metrics.jsonl, from the first on.
        before: the original.
        after: the result.
        history: with which other options it has gone on, in comments of YAML.
    """

    model: str
    data: str
    report: WarmupReport
    recipe: Recipe
    lineage: Lineage | None
    metrics: Sequence[dict[str, Any]]
    before: Snapshot
    after: Snapshot
    history: str = ""


@dataclass(frozen=True)
class _Row:
    """A model of the comparison; None where there is nothing to tell."""

    name: str
    ppl: float
    ratio: float
    tokens: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class _Cell:
    """A number of a matrix: as it is read, and how dark it is."""

    text: str
    tint: int


@dataclass(frozen=True)
class _Grid:
    """A number of every ternary matrix: a row for each decoder layer, a column for each of its linears."""

    title: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[_Cell | None]]]


def render_page(run: Run) -> str:
    """The page, as HTML in which every text of others is escaped."""
    style, script = (files(_PACKAGE).joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    environment = Environment(
        loader=PackageLoader(_PACKAGE, ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    training = Numbers.of([line for line in run.metrics if "loss" in line], _TRAINING)
    measured = Numbers.of([line for line in run.metrics if "held_out_ppl" in line], _MEASURED)
    return environment.get_template("page.html").render(
        run=run,
        rows=_rows(run),
        overall=_overall(run.before.codes, run.after.codes),
        recipe_in_words=_in_words(run.recipe),
        tables={"training": (training, _training_charts(training)), "measured": (measured, _ppl_chart(measured, run))},
        texts=list(zip(run.before.texts, run.after.texts, strict=True)),
        grids=_grids(run),
        plot=charts,
        duration=_duration,
        version=__version__,
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
    )


def _hash(source: str) -> str:
    """By which the page's policy knows its own style and script, so that a browser runs no other."""
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


# ---- numbers ----


def _rows(run: Run) -> list[_Row]:
    """The models that are compared, on the same held-out text."""
    report, original = run.report, run.report.original_ppl

    def row(name: str, ppl: float, tokens: int | None = None, seconds: float | None = None) -> _Row:
        return _Row(name, ppl, ppl / original, tokens, seconds)

    rows = [row("original", original)]
    if not report.control:
        rows.append(row("rounded only", report.rounded_ppl))
    rows += [
        row(f"fitted ({run.recipe.init.method})", line["held_out_ppl"], line["init_tokens"])
        for line in run.metrics
        if line.get("init_tokens")
    ]
    name = "control, in full precision" if report.control else "warmed up"
    return [*rows, row(name, report.held_out_ppl, report.tokens, _training_seconds(run.metrics))]


def _training_seconds(metrics: Sequence[dict[str, Any]]) -> float:
    """Of the steps alone, whatever was resumed."""
    seconds, before = 0.0, 0
    for line in metrics:
        if "tokens_per_second" in line:
            seconds += (line["tokens"] - before) / line["tokens_per_second"]
            before = line["tokens"]
    return seconds


def _overall(before: dict[str, Tensor], after: dict[str, Tensor]) -> Change | None:
    return change(before, after) if after else None


def _in_words(recipe: Recipe) -> str:
    """What of a recipe distinguishes it most."""
    loss = recipe.distill
    taught = "cross-entropy" if recipe.control or not loss.kl else f"{loss.kl:g} KL + {loss.ce:g} cross-entropy"
    optimizer = f"{recipe.optimizer.name}, learning rate {recipe.optimizer.lr:g}"
    if recipe.control:
        return f"full precision, {taught}, {optimizer}"
    ramp = "ternary from the first step" if recipe.lam.curve == "instant" else f"λ {recipe.lam.curve} to 1 at "
    ramp += "" if recipe.lam.curve == "instant" else f"{recipe.lam.reach_one_at:.0%}"
    begun = f"{recipe.init.method} fit, " if recipe.initialises else ""
    return f"{begun}{ramp}, scales {recipe.scaling}, {taught}, {optimizer}"


def _training_charts(training: Numbers) -> list[Chart]:
    drawn = (
        training.chart("Training loss, nats per token", "loss", "kl", "ce"),
        training.chart("λ", "lam", including=(0.0, 1.0)),
        training.chart("Codes that change, % per step", "flips", "sign_flips", including=(0.0,)),
        training.chart("Codes that are zero, %", "sparsity"),
        training.chart("Learning rate", "lr", including=(0.0,)),
        training.chart("Gradient norm", "grad_norm", including=(0.0,)),
        training.chart("Tokens per second", "tokens_per_second", including=(0.0,)),
    )
    return [chart for chart in drawn if chart]


def _ppl_chart(measured: Numbers, run: Run) -> list[Chart]:
    title = "Held-out perplexity" if run.report.control else "Held-out perplexity at λ = 1"
    chart = measured.chart(title, "held_out_ppl", logarithmic=True, reference=("original", run.report.original_ppl))
    return [chart] if chart else []


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


# ---- matrices ----


def _grids(run: Run) -> list[_Grid]:
    """What became of each ternary matrix; nothing for a control run, which has none."""
    before, after = run.before.codes, run.after.codes
    changes = {name: change({name: before[name]}, {name: codes}) for name, codes in after.items()}
    if not changes:
        return []
    zeros = {name: change({name: codes}, {name: codes}).sparsity for name, codes in before.items()}
    texts = {name: f"{zeros[name]:.1%} → {each.sparsity:.1%}" for name, each in changes.items()}
    sparsities = {name: each.sparsity for name, each in changes.items()}
    flips = {name: each.flips for name, each in changes.items()}
    return [
        _grid("Zeros among the codes, at the beginning → at the end", sparsities, texts),
        _grid("Codes that are not what they were at the beginning", flips, {n: f"{v:.1%}" for n, v in flips.items()}),
    ]


def _grid(title: str, values: dict[str, float], texts: dict[str, str]) -> _Grid:
    """Tinted from the least to the largest value."""
    low, high = min(values.values()), max(values.values())
    columns: dict[str, None] = {}
    rows: dict[str, dict[str, _Cell]] = {}
    for name, value in values.items():
        layer, linear = _place(name)
        columns[linear] = None
        tint = round((value - low) / (high - low) * _TINTS) if high > low else 0
        rows.setdefault(layer, {})[linear] = _Cell(texts[name], tint)
    return _Grid(
        title, list(columns), [(layer, [cells.get(column) for column in columns]) for layer, cells in rows.items()]
    )


def _place(module: str) -> tuple[str, str]:
    """The decoder layer and the linear that a module's name tells."""
    found = re.fullmatch(r".*\.layers\.(\d+)\.(?:.*\.)?([^.]+)", module)
    return (found[1], found[2]) if found else ("", module)
