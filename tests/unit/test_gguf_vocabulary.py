"""The vocabulary that goes into a GGUF file: types, padding, special tokens and what cannot be stored."""

from __future__ import annotations

import json
from typing import Any

import pytest
from gguf import TokenType
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from bitconvert.errors import BitconvertError
from bitconvert.packing.gguf.vocabulary import vocabulary_of
from tests.models import SPACE, byte_level_bpe, gemma_bpe, sentencepiece_bpe, with_bos


def _edited(tokenizer: PreTrainedTokenizerFast, **changes: Any) -> PreTrainedTokenizerFast:
    """The tokenizer with changes in the model section of its tokenizer.json."""
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    document["model"] |= changes
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(document))
    return tokenizer


def test_each_token_has_the_type_llama_cpp_expects() -> None:
    tokenizer = byte_level_bpe()
    vocabulary = vocabulary_of(tokenizer, len(tokenizer) + 3, {})
    types = dict(zip(vocabulary.tokens, vocabulary.types, strict=True))
    assert vocabulary.model == "gpt2"
    assert types["<|end|>"] == types["<|im_start|>"] == TokenType.CONTROL
    assert types["<think>"] == TokenType.USER_DEFINED
    assert types["a"] == TokenType.NORMAL
    assert vocabulary.tokens[-1] == f"[PAD{len(tokenizer) + 2}]"
    assert vocabulary.types[-3:] == [TokenType.UNUSED] * 3
    assert vocabulary.merges[0].count(" ") == 1
    assert vocabulary.scores == []


def test_sentencepiece_types_and_scores() -> None:
    tokenizer = sentencepiece_bpe()
    vocabulary = vocabulary_of(tokenizer, len(tokenizer), {})
    assert (vocabulary.model, vocabulary.pre, vocabulary.merges) == ("llama", "default", [])
    assert vocabulary.types[:4] == [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, TokenType.BYTE]
    merged = [
        score for token, score in zip(vocabulary.tokens[259:], vocabulary.scores[259:], strict=True) if len(token) > 1
    ]
    assert merged == sorted(merged, reverse=True)
    assert len(set(merged)) == len(merged)
    assert (vocabulary.add_bos, vocabulary.add_eos, vocabulary.add_space_prefix) == (True, False, True)
    assert not vocabulary_of(sentencepiece_bpe("none"), len(tokenizer), {}).add_space_prefix


def test_bos_follows_what_the_post_processor_does() -> None:
    tokenizer = byte_level_bpe()
    assert not vocabulary_of(tokenizer, 800, {}).add_bos
    assert vocabulary_of(with_bos(tokenizer), 800, {}).add_bos
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.convert_tokens_to_ids("<|im_start|>"))]
    )
    with pytest.raises(BitconvertError, match="im_start"):
        vocabulary_of(tokenizer, 800, {})


def test_special_ids_come_from_the_tokenizer_then_from_the_config() -> None:
    tokenizer = byte_level_bpe()
    named = vocabulary_of(tokenizer, 800, {"eos_token_id": 7}).special_ids
    assert named["eos"] == tokenizer.eos_token_id
    tokenizer.eos_token = None
    assert vocabulary_of(tokenizer, 800, {"eos_token_id": [7, 8]}).special_ids["eos"] == 7


def test_a_vocabulary_without_eos_gets_one_that_no_text_contains() -> None:
    tokenizer = byte_level_bpe()
    tokenizer.eos_token = None
    eos = vocabulary_of(tokenizer, 800, {}).special_ids["eos"]
    assert tokenizer.convert_ids_to_tokens(eos) == "ÿ"  # the byte 0xFF


def test_chat_templates_go_with_it() -> None:
    tokenizer = byte_level_bpe()
    tokenizer.chat_template = "{{ messages }}"
    assert vocabulary_of(tokenizer, 800, {}).chat_template == {"default": "{{ messages }}"}
    tokenizer.chat_template = {"default": "a", "tool_use": "b"}
    assert vocabulary_of(tokenizer, 800, {}).chat_template == {"default": "a", "tool_use": "b"}


def test_an_embedding_smaller_than_the_vocabulary_is_refused() -> None:
    tokenizer = byte_level_bpe()
    with pytest.raises(BitconvertError, match=r"has id \d+, but the embedding has 500 rows"):
        vocabulary_of(tokenizer, 500, {})
    tokenizer.eos_token = "<think>"  # the last one
    with pytest.raises(BitconvertError, match="'<think>' has id"):
        vocabulary_of(tokenizer, len(tokenizer) - 1, {})


def test_an_added_token_without_a_row_is_left_out() -> None:
    """Gemma 3's text models lack the row of <image_soft_token>, and many fine-tuned ones that of [PAD]."""
    tokenizer = byte_level_bpe()
    vocabulary = vocabulary_of(tokenizer, len(tokenizer) - 1, {})
    assert len(vocabulary.tokens) == len(tokenizer) - 1
    assert "<think>" not in vocabulary.tokens
    assert "'<think>' has no row" in vocabulary.caveats[0]


def test_bytes_must_all_be_there() -> None:
    tokenizer = sentencepiece_bpe()
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["vocab"]
    vocabulary["<0xZZ>"] = vocabulary.pop("<0x41>")
    with pytest.raises(BitconvertError, match="<0x41>"):
        vocabulary_of(_edited(tokenizer, vocab=vocabulary), len(tokenizer), {})


def test_sentencepiece_merges_must_be_complete() -> None:
    tokenizer = sentencepiece_bpe()
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    spelled_twice = next(pair for pair in merges if sum("".join(other) == "".join(pair) for other in merges) > 1)
    merges.remove(spelled_twice)
    with pytest.raises(BitconvertError, match="is no merge"):
        vocabulary_of(_edited(tokenizer, merges=merges), len(tokenizer), {})


def test_a_pair_may_not_make_a_token_that_no_merge_makes() -> None:
    tokenizer = sentencepiece_bpe()
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["vocab"]
    for joined in ("th" + SPACE, "\v\v"):  # a character need not be a token for llama.cpp to join it
        assert joined not in vocabulary
        with pytest.raises(BitconvertError, match="is no merge"):
            vocabulary_of(_edited(tokenizer, vocab=vocabulary | {joined: len(vocabulary)}), 2000, {})


def test_the_merges_of_a_token_must_have_one_rank() -> None:
    tokenizer = sentencepiece_bpe()
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    spelled_twice = next(pair for pair in merges if sum("".join(other) == "".join(pair) for other in merges) > 1)
    merges.remove(spelled_twice)
    with pytest.raises(BitconvertError, match="ranked apart"):
        vocabulary_of(_edited(tokenizer, merges=[*merges, spelled_twice]), len(tokenizer), {})


@pytest.mark.parametrize(
    ("changes", "named"), [({"byte_fallback": False}, "byte fallback"), ({"ignore_merges": True}, "ignore_merges")]
)
def test_what_sentencepiece_would_do_otherwise_is_refused(changes: dict[str, Any], named: str) -> None:
    tokenizer = sentencepiece_bpe()
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["vocab"]
    unreachable = {"vocab": vocabulary | {"qqqq": len(vocabulary)}}
    with pytest.raises(BitconvertError, match=named):
        vocabulary_of(_edited(tokenizer, **changes, **unreachable), 2000, {})


def test_long_pieces_are_refused_before_they_are_searched_for_merges() -> None:
    tokenizer = sentencepiece_bpe()
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["vocab"]
    with pytest.raises(BitconvertError, match="10000000 characters"):
        vocabulary_of(_edited(tokenizer, vocab=vocabulary | {"x" * 10**7: len(vocabulary)}), 2000, {})


def test_padding_never_takes_a_tokens_name() -> None:
    tokenizer = byte_level_bpe()
    tokenizer.add_tokens([f"[PAD{len(tokenizer) + 2}]"])
    tokens = vocabulary_of(tokenizer, len(tokenizer) + 4, {}).tokens
    assert len(set(tokens)) == len(tokens)


def test_two_tokens_with_one_id_are_refused() -> None:
    tokenizer = byte_level_bpe()
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["vocab"]
    with pytest.raises(BitconvertError, match="share the id"):
        vocabulary_of(_edited(tokenizer, vocab=vocabulary | {"twice": 7}), 2000, {})


def test_the_first_gemmas_tab_is_the_byte() -> None:
    tokenizer = gemma_bpe()
    vocabulary = vocabulary_of(tokenizer, len(tokenizer), {})
    tab = tokenizer.convert_tokens_to_ids("\t")
    assert (vocabulary.tokens[tab], vocabulary.types[tab]) == ("<0x09>", TokenType.BYTE)
    own = gemma_bpe(own_tab=True)
    assert vocabulary_of(own, len(own), {}).tokens[own.convert_tokens_to_ids("\t")] == "\t"


@pytest.mark.parametrize("flag", ["lstrip", "single_word", "rstrip"])
def test_added_tokens_that_llama_cpp_treats_otherwise_are_named(flag: str) -> None:
    tokenizer = byte_level_bpe()
    assert vocabulary_of(tokenizer, 800, {}).caveats == ()
    tokenizer.add_tokens([AddedToken("<tool>", **{flag: True})])
    (caveat,) = vocabulary_of(tokenizer, 800, {}).caveats
    assert "'<tool>'" in caveat


def test_added_tokens_compared_with_a_space_in_front_are_named() -> None:
    tokenizer = sentencepiece_bpe()
    tokenizer.add_tokens([AddedToken("<tool>", normalized=True)])
    (caveat,) = vocabulary_of(tokenizer, 2000, {}).caveats
    assert "'<tool>'" in caveat


def test_bytes_without_a_token_are_told() -> None:
    tokenizer = byte_level_bpe()
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    never = model["vocab"] | {"gone": model["vocab"]["ÿ"]}
    never.pop("ÿ")
    assert vocabulary_of(_edited(tokenizer, vocab=never), 800, {}).caveats == ()  # no text holds the byte 0xFF
    bell = never | {"lost": never["ć"]}
    bell.pop("ć")
    (caveat,) = vocabulary_of(_edited(tokenizer, vocab=bell), 800, {}).caveats
    assert "1 of 256 bytes" in caveat


def test_a_word_piece_vocabulary_is_refused() -> None:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(["a b"], trainers.WordPieceTrainer(special_tokens=["[UNK]"], show_progress=False))
    with pytest.raises(BitconvertError, match="WordPiece"):
        vocabulary_of(PreTrainedTokenizerFast(tokenizer_object=tokenizer), 10, {})
