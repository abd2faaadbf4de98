"""Token blocks: complete, cached by content, in an order that depends on nothing but the seed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from bitconvert.errors import BitconvertError
from bitconvert.models.checkpoint import open_checkpoint
from bitconvert.recipe import Data
from bitconvert.report.reporter import Silent
from bitconvert.training.data import (
    ShuffledWindows,
    Tokens,
    Windows,
    cache_directory,
    sample_tokens,
    split_held_out,
    tokenize,
)
from tests.models import byte_level_bpe, sentencepiece_bpe
from tests.recording import Recorder


def stream(count: int) -> Tokens:
    return Tokens(np.arange(count, dtype=np.uint16), "key", "a text")


def test_documents_end_with_the_end_of_text(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("one fox", "two dogs")))
    tokenizer = byte_level_bpe()
    tokens = tokenize([str(file)], tokenizer, Silent())
    assert tokenizer.decode(tokens.ids.tolist()) == "one fox<|end|>two dogs<|end|>"


def test_bos_comes_first_where_the_tokenizer_puts_it(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one fox")
    tokenizer = sentencepiece_bpe()
    ids = tokenize([str(tmp_path)], tokenizer, Silent()).ids.tolist()
    assert ids == [*tokenizer("one fox").input_ids, tokenizer.eos_token_id]
    assert ids[0] == tokenizer.bos_token_id


def test_the_same_bytes_read_in_another_way_are_another_text(tmp_path: Path) -> None:
    line = json.dumps({"text": "one fox"}) + "\n"
    (tmp_path / "a.txt").write_text(line)
    (tmp_path / "a.jsonl").write_text(line)
    tokenizer = byte_level_bpe()
    plain, record = (tokenize([str(tmp_path / name)], tokenizer, Silent()) for name in ("a.txt", "a.jsonl"))
    assert tokenizer.decode(plain.ids.tolist()).startswith('{"text"')
    assert tokenizer.decode(record.ids.tolist()) == "one fox<|end|>"


def test_truncation_and_padding_saved_with_a_tokenizer_are_not_obeyed(smollm: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(smollm, tmp_path / "model")
    fine_tuned = open_checkpoint(str(directory)).tokenizer()
    fine_tuned.backend_tokenizer.enable_truncation(4)
    fine_tuned.backend_tokenizer.enable_padding(length=50)
    fine_tuned.backend_tokenizer.save(str(directory / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("The quick brown fox jumps over the lazy dog")
    counts = [
        len(tokenize([str(tmp_path / "a.txt")], open_checkpoint(str(m)).tokenizer(), Silent()))
        for m in (smollm, directory)
    ]
    assert counts[0] == counts[1] > 5


def test_a_text_is_tokenized_once(tmp_path: Path) -> None:
    first, moved, changed = tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "c.txt"
    first.write_text("The quick brown fox")
    moved.write_text("The quick brown fox")
    changed.write_text("The quick brown dog")
    told = Recorder()
    keys = [tokenize([str(file)], byte_level_bpe(), told).key for file in (first, moved, changed)]
    assert keys[0] == keys[1] != keys[2]
    assert told.stages == [f"tokenizing {first}", f"tokenizing {changed}"]
    assert tokenize([str(first)], sentencepiece_bpe(), told).key != keys[0]


def test_large_vocabularies_get_wide_ids(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("fox")
    tokenizer = byte_level_bpe()
    tokenizer.add_tokens([f"<{i}>" for i in range(70_000)])
    (tmp_path / "a.txt").write_text("fox <69999>")
    ids = tokenize([str(tmp_path / "a.txt")], tokenizer, Silent()).ids
    assert ids.dtype == np.uint32
    assert ids.max() > 2**16


def test_a_half_written_cache_is_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITCONVERT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text("The quick brown fox")

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(np, "asarray", stop)
        tokenize([str(tmp_path / "a.txt")], byte_level_bpe(), Silent())
    assert list(cache_directory().glob("**/*")) == []
    assert len(tokenize([str(tmp_path / "a.txt")], byte_level_bpe(), Silent())) > 0


def test_every_window_once_before_any_twice() -> None:
    windows = Windows(np.arange(100, dtype=np.uint16), 10)
    order = ShuffledWindows(windows, 25, seed=3)
    starts = [int(order[i]["input_ids"][0]) for i in range(25)]
    assert sorted(starts[:10]) == sorted(starts[10:20]) == list(range(0, 100, 10))
    assert starts[:10] != starts[10:20]
    assert [int(order[i]["input_ids"][0]) for i in reversed(range(25))] == starts[::-1]
    assert [int(ShuffledWindows(windows, 25, seed=4)[i]["input_ids"][0]) for i in range(25)] != starts


def test_held_out_text_is_the_end_and_is_not_trained_on() -> None:
    training, held_out = split_held_out(stream(1000), 80, 16)
    assert len(held_out) == 5
    assert int(held_out[0]["input_ids"][0]) == 920
    assert max(int(training[i]["input_ids"].max()) for i in range(len(training))) < 920


def test_held_out_text_is_a_tenth_at_most() -> None:
    training, held_out = split_held_out(stream(1000), 10_000, 16)
    assert (len(training), len(held_out)) == ((1000 - 96) // 16, 6)


def test_too_little_text_is_an_error() -> None:
    with pytest.raises(BitconvertError, match="a text: 20 tokens are too few for windows of 16"):
        split_held_out(stream(20), 16, 16)


def test_an_unknown_source_is_an_error() -> None:
    with pytest.raises(BitconvertError, match="no-such.txt"):
        tokenize(["no-such.txt", "another.txt"], byte_level_bpe(), Silent())
    with pytest.raises(BitconvertError, match="nobody/nothing: neither a local text nor a dataset"):
        tokenize(["nobody/nothing"], byte_level_bpe(), Silent())


def test_a_hub_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(name: str, split: str) -> datasets.Dataset:
        assert (name, split) == ("owner/texts", "train")
        return datasets.Dataset.from_dict({"text": ["one fox", "two dogs"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    tokenizer = byte_level_bpe()
    ids = tokenize(["owner/texts"], tokenizer, Silent()).ids
    assert tokenizer.decode(ids.tolist()) == "one fox<|end|>two dogs<|end|>"


def test_sampled_text_comes_from_the_model_and_is_kept(smollm: Path) -> None:
    checkpoint = open_checkpoint(str(smollm))
    model, tokenizer, told = checkpoint.load_latent(), checkpoint.tokenizer(), Recorder()
    options = Data(sampled_tokens=300)
    first = sample_tokens(model, tokenizer, options, 32, 0, told)
    again = sample_tokens(model, tokenizer, options, 32, 0, told)
    other = sample_tokens(model, tokenizer, options, 32, 1, told)
    assert len(first) == 320
    assert (first.ids[::32] == tokenizer.bos_token_id).all()
    assert np.array_equal(first.ids, again.ids)
    assert not np.array_equal(first.ids, other.ids)
    assert len(told.stages) == 2
