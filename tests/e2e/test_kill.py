"""Real commands, killed at random moments, then begun again: what comes is what comes of an undisturbed run."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.models import write_model

pytestmark = pytest.mark.slow

MOMENTS = 20

WARMUP = (
    "training.tokens=1024",
    "training.context=32",
    "training.batch_size=4",
    "training.precision=float32",
    "training.eval_every=4",
    "training.save_every=1",
    "data.held_out_tokens=64",
    "distill.cache=true",
    "distill.cache_top_k=16",
    "init.method=blockwise",
    "init.tokens=512",
)
TOLD_ANEW = {
    "README.md",
    "metrics.jsonl",
    "training.png",
    "report.html",
    "warmup.json",
    "SHA256SUMS",
}  # they tell how long it took


class Place:
    """A directory with a cache of its own, in which a command is run, killed, and run again."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir()

    def start(self, *words: object) -> subprocess.Popen[str]:
        environment = os.environ | {"BITCONVERT_CACHE": str(self.directory / "cache"), "TMPDIR": str(self.directory)}
        return subprocess.Popen(
            [sys.executable, "-m", "bitconvert", *map(str, words)],
            cwd=self.directory,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: object) -> int:
        process = self.start(*words)
        told = process.communicate()[1]
        assert "Traceback" not in told, told
        return process.returncode

    def seconds(self, *words: object) -> float:
        """What a command takes from its first line on, undisturbed."""
        process = self.start(*words)
        assert process.stderr is not None
        process.stderr.readline()
        began = time.monotonic()
        assert (process.communicate()[1], process.returncode)[1] == 0
        return time.monotonic() - began

    def kill(self, after: float, *words: object) -> None:
        """Kill a command so many seconds after its first line."""
        process = self.start(*words)
        assert process.stderr is not None
        process.stderr.readline()
        time.sleep(after)
        process.kill()
        process.communicate()

    def files(self) -> dict[str, Path]:
        return {str(path.relative_to(self.directory)): path for path in self.directory.rglob("*") if path.is_file()}

    def digests(self) -> dict[str, str]:
        """Of the files that have the names they are to have."""
        return {
            name: hashlib.sha256(path.read_bytes()).hexdigest()
            for name, path in self.files().items()
            if path.name not in TOLD_ANEW
            and not name.startswith(("cache/", "ternary.partial/"))
            and "/." not in f"/{name}"
        }

    def leftovers(self) -> list[str]:
        """All that is not there after an undisturbed run."""
        return [name for name in self.files() if "/." in f"/{name}" or ".partial" in name or ".at-" in name]


def moments(seconds: float) -> Iterator[float]:
    """Random ones, of which each twentieth of the time gets one."""
    generator = random.Random(0)
    return ((index + generator.random()) / MOMENTS * seconds for index in range(MOMENTS))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "model", "smollm2", layers=4)


@pytest.fixture(scope="module")
def undisturbed(model: Path, story: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, float]:
    place = Place(tmp_path_factory.mktemp("kill") / "undisturbed")
    return place, place.seconds(*training(model, story))


def training(model: Path, story: Path) -> list[object]:
    sets = [word for override in WARMUP for word in ("--set", override)]
    return ["warmup", "--model", model, "--data", story, "--output", "ternary", *sets]


def require_whole_checkpoints(run_directory: Path) -> None:
    """What has the name of a checkpoint can be read from its first to its last byte."""
    for checkpoint in run_directory.glob("checkpoints/checkpoint-*"):
        json.loads((checkpoint / "trainer_state.json").read_text())
        with safe_open(checkpoint / "model.safetensors", framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - not a dictionary
                weights.get_tensor(name)
        assert "optimizer.safetensors" in {path.name for path in checkpoint.iterdir()}


def metrics(place: Place) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (place.directory / "ternary" / "metrics.jsonl").open()]
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


def test_warmup(undisturbed: tuple[Place, float], model: Path, story: Path, tmp_path: Path) -> None:
    expected, seconds = undisturbed
    found = set()
    for number, moment in enumerate(moments(seconds)):
        place = Place(tmp_path / str(number))
        place.kill(moment, *training(model, story))
        assert place.digests().items() <= expected.digests().items(), moment
        require_whole_checkpoints(place.directory / "ternary.partial")
        found.add(frozenset(path.name for path in (place.directory / "ternary.partial").rglob("*")))
        if place.run("warmup", "--resume", "--output", "ternary") != 0 and not (place.directory / "ternary").exists():
            assert place.run(*training(model, story)) == 0, moment
        assert place.digests() == expected.digests(), moment
        assert metrics(place) == metrics(expected), moment
        assert place.leftovers() == [], moment
    assert len(found) > MOMENTS / 4, "the moments fell into too few stages"


def test_warmup_killed_again_and_again(
    undisturbed: tuple[Place, float], model: Path, story: Path, tmp_path: Path
) -> None:
    expected, seconds = undisturbed
    place, words = Place(tmp_path / "place"), training(model, story)
    generator = random.Random(1)
    for _ in range(MOMENTS):
        place.kill(generator.random() * seconds / 2, *words)
        if (place.directory / "ternary.partial" / "run.json").exists():
            words = ["warmup", "--resume", "--output", "ternary"]
    place.run(*words)
    assert place.digests() == expected.digests()
    assert place.leftovers() == []


def test_pack(undisturbed: tuple[Place, float], tmp_path: Path) -> None:
    words = [
        "pack",
        undisturbed[0].directory / "ternary",
        "--format",
        "all",
        "--max-shard-size",
        "500kB",
        "--output",
        "p",
        "--overwrite",
    ]
    expected = Place(tmp_path / "undisturbed")
    seconds = expected.seconds(*words)
    place = Place(tmp_path / "again")
    for number, moment in enumerate(moments(seconds)):
        fresh = Place(tmp_path / str(number))
        for where in (fresh, place):  # where nothing is, and where the files of the run before are
            where.kill(moment, *words)
            assert where.digests().items() <= expected.digests().items(), moment
        assert fresh.run(*words) == 0
        assert fresh.digests() == expected.digests(), moment
        assert fresh.leftovers() == [], moment
    assert place.run(*words) == 0
    assert place.digests() == expected.digests()
    assert place.leftovers() == []


def test_eval(undisturbed: tuple[Place, float], model: Path, story: Path, tmp_path: Path) -> None:
    ternary = undisturbed[0].directory / "ternary"
    words = ["eval", ternary, "--ppl", "--data", story, "--context", 64, "--against", model, "--json"]
    place = Place(tmp_path / "place")
    seconds = place.seconds(*words)
    before = place.start(*words).communicate()[0]
    for moment in moments(seconds):
        place.kill(moment, *words)
        assert place.files() == {}, moment
    assert place.start(*words).communicate()[0] == before
