"""What ``bitconvert plan`` foresees against what training then takes: ``python -m benchmarks.plan``.

Peak resident memory of a process of its own, and the CPU seconds of one thread, from the first measurement on held-out
text to the last checkpoint. With ``--wall`` wall-clock seconds, by all threads: for an idle machine.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import random_llama
from bitconvert.demo.stories import text
from bitconvert.models.checkpoint import open_checkpoint
from bitconvert.recipe import load_recipe
from bitconvert.report.reporter import Silent
from bitconvert.training.plan import plan_warmup
from bitconvert.training.warmup import warmup
from tests.models import byte_level_bpe

SHAPES = {"256, 8k": (256, 4, 8192), "512, 32k": (512, 8, 32_000)}
CASES = (
    ("256, 8k", ()),
    ("256, 8k", ("training.activation_checkpointing=true", "distill.kl=0")),
    ("512, 32k", ()),
    ("512, 32k", ("training.activation_checkpointing=true",)),
    ("512, 32k", ("optimizer.name=adafactor", "distill.kl=0")),
    ("512, 32k", ("training.micro_batch_size=8", "optimizer.name=adafactor")),
)
COMMON = (
    "scaling.estimator=absmean",
    "lam.curve=linear",
    "init.method=none",
    "optimizer.name=adamw",
    "training.tokens=16384",
    "training.context=256",
    "training.batch_size=8",
    "training.eval_every=4",
    "training.save_every=4",
    "data.held_out_tokens=2048",
)
WALL = "--wall" in sys.argv


def main() -> None:
    """Print one line per case."""
    print(f"{'hidden, vocabulary':20}{'MB foreseen':>12}{'measured':>10}{'ratio':>7}", end="")
    print(f"{'s foreseen':>12}{'measured':>10}{'ratio':>7}  options")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "text.txt").write_text(text(0, 200_000), encoding="utf-8")
        for shape, overrides in CASES:
            foreseen = _alone(_foresee, directory, shape, overrides)
            measured = _alone(_measure, directory, shape, overrides)
            print(f"{shape:20}", end="")
            for unit, before, after in zip((1e6, 1.0), foreseen, measured, strict=True):
                print(f"{before / unit:12.1f}{after / unit:10.1f}{before / after:7.2f}", end="")
            print(f"  {' '.join(overrides)}", flush=True)


def _alone(work: Callable[..., tuple[float, float]], *arguments: Any) -> tuple[float, float]:
    """Do it in a process of its own, whose memory holds nothing else."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def _foresee(directory: Path, shape: str, overrides: tuple[str, ...]) -> tuple[float, float]:
    recipe = load_recipe(None, _overrides(directory, overrides))
    plan = plan_warmup(open_checkpoint(str(_model(directory, shape))), recipe, reporter=Silent(), clock=_clock())
    (here,) = plan.forecasts
    assert here.total_seconds is not None
    return here.peak_bytes, here.total_seconds


def _measure(directory: Path, shape: str, overrides: tuple[str, ...]) -> tuple[float, float]:
    clock = _clock()

    class Stages(Silent):
        def __init__(self) -> None:
            self.seconds: dict[str, float] = {}

        def stage(self, title: str) -> None:
            self.seconds[title.split()[0]] = clock()

    stages = Stages()
    recipe = load_recipe(None, _overrides(directory, overrides))
    with tempfile.TemporaryDirectory() as output:
        warmup(str(_model(directory, shape)), Path(output, "ternary"), recipe, reporter=stages)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return peak, stages.seconds["saving"] - stages.seconds["measuring"]


def _clock() -> Callable[[], float]:
    if WALL:
        return time.perf_counter
    torch.set_num_threads(1)
    return time.process_time


def _overrides(directory: Path, overrides: tuple[str, ...]) -> list[str]:
    return [*COMMON, f"data.sources=[{directory / 'text.txt'}]", *overrides]


def _model(directory: Path, shape: str) -> Path:
    """A LLaMA of random weights, written once."""
    hidden, layers, vocabulary = SHAPES[shape]
    path = directory / f"{hidden}"
    if not path.exists():
        random_llama(hidden, layers, vocabulary, tie_word_embeddings=True).save_pretrained(path)
        byte_level_bpe().save_pretrained(path)
    return path


if __name__ == "__main__":
    main()
