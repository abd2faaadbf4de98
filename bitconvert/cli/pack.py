"""``bitconvert pack``: write the files that runtimes load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitconvert.cli.arguments import Json, Overwrite, beside, print_json
from bitconvert.cli.completion import format_names
from bitconvert.models.location import locate
from bitconvert.packing.names import FORMAT_NAMES, GGUF_NAMES

if TYPE_CHECKING:
    from bitconvert.models.checkpoint import Checkpoint


def pack(
    checkpoint: Annotated[str, typer.Argument(help="Latent checkpoint that warmup wrote, or what unpack made.")],
    formats: Annotated[
        list[str],
        typer.Option(
            "--format",
            help=f"{', '.join(GGUF_NAMES)} (GGUF), {', '.join(FORMAT_NAMES[len(GGUF_NAMES) :])}; all. Repeatable.",
            autocompletion=format_names,
        ),
    ],
    output: Annotated[Path | None, typer.Option(help="Directory for the files. Default: CHECKPOINT-packed.")] = None,
    embedding_type: Annotated[
        str | None,
        typer.Option(help="Type of embedding and head in GGUF: f32, f16, bf16, q8_0, q6_k, q4_k. Default: f16."),
    ] = None,
    output_type: Annotated[
        str | None, typer.Option(help="Type of a head of its own in GGUF. Default: the embedding's.")
    ] = None,
    kept_type: Annotated[
        str | None, typer.Option(help="Type in GGUF of matrices that are kept from being ternary. Default: q8_0.")
    ] = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option(help="Split weights into files of at most this: 2GB. A larger tensor is a file."),
    ] = None,
    round_plain: Annotated[
        bool, typer.Option("--round", help="Round a model that was never warmed up. It will not talk sense.")
    ] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write ternary weights into files that runtimes load."""
    from bitconvert.recipe import packing_options

    options = packing_options(
        formats=formats,
        embedding_type=embedding_type,
        output_type=output_type,
        kept_type=kept_type,
        max_shard_size=max_shard_size,
    )
    locate(checkpoint)

    from bitconvert.models.checkpoint import open_checkpoint
    from bitconvert.packing.pack import pack as run
    from bitconvert.ui.pack import show_pack
    from bitconvert.ui.progress import progress

    with progress() as reporter:
        opened = open_checkpoint(checkpoint)
        output = output or _packed_beside(opened)
        report = run(opened, options, output, round_plain=round_plain, overwrite=overwrite, reporter=reporter)
    print_json(report) if as_json else show_pack(report)


def _packed_beside(checkpoint: Checkpoint) -> Path:
    """Where the files of a checkpoint go."""
    return beside(checkpoint) / f"{checkpoint.base_name}-packed"
