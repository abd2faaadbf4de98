"""A GGUF file, opened: metadata on request, tensors as views of the mapped file. The only door to GGUF files."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

from bitconvert.errors import BitconvertError
from bitconvert.models.families import Family, gguf_family_of
from bitconvert.models.gguf_parse import GgufTensor, ParsedFile, damaged, parse_gguf
from bitconvert.models.gguf_types import register_i2_s, register_q2_0

SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
"""How gguf-split names the parts of a model; llama.cpp finds them by it."""

_MOST_SHARDS = 9999

P = ParamSpec("P")
R = TypeVar("R")


class GgufFile(NamedTuple):
    """An opened model: its metadata, and its tensors as views of the mapped file, or files if it is split."""

    path: Path
    paths: tuple[Path, ...]
    fields: dict[str, Any]
    tensors: dict[str, GgufTensor]

    def get(self, key: str, default: Any = None) -> Any:
        """A metadata value; floats come with the digits of their float32."""
        return self.fields.get(key, default)

    def require(self, key: str) -> Any:
        """A metadata value that no model can do without."""
        if key not in self.fields:
            raise BitconvertError(f"{self.path}: key {key} is missing", "convert the model to GGUF again")
        return self.fields[key]

    def require_blocks(self, arch: str) -> None:
        """Refuse more blocks than there are tensors, before somebody counts them.

        Raises:
            BitconvertError: the file lies, or does not say how many blocks there are.
        """
        count = self.require(f"{arch}.block_count")
        if not isinstance(count, int) or not 0 < count <= len(self.tensors):
            raise damaged(self.path, f"key {arch}.block_count is {count}, with {len(self.tensors)} tensors")


def open_gguf(path: Path) -> GgufFile:
    """Map a file, with the others of its set if it is split, and parse the metadata; the same file is parsed once.

    Raises:
        BitconvertError: it cannot be read, is truncated or damaged, holds types that nothing here decodes, or is not
            the first of its set.
    """
    try:
        paths = _present_set(path)
        return _opened(paths, tuple((one.stat().st_mtime_ns, one.stat().st_size) for one in paths))
    except OSError as error:
        raise BitconvertError(
            f"{error.filename or path}: {error.strerror}", "check the path and permissions"
        ) from error


def whole_set(path: Path) -> list[Path]:
    """All files of the set that a file belongs to, as its name says; the file itself where it stands alone.

    Raises:
        BitconvertError: there is no such set.
    """
    name = SHARD_NAME.fullmatch(path.name)
    if name is None:
        return [path]
    count = int(name["count"])
    if not 0 < count <= _MOST_SHARDS:
        raise damaged(path, f"no model has {count} shards")
    return [path.with_name(f"{name['stem']}-{number + 1:05}-of-{count:05}.gguf") for number in range(count)]


def _present_set(path: Path) -> tuple[Path, ...]:
    """The set that a file is the first of.

    Raises:
        BitconvertError: it is another file of its set, or one is missing.
    """
    paths = whole_set(path)
    if path != paths[0]:
        raise BitconvertError(f"{path}: one of the {len(paths)} shards of a model", f"give the first one: {paths[0]}")
    missing = [one for one in paths if not one.exists()]
    if missing:
        raise BitconvertError(
            f"{missing[0]}: missing, one of the {len(paths)} shards of a model", "download or pack the model again"
        )
    return tuple(paths)


@lru_cache(maxsize=2)  # a vocabulary of 100,000 tokens takes a moment, and every function here needs it
def _opened(paths: tuple[Path, ...], _states: tuple[tuple[int, int], ...]) -> GgufFile:
    register_q2_0()
    register_i2_s()
    shards = [parse_gguf(path) for path in paths]
    for number, (path, shard) in enumerate(zip(paths, shards, strict=True)):
        _require_place(path, shard, number, len(paths))
    tensors: dict[str, GgufTensor] = {}
    for path, shard in zip(paths, shards, strict=True):
        if twice := tensors.keys() & shard.tensors.keys():
            raise damaged(path, f"tensor {min(twice)} stands in two shards")
        tensors |= shard.tensors
    announced = shards[0].fields.get("split.tensors.count", len(tensors))
    if len(paths) > 1 and announced != len(tensors):
        raise damaged(paths[0], f"{announced} tensors are announced, and its shards hold {len(tensors)}")
    return GgufFile(paths[0], paths, shards[0].fields, tensors)


def _require_place(path: Path, shard: ParsedFile, number: int, count: int) -> None:
    """Hold what a file says of its place in a set against its name."""
    stated = shard.fields.get("split.no", 0), max(1, shard.fields.get("split.count", 1))
    if stated != (number, count):
        raise BitconvertError(
            f"{path}: it says that it is shard {stated[0] + 1} of {stated[1]}",
            "give each file of the set the name that it had: NAME-00001-of-0000N.gguf",
        )


def damage_named(read: Callable[Concatenate[Path, P], R]) -> Callable[Concatenate[Path, P], R]:
    """Let a function that reads a file, given as its first argument, fail with an error that names it.

    Metadata can lie in more ways than can be foreseen: a text where a number belongs, a width of 0, a token id beyond
    the vocabulary.
    """

    @wraps(read)
    def reading(path: Path, /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return read(path, *args, **kwargs)
        except BitconvertError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise damaged(path, f"its metadata contradict each other or its tensors ({reason})") from error

    return reading


def gguf_family(file: GgufFile) -> Family:
    """The architecture's row.

    Raises:
        BitconvertError: the architecture is not supported.
    """
    return gguf_family_of(str(file.require("general.architecture")), str(file.path))
