"""Disks that are full, read-only, or not the one that the cache is on: real ones, mounted for the test."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.models import write_model

pytestmark = pytest.mark.slow

SETS = (
    "training.tokens=512",
    "training.context=32",
    "training.batch_size=4",
    "training.precision=float32",
    "training.save_every=1",
    "data.held_out_tokens=64",
    "init.method=none",
)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a disk with some options at one place, again and again."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> Path:
        how = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        if subprocess.run(how, capture_output=True, check=False).returncode:
            pytest.skip("mounting a disk needs root, and Linux")
        return place

    yield mount
    if os.path.ismount(place):
        subprocess.run(["umount", str(place)], check=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "model"
    return write_model(directory, "smollm2", layers=1, hidden_size=256, intermediate_size=512)


def run(*words: object, cache: Path | None = None) -> tuple[int, str]:
    environment = os.environ | ({"BITCONVERT_CACHE": str(cache)} if cache else {})
    command = [sys.executable, "-m", "bitconvert", *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr


def training(model: Path, story: Path, output: Path) -> list[object]:
    sets = [word for override in SETS for word in ("--set", override)]
    return ["warmup", "--model", model, "--data", story, "--output", output, *sets]


def hidden(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.name.startswith(".")]


def test_a_full_disk_keeps_the_last_checkpoint_and_the_run_goes_on_when_there_is_room(
    disk: Callable[[str], Path], model: Path, story: Path, tmp_path: Path
) -> None:
    assert run(*training(model, story, tmp_path / "whole"))[0] == 0
    full = disk("size=16m")  # two checkpoints of 5 MB, not three
    code, told = run(*training(model, story, full / "out"))
    assert code == 1
    assert "checkpoint-3: cannot be written, the disk is full" in told
    assert not (full / "out").exists()
    assert {path.name for path in (full / "out.partial" / "checkpoints").iterdir()} == {"checkpoint-1", "checkpoint-2"}
    assert hidden(full) == []
    subprocess.run(["mount", "-o", "remount,size=64m", str(full)], check=True)
    assert run("warmup", "--resume", "--output", full / "out")[0] == 0
    assert (full / "out/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    assert [path.name for path in full.iterdir()] == ["out"]


def test_a_disk_too_small_to_pack_on_stays_empty(disk: Callable[[str], Path], model: Path, tmp_path: Path) -> None:
    small = disk("size=100k")
    for form in ("tq2_0", "safetensors", "onnx"):
        code, told = run("pack", model, "--round", "--format", form, "--output", small / "packed")
        assert (code, "the disk is full" in told) == (1, True), told
        assert [path for path in small.rglob("*") if path.is_file()] == []


def test_an_output_that_is_read_only(disk: Callable[[str], Path], model: Path, story: Path, tmp_path: Path) -> None:
    assert run("pack", model, "--round", "--format", "tq2_0", "--output", tmp_path / "packed")[0] == 0
    place = disk("ro,size=1m")
    for words in (
        training(model, story, place / "out"),
        ["pack", model, "--round", "--format", "tq2_0", "--format", "safetensors", "--output", place / "packed"],
        ["unpack", next(tmp_path.glob("packed/*.gguf")), "--output", place / "baked"],
    ):
        code, told = run(*words)
        assert code == 1
        assert f"error: {place}" in told
        assert "cannot be written (Read-only file system)" in told
    code, told = run(*training(model, story, tmp_path / "out"), cache=place / "cache")
    assert (code, "hint: set BITCONVERT_CACHE to a directory that can be written" in told) == (1, True)
    assert not partial(tmp_path / "out").exists()


def partial(output: Path) -> Path:
    return output.with_name(f"{output.name}.partial")


@pytest.mark.parametrize("elsewhere", ["output", "cache"])
def test_output_cache_and_temporary_files_on_different_disks(
    elsewhere: str, disk: Callable[[str], Path], model: Path, story: Path, tmp_path: Path
) -> None:
    assert run(*training(model, story, tmp_path / "whole"))[0] == 0
    place = disk("size=64m")
    output, cache = (place, tmp_path) if elsewhere == "output" else (tmp_path, place)
    assert run(*training(model, story, output / "out"), cache=cache / "cache")[0] == 0
    assert (output / "out/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    packs = [["pack", tmp_path / "whole", "--format", "all", "--output", where / "p"] for where in (tmp_path, place)]
    for words in packs:
        assert run(*words)[0] == 0
    files = [path for path in (tmp_path / "p").rglob("*") if path.is_file() and path.name != "README.md"]
    assert files
    for path in files:
        assert (place / "p" / path.relative_to(tmp_path / "p")).read_bytes() == path.read_bytes()


@pytest.mark.skipif(shutil.which("prlimit") is None, reason="needs prlimit")
def test_too_little_memory_is_one_line(model: Path, story: Path, tmp_path: Path) -> None:
    """The windows are so many at once that their activations cannot be had."""
    words = training(model, story, tmp_path / "out")
    more = ["training.batch_size=256", "training.micro_batch_size=256", "training.tokens=8192"]
    sets = [word for override in more for word in ("--set", override)]
    process = ["prlimit", f"--as={2_300_000_000}", sys.executable, "-m", "bitconvert", *map(str, [*words, *sets])]
    done = subprocess.run(process, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "error: out of memory (" in done.stderr
    assert "hint: lower training.micro_batch_size" in done.stderr
    assert not partial(tmp_path / "out").exists()
