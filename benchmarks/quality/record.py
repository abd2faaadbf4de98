"""What is kept of a trial: one JSON file, which holds all that the table and the plots need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from benchmarks.quality.files import Section
from benchmarks.quality.trial import Trial
from bitconvert.atomic import atomic_file
from bitconvert.errors import UsageError


class Measured(Section):
    """Of the trained model on the judged text, ternary weights and 8-bit activations, against the original."""

    ppl: float
    original_ppl: float
    ppl_ratio: float
    ppl_ratio_stderr: float
    kl: float = Field(description="KL(original || model) in nats per token")
    top1_agreement: float = Field(description="share of tokens, 0 to 1")
    bits_per_byte: float
    tokens_scored: int
    text_sha256: str


class Watched(Section):
    """On the watched text, ternary."""

    ppl: float = Field(description="at the end; learning rates are chosen by it")
    original_ppl: float
    rounded_ppl: float = Field(description="before the first step")
    curve: tuple[tuple[int, float], ...] = Field(description="(tokens, ppl)")


class Cost(Section):
    """Of the warmup."""

    seconds: float = Field(description="wall clock; of the last part alone where it was interrupted")
    cpu_seconds: float
    peak_bytes: int = Field(description="resident")
    threads: int
    interrupted: bool


class Record(Section):
    """One trial's results, and what they were made with."""

    bed: str
    cell: str
    about: str
    lr: float
    seed: int
    tokens: int
    model: str
    commands: tuple[str, ...]
    order: str = Field(description="hash of all that was trained on, in order")
    method: dict[str, Any] = Field(description="the resolved recipe without the texts")
    error: str = Field("", description="the line that the training ended with, where it failed")
    measured: Measured | None = None
    watched: Watched | None = None
    cost: Cost
    precision: str = Field(description="of the products of the training, where they are not integers")
    hardware: str
    versions: dict[str, str]
    commit: str
    began: str = Field(description="ISO 8601")


def record_path(results: Path, trial: Trial) -> Path:
    """The file of a trial."""
    return results / f"{trial.name}.json"


def write_record(record: Record, path: Path) -> None:
    """It appears whole, or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")


def read_record(path: Path) -> Record:
    """Read what ``write_record`` wrote.

    Raises:
        UsageError: it is something else.
    """
    try:
        return Record.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise UsageError(f"{path}: not a result of this benchmark", "remove it, and run the grid again") from error


def read_records(results: Path) -> list[Record]:
    """All below a directory."""
    return [read_record(path) for path in sorted(results.rglob("lr-*-seed-*.json"))]


def require_same_method(record: Record, trial: Trial, path: Path) -> None:
    """See that a finished trial is the one that the grid means today. Keys that came or went since do not count.

    Raises:
        UsageError: naming the first difference.
    """
    for key, value in trial.method().items():
        if record.method.get(key, value) != value:
            raise UsageError(
                f"{path}: was measured with {key}={record.method[key]}, and the grid now says {value}",
                "remove the file to measure it again, give the cell another name, or choose other --results",
            )
    if record.order != trial.order:
        raise UsageError(f"{path}: was trained on other tokens", "remove it, or choose other --results")
