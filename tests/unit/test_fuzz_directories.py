"""Damaged model directories: each loads, or is refused in one line; nothing crashes, hangs or takes all memory."""

from __future__ import annotations

import contextlib
import json
import random
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bitconvert.errors import BitconvertError
from bitconvert.evaluation.inspect import inspect
from bitconvert.models.checkpoint import open_checkpoint
from tests.models import write_model
from tests.packed import make_checkpoint, pack_directory

SECONDS = 20  # for what takes a hundredth of one
MEMORY = 4 << 30  # bytes more than before
SMALL = {"hidden_size": 64, "intermediate_size": 96, "layers": 1}
STRANGE: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 3, 2**31, 2**63, -(2**63), 10**30, 0.5, 1e308),
    *("", "x", "../..", "float32", "é" * 50, [], [1], [[]], {}, {"a": 1}, {"weight": [0, 4]}),
)


class Hang(SystemExit):
    """Not an Exception, which somebody might take for a bad file."""


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One directory of each kind, some in shards."""
    root = tmp_path_factory.mktemp("originals")
    latent = make_checkpoint(root / "latent", **SMALL)
    return [
        latent,
        write_model(root / "plain", "llama3", **SMALL),
        pack_directory(latent, "safetensors", root / "whole"),
        pack_directory(latent, "safetensors", root / "split", max_shard_size=40_000),
        pack_directory(latent, "compressed-tensors", root / "other" / "whole"),
        pack_directory(latent, "compressed-tensors", root / "other" / "split", max_shard_size=40_000),
    ]


@pytest.fixture
def _limits() -> Iterator[None]:
    """A hang or a huge allocation becomes an exception, and so a failure."""

    def too_late(signum: int, frame: object) -> None:
        raise Hang

    before, limits = signal.signal(signal.SIGALRM, too_late), resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limits[1]))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.usefixtures("_limits")
@pytest.mark.parametrize("seed", range(8))
def test_damaged_directories_load_or_are_refused(originals: list[Path], tmp_path: Path, seed: int) -> None:
    fuzz(originals, tmp_path, seed, rounds=30)


@pytest.mark.slow
@pytest.mark.usefixtures("_limits")
@pytest.mark.parametrize("seed", range(100, 150))
def test_many_damaged_directories_load_or_are_refused(originals: list[Path], tmp_path: Path, seed: int) -> None:
    fuzz(originals, tmp_path, seed, rounds=200)


# ---- what it found ---------------------------------------------------------------------------------------------------


def change(path: Path, edit: Callable[[Any], Any]) -> None:
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


@pytest.mark.usefixtures("_limits")
@pytest.mark.parametrize(
    ("file", "edit", "told"),
    [
        ("config.json", lambda it: it.update(num_hidden_layers=2**31), "tells of 2147483648 layers"),
        ("config.json", lambda it: it.update(dtype=[1]), "config.json describes no model"),
        ("bitconvert.json", lambda it: it.update(lam=0), "stopped at λ = 0, and holds ternary codes"),
        ("bitconvert.json", lambda it: it.update(lam=0.5), "stopped at λ = 0.5, and holds ternary codes"),
        ("generation_config.json", lambda it: it.update(max_new_tokens="x"), "generation_config.json does not load"),
        ("model.safetensors.index.json", lambda it: it["weight_map"].update(x=[1]), "a shard has no name"),
        ("model.safetensors.index.json", lambda it: it["weight_map"].clear(), "hold no tensor"),
        (
            "model.safetensors.index.json",
            lambda it: it["weight_map"].update({"model.norm.weight": min(it["weight_map"].values())}),
            "tensor model.norm.weight is missing, though the index says that it is here|truncated or not safetensors",
        ),
    ],
)
def test_damage_that_once_ended_otherwise(
    originals: list[Path], tmp_path: Path, file: str, edit: Callable[[Any], Any], told: str
) -> None:
    kind = {"bitconvert.json": "whole", "model.safetensors.index.json": "split"}.get(file, "latent")
    original = next(path for path in originals if kind in path.parts)
    copy = shutil.copytree(original, tmp_path / "model")
    change(copy / file, edit)
    signal.alarm(SECONDS)
    with pytest.raises(BitconvertError, match=told):
        open_checkpoint(str(copy)).load()


@pytest.mark.usefixtures("_limits")
def test_a_token_of_an_absurd_number_is_refused(originals: list[Path], tmp_path: Path) -> None:
    copy = shutil.copytree(originals[0], tmp_path / "model")
    change(copy / "tokenizer.json", lambda it: it["model"]["vocab"].update(x=2**31))
    signal.alarm(SECONDS)
    assert "a token of number 2147483648" in str(inspect(str(copy)).metadata["tokenizer.pre"])


def test_a_quantization_of_nothing_is_none(originals: list[Path], tmp_path: Path) -> None:
    copy = shutil.copytree(originals[0], tmp_path / "model")
    change(copy / "config.json", lambda it: it.update(quantization_config=None))
    assert inspect(str(copy)).kind == "latent"


def fuzz(originals: list[Path], place: Path, seed: int, rounds: int) -> None:
    """Damage a copy, use it, and say what was done to it if it ends in any other exception than ours."""
    dice = random.Random(seed)
    for turn in range(rounds):
        original = dice.choice(originals)
        copy = place / "model"
        shutil.copytree(original, copy)
        done = damage(copy, dice)
        signal.alarm(SECONDS)
        try:
            for use in (load, inspect, read_vocabulary):
                with contextlib.suppress(BitconvertError):
                    use(str(copy))
        except BaseException as error:
            error.add_note(f"seed {seed}, turn {turn}: {original.parent.name}/{original.name}, {done}")
            raise
        finally:
            signal.alarm(0)
        shutil.rmtree(copy)


def load(path: str) -> None:
    model = open_checkpoint(path).load()
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))


def read_vocabulary(path: str) -> None:
    open_checkpoint(path).tokenizer()


# ---- damage ----------------------------------------------------------------------------------------------------------


def damage(directory: Path, dice: random.Random) -> str:
    """Change one file in one way, and tell which."""
    victim = dice.choice(sorted(path for path in directory.iterdir() if path.suffix in (".json", ".safetensors")))
    ways: list[Callable[[Path, random.Random], None]] = [flip, cut, lengthen, remove]
    ways += [edit_json] * 8 if victim.suffix == ".json" else [edit_header] * 8
    way = dice.choice(ways)
    way(victim, dice)
    return f"{way.__name__} {victim.name}"


def flip(path: Path, dice: random.Random) -> None:
    """A few bits, most of them in the first part, where headers are."""
    data = bytearray(path.read_bytes())
    for _ in range(dice.randint(1, 8)):
        data[dice.randrange(min(len(data), dice.choice((16, 2000, len(data)))))] ^= 1 << dice.randrange(8)
    path.write_bytes(data)


def cut(path: Path, dice: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: dice.randrange(len(data))])


def lengthen(path: Path, dice: random.Random) -> None:
    path.write_bytes(path.read_bytes() + dice.randbytes(dice.randint(1, 100)))


def remove(path: Path, dice: random.Random) -> None:
    path.unlink()


def edit_json(path: Path, dice: random.Random) -> None:
    path.write_text(json.dumps(edited(json.loads(path.read_text()), dice)))


def edit_header(path: Path, dice: random.Random) -> None:
    """The same in the header of a safetensors file, whose length is put right."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(edited(json.loads(data[8 : 8 + length]), dice)).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


def edited(document: Any, dice: random.Random) -> Any:
    """Drop a value somewhere, or put a strange one, or another one of the document, in its place."""
    places = list(walk(document))
    if not places:
        return dice.choice(STRANGE)
    holder, key = dice.choice(places)
    if dice.random() < 0.3:
        del holder[key]
    else:
        other, spot = dice.choice(places)
        holder[key] = dice.choice((*STRANGE, json.loads(json.dumps(other[spot]))))
    return document


def walk(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a document; long lists and tables are represented by their beginning."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    for key in keys[:40]:
        yield value, key
        yield from walk(value[key])
