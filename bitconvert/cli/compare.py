"""``bitconvert compare``: models side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitconvert.cli.arguments import AnyRuntime, Json, print_json
from bitconvert.models.location import locate


def compare(
    models: Annotated[
        list[str],
        typer.Argument(help="Two or more, as eval takes them; the first is the reference, usually the original."),
    ],
    prompt: Annotated[list[str] | None, typer.Option(help="A text to go on from. Repeatable.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A file of prompts: .txt, one a line, or .jsonl. Default: five of ours.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Held-out text: adds ppl, KL and agreement with the first model.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="The most to write to a prompt.")] = 64,
    temperature: Annotated[float, typer.Option(help="0: always the most probable token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the random draws.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts into each model's chat template.")] = False,
    runtime: Annotated[
        AnyRuntime, typer.Option(help="Who writes. auto: llama.cpp for GGUF where it is installed, else torch.")
    ] = AnyRuntime.auto,
    as_json: Json = False,
) -> None:
    """Let models answer the same prompts side by side.

    With --data each is measured against the first, too.
    """
    from bitconvert.evaluation.arguments import check_comparison, check_generation
    from bitconvert.evaluation.prompts import read_prompts
    from bitconvert.models.texts import text_files

    check_comparison(models)
    check_generation(max_tokens, temperature)
    for name in models:
        locate(name)
    text_files([str(data)] if data else [])
    asked = [*(prompt or []), *(read_prompts(prompts) if prompts else [])]

    from bitconvert.evaluation.compare import compare as run
    from bitconvert.ui.compare import show_compare
    from bitconvert.ui.progress import progress

    with progress() as reporter:
        report = run(
            models,
            asked,
            data=data,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            chat=chat,
            runtime=runtime.value,
            reporter=reporter,
        )
    print_json(report) if as_json else show_compare(report)
