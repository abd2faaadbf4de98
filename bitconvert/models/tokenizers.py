"""Tokenizers from disk, and what kind of vocabulary llama.cpp would call them.

Source: the vocabulary loader and ``llama_vocab::impl::tokenize`` in llama.cpp's ``src/llama-vocab.cpp``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bitconvert.errors import BitconvertError
from bitconvert.models.pre_tokenizers import Json, flat_steps, unsupported

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # what SentencePiece writes for a space

PHI3 = re.compile("phi-?3", re.IGNORECASE)
"""What ``general.name`` holds when llama.cpp lets added tokens swallow the white space after them, as Phi-3's do.

It looks there because GGUF has no key for ``rstrip``.
"""

PHI3_KEEPS_SPACES = frozenset({"<unk>", "<s>", "<|endoftext|>"})
"""The tokens that it spares."""

_LONGEST_PIECE = 512
_HIGHEST_ID = 2**24  # sixty times those of the largest vocabularies; the library fills every number up to the highest

_REPLACES = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_PREPENDS = {"type": "Prepend", "prepend": SPACE}
_SPLITS_AT_SPACES = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory holds the files of a tokenizer."""
    return (directory / "tokenizer.json").exists() or (directory / "tokenizer.model").exists()


def load_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a Hugging Face directory: local files only, no code from the model.

    tokenizer.json is taken as it stands (transformers' model-specific classes would rebuild it with other spaces);
    a lone tokenizer.model is converted by transformers and then spaced as SentencePiece itself does.

    Raises:
        BitconvertError: there is no tokenizer, or it does not load.
    """
    has_json = (directory / "tokenizer.json").exists()
    if not has_tokenizer(directory):
        raise BitconvertError(
            f"{directory}: no tokenizer.json and no tokenizer.model",
            "copy the tokenizer files of the original model into the directory",
        )
    loader = PreTrainedTokenizerFast if has_json else AutoTokenizer
    with tokenizer_damage(f"{directory}: its tokenizer does not load"):
        tokenizer = loader.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise BitconvertError(
            f"{directory}: {type(tokenizer).__name__} has no fast tokenizer",
            "save the tokenizer as tokenizer.json (tokenizer.save_pretrained of a fast tokenizer)",
        )
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest > _HIGHEST_ID:
        raise BitconvertError(
            f"{directory}: its tokenizer has a token of number {highest}", "download the tokenizer files again"
        )
    if not has_json:
        _space_like_sentencepiece(tokenizer.backend_tokenizer)
    tokenizer.backend_tokenizer.no_truncation()  # both are saved with a tokenizer that was last used so
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def require_rows(tokenizer: PreTrainedTokenizerFast, rows: int) -> list[str]:
    """Refuse a tokenizer of more tokens than the embedding has rows.

    Returns:
        Added tokens beyond them, which no text may hold: Gemma 3's image, a padding token added afterwards.

    Raises:
        BitconvertError: a token of the vocabulary, or one that begins or ends a text, has no row.
    """
    added = tokenizer.get_added_vocab()
    beyond = sorted((index, token) for token, index in tokenizer.get_vocab().items() if index >= rows)
    for index, token in beyond:
        if token not in added or token in (tokenizer.bos_token, tokenizer.eos_token):
            raise BitconvertError(
                f"tokenizer: token {token!r} has id {index}, but the embedding has {rows} rows",
                "resize the model's embedding to its tokenizer, or restore the tokenizer it was trained with",
            )
    return sorted(token for _, token in beyond)


@contextmanager
def tokenizer_damage(what: str) -> Iterator[None]:
    """Report whatever transformers and the Rust library raise for damaged files as one error that says what failed.

    The Rust library raises bare ``Exception``, and its panics are not even that.
    """
    try:
        yield
    except (BitconvertError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise BitconvertError(
            f"{what} ({type(error).__name__}: {reason})", "download the tokenizer files again"
        ) from error


def backend_json(tokenizer: PreTrainedTokenizerFast) -> Json:
    """The tokenizer as tokenizer.json would spell it."""
    document: Json = json.loads(tokenizer.backend_tokenizer.to_str())
    return document


def vocabulary_model(tokenizer_json: Json) -> Literal["gpt2", "llama"]:
    """``tokenizer.ggml.model``: gpt2 for byte-level BPE, llama for SentencePiece's BPE.

    Raises:
        BitconvertError: the vocabulary is of another kind, or uses what llama.cpp has no notion of.
    """
    model = tokenizer_json["model"]
    if model["type"] != "BPE":
        raise unsupported(f"a {model['type']} vocabulary", "byte-level BPE and SentencePiece BPE")
    for option in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise unsupported(f"BPE with {option} {model[option]!r}", "BPE without it")
    kinds = [step["type"] for step in flat_steps(tokenizer_json, "pre_tokenizer")]
    return "gpt2" if "ByteLevel" in kinds else "llama"


def adds_space_prefix(tokenizer_json: Json) -> bool:
    """Whether a SentencePiece-style tokenizer puts a space before the text (``add_space_prefix``).

    Two spellings exist: normalizers that prepend and replace, as converted from Llama 2's tokenizer.model (Gemma only
    replaces, and then splits at the spaces that are left, which are none), and ``Metaspace``, for which see
    ``space_caveat``.

    Raises:
        BitconvertError: the structure is neither.
    """
    normalizers = flat_steps(tokenizer_json, "normalizer")
    steps = flat_steps(tokenizer_json, "pre_tokenizer")
    if not normalizers and _is_metaspace(steps):
        return bool(steps[0].get("prepend_scheme", "always") != "never")
    replaced = normalizers in ([_PREPENDS, _REPLACES], [_REPLACES, _PREPENDS], [_REPLACES])
    if replaced and steps in ([], [_SPLITS_AT_SPACES]):
        return _PREPENDS in normalizers
    kinds = " + ".join(step["type"] for step in [*normalizers, *steps]) or "nothing"
    raise unsupported(
        f"{kinds} in the normalizer and pre-tokenizer of a SentencePiece vocabulary",
        "Prepend and Replace, or Metaspace without split",
    )


def space_caveat(tokenizer_json: Json) -> str:
    """Where ``Metaspace`` leaves the space out that llama.cpp, like SentencePiece itself, always adds; or nothing."""
    steps = flat_steps(tokenizer_json, "pre_tokenizer")
    scheme = steps[0].get("prepend_scheme", "always") if _is_metaspace(steps) else "never"
    where = {
        "never": "",
        "always": "text that begins with a space, at the start or after a special token,",
        "first": "text that begins with a space, and all text right after a special token,",
    }[scheme]
    return where and f"{where} gets one more space in llama.cpp than in transformers"


def require_short_pieces(tokens: Iterable[str]) -> None:
    """Refuse SentencePiece vocabularies with tokens so long that looking for their merges would take minutes."""
    longest = max(map(len, tokens), default=0)
    if longest > _LONGEST_PIECE:
        raise BitconvertError(
            f"tokenizer: it has a token of {longest} characters",
            f"a SentencePiece vocabulary has none longer than {_LONGEST_PIECE}",
        )


def _is_metaspace(steps: list[Json]) -> bool:
    """Whether the only step is a Metaspace that does not cut."""
    if [step["type"] for step in steps] != ["Metaspace"]:
        return False
    return steps[0].get("split", True) is False and bool(steps[0]["replacement"] == SPACE)


def _space_like_sentencepiece(tokenizer: Tokenizer) -> None:
    """Always prepend a space, as SentencePiece and llama.cpp do; Metaspace leaves it out before other spaces."""
    kind = type(tokenizer.pre_tokenizer).__name__
    if kind == "Metaspace" and tokenizer.pre_tokenizer.prepend_scheme != "never":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
        tokenizer.pre_tokenizer = None
