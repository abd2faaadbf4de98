"""Damaged GGUF files of every format: each loads, or is refused with one line. No traceback, no hang, no giant."""

from __future__ import annotations

import contextlib
import random
import resource
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bitconvert.errors import BitconvertError
from bitconvert.evaluation.inspect import inspect
from bitconvert.models.checkpoint import Checkpoint, open_checkpoint
from bitconvert.packing.formats import FORMATS, GgufFormat
from tests.unit.test_pack import make_latent, run_pack

ROOM = 2 * 2**30
"""Bytes of address space beyond what the tests already have; the files are smaller than 2 MB."""

SECONDS = 20

GGUF_NAMES = [name for name, form in FORMATS.items() if isinstance(form, GgufFormat)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """A small file of each format, and one with a SentencePiece vocabulary."""
    folder = tmp_path_factory.mktemp("good")
    bpe = make_latent(folder / "bpe", layers=1, intermediate_size=256)
    report = run_pack(bpe, GGUF_NAMES, folder / "packed-bpe")
    pieces = make_latent(folder / "pieces", variant="llama2", layers=1, intermediate_size=256)
    report.files.extend(run_pack(pieces, ["tq1_0"], folder / "packed-pieces").files)
    return [Path(file.path).read_bytes() for file in report.files]


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Refuse giant allocations, and end what hangs."""

    def give_up(*_: object) -> None:
        raise TimeoutError(f"still busy after {SECONDS} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, hard))
    handler = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# ---- damage ----------------------------------------------------------------------------------------------------------


def somewhere(source: random.Random, content: bytearray) -> int:
    """Mostly among the metadata: the rest is numbers, and any number will do."""
    metadata_end = content.rfind(b"_norm.weight") + 64
    return source.randrange(min(len(content), metadata_end) if source.random() < 0.85 else len(content))


def flip_bits(source: random.Random, content: bytearray) -> None:
    for _ in range(source.choice([1, 1, 2, 8])):
        content[somewhere(source, content)] ^= 1 << source.randrange(8)


def cut_off(source: random.Random, content: bytearray) -> None:
    del content[max(1, somewhere(source, content)) :]


def zero_a_range(source: random.Random, content: bytearray) -> None:
    at, size = somewhere(source, content), source.choice([1, 4, 8, 64, 1000])
    content[at : at + size] = bytes(len(content[at : at + size]))


def repeat_a_range(source: random.Random, content: bytearray) -> None:
    at, size = somewhere(source, content), source.choice([1, 4, 8, 64, 1000])
    content[at:at] = content[at : at + size]


def drop_a_range(source: random.Random, content: bytearray) -> None:
    at, size = somewhere(source, content), source.choice([1, 4, 8, 64, 1000])
    del content[max(1, at) : at + size]


def blow_up_a_number(source: random.Random, content: bytearray) -> None:
    """Put a number that means trouble where a length, a count or a value of metadata may stand."""
    at = somewhere(source, content)
    number = source.choice([0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1])
    size = source.choice([4, 8])
    content[at : at + size] = struct.pack("<Q", number)[:size]


def lie_in_a_value(source: random.Random, content: bytearray) -> None:
    """Change the value of one key of the architecture, the tokenizer or the file itself."""
    keys = [b"llama.", b"tokenizer.ggml.", b"general."]
    places = [place for key in keys for place in occurrences(content, key)]
    at = source.choice(places or [8])
    size = int.from_bytes(content[at - 8 : at], "little")
    value = min(at + size + 4, len(content))
    number = source.choice([0, 1, 2, 3, 7, 255, 256, 2**15, 2**31, 2**32 - 1, source.randrange(2**32)])
    content[value : value + 4] = struct.pack("<I", number)


def change_a_type(source: random.Random, content: bytearray) -> None:
    """Give a key, a list or a tensor another type."""
    key = source.choice([b"llama.", b"tokenizer.", b".weight"])
    at = source.choice(list(occurrences(content, key)) or [8])
    end = at + source.randrange(8, 40)
    content[end : end + 4] = struct.pack("<I", source.randrange(45))


def occurrences(content: bytearray, key: bytes) -> Iterator[int]:
    at = content.find(key)
    while at >= 0:
        yield at
        at = content.find(key, at + 1)


DAMAGES: list[Callable[[random.Random, bytearray], None]] = [
    flip_bits,
    cut_off,
    zero_a_range,
    repeat_a_range,
    drop_a_range,
    blow_up_a_number,
    lie_in_a_value,
    change_a_type,
]


# ---- the test --------------------------------------------------------------------------------------------------------


def survive(seed: int, files: list[bytes], path: Path) -> bool:
    """Damage a file and do with it all that users do; whether all of it worked."""
    source = random.Random(seed)
    content = bytearray(source.choice(files))
    for _ in range(source.choice([1, 1, 1, 2])):
        source.choice(DAMAGES)(source, content)
    path.write_bytes(bytes(content))
    refusals = []
    for use in (
        lambda: open_checkpoint(str(path)).load(),
        lambda: open_checkpoint(str(path)).tokenizer()("The dog."),
        lambda: inspect(str(path)),
        lambda: read_all(open_checkpoint(str(path))),
    ):
        try:
            use()
        except BitconvertError as error:
            refusals.append(error.message)
    assert all("\n" not in message and len(message) < 1000 for message in refusals)
    return not refusals


def read_all(checkpoint: Checkpoint) -> None:
    for name in checkpoint.weights():
        checkpoint.read_weight(name)


def fuzz(seeds: range, files: list[bytes], folder: Path) -> int:
    """How many of the damaged files loaded all the same."""
    survivors = 0
    with limits():
        for seed in seeds:
            signal.alarm(SECONDS)
            try:
                survivors += survive(seed, files, folder / f"{seed}.gguf")
            except BaseException as error:
                error.add_note(f"the file of seed {seed}")
                raise
            (folder / f"{seed}.gguf").unlink()
    return survivors


def test_damaged_files_load_or_are_refused(files: list[bytes], tmp_path: Path) -> None:
    assert 0 < fuzz(range(300), files, tmp_path) < 300


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_ten_thousand_damaged_files(files: list[bytes], tmp_path: Path, part: int) -> None:
    fuzz(range(1000 * (part + 1), 1000 * (part + 2)), files, tmp_path)
