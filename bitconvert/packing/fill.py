"""Read each tensor of a checkpoint once, and give it to all outputs that are to hold it."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import TypeVar

from bitconvert.models.checkpoint import zero_all_over
from bitconvert.packing.job import Output, PackJob, Parts
from bitconvert.packing.source import SourceTensor, ternary_rows, with_progress

_WORKERS = min(4, os.cpu_count() or 1)

_WEIGHTS_AT_ONCE = 2**25
"""Of all tensors that are being encoded: about a quarter of a gigabyte. A larger tensor is alone."""

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


def fill(job: PackJob, outputs: Sequence[Output]) -> None:
    """Write every tensor to every output. While some are written, others are read and encoded.

    Raises:
        BitconvertError: a tensor is damaged, or an output cannot hold it.
    """
    ternary = [tensor for tensor in job.tensors if tensor.ternary]
    work = in_order(partial(_encoded, job, outputs), ternary, lambda tensor: math.prod(tensor.shape))
    with closing(work) as encoded:
        for tensor in with_progress(job.tensors, job.reporter):
            if tensor.ternary:
                for output, parts in zip(outputs, next(encoded), strict=True):
                    output.write(parts)
            else:
                _write_plain(job, outputs, tensor)


def _write_plain(job: PackJob, outputs: Sequence[Output], tensor: SourceTensor) -> None:
    """In parts, if it is large; but whole, if an output may have its rows in another order."""
    parts = [job.checkpoint.read(tensor.name)] if tensor.kept else job.checkpoint.read_rows(tensor.name)
    is_alive = len(tensor.shape) == 1  # biases, and norms that are added to 1, may be zero
    for rows in parts:
        is_alive = is_alive or bool(rows.any())
        for output in outputs:
            output.write(output.plain(tensor, rows))
    if not is_alive:
        raise zero_all_over(job.checkpoint.name, tensor.name)


def _encoded(job: PackJob, outputs: Sequence[Output], tensor: SourceTensor) -> list[Parts]:
    encoders = [output.encoder(tensor) for output in outputs]
    for rows in ternary_rows(job.checkpoint, tensor.name):
        for encoder in encoders:
            encoder.add(rows)
    return [encoder.finish() for encoder in encoders]


def in_order(
    work: Callable[[ItemT], ResultT], items: Iterable[ItemT], size: Callable[[ItemT], int]
) -> Generator[ResultT, None, None]:
    """Results in the order of the items, computed ahead by a few threads, as far as the items' sizes allow it.

    Args:
        work: done in a thread; what it raises is raised in its place of the order.
        items: taken as they are needed.
        size: of an item, while it is worked on and until its result is taken; see ``_WEIGHTS_AT_ONCE``.
    """
    ahead: deque[tuple[int, Future[ResultT]]] = deque()
    with ThreadPoolExecutor(_WORKERS) as pool:
        try:
            for item in items:
                while ahead and (
                    len(ahead) > _WORKERS or sum(taken for taken, _ in ahead) + size(item) > _WEIGHTS_AT_ONCE
                ):
                    yield ahead.popleft()[1].result()
                ahead.append((size(item), pool.submit(work, item)))
            while ahead:
                yield ahead.popleft()[1].result()
        finally:
            pool.shutdown(cancel_futures=True)
