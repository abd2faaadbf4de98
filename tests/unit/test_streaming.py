"""A text that is streamed: the same windows whoever tokenizes, no more disk than allowed, and any place found again."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import psutil
import pytest
from transformers import PreTrainedTokenizerFast

from bitconvert.demo.stories import text
from bitconvert.errors import BitconvertError, UsageError
from bitconvert.recipe import Recipe, load_recipe
from bitconvert.report.reporter import Silent
from bitconvert.training.corpus import Corpus, hold_out, open_corpus
from bitconvert.training.data import cache_directory, tokenize
from bitconvert.training.run_directory import partial_directory
from bitconvert.training.streaming import PLACES, streamed_windows
from bitconvert.training.warmup import warmup
from tests.models import byte_level_bpe
from tests.recipes import FROM_THE_ORIGINAL

CONTEXT, SHARD = 16, 160
FILES, DOCUMENTS = 3, 8


@pytest.fixture(autouse=True)
def _cache_of_each_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITCONVERT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Three files of eight documents each, about 150 tokens a document, one file packed."""
    directory = tmp_path / "texts"
    directory.mkdir()
    for number in range(FILES):
        lines = [json.dumps({"text": text(10 * number + n, 300)}) + "\n" for n in range(DOCUMENTS)]
        (directory / f"{number}.jsonl").write_text("".join(lines))
    packed = gzip.compress((directory / "1.jsonl").read_bytes())
    (directory / "1.jsonl").unlink()
    (directory / "1.jsonl.gz").write_bytes(packed)
    return directory


def streaming(texts: Path, steps: int = 10, workers: int = 1, *overrides: str) -> Recipe:
    return load_recipe(
        None,
        [
            *FROM_THE_ORIGINAL,
            "data.streaming=true",
            f"data.sources=[{texts}]",
            f"data.workers={workers}",
            f"data.shard_tokens={SHARD + 3}",  # what is over a multiple of the context is not used
            f"training.context={CONTEXT}",
            "training.batch_size=4",
            f"training.tokens={steps * 4 * CONTEXT}",
            "training.precision=float32",
            "training.save_every=4",
            "data.held_out_tokens=64",
            *overrides,
        ],
    )


def windows_of(
    recipe: Recipe, run: Path, positions: Iterable[int] | None = None, corpus: Corpus | None = None
) -> list[list[int]]:
    run.mkdir(exist_ok=True)
    corpus = corpus or open_corpus(recipe.data.sources)
    with streamed_windows(corpus, byte_level_bpe(), recipe, run) as order:
        return [order[index]["input_ids"].tolist() for index in (range(len(order)) if positions is None else positions)]


def tokens_of(files: list[Path], tokenizer: PreTrainedTokenizerFast) -> list[int]:
    return tokenize([str(file) for file in files], tokenizer, Silent()).ids.tolist()


def test_all_tokens_come_once_and_then_again(texts: Path, tmp_path: Path) -> None:
    recipe = streaming(texts, steps=400)
    windows = windows_of(recipe, tmp_path / "run")
    whole = {file: tokens_of([file], byte_level_bpe()) for file in sorted(texts.iterdir())}
    assert 1.5 < len(windows) * CONTEXT / sum(map(len, whole.values())) < 5
    per_shard = SHARD // CONTEXT
    shards = [sorted(windows[i : i + per_shard]) for i in range(0, len(windows), per_shard)]
    orders = [list(map(int, np.random.default_rng((0, epoch)).permutation(FILES))) for epoch in range(5)]
    stream = [token for order in orders for part in order for token in whole[sorted(whole)[part]]]
    expected = [stream[i : i + CONTEXT] for i in range(0, len(windows) * CONTEXT, CONTEXT)]
    assert shards == [sorted(expected[i : i + per_shard]) for i in range(0, len(expected), per_shard)]
    assert windows != expected
    assert len({tuple(order) for order in orders}) > 1


def test_more_processes_give_the_same_windows(texts: Path, tmp_path: Path) -> None:
    one, two = (windows_of(streaming(texts, workers=count), tmp_path / str(count)) for count in (1, 2))
    assert one == two


def test_disk_use_is_bounded_and_nothing_stays(texts: Path, tmp_path: Path) -> None:
    recipe = streaming(texts, steps=100)
    (tmp_path / "run").mkdir()
    most = 0
    with streamed_windows(open_corpus(recipe.data.sources), byte_level_bpe(), recipe, tmp_path / "run") as order:
        for index in range(len(order)):
            _ = order[index]
            files = [Path(root, name) for root, _, names in os.walk(cache_directory()) for name in names]
            most = max(most, sum(size_of(file) for file in files if file.suffix == ".bin"))  # also of the unfinished
    shard_bytes = 2 * SHARD
    assert 2 * shard_bytes <= most <= recipe.data.shards * shard_bytes < 2 * len(order) * CONTEXT / 5
    assert [path for path in cache_directory().rglob("*") if path.is_file()] == []


def size_of(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:  # gone since it was listed
        return 0


def test_any_position_is_found_again(texts: Path, tmp_path: Path) -> None:
    recipe = streaming(texts, steps=30)
    whole = windows_of(recipe, tmp_path / "run")
    somewhere = [70, 71, 5, 0, 119, 1]
    assert windows_of(recipe, tmp_path / "run", somewhere) == [whole[index] for index in somewhere]
    (tmp_path / "run" / PLACES).unlink()  # then all before it is tokenized again
    assert windows_of(recipe, tmp_path / "run", [100]) == [whole[100]]


def test_what_was_trained_on_is_not_read_again(texts: Path, tmp_path: Path) -> None:
    recipe = streaming(texts, steps=150)
    whole = windows_of(recipe, tmp_path / "run")
    first = sorted(texts.iterdir())[int(np.random.default_rng((0, 0)).permutation(FILES)[0])]
    first.write_bytes(b"x" * first.stat().st_size)
    assert windows_of(recipe, tmp_path / "run", range(350, 400)) == whole[350:400]


def test_held_out_documents_are_never_trained_on(texts: Path, tmp_path: Path) -> None:
    recipe, tokenizer = streaming(texts, steps=400), byte_level_bpe()
    corpus, held_out = hold_out(open_corpus([str(texts)]), tokenizer, 64, CONTEXT)
    measured_on = [held_out[index]["input_ids"].tolist() for index in range(len(held_out))]
    assert list(chain.from_iterable(measured_on)) == tokens_of([texts / "0.jsonl"], tokenizer)[:64]
    trained_on = windows_of(recipe, tmp_path / "run", corpus=corpus)
    first, rest = (texts / "0.jsonl").read_text().split("\n", 1)
    assert len(tokenizer(first).input_ids) > 64
    (texts / "0.jsonl").write_text(rest)
    assert trained_on == windows_of(recipe, tmp_path / "without")


@pytest.mark.slow
def test_processes_of_a_node_share_the_shards_of_the_first(texts: Path, tmp_path: Path) -> None:
    recipe = streaming(texts, steps=20)
    whole = windows_of(recipe, tmp_path / "alone")
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    (tmp_path / "run").mkdir()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _RANK, str(tmp_path / "recipe.yaml"), str(tmp_path / "run")],
            env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    shares = [json.loads(rank.communicate(timeout=120)[0]) for rank in ranks]
    assert shares == [whole[0::2], whole[1::2]]


_RANK = """
import json, os, sys, time
from pathlib import Path
from bitconvert.recipe import load_recipe
from bitconvert.training.corpus import open_corpus
from bitconvert.training.streaming import streamed_windows
from tests.models import byte_level_bpe
rank, run = int(os.environ["RANK"]), Path(sys.argv[2])
recipe = load_recipe(sys.argv[1])
with streamed_windows(open_corpus(recipe.data.sources), byte_level_bpe(), recipe, run) as order:
    print(json.dumps([order[index]["input_ids"].tolist() for index in range(rank, len(order), 2)]))
    (run / f"done-{rank}").touch()
    while not (run / "done-1").exists():  # as ranks of a training wait for each other
        time.sleep(0.01)
"""


# ---- the hub ----


def test_a_hub_dataset_is_read_file_by_file(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    files = [str(file) for file in sorted(texts.iterdir())]
    load = datasets.load_dataset

    def load_offline(name: str, split: str, streaming: bool) -> datasets.IterableDataset:
        assert (name, split, streaming) == ("owner/texts", "train", True)
        return load("json", data_files=files, split=split, streaming=streaming)

    local = windows_of(streaming(texts, steps=150), tmp_path / "local")
    monkeypatch.setattr(datasets, "load_dataset", load_offline)
    recipe = streaming(Path("owner/texts"), steps=150)
    assert windows_of(recipe, tmp_path / "hub") == local
    assert windows_of(recipe, tmp_path / "hub", range(390, 400)) == local[390:400]


def test_a_hub_dataset_that_breaks_off_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def rows() -> Iterator[dict[str, str]]:
        yield {"text": "one fox"}
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.IterableDataset.from_generator(rows))
    with pytest.raises(BitconvertError, match=r"owner/texts: cannot be read further \(.*no route to host"):
        windows_of(streaming(Path("owner/texts")), tmp_path / "run")


# ---- what goes wrong ----


def test_a_damaged_document_is_named(texts: Path, tmp_path: Path) -> None:
    with (texts / "2.jsonl").open("a") as file:
        file.write("broken\n")
    with pytest.raises(BitconvertError, match=r"2\.jsonl, line 9: not JSON"):
        windows_of(streaming(texts, steps=400), tmp_path / "run")


def test_a_killed_process_is_told(texts: Path, tmp_path: Path) -> None:
    recipe = streaming(texts, steps=400)
    (tmp_path / "run").mkdir()
    with (
        pytest.raises(BitconvertError, match="a process that tokenizes text ended unexpectedly"),
        streamed_windows(open_corpus(recipe.data.sources), byte_level_bpe(), recipe, tmp_path / "run") as order,
    ):
        _ = order[0]
        for process in psutil.Process().children():
            if "spawn_main" in " ".join(process.cmdline()):
                process.kill()
        for index in range(len(order)):
            _ = order[index]
    assert [path for path in cache_directory().rglob("*") if path.is_file()] == []


def test_another_text_is_not_gone_on_with(texts: Path, tmp_path: Path) -> None:
    windows_of(streaming(texts), tmp_path / "run", range(1))
    with (texts / "2.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(BitconvertError, match="places.jsonl: the text, or its tokenizer, has changed"):
        windows_of(streaming(texts), tmp_path / "run", range(1))


def test_one_document_cannot_be_trained_and_measured_on(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text(0, 3000))
    corpus, _ = hold_out(open_corpus([str(tmp_path / "a.txt")]), byte_level_bpe(), 64, CONTEXT)
    recipe = streaming(tmp_path / "a.txt")
    (tmp_path / "run").mkdir()
    with (
        pytest.raises(BitconvertError, match=r"a\.txt: no text is left to train on beside the held-out documents"),
        streamed_windows(corpus, byte_level_bpe(), recipe, tmp_path / "run") as order,
    ):
        _ = order[0]


@pytest.mark.parametrize("override", ["distill.cache=true", "data.shard_tokens=15", "data.shards=1"])
def test_options_that_do_not_go_with_it(override: str) -> None:
    with pytest.raises(UsageError, match=override.partition("=")[0]):
        streaming(Path("texts"), 10, 1, override)


def test_there_must_be_a_text(smollm: Path, tmp_path: Path) -> None:
    recipe = load_recipe(None, ["data.streaming=true", "training.context=32"])
    with pytest.raises(UsageError, match=r"data\.streaming: there is no text to stream"):
        warmup(str(smollm), tmp_path / "out", recipe, reporter=Silent())


# ---- a training ----

_RUN = """
import os, signal, sys
from pathlib import Path
import torch
from bitconvert.recipe import load_recipe
from bitconvert.report.reporter import Silent
from bitconvert.training.warmup import warmup
if __name__ == "__main__":
    torch.set_num_threads(1)
    class Fatal(Silent):
        def metrics(self, values):
            if "loss" in values and values["step"] == 6:
                os.kill(os.getpid(), signal.SIGKILL)
    warmup(sys.argv[1], Path(sys.argv[2]), load_recipe(sys.argv[3]), reporter=Fatal())
"""


_MARK = f"BITCONVERT_TEST_{os.getpid()}"


def marked() -> list[psutil.Process]:
    """Processes that still run of those that were started with the mark in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if _MARK in process.environ() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_kill_9_and_resume_give_the_same_weights_bit_for_bit(smollm: Path, texts: Path, tmp_path: Path) -> None:
    recipe = streaming(texts, steps=12)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    (tmp_path / "run.py").write_text(_RUN)
    warmup(str(smollm), tmp_path / "whole", recipe, reporter=Silent())
    arguments = [str(tmp_path / "run.py"), str(smollm), str(tmp_path / "out"), str(tmp_path / "recipe.yaml")]
    killed = subprocess.Popen(
        [sys.executable, *arguments], env={**os.environ, "PYTHONPATH": str(Path.cwd()), _MARK: "1"}
    )
    assert killed.wait(timeout=120) == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while marked() and time.monotonic() < deadline:  # the processes that tokenize end with theirs
        time.sleep(0.05)
    assert not marked()
    assert (partial_directory(tmp_path / "out") / PLACES).exists()
    warmup(str(smollm), tmp_path / "out", recipe, resume=True, reporter=Silent())
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out"))
    assert hashlib.sha256(one).digest() == hashlib.sha256(other).digest()
    assert [path for path in (cache_directory() / "streams").rglob("*") if path.is_file()] == []
