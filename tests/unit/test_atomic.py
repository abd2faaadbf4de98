"""Outputs appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from bitconvert.atomic import GrowingFile, Taken, atomic_directory, atomic_file, discard, only_one_at, set_aside
from bitconvert.errors import BitconvertError


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def test_a_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "new" / "model.gguf"
    with atomic_file(target) as temporary:
        temporary.write_text("new")
        assert not target.exists()
        assert temporary.parent.parent == target.parent  # a rename must not cross file systems
    assert target.read_text() == "new"
    assert names(target.parent) == ["model.gguf"]


@pytest.mark.parametrize("interruption", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file(tmp_path: Path, interruption: type[BaseException]) -> None:
    target = tmp_path / "model.gguf"
    target.write_text("old")
    with pytest.raises(interruption), atomic_file(target) as temporary:
        temporary.write_text("half")
        raise interruption
    assert target.read_text() == "old"
    assert names(tmp_path) == ["model.gguf"]


def test_a_directory_replaces_the_old_one_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "stale.json").write_text("old")
    with atomic_directory(target, overwrite=True) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "config.json").write_text("new")
        assert names(target) == ["stale.json"]
    assert names(target) == ["sub"]
    assert names(tmp_path) == ["model"]


def test_an_error_leaves_the_old_directory(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "config.json").write_text("old")
    with pytest.raises(ValueError, match="stop"), atomic_directory(target) as temporary:
        (temporary / "config.json").write_text("half")
        raise ValueError("stop")
    assert (target / "config.json").read_text() == "old"
    assert names(tmp_path) == ["model"]


def test_a_failed_swap_puts_the_old_directory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "config.json").write_text("old")
    rename = Path.rename

    def fail_for_the_new_one(self: Path, to: Path) -> Path:
        if ".tmp-" in self.parent.name and self.name == "model":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fail_for_the_new_one)
    failing = pytest.raises(BitconvertError, match="Input/output error")
    with failing, atomic_directory(target, overwrite=True) as temporary:
        (temporary / "config.json").write_text("new")
    assert (target / "config.json").read_text() == "old"
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize("made", [True, False])
def test_what_was_set_aside_comes_back_if_the_new_one_does_not_come(tmp_path: Path, made: bool) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "config.json").write_text("old")
    with pytest.raises(KeyboardInterrupt), set_aside(target):
        if made:
            target.mkdir()
            (target / "half").write_text("new")
        raise KeyboardInterrupt
    assert {file.name: file.read_text() for file in target.iterdir()} == {"config.json": "old"}
    with set_aside(target):
        target.mkdir()
    assert names(tmp_path) == ["model"]
    assert names(target) == []


@pytest.mark.parametrize("place", ["file/model", "m" * 300], ids=["below a file", "name too long"])
@pytest.mark.parametrize("atomic", [atomic_file, atomic_directory])
def test_a_place_that_cannot_be_written_is_named_before_any_work(tmp_path: Path, atomic: object, place: str) -> None:
    (tmp_path / "file").write_text("")
    target = tmp_path / place  # both fail for root too, unlike a missing permission
    with pytest.raises(BitconvertError) as caught, atomic(target):  # type: ignore[operator]
        pytest.fail("the block must not run")
    assert str(target) in caught.value.message
    assert caught.value.hint


def test_a_directory_does_not_replace_a_file(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.write_text("precious")
    with pytest.raises(BitconvertError, match="in the way"), atomic_directory(target):
        pytest.fail("the block must not run")
    assert target.read_text() == "precious"


def test_a_full_disk_names_the_output_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(BitconvertError, match="the disk is full") as caught, atomic_file(tmp_path / "model.gguf"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert str(tmp_path / "model.gguf") in caught.value.message
    assert names(tmp_path) == []


def test_other_errors_of_the_block_are_not_blamed_on_the_output(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "model.gguf"):
        Path("/nowhere/source").read_bytes()


# ---- several processes, and killed ones ----

_AT_WORK = """
import sys, time
from pathlib import Path
from bitconvert import atomic
path = Path(sys.argv[2])
def stay():
    print("there", flush=True)
    time.sleep(60)
if sys.argv[1] == "aside":
    rename = Path.rename
    Path.rename = lambda self, to: (rename(self, to), stay())
with {
    "file": lambda: atomic.atomic_file(path),
    "directory": lambda: atomic.atomic_directory(path),
    "aside": lambda: atomic.atomic_directory(path, overwrite=True),
    "lock": lambda: atomic.only_one_at(path),
}[sys.argv[1]]() as temporary:
    if sys.argv[1] != "lock":
        (temporary / "half" if temporary.is_dir() else temporary).write_text("half")
    if sys.argv[1] != "aside":
        stay()
"""


@contextlib.contextmanager
def another_process(what: str, path: Path) -> Iterator[subprocess.Popen[str]]:
    """One that is in the middle of something, until it is killed."""
    command = [sys.executable, "-c", _AT_WORK, what, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("what", ["file", "directory"])
def test_what_a_killed_run_left_goes_and_what_a_living_one_is_at_stays(what: str, tmp_path: Path) -> None:
    with another_process(what, tmp_path / "a[1].gguf") as other:
        with atomic_file(tmp_path / "b.gguf") as temporary:
            temporary.write_text("whole")
        assert len(names(tmp_path)) == 2
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
        assert [name for name in names(tmp_path) if not name.startswith(".")] == ["b.gguf"]
        with atomic_file(tmp_path / "c.gguf") as temporary:
            temporary.write_text("whole")
    assert names(tmp_path) == ["b.gguf", "c.gguf"]


@pytest.mark.parametrize("lost", [FileNotFoundError, FileExistsError])
def test_a_workplace_that_is_taken_for_a_leftover_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: type[OSError]
) -> None:
    """By another thread or process, between its making and its lock."""
    acquire, attempts = FileLock.acquire, []

    def lose_the_first(self: FileLock, *arguments: object, **options: object) -> object:
        attempts.append(self)
        if len(attempts) == 1:
            shutil.rmtree(Path(self.lock_file).parent)
            raise lost
        return acquire(self, *arguments, **options)

    monkeypatch.setattr(FileLock, "acquire", lose_the_first)
    with atomic_file(tmp_path / "a") as temporary:
        temporary.write_text("whole")
    assert (tmp_path / "a").read_text() == "whole"
    assert names(tmp_path) == ["a"]


def test_names_that_only_look_like_ours_stay(tmp_path: Path) -> None:
    kept = [".notes.tmp-17", f".a.gguf.tmp-{'0' * 16}", ".a.tmp-0011223344556677.txt"]
    for name in kept:
        (tmp_path / name).write_text("not a directory")
    with atomic_file(tmp_path / "a.gguf") as temporary:
        temporary.write_text("whole")
    assert names(tmp_path) == sorted([*kept, "a.gguf"])


def test_a_directory_whose_new_one_never_came_is_put_back(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "config.json").write_text("old")
    with another_process("aside", target):
        assert not target.exists()
    with atomic_file(tmp_path / "beside.gguf") as temporary:
        temporary.write_text("whole")
    assert (target / "config.json").read_text() == "old"
    assert names(tmp_path) == ["beside.gguf", "model"]


def test_a_directory_that_another_process_put_there_meanwhile_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, rename, others = tmp_path / "model", Path.rename, []

    def another_is_faster(self: Path, to: Path) -> Path:
        if to == target and not others:
            others.append(target.mkdir())
            (target / "theirs").write_text("whole too")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", another_is_faster)
    with atomic_directory(target, overwrite=True) as temporary:
        (temporary / "ours").write_text("whole")
    assert others
    assert names(target) == ["ours"]
    assert names(tmp_path) == ["model"]


def test_one_process_has_a_place_for_itself(tmp_path: Path) -> None:
    place = tmp_path / "run"
    with another_process("lock", place) as other:
        with pytest.raises(Taken, match="run: another process is at work there"), only_one_at(place):
            pytest.fail("the block must not run")
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
        with only_one_at(place):
            assert names(tmp_path) == [".run.lock"]
    assert names(tmp_path) == []


def test_waiting_for_a_place(tmp_path: Path) -> None:
    with another_process("lock", tmp_path / "run") as other:
        threading.Timer(0.2, other.kill).start()
        with only_one_at(tmp_path / "run", waits=True):
            assert other.wait() == -signal.SIGKILL


def test_what_is_discarded_is_never_there_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "state.json").write_text("whole")
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    discard(tmp_path / "run")
    monkeypatch.undo()
    assert [name for name in names(tmp_path) if not name.startswith(".")] == []
    with only_one_at(tmp_path / "run"):
        pass
    assert names(tmp_path) == []


# ---- a file over several runs ----


def grow(path: Path, *pieces: bytes, interrupted: bool = False) -> int:
    """Write on; returns the bytes that were there before."""
    growing = GrowingFile(path, unit=4)
    before = growing.size
    with contextlib.suppress(KeyboardInterrupt), growing.more() as write:
        for piece in pieces:
            write(piece)
        if interrupted:
            raise KeyboardInterrupt
    return before


def test_a_file_grows_over_several_runs(tmp_path: Path) -> None:
    path = tmp_path / "a[1].teacher"
    assert grow(path, b"aaaa", b"bb", interrupted=True) == 0
    assert names(tmp_path) == ["a[1].teacher.at-6"]
    assert grow(path, b"BBBB", interrupted=True) == 4  # only whole units count
    assert grow(path, b"cc") == 8
    assert names(tmp_path) == ["a[1].teacher"]
    assert path.read_bytes() == b"aaaaBBBBcc"


def test_what_was_not_known_to_be_on_disk_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "a.teacher"
    grow(path, b"aaaa", interrupted=True)
    with (tmp_path / "a.teacher.at-4").open("ab") as stream:
        stream.write(bytes(8))  # written, or only allotted, before the power went
    assert grow(path, b"bbbb") == 4
    assert path.read_bytes() == b"aaaabbbb"


def test_a_long_run_that_is_killed_loses_what_it_wrote_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitconvert.atomic._SECONDS_BETWEEN_SYNCS", 0.0)
    growing = GrowingFile(tmp_path / "a.teacher", unit=4)
    with growing.more() as write:
        write(b"aaaa")
        assert names(tmp_path) == ["a.teacher.at-4"]
        write(b"bbbb")
        assert names(tmp_path) == ["a.teacher.at-8"]
