"""``bitconvert generate``: let a model write."""

from __future__ import annotations

from typing import Annotated

import typer

from bitconvert.cli.arguments import AnyRuntime, Json, LoraAdapter, Model, print_json, require_adapter
from bitconvert.models.location import locate


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="The text to go on from; with --chat, the user's message.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="The most to write.")] = 128,
    temperature: Annotated[float, typer.Option(help="0: always the most probable token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the random draws.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    runtime: Annotated[
        AnyRuntime, typer.Option(help="auto: llama.cpp for GGUF where it is installed, else torch.")
    ] = AnyRuntime.auto,
    lora: LoraAdapter = None,
    as_json: Json = False,
) -> None:
    """Let a model write."""
    from bitconvert.evaluation.arguments import check_generation

    check_generation(max_tokens, temperature)
    locate(model)
    require_adapter(lora)

    from bitconvert.evaluation.generate import generate as run
    from bitconvert.ui.console import show_text
    from bitconvert.ui.progress import progress

    with progress() as reporter:
        report = run(
            model,
            prompt,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            chat=chat,
            lora=lora,
            runtime=runtime.value,
            reporter=reporter,
        )
    print_json(report) if as_json else show_text(report.text if chat else report.prompt + report.text)
