"""What one run of ``pack`` was asked for, and what every kind of output does with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Generic, TypeVar

from bitconvert.models.checkpoint import Checkpoint
from bitconvert.packing.formats.base import Format
from bitconvert.packing.gguf.vocabulary import Vocabulary, vocabulary_of
from bitconvert.packing.source import SourceTensor
from bitconvert.recipe import Packing, Scaling
from bitconvert.report import PackedFile, Reporter

FormatT = TypeVar("FormatT", bound=Format)


@dataclass(frozen=True)
class PackJob:
    """One model on its way into files.

    Attributes:
        checkpoint: latent, or plain and to be rounded.
        tensors: those that go into a file.
        scaling: of the ternary weights.
        options: what the user chose.
        output: directory for the files.
        reporter: told the weights done.
    """

    checkpoint: Checkpoint
    tensors: list[SourceTensor]
    scaling: Scaling
    options: Packing
    output: Path
    reporter: Reporter

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The tokenizer as llama.cpp will know it.

        Raises:
            BitconvertError: llama.cpp cannot give the same token ids.
        """
        config = self.checkpoint.complete
        return vocabulary_of(self.checkpoint.tokenizer(), config.vocab_size, self.checkpoint.config)


class Container(ABC, Generic[FormatT]):
    """A kind of output: a file or a directory that holds a whole model in one format."""

    @abstractmethod
    def target(self, job: PackJob, form: FormatT) -> Path:
        """Where the output will be."""

    @abstractmethod
    def require(self, job: PackJob, form: FormatT) -> None:
        """Refuse what this kind of output cannot hold, before anything is written.

        Raises:
            BitconvertError: with the reason.
        """

    @abstractmethod
    def write(self, job: PackJob, form: FormatT) -> PackedFile:
        """Write the model, complete and read back, or not at all.

        Raises:
            BitconvertError: the place cannot be written to, a scale cannot be stored, or the file does not read back.
        """
