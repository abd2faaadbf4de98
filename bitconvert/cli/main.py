"""The program: its commands, its exit codes."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from bitconvert.cli.adapt import adapt
from bitconvert.cli.compare import compare
from bitconvert.cli.convert import convert
from bitconvert.cli.demo import demo
from bitconvert.cli.doctor import doctor
from bitconvert.cli.evaluate import evaluate
from bitconvert.cli.generate import generate
from bitconvert.cli.inspect import inspect
from bitconvert.cli.pack import pack
from bitconvert.cli.plan import plan
from bitconvert.cli.recipes import recipes
from bitconvert.cli.unpack import unpack
from bitconvert.cli.verify import verify
from bitconvert.cli.warmup import warmup
from bitconvert.errors import BitconvertError, ExitCode, UsageError
from bitconvert.heap import is_out_of_memory
from bitconvert.ranks import is_main
from bitconvert.version import __version__

app = typer.Typer(
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich's help takes longer to import than all the rest
    context_settings={"help_option_names": ["-h", "--help"]},
)

_LESS_MEMORY = "end other programs, or ask for less: a shorter --context, one --format at a time"


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"bitconvert {__version__}")
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
        raise typer.Exit(ExitCode.USAGE)


_COMMANDS: dict[str, Callable[..., None]] = {
    "convert": convert,
    "warmup": warmup,
    "plan": plan,
    "pack": pack,
    "unpack": unpack,
    "eval": evaluate,
    "generate": generate,
    "adapt": adapt,
    "inspect": inspect,
    "compare": compare,
    "verify": verify,
    "demo": demo,
    "recipes": recipes,
    "doctor": doctor,
}
for _name, _command in _COMMANDS.items():
    app.command(_name)(_command)

_ClickError: Any = typer.BadParameter.__mro__[2]  # ClickException, which typer does not export


def main() -> NoReturn:
    """Run the command line and exit with one of ``ExitCode``."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        _quiet_libraries()
        status = app(prog_name="bitconvert", standalone_mode=False)
        if status == ExitCode.INTERRUPTED:
            raise KeyboardInterrupt  # typer has caught it, and returned this instead
    except BitconvertError as error:
        _fail(error)
    except _ClickError as error:
        _fail(UsageError(_one_line(error.format_message()), "bitconvert --help, or bitconvert COMMAND --help"))
    except typer.Abort:
        _fail(BitconvertError("interrupted", "nothing was saved by this command", exit_code=ExitCode.INTERRUPTED))
    except KeyboardInterrupt:
        _fail(BitconvertError("interrupted", "nothing half-written is left behind", exit_code=ExitCode.INTERRUPTED))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has gone: nothing to complain of
        sys.exit(ExitCode.FAILED)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        _fail(BitconvertError(f"out of memory ({_one_line(str(error))[:200]})", _LESS_MEMORY))
    sys.exit(status)


def _terminate(number: int, _: FrameType | None) -> NoReturn:
    """End as by an exception, so that what is half-written goes; warmup saves first, with a handler of its own."""
    sys.exit(128 + number)


def _fail(error: BitconvertError) -> NoReturn:
    from bitconvert.ui.console import show_error

    if is_main() or error.exit_code <= ExitCode.USAGE:  # interrupted are all processes together
        show_error(error)
    sys.exit(error.exit_code)


def _quiet_libraries() -> None:
    """Our own progress and errors are the ones to read."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    warnings.simplefilter("ignore")
    logging.getLogger().setLevel(logging.ERROR)


def _one_line(message: str) -> str:
    return " ".join(message.split())
