"""Tokenizers: how tokenizer.json spells what llama.cpp calls a pre-tokenizer, in both directions.

A GGUF file names its pre-tokenizer (``tokenizer.ggml.pre``) and llama.cpp compiles the regular expression in, whereas
tokenizer.json spells it out. llama.cpp's converter recognizes tokenizers by a hash of what they produce, so it refuses
every new one; here the structure decides, and each row is proved by comparing token ids with a real llama.cpp.

Source: ``llm_tokenizer_bpe`` and the vocabulary loader in llama.cpp's ``src/llama-vocab.cpp``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bitconvert.errors import BitconvertError

Json = dict[str, Any]
Step = tuple[str, str | bool]
"""One pre-tokenizer reduced to its kind and the one property that changes where it cuts."""

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # what SentencePiece writes for a space

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_PUNCTUATION_AND_SPACE = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _PUNCTUATION_AND_SPACE
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _PUNCTUATION_AND_SPACE
_SEED = _CONTRACTIONS + (r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+")
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CHINESE_AND_KANA = "[一-龥぀-ゟ゠-ヿ]+"

_BYTES: Step = ("ByteLevel", False)  # only maps bytes to letters
_GPT2_BYTES: Step = ("ByteLevel", True)  # cuts by GPT-2's expression first


@dataclass(frozen=True)
class PreTokenizer:
    """One row of the table.

    Attributes:
        name: ``tokenizer.ggml.pre``.
        steps: what tokenizer.json says, in order.
        ignore_merges: whether llama.cpp takes a whole word that is in the vocabulary before it looks at merges.
        adds_bos: whether llama.cpp puts BOS first when the file does not say.
        aliases: further names that llama.cpp treats alike (as far as token ids go).
    """

    name: str
    steps: tuple[Step, ...]
    ignore_merges: bool = False
    adds_bos: bool = False
    aliases: tuple[str, ...] = ()


PRE_TOKENIZERS = (  # llama.cpp's tekken, gpt-4o, falcon and deepseek-coder only approximate their originals: left out
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
        aliases=("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    ),
    PreTokenizer("dbrx", (("Split", _LLAMA3), _BYTES), aliases=("smaug-bpe",)),
    PreTokenizer(
        "qwen2",
        (("Split", _QWEN2), _BYTES),
        aliases=("stablelm2", "deepseek-r1-qwen", "megrez", "hunyuan", "grok-2", "kormo"),
    ),
    PreTokenizer("seed-coder", (("Split", _SEED), _BYTES)),
    PreTokenizer(
        "deepseek-v3",
        (("Split", r"\p{N}{1,3}"), ("Split", _CHINESE_AND_KANA), ("Split", _DEEPSEEK3), _BYTES),
        aliases=("hunyuan-dense",),
    ),
)

KNOWN_PRE_TOKENIZERS = {name: row for row in reversed(PRE_TOKENIZERS) for name in (row.name, *row.aliases)}
"""Every name of the table and its (first) row."""


def load_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a Hugging Face directory: local files only, no code from the model.

    tokenizer.json is taken as it stands (transformers' model-specific classes would rebuild it with other spaces);
    a lone tokenizer.model is converted by transformers and then spaced as SentencePiece itself does.

    Raises:
        BitconvertError: there is no tokenizer, or it does not load.
    """
    has_json = (directory / "tokenizer.json").exists()
    if not has_json and not (directory / "tokenizer.model").exists():
        raise BitconvertError(
            f"{directory}: no tokenizer.json and no tokenizer.model",
            "copy the tokenizer files of the original model into the directory",
        )
    loader = PreTrainedTokenizerFast if has_json else AutoTokenizer
    try:
        tokenizer = loader.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the Rust tokenizer library raises bare Exception
        raise BitconvertError(
            f"{directory}: its tokenizer does not load ({_first_line(error)})", "download the tokenizer files again"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise BitconvertError(
            f"{directory}: {type(tokenizer).__name__} has no fast tokenizer",
            "save the tokenizer as tokenizer.json (tokenizer.save_pretrained of a fast tokenizer)",
        )
    if not has_json:
        _space_like_sentencepiece(tokenizer.backend_tokenizer)
    tokenizer.backend_tokenizer.no_truncation()  # both are saved with a tokenizer that was last used so
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


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
        raise _unsupported(f"a {model['type']} vocabulary", "byte-level BPE and SentencePiece BPE")
    for option in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise _unsupported(f"BPE with {option} {model[option]!r}", "BPE without it")
    kinds = [step["type"] for step in _flat(tokenizer_json["pre_tokenizer"], "pretokenizers")]
    return "gpt2" if "ByteLevel" in kinds else "llama"


def pre_of(tokenizer_json: Json) -> str:
    """``tokenizer.ggml.pre`` of a byte-level BPE vocabulary, from the structure of its pre-tokenizer.

    Raises:
        BitconvertError: llama.cpp has no such pre-tokenizer, or none that was proved here.
    """
    _refuse_normalizer(tokenizer_json)
    steps = tuple(_step(part) for part in _flat(tokenizer_json["pre_tokenizer"], "pretokenizers"))
    rows = [row for row in PRE_TOKENIZERS if row.steps == steps]
    ignore_merges = bool(tokenizer_json["model"].get("ignore_merges"))
    for row in rows:
        if row.ignore_merges == ignore_merges:
            return row.name
    if rows and _merges_reach_every_token(tokenizer_json):
        return rows[0].name
    names = ", ".join(dict.fromkeys(row.name for row in PRE_TOKENIZERS))
    raise _unsupported(f"the pre-tokenizer {_shown(steps, ignore_merges)}", names)


def restore_pre_tokenizer(tokenizer: Tokenizer, pre: str) -> Tokenizer:
    """The same vocabulary, cut the way ``tokenizer.ggml.pre`` says.

    Args:
        tokenizer: byte-level BPE with any pre-tokenizer or none.
        pre: a name of ``KNOWN_PRE_TOKENIZERS``.

    Raises:
        BitconvertError: the name is not in the table.
    """
    if pre not in KNOWN_PRE_TOKENIZERS:
        raise _unsupported(f"the pre-tokenizer '{pre}'", ", ".join(sorted(KNOWN_PRE_TOKENIZERS)))
    row = KNOWN_PRE_TOKENIZERS[pre]
    document: Json = json.loads(tokenizer.to_str())
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [_spelled_out(step) for step in row.steps]}
    document["model"]["ignore_merges"] = row.ignore_merges
    return Tokenizer.from_str(json.dumps(document))


def adds_space_prefix(tokenizer_json: Json) -> bool:
    """Whether a SentencePiece-style tokenizer puts a space before the text (``add_space_prefix``).

    Two spellings exist: a normalizer that prepends and replaces, as converted from Llama 2's tokenizer.model, and
    ``Metaspace``. They differ in text that starts with a space or follows a special token, where ``Metaspace`` may
    leave the prefix out; llama.cpp, like SentencePiece itself, always adds it.

    Raises:
        BitconvertError: the structure is neither.
    """
    normalizers = _flat(tokenizer_json["normalizer"], "normalizers")
    steps = _flat(tokenizer_json["pre_tokenizer"], "pretokenizers")
    if not normalizers and [step["type"] for step in steps] == ["Metaspace"]:
        metaspace = steps[0]
        if metaspace.get("split", True) is False and metaspace["replacement"] == SPACE:
            return bool(metaspace.get("prepend_scheme", "always") != "never")
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepends = {"type": "Prepend", "prepend": SPACE}
    if not steps and normalizers in ([prepends, replaces], [replaces, prepends], [replaces]):
        return prepends in normalizers
    raise _unsupported(
        f"the normalizer {json.dumps(tokenizer_json['normalizer'])} with the pre-tokenizer "
        f"{json.dumps(tokenizer_json['pre_tokenizer'])}",
        "Prepend and Replace, or Metaspace without split",
    )


def _space_like_sentencepiece(tokenizer: Tokenizer) -> None:
    """Always prepend a space, as SentencePiece and llama.cpp do; Metaspace leaves it out before other spaces."""
    kind = type(tokenizer.pre_tokenizer).__name__
    if kind == "Metaspace" and tokenizer.pre_tokenizer.prepend_scheme != "never":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
        tokenizer.pre_tokenizer = None


def _flat(part: Json | None, key: str) -> list[Json]:
    """The members of a (nested) Sequence; a single member counts as a sequence of one."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [leaf for member in part[key] for leaf in _flat(member, key)]


def _step(part: Json) -> Step:
    """Reduce a pre-tokenizer to what decides where it cuts; what is not understood stays whole and matches no row."""
    kind = part["type"]
    if kind == "ByteLevel" and not part["add_prefix_space"]:
        return kind, bool(part.get("use_regex", True))
    if kind == "Digits":
        return kind, bool(part["individual_digits"])
    # "Removed" and inverted is the older spelling: what lies between the matches goes, and everything matches.
    behaviour = (part.get("behavior"), part.get("invert"))
    if kind == "Split" and "Regex" in part["pattern"] and behaviour in (("Isolated", False), ("Removed", True)):
        return kind, _plain_spelling(part["pattern"]["Regex"])
    return kind, json.dumps(part, ensure_ascii=False)


def _plain_spelling(regex: str) -> str:
    """One spelling for expressions that cut alike: raw line ends, grouped contractions, possessive quantifiers."""
    regex = regex.replace("\r", r"\r").replace("\n", r"\n")
    regex = regex.replace("'(?i:[sdmt]|ll|ve|re)", _CONTRACTIONS).replace(r"\p{N}{1}|", r"\p{N}|")
    return regex.replace("]?+", "]?").replace("]++", "]+")


def _spelled_out(step: Step) -> Json:
    kind, value = step
    if kind == "Split":
        return {"type": kind, "pattern": {"Regex": value}, "behavior": "Isolated", "invert": False}
    if kind == "Digits":
        return {"type": kind, "individual_digits": value}
    return {"type": kind, "add_prefix_space": False, "trim_offsets": True, "use_regex": value}


def _shown(steps: tuple[Step, ...], ignore_merges: bool) -> str:
    shown = " + ".join(f"{kind}({value})" for kind, value in steps) or "(none)"
    return shown + (" with ignore_merges" if ignore_merges else "")


def _refuse_normalizer(tokenizer_json: Json) -> None:
    """NFC passes: llama.cpp skips it, which only shows on text that is not NFC (so in its own Qwen files too)."""
    kinds = [part["type"] for part in _flat(tokenizer_json["normalizer"], "normalizers")]
    if kinds not in ([], ["NFC"]):
        raise _unsupported(f"the normalizer {' + '.join(kinds)} before byte-level BPE", "no normalizer, or NFC")


def _merges_reach_every_token(tokenizer_json: Json) -> bool:
    """Whether merging spells every token of the vocabulary, so that ignore_merges makes no difference."""
    plain = Tokenizer.from_str(
        json.dumps(tokenizer_json | {"model": tokenizer_json["model"] | {"ignore_merges": False}})
    )
    added = {token["content"] for token in tokenizer_json["added_tokens"]}
    words = [word for word in tokenizer_json["model"]["vocab"] if word not in added]
    return all(len(plain.model.tokenize(word)) == 1 for word in words)


def _unsupported(what: str, known: str) -> BitconvertError:
    return BitconvertError(f"tokenizer: llama.cpp cannot reproduce {what}", f"supported: {known}")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]
