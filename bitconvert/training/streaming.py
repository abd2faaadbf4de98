"""Windows of a corpus larger than the disk: tokenized ahead into a few shard files, which go when they are read.

A shard holds a fixed number of windows, and its windows come in a seeded order; so which window comes at which
position is known from the corpus, the seed and the size of a shard, whoever tokenizes. Processes of one node talk
through the directory of the shards: each names, in a file of its own, the shard that it reads, and the one that
tokenizes keeps as many from the first of those on as the recipe allows. A shard appears by rename.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from bitconvert.atomic import atomic_file
from bitconvert.errors import BitconvertError
from bitconvert.ranks import is_main, local_rank, local_world_size, node
from bitconvert.recipe import Recipe
from bitconvert.training.corpus import Corpus, Place
from bitconvert.training.data import TrainingWindows, Windows, cache_directory, end_of_text, id_dtype, seeded_order
from bitconvert.training.tokenizing import Tokenized, TokenizingProcesses

PLACES = "places.jsonl"
_LAYOUT = "stream-1"  # part of every key: change it when the meaning of the shards' bytes changes
_LOOK_AGAIN_SECONDS = 0.02


@contextmanager
def streamed_windows(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, run_directory: Path
) -> Iterator[StreamedWindows]:
    """The windows of a run, while they are tokenized in the background; every process of a node calls this.

    Args:
        corpus: without what is held out.
        tokenizer: of the model.
        recipe: resolved options.
        run_directory: keeps where in the corpus each shard begins, so that a resumed run need not tokenize anew what it
            has trained on.
    """
    options, training = recipe.data, recipe.training
    key = _key(corpus, tokenizer, recipe)
    dtype = id_dtype(len(tokenizer))
    windows = options.shard_tokens // training.context
    count = training.steps * training.batch_size
    shards = _Shards(_directory(run_directory, key), range(-(-count // windows)), options.shards)
    order = StreamedWindows(shards, dtype, windows, training.context, count, training.seed)
    if local_rank() > 0:
        yield order
        return
    places = _Places(run_directory / PLACES, key)
    processes = TokenizingProcesses(tokenizer.backend_tokenizer, end_of_text(tokenizer), dtype, options.workers)
    writer = _Writer(shards, corpus, places, processes, windows * training.context, training.seed)
    order.watch(writer)
    writer.start()
    try:
        yield order
    finally:
        writer.stop()
        shards.remove()


class StreamedWindows(TrainingWindows):
    """``count`` windows in an order that whoever tokenizes them does not change; best asked for as they come.

    Args:
        shards: where they lie.
        dtype: of the ids in them.
        windows: in a shard.
        context: tokens in a window.
        count: of windows in all.
        seed: of their order within each shard.
    """

    def __init__(
        self, shards: _Shards, dtype: np.dtype[Any], windows: int, context: int, count: int, seed: int
    ) -> None:
        self._shards = shards
        self._dtype = dtype
        self._windows = windows
        self._context = context
        self._count = count
        self._seed = seed
        self._writer: _Writer | None = None
        self._opened: tuple[int, Windows, np.ndarray[Any, np.dtype[np.int64]]] | None = None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        shard, position = divmod(index, self._windows)
        if self._opened is None or self._opened[0] != shard:
            self._opened = None  # what is not mapped any more can go
            self._opened = shard, *self._open(shard)
        _, windows, order = self._opened
        return windows[int(order[position])]

    @property
    def distinct(self) -> int:
        """See ``TrainingWindows``: those of the first shard."""
        return min(self._count, self._windows)

    def watch(self, writer: _Writer) -> None:
        """Raise what keeps this process's own writer from going on."""
        self._writer = writer

    def _open(self, shard: int) -> tuple[Windows, np.ndarray[Any, np.dtype[np.int64]]]:
        self._shards.ask_for(shard)
        path = self._shards.path(shard)
        while not path.exists():
            if self._writer is not None:
                self._writer.require_well()
            time.sleep(_LOOK_AGAIN_SECONDS)
        windows = Windows(np.memmap(path, self._dtype, mode="r"), self._context)
        return windows, seeded_order(self._seed, shard, self._windows)


class _Shards:
    """The shard files of a node, and what its processes ask for.

    Args:
        directory: of them.
        needed: all shards of the run.
        most: how many may lie there at a time, with the one that is being written.
    """

    def __init__(self, directory: Path, needed: range, most: int) -> None:
        self._directory = directory
        self._needed = needed
        self._most = most

    def path(self, shard: int) -> Path:
        """Of a shard, which may not be there yet."""
        return self._directory / f"{shard:08d}.bin"

    def ask_for(self, shard: int) -> None:
        """Say that this process reads a shard now, and none before it."""
        with atomic_file(self._reader(local_rank())) as temporary:
            temporary.write_text(str(shard), encoding="ascii")

    def next_missing(self) -> int | None:
        """Remove the shards that nobody asks for, and tell which should be written next; None while there is room."""
        readers = [self._reader(rank) for rank in range(local_world_size())]
        if not all(reader.exists() for reader in readers):
            return None
        first = min(int(reader.read_text(encoding="ascii")) for reader in readers)
        wanted = range(first, min(first + self._most, self._needed.stop))
        for path in self._directory.glob("*.bin"):
            if int(path.stem) not in wanted:
                path.unlink()
        return next((shard for shard in wanted if not self.path(shard).exists()), None)

    def remove(self) -> None:
        """All of them."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def _reader(self, rank: int) -> Path:
        return self._directory / f"reader-{rank}"


class _Places:
    """Where in the corpus the shards begin, as far as somebody came to it; a line is added for each.

    Args:
        path: in the run's directory; may exist from before.
        key: of the shards.

    Raises:
        BitconvertError: the corpus is not that of the run's beginning.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._path = path
        self._known = {0: Place()}
        kept = [line for line in _lines(path) if line.endswith("\n")] or [json.dumps({"key": key}) + "\n"]
        try:
            found, *places = map(json.loads, kept)
            self._known |= {place.pop("shard"): Place(**place) for place in places}
        except (ValueError, TypeError, KeyError) as error:
            raise BitconvertError(f"{path}: damaged", "remove it: the run goes on with --resume, only later") from error
        if found != {"key": key}:
            raise BitconvertError(
                f"{path}: the text, or its tokenizer, has changed since this run began",
                "restore it, or start again with another --output",
            )
        if is_main():
            with atomic_file(path) as temporary:
                temporary.write_text("".join(kept), encoding="utf-8")

    def before(self, shard: int) -> tuple[int, Place]:
        """The last shard up to this one whose place is known, and the place."""
        known = max(number for number in self._known if number <= shard)
        return known, self._known[known]

    def add(self, shard: int, place: Place) -> None:
        """Note where a shard begins."""
        if shard not in self._known:
            self._known[shard] = place
            if is_main():
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"shard": shard, **place._asdict()}) + "\n")


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []


class _Writer(threading.Thread):
    """Tokenizes shards in the order in which they are missed, until it is stopped.

    Args:
        shards: where they go.
        corpus: what is tokenized.
        places: told where each shard ends.
        processes: that tokenize.
        tokens: in a shard.
        seed: of the order of the corpus's parts.
    """

    def __init__(
        self, shards: _Shards, corpus: Corpus, places: _Places, processes: TokenizingProcesses, tokens: int, seed: int
    ) -> None:
        super().__init__(name="tokenizing", daemon=True)
        self._shards = shards
        self._corpus = corpus
        self._places = places
        self._processes = processes
        self._tokens = tokens
        self._seed = seed
        self._stopped = threading.Event()
        self._failure: Exception | None = None

    def run(self) -> None:
        """See ``threading.Thread``."""
        try:
            with self._processes:
                self._write_shards()
        except _Stopped:
            pass
        except Exception as error:  # raised where a shard is waited for
            self._failure = error

    def stop(self) -> None:
        """Stop after the batch under way."""
        self._stopped.set()
        self.join()

    def require_well(self) -> None:
        """Raise what ended the thread.

        Raises:
            BitconvertError: a document cannot be read, the disk is full, or a process is gone.
        """
        if self._failure is not None:
            raise self._failure

    def _write_shards(self) -> None:
        stream = following = None
        while not self._stopped.is_set():
            shard = self._shards.next_missing()
            if shard is None:
                self._stopped.wait(_LOOK_AGAIN_SECONDS)
                continue
            if stream is None or shard != following:
                stream = self._stream_to(shard)
            with atomic_file(self._shards.path(shard)) as temporary, temporary.open("wb") as file:
                stream.write(self._tokens, file)
                following = shard + 1
                self._places.add(following, stream.place)

    def _stream_to(self, shard: int) -> _TokenStream:
        """The tokens from the beginning of a shard on; those before it are not made again if its place is known."""
        known, place = self._places.before(shard)
        stream = _TokenStream(self._processes.tokenize(self._corpus.batches(place, self._seed)), place, self._stopped)
        with Path(os.devnull).open("wb") as nowhere:
            stream.write((shard - known) * self._tokens, nowhere)
        return stream


class _TokenStream:
    """Tokens of documents, in pieces of any size.

    Args:
        batches: of documents, each with the place where its first one begins.
        start: the place of the first token that is wanted, in the first document.
        stopped: set when no more is wanted.
    """

    def __init__(self, batches: Iterator[tuple[Place, Tokenized]], start: Place, stopped: threading.Event) -> None:
        self._batches = batches
        self._stopped = stopped
        self._begin, self._batch = next(batches)
        self._taken = start.token

    def write(self, tokens: int, file: BinaryIO) -> None:
        """Take the next tokens.

        Raises:
            _Stopped: meanwhile.
        """
        while tokens:
            if self._stopped.is_set():
                raise _Stopped
            piece = self._batch.ids[self._taken : self._taken + tokens]
            file.write(piece.data)
            self._taken += len(piece)
            tokens -= len(piece)
            if self._taken == len(self._batch.ids):
                self._begin, self._batch = next(self._batches)
                self._taken = 0

    @property
    def place(self) -> Place:
        """Of the next token."""
        document = int(np.searchsorted(self._batch.ends, self._taken, side="right"))
        begin = int(self._batch.ends[document - 1]) if document else 0
        return self._begin._replace(document=self._begin.document + document, token=self._taken - begin)


class _Stopped(Exception):
    """Ends what was begun for a run that is over."""


def _key(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> str:
    """sha256 of all that decides the windows, as far as it is known without reading the corpus."""
    parts = (
        _LAYOUT,
        corpus.key,
        corpus.held_out,
        tokenizer.backend_tokenizer.to_str(),
        end_of_text(tokenizer),
        recipe.data.shard_tokens,
        recipe.training.context,
        recipe.training.seed,
    )
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


def _directory(run_directory: Path, key: str) -> Path:
    """Of one run's shards on this node: in the cache, since a run's directory may be on a disk that nodes share."""
    name = hashlib.sha256(f"{run_directory.resolve()}\n{key}\n{node()}".encode())
    return cache_directory() / "streams" / name.hexdigest()
