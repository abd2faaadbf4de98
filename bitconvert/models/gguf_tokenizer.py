"""The tokenizer of a GGUF file, rebuilt so that it gives the token ids that llama.cpp gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from bitconvert.errors import BitconvertError
from bitconvert.models.gguf_file import GgufFile, damage_named, gguf_family, open_gguf
from bitconvert.models.tokenizers import KNOWN_PRE_TOKENIZERS, SPACE, restore_pre_tokenizer

_ROLES = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}


@damage_named
def load_gguf_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer, giving the token ids that llama.cpp gives.

    Raises:
        BitconvertError: the vocabulary is of a kind or has a pre-tokenizer that is not supported.
    """
    file = open_gguf(path)
    tokens: list[str] = file.require("tokenizer.ggml.tokens")
    try:
        backend = _backend(file, tokens)
    except BitconvertError as error:
        raise BitconvertError(f"{path}: {error.message.removeprefix(f'{path}: ')}", error.hint) from error
    except Exception as error:  # the Rust tokenizer library raises bare Exception
        reason = " ".join(str(error).split())
        raise BitconvertError(f"{path}: its vocabulary is damaged ({reason})", "download or pack it again") from error
    special = {f"{role}_token": _special(file, tokens, key) for role, key in _ROLES.items()}
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **special
    )
    tokenizer.chat_template = _chat_template(file)
    tokenizer.model_max_length = file.require(f"{gguf_family(file).gguf_arch}.context_length")
    return tokenizer


def _special(file: GgufFile, tokens: list[str], key: str) -> str | None:
    index = file.get(f"tokenizer.ggml.{key}")
    return tokens[index] if index is not None and index < len(tokens) else None


def _backend(file: GgufFile, tokens: list[str]) -> Tokenizer:
    model = file.require("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        raise BitconvertError(f"vocabulary '{model}' is not supported", "supported: gpt2 (BPE), llama (SentencePiece)")
    backend = _byte_level(file, tokens) if model == "gpt2" else _sentencepiece(file, tokens)
    _add_special_tokens(backend, file, tokens)
    backend.post_processor = _post_processor(file, tokens)
    return backend


def _chat_template(file: GgufFile) -> str | dict[str, str] | None:
    """The template, or all of them by name when there are several."""
    default = file.get("tokenizer.chat_template")
    named = {name: file.require(f"tokenizer.chat_template.{name}") for name in file.get("tokenizer.chat_templates", [])}
    return {"default": default, **named} if named else default


def _byte_level(file: GgufFile, tokens: list[str]) -> Tokenizer:
    merges = [tuple(merge.split(" ", 1)) for merge in file.require("tokenizer.ggml.merges")]
    backend = Tokenizer(models.BPE(_used(file, tokens), merges))
    backend.decoder = decoders.ByteLevel()
    return restore_pre_tokenizer(backend, file.get("tokenizer.ggml.pre", "(none named)"))


def _sentencepiece(file: GgufFile, tokens: list[str]) -> Tokenizer:
    vocabulary = _used(file, tokens)
    merges = _merges_by_score(vocabulary, file.require("tokenizer.ggml.scores"))
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


def _merges_by_score(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every pair that spells a token, best score first: SentencePiece's rule as a merge list."""
    pairs = [
        (-scores[index], token[:cut], token[cut:])
        for token, index in vocabulary.items()
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    return [(left, right) for _, left, right in sorted(pairs, key=lambda pair: pair[0])]


def _add_special_tokens(backend: Tokenizer, file: GgufFile, tokens: list[str]) -> None:
    """Control and user-defined tokens match as one wherever they stand in a text."""
    types = file.get("tokenizer.ggml.token_type") or []
    added = {TokenType.CONTROL: True, TokenType.USER_DEFINED: False, TokenType.UNKNOWN: True}
    for token, kind in zip(tokens, types, strict=False):
        if kind in added:
            backend.add_tokens([AddedToken(token, special=added[TokenType(kind)], normalized=False)])


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
