"""Safetensors in one file or several: ``model.safetensors``, or shards with an index, as the hub names them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from bitconvert.models.checkpoint import read_rows
from bitconvert.models.safetensors_file import SafetensorsFile, TensorSpec, file_bytes

_FILES = "model{suffix}.safetensors"
_INDEX = "model.safetensors.index.json"
_UNLIMITED = 2**63


class Shards:
    """The safetensors files of a model, written one tensor at a time inside the ``with`` block, then read by name.

    Args:
        directory: for the files.
        specs: dtype and shape of every tensor, in the order in which they fill the files.
        max_size: bytes of tensors in one file; a larger tensor gets a file to itself. None for a single file.
    """

    def __init__(self, directory: Path, specs: Mapping[str, TensorSpec], max_size: int | None) -> None:
        self._directory = directory
        split = split_state_dict_into_shards_factory(
            dict(specs),
            get_storage_size=lambda spec: spec.nbytes,
            get_storage_id=lambda _: None,
            filename_pattern=_FILES,
            max_shard_size=max_size or _UNLIMITED,
        )
        self._specs = specs
        self._split = split

    def __enter__(self) -> Self:
        self._open = ExitStack()
        self._files = {
            file: self._open.enter_context(
                SafetensorsFile(self._directory / file, {name: self._specs[name] for name in names})
            )
            for file, names in self._split.filename_to_tensors.items()
        }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)
        if kind is None and self._split.is_sharded:
            index = {"metadata": self._split.metadata, "weight_map": self._split.tensor_to_filename}
            (self._directory / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, or the next rows of it, to its place; its dtype and shape must be as announced."""
        self._files[self._split.tensor_to_filename[name]].write(name, tensor)

    def read(self, name: str) -> Iterator[Tensor]:
        """What the finished files hold under a name, a part of its rows at a time."""
        yield from read_rows(self._directory / self._split.tensor_to_filename[name], name)

    @property
    def nbytes(self) -> int:
        """Bytes of the files, once they are finished."""
        held = self._split.filename_to_tensors.values()
        return sum(file_bytes({name: self._specs[name] for name in names}) for names in held)
