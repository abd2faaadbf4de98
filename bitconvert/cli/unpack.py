"""``bitconvert unpack``: turn a packed model back into a directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitconvert.cli.arguments import Json, Overwrite, beside, beside_name, print_json
from bitconvert.models.location import locate


def unpack(
    model: Annotated[str, typer.Argument(help="Ternary model: packed directory or GGUF file, by whatever program.")],
    output: Annotated[
        Path | None, typer.Option(help="Directory to make. Default: NAME-baked beside the model.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Turn a packed model back into a Hugging Face directory.

    To evaluate it, to train it on, or to pack it again.
    """
    locate(model)

    from bitconvert.models.checkpoint import open_checkpoint
    from bitconvert.packing.unpack import unpack as run
    from bitconvert.ui.pack import show_unpack
    from bitconvert.ui.progress import progress

    with progress() as reporter:
        opened = open_checkpoint(model)
        output = output or beside(opened) / f"{beside_name(model)}-baked"
        report = run(opened, output, overwrite=overwrite, reporter=reporter)
    print_json(report) if as_json else show_unpack(report)
