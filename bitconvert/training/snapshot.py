"""What a model writes and how it is rounded at one moment: kept from the beginning of a run, to set beside its end."""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from bitconvert.atomic import atomic_directory
from bitconvert.errors import BitconvertError
from bitconvert.models.generation import continuations
from bitconvert.models.record import read_record, save_record
from bitconvert.training.data import Windows
from bitconvert.training.flips import sampled_codes

_TEXTS, _CODES = "texts.json", "codes.safetensors"

_PROMPTS = 4
_PROMPT_TOKENS = 32
_WRITTEN_TOKENS = 64
_REMEDY = "remove the directory and start again"


class Text(BaseModel):
    """A prompt, and what a model wrote after it, always its most probable token."""

    model_config = ConfigDict(extra="forbid")

    prompt: str
    text: str


class _Texts(BaseModel):
    model_config = ConfigDict(extra="forbid")

    texts: tuple[Text, ...]


class Snapshot:
    """One moment of a run.

    Attributes:
        texts: what the model wrote, for the same prompts at each moment.
        codes: a sample of the codes of each ternary matrix, by its module's name (see ``flips``).
    """

    def __init__(self, texts: tuple[Text, ...], codes: dict[str, Tensor]) -> None:
        self.texts = texts
        self.codes = codes

    def save(self, directory: Path) -> None:
        """Write it into a new directory, whole or not at all."""
        with atomic_directory(directory, overwrite=True) as unfinished:  # of an attempt that did not come far
            save_record(_Texts(texts=self.texts), unfinished / _TEXTS)
            save_file(self.codes, unfinished / _CODES)

    @classmethod
    def load(cls, directory: Path) -> Snapshot:
        """Read it back.

        Raises:
            BitconvertError: it is gone, or damaged.
        """
        record = read_record(directory / _TEXTS, _Texts, _REMEDY)
        if record is None:
            raise BitconvertError(f"{directory / _TEXTS}: it is gone", _REMEDY)
        try:
            return cls(record.texts, load_file(directory / _CODES))
        except (OSError, SafetensorError) as error:
            raise BitconvertError(f"{directory / _CODES}: cannot be read ({error})", _REMEDY) from error


def take_snapshot(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, held_out: Windows) -> Snapshot:
    """Let a model write after the beginnings of a few held-out windows, and look at its codes.

    Args:
        model: as it shall be seen: at its λ, under the caller's autocast.
        tokenizer: its own.
        held_out: some of its windows, evenly spread, give the prompts; no text gets longer than a window.
    """
    prompts = _prompts(held_out).to(model.device)
    model.train(False)
    with torch.compiler.set_stance("force_eager"):  # each length of a growing text would be compiled by itself
        written = continuations(model, tokenizer, prompts, min(_WRITTEN_TOKENS, held_out.context - prompts.shape[1]))
    begun: list[str] = tokenizer.batch_decode(prompts)
    texts = tuple(Text(prompt=prompt, text=text) for prompt, text in zip(begun, written, strict=True))
    return Snapshot(texts, {name: codes.cpu() for name, codes in sampled_codes(model).items()})


def _prompts(held_out: Windows) -> Tensor:
    tokens = min(_PROMPT_TOKENS, held_out.context // 2)
    chosen = range(0, len(held_out), max(1, len(held_out) // _PROMPTS))[:_PROMPTS]
    return torch.stack([held_out[index]["input_ids"][:tokens] for index in chosen])
