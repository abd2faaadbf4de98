"""What one run of ``pack`` was asked for, and what every kind of output does with it."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from bitconvert.models.checkpoint import Checkpoint
from bitconvert.packing.formats.base import Format
from bitconvert.packing.gguf.vocabulary import Vocabulary, vocabulary_of
from bitconvert.packing.readback import ReadBack
from bitconvert.packing.source import SourceTensor
from bitconvert.recipe import Packing, Scaling
from bitconvert.report.packing import PackedFile
from bitconvert.report.reporter import Reporter
from bitconvert.ternary.quantize import TernaryTensor

FormatT = TypeVar("FormatT", bound=Format)

Parts = Mapping[str, NDArray[Any]]
"""Names that an output has for tensors, and what is stored under them."""


@dataclass(frozen=True)
class PackJob:
    """One model on its way into files.

    Attributes:
        checkpoint: latent, or plain and to be rounded.
        tensors: those that go into a file.
        scaling: of the ternary weights.
        options: what the user chose.
        output: directory that the files will lie in.
        directory: where they are written, until all of them are whole.
        reporter: told the weights done.
        foreseen: whether nothing will be written, so that a config is enough.
    """

    checkpoint: Checkpoint
    tensors: list[SourceTensor]
    scaling: Scaling
    options: Packing
    output: Path
    directory: Path
    reporter: Reporter
    foreseen: bool = False

    @property
    def has_vocabulary(self) -> bool:
        """Whether there is a tokenizer, or there must be one."""
        return self.checkpoint.has_tokenizer or not self.foreseen

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The tokenizer as llama.cpp will know it.

        Raises:
            BitconvertError: llama.cpp cannot give the same token ids.
        """
        return vocabulary_of(self.tokenizer, self.checkpoint.complete.vocab_size, self.checkpoint.config)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The model's tokenizer, which every output brings along.

        Raises:
            BitconvertError: it is missing or damaged, or does not belong to the model.
        """
        return self.checkpoint.tokenizer()


class Encoder(ABC):
    """What becomes of one ternary tensor in one output. Encoders of several tensors may work at the same time."""

    @abstractmethod
    def add(self, rows: TernaryTensor) -> None:
        """Take the next rows; their arrays are the caller's, and not kept.

        Raises:
            BitconvertError: what they were encoded to does not decode to them.
        """

    @abstractmethod
    def finish(self) -> Parts:
        """All rows are there: what is to be written, by the names of the output."""


class WholeEncoder(Encoder):
    """For formats that put rows together which are not neighbours: keeps the codes until all are there.

    Args:
        tensor: what is to be encoded.
        encode: of all its rows, held against what they mean.
    """

    def __init__(self, tensor: SourceTensor, encode: Callable[[TernaryTensor], Parts]) -> None:
        self._codes = torch.from_numpy(np.empty(tensor.shape, np.int8))
        self._scales: list[Tensor] = []
        self._encode = encode
        self._end = 0

    def add(self, rows: TernaryTensor) -> None:
        """See ``Encoder``."""
        begin, self._end = self._end, self._end + len(rows.codes)
        self._codes[begin : self._end] = rows.codes
        self._scales.append(rows.scale)

    def finish(self) -> Parts:
        """See ``Encoder``; a scale per tensor, shape (1,), came with all rows."""
        shared = self._scales[0].dim() == 1
        return self._encode(TernaryTensor(self._codes, self._scales[0] if shared else torch.cat(self._scales)))


class Output(ABC):
    """A file or directory while it is filled, below ``PackJob.directory``.

    Every tensor is written once, in the order of ``PackJob.tensors``.

    Args:
        target: where it will be.
        files: open ones; closed before they are read back.
    """

    def __init__(self, target: Path, files: ExitStack) -> None:
        self.target = target
        self.files = files
        self.read_back = ReadBack(target)
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since it was opened."""
        return time.monotonic() - self._started

    @abstractmethod
    def encoder(self, tensor: SourceTensor) -> Encoder:
        """For a ternary tensor."""

    @abstractmethod
    def plain(self, tensor: SourceTensor, rows: Tensor) -> Parts:
        """Some rows of a tensor that is not ternary, as they are stored; vectors come whole.

        Raises:
            BitconvertError: they cannot be stored so.
        """

    def write(self, parts: Parts) -> None:
        """Write tensors, or the next rows of them, to their places."""
        for name, data in parts.items():
            self.read_back.expect(name, data)
            self.put(name, data)

    @abstractmethod
    def put(self, name: str, data: NDArray[Any]) -> None:
        """Write the next bytes of a tensor of the output."""

    @abstractmethod
    def finish(self) -> PackedFile:
        """All tensors are written: add what else belongs to the output, and read it all back.

        Raises:
            BitconvertError: it does not read back.
        """


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
    def nbytes(self, job: PackJob, form: FormatT) -> int:
        """Bytes that the weight files of an output will have, known from names and shapes alone.

        What is told of the training adds some hundred bytes to a file that holds it.
        """

    def types(self, job: PackJob, form: FormatT) -> set[str]:
        """The types that ternary matrices will have, where the format alone does not decide it."""
        return set()

    @abstractmethod
    def open(self, job: PackJob, form: FormatT) -> AbstractContextManager[Output]:
        """Begin an output; its files are closed when the ``with`` block ends."""
