"""Documents into token ids, here or in processes of their own; what those import is light, and comes without torch."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from bitconvert.errors import BitconvertError

LabelT = TypeVar("LabelT")

_DOCUMENTS_AT_ONCE = 256
_LETTERS_AT_ONCE = 2**20
_BATCHES_AHEAD = 3  # of each process: one that it works on, the others so that it need not wait


class Tokenized(NamedTuple):
    """The tokens of some documents, one after the other.

    Attributes:
        ids: of all of them.
        ends: where in ``ids`` each document ends.
    """

    ids: NDArray[Any]
    ends: NDArray[np.int64]


def encode(tokenizer: Tokenizer, end: int | None, documents: Sequence[str]) -> Iterator[list[int]]:
    """Each document's ids with the special tokens that the tokenizer adds, ended by ``end`` if there is one."""
    for encoding in tokenizer.encode_batch_fast(documents, add_special_tokens=True):
        ids = encoding.ids
        yield [*ids, end] if end is not None and (not ids or ids[-1] != end) else ids


def in_batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Documents a few at a time: fewer, where they are long."""
    batch: list[str] = []
    letters = 0
    for document in documents:
        batch.append(document)
        letters += len(document)
        if len(batch) == _DOCUMENTS_AT_ONCE or letters >= _LETTERS_AT_ONCE:
            yield batch
            batch, letters = [], 0
    if batch:
        yield batch


class TokenizingProcesses:
    """A few processes that tokenize ahead, each with one thread; they end with the ``with`` block, or with this one.

    Args:
        tokenizer: used by all of them.
        end: token that ends each document, if any.
        dtype: of the ids.
        count: of processes.
    """

    def __init__(self, tokenizer: Tokenizer, end: int | None, dtype: np.dtype[Any], count: int) -> None:
        self._count = count
        self._pool = ProcessPoolExecutor(
            count,
            mp_context=multiprocessing.get_context("spawn"),  # a fork of a process that trains inherits locked locks
            initializer=_begin,
            initargs=(tokenizer.to_str(), end, dtype),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def tokenize(self, batches: Iterator[tuple[LabelT, list[str]]]) -> Iterator[tuple[LabelT, Tokenized]]:
        """The tokens of labelled batches without end, in their order; a few are taken before they are asked for.

        Raises:
            BitconvertError: a process is gone; or what ``batches`` raises, after the tokens of those before.
        """
        ahead: deque[tuple[LabelT, Future[Tokenized]]] = deque()
        failure: BitconvertError | None = None
        try:
            while not failure or ahead:
                while not failure and len(ahead) <= _BATCHES_AHEAD * self._count:
                    try:
                        label, documents = next(batches)
                        ahead.append((label, self._pool.submit(_tokenize, documents)))
                    except BitconvertError as error:
                        failure = error
                if ahead:
                    label, tokenized = ahead.popleft()
                    yield label, tokenized.result()
            raise failure
        except BrokenProcessPool as error:
            raise BitconvertError(
                "a process that tokenizes text ended unexpectedly",
                "if memory ran out, lower data.workers, then go on with --resume; "
                "a script that calls warmup needs `if __name__ == '__main__':`",
            ) from error
        finally:
            for _, future in ahead:
                future.cancel()


# ---- in the processes ------------------------------------------------------------------------------------------------

_tools: tuple[Tokenizer, int | None, np.dtype[Any]]


def _begin(tokenizer: str, end: int | None, dtype: np.dtype[Any]) -> None:
    global _tools
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _tools = Tokenizer.from_str(tokenizer), end, dtype
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group; the training ends its step, then us
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed process cannot end its children, and they would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _tokenize(documents: list[str]) -> Tokenized:
    tokenizer, end, dtype = _tools
    lists = list(encode(tokenizer, end, documents))
    ends = np.cumsum([len(ids) for ids in lists], dtype=np.int64)
    return Tokenized(np.array(list(chain.from_iterable(lists)), dtype), ends)
