"""``bitconvert inspect``: look into a model."""

from __future__ import annotations

from bitconvert.cli.arguments import Json, Model, print_json
from bitconvert.models.location import locate


def inspect(model: Model, as_json: Json = False) -> None:
    """Show every tensor: type, shape, bits per weight, zeros, scale."""
    locate(model)

    from bitconvert.evaluation.inspect import inspect as run
    from bitconvert.ui.inspect import show_inspect
    from bitconvert.ui.progress import progress

    with progress() as reporter:
        report = run(model, reporter)
    print_json(report) if as_json else show_inspect(report)
