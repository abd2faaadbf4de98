"""Tokenizers and tiny random models of every kind, made on the spot; nothing is downloaded."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gguf
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from bitconvert.models.checkpoint import Checkpoint, open_checkpoint
from bitconvert.models.families import FAMILIES
from bitconvert.models.gguf_tensors import gguf_names, to_gguf_rows
from bitconvert.models.gguf_types import F32, GgufType, register_q2_0
from bitconvert.packing.gguf.container import GgufContainer
from bitconvert.packing.gguf.vocabulary import Vocabulary, vocabulary_of

torch.set_num_threads(1)  # the models are tiny, and tests run side by side

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"

NASTY = (
    "",
    " ",
    "   ",
    "Hello, world!",
    " leading and trailing ",
    "  two  spaces   three    four",
    "tabs\tand\t\tmore\n\tindented",
    "line\nline\n\nparagraph\r\nwindows\r\n\r\n  \n  mixed \n",
    "trailing newlines\n\n\n",
    "\n\n\n leading newlines",
    "I'm you're we've they'll he'd it's don't I'M YOU'RE 'tis rock'n'roll ''s",
    "1 12 123 1234 12345678901234567890 3.14159 1,000,000 v1.2.3 0x1F 2nd ½ Ⅻ ٣٤٥ １２３ x²",
    "def f(x: int) -> list[str]:\n    return [f'{i:>3}' for i in range(x)]  # comment\n",
    "for(int i=0;i<n;++i){a[i]+=b[i]<<2;}//!?...",
    '<div class="a">&nbsp;</div> https://example.org/a?b=c&d=%20#frag user@example.org',
    "中文字符，没有空格。日本語のテキスト、カタカナ。한국어 문장입니다. 混合mixed文字123号",
    "Ελληνικά Кириллица עברית العربية हिन्दी ไทย Ünïcödé straße ŒUVRE Ǆ ǅ ǆ ʰʷ",
    "emoji 😀😃👨‍👩‍👧‍👦🏳️‍🌈👍🏽 ©®™ €£¥ ½ ∑∫√ → ←",
    "combining e\u0301 a\u0308\u0304 n\u0303 \u0301start z\u0335\u0321",
    "zero\u200bwidth\u200djoiner\u2060 nbsp\u00a0ideographic\u3000line\u2028para\u2029nel\u0085feff\ufeff",
    "control \x01\x02\x1b[0m \x1c\x1d\x1e\x1f \x7f \x0b\x0c",
    "quotes “curly” ‘single’ «guillemets» — em – en … ¿qué? ¡sí!",
    "camelCase PascalCase snake_case SCREAMING_CASE kebab-case iPhone NASA's McDonald",
    "$100 +1 <= >= != == && || ^~`|\\ _underscore_ **bold** __init__ #hash @at",
    "a.b,c;d:e!f?g(h)i[j]k{l}m/n\\o|p-q_r=s+t*u&v^w%x$y#z@",
    "ThisIsALongCamelCaseWordWITHCAPSAndLowerÉÀéà end",
    "  \t \n \t  \n\n  x  \n",
    "....!!!!????----====____~~~~",
    "word\u00ad soft hyphen, \U0001d54f\U0001d4b6 math letters, \U00020000 rare han, \ue000 private",
)

LONG_RUNS = (*(f"{run * 40}x" for run in (" ", "\n", "\t", "1", "!")), "x" + " \n" * 20)


def texts_with(tokens: Iterable[str]) -> list[str]:
    """Texts that hold special tokens in every position, with and without white space around them."""
    patterns = ("{0}", "a{0}b", " {0} x", "x  {0}   y", "{0}{0}", "{0}\n{0}\n\n  tail", "{0}中文{0}\tdef f(x):")
    return [pattern.format(token) for token in tokens for pattern in patterns]


_SENTENCES = (
    "The quick brown fox jumps over the lazy dog, and the dog doesn't mind at all.",
    "Once upon a time there was a little girl who lived near the forest with her grandmother.",
    "She counted 1, 2, 3, 10, 25, 100 and 1234567 stars; it's 3.14 o'clock, they said.",
    "def add(a, b):\n    return a + b\n\nfor i in range(10):\n    print(i, add(i, 1))\n",
    "Il était une fois, à l'orée du bois, une vieille maison où vivait un garçon.",
    "Привет, мир! Сегодня хорошая погода. 今日はいい天気ですね。你好，世界！안녕하세요.",
)

LLAMA3_ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}


# ---- tokenizers ---------------------------------------------------------------------------------------------------


def byte_level_bpe(pre_tokenizer: Any = None, vocab_size: int = 700, **options: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer as anyone would train it: GPT-2's pre-tokenizer unless another is given."""
    tokenizer = _trained_bytes(
        pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False), _SENTENCES, vocab_size
    )
    return _fast(tokenizer, bos_token="<|begin|>", eos_token="<|end|>", pad_token="<|pad|>", **options)


def cutting_bpe(pre_tokenizer: Any, *, ignore_merges: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer whose ids show every wrong cut: its merges cross all boundaries of the nasty strings."""
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = _trained_bytes(whole, NASTY, 1600)
    document = json.loads(tokenizer.to_str())
    document["model"]["ignore_merges"] = ignore_merges
    # A word that no merge spells shows whether ignore_merges is heeded; it takes the id of <think>, the last token.
    thought = document["added_tokens"][-1]
    document["model"]["vocab"]["ĠPascalCase"] = thought["id"]
    thought["id"] += 1
    tokenizer = Tokenizer.from_str(json.dumps(document))
    tokenizer.pre_tokenizer = pre_tokenizer
    return _fast(tokenizer, bos_token="<|begin|>", eos_token="<|end|>")


def _trained_bytes(pre_tokenizer: Any, texts: tuple[str, ...], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|begin|>", "<|end|>", "<|pad|>", "<|im_start|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return tokenizer


def sentencepiece_bpe(form: str = "normalizer") -> PreTrainedTokenizerFast:
    """A vocabulary like Llama 2's: bytes, characters and every pair that spells a token, best score first.

    Args:
        form: how the space is put in front: "normalizer" (Llama 2), "metaspace" or "none".
    """
    pieces = _sentencepiece_pieces()
    vocabulary = {token: index for index, token in enumerate(pieces)}
    merges = [
        (token[:cut], token[cut:])
        for token in pieces[259:]
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if form == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="first", split=False)
    else:
        prepend = [normalizers.Prepend(SPACE)] if form == "normalizer" else []
        tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", SPACE)])
    strip = [] if form == "none" else [decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    return _fast(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def gemma_bpe(*, own_tab: bool = False) -> PreTrainedTokenizerFast:
    """Gemma's structure: no space in front, added tokens for runs of newlines and for HTML, "\\t" in a byte's place.

    Args:
        own_tab: Gemma 3's way: the tab is a token besides the byte.
    """
    added = ["\n", "\n\n", "\n\n\n", "\n\n\n\n", "<table>", "</table>", "<unused0>", SPACE * 8]

    def like_gemma(document: dict[str, Any]) -> None:
        document["pre_tokenizer"] = {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        }
        vocabulary, merges = document["model"]["vocab"], document["model"]["merges"]
        if own_tab:
            vocabulary["\t"] = len(vocabulary)
        else:
            vocabulary["\t"] = vocabulary.pop("<0x09>")
        _add_tokens(document, added, special=False)
        merges.append([SPACE * 4, SPACE * 4])  # the eight spaces are a piece too

    return _edited(sentencepiece_bpe("none"), like_gemma)


def phi3_bpe() -> PreTrainedTokenizerFast:
    """Phi-3's structure: Llama 2's, with added tokens most of which swallow the white space after them."""

    def like_phi3(document: dict[str, Any]) -> None:
        _add_tokens(document, ["<|endoftext|>", "<|assistant|>", "<|end|>", "<|user|>"], special=True)
        for token in document["added_tokens"]:
            token["rstrip"] = token["content"] not in ("<unk>", "<s>", "<|endoftext|>")

    return _edited(sentencepiece_bpe(), like_phi3)


def neox_bpe() -> PreTrainedTokenizerFast:
    """GPT-NeoX's structure (StableLM, OLMo): NFC, and added tokens for runs of spaces."""

    def like_neox(document: dict[str, Any]) -> None:
        document["normalizer"] = {"type": "NFC"}
        thought = document["added_tokens"][-1]
        document["model"]["vocab"][thought["content"]] = thought["id"]  # or the next token would get its id
        _add_tokens(document, [" " * count for count in range(2, 25)], special=False, normalized=True)

    return _edited(cutting_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False)), like_neox)


def falcon3_bpe(tokens: Iterable[str] = ()) -> PreTrainedTokenizerFast:
    """Falcon 3's structure: punctuation by itself, GPT-2's expression, every digit by itself.

    Args:
        tokens: to be in the vocabulary besides; one that joins digits shows where they are cut off.
    """

    def like_falcon(document: dict[str, Any]) -> None:
        model = document["model"]
        joined = {word for word in model["vocab"] if len(word) > 1 and any(map(str.isnumeric, word))}
        model["merges"] = [pair for pair in model["merges"] if not joined & {*pair, "".join(pair)}]
        kept = [word for word in model["vocab"] if word not in joined]
        ids = {word: index for index, word in enumerate([*kept, *tokens])}
        model["vocab"] = ids
        for token in document["added_tokens"]:
            token["id"] = ids.setdefault(token["content"], len(ids))
        document["pre_tokenizer"] = {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Punctuation", "behavior": "Contiguous"},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
                {"type": "Digits", "individual_digits": True},
            ],
        }

    return _edited(cutting_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False)), like_falcon)


def _edited(tokenizer: PreTrainedTokenizerFast, edit: Callable[[dict[str, Any]], None]) -> PreTrainedTokenizerFast:
    """The tokenizer after a change to its tokenizer.json."""
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    edit(document)
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(document))
    return tokenizer


def _add_tokens(document: dict[str, Any], tokens: list[str], *, special: bool, normalized: bool = False) -> None:
    vocabulary = document["model"]["vocab"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": normalized, "special": special}
    highest = max(*vocabulary.values(), *(token["id"] for token in document["added_tokens"]))
    for token in tokens:
        if token not in vocabulary:
            highest = vocabulary[token] = highest + 1
        document["added_tokens"].append({"id": vocabulary[token], "content": token, **flags})
    document["added_tokens"].sort(key=lambda token: token["id"])


def _sentencepiece_pieces() -> list[str]:
    """Special tokens, bytes, then merged pieces from short to long, then characters, as SentencePiece orders them."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    trained.train_from_iterator(_SENTENCES, trainers.BpeTrainer(vocab_size=500, show_progress=False))
    learned = trained.get_vocab()
    words = sorted((token for token in learned if len(token) > 1), key=learned.__getitem__)
    characters = sorted(token for token in learned if len(token) == 1)
    spaces = [SPACE * 2, SPACE * 4]
    merged = list(dict.fromkeys([*words, *spaces]))
    return ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *merged, *characters]


def _fast(tokenizer: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **options)


# ---- models -------------------------------------------------------------------------------------------------------


def digits_and_bytes() -> Any:
    """SmolLM's pre-tokenizer: every digit by itself, then GPT-2's expression."""
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def llama3_pre_tokenizer() -> Any:
    """Llama 3's published pre-tokenizer."""
    regex = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def with_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer, with a post-processor that puts BOS before every text."""
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    return tokenizer


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}


def longrope(dimensions: int, original: int) -> dict[str, Any]:
    """LongRoPE with factors that differ from pair to pair, and the short ones from the long ones."""
    short = [1 + 0.05 * pair for pair in range(dimensions // 2)]
    long = [1 + 0.5 * pair for pair in range(dimensions // 2)]
    return {
        "max_position_embeddings": 4 * original,
        "original_max_position_embeddings": original,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": short,
            "long_factor": long,
            "original_max_position_embeddings": original,
        },
    }


VARIANTS: dict[str, tuple[Callable[[], PreTrainedTokenizerFast], dict[str, Any]]] = {
    "llama2": (sentencepiece_bpe, {"num_key_value_heads": 4, "rms_norm_eps": 1e-6}),
    "tinyllama": (lambda: sentencepiece_bpe("metaspace"), {"num_key_value_heads": 1}),
    "llama3": (
        lambda: with_bos(cutting_bpe(llama3_pre_tokenizer(), ignore_merges=True)),
        {
            "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3_ROPE},
            "tie_word_embeddings": True,
        },
    ),
    "smollm2": (
        lambda: byte_level_bpe(digits_and_bytes()),
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}, "tie_word_embeddings": True},
    ),
    "falcon3": (falcon3_bpe, {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 256}),
    "biased": (byte_level_bpe, {"attention_bias": True, "mlp_bias": True}),
    "linear": (byte_level_bpe, {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "yarn": (byte_level_bpe, {"rope_parameters": YARN}),
    "mistral": (sentencepiece_bpe, {"model_type": "mistral", "head_dim": 32, "sliding_window": None}),
    "ministral": (byte_level_bpe, {"model_type": "ministral", "head_dim": 64, "sliding_window": 512}),
    "ministral3": (
        byte_level_bpe,
        {
            "model_type": "ministral3",
            "head_dim": 32,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.5},
        },
    ),
    "qwen2": (byte_level_bpe, {"model_type": "qwen2", "tie_word_embeddings": True}),
    "qwen2-yarn": (byte_level_bpe, {"model_type": "qwen2", "rope_parameters": YARN}),
    "qwen3": (byte_level_bpe, {"model_type": "qwen3", "head_dim": 32}),
    "gemma": (
        gemma_bpe,
        {"model_type": "gemma", "num_key_value_heads": 1, "head_dim": 128, "tie_word_embeddings": True},
    ),
    "gemma2": (
        gemma_bpe,
        {
            "model_type": "gemma2",
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 64,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "num_hidden_layers": 4,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3": (
        gemma_bpe,
        {
            "model_type": "gemma3_text",
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 64,
            "num_hidden_layers": 7,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3-linear": (
        gemma_bpe,
        {
            "model_type": "gemma3_text",
            "head_dim": 64,
            "query_pre_attn_scalar": 64,
            "sliding_window": 64,
            "num_hidden_layers": 6,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 50000.0, "factor": 4.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 3000.0},
            },
        },
    ),
    "phi3": (phi3_bpe, {"model_type": "phi3"}),
    "phi3-short": (phi3_bpe, {"model_type": "phi3", **longrope(64, 512)}),
    "phi3-long": (phi3_bpe, {"model_type": "phi3", **longrope(64, 128)}),
    "phi4": (
        byte_level_bpe,
        {"model_type": "phi3", "tie_word_embeddings": True, "partial_rotary_factor": 0.75, **longrope(48, 128)},
    ),
    "smollm3": (
        byte_level_bpe,
        {"model_type": "smollm3", "num_hidden_layers": 5, "tie_word_embeddings": True},
    ),
    "granite": (
        byte_level_bpe,
        {
            "model_type": "granite",
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.07,
            "residual_multiplier": 0.7,
            "logits_scaling": 0.5,
        },
    ),
    "granite-biased": (byte_level_bpe, {"model_type": "granite", "attention_bias": True, "mlp_bias": True}),
    "olmo2": (byte_level_bpe, {"model_type": "olmo2"}),
    "stablelm": (byte_level_bpe, {"model_type": "stablelm", "use_qkv_bias": True}),
    "stablelm-parallel": (
        byte_level_bpe,
        {"model_type": "stablelm", "use_parallel_residual": True, "partial_rotary_factor": 0.5},
    ),
    "glm4": (byte_level_bpe, {"model_type": "glm4", "head_dim": 64}),
    "glm4-unbiased": (
        byte_level_bpe,
        {"model_type": "glm4", "head_dim": 32, "attention_bias": False, "partial_rotary_factor": 1},
    ),
}
"""One row for each way in which models differ: a tokenizer, and what its config says unlike ``write_model``'s."""


def write_model(directory: Path, variant: str, *, padding_rows: int = 4, layers: int = 2, **changes: Any) -> Path:
    """Write a tiny random model of a variant as a Hugging Face directory.

    Everything that could be lost on the way is random: norms and biases too, and q and k are large enough that every
    error in the rotary embedding shows.
    """
    tokenizer = VARIANTS[variant][0]()
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    shape = {"vocab_size": len(tokenizer) + padding_rows, "num_hidden_layers": layers}
    random_model(variant, **special | shape | VARIANTS[variant][1] | changes).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def random_model(variant: str, **changes: Any) -> PreTrainedModel:
    """The model of ``write_model``, with no tokenizer beside it."""
    shape = {
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "vocab_size": 64,
        "tie_word_embeddings": False,
    }
    config = AutoConfig.for_model(**copy.deepcopy(shape | VARIANTS[variant][1] | changes))
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    _randomize(model)
    return model


def _randomize(model: PreTrainedModel) -> None:
    generator = torch.Generator().manual_seed(7)
    unit = 1 - FAMILIES[model.config.model_type].norm_shift
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("norm.weight"):  # in bfloat16, as published: adding 1 to them loses nothing
            parameter.data = (unit + 0.2 * noise).bfloat16().float()
        elif name.endswith("bias"):
            parameter.data = 0.3 * noise
        else:
            parameter.data = noise / parameter.shape[-1] ** 0.5


def vocabulary(checkpoint: Checkpoint) -> Vocabulary:
    """The tokenizer of a model directory as llama.cpp will know it."""
    return vocabulary_of(checkpoint.tokenizer(), checkpoint.complete.vocab_size, checkpoint.config)


def write_gguf(directory: Path, path: Path, gguf_type: GgufType = F32) -> Path:
    """Write a model directory as a GGUF file: matrices in one type, vectors in F32."""
    register_q2_0()
    checkpoint = open_checkpoint(str(directory))
    names = gguf_names(checkpoint.tensor_names(), checkpoint.complete, checkpoint.family)
    container = GgufContainer(path, checkpoint, vocabulary(checkpoint), gguf_type.file_type)
    types = {name: gguf_type if len(checkpoint.shape(name)) == 2 else F32 for name in names}
    for name, gguf_name in names.items():
        shape = checkpoint.shape(name)
        rows = shape[0] if len(shape) == 2 else 1
        nbytes = rows * types[name].row_bytes(shape[-1])
        container.add_tensor(gguf_name, shape, types[name].ggml(), nbytes)
    container.begin()
    for name in names:
        values = to_gguf_rows(checkpoint.read(name), name, checkpoint.complete, checkpoint.family)
        container.write(gguf.quantize(values.float().numpy(), types[name].ggml()))
    container.close()
    return path
