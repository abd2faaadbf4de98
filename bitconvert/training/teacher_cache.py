"""The teacher on disk: its likeliest tokens at every training position, computed once for all epochs and runs."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ByteSize
from torch import Tensor
from torch.utils.data import Dataset

from bitconvert.atomic import GrowingFile, only_one_at
from bitconvert.errors import BitconvertError
from bitconvert.report.reporter import Reporter
from bitconvert.training.data import ShuffledWindows, cache_directory, id_dtype, prepare_cache
from bitconvert.training.distill import FullTarget, TopTarget, chunk_rows, chunks, top_shares
from bitconvert.training.teacher import LiveTeacher

_LAYOUT = "teacher-1"  # part of every key: change it when the meaning of the cached bytes changes
TEACHER_TOKENS, TEACHER_SHARES = "teacher_tokens", "teacher_shares"


class CachedTeacher:
    """Takes the target from what ``TaughtWindows`` put into the batch."""

    def target(self, inputs: Mapping[str, Tensor]) -> TopTarget:
        """See ``Teacher``."""
        return TopTarget(inputs[TEACHER_TOKENS].flatten(0, 1), inputs[TEACHER_SHARES].flatten(0, 1))


class TaughtWindows(Dataset[dict[str, Tensor]]):
    """Training windows in their order, each with the teacher's k likeliest tokens at its predicted positions.

    A file holds the windows that a run reads, one record each: token ids (uint16 or uint32) and log-probabilities
    (float16, the rest's last) at the loss's temperature. float16 rounds a log-probability by at most 1/2048 of itself.

    Args:
        order: the windows.
        key: whatever else decides the teacher's distribution: model, text, precision.
        vocabulary: number of tokens that the teacher knows.
        k: tokens kept at a position, at most all.
        temperature: of the loss.
    """

    def __init__(self, order: ShuffledWindows, key: str, vocabulary: int, k: int, temperature: float) -> None:
        self._order = order
        self._visited = order.visited()
        self._k = min(k, vocabulary)
        positions = order.windows.context - 1
        self._record = np.dtype(
            [
                (TEACHER_TOKENS, id_dtype(vocabulary), (positions, self._k)),
                (TEACHER_SHARES, np.float16, (positions, self._k + 1)),
            ]
        )
        digest = hashlib.sha256(
            f"{_LAYOUT}\n{key}\n{vocabulary} {self._k} {temperature} {order.windows.context}\n".encode()
        )
        digest.update(self._visited.tobytes())
        self._path = cache_directory() / f"{digest.hexdigest()}.teacher"
        self._records: np.ndarray[Any, np.dtype[Any]] | None = None

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if self._records is None:
            self._records = np.memmap(self._path, self._record, mode="r")
        record = self._records[int(np.searchsorted(self._visited, self._order.window_at(index)))]
        tokens, shares = record[TEACHER_TOKENS].astype(np.int64), record[TEACHER_SHARES].astype(np.float16)
        taught = {TEACHER_TOKENS: torch.from_numpy(tokens), TEACHER_SHARES: torch.from_numpy(shares)}
        return {**self._order[index], **taught}

    def fill(self, teacher: Callable[[], LiveTeacher], batch_size: int, reporter: Reporter) -> None:
        """Ask the teacher about every window, unless its answers are there from an earlier run.

        An interrupted run leaves what it was told, and the next goes on after that. Of two runs with the same
        questions one waits for the answers of the other.

        Args:
            teacher: makes the teacher; not called where it is not needed.
            batch_size: windows in one forward pass.
            reporter: hears what it will take on disk, and how far it is.

        Raises:
            BitconvertError: the disk is full, or would be, or what is there is damaged.
        """
        prepare_cache()
        with only_one_at(self._path, waits=True):
            size = self._record.itemsize * len(self._visited)
            told = f"{ByteSize(size).human_readable(decimal=True)} for the teacher's {self._k} likeliest tokens"
            if self._path.exists():
                self._require_whole(size)
                reporter.note(f"{told} are there from an earlier run: {self._path}")
                return
            reporter.note(
                f"{told}, {self._record.itemsize / self._order.windows.context:.0f} bytes a token of text: {self._path}"
            )
            answers = GrowingFile(self._path, self._record.itemsize * batch_size)
            _require_space(self._path, size - answers.size)
            reporter.stage("asking the original model")
            with answers.more() as write:
                done = answers.size // self._record.itemsize  # in whole batches, so that the others are the same
                for records in self._answers(teacher(), batch_size, done):
                    write(records.tobytes())
                    done += len(records)
                    reporter.advance(done, len(self._visited))

    def _require_whole(self, size: int) -> None:
        there = self._path.stat().st_size
        if there != size:
            raise BitconvertError(
                f"{self._path}: damaged, it has {there:,} bytes instead of {size:,}", "remove it: it is made again"
            )

    def _answers(self, teacher: LiveTeacher, batch_size: int, done: int) -> Iterator[np.ndarray[Any, np.dtype[Any]]]:
        """Records of a batch of windows after the other, ascending, without those of the first windows."""
        for start in range(done, len(self._visited), batch_size):
            windows = [self._order.windows[int(index)] for index in self._visited[start : start + batch_size]]
            target = teacher.target({"input_ids": torch.stack([window["input_ids"] for window in windows])})
            tokens, shares = _top_of(target, self._k)
            records = np.empty(len(windows), self._record)
            records[TEACHER_TOKENS] = tokens.view(len(windows), -1, self._k).cpu().numpy()
            records[TEACHER_SHARES] = shares.view(len(windows), -1, self._k + 1).cpu().numpy()
            yield records


def _top_of(target: FullTarget, k: int) -> tuple[Tensor, Tensor]:
    rows = chunk_rows(target.head.weight.shape[0])
    parts = [top_shares(target.at(chunk), k) for chunk in chunks(len(target.hidden), rows)]
    tokens, shares = zip(*parts, strict=True)
    return torch.cat(tokens), torch.cat(shares)


def _require_space(path: Path, size: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise BitconvertError(
            f"{path}: {ByteSize(size).human_readable(decimal=True)} are needed, "
            f"{ByteSize(free).human_readable(decimal=True)} are free",
            "free some space, point BITCONVERT_CACHE elsewhere, lower distill.cache_top_k, or do without distill.cache",
        )
