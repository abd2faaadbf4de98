"""The vocabulary of a GGUF file, from a Hugging Face tokenizer.

Sources: GGUF specification (ggml/docs/gguf.md); what llama.cpp makes of each key: ``src/llama-vocab.cpp``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter, TokenType
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from bitconvert.errors import BitconvertError
from bitconvert.models.pre_tokenizers import (
    Json,
    flat_steps,
    merges_reach_every_token,
    pre_tokenizer_of,
    unsupported,
)
from bitconvert.models.tokenizers import (
    PHI3,
    PHI3_KEEPS_SPACES,
    SPACE,
    adds_space_prefix,
    backend_json,
    require_rows,
    require_short_pieces,
    space_caveat,
    tokenizer_damage,
    vocabulary_model,
)

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_TAB = "<0x09>"
_NEVER_IN_TEXT = [chr(byte) for byte in (*range(0xFF, 0xF4, -1), 0xC1, 0xC0)]
"""Byte-level spelling of bytes that no UTF-8 text contains."""

_NFC = (
    "text that is not in Unicode's composed form NFC (an accent as a character of its own) gets other token ids in "
    "llama.cpp than in transformers"
)


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
        strips_as_phi3: whether its special tokens swallow the white space after them, as Phi-3's do.
        caveats: a sentence for each kind of text whose token ids differ in llama.cpp; the user is to be told.
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
    strips_as_phi3: bool
    caveats: tuple[str, ...]

    def model_name(self, name: str) -> str:
        """``general.name`` for a model of this name: llama.cpp reads from it how white space is to be treated."""
        if self.strips_as_phi3:
            return name if PHI3.search(name) else f"{name} (phi-3)"
        return PHI3.sub("phi 3", name)

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
        BitconvertError: llama.cpp cannot give the same token ids, with the part of the tokenizer that it lacks; or the
            tokenizer's files are damaged.
    """
    with tokenizer_damage("tokenizer: its files are damaged"):
        return _vocabulary_of(tokenizer, rows, config)


def _vocabulary_of(tokenizer: PreTrainedTokenizerFast, rows: int, config: dict[str, Any]) -> Vocabulary:
    document = backend_json(tokenizer)
    model = vocabulary_model(document)
    added = _added_tokens(document)
    rowless = require_rows(tokenizer, rows)
    tokens = _tokens(tokenizer, rows)
    unknown = document["model"].get("unk_token")
    special_ids = _special_ids(tokenizer, tokens, unknown, config)
    add_bos, add_eos = _added_around(tokenizer, special_ids)
    strips_as_phi3 = _strips_as_phi3(tokens, added)
    caveats = [_rowless_caveat(rowless), _strip_caveat(added, strips_as_phi3)]
    if model == "llama":
        tokens = _byte_for_tab(tokens)
        _require_byte_tokens(tokens, document)
        pre, merges, scores = "default", [], _scores(tokens, document)
        types = _sentencepiece_types(tokens, added, unknown)
        tokens = [_in_text(token, added) for token in tokens]
        caveats += [space_caveat(document), _prefix_caveat(document, added)]
    else:
        row = pre_tokenizer_of(document)
        pre, merges, scores = row.name, [_merge_line(pair) for pair in _merges(document)], []
        types = _byte_level_types(tokens, added)
        caveats += [row.caveat, _NFC if flat_steps(document, "normalizer") else "", _byte_caveat(document)]
    return Vocabulary(
        model=model,
        pre=pre,
        tokens=_with_padding(tokens),
        types=types,
        merges=merges,
        scores=scores,
        special_ids=special_ids,
        add_bos=add_bos,
        add_eos=add_eos,
        add_space_prefix=model == "llama" and adds_space_prefix(document),
        chat_template=_chat_templates(tokenizer),
        strips_as_phi3=strips_as_phi3,
        caveats=tuple(filter(None, caveats)),
    )


def _tokens(tokenizer: PreTrainedTokenizerFast, rows: int) -> list[str | None]:
    """The token of each embedding row, None where the tokenizer has none."""
    tokens: list[str | None] = [None] * rows
    for token, index in tokenizer.get_vocab().items():
        if index >= rows:
            continue
        other = tokens[index]
        if other is None or (other, token) == ("\t", _TAB):  # the first Gemma's tab goes by both names
            tokens[index] = token
        elif (token, other) != ("\t", _TAB):
            raise BitconvertError(
                f"tokenizer: {other!r} and {token!r} share the id {index}", "restore the tokenizer it was trained with"
            )
    return tokens


def _with_padding(tokens: list[str | None]) -> list[str]:
    """A name for every row; llama.cpp refuses a file in which two tokens share one."""
    taken = set(tokens)

    def name(index: int) -> str:
        padding = f"[PAD{index}]"
        while padding in taken:
            padding = f"[{padding}]"
        return padding

    return [name(index) if token is None else token for index, token in enumerate(tokens)]


def _byte_level_types(tokens: list[str | None], added: dict[str, Json]) -> list[TokenType]:
    return [TokenType.UNUSED if token is None else _added_type(token, added) or TokenType.NORMAL for token in tokens]


def _added_type(token: str, added: dict[str, Json]) -> TokenType | None:
    if token not in added:
        return None
    return TokenType.CONTROL if added[token]["special"] else TokenType.USER_DEFINED


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
    return {role: index for role, index in ids.items() if isinstance(index, int) and 0 <= index < len(tokens)}


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


def _byte_caveat(document: Json) -> str:
    """What happens to bytes without a token: transformers leaves them out and then merges across the gap."""
    missing = sorted(set(ByteLevel.alphabet()) - set(document["model"]["vocab"]) - set(_NEVER_IN_TEXT))
    if not missing:
        return ""
    return (
        f"{len(missing)} of 256 bytes have no token (control characters, as a rule), and text with such a byte may get "
        "other token ids in llama.cpp than in transformers"
    )


# ---- added tokens --------------------------------------------------------------------------------------------------


def _added_tokens(document: Json) -> dict[str, Json]:
    """By content."""
    return {token["content"]: token for token in document["added_tokens"]}


def _strips_as_phi3(tokens: list[str | None], added: dict[str, Json]) -> bool:
    """Whether to ask llama.cpp for Phi-3's treatment; it aborts on a vocabulary without the tokens it expects."""
    return any(token["rstrip"] for token in added.values()) and {*PHI3_KEEPS_SPACES, "</s>"} <= set(tokens)


def _strip_caveat(added: dict[str, Json], as_phi3: bool) -> str:
    """Which added tokens take in white space, or whole words only, where llama.cpp does otherwise."""

    def differs(token: Json) -> bool:
        strips = as_phi3 and token["content"] not in PHI3_KEEPS_SPACES
        return bool(token["lstrip"] or token["single_word"] or token["rstrip"] != strips)

    return _told(
        [token["content"] for token in added.values() if differs(token)], "white space beside {} is treated otherwise"
    )


def _rowless_caveat(tokens: list[str]) -> str:
    return _told(tokens, "{} has no row in the embedding, so it is left out and is ordinary text", "")


def _prefix_caveat(document: Json, added: dict[str, Json]) -> str:
    """Which added tokens are compared with normalized text, and so with a space in front."""
    if not adds_space_prefix(document) or not flat_steps(document, "normalizer"):
        return ""
    return _told([token["content"] for token in added.values() if token["normalized"]], "{} is found in more places")


def _told(names: list[str], what: str, where: str = " in llama.cpp than in transformers") -> str:
    if not names:
        return ""
    shown = ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return what.format(f"the added token {shown}" if len(names) == 1 else f"each of the added tokens {shown}") + where


# ---- SentencePiece ------------------------------------------------------------------------------------------------


def _byte_for_tab(tokens: list[str | None]) -> list[str | None]:
    """The tab as a byte token: the first Gemma's tokenizer.json has it in that token's place."""
    if _TAB in tokens:
        return tokens
    return [_TAB if token == "\t" else token for token in tokens]


def _require_byte_tokens(tokens: list[str | None], document: Json) -> None:
    missing = {f"<0x{byte:02X}>" for byte in range(256)} - set(tokens)
    if missing or not document["model"]["byte_fallback"]:
        what = f"no byte token {min(missing)} ({len(missing)} of 256 missing)" if missing else "no byte fallback"
        raise BitconvertError(
            f"tokenizer: {what}",
            "llama.cpp spells what is not in the vocabulary in bytes; use one with byte fallback, or byte-level BPE",
        )


def _sentencepiece_types(tokens: list[str | None], added: dict[str, Json], unknown: str | None) -> list[TokenType]:
    def type_of(token: str | None) -> TokenType:
        if token is None:
            return TokenType.UNUSED
        if token == unknown:
            return TokenType.UNKNOWN
        if _BYTE_TOKEN.fullmatch(token):
            return TokenType.BYTE
        if _is_merged(token, added):
            return TokenType.NORMAL
        return _added_type(token, added) or TokenType.NORMAL

    return [type_of(token) for token in tokens]


def _is_merged(token: str, added: dict[str, Json]) -> bool:
    """Whether merges make it: an added token spelled with SentencePiece's space is not to be found in raw text."""
    return token not in added or (SPACE in token and not added[token]["special"] and not added[token]["normalized"])


def _in_text(token: str | None, added: dict[str, Json]) -> str | None:
    """A token as llama.cpp looks for it: added ones in raw text, where spaces are still spaces."""
    normalized = token is not None and token in added and added[token]["normalized"]
    return token.replace(SPACE, " ") if token is not None and normalized else token


def _scores(tokens: list[str | None], document: Json) -> list[float]:
    """Scores under which llama.cpp merges in the order of the merge list.

    SentencePiece joins the neighbours whose joined token scores best, whichever two they are; a merge list may allow
    only some pairs, or rank those of one token apart. Lists converted from a SentencePiece model do neither.
    """
    pairs, added = _merges(document), _added_tokens(document)
    ranks: dict[str, int] = {}
    previous = ""
    for left, right in pairs:
        token = left + right
        if token != previous and token in ranks:
            raise _not_sentencepiece((left, right), "is ranked apart from the other merges of its token")
        if _is_merged(token, added):
            ranks.setdefault(token, len(ranks))
        previous = token
    _require_all_pairs(set(pairs), document)
    lowest = len(ranks)  # single characters come from no merge
    return [float(-ranks.get(token, lowest)) if token is not None else float(-lowest) for token in tokens]


def _require_all_pairs(pairs: set[tuple[str, str]], document: Json) -> None:
    """Refuse what llama.cpp would join and the merge list does not; it joins characters that are no tokens, too."""
    vocabulary, added = document["model"]["vocab"], _added_tokens(document)
    if document["model"].get("ignore_merges") and not merges_reach_every_token(document):
        raise unsupported("a SentencePiece vocabulary with ignore_merges", "one without")
    require_short_pieces(vocabulary)
    symbols = {*vocabulary, *(character for token in vocabulary for character in token)}
    for token in vocabulary:
        if not _is_merged(token, added):
            continue
        for cut in range(1, len(token)):
            pair = token[:cut], token[cut:]
            if pair[0] in symbols and pair[1] in symbols and pair not in pairs:
                raise _not_sentencepiece(pair, "spells a token, but is no merge")


def _not_sentencepiece(pair: tuple[str, str], why: str) -> BitconvertError:
    return BitconvertError(
        f"tokenizer: the pair {pair!r} {why}",
        "llama.cpp merges by score, as SentencePiece does; only SentencePiece's own vocabularies can be stored",
    )
