"""The vocabulary of a GGUF file, from a Hugging Face tokenizer.

Sources: GGUF specification (ggml/docs/gguf.md); what llama.cpp makes of each key: ``src/llama-vocab.cpp``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerFast

from bitconvert.errors import BitconvertError
from bitconvert.models.tokenizers import Json, adds_space_prefix, backend_json, pre_of, vocabulary_model

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_NEVER_IN_TEXT = [chr(byte) for byte in (0xFF, 0xFE, 0xFD, 0xFC, 0xFB, 0xFA, 0xF9, 0xF8)]
"""Byte-level spelling of bytes that no UTF-8 text contains."""


@dataclass(frozen=True)
class Vocabulary:
    """What llama.cpp needs to turn text into this model's token ids and back.

    Attributes:
        model: gpt2 (byte-level BPE with merges) or llama (SentencePiece BPE with scores).
        pre: name of the pre-tokenizer.
        tokens: one per row of the embedding.
        types: one ``TokenType`` per token.
        merges: "left right", best first; empty for SentencePiece.
        scores: one per token, the best to merge highest; empty for byte-level BPE.
        special_ids: ids of bos, eos, unk and pad, as far as they exist.
        add_bos: whether the tokenizer puts BOS before a text.
        add_eos: whether it puts EOS after it.
        add_space_prefix: whether it puts a space before it.
        chat_template: Jinja source, by name; the usual one is called "default".
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[TokenType]
    merges: list[str]
    scores: list[float]
    special_ids: dict[str, int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    chat_template: dict[str, str]

    def add_to(self, writer: GGUFWriter) -> None:
        """Write the ``tokenizer.*`` keys."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.merges:
            writer.add_token_merges(self.merges)
        if self.scores:
            writer.add_token_scores(self.scores)
        for name, token_id in self.special_ids.items():
            getattr(writer, f"add_{name}_token_id")(token_id)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        writer.add_add_space_prefix(self.add_space_prefix)
        if self.chat_template:
            writer.add_chat_template([{"name": name, "template": text} for name, text in self.chat_template.items()])


def vocabulary_of(tokenizer: PreTrainedTokenizerFast, rows: int, config: dict[str, Any]) -> Vocabulary:
    """Describe a tokenizer the way llama.cpp does.

    Args:
        tokenizer: the model's fast tokenizer.
        rows: rows of the embedding; ids that the tokenizer does not use become padding.
        config: the model's config.json, for special tokens that the tokenizer does not name.

    Raises:
        BitconvertError: llama.cpp cannot give the same token ids, with the part of the tokenizer that it lacks.
    """
    document = backend_json(tokenizer)
    model = vocabulary_model(document)
    tokens = _tokens(tokenizer, rows)
    unknown = document["model"].get("unk_token")
    special_ids = _special_ids(tokenizer, tokens, unknown, config)
    add_bos, add_eos = _added_around(tokenizer, special_ids)
    sentencepiece = model == "llama"
    if sentencepiece:
        _require_byte_tokens(tokens)
    return Vocabulary(
        model=model,
        pre="default" if sentencepiece else pre_of(document),
        tokens=[token if token is not None else f"[PAD{index}]" for index, token in enumerate(tokens)],
        types=_types(tokens, document, unknown, sentencepiece),
        merges=[] if sentencepiece else [_merge_line(pair) for pair in _merges(document)],
        scores=_scores(tokens, document) if sentencepiece else [],
        special_ids=special_ids,
        add_bos=add_bos,
        add_eos=add_eos,
        add_space_prefix=sentencepiece and adds_space_prefix(document),
        chat_template=_chat_templates(tokenizer),
    )


def _tokens(tokenizer: PreTrainedTokenizerFast, rows: int) -> list[str | None]:
    """The token of each embedding row, None where the tokenizer has none."""
    tokens: list[str | None] = [None] * rows
    for token, index in tokenizer.get_vocab().items():
        if index >= rows:
            raise BitconvertError(
                f"tokenizer: token {token!r} has id {index}, but the embedding has {rows} rows",
                "resize the model's embedding to its tokenizer, or restore the tokenizer it was trained with",
            )
        tokens[index] = token
    return tokens


def _types(tokens: list[str | None], document: Json, unknown: str | None, sentencepiece: bool) -> list[TokenType]:
    added = {token["content"]: bool(token["special"]) for token in document["added_tokens"]}

    def type_of(token: str | None) -> TokenType:
        if token is None:
            return TokenType.UNUSED
        if sentencepiece and token == unknown:
            return TokenType.UNKNOWN
        if token in added:
            return TokenType.CONTROL if added[token] else TokenType.USER_DEFINED
        if sentencepiece and _BYTE_TOKEN.fullmatch(token):
            return TokenType.BYTE
        return TokenType.NORMAL

    return [type_of(token) for token in tokens]


def _special_ids(
    tokenizer: PreTrainedTokenizerFast, tokens: list[str | None], unknown: str | None, config: dict[str, Any]
) -> dict[str, int]:
    """Ids by role. An EOS is always named: without one llama.cpp takes token 11 for it, a comma in GPT-2's order."""
    ids = {
        "bos": _first(tokenizer.bos_token_id, config.get("bos_token_id")),
        "eos": _first(tokenizer.eos_token_id, config.get("eos_token_id")),
        "unk": _first(tokenizer.unk_token_id, tokens.index(unknown) if unknown is not None else None),
        "pad": _first(tokenizer.pad_token_id, config.get("pad_token_id")),
    }
    if ids["eos"] is None:
        ids["eos"] = next((tokens.index(token) for token in _NEVER_IN_TEXT if token in tokens), None)
    return {role: index for role, index in ids.items() if index is not None and 0 <= index < len(tokens)}


def _first(from_tokenizer: int | None, from_config: int | list[int] | None) -> int | None:
    if from_tokenizer is not None:
        return from_tokenizer
    return from_config[0] if isinstance(from_config, list) else from_config


def _added_around(tokenizer: PreTrainedTokenizerFast, special_ids: dict[str, int]) -> tuple[bool, bool]:
    """Whether the post-processor really adds BOS and EOS; its flags and its behaviour often disagree."""
    backend = tokenizer.backend_tokenizer
    bare = backend.encode("a", add_special_tokens=False).ids
    framed = backend.encode("a", add_special_tokens=True).ids
    start = next((i for i in range(len(framed)) if framed[i : i + len(bare)] == bare), 0)
    before, after = framed[:start], framed[start + len(bare) :]
    bos, eos = [special_ids.get("bos")], [special_ids.get("eos")]
    if before not in ([], bos) or after not in ([], eos):
        raise BitconvertError(
            f"tokenizer: its post-processor puts {tokenizer.convert_ids_to_tokens(before + after)} around a text",
            "llama.cpp can only add the BOS token before and the EOS token after",
        )
    return bool(before), bool(after)


def _chat_templates(tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    template = tokenizer.chat_template
    return {"default": template} if isinstance(template, str) else dict(template or {})


def _merges(document: Json) -> list[tuple[str, str]]:
    """Pairs, best first; older files write each as one string."""
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in document["model"]["merges"])
    return [(left, right) for left, right in pairs]


def _merge_line(pair: tuple[str, str]) -> str:
    if any(" " in part for part in pair):
        raise BitconvertError(
            f"tokenizer: the merge {pair!r} holds a space", "GGUF separates the two halves of a merge by a space"
        )
    return " ".join(pair)


# ---- SentencePiece ------------------------------------------------------------------------------------------------


def _require_byte_tokens(tokens: list[str | None]) -> None:
    missing = {f"<0x{byte:02X}>" for byte in range(256)} - set(tokens)
    if missing:
        raise BitconvertError(
            f"tokenizer: no byte token {min(missing)} ({len(missing)} of 256 missing)",
            "llama.cpp aborts on characters outside such a vocabulary; use one with byte fallback, or byte-level BPE",
        )


def _scores(tokens: list[str | None], document: Json) -> list[float]:
    """Scores under which llama.cpp merges in the order of the merge list.

    SentencePiece joins the neighbours whose joined token scores best, whichever two they are; a merge list may allow
    only some pairs. Lists converted from a SentencePiece model allow all, and their order is the score's.
    """
    ranks: dict[str, int] = {}
    pairs = _merges(document)
    for rank, (left, right) in enumerate(pairs):
        ranks.setdefault(left + right, rank)
    _require_all_pairs(set(pairs), ranks, document)
    lowest = len(pairs)  # single characters come from no merge
    return [float(-ranks.get(token, lowest)) if token is not None else float(-lowest) for token in tokens]


def _require_all_pairs(pairs: set[tuple[str, str]], merged: dict[str, int], document: Json) -> None:
    vocabulary = document["model"]["vocab"]
    for token in merged:
        for cut in range(1, len(token)):
            pair = token[:cut], token[cut:]
            if pair[0] in vocabulary and pair[1] in vocabulary and pair not in pairs:
                raise BitconvertError(
                    f"tokenizer: the pair {pair!r} spells a token, but is no merge",
                    "llama.cpp merges by score and would join it; only SentencePiece's own vocabularies can be stored",
                )
