"""The command line: parse, check, call, render.

Heavy imports live inside the commands, behind all that can be checked without them: neither ``--help`` nor a wrong
argument waits for torch.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
import warnings
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from bitconvert.errors import BitconvertError, UsageError
from bitconvert.models.location import locate

if TYPE_CHECKING:
    from bitconvert.models.checkpoint import Checkpoint
    from bitconvert.recipe import Recipe
    from bitconvert.report import Reporter

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich's help takes longer to import than all the rest
    context_settings={"help_option_names": ["-h", "--help"]},
)

_NO_COMMAND = 2
_INTERRUPTED = 130


class Convention(StrEnum):
    """Which tokens of a window are scored."""

    hf = "hf"
    llama_cpp = "llama.cpp"


class Runtime(StrEnum):
    """Who computes a perplexity."""

    torch = "torch"
    llama_cpp = "llama.cpp"


class AnyRuntime(StrEnum):
    """Who generates a text."""

    auto = "auto"
    torch = "torch"
    llama_cpp = "llama.cpp"


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]
Model = Annotated[
    str, typer.Argument(help="Hub id, Hugging Face directory, latent, baked or packed checkpoint, or GGUF file.")
]


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"bitconvert {version('bitconvert')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def bitconvert(
    context: typer.Context,
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Turn an existing LLaMA-style model into a 1.58-bit one: warmup, pack, eval."""
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(_NO_COMMAND)


@app.command()
def warmup(
    model: Annotated[
        str | None, typer.Option(help="The original: hub id, Hugging Face directory or GGUF file.")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="A shipped recipe's name, or a YAML file.")] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="Text: .txt, .jsonl, .parquet, a directory, or a hub dataset. Repeatable.")
    ] = None,
    held_out: Annotated[list[str] | None, typer.Option(help="Text to measure on. Repeatable.")] = None,
    output: Annotated[Path | None, typer.Option(help="Directory to make. Default: NAME-ternary here.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Change a recipe's key: optimizer.lr=5e-4. Repeatable.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the unfinished run behind --output.")] = False,
    as_json: Json = False,
) -> None:
    """Train a model's linear layers down to {-1, 0, +1}."""
    if resume:
        output = output or _default_output(model)
        model, resolved = _resumed(output, model, recipe, data, held_out, overrides)
    else:
        resolved = _resolve(recipe, data, held_out, overrides)
    if model is None:
        raise UsageError("--model is missing", "give a hub id, a Hugging Face directory or a GGUF file")
    locate(model)
    output = output or _default_output(model)

    from bitconvert import ui
    from bitconvert.training.warmup import warmup as run

    with ui.progress() as reporter:
        _warn_of_formats(model, resolved, reporter)
        report = run(model, output, resolved, resume=resume, reporter=reporter)
    _print_json(report) if as_json else ui.show_warmup(report)


@app.command()
def plan(
    model: Annotated[str, typer.Option(help="The original, as warmup takes it.")],
    recipe: Annotated[str | None, typer.Option(help="A shipped recipe's name, or a YAML file.")] = None,
    data: Annotated[list[str] | None, typer.Option(help="Text, as warmup takes it. Repeatable.")] = None,
    held_out: Annotated[list[str] | None, typer.Option(help="Text to measure on. Repeatable.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Change a recipe's key. Repeatable.")] = None,
    gpus: Annotated[
        list[str] | None, typer.Option("--gpu", help="Foresee it for this GPU too: rtx-4090, h100 … Repeatable.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Foresee a warmup's memory, time and disk, also on GPUs."""
    from bitconvert.training.gpus import gpu_of

    resolved = _resolve(recipe, data, held_out, overrides)
    locate(model)
    devices = [gpu_of(name) for name in gpus or ()]

    from bitconvert import ui
    from bitconvert.training.plan import plan_warmup

    with ui.progress() as reporter:
        _warn_of_formats(model, resolved, reporter)
        report = plan_warmup(model, resolved, devices, reporter=reporter)
    _print_json(report) if as_json else ui.show_plan(report)


@app.command()
def pack(
    checkpoint: Annotated[str, typer.Argument(help="Latent checkpoint that warmup wrote, or what unpack made.")],
    formats: Annotated[
        list[str],
        typer.Option(
            "--format",
            help="tq1_0, tq2_0, q2_0, i2_s, q8_0, f16, bf16 (GGUF), safetensors, compressed-tensors, "
            "onnx; all. Repeatable.",
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

    from bitconvert import ui
    from bitconvert.models.checkpoint import open_checkpoint
    from bitconvert.packing.pack import pack as run

    with ui.progress() as reporter:
        opened = open_checkpoint(checkpoint)
        report = run(opened, options, output or _packed_beside(opened), round_plain=round_plain, reporter=reporter)
    _print_json(report) if as_json else ui.show_pack(report)


@app.command()
def unpack(
    model: Annotated[str, typer.Argument(help="Ternary model: packed directory or GGUF file, by whatever program.")],
    output: Annotated[
        Path | None, typer.Option(help="Directory to make. Default: NAME-baked beside the model.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Turn a packed model back into a Hugging Face directory.

    To evaluate it, to train it on, or to pack it again.
    """
    locate(model)

    from bitconvert import ui
    from bitconvert.models.checkpoint import open_checkpoint
    from bitconvert.packing.unpack import unpack as run

    with ui.progress() as reporter:
        opened = open_checkpoint(model)
        output = output or _beside(opened) / f"{_beside_name(model)}-baked"
        report = run(opened, output, reporter=reporter)
    _print_json(report) if as_json else ui.show_unpack(report)


@app.command(name="eval")
def eval_(
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
    text_files([str(data)] if data else [])

    from bitconvert import ui
    from bitconvert.evaluation.evaluate import evaluate

    with ui.progress() as reporter:
        report = evaluate(
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
            reporter=reporter,
        )
    _print_json(report) if as_json else ui.show_eval(report)


@app.command()
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
    as_json: Json = False,
) -> None:
    """Let a model write."""
    from bitconvert.evaluation.arguments import check_generation

    check_generation(max_tokens, temperature)
    locate(model)

    from bitconvert import ui
    from bitconvert.evaluation.generate import generate as run

    with ui.progress() as reporter:
        report = run(
            model,
            prompt,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            chat=chat,
            runtime=runtime.value,
            reporter=reporter,
        )
    _print_json(report) if as_json else ui.show_text(report.text if chat else report.prompt + report.text)


@app.command()
def inspect(model: Model, as_json: Json = False) -> None:
    """Show every tensor: type, shape, bits per weight, zeros, scale."""
    locate(model)

    from bitconvert import ui
    from bitconvert.evaluation.inspect import inspect as run

    with ui.progress() as reporter:
        report = run(model, reporter)
    _print_json(report) if as_json else ui.show_inspect(report)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Directory to make.")] = Path("demo-output"),
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Change a key of recipes/demo.yaml.")] = None,
    as_json: Json = False,
) -> None:
    """Warm up, pack and measure a small embedded model, in minutes."""
    from bitconvert.recipe import load_recipe

    recipe = load_recipe("demo", overrides or ())

    from bitconvert import ui
    from bitconvert.demo.demo import demo as run

    with ui.progress() as reporter:
        report = run(output, recipe, reporter)
    _print_json(report) if as_json else ui.show_demo(report)


@app.command(name="recipes")
def recipes_(
    name: Annotated[str | None, typer.Argument(help="Show this recipe whole, defaults included.")] = None,
    as_json: Json = False,
) -> None:
    """List the shipped recipes, or show one."""
    from bitconvert import ui
    from bitconvert.recipe import load_recipe, shipped_recipes

    if name is not None:
        recipe = load_recipe(name)
        _print_json(recipe.model_dump(mode="json")) if as_json else ui.show_text(recipe.to_yaml())
        return
    descriptions = {name: load_recipe(name).description for name in shipped_recipes()}
    _print_json(descriptions) if as_json else ui.show_recipes(descriptions)


def main() -> NoReturn:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong arguments, 130 interrupted."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        _quiet_libraries()
        status = app(prog_name="bitconvert", standalone_mode=False)
        if status == _INTERRUPTED:
            raise KeyboardInterrupt  # typer has caught it, and returned this instead
    except BitconvertError as error:
        _fail(error)
    except _ClickError as error:
        _fail(UsageError(_one_line(error.format_message()), "bitconvert --help, or bitconvert COMMAND --help"))
    except typer.Abort:
        _fail(BitconvertError("interrupted", "nothing was saved by this command", exit_code=_INTERRUPTED))
    except KeyboardInterrupt:
        _fail(BitconvertError("interrupted", "nothing half-written is left behind", exit_code=_INTERRUPTED))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has gone: nothing to complain of
        sys.exit(1)
    sys.exit(status)


_ClickError: Any = typer.BadParameter.__mro__[2]  # ClickException, which typer does not export


def _terminate(number: int, _: FrameType | None) -> NoReturn:
    """End as by an exception, so that what is half-written goes; warmup saves first, with a handler of its own."""
    sys.exit(128 + number)


def _fail(error: BitconvertError) -> NoReturn:
    from bitconvert import ui

    ui.show_error(error)
    sys.exit(error.exit_code)


def _quiet_libraries() -> None:
    """Our own progress and errors are the ones to read."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    warnings.simplefilter("ignore")
    logging.getLogger().setLevel(logging.ERROR)


def _print_json(report: Any) -> None:
    document = report if isinstance(report, dict) else asdict(report)
    print(json.dumps(document, indent=2, ensure_ascii=False))


def _one_line(message: str) -> str:
    return " ".join(message.split())


def _resolve(
    recipe: str | None, data: list[str] | None, held_out: list[str] | None, overrides: list[str] | None
) -> Recipe:
    """The recipe with what the command line says on top."""
    from bitconvert.recipe import load_recipe

    texts = [f"data.sources={json.dumps(data)}"] if data else []
    texts += [f"data.held_out={json.dumps(held_out)}"] if held_out else []
    return load_recipe(recipe, [*texts, *(overrides or [])])


def _resumed(
    output: Path,
    model: str | None,
    recipe: str | None,
    data: list[str] | None,
    held_out: list[str] | None,
    overrides: list[str] | None,
) -> tuple[str, Recipe]:
    """The model and recipe to go on with: the run's own, unless the command line names (the same) ones again."""
    from bitconvert.training.warmup import unfinished_run

    begun_with, begun_recipe = unfinished_run(output)
    if recipe or data or held_out or overrides:
        return model or begun_with, _resolve(recipe, data, held_out, overrides)
    return model or begun_with, begun_recipe


def _warn_of_formats(model: str, recipe: Recipe, reporter: Reporter) -> None:
    """Say before a long run, not after it, which formats cannot hold what it makes."""
    from bitconvert.models.checkpoint import open_checkpoint
    from bitconvert.packing.pack import foresee_refusals
    from bitconvert.training.keep import foreseen_kept

    checkpoint = open_checkpoint(model)
    checkpoint.keeping = foreseen_kept(checkpoint, recipe)
    for name, reason in foresee_refusals(checkpoint, recipe.pack, recipe.scaling).items():
        reporter.warn(f"{name} cannot hold what this run makes: {reason}")


def _default_output(model: str | None) -> Path:
    if model is None:
        raise UsageError("--output is missing", "name the directory of the run")
    return Path(f"{_beside_name(model)}-ternary")


def _beside_name(model: str) -> str:
    path = Path(model).expanduser()
    return re.sub(r"(-\d{5}-of-\d{5})?\.gguf$", "", (path.resolve() if path.exists() else path).name)


def _packed_beside(checkpoint: Checkpoint) -> Path:
    """Where the files of a checkpoint go."""
    return _beside(checkpoint) / f"{checkpoint.base_name}-packed"


def _beside(checkpoint: Checkpoint) -> Path:
    """The directory that a model lies in, or this one where it lies in the hub's cache."""
    return checkpoint.path.resolve().parent if Path(checkpoint.name).expanduser().exists() else Path()
