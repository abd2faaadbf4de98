"""``SHA256SUMS``: the hash of every file of an output, in the form that ``sha256sum`` writes and checks.

By it an output is verified, and by it ``--overwrite`` knows what bitconvert wrote and may replace.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bitconvert.errors import BitconvertError, UsageError

MANIFEST = "SHA256SUMS"

_HASHED_AT_ONCE = min(4, os.cpu_count() or 1)  # hashlib lets go of the interpreter's lock
_LINE = re.compile(r"(\\?)([0-9a-f]{64}) [ *](.+)")
_ESCAPES = {"\\\\": "\\", "\\n": "\n", "\\r": "\r"}


def sha256(file: Path) -> str:
    """The hash of a file, in 64 hexadecimal digits.

    Raises:
        BitconvertError: it cannot be read.
    """
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise BitconvertError(f"{file}: cannot be read ({error.strerror})", "check its permissions") from error


def hashes(files: Iterable[Path]) -> dict[Path, str]:
    """The hashes of files, computed a few at a time.

    Raises:
        BitconvertError: one cannot be read.
    """
    files = list(files)
    with ThreadPoolExecutor(_HASHED_AT_ONCE) as pool:
        return dict(zip(files, pool.map(sha256, files), strict=True))


def write_manifest(directory: Path) -> Path:
    """Hash every file below a directory. What a manifest of a directory in it says already is not hashed again."""
    known: dict[str, str] = {}
    for inner in directory.rglob(MANIFEST):
        if inner.parent != directory:
            place = inner.parent.relative_to(directory)
            known |= {(place / name).as_posix(): digest for name, digest in read_manifest(inner.parent).items()}
    new = [directory / name for name in files_below(directory) if name not in known]
    known |= {path.relative_to(directory).as_posix(): digest for path, digest in hashes(new).items()}
    path = directory / MANIFEST
    lines = [_line(name, known[name]) for name in sorted(known)]
    path.write_text("".join(lines), encoding="utf-8", errors="surrogateescape", newline="\n")
    return path


def read_manifest(directory: Path) -> dict[str, str]:
    """File names, relative to the directory, and their hashes.

    Raises:
        BitconvertError: there is no manifest, or it is damaged.
    """
    path = directory / MANIFEST
    try:
        lines = path.read_text(encoding="utf-8", errors="surrogateescape").removesuffix("\n").split("\n")
    except FileNotFoundError as error:
        raise BitconvertError(f"{path}: missing", "give a directory that bitconvert wrote") from error
    except OSError as error:
        raise BitconvertError(f"{path}: cannot be read ({error.strerror})", "restore the file") from error
    entries: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        found = _LINE.fullmatch(line)
        name = _unescaped(found[3]) if found and found[1] else found[3] if found else ""
        if found is None or Path(name).is_absolute() or ".." in Path(name).parts:
            raise BitconvertError(f"{path}, line {number}: not a hash and the name of a file here", "restore the file")
        entries[name] = found[2]
    return entries


def files_below(directory: Path) -> list[str]:
    """The names of all files below a directory, relative to it, but for its own manifest; sorted."""
    found = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if not path.is_dir())
    return sorted(name for name in found if name != MANIFEST)


def require_free(output: Path, *, overwrite: bool, source: Path | None = None) -> None:
    """Refuse a place that holds something, or with ``overwrite`` something that bitconvert did not write.

    Args:
        output: a directory to be made; an empty one is free.
        overwrite: what an earlier run wrote may be replaced.
        source: the model that goes into it.

    Raises:
        UsageError: it is taken.
    """
    if not os.path.lexists(output):
        return
    if source is not None and source.resolve().is_relative_to(output.resolve()):
        raise UsageError(f"{output}: holds the model that is to be read", "choose another --output")
    if Path.cwd().is_relative_to(output.resolve()):
        raise UsageError(f"{output}: holds the directory that you are in", "choose another --output")
    if output.is_dir() and not any(output.iterdir()):
        return
    if not overwrite:
        raise UsageError(f"{output}: exists already", "choose another --output, or replace this one with --overwrite")
    elsewhere = "choose another --output, or remove this one yourself"
    if output.is_symlink() or not (output / MANIFEST).is_file():
        raise UsageError(f"{output}: was not written by bitconvert, so --overwrite does not replace it", elsewhere)
    foreign = sorted(set(files_below(output)) - read_manifest(output).keys())
    if foreign:
        raise UsageError(f"{output}: holds {foreign[0]}, which bitconvert did not write", elsewhere)


def _line(name: str, digest: str) -> str:
    """As GNU sha256sum: a name with a backslash or a line break is escaped, and a backslash before the line says so."""
    escaped = name
    for escape, character in _ESCAPES.items():
        escaped = escaped.replace(character, escape)
    return f"{chr(92) if escaped != name else ''}{digest}  {escaped}\n"


def _unescaped(name: str) -> str:
    return re.sub(r"\\[\\nr]", lambda found: _ESCAPES[found[0]], name)
