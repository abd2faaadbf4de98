"""``bitconvert generate``: let a model write, in torch or in a real llama.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerFast

from bitconvert.errors import BitconvertError, UsageError
from bitconvert.evaluation.arguments import check_generation
from bitconvert.evaluation.runtimes import open_runtime
from bitconvert.evaluation.subjects import TorchModel, has_llama_cpp, llama_cpp_reads, require_gguf
from bitconvert.models.adapter import checked_gguf_adapter
from bitconvert.models.chat import ChatTemplate
from bitconvert.models.checkpoint import Checkpoint, open_checkpoint
from bitconvert.models.generation import continuations
from bitconvert.report.evaluation import GenerateReport
from bitconvert.report.reporter import Reporter, Silent

Choice = Literal["auto", "torch", "llama.cpp"]


def generate(
    name: str,
    prompt: str,
    *,
    max_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
    lora: Path | None = None,
    runtime: Choice = "auto",
    threads: int | None = None,
    reporter: Reporter | None = None,
) -> GenerateReport:
    """Continue a text, or answer a message.

    Args:
        name: hub id, Hugging Face directory (plain, latent, baked or packed) or GGUF file.
        prompt: the text, or with ``chat`` the user's message.
        max_tokens: the most to write; fewer when the model ends, or its context is full.
        temperature: 0 takes the most probable token at each step; 1 draws from the model's own distribution.
        seed: of the draws; the same seed gives the same text in the same runtime.
        chat: put the prompt into the model's chat template.
        lora: an adapter beside the model's weights: a directory of peft's, or a GGUF file (for llama.cpp, the latter or
            a directory that ``adapt`` made).
        runtime: ``torch``, ``llama.cpp`` (GGUF only), or ``auto``: llama.cpp for the GGUF files that
            it reads, where it is installed.
        threads: CPU threads for llama.cpp; None for all.
        reporter: told about the progress.

    Raises:
        BitconvertError: the model cannot be read, has no chat template, or the prompt does not fit its context.
        UsageError: an argument makes no sense.
    """
    reporter = reporter or Silent()
    check_generation(max_tokens, temperature)
    checkpoint = open_checkpoint(name)
    wish = Wish(chat, max_tokens, temperature, seed, lora)
    (report,) = generate_all(checkpoint, [prompt], wish, runtime=runtime, threads=threads, reporter=reporter)
    return report


class Wish(NamedTuple):
    """What is to be written, whatever the prompt: see ``generate``."""

    chat: bool
    max_tokens: int
    temperature: float
    seed: int
    lora: Path | None = None


def generate_all(
    checkpoint: Checkpoint,
    prompts: Sequence[str],
    wish: Wish,
    *,
    runtime: Choice = "auto",
    threads: int | None = None,
    reporter: Reporter,
) -> list[GenerateReport]:
    """``generate`` for several prompts, each from an empty context, with the model loaded once.

    Raises:
        BitconvertError: as ``generate``.
        UsageError: likewise.
    """
    texts = prompt_texts(checkpoint, prompts, wish.chat)
    reporter.stage(f"generate with {checkpoint.name}")
    if _choose(checkpoint, runtime) == "llama.cpp":
        ran, written = _by_llama_cpp(checkpoint, texts, wish, threads)
    else:
        ran, written = "torch", _by_torch(checkpoint, texts, wish)
    return [
        GenerateReport(checkpoint.name, ran, text, told, wish.temperature, wish.seed)
        for text, told in zip(texts, written, strict=True)
    ]


def _choose(checkpoint: Checkpoint, runtime: Choice) -> Choice:
    if runtime == "llama.cpp":
        require_gguf(checkpoint)
    if runtime != "auto":
        return runtime
    return "llama.cpp" if llama_cpp_reads(checkpoint) and has_llama_cpp() else "torch"


def _by_llama_cpp(checkpoint: Checkpoint, texts: list[str], wish: Wish, threads: int | None) -> tuple[str, list[str]]:
    """llama.cpp's name, and what it wrote."""
    tokenizer = checkpoint.tokenizer()
    lengths = [len(tokenizer(text, add_special_tokens=not wish.chat)["input_ids"]) for text in texts]
    rooms = [_room(checkpoint, length, wish.max_tokens) for length in lengths]
    adapter = None if wish.lora is None else checked_gguf_adapter(wish.lora, checkpoint)
    with open_runtime(checkpoint.path, max(rooms), lora=adapter, threads=threads) as runtime:
        # Templates write BOS themselves, and llama.cpp would add another.
        without_bos = wish.chat and runtime.add_bos
        written = [
            runtime.generate(
                _without_bos(text, tokenizer) if without_bos else text, room - length, wish.temperature, wish.seed
            )
            for text, length, room in zip(texts, lengths, rooms, strict=True)
        ]
        return f"{runtime.name} {runtime.version}", written


def _by_torch(checkpoint: Checkpoint, texts: list[str], wish: Wish) -> list[str]:
    """What torch wrote."""
    loaded = TorchModel.load(checkpoint, wish.lora)
    return [_written_by(loaded, checkpoint, text, wish) for text in texts]


def _written_by(loaded: TorchModel, checkpoint: Checkpoint, text: str, wish: Wish) -> str:
    encoded = loaded.tokenizer(text, add_special_tokens=not wish.chat, return_tensors="pt")
    ids = encoded["input_ids"].long().to(loaded.model.device)
    room = _room(checkpoint, ids.shape[1], wish.max_tokens)
    if ids.shape[1] == 0:
        raise UsageError("the prompt is empty, and this model has no BOS to begin with", "give a --prompt")
    (written,) = continuations(
        loaded.model, loaded.tokenizer, ids, room - ids.shape[1], temperature=wish.temperature, seed=wish.seed
    )
    return written


def _room(checkpoint: Checkpoint, prompt_tokens: int, max_tokens: int) -> int:
    """Tokens of prompt and continuation together."""
    limit = checkpoint.max_context
    if prompt_tokens >= limit:
        raise BitconvertError(
            f"the prompt of {prompt_tokens} tokens fills the model's context of {limit}", "give a shorter prompt"
        )
    return min(limit, prompt_tokens + max_tokens)


def prompt_texts(checkpoint: Checkpoint, prompts: Sequence[str], chat: bool) -> list[str]:
    """Prompts as the model gets them.

    Raises:
        BitconvertError: they are to be put into a chat template, and there is none, or it cannot be trusted.
    """
    if not chat:
        return list(prompts)
    with ChatTemplate(checkpoint.tokenizer(), checkpoint.name) as template:
        asked = ([{"role": "user", "content": prompt}] for prompt in prompts)
        return [template.render(messages, asks_for_more=True).text for messages in asked]


def _without_bos(text: str, tokenizer: PreTrainedTokenizerFast) -> str:
    return text.removeprefix(str(tokenizer.bos_token)) if tokenizer.bos_token else text
