"""Where a checkpoint comes from and what was done to it: ``bitconvert.json`` beside the weights."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from bitconvert.models.record import read_record, save_record
from bitconvert.recipe import Scaling
from bitconvert.version import __version__

LINEAGE_FILE = "bitconvert.json"

_TOLD_VERSIONS = ("torch", "transformers", "accelerate", "safetensors", "gguf")


class HeldOut(BaseModel):
    """Perplexities on text that was held out of the training.

    Attributes:
        original: of the original model.
        rounded: of the original, rounded without training.
        ternary: of the result at λ = 1.
    """

    model_config = ConfigDict(extra="forbid")

    original: float
    rounded: float
    ternary: float


class Origin(BaseModel):
    """The very files that a model was made from.

    Attributes:
        revision: the hub's commit of them; empty where they do not come from there.
        files: SHA-256 of weights, config and tokenizer, by file name.
    """

    model_config = ConfigDict(extra="forbid")

    revision: str = ""
    files: dict[str, str] = Field(default_factory=dict)


class Lineage(BaseModel):
    """The history of a model that bitconvert wrote.

    Attributes:
        source: the original model as the user named it, without its revision.
        origin: the files that it was.
        lam: λ at the end; below 1 the model is not ternary yet.
        scaling: estimator and granularity of the scales the weights were trained under.
        kept: linears of the blocks that are not ternary: modules by their dotted names.
        keep_tokens: tokens that went forward through the original to choose what is kept.
        tokens_seen: training tokens.
        init_tokens: tokens looked at before the first step, to begin with better latents.
        steps: optimizer steps.
        data: what it was trained on, in words.
        data_files: SHA-256 of the texts, by path as the user named it.
        seed: of the training run.
        license: of the original model, as its own card names it; empty where it does not.
        held_out: what the training cost, measured at its end.
        versions: of Python and of the libraries that made it.
    """

    model_config = ConfigDict(extra="forbid")

    source: str
    origin: Origin = Field(default_factory=Origin)
    lam: float = Field(ge=0.0, le=1.0)
    scaling: Scaling
    kept: tuple[str, ...] = ()
    keep_tokens: int = 0
    tokens_seen: int
    init_tokens: int = 0
    steps: int = 0
    data: str = ""
    data_files: dict[str, str] = Field(default_factory=dict)
    seed: int = 0
    license: str = ""
    held_out: HeldOut | None = None
    versions: dict[str, str] = Field(default_factory=lambda: library_versions())

    def save(self, directory: Path) -> None:
        """Write ``bitconvert.json`` into a directory."""
        save_record(self, directory / LINEAGE_FILE)


def read_lineage(directory: Path) -> Lineage | None:
    """The lineage beside a checkpoint's weights, or None if another program wrote it.

    Raises:
        BitconvertError: the file is there and cannot be read.
    """
    return read_record(directory / LINEAGE_FILE, Lineage, "restore the file that warmup wrote, or run warmup again")


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide what a model's weights become."""
    versions = {name: importlib.metadata.version(name) for name in _TOLD_VERSIONS}
    return {"python": platform.python_version(), "bitconvert": __version__, **versions}
