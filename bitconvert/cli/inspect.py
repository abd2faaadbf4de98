"""``bitconvert inspect``: look into a model, or at what differs between two."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitconvert.cli.arguments import Json, Model, print_json
from bitconvert.models.location import locate


def inspect(
    model: Model,
    other: Annotated[
        str | None, typer.Argument(help="Another model: show what differs. Exits with 0 whatever does.")
    ] = None,
    energy: Annotated[
        bool, typer.Option("--energy", help="Estimate memory and energy of the arithmetic beside FP16.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw zeros, scale and error per layer: a .png, .svg or .pdf file.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="What the ternary weights came from: adds how far they are from it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show every tensor of a model, or what differs between two.

    Of a tensor: its type, shape, bits per weight, zeros and scale.
    """
    from bitconvert.evaluation.arguments import check_inspection

    check_inspection(other, against, energy, plot)
    for name in filter(None, (model, other, against)):
        locate(name)
    if other is not None:
        _compare(model, other, as_json)
        return

    from bitconvert.evaluation.inspect import inspect as run
    from bitconvert.evaluation.plot import plot_tensors
    from bitconvert.ui.inspect import show_inspect
    from bitconvert.ui.progress import progress

    with progress() as reporter:
        report = run(model, reporter, against=against, energy=energy)
        if plot is not None:
            plot_tensors(report, plot)
            reporter.note(f"saved {plot}")
    print_json(report) if as_json else show_inspect(report)


def _compare(first: str, second: str, as_json: bool) -> None:
    from bitconvert.evaluation.difference import difference
    from bitconvert.ui.inspect import show_difference
    from bitconvert.ui.progress import progress

    with progress() as reporter:
        report = difference(first, second, reporter)
    print_json(report) if as_json else show_difference(report)
