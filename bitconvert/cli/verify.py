"""``bitconvert verify``: hold an output against the hashes that were written with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitconvert.cli.arguments import Json, print_json
from bitconvert.errors import BitconvertError


def verify(
    directory: Annotated[Path, typer.Argument(help="What any of these commands made, with its SHA256SUMS.")],
    as_json: Json = False,
) -> None:
    """Check that every file of an output is as it was written."""
    from bitconvert.evaluation.verify import verify as run
    from bitconvert.ui.progress import progress
    from bitconvert.ui.verify import show_verify

    with progress() as reporter:
        report = run(directory, reporter)
    print_json(report) if as_json else show_verify(report)
    if report.problems:
        counts = ", ".join(f"{len(names)} {what}" for what, names in report.problems.items())
        raise BitconvertError(f"{directory}: not as it was written ({counts})", "download or make it again")
