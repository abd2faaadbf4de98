"""Which tokens of a text are scored, and with what before them: the conventions behind a perplexity.

A perplexity says nothing without its convention, and two are in use:

- ``hf``: windows of ``context`` tokens, begun every ``stride`` tokens; of each window only the tokens that no earlier
  window scored (the last ``stride`` ones) count. The last window may be short. Without a stride the windows do not
  overlap. BOS, if the model wants it, stands once before the text. Source: "Perplexity of fixed-length models" in the
  documentation of Hugging Face transformers.
- ``llama.cpp``: windows of ``context`` tokens that do not overlap; only the second half of each counts, and a short
  last window is dropped. BOS, if the model wants it, takes the place of each window's first token. Source:
  ``perplexity`` in llama.cpp's tools/perplexity/perplexity.cpp.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from bitconvert.errors import BitconvertError, UsageError

Convention = Literal["hf", "llama.cpp"]


@dataclass(frozen=True)
class TokenizedText:
    """A text as a model sees it.

    Attributes:
        ids: int64, shape (n,); without BOS.
        starts: int64, shape (n + 1,): the byte of the UTF-8 text at which each token begins, then the text's length.
        sha256: of the UTF-8 text, hexadecimal.
        bos: the id of BOS if it is to be put before the text, else None.
    """

    ids: Tensor
    starts: Tensor
    sha256: str
    bos: int | None


@dataclass(frozen=True)
class Window:
    """What the model sees at once: ``ids`` (length,), of which the last ``scored`` are predicted and counted.

    Attributes:
        ids: int64, shape (length,), BOS included if the convention puts it there.
        scored: how many tokens at the end are scored; less than the length, since each needs one before it.
        bytes_scored: bytes of the text that those tokens stand for.
    """

    ids: Tensor
    scored: int
    bytes_scored: int


def tokenize(text: str, tokenizer: PreTrainedTokenizerFast, bos: int | None) -> TokenizedText:
    """Tokenize a text as a whole, remembering where in it each token begins."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    begins = np.array([begin for begin, _ in encoded["offset_mapping"]] + [len(text)], dtype=np.int64)
    return _tokenized(text, encoded["input_ids"], _byte_of_letter(text)[begins], bos)


def tokenized_elsewhere(text: str, ids: Sequence[int], bos: int | None) -> TokenizedText:
    """A text with ids from a tokenizer that does not tell where its tokens begin: their bytes are taken as equal."""
    starts = np.linspace(0, len(text.encode()), len(ids) + 1).round().astype(np.int64)
    return _tokenized(text, ids, starts, bos)


def first_tokens(text: TokenizedText, count: int) -> TokenizedText:
    """The first ``count`` tokens of a text; its hash stays that of the whole."""
    return replace(text, ids=text.ids[:count], starts=text.starts[: count + 1])


def _tokenized(text: str, ids: Sequence[int], starts: NDArray[np.int64], bos: int | None) -> TokenizedText:
    digest = hashlib.sha256(text.encode()).hexdigest()
    return TokenizedText(torch.tensor(ids, dtype=torch.int64), torch.from_numpy(starts), digest, bos)


def _byte_of_letter(text: str) -> NDArray[np.int64]:
    """Byte of the UTF-8 text at which each code point begins, then the text's length: int64, shape (letters + 1,)."""
    letters = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    sizes = 1 + (letters >= 0x80).astype(np.int64) + (letters >= 0x800) + (letters >= 0x10000)
    return np.concatenate([[0], sizes.cumsum()])


def windows(text: TokenizedText, convention: Convention, context: int, stride: int | None = None) -> list[Window]:
    """Cut a text into the windows of a convention.

    Args:
        text: the tokens.
        convention: ``hf`` or ``llama.cpp``.
        context: tokens a window may hold, BOS included.
        stride: ``hf`` only: tokens from one window's begin to the next's, at most ``context`` (the default).

    Raises:
        BitconvertError: the text is too short for one window (llama.cpp: for two, as llama-perplexity demands), or
            the stride does not fit.
    """
    if context < 2:
        raise UsageError(f"a context of {context} tokens predicts nothing", "give a context of at least 2")
    if convention == "hf":
        return _hf_windows(text, context, context if stride is None else stride)
    if stride not in (None, context):
        raise UsageError("the llama.cpp convention has no stride", "leave the stride out, or use the hf convention")
    return _llama_cpp_windows(text, context)


def _hf_windows(text: TokenizedText, context: int, stride: int) -> list[Window]:
    if not 1 <= stride <= context:
        raise UsageError(f"a stride of {stride} skips tokens or stands still", f"give 1 to {context}, the context")
    head = 0 if text.bos is None else 1  # the text's own BOS is its first token, and never scored
    ids = _with_bos(text)
    _require(len(ids), context, f"one window of {context}")
    found, scored_up_to = [], 1
    for begin in range(0, len(ids), stride):
        end = min(begin + context, len(ids))
        first = max(scored_up_to, begin + 1)
        if first < end:
            found.append(Window(ids[begin:end], end - first, _bytes_between(text, first - head, end - head)))
        scored_up_to = end
        if end == len(ids):
            break
    return found


def _llama_cpp_windows(text: TokenizedText, context: int) -> list[Window]:
    head = 0 if text.bos is None else 1
    ids = _with_bos(text)
    _require(len(ids), 2 * context, f"two windows of {context}, which the llama.cpp convention demands,")
    scored = context - context // 2 - 1
    if scored == 0:
        raise UsageError(f"the second half of {context} tokens predicts nothing", "give a context of at least 3")
    found = []
    for begin in range(0, len(ids) - context + 1, context):
        seen, end = ids[begin : begin + context].clone(), begin + context
        if text.bos is not None:
            seen[0] = text.bos
        found.append(Window(seen, scored, _bytes_between(text, end - scored - head, end - head)))
    return found


def _with_bos(text: TokenizedText) -> Tensor:
    return text.ids if text.bos is None else torch.cat([torch.tensor([text.bos]), text.ids])


def _bytes_between(text: TokenizedText, first: int, end: int) -> int:
    return int(text.starts[end] - text.starts[first])


def _require(have: int, need: int, what: str) -> None:
    if have < need:
        raise BitconvertError(
            f"the text is too short for {what} tokens: it has {have}", "give a longer text or a smaller context"
        )
