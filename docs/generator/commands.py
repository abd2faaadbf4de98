"""The command line in Markdown: every command with its arguments and options, and the exit codes."""

from __future__ import annotations

from typing import Any

import typer

from bitconvert.cli.main import app
from bitconvert.errors import ExitCode
from docs.generator.markdown import page, paragraphs, prose, table

PROGRAM = "bitconvert"
_GROUP: Any = typer.main.get_command(app)


def commands() -> dict[str, Any]:
    """Every command by name, as the object that parses its arguments."""
    return dict(_GROUP.commands)


def prints_json(command: Any) -> bool:
    """Whether it has ``--json``."""
    return any("--json" in parameter.opts for parameter in command.params)


def commands_page() -> str:
    """Every command, argument and option."""
    by_name = commands()
    listed = (f"- [`{name}`](#{PROGRAM}-{name}): {_summary(command.help)}" for name, command in by_name.items())
    return page(
        "Commands",
        _usage(_GROUP, PROGRAM),
        _parameters(_GROUP),
        "\n".join(listed),
        *(_command(name, command) for name, command in by_name.items()),
    )


def exit_codes_page() -> str:
    """What a process exits with, and what an error looks like."""
    return page(
        "Exit codes and errors",
        table(("code", "meaning"), ((str(code.value), code.meaning) for code in ExitCode)),
        "An error is two lines on stderr:",
        "```text\nerror: what is wrong, naming the file, tensor or key\nhint: what to do about it\n```",
        "It is the same with `--json`, and stdout stays empty: a program reads its document after exit code 0, and "
        "those two lines after any other. Progress, `note:` and `warning:` lines go to stderr as well.",
        "In Python every such failure is a `bitconvert.BitconvertError` with `message`, `hint` and `exit_code`.",
    )


def _command(name: str, command: Any) -> str:
    return paragraphs(
        f"## {PROGRAM} {name}",
        prose(command.help),
        _usage(command, f"{PROGRAM} {name}"),
        _parameters(command),
        f"`--json` prints [this document](json.md#{name})." if prints_json(command) else "",
    )


def _usage(command: Any, name: str) -> str:
    pieces = command.collect_usage_pieces(_context(command))
    return f"```text\n{' '.join([name, *pieces])}\n```"


def _parameters(command: Any) -> str:
    context = _context(command)
    records = (parameter.get_help_record(context) for parameter in command.get_params(context))
    return table(("argument or option", ""), ((f"`{spelled}`", told) for spelled, told in filter(None, records)))


def _context(command: Any) -> Any:
    """Of a command as the program calls it: with the program's ways to ask for help."""
    return command.context_class(command, info_name=command.name, **_GROUP.context_settings)


def _summary(told: str) -> str:
    return " ".join(told.split("\n\n")[0].split())
