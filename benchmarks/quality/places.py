"""Where things lie, and how a command line names them so that it can be copied on another machine."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import bitconvert
from benchmarks.quality.bed import EMBEDDED, Bed
from bitconvert.errors import UsageError

ROOT = Path(bitconvert.__file__).parent.parent


@dataclass(frozen=True)
class Places:
    """Directories of one invocation, absolute.

    Attributes:
        models: the user's models and texts; None where only the embedded model is measured.
        runs: texts that were made, trainings that are not finished, and trained models that are kept.
    """

    models: Path | None
    runs: Path

    def model(self, bed: Bed) -> Path:
        """The original model of a bed."""
        return ROOT / "bitconvert" / "demo" / "model" if bed.model == EMBEDDED else self.given(bed.model)

    def given(self, name: str) -> Path:
        """A file or directory below --models.

        Raises:
            UsageError: there is none.
        """
        if self.models is None or not (self.models / name).exists():
            raise UsageError(f"--models {self.models or ''}: no {name} there", "benchmarks/quality/README.md says why")
        return self.models / name

    def shown(self, argv: Sequence[str]) -> str:
        """A command line of ``bitconvert``, for a shell in which ``exports`` were set, at the root of the checkout."""
        return " ".join(["bitconvert", *map(self._word, argv)])

    def exports(self) -> str:
        """What the shown command lines take for granted."""
        variables = {"MODELS": self.models, "RUNS": self.runs}
        given = [f"{name}={shlex.quote(str(path))}" for name, path in variables.items() if path]
        return f"export OMP_NUM_THREADS=1 {' '.join(given)}"

    def _word(self, word: str) -> str:
        for variable, directory in (("$MODELS/", self.models), ("$RUNS/", self.runs), ("", ROOT)):
            if directory and word.startswith(f"{directory}/"):
                return variable + shlex.quote(word.removeprefix(f"{directory}/"))
        return shlex.quote(word)
