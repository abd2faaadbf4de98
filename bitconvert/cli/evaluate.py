"""``bitconvert eval``: measure a model."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from bitconvert.cli.arguments import Json, LoraAdapter, Model, print_json, require_adapter
from bitconvert.errors import UsageError
from bitconvert.models.location import locate


class Convention(StrEnum):
    """Which tokens of a window are scored."""

    hf = "hf"
    llama_cpp = "llama.cpp"


class Runtime(StrEnum):
    """Who computes a perplexity."""

    torch = "torch"
    llama_cpp = "llama.cpp"


def evaluate(
    model: Model,
    ppl: Annotated[bool, typer.Option("--ppl", help="Measure perplexity on --data.")] = False,
    data: Annotated[Path | None, typer.Option(help="Text: .txt, .jsonl, .parquet, or a directory of them.")] = None,
    context: Annotated[
        int | None, typer.Option(min=2, help="Tokens per window. Default: 512, or the model's limit.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Tokens between windows (hf convention). Default: context.")
    ] = None,
    convention: Annotated[
        Convention, typer.Option(help="hf: all tokens of the windows. llama.cpp: each window's second half.")
    ] = Convention.hf,
    bos: Annotated[bool | None, typer.Option(help="Begin with BOS. Default: as the tokenizer does.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Measure on the first so many tokens only.")] = None,
    against: Annotated[str | None, typer.Option(help="The original: adds KL, top-1 agreement, ppl ratio.")] = None,
    tasks: Annotated[list[str] | None, typer.Option(help="Tasks for lm-eval. Repeatable.")] = None,
    runtime: Annotated[Runtime, typer.Option(help="Who computes: torch, or llama.cpp itself (GGUF).")] = Runtime.torch,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    lora: LoraAdapter = None,
    as_json: Json = False,
) -> None:
    """Measure perplexity, distance to the original, task suites."""
    from bitconvert.evaluation.arguments import check_evaluation
    from bitconvert.models.texts import text_files

    if not ppl and not tasks:
        raise UsageError("nothing to measure", "give --ppl with --data FILE, or --tasks NAME")
    if ppl and data is None:
        raise UsageError("--ppl needs a text", "give one with --data FILE")
    check_evaluation(data, against, runtime.value, tasks or ())
    for name in filter(None, (model, against)):
        locate(name)
    require_adapter(lora)
    text_files([str(data)] if data else [])

    from bitconvert.evaluation.evaluate import evaluate as run
    from bitconvert.ui.evaluation import show_eval
    from bitconvert.ui.progress import progress

    with progress() as reporter:
        report = run(
            model,
            data=data,
            context=context,
            stride=stride,
            convention=convention.value,
            bos=bos,
            max_tokens=max_tokens,
            against=against,
            tasks=tasks or (),
            runtime=runtime.value,
            threads=threads,
            lora=lora,
            reporter=reporter,
        )
    print_json(report) if as_json else show_eval(report)
