"""Each pre-tokenizer of the table against a real llama.cpp, and tokenizers from disk."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import importlib
import itertools
import json
import operator
import random
import shutil
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from bitconvert.errors import BitconvertError
from bitconvert.evaluation.runtimes import open_runtime
from bitconvert.models.gguf_tokenizer import load_gguf_tokenizer
from bitconvert.models.pre_tokenizers import (
    KNOWN_PRE_TOKENIZERS,
    PRE_TOKENIZERS,
    PreTokenizer,
    pre_tokenizer_of,
    restore_pre_tokenizer,
)
from bitconvert.models.tokenizers import backend_json, load_tokenizer, tokenizer_damage, vocabulary_model
from bitconvert.packing.gguf.vocabulary import Vocabulary, vocabulary_of
from tests.models import (
    LONG_RUNS,
    NASTY,
    SPACE,
    byte_level_bpe,
    cutting_bpe,
    digits_and_bytes,
    falcon3_bpe,
    gemma_bpe,
    llama3_pre_tokenizer,
    neox_bpe,
    phi3_bpe,
    sentencepiece_bpe,
    texts_with,
)

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
    writer.add_name(vocabulary.model_name("tiny"))
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


def _llama_cpp_ids(
    vocabulary: Vocabulary, path: Path, texts: list[str], *, parse_special: bool = False
) -> list[list[int]]:
    _write_vocabulary(vocabulary, path)
    with open_runtime(path, 32, threads=1) as runtime:
        return [runtime.tokenize(text, parse_special=parse_special) if text else [] for text in texts]


def _ids(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def _cut_as(row: PreTokenizer) -> PreTrainedTokenizerFast:
    if row.single_digits:
        return falcon3_bpe()
    tokenizer = cutting_bpe(None, ignore_merges=row.ignore_merges)
    tokenizer._tokenizer = restore_pre_tokenizer(tokenizer.backend_tokenizer, row.name)
    return tokenizer


def _mixes_marks_or_capitals(text: str) -> bool:
    """What the caveat of tekken and gpt-4o says."""
    categories = [unicodedata.category(character) for character in text]
    capitals_after_small = any(
        left in ("Ll", "Lm", "Lo") and right in ("Lu", "Lt") and not text[i : i + 2].isascii()
        for i, (left, right) in enumerate(itertools.pairwise(categories))
    )
    return capitals_after_small or any(category[0] == "M" for category in categories)


def _has_wide_spaces(text: str) -> bool:
    """What the caveat of deepseek-coder says."""
    return any(character.isspace() and not character.isascii() for character in text)


CAVEATS: dict[str, tuple[Callable[[str], bool], tuple[str, ...]]] = {  # the class of texts, and some that do differ
    "tekken": (_mixes_marks_or_capitals, ("Ελληνικά हिन्दी", "combining e\u0301", "CAPSAndLowerÉÀéà end")),
    "gpt-4o": (_mixes_marks_or_capitals, ("Ελληνικά हिन्दी", "combining e\u0301", "CAPSAndLowerÉÀéà end")),
    "deepseek-coder": (_has_wide_spaces, ("nbsp\u00a0ideographic\u3000line\u2028para",)),
}


def test_every_caveat_is_proved() -> None:
    assert set(CAVEATS) == {row.name for row in PRE_TOKENIZERS if row.caveat}


@pytest.mark.parametrize("row", PRE_TOKENIZERS, ids=lambda row: f"{row.name}-{PRE_TOKENIZERS.index(row)}")
def test_llama_cpp_cuts_as_the_table_says(row: PreTokenizer, tmp_path: Path) -> None:
    tokenizer = _cut_as(row)
    in_class, differing = CAVEATS.get(row.name, (lambda text: False, ()))
    alike = [text for text in (*NASTY, *LONG_RUNS, *_random_texts(400)) if not in_class(text)]
    vocabulary = vocabulary_of(tokenizer, len(tokenizer), {})
    assert KNOWN_PRE_TOKENIZERS[vocabulary.pre].steps == KNOWN_PRE_TOKENIZERS[row.name].steps
    assert vocabulary.caveats == ((row.caveat,) if row.caveat else ())
    vocabulary = dataclasses.replace(vocabulary, pre=row.name)
    ids = _llama_cpp_ids(vocabulary, tmp_path / "v.gguf", [*alike, *differing])
    assert ids[: len(alike)] == _ids(tokenizer, alike)
    for text, theirs in zip(differing, ids[len(alike) :], strict=True):
        assert in_class(text)
        assert theirs != tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "alias", sorted(set(KNOWN_PRE_TOKENIZERS) - {row.name for row in PRE_TOKENIZERS} - {"falcon_e"})
)  # falcon_e is known to bitnet.cpp alone
def test_llama_cpp_treats_the_aliases_alike(alias: str, tmp_path: Path) -> None:
    row = KNOWN_PRE_TOKENIZERS[alias]
    tokenizer = _cut_as(row)
    in_class, _ = CAVEATS.get(row.name, (lambda text: False, ()))
    texts = [text for text in (*NASTY, *_random_texts(100)) if not in_class(text)]
    vocabulary = dataclasses.replace(vocabulary_of(tokenizer, len(tokenizer), {}), pre=alias)
    assert _llama_cpp_ids(vocabulary, tmp_path / "v.gguf", texts) == _ids(tokenizer, texts)


def test_the_proof_notices_a_wrong_pre_tokenizer(tmp_path: Path) -> None:
    tokenizer = _cut_as(KNOWN_PRE_TOKENIZERS["smollm"])
    wrong = dataclasses.replace(vocabulary_of(tokenizer, len(tokenizer), {}), pre="gpt-2")
    assert _llama_cpp_ids(wrong, tmp_path / "v.gguf", list(NASTY)) != _ids(tokenizer, list(NASTY))


def _with_added_spaces(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer.add_tokens([AddedToken(SPACE * 3, normalized=True)])  # compared with text whose spaces are replaced
    return tokenizer


STRUCTURES: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "llama2": sentencepiece_bpe,
    "no prefix": lambda: sentencepiece_bpe("none"),
    "added spaces": lambda: _with_added_spaces(sentencepiece_bpe("none")),
    "gemma": gemma_bpe,
    "gemma3": lambda: gemma_bpe(own_tab=True),
    "phi3": phi3_bpe,
    "neox": neox_bpe,
    "falcon3": falcon3_bpe,
    "llama3": lambda: cutting_bpe(llama3_pre_tokenizer(), ignore_merges=True),
    "smollm": lambda: byte_level_bpe(digits_and_bytes()),
}
"""Whole tokenizers, built as published ones are."""


def _texts_with_added(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    return texts_with(token for token in added if SPACE not in token)  # those stand for spaces, not for themselves


def _alike(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[str]:
    """The texts for which the tokenizer makes no exception: all of them, or those in NFC."""
    normalizes = type(tokenizer.backend_tokenizer.normalizer) is normalizers.NFC
    return [text for text in texts if not normalizes or unicodedata.is_normalized("NFC", text)]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_llama_cpp_gives_the_same_ids(structure: str, tmp_path: Path) -> None:
    tokenizer = STRUCTURES[structure]()
    vocabulary = vocabulary_of(tokenizer, len(tokenizer) + 5, {})
    plain, special = _alike(tokenizer, [*NASTY, *LONG_RUNS, *_random_texts(400)]), _texts_with_added(tokenizer)
    assert _llama_cpp_ids(vocabulary, tmp_path / "v.gguf", plain) == _ids(tokenizer, plain)
    parsed = _llama_cpp_ids(vocabulary, tmp_path / "v.gguf", special, parse_special=True)
    assert parsed == _ids(tokenizer, special)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_way_back_gives_the_same_tokenizer(structure: str, tmp_path: Path) -> None:
    tokenizer = STRUCTURES[structure]()
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    _write_vocabulary(vocabulary_of(tokenizer, len(tokenizer) + 5, {}), tmp_path / "v.gguf")
    restored = load_gguf_tokenizer(tmp_path / "v.gguf")
    texts = _alike(tokenizer, [*NASTY, *LONG_RUNS, *_random_texts(100), *_texts_with_added(tokenizer)])
    assert _ids(restored, texts) == _ids(tokenizer, texts)
    assert restored.chat_template == tokenizer.chat_template
    for role in ("bos_token", "eos_token", "unk_token", "pad_token"):
        assert getattr(tokenizer, role) in (None, getattr(restored, role))
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    assert special == {str(token) for token in restored.added_tokens_decoder.values() if token.special}


def test_text_that_is_not_composed_differs_as_the_warning_says(tmp_path: Path) -> None:
    tokenizer, text = neox_bpe(), ["combining e\u0301"]
    vocabulary = vocabulary_of(tokenizer, len(tokenizer), {})
    assert "NFC" in " ".join(vocabulary.caveats)
    assert _llama_cpp_ids(vocabulary, tmp_path / "v.gguf", text) != _ids(tokenizer, text)


def test_metaspace_differs_only_as_the_warning_says(tmp_path: Path) -> None:
    tokenizer = sentencepiece_bpe("metaspace")
    vocabulary = vocabulary_of(tokenizer, len(tokenizer), {})
    assert "begins with a space, and all text right after a special token" in " ".join(vocabulary.caveats)
    texts = [text for text in (*NASTY, *_random_texts(200)) if not text.startswith(" ")]
    assert _llama_cpp_ids(vocabulary, tmp_path / "v.gguf", texts) == _ids(tokenizer, texts)
    differing = [" a", "<s>a"]
    theirs = _llama_cpp_ids(vocabulary, tmp_path / "v.gguf", differing, parse_special=True)
    assert all(ids != other for ids, other in zip(theirs, _ids(tokenizer, differing), strict=True))


@pytest.mark.parametrize(("name", "stored"), [("my-model", "my-model (phi-3)"), ("Phi-3-mini", "Phi-3-mini")])
def test_llama_cpp_reads_phi3s_white_space_from_the_models_name(name: str, stored: str) -> None:
    tokenizer = phi3_bpe()
    assert vocabulary_of(tokenizer, len(tokenizer), {}).model_name(name) == stored
    assert vocabulary_of(tokenizer, len(tokenizer), {}).caveats == ()


def test_a_name_like_phi3s_does_no_harm_to_other_vocabularies() -> None:
    """With "phi-3" in the name llama.cpp strips white space, and aborts when there is no </s>."""
    tokenizer = byte_level_bpe()
    assert vocabulary_of(tokenizer, len(tokenizer), {}).model_name("tiny-Phi-3-phi3") == "tiny-phi 3-phi 3"


def test_falcon3_needs_a_vocabulary_without_joined_digits() -> None:
    assert pre_tokenizer_of(backend_json(falcon3_bpe())).name == "falcon"
    with pytest.raises(BitconvertError, match="12"):
        pre_tokenizer_of(backend_json(falcon3_bpe(["12"])))


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
    assert pre_tokenizer_of(backend_json(cutting_bpe(pre_tokenizer, ignore_merges=ignore_merges))).name == expected


_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}"
    r"\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"


@pytest.mark.parametrize(
    ("regex", "ignore_merges", "expected"),
    [(_TEKKEN, True, "tekken"), (_O200K, False, "gpt-4o"), (_QWEN35, False, "qwen35"), (_BAILING, False, "qwen2")],
)
def test_published_expressions_find_their_row(regex: str, ignore_merges: bool, expected: str) -> None:
    steps = [
        pre_tokenizers.Split(Regex(regex), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    document = backend_json(cutting_bpe(pre_tokenizers.Sequence(steps), ignore_merges=ignore_merges))
    assert pre_tokenizer_of(document).name == expected


def test_spellings_of_one_expression_give_the_same_ids() -> None:
    def cut_by(regex: str) -> list[list[int]]:
        splitter = pre_tokenizers.Split(Regex(regex), behavior="isolated")
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return _ids(cutting_bpe(pre_tokenizers.Sequence([splitter, bytes_only])), [*NASTY, *_random_texts(400)])

    assert cut_by(_CL100K) == cut_by(_LLAMA3)
    assert cut_by(_LLAMA3.replace(r"[\r\n]+|\s", r"[\r\n]|\s")) == cut_by(_LLAMA3)


def test_ignore_merges_is_forgiven_where_it_changes_nothing() -> None:
    document = backend_json(byte_level_bpe())
    document["model"]["ignore_merges"] = True
    assert pre_tokenizer_of(document).name == "gpt-2"  # merges reach every word of a freshly trained vocabulary
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
    assert pre_tokenizer_of(backend_json(tokenizer)).name == "gpt-2"
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(BitconvertError, match="Lowercase"):
        pre_tokenizer_of(backend_json(tokenizer))


def test_other_vocabularies_are_refused_by_name() -> None:
    document = json.loads(Tokenizer(models.Unigram([("a", 0.0)], 0)).to_str())
    with pytest.raises(BitconvertError, match="Unigram"):
        vocabulary_model(document)


def test_unknown_pre_name_is_refused() -> None:
    with pytest.raises(BitconvertError, match="'viking'"):
        restore_pre_tokenizer(byte_level_bpe().backend_tokenizer, "viking")


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


def _train_sentencepiece(directory: Path, **options: Any) -> None:
    """Leave a ``tokenizer.model`` of SentencePiece's own trainer in a directory."""
    sentencepiece = pytest.importorskip("sentencepiece")
    lines = [line for text in NASTY for line in text.split("\n") if line.strip()] * 3
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(directory / "tokenizer"),
        model_type="bpe",
        vocab_size=800,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=0.99,
        minloglevel=2,
        **options,
    )


def test_tokenizer_model_gives_sentencepieces_own_ids(tmp_path: Path) -> None:
    pytest.importorskip("google.protobuf")  # transformers reads tokenizer.model through it
    sentencepiece = pytest.importorskip("sentencepiece")
    _train_sentencepiece(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    original = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer, texts = load_tokenizer(tmp_path), [*NASTY, *_random_texts(200)]
    assert _ids(tokenizer, texts) == [original.encode(text) for text in texts]
    vocabulary = vocabulary_of(tokenizer, len(tokenizer), {})
    assert _llama_cpp_ids(vocabulary, tmp_path / "v.gguf", texts) == _ids(tokenizer, texts)


def test_a_file_of_llama_cpps_own_converter_comes_back(tmp_path: Path) -> None:
    """The gguf package reads tokenizer.model the way the converter does: SentencePiece's own scores and types."""
    _train_sentencepiece(tmp_path, user_defined_symbols=["<tool>", "\n\n"], control_symbols=["[INST]"])
    pieces = [(text.decode(), score, kind) for text, score, kind in gguf.SentencePieceVocab(tmp_path).all_tokens()]
    theirs = dataclasses.replace(
        vocabulary_of(sentencepiece_bpe(), 1000, {}),
        tokens=[text for text, _, _ in pieces],
        scores=[score for _, score, _ in pieces],
        types=[gguf.TokenType.USER_DEFINED if text in ("<tool>", "\n\n") else kind for text, _, kind in pieces],
    )
    texts = [*NASTY, *LONG_RUNS, *_random_texts(200), *texts_with(["<tool>", "\n\n", "[INST]", "<s>"])]
    ids = _llama_cpp_ids(theirs, tmp_path / "v.gguf", texts, parse_special=True)
    assert ids == _ids(load_gguf_tokenizer(tmp_path / "v.gguf"), texts)


def _spots(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path to every value of a document, but for most of a vocabulary."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [spot for key in keys[:30] for spot in ((*path, key), *_spots(value[key], (*path, key)))]


_JUNK = (None, True, -1, 2**40, 1.5, "", SPACE, "<0x09>", [], {}, ["a"], {"type": "Sequence"})


@pytest.mark.parametrize("structure", ["llama2", "gemma", "falcon3"])
def test_damaged_files_are_one_clear_error(structure: str, tmp_path: Path) -> None:
    STRUCTURES[structure]().save_pretrained(tmp_path)
    source = random.Random(structure)
    for name in ["tokenizer.json"] * 40 + ["tokenizer_config.json"] * 10:
        original = (tmp_path / name).read_text(encoding="utf-8")
        document = json.loads(original)
        *parents, last = source.choice(_spots(document))
        place = functools.reduce(operator.getitem, parents, document)
        place[last] = source.choice(_JUNK)
        (tmp_path / name).write_text(json.dumps(document), encoding="utf-8")
        with contextlib.suppress(BitconvertError):
            vocabulary_of(load_tokenizer(tmp_path), 2000, {})
        (tmp_path / name).write_text(original, encoding="utf-8")


def test_even_a_panic_of_the_rust_library_is_an_error() -> None:
    class PanicException(BaseException):
        pass

    with (
        pytest.raises(BitconvertError, match="while reading .PanicException: index"),
        tokenizer_damage("while reading"),
    ):
        raise PanicException("index out of range\nstack backtrace")
    with pytest.raises(KeyboardInterrupt), tokenizer_damage("while reading"):
        raise KeyboardInterrupt


# ---- published vocabularies, where the mistral-common package ships them ------------------------------------------


def _mistral_data() -> Path:
    package = pytest.importorskip("mistral_common")
    return Path(package.__file__).parent / "data"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"])
def test_mistrals_sentencepiece_vocabularies(name: str, tmp_path: Path) -> None:
    shutil.copy(_mistral_data() / name, tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    tokenizer = load_tokenizer(tmp_path)
    _require_the_same_everywhere(tokenizer, [*NASTY, *LONG_RUNS, *_random_texts(1000)], tmp_path)


@pytest.mark.slow
def test_the_published_tekken_vocabulary(tmp_path: Path) -> None:
    path = _mistral_data() / "tekken_240911.json"
    tokenizer = _tekken(json.loads(path.read_text()))
    texts = [*NASTY, *LONG_RUNS, *_random_texts(1000)]
    original = importlib.import_module("mistral_common.tokens.tokenizers.tekken").Tekkenizer.from_file(path)
    assert _ids(tokenizer, texts) == [original.encode(text, bos=False, eos=False) for text in texts]
    _require_the_same_everywhere(tokenizer, [text for text in texts if not _mixes_marks_or_capitals(text)], tmp_path)


def _require_the_same_everywhere(tokenizer: PreTrainedTokenizerFast, texts: list[str], directory: Path) -> None:
    special = texts_with(list(tokenizer.get_added_vocab())[:20])
    vocabulary = vocabulary_of(tokenizer, len(tokenizer), {})
    assert _llama_cpp_ids(vocabulary, directory / "v.gguf", texts) == _ids(tokenizer, texts)
    assert _llama_cpp_ids(vocabulary, directory / "v.gguf", special, parse_special=True) == _ids(tokenizer, special)
    assert _ids(load_gguf_tokenizer(directory / "v.gguf"), [*texts, *special]) == _ids(tokenizer, [*texts, *special])


def _tekken(document: dict[str, Any]) -> PreTrainedTokenizerFast:
    """tekken.json with the structure that Mistral's tokenizer.json files have."""
    config = document["config"]
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    special += [f"<SPECIAL_{index}>" for index in range(len(special), config["default_num_special_tokens"])]
    learned = document["vocab"][: config["default_vocab_size"] - len(special)]
    letters = bytes_to_unicode()
    words = ["".join(letters[byte] for byte in base64.b64decode(entry["token_bytes"])) for entry in learned]
    ids = {word: index for index, word in enumerate([*special, *words])}
    merges = [
        pair
        for word in words
        for pair in sorted(
            ((word[:cut], word[cut:]) for cut in range(1, len(word)) if word[:cut] in ids and word[cut:] in ids),
            key=lambda pair: (ids[pair[0]], ids[pair[1]]),
        )
    ]
    tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(config["pattern"]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
