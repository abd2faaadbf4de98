"""How long a command line takes to answer: ``python -m benchmarks.startup``. Medians of wall and CPU time, in turn.

Beside ``bitconvert --help`` and an argument error stand Python that does nothing, the floor, and the command lines
that come with transformers and huggingface_hub.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROUNDS = 20

PYTHON = [sys.executable]
HERE = Path(sys.executable).parent
COMMANDS = {
    "bitconvert --help": [*PYTHON, "-m", "bitconvert", "--help"],
    "bitconvert warmup --set nope.x=1": [*PYTHON, "-m", "bitconvert", "warmup", "--set", "nope.x=1"],
    "bitconvert inspect /no/such": [*PYTHON, "-m", "bitconvert", "inspect", "/no/such"],
    "python -c pass": [*PYTHON, "-c", "pass"],
    "hf --help": [str(HERE / "hf"), "--help"],
    "transformers --help": [str(HERE / "transformers"), "--help"],
    "python -c 'import torch'": [*PYTHON, "-c", "import torch"],
}


def main() -> None:
    """Print one line per command."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    for _ in range(ROUNDS):
        for name, words in COMMANDS.items():
            taken[name].append(_seconds(words))
    print(f"medians of {ROUNDS} runs, seconds: wall, CPU")
    for name, pairs in taken.items():
        wall, cpu = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"{name:34} {wall:6.3f} {cpu:6.3f}")


def _seconds(words: list[str]) -> tuple[float, float]:
    """Wall and CPU time of a process that may fail: an argument error is an answer too."""
    before, started = os.times(), time.perf_counter()
    subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    wall, after = time.perf_counter() - started, os.times()
    return wall, after.children_user + after.children_system - before.children_user - before.children_system


if __name__ == "__main__":
    main()
