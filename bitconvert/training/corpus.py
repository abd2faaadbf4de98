"""A text that is read and never kept: its parts, file by file, and from any place in it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from transformers import PreTrainedTokenizerFast

from bitconvert.errors import BitconvertError
from bitconvert.models.texts import TEXT_FIELD, hub_dataset, read_texts, text_files
from bitconvert.training.data import (
    Tokens,
    Windows,
    end_of_text,
    first_windows,
    hub_errors_named,
    open_hub_dataset,
    seeded_order,
)
from bitconvert.training.tokenizing import encode, in_batches


class Place(NamedTuple):
    """Where in a corpus a token stands.

    Attributes:
        epoch: how often the corpus was read to its end before.
        part: which of its parts it is, in the order of this epoch.
        document: in the part.
        token: of the document.
    """

    epoch: int = 0
    part: int = 0
    document: int = 0
    token: int = 0


class Part(Protocol):
    """A file of a corpus."""

    def documents(self, skip: int) -> Iterator[str]:
        """Its documents in their order, without the first few.

        Raises:
            BitconvertError: the file is damaged, or cannot be read further.
        """


@dataclass(frozen=True)
class LocalPart:
    """A text file of any type that ``read_texts`` knows."""

    path: Path

    def documents(self, skip: int) -> Iterator[str]:
        """See ``Part``; what is skipped is read, but not tokenized."""
        return islice(read_texts([str(self.path)]), skip, None)


@dataclass(frozen=True)
class HubPart:
    """A file of a dataset that is read over the network as it is needed.

    Attributes:
        name: of the dataset.
        rows: a ``datasets.IterableDataset`` of this file alone.
    """

    name: str
    rows: Any

    def documents(self, skip: int) -> Iterator[str]:
        """See ``Part``."""
        rows = iter(self.rows.skip(skip))
        while True:
            with hub_errors_named(self.name, "cannot be read further", "check the network, then go on with --resume"):
                row = next(rows, None)
            if row is None:
                return
            if not isinstance(row.get(TEXT_FIELD), str):
                raise BitconvertError(
                    f"{self.name}: a row without a string in column '{TEXT_FIELD}'",
                    f"its columns are {', '.join(row)}",
                )
            yield row[TEXT_FIELD]


@dataclass(frozen=True)
class Corpus:
    """Documents without end: when all parts are read, they come again.

    Attributes:
        parts: files.
        key: sha256 of what identifies them, short of reading them: names and sizes.
        description: where they come from, in words.
        held_out: how many documents of the first part are not to be trained on.
    """

    parts: Sequence[Part]
    key: str
    description: str
    held_out: int = 0

    @property
    def amount(self) -> str:
        """See ``Text``."""
        return f"text streamed from {len(self.parts)} files"

    @property
    def identity(self) -> str:
        """See ``Text``."""
        return f"{self.description}, streamed (sha256 of names and sizes {self.key[:16]})"

    @property
    def files(self) -> dict[str, str]:
        """See ``Text``."""
        return {}

    def batches(self, start: Place, seed: int) -> Iterator[tuple[Place, list[str]]]:
        """Documents from a place on, a few at a time, each time with the place where the first of them begins.

        In each epoch the parts come in another seeded order. What was taken from one place is what comes from there
        whenever it is asked for.

        Raises:
            BitconvertError: a part cannot be read, or there is no text to train on.
        """
        for epoch in count(start.epoch):
            begin = start if epoch == start.epoch else Place(epoch)
            is_empty = begin.part == begin.document == 0
            for place, documents in self._epoch(begin, seed):
                is_empty = is_empty and not any(text.strip() for text in documents)
                yield place, documents
            if is_empty:
                raise BitconvertError(
                    f"{self.description}: no text is left to train on beside the held-out documents",
                    "give a text to measure on with --held-out",
                )

    def _epoch(self, begin: Place, seed: int) -> Iterator[tuple[Place, list[str]]]:
        """The rest of an epoch."""
        order = seeded_order(seed, begin.epoch, len(self.parts)).tolist()
        for turn, part in islice(enumerate(order), begin.part, None):
            skipped = begin.document if turn == begin.part else 0
            document = max(skipped, self.held_out if part == 0 else 0)
            for documents in in_batches(self.parts[part].documents(document)):
                yield Place(begin.epoch, turn, document), documents
                document += len(documents)


def open_corpus(sources: Sequence[str]) -> Corpus:
    """Find the parts of local files and directories, or of a hub dataset. Nothing of them is read.

    Raises:
        BitconvertError: a source is missing or of an unknown type.
    """
    description = ", ".join(sources)
    name = hub_dataset(sources)
    if name is None:
        files = text_files(sources)
        told = [f"{file.name} {file.stat().st_size}" for file in files]
        return Corpus([LocalPart(file) for file in files], _key(told), description)
    dataset = open_hub_dataset(name, streaming=True)
    parts = dataset.num_shards
    shards = [HubPart(name, dataset.shard(num_shards=parts, index=index)) for index in range(parts)]
    return Corpus(shards, _key([f"{name} {parts}"]), description)


def hold_out(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, count: int, context: int) -> tuple[Corpus, Windows]:
    """The corpus without the documents at its beginning, and windows of those, to measure on.

    Args:
        corpus: whose first part has at least one document.
        tokenizer: of the model.
        count: tokens to hold out; fewer, if the first part is shorter.
        context: tokens in a window.

    Raises:
        BitconvertError: the first part is too short for one window.
    """
    ids: list[int] = []
    documents = 0
    for document in corpus.parts[0].documents(0):
        ids += next(encode(tokenizer.backend_tokenizer, end_of_text(tokenizer), [document]))
        documents += 1
        if len(ids) >= max(count, context):
            break
    tokens = Tokens(np.array(ids, np.uint32), corpus.key, f"{corpus.description} (its first file)")
    return replace(corpus, held_out=documents), first_windows(tokens, count, context)


def _key(told: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(told).encode()).hexdigest()
