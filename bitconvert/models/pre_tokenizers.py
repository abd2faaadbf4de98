"""How tokenizer.json spells what llama.cpp calls a pre-tokenizer: the one table, used in both directions.

A GGUF file names its pre-tokenizer (``tokenizer.ggml.pre``) and llama.cpp compiles the regular expression in, whereas
tokenizer.json spells it out. llama.cpp's converter recognizes tokenizers by a hash of what they produce, so it refuses
every new one; here the structure decides, and each row is proved by comparing token ids with a real llama.cpp.

Source: ``llm_tokenizer_bpe`` and the vocabulary loader in llama.cpp's ``src/llama-vocab.cpp``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from bitconvert.errors import BitconvertError

Json = dict[str, Any]
Step = tuple[str, str | bool]
"""One pre-tokenizer reduced to its kind and the one property that changes where it cuts."""

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_PUNCTUATION_AND_SPACES = r"| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACES
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _PUNCTUATION_AND_SPACES
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _PUNCTUATION_AND_SPACES
_QWEN35 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _SPACES
_SEED = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+" + _SPACES
_CAPITALS, _SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = r"[^\r\n\p{L}\p{N}]?%s*%s+{0}|[^\r\n\p{L}\p{N}]?%s+%s*{0}" % ((_CAPITALS, _SMALL) * 2)
_CASED_PUNCTUATION = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _SPACES
_TEKKEN = _CASED.replace("{0}", "") + r"|\p{N}" + _CASED_PUNCTUATION
_GPT4O = _CASED.replace("{0}", _CONTRACTIONS + "?") + r"|\p{N}{1,3}" + _CASED_PUNCTUATION
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
) + _SPACES
_CHINESE_AND_KANA = "[一-龥぀-ゟ゠-ヿ]+"
_EAST_ASIAN = "[一-龥ࠀ-一가-퟿]+"

_BYTES: Step = ("ByteLevel", False)  # only maps bytes to letters
_GPT2_BYTES: Step = ("ByteLevel", True)  # cuts by GPT-2's expression first
_PUNCTUATION: Step = ("Punctuation", "Contiguous")

_MARKS_AND_CAPITALS = (
    "words with combining marks (Hindi, Bengali, Thai; accents that are characters of their own), and words in which a "
    "capital follows a small letter and one of the two is outside ASCII, get other token ids in llama.cpp than in "
    "transformers"
)
_WIDE_SPACES = (
    "spaces outside ASCII (such as the ideographic space) get other token ids in llama.cpp than in transformers"
)


@dataclass(frozen=True)
class PreTokenizer:
    """One row of the table.

    Attributes:
        name: ``tokenizer.ggml.pre``.
        steps: what tokenizer.json says, in order.
        ignore_merges: whether llama.cpp takes a whole word that is in the vocabulary before it looks at merges.
        adds_bos: whether llama.cpp puts BOS first when the file does not say.
        single_digits: whether only vocabularies qualify in which no token joins a digit with anything.
        caveat: the texts whose token ids differ in llama.cpp, which approximates this one; empty if there are none.
        aliases: further names that llama.cpp treats alike (as far as token ids go).
    """

    name: str
    steps: tuple[Step, ...]
    ignore_merges: bool = False
    adds_bos: bool = False
    single_digits: bool = False
    caveat: str = ""
    aliases: tuple[str, ...] = ()


PRE_TOKENIZERS = (
    PreTokenizer("gpt-2", (_GPT2_BYTES,), aliases=("phi-2", "mpt", "olmo", "jais", "trillion", "exaone4", "gigachat")),
    PreTokenizer("gpt-2", (("Split", _GPT2), _BYTES)),
    PreTokenizer(
        "smollm",
        (("Digits", True), _GPT2_BYTES),
        aliases=("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    ),
    PreTokenizer(
        "llama-bpe",
        (("Split", _LLAMA3), _BYTES),
        ignore_merges=True,
        adds_bos=True,
        aliases=("llama3", "llama-v3", "falcon3", "falcon-h1", "falcon_e", "pixtral", "midm-2.0", "lfm2"),
    ),
    PreTokenizer("dbrx", (("Split", _LLAMA3), _BYTES), aliases=("smaug-bpe", "chatglm-bpe")),
    PreTokenizer("glm4", (("Split", _LLAMA3), _BYTES), ignore_merges=True),
    PreTokenizer(
        "qwen2",
        (("Split", _QWEN2), _BYTES),
        aliases=("stablelm2", "deepseek-r1-qwen", "megrez", "hunyuan", "grok-2", "kormo", "bailingmoe", "llada-moe"),
    ),
    PreTokenizer("qwen35", (("Split", _QWEN35), _BYTES)),
    PreTokenizer("seed-coder", (("Split", _SEED), _BYTES)),
    PreTokenizer("tekken", (("Split", _TEKKEN), _BYTES), ignore_merges=True, adds_bos=True, caveat=_MARKS_AND_CAPITALS),
    PreTokenizer("gpt-4o", (("Split", _GPT4O), _BYTES), caveat=_MARKS_AND_CAPITALS, aliases=("llama4",)),
    PreTokenizer("falcon", (_PUNCTUATION, _GPT2_BYTES, ("Split", "[0-9][0-9][0-9]"))),
    PreTokenizer("falcon", (_PUNCTUATION, _GPT2_BYTES, ("Digits", True)), single_digits=True),  # Falcon 3
    PreTokenizer(
        "deepseek-v3",
        (("Split", r"\p{N}{1,3}"), ("Split", _CHINESE_AND_KANA), ("Split", _DEEPSEEK3), _BYTES),
        aliases=("hunyuan-dense",),
    ),
    PreTokenizer(
        "deepseek-coder",
        (
            ("Split", r"[\r\n]"),
            ("Split", r"\s?\p{L}+"),
            ("Split", r"\s?\p{P}+"),
            ("Split", _EAST_ASIAN),
            ("Digits", True),
            _BYTES,
        ),
        caveat=_WIDE_SPACES,
    ),
)

KNOWN_PRE_TOKENIZERS = {name: row for row in reversed(PRE_TOKENIZERS) for name in (row.name, *row.aliases)}
"""Every name of the table and its (first) row."""


def pre_tokenizer_of(tokenizer_json: Json) -> PreTokenizer:
    """The row whose ``name`` a byte-level BPE vocabulary gets, from the structure of its pre-tokenizer.

    Raises:
        BitconvertError: llama.cpp has no such pre-tokenizer, or none that was proved here.
    """
    _require_no_normalizer(tokenizer_json)
    steps = tuple(_step(part) for part in flat_steps(tokenizer_json, "pre_tokenizer"))
    rows = [row for row in PRE_TOKENIZERS if row.steps == steps]
    ignore_merges = bool(tokenizer_json["model"].get("ignore_merges"))
    if any(row.single_digits for row in rows) and (joined := _token_that_joins_a_digit(tokenizer_json)):
        raise unsupported(f"the pre-tokenizer {_shown(steps, ignore_merges)} with the token {joined!r}", _names())
    for row in rows:
        if row.ignore_merges == ignore_merges:
            return row
    if rows and merges_reach_every_token(tokenizer_json):
        return rows[0]
    raise unsupported(f"the pre-tokenizer {_shown(steps, ignore_merges)}", _names())


def restore_pre_tokenizer(tokenizer: Tokenizer, pre: str) -> Tokenizer:
    """The same vocabulary, cut the way ``tokenizer.ggml.pre`` says.

    Args:
        tokenizer: byte-level BPE with any pre-tokenizer or none.
        pre: a name of ``KNOWN_PRE_TOKENIZERS``.

    Raises:
        BitconvertError: the name is not in the table.
    """
    if pre not in KNOWN_PRE_TOKENIZERS:
        raise unsupported(f"the pre-tokenizer '{pre}'", ", ".join(sorted(KNOWN_PRE_TOKENIZERS)))
    row = KNOWN_PRE_TOKENIZERS[pre]
    document: Json = json.loads(tokenizer.to_str())
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [_spelled_out(step) for step in row.steps]}
    document["model"]["ignore_merges"] = row.ignore_merges
    return Tokenizer.from_str(json.dumps(document))


def flat_steps(tokenizer_json: Json, stage: str) -> list[Json]:
    """The members of a (nested) Sequence; a single member counts as a sequence of one.

    Args:
        tokenizer_json: the whole document.
        stage: normalizer or pre_tokenizer.
    """
    key = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers"}[stage]

    def flat(part: Json | None) -> list[Json]:
        if part is None:
            return []
        return [leaf for member in part[key] for leaf in flat(member)] if part["type"] == "Sequence" else [part]

    return flat(tokenizer_json[stage])


def merges_reach_every_token(tokenizer_json: Json) -> bool:
    """Whether merging spells every token of the vocabulary, so that ignore_merges makes no difference."""
    plain = Tokenizer.from_str(
        json.dumps(tokenizer_json | {"model": tokenizer_json["model"] | {"ignore_merges": False}})
    )
    return all(len(plain.model.tokenize(word)) == 1 for word in learned_tokens(tokenizer_json))


def learned_tokens(tokenizer_json: Json) -> list[str]:
    """The vocabulary without the tokens that were added to it."""
    added = {token["content"] for token in tokenizer_json["added_tokens"]}
    return [word for word in tokenizer_json["model"]["vocab"] if word not in added]


def unsupported(what: str, known: str) -> BitconvertError:
    """The error for a part of a tokenizer that llama.cpp has no notion of."""
    return BitconvertError(f"tokenizer: llama.cpp cannot reproduce {what}", f"supported: {known}")


def _require_no_normalizer(tokenizer_json: Json) -> None:
    """NFC passes: llama.cpp skips it, which only shows on text that is not NFC (so in its own Qwen files too)."""
    kinds = [part["type"] for part in flat_steps(tokenizer_json, "normalizer")]
    if kinds not in ([], ["NFC"]):
        raise unsupported(f"the normalizer {' + '.join(kinds)} before byte-level BPE", "no normalizer, or NFC")


def _token_that_joins_a_digit(tokenizer_json: Json) -> str | None:
    """A token in which a digit has neighbours: only such tokens show whether digits were cut off.

    Digits are those of the byte alphabet, where some bytes above 127 are spelled ² or ½ and cut off just the same.
    """
    return next(
        (word for word in learned_tokens(tokenizer_json) if len(word) > 1 and any(map(str.isnumeric, word))), None
    )


def _step(part: Json) -> Step:
    """Reduce a pre-tokenizer to what decides where it cuts; what is not understood stays whole and matches no row."""
    kind = part["type"]
    if kind == "ByteLevel" and not part["add_prefix_space"]:
        return kind, bool(part.get("use_regex", True))
    if kind == "Digits":
        return kind, bool(part["individual_digits"])
    if kind == "Punctuation":
        return kind, str(part["behavior"])
    # "Removed" and inverted is the older spelling: what lies between the matches goes, and everything matches.
    behaviour = (part.get("behavior"), part.get("invert"))
    if kind == "Split" and "Regex" in part["pattern"] and behaviour in (("Isolated", False), ("Removed", True)):
        return kind, _plain_spelling(part["pattern"]["Regex"])
    return kind, json.dumps(part, ensure_ascii=False)


def _plain_spelling(regex: str) -> str:
    """One spelling for expressions that cut alike: raw line ends, grouped contractions, possessive quantifiers."""
    regex = regex.replace("\r", r"\r").replace("\n", r"\n")
    regex = regex.replace("'(?i:[sdmt]|ll|ve|re)", _CONTRACTIONS).replace(r"\p{N}{1}|", r"\p{N}|")
    return regex.replace("]?+", "]?").replace("]++", "]+").replace(r"|\s*[\r\n]|", r"|\s*[\r\n]+|")


def _spelled_out(step: Step) -> Json:
    kind, value = step
    if kind == "Split":
        return {"type": kind, "pattern": {"Regex": value}, "behavior": "Isolated", "invert": False}
    if kind == "Digits":
        return {"type": kind, "individual_digits": value}
    if kind == "Punctuation":
        return {"type": kind, "behavior": value}
    return {"type": kind, "add_prefix_space": False, "trim_offsets": True, "use_regex": value}


def _shown(steps: Iterable[Step], ignore_merges: bool) -> str:
    shown = " + ".join(f"{kind}({value})" for kind, value in steps) or "(none)"
    return shown + (" with ignore_merges" if ignore_merges else "")


def _names() -> str:
    return ", ".join(dict.fromkeys(row.name for row in PRE_TOKENIZERS))
