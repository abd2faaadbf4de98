"""Outputs appear whole or not at all."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bitconvert.atomic import atomic_directory, atomic_file
from bitconvert.errors import BitconvertError

DEAD_PID = 2**22 + 1  # above Linux's largest pid


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def test_a_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "new" / "model.gguf"
    with atomic_file(target) as temporary:
        temporary.write_text("new")
        assert not target.exists()
        assert temporary.parent == target.parent
        assert temporary.name.startswith(f".model.gguf.tmp-{os.getpid()}-")
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
        if ".tmp-" in self.name:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fail_for_the_new_one)
    failing = pytest.raises(BitconvertError, match="Input/output error")
    with failing, atomic_directory(target, overwrite=True) as temporary:
        (temporary / "config.json").write_text("new")
    assert (target / "config.json").read_text() == "old"
    assert names(tmp_path) == ["model"]


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


def test_leftovers_of_killed_runs_go_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    (tmp_path / f".a[1].gguf.tmp-{DEAD_PID}-00ff00ff").write_text("half")
    (tmp_path / f".a[1].gguf.tmp-{os.getppid()}-00ff00ff").write_text("half")
    (tmp_path / f".b.gguf.tmp-{DEAD_PID}-00ff00ff").write_text("another output's")
    with atomic_file(tmp_path / "a[1].gguf") as temporary:
        temporary.write_text("new")
    assert names(tmp_path) == [
        f".a[1].gguf.tmp-{os.getppid()}-00ff00ff",
        f".b.gguf.tmp-{DEAD_PID}-00ff00ff",
        "a[1].gguf",
    ]


def test_a_killed_run_leaves_no_output(tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    script = (
        "import sys, time; from pathlib import Path; from bitconvert.atomic import atomic_file\n"
        "with atomic_file(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half'); print('writing', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(target)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not target.exists()
    with atomic_file(target) as temporary:
        temporary.write_text("whole")
    assert names(tmp_path) == ["model.gguf"]
