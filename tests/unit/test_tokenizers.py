"""Each pre-tokenizer of the table against a real llama.cpp, and tokenizers from disk."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bitconvert.errors import BitconvertError
from bitconvert.evaluation.runtimes import open_runtime
from bitconvert.models.pre_tokenizers import (
    KNOWN_PRE_TOKENIZERS,
    PRE_TOKENIZERS,
    pre_tokenizer_of,
    restore_pre_tokenizer,
)
from bitconvert.models.tokenizers import backend_json, load_tokenizer, vocabulary_model
from bitconvert.packing.gguf.vocabulary import Vocabulary, vocabulary_of
from tests.models import NASTY, byte_level_bpe, cutting_bpe, digits_and_bytes, llama3_pre_tokenizer, sentencepiece_bpe

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _random_texts(count: int) -> list[str]:
    """Strings of characters that sit next to each other nowhere else."""
    source = random.Random(1)
    characters = sorted({character for text in NASTY for character in text})
    frequent = list(" \n\t'\"sStTrReEvVmMlLdD019.,;/!_-ÀéλЖ中かé\u0301\u200d\r😀")
    return ["".join(source.choices(source.choice((characters, frequent)), k=30)) for _ in range(count)]


def _write_vocabulary(vocabulary: Vocabulary, path: Path) -> None:
    """The smallest model that llama.cpp loads: one block of zeros."""
    width, writer = 32, gguf.GGUFWriter(path, "llama")
    vocabulary.add_to(writer)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(width)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tensor("token_embd.weight", np.zeros((len(vocabulary.tokens), width), np.float32))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.zeros(width, np.float32))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros((width, width), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _llama_cpp_ids(vocabulary: Vocabulary, path: Path, texts: list[str]) -> list[list[int]]:
    _write_vocabulary(vocabulary, path)
    with open_runtime(path, 32, threads=1) as runtime:
        return [runtime.tokenize(text) if text else [] for text in texts]


def _ids(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def _cut_as(pre: str) -> PreTrainedTokenizerFast:
    row = KNOWN_PRE_TOKENIZERS[pre]
    tokenizer = cutting_bpe(None, ignore_merges=row.ignore_merges)
    tokenizer._tokenizer = restore_pre_tokenizer(tokenizer.backend_tokenizer, pre)
    return tokenizer


@pytest.mark.parametrize("pre", sorted({row.name for row in PRE_TOKENIZERS}))
def test_llama_cpp_cuts_as_the_table_says(pre: str, tmp_path: Path) -> None:
    tokenizer = _cut_as(pre)
    texts = [*NASTY, *_random_texts(400)]
    vocabulary = vocabulary_of(tokenizer, len(tokenizer), {})
    assert vocabulary.pre == pre
    assert _llama_cpp_ids(vocabulary, tmp_path / "v.gguf", texts) == _ids(tokenizer, texts)


@pytest.mark.slow
@pytest.mark.parametrize("alias", sorted(set(KNOWN_PRE_TOKENIZERS) - {row.name for row in PRE_TOKENIZERS}))
def test_llama_cpp_treats_the_aliases_alike(alias: str, tmp_path: Path) -> None:
    tokenizer = _cut_as(alias)
    texts = [*NASTY, *_random_texts(100)]
    vocabulary = dataclasses.replace(vocabulary_of(tokenizer, len(tokenizer), {}), pre=alias)
    assert _llama_cpp_ids(vocabulary, tmp_path / "v.gguf", texts) == _ids(tokenizer, texts)


def test_the_proof_notices_a_wrong_pre_tokenizer(tmp_path: Path) -> None:
    tokenizer = _cut_as("smollm")
    wrong = dataclasses.replace(vocabulary_of(tokenizer, len(tokenizer), {}), pre="gpt-2")
    assert _llama_cpp_ids(wrong, tmp_path / "v.gguf", list(NASTY)) != _ids(tokenizer, list(NASTY))


@pytest.mark.parametrize("form", ["normalizer", "none"])
def test_sentencepiece_vocabulary_gives_llama_cpps_ids(form: str, tmp_path: Path) -> None:
    tokenizer = sentencepiece_bpe(form)
    texts = [*NASTY, *_random_texts(400)]
    vocabulary = vocabulary_of(tokenizer, len(tokenizer), {})
    assert _llama_cpp_ids(vocabulary, tmp_path / "v.gguf", texts) == _ids(tokenizer, texts)


def test_metaspace_differs_only_where_a_text_starts_with_a_space(tmp_path: Path) -> None:
    tokenizer = sentencepiece_bpe("metaspace")
    vocabulary = vocabulary_of(tokenizer, len(tokenizer), {})
    texts = [text for text in (*NASTY, *_random_texts(200)) if not text.startswith(" ")]
    assert _llama_cpp_ids(vocabulary, tmp_path / "v.gguf", texts) == _ids(tokenizer, texts)


@pytest.mark.parametrize(
    ("pre_tokenizer", "ignore_merges", "expected"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), False, "gpt-2"),
        (pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=False)]), False, "gpt-2"),
        (digits_and_bytes(), False, "smollm"),
        (llama3_pre_tokenizer(), True, "llama-bpe"),
        (llama3_pre_tokenizer(), False, "dbrx"),
        (
            pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(_CL100K), behavior="removed", invert=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            ),
            True,
            "llama-bpe",
        ),
    ],
)
def test_pre_is_read_from_the_structure(pre_tokenizer: Any, ignore_merges: bool, expected: str) -> None:
    assert pre_tokenizer_of(backend_json(cutting_bpe(pre_tokenizer, ignore_merges=ignore_merges))) == expected


def test_spellings_of_one_expression_give_the_same_ids() -> None:
    def cut_by(regex: str) -> list[list[int]]:
        splitter = pre_tokenizers.Split(Regex(regex), behavior="isolated")
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return _ids(cutting_bpe(pre_tokenizers.Sequence([splitter, bytes_only])), [*NASTY, *_random_texts(400)])

    assert cut_by(_CL100K) == cut_by(_LLAMA3)


def test_ignore_merges_is_forgiven_where_it_changes_nothing() -> None:
    document = backend_json(byte_level_bpe())
    document["model"]["ignore_merges"] = True
    assert pre_tokenizer_of(document) == "gpt-2"  # merges reach every word of a freshly trained vocabulary
    document["model"]["vocab"]["unreachable"] = 5000
    with pytest.raises(BitconvertError, match="ignore_merges"):
        pre_tokenizer_of(document)


@pytest.mark.parametrize(
    ("pre_tokenizer", "named"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=True), "add_prefix_space"),
        (
            pre_tokenizers.Sequence(
                [pre_tokenizers.Split(Regex(r"\p{L}+"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            ),
            r"\\p\{L\}",
        ),
    ],
)
def test_unknown_structure_is_refused_by_name(pre_tokenizer: Any, named: str) -> None:
    with pytest.raises(BitconvertError, match=named) as caught:
        pre_tokenizer_of(backend_json(byte_level_bpe(pre_tokenizer)))
    assert "llama-bpe" in caught.value.hint


def test_normalizers_that_llama_cpp_lacks_are_refused() -> None:
    tokenizer = byte_level_bpe()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    assert pre_tokenizer_of(backend_json(tokenizer)) == "gpt-2"
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(BitconvertError, match="Lowercase"):
        pre_tokenizer_of(backend_json(tokenizer))


def test_other_vocabularies_are_refused_by_name() -> None:
    document = json.loads(Tokenizer(models.Unigram([("a", 0.0)], 0)).to_str())
    with pytest.raises(BitconvertError, match="Unigram"):
        vocabulary_model(document)


def test_unknown_pre_name_is_refused() -> None:
    with pytest.raises(BitconvertError, match="'tekken'"):
        restore_pre_tokenizer(byte_level_bpe().backend_tokenizer, "tekken")


def test_tokenizer_json_is_taken_as_it_stands(tmp_path: Path) -> None:
    original = sentencepiece_bpe()
    original.save_pretrained(tmp_path)
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"tokenizer_class": "LlamaTokenizer"}))
    assert _ids(load_tokenizer(tmp_path), list(NASTY)) == _ids(original, list(NASTY))


@pytest.mark.parametrize("content", [None, "{", '{"version": "1.0"}'])
def test_missing_or_broken_tokenizer_is_one_clear_error(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(BitconvertError, match="tokenizer"):
        load_tokenizer(tmp_path)


def test_tokenizer_model_gives_sentencepieces_own_ids(tmp_path: Path) -> None:
    pytest.importorskip("google.protobuf")  # transformers reads tokenizer.model through it
    sentencepiece = pytest.importorskip("sentencepiece")
    lines = [line for text in NASTY for line in text.split("\n") if line.strip()] * 3
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=800,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=0.99,
        minloglevel=2,
    )
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    original = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer, texts = load_tokenizer(tmp_path), [*NASTY, *_random_texts(200)]
    assert _ids(tokenizer, texts) == [original.encode(text) for text in texts]
    vocabulary = vocabulary_of(tokenizer, len(tokenizer), {})
    assert _llama_cpp_ids(vocabulary, tmp_path / "v.gguf", texts) == _ids(tokenizer, texts)
