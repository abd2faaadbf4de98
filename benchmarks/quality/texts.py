"""The texts of a bed: to train on, to watch a training by, to judge its result by. No line is in two of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from benchmarks.quality.bed import EMBEDDED, Bed
from benchmarks.quality.places import Places
from bitconvert.atomic import atomic_file
from bitconvert.demo.stories import HELD_OUT_SEED, WARMUP_SEED, stories, text

_TOKENS_PER_STORY = 100  # fewer than the shortest has, so that none is seen twice
_BYTES_PER_TOKEN = 4  # fewer than the held-out stories have


@dataclass(frozen=True)
class Texts:
    """Files."""

    training: tuple[Path, ...]
    watched: Path
    judged: Path


def prepare(bed: Bed, tokens: int, places: Places) -> Texts:
    """Write a bed's texts.

    The held-out text is cut in two at a line's end, and its lines are left out of training texts (.txt) that hold them.

    Args:
        bed: whose texts are meant.
        tokens: how many will be trained on.
        places: where to look and where to write.
    """
    directory = places.runs / "texts" / bed.name
    training: tuple[Path, ...]
    if bed.model == EMBEDDED:
        held_out = text(HELD_OUT_SEED, bed.watched_bytes + _BYTES_PER_TOKEN * bed.judged_tokens)
        training = (_written(directory / "stories.jsonl", _json_lines(tokens)),)
    else:
        held_out = places.given(bed.held_out).read_text(encoding="utf-8")
        training = tuple(_without(places.given(name), held_out, directory) for name in bed.training)
    watched, judged = _cut(held_out, bed.watched_bytes)
    return Texts(training, _written(directory / "watched.txt", watched), _written(directory / "judged.txt", judged))


def _written(path: Path, contents: str) -> Path:
    """The path, with these contents; left alone where it has them, since others may be reading it."""
    if not path.exists() or path.read_text(encoding="utf-8") != contents:
        with atomic_file(path) as temporary:
            temporary.write_text(contents, encoding="utf-8")
    return path


def _json_lines(tokens: int) -> str:
    written = islice(stories(WARMUP_SEED), tokens // _TOKENS_PER_STORY)
    return "".join(json.dumps({"text": story}) + "\n" for story in written)


def _without(path: Path, held_out: str, directory: Path) -> Path:
    """A text without the lines that are held out; collections of documents are used as they are."""
    if path.suffix != ".txt":
        return path
    held = set(held_out.splitlines(keepends=True)) - {"\n"}
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return _written(directory / path.name, "".join(line for line in lines if line not in held))


def _cut(held_out: str, nbytes: int) -> tuple[str, str]:
    """The first lines, so many bytes or a few more, and the others."""
    at = held_out.index("\n", len(held_out.encode()[:nbytes].decode(errors="ignore"))) + 1
    return held_out[:at], held_out[at:]
