"""Streaming a text: ``python -m benchmarks.streaming MODEL TEXT [MILLIONS]``. Tokens a second, disk, memory.

Reads so many million tokens of windows as fast as they come, with no training beside it: by tokenizing in this process,
as is done without ``data.streaming``, and by one and two processes. Then goes on near the end, as a resumed run does.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

if __name__ == "__main__":  # and not in the processes that tokenize, which would load torch for nothing
    from bitconvert.models.checkpoint import open_checkpoint
    from bitconvert.recipe import Recipe, load_recipe
    from bitconvert.training.corpus import open_corpus
    from bitconvert.training.data import cache_directory, end_of_text
    from bitconvert.training.streaming import streamed_windows
    from bitconvert.training.tokenizing import encode, in_batches

SHARD = 2**20


def main() -> None:
    """Print one line per way."""
    model, text, millions = sys.argv[1], sys.argv[2], int((*sys.argv, "8")[3])
    tokenizer = open_checkpoint(model).tokenizer()
    started, tokens = time.perf_counter(), 0
    for batch in in_batches(open_corpus([text]).parts[0].documents(0)):
        tokens += sum(map(len, encode(tokenizer.backend_tokenizer, end_of_text(tokenizer), batch)))
        if tokens > millions * 10**6:
            break
    print(f"in one process, all cores: {tokens / (time.perf_counter() - started):,.0f} tokens a second", flush=True)
    for workers in (1, 2):
        recipe = load_recipe(
            None,
            [
                "data.streaming=true",
                f"data.sources=[{text}]",
                f"data.workers={workers}",
                f"data.shard_tokens={SHARD}",
                f"training.tokens={millions * 10**6}",
            ],
        )
        with tempfile.TemporaryDirectory() as folder:
            os.environ["BITCONVERT_CACHE"] = f"{folder}/cache"
            _measure(f"{workers} process{'es' if workers > 1 else ''}", model, recipe, Path(folder), 0)
            _measure("  resumed at 90 %", model, recipe, Path(folder), 0.9)


def _measure(name: str, model: str, recipe: Recipe, run: Path, begin: float) -> None:
    watch, seen, done = psutil.Process(), {"disk": 0, "children": 0}, threading.Event()

    def look() -> None:
        while not done.wait(0.05):
            seen["disk"] = max(seen["disk"], _bytes(cache_directory()))
            seen["children"] = max(seen["children"], sum(child.memory_info().rss for child in watch.children()))

    tokenizer = open_checkpoint(model).tokenizer()
    watcher = threading.Thread(target=look)
    watcher.start()
    before = watch.memory_info().rss
    with streamed_windows(open_corpus(recipe.data.sources), tokenizer, recipe, run) as order:
        first = int(begin * len(order))
        started = time.perf_counter()
        _ = order[first]
        waited = time.perf_counter() - started
        for index in range(first, len(order)):
            _ = order[index]
        seconds = time.perf_counter() - started
        own = watch.memory_info().rss - before
    done.set()
    watcher.join()
    tokens = (len(order) - first) * recipe.training.context
    print(
        f"{name}: {tokens / seconds:,.0f} tokens a second, the first after {waited:.1f} s; "
        f"{seen['disk'] / 1e6:.1f} MB on disk for {2 * len(order) * recipe.training.context / 1e6:.1f} MB of tokens; "
        f"memory {own / 1e6:+.0f} MB here, {seen['children'] / 1e6:.0f} MB in processes",
        flush=True,
    )


def _bytes(directory: Path) -> int:
    total = 0
    for file in directory.rglob("*"):
        try:
            total += file.stat().st_blocks * 512 if file.is_file() else 0
        except FileNotFoundError:  # gone since it was listed
            continue
    return total


if __name__ == "__main__":
    main()
