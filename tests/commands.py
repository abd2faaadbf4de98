"""The command line as tests call it: in this process, so that torch is loaded once."""

from __future__ import annotations

import json
import sys
from typing import Any, Protocol

import jsonschema
import pytest

from bitconvert.cli import main as cli
from docs.generator.schemas import schemas


class Outcome:
    """What a command ended with."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    def error(self) -> str:
        """The error line, after checking that it comes with one hint and no traceback."""
        lines = [line for line in self.err.splitlines() if line.startswith(("error:", "hint:", "Traceback"))]
        assert [line.split(":")[0] for line in lines] == ["error", "hint"], self.err
        return lines[0]


class Command(Protocol):
    """``bitconvert(*arguments)``."""

    def __call__(self, *arguments: object) -> Outcome: ...


def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """The command line in this process, its output captured; JSON is held to its schema."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["bitconvert", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        outcome = Outcome(int(stopped.value.code or 0), *capsys.readouterr())
        if "--json" in arguments and outcome.out:
            told = "plan" if "--dry-run" in arguments else arguments[0]  # which is what it prints then
            document(str(told), outcome.out)
        return outcome

    return run


def document(name: str, printed: str) -> dict[str, Any]:
    """What a command printed with ``--json``, after checking it against the schema that the reference gives."""
    parsed: dict[str, Any] = json.loads(printed)
    jsonschema.validate(parsed, schemas()[name])
    return parsed
