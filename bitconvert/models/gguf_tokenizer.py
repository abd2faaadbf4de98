"""The tokenizer of a GGUF file, rebuilt so that it gives the token ids that llama.cpp gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from bitconvert.errors import BitconvertError
from bitconvert.models.gguf_file import GgufFile, damage_named, gguf_family, open_gguf
from bitconvert.models.pre_tokenizers import KNOWN_PRE_TOKENIZERS, restore_pre_tokenizer
from bitconvert.models.tokenizers import PHI3, PHI3_KEEPS_SPACES, SPACE, require_short_pieces

_ROLES = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}


@damage_named
def load_gguf_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer, giving the token ids that llama.cpp gives.

    Where llama.cpp only approximates a pre-tokenizer (``PreTokenizer.caveat``), the original is restored.

    Raises:
        BitconvertError: the vocabulary is damaged, or it is of a kind or has a pre-tokenizer that is not supported.
    """
    file = open_gguf(path)
    context = file.require(f"{gguf_family(file).gguf_arch}.context_length")
    try:
        tokenizer = _tokenizer(file)
    except BitconvertError as error:
        raise BitconvertError(f"{path}: {error.message.removeprefix(f'{path}: ')}", error.hint) from error
    except Exception as error:  # the Rust tokenizer library raises bare Exception
        reason = " ".join(str(error).split())
        raise BitconvertError(f"{path}: its vocabulary is damaged ({reason})", "download or pack it again") from error
    tokenizer.model_max_length = context
    return tokenizer


def _tokenizer(file: GgufFile) -> PreTrainedTokenizerFast:
    tokens = _strings(file, "tokenizer.ggml.tokens")
    special = {f"{role}_token": _special(file, tokens, key) for role, key in _ROLES.items()}
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=_backend(file, tokens), clean_up_tokenization_spaces=False, **special
    )
    tokenizer.chat_template = _chat_template(file)
    return tokenizer


def _strings(file: GgufFile, key: str) -> list[str]:
    values = file.require(key)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise BitconvertError(f"key {key} is no list of texts", "download or pack it again")
    return values


def _special(file: GgufFile, tokens: list[str], key: str) -> str | None:
    index = file.get(f"tokenizer.ggml.{key}")
    return tokens[index] if isinstance(index, int) and 0 <= index < len(tokens) else None


def _backend(file: GgufFile, tokens: list[str]) -> Tokenizer:
    model = file.require("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        raise BitconvertError(f"vocabulary '{model}' is not supported", "supported: gpt2 (BPE), llama (SentencePiece)")
    backend = _byte_level(file, tokens) if model == "gpt2" else _sentencepiece(file, tokens)
    backend.add_tokens(_added_tokens(file, tokens))
    backend.post_processor = _post_processor(file, tokens)
    return backend


def _chat_template(file: GgufFile) -> str | dict[str, str] | None:
    """The template, or all of them by name when there are several."""
    default = file.get("tokenizer.chat_template")
    names = _strings(file, "tokenizer.chat_templates") if "tokenizer.chat_templates" in file.fields else []
    named = {name: file.require(f"tokenizer.chat_template.{name}") for name in names}
    if not all(isinstance(text, str) for text in (default or "", *named.values())):
        raise BitconvertError("its chat template is no text", "download or pack it again")
    return {"default": default, **named} if named else default


def _byte_level(file: GgufFile, tokens: list[str]) -> Tokenizer:
    halves = [merge.partition(" ") for merge in _strings(file, "tokenizer.ggml.merges")]
    backend = Tokenizer(models.BPE(_used(file, tokens), [(left, right) for left, _, right in halves]))
    backend.decoder = decoders.ByteLevel()
    return restore_pre_tokenizer(backend, file.get("tokenizer.ggml.pre", "(none named)"))


def _sentencepiece(file: GgufFile, tokens: list[str]) -> Tokenizer:
    vocabulary = _used(file, tokens)
    found_whole = {token.content for token in _added_tokens(file, tokens)}
    merges = _merges_by_score(vocabulary, file.require("tokenizer.ggml.scores"), found_whole)
    unknown = _special(file, tokens, "unknown_token_id") or tokens[0]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefixed = bool(file.get("tokenizer.ggml.add_space_prefix", True))
    prepend = [normalizers.Prepend(SPACE)] if prefixed else []
    strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
    backend.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", SPACE)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _used(file: GgufFile, tokens: list[str]) -> dict[str, int]:
    """Token -> id, without the padding rows at the end of the embedding."""
    types = file.get("tokenizer.ggml.token_type") or [TokenType.NORMAL] * len(tokens)
    return {token: index for index, token in enumerate(tokens) if types[index] != TokenType.UNUSED}


def _merges_by_score(vocabulary: dict[str, int], scores: list[float], found_whole: set[str]) -> list[tuple[str, str]]:
    """Every pair that spells a token, best score first: SentencePiece's rule as a merge list.

    Tokens that are found whole, before anything is merged, need no pairs.
    """
    require_short_pieces(vocabulary)
    pairs = [
        (-scores[index], token[:cut], token[cut:])
        for token, index in vocabulary.items()
        if token not in found_whole
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    return [(left, right) for _, left, right in sorted(pairs, key=lambda pair: pair[0])]


def _added_tokens(file: GgufFile, tokens: list[str]) -> list[AddedToken]:
    """Control and user-defined tokens match as one wherever they stand in a text."""
    types = file.get("tokenizer.ggml.token_type") or []
    special = {TokenType.CONTROL: True, TokenType.USER_DEFINED: False, TokenType.UNKNOWN: True}
    phi3 = PHI3.search(str(file.get("general.name", ""))) is not None
    return [
        AddedToken(
            token, special=special[TokenType(kind)], normalized=False, rstrip=phi3 and token not in PHI3_KEEPS_SPACES
        )
        for token, kind in zip(tokens, types, strict=False)
        if kind in special
    ]


def _post_processor(file: GgufFile, tokens: list[str]) -> Any:
    """What is put around a text, as llama.cpp decides it."""
    around: dict[str, list[str]] = {}
    for role, default in (("bos", _adds_bos_by_default(file)), ("eos", False)):
        token = _special(file, tokens, _ROLES[role])
        wanted = token is not None and file.get(f"tokenizer.ggml.add_{role}_token", default)
        around[role] = [token] if wanted and token is not None else []
    special = [(token, tokens.index(token)) for token in {*around["bos"], *around["eos"]}]
    return processors.TemplateProcessing(single=[*around["bos"], "$A", *around["eos"]], special_tokens=special)


def _adds_bos_by_default(file: GgufFile) -> bool:
    """What llama.cpp assumes of a file that has no ``add_bos_token``."""
    if file.require("tokenizer.ggml.model") == "llama":
        return True
    return KNOWN_PRE_TOKENIZERS[file.require("tokenizer.ggml.pre")].adds_bos
