"""Outputs that appear whole or not at all: written under a temporary name beside their place, then renamed into it.

All that a run makes on the way lies in one directory beside the output, its workplace, whose lock it holds. The kernel
lets go of the lock when the process ends, however it ends: so what a killed run left is told from what a living one is
at, and goes when the same directory is written to again. (A process id would not tell: it is used again, and means
nothing on another machine that shares the disk.)
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from filelock import BaseFileLock, FileLock, Timeout

from bitconvert.errors import BitconvertError, UsageError

_LOCK = ".lock"  # in a workplace; held by who works there
_OLD = ".old"  # in a workplace: the directory whose place a new one is about to take
_WORKPLACE = re.compile(r"\.(?P<of>.+)\.tmp-[0-9a-f]{16}")

_SECONDS_BETWEEN_SYNCS = 30.0  # what a killed run has written after the last one is written again
_OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LIBRARIES_FULL = re.compile(
    r"No space left|File too large|quota exceeded"  # safetensors
    r"|\d+ requested and \d+ written"  # numpy
    r"|inline_container.*(?:write|unexpected pos)",  # torch.save
    re.IGNORECASE | re.DOTALL,
)


class Taken(UsageError):
    """Another process is at work on the same output."""


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Write a file so that ``path`` is, at every moment, the old file or the complete new one.

    It gets the permissions that the umask leaves to new files, whatever the library that writes it gives (safetensors
    lets nobody but the owner read).

    Yields:
        The temporary path to write to, of the same name. When the block ends it is synced to disk and takes the place
        of ``path``; when the block raises, it is removed and ``path`` is as before.

    Raises:
        BitconvertError: the place cannot be written to, or the disk is full.
    """
    with _workplace(path) as workplace:
        temporary = workplace / path.name
        with disk_full_names(path):
            yield temporary
        with _errors_name(path):
            _set_mode(temporary, _ordinary_mode(workplace))
            _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)


@contextlib.contextmanager
def atomic_directory(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Write a directory so that ``path`` never holds a mixture of old and new files.

    Its files get ordinary permissions, as in ``atomic_file``.

    Args:
        path: may be there already if it is empty.
        overwrite: take the place of what is there. It is renamed aside before the new directory takes its name, and
            removed after. (POSIX cannot swap two directories in one step: after a crash between the renames the old
            one, whole, comes back when something is written beside it again.)

    Yields:
        The temporary directory to fill; as for ``atomic_file``.

    Raises:
        BitconvertError: the place cannot be written to, is taken, also in the meantime, or the disk is full.
    """
    with _errors_name(path):
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "a file of this name is in the way")
    with _workplace(path) as workplace:
        temporary = workplace / path.name
        with _filled(temporary, path):
            yield temporary
        with _errors_name(path):
            if overwrite:
                _take_place(temporary, path, workplace)
            else:
                _take_free_place(temporary, path)
            _sync(path.parent)


class GrowingFile:
    """A file that is written in units over one run or several, and has its name when it is complete.

    Until then the bytes that are known to be on disk stand in its name, ``NAME.at-BYTES``; what is behind them does not
    count.

    Args:
        path: of the complete file; nobody else may be at it (``only_one_at``).
        unit: bytes; of what is there from an interrupted run, whole units count.

    Attributes:
        size: bytes that are there.
    """

    def __init__(self, path: Path, unit: int) -> None:
        self._path = path
        begun = max(path.parent.glob(f"{glob_escape(path.name)}.at-*"), key=_bytes_at, default=None)
        self.size = _bytes_at(begun) // unit * unit if begun else 0
        self._file = begun or path.with_name(f"{path.name}.at-0")

    @contextlib.contextmanager
    def more(self) -> Iterator[Callable[[bytes], None]]:
        """Write on; when the block ends the file is complete, when it raises what was written is kept.

        Yields:
            What to write the next bytes with.

        Raises:
            BitconvertError: the disk is full.
        """
        with disk_full_names(self._path), self._file.open("ab") as stream:
            stream.truncate(self.size)
            synced = time.monotonic()

            def write(data: bytes) -> None:
                nonlocal synced
                stream.write(data)
                stream.flush()
                self.size += len(data)
                if time.monotonic() - synced >= _SECONDS_BETWEEN_SYNCS:
                    self._count(stream)
                    synced = time.monotonic()

            try:
                yield write
            finally:
                self._count(stream)
        with _errors_name(self._path):
            self._file.replace(self._path)
            _sync(self._path.parent)

    def _count(self, stream: BinaryIO) -> None:
        os.fsync(stream.fileno())
        self._file = self._file.replace(self._path.with_name(f"{self._path.name}.at-{self.size}"))


def _bytes_at(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


@contextlib.contextmanager
def set_aside(path: Path) -> Iterator[None]:
    """Put a directory, if there is one, aside while the block makes another in its place.

    It is removed when the block ends; when the block raises, it is put back and what the block made is removed.
    """
    if not path.exists():
        yield
        return
    with _workplace(path) as workplace:
        aside = workplace / _OLD
        path.rename(aside)
        try:
            yield
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            aside.rename(path)
            raise


def take_place(directory: Path, path: Path, *, overwrite: bool) -> None:
    """Rename a directory that is complete to its final name, beside it; as ``atomic_directory`` does.

    Raises:
        BitconvertError: the place is taken.
    """
    with _errors_name(path):
        sync_tree(directory)
        if overwrite:
            with set_aside(path):
                directory.rename(path)
        else:
            _take_free_place(directory, path)
        _sync(path.parent)


def discard(directory: Path) -> None:
    """Remove a directory so that it never lacks a part of what it holds under its own name."""
    with _workplace(directory) as workplace:
        directory.rename(workplace / directory.name)


@contextlib.contextmanager
def only_one_at(path: Path, *, waits: bool = False) -> Iterator[None]:
    """Keep other processes out, on other machines too that share the disk, and take away what killed ones left.

    Args:
        path: what the block will make or change; the lock lies beside it, and goes in the end.
        waits: for a process that is there already, instead of giving up.

    Raises:
        Taken: another process is at it.
        BitconvertError: the place cannot be written to.
    """
    with contextlib.ExitStack() as held:
        with _errors_name(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                held.enter_context(_locked(path, timeout=-1 if waits else 0))
            except Timeout as error:
                raise Taken(
                    f"{path}: another process is at work there", "wait for it, or choose another output"
                ) from error
        remove_leftovers(path.parent)
        yield


@contextlib.contextmanager
def _locked(path: Path, timeout: float) -> Iterator[None]:
    with FileLock(path.with_name(f".{path.name}.lock"), timeout=timeout) as lock:
        try:
            yield
        finally:
            Path(lock.lock_file).unlink(missing_ok=True)  # while held: filelock takes no lock whose file is gone


@contextlib.contextmanager
def _filled(temporary: Path, path: Path) -> Iterator[None]:
    """The block fills a new directory, which is on disk when it ends."""
    temporary.mkdir()
    with disk_full_names(path):
        yield
    with _errors_name(path):
        ordinary = _ordinary_mode(temporary)
        for file in temporary.rglob("*"):
            if file.is_file():
                _set_mode(file, ordinary)
        sync_tree(temporary)


def _ordinary_mode(directory: Path) -> int:
    """The permissions that new files have in a directory of ours: its own, which nobody may execute."""
    return stat.S_IMODE(directory.stat().st_mode) & 0o666


def _set_mode(path: Path, mode: int) -> None:
    if stat.S_IMODE(path.stat().st_mode) != mode:  # not every file system has permissions to change
        path.chmod(mode)


def _take_free_place(temporary: Path, path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        path.rmdir()  # empty, or this fails
    temporary.rename(path)


def _take_place(temporary: Path, path: Path, workplace: Path) -> None:
    """Rename a directory to ``path``; a directory already there goes into the workplace, and back if that fails."""
    aside = workplace / _OLD
    try:
        while temporary.exists():  # again if another process put its own there meanwhile
            shutil.rmtree(aside, ignore_errors=True)
            with contextlib.suppress(FileNotFoundError):
                path.rename(aside)
            try:
                temporary.rename(path)
            except OSError as error:
                if error.errno not in _OCCUPIED:
                    raise
    finally:
        if aside.exists() and not path.exists():
            aside.rename(path)


@contextlib.contextmanager
def _workplace(path: Path) -> Iterator[Path]:
    """A directory beside ``path``, since a rename must not cross file systems; gone in the end.

    Raises:
        BitconvertError: there can be none, which is known before any work is done.
    """
    with _errors_name(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)
        workplace, lock = _locked_directory(path)
    try:
        yield workplace
    finally:
        shutil.rmtree(workplace, ignore_errors=True)
        lock.release()


def _locked_directory(path: Path) -> tuple[Path, BaseFileLock]:
    while True:
        workplace = path.with_name(f".{path.name}.tmp-{secrets.token_hex(8)}")
        workplace.mkdir()
        lock = FileLock(workplace / _LOCK, timeout=0)
        with contextlib.suppress(Timeout, FileNotFoundError, FileExistsError):  # taken for a leftover before its lock
            lock.acquire()
            return workplace, lock


def remove_leftovers(directory: Path) -> None:
    """Remove the workplaces of killed runs from a directory; an old directory whose new one never came is put back.

    Where the file system has no locks, they stay.
    """
    for workplace in directory.glob(".*.tmp-*"):
        if (match := _WORKPLACE.fullmatch(workplace.name)) and workplace.is_dir():
            with contextlib.suppress(Timeout, OSError), FileLock(workplace / _LOCK, timeout=0):
                if (workplace / _OLD).exists() and not (directory / match["of"]).exists():
                    (workplace / _OLD).rename(directory / match["of"])
                shutil.rmtree(workplace, ignore_errors=True)


def glob_escape(name: str) -> str:
    """A pattern that only this name matches."""
    return re.sub(r"([*?[])", r"[\1]", name)


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
