"""Train from the cached teacher instead of the live one: ``python -m benchmarks.teacher``. Quality, CPU time, disk.

The embedded model of `bitconvert demo`, converted as it was before its recipe had a fit and Muon, on a text that is
read two or three times. Each cached run is made twice: the first asks the teacher, the second finds the answers.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import torch

from bitconvert.demo.demo import MODEL
from bitconvert.demo.stories import HELD_OUT_SEED, WARMUP_SEED, text
from bitconvert.recipe import load_recipe
from bitconvert.report.reporter import Silent
from bitconvert.training.warmup import warmup

_CHARACTERS_A_TOKEN = 3


_AS_BEFORE = ("init.method=none", "lam.curve=linear", "optimizer.name=adamw", "optimizer.lr=2e-3")


def main() -> None:
    """Print one line per run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.teacher", description=__doc__)
    parser.add_argument("--tokens", type=int, default=98_304, help="training tokens")
    parser.add_argument("--top-k", type=int, nargs="*", default=[4, 16, 64, 256], help="likeliest tokens kept")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each, with training.seed 0, 1 ...")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        os.environ["BITCONVERT_CACHE"] = str(Path(directory) / "cache")
        texts = _write_texts(Path(directory), arguments.tokens)
        print(f"{'teacher':16} {'seed':>4} {'held-out ppl':>12} {'CPU s':>6} {'again':>6} {'MB':>6}")
        for seed in range(arguments.seeds):
            options = [*texts, f"training.tokens={arguments.tokens}", f"training.seed={seed}"]
            ppl, seconds = _run(options)
            print(f"{'live':16} {seed:4} {ppl:12.4f} {seconds:6.1f}", flush=True)
            for k in arguments.top_k:
                cached = [*options, "distill.cache=true", f"distill.cache_top_k={k}"]
                (ppl, first), (_, again) = _run(cached), _run(cached)
                (file,) = Path(directory).glob("cache/*.teacher")
                name, size = f"cached, k = {k}", file.stat().st_size / 1e6
                print(f"{name:16} {seed:4} {ppl:12.4f} {first:6.1f} {again:6.1f} {size:6.1f}", flush=True)
                file.unlink()


def _write_texts(directory: Path, tokens: int) -> list[str]:
    """Less than half as much text as is trained on, so that it is read more than twice, and some held out."""
    options = []
    sizes = {"sources": tokens * _CHARACTERS_A_TOKEN // 2, "held_out": 16_384 * _CHARACTERS_A_TOKEN * 2}
    for (name, characters), seed in zip(sizes.items(), (WARMUP_SEED, HELD_OUT_SEED), strict=True):
        file = directory / f"{name}.txt"
        file.write_text(text(seed, characters), encoding="utf-8")
        options.append(f"data.{name}=[{file}]")
    return options


def _run(options: list[str]) -> tuple[float, float]:
    """Perplexity on held-out text, and CPU seconds of the whole run."""
    with tempfile.TemporaryDirectory() as directory:
        started = time.process_time()
        report = warmup(
            str(MODEL),
            Path(directory) / "out",
            load_recipe("demo", [*_AS_BEFORE, "training.eval_every=1000", *options]),
            reporter=Silent(),
        )
        return report.held_out_ppl, time.process_time() - started


if __name__ == "__main__":
    main()
