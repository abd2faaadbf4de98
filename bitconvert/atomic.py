"""Outputs that appear whole or not at all: written under a temporary name beside their place, then renamed into it."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from bitconvert.errors import BitconvertError

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LIBRARIES_FULL = re.compile(
    r"No space left|File too large|quota exceeded"  # safetensors
    r"|\d+ requested and \d+ written"  # numpy
    r"|inline_container.*(?:write|unexpected pos)",  # torch.save
    re.IGNORECASE | re.DOTALL,
)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Write a file so that ``path`` is, at every moment, the old file or the complete new one.

    It gets the permissions that the umask leaves to new files, whatever the library that writes it gives (safetensors
    lets nobody but the owner read).

    Yields:
        The temporary path to write to, in the same directory. When the block ends it is synced to disk and takes the
        place of ``path``; when the block raises, it is removed and ``path`` is as before.

    Raises:
        BitconvertError: the place cannot be written to, or the disk is full.
    """
    with _errors_name(path):
        temporary = _temporary_beside(path)
        temporary.touch(exist_ok=False)  # an unwritable place fails here, before any work is done
        ordinary = stat.S_IMODE(temporary.stat().st_mode)
    try:
        with disk_full_names(path):
            yield temporary
        with _errors_name(path):
            _set_mode(temporary, ordinary)
            _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Write a directory so that ``path`` never holds a mixture of old and new files.

    Its files get ordinary permissions, as in ``atomic_file``.

    Args:
        path: may be there already if it is empty.
        overwrite: take the place of what is there. It is renamed aside before the new directory takes its name, and
            removed after. (POSIX cannot swap two directories in one step: a crash between the renames leaves the old
            one, whole, as ``.name.old-*``.)

    Yields:
        The temporary directory to fill, beside ``path``; as for ``atomic_file``.

    Raises:
        BitconvertError: the place cannot be written to, is taken, also in the meantime, or the disk is full.
    """
    with _errors_name(path):
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "a file of this name is in the way")
        temporary = _temporary_beside(path)
        temporary.mkdir()
    try:
        with disk_full_names(path):
            yield temporary
        with _errors_name(path):
            _make_ordinary(temporary)
            sync_tree(temporary)
            _take_place(temporary, path, overwrite)
            _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _make_ordinary(directory: Path) -> None:
    """Give all files below a directory the permissions that new ones have there: its own, which nobody may execute."""
    ordinary = stat.S_IMODE(directory.stat().st_mode) & 0o666
    for path in directory.rglob("*"):
        if path.is_file():
            _set_mode(path, ordinary)


def _set_mode(path: Path, mode: int) -> None:
    if stat.S_IMODE(path.stat().st_mode) != mode:  # not every file system has permissions to change
        path.chmod(mode)


@contextlib.contextmanager
def set_aside(path: Path) -> Iterator[None]:
    """Put a directory, if there is one, aside while the block makes another in its place.

    It is removed when the block ends; when the block raises, it is put back and what the block made is removed.
    """
    if not path.exists():
        yield
        return
    aside = path.with_name(f".{path.name}.old-{_unique()}")
    path.rename(aside)
    try:
        yield
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        aside.rename(path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _take_place(temporary: Path, path: Path, overwrite: bool) -> None:
    """Rename a directory to ``path``, which must be free or empty, unless it may be overwritten."""
    if overwrite:
        with set_aside(path):
            temporary.rename(path)
        return
    with contextlib.suppress(FileNotFoundError):
        path.rmdir()  # empty, or this fails
    temporary.rename(path)


def _temporary_beside(path: Path) -> Path:
    """A fresh name in the same directory (a rename must not cross file systems); leftovers of killed runs go."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{_glob_escape(path.name)}.tmp-*"):
        if not _owner_is_alive(leftover):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
    return path.with_name(f".{path.name}.tmp-{_unique()}")


def _unique() -> str:
    return f"{os.getpid()}-{secrets.token_hex(4)}"


def _glob_escape(name: str) -> str:
    """A pattern that only this name matches."""
    return re.sub(r"([*?[])", r"[\1]", name)


def _owner_is_alive(temporary: Path) -> bool:
    """Whether the process whose id stands in a temporary name still runs."""
    owner = re.search(r"\.tmp-(\d+)-[0-9a-f]+$", temporary.name)
    if owner is None:
        return True  # not ours to judge
    try:
        os.kill(int(owner[1]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def sync_tree(directory: Path) -> None:
    """Wait until a directory and everything below it is on disk."""
    for path in [*directory.rglob("*"), directory]:
        _sync(path)


def _sync(path: Path) -> None:
    """Wait until a file, or the entries of a directory, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    """Turn an operating system error into one that names the output."""
    try:
        yield
    except OSError as error:
        raise _cannot_write(path, error) from error


@contextlib.contextmanager
def disk_full_names(path: Path) -> Iterator[None]:
    """The same for a full disk only: any other error of the caller's block may concern another file."""
    try:
        yield
    except Exception as error:
        if not _is_disk_full(error):
            raise
        raise _cannot_write(path, error) from error


def _is_disk_full(error: Exception) -> bool:
    """Each library that writes says it in its own way; only the operating system has a number for it."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _DISK_FULL
    return _LIBRARIES_FULL.search(str(error)) is not None


def _cannot_write(path: Path, error: Exception) -> BitconvertError:
    if _is_disk_full(error):
        return BitconvertError(f"{path}: cannot be written, the disk is full", "free some space")
    reason = getattr(error, "strerror", None) or error
    return BitconvertError(f"{path}: cannot be written ({reason})", "choose another output, or make this one writable")
