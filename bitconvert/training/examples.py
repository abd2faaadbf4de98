"""What an adapter learns from: windows of a text, or conversations, and of these what the assistant says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from bitconvert.errors import BitconvertError
from bitconvert.models.chat import ChatTemplate
from bitconvert.models.conversations import EncodedChat, encode_chat, hold_conversations, read_conversations
from bitconvert.recipe import Adaptation
from bitconvert.report.reporter import Reporter
from bitconvert.training.data import Windows, first_windows, split_held_out, tokenize
from bitconvert.training.distill import IGNORED


class Conversation(NamedTuple):
    """One conversation, cut off where the context ends.

    Attributes:
        ids: int64, shape (tokens,).
        labels: the same, ``IGNORED`` where a token is not learned.
    """

    ids: Tensor
    labels: Tensor


class Conversations(Windows):
    """Windows that each hold a conversation and end with it, to be batched by ``padded``."""

    def __init__(self, conversations: Sequence[Conversation], context: int) -> None:
        self._conversations = conversations
        self.context = context
        self.tokens = sum(len(conversation.ids) for conversation in conversations)

    def __len__(self) -> int:
        return len(self._conversations)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids, labels = self._conversations[index]
        return {"input_ids": ids, "labels": labels}


def padded(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch, as long as its longest row. Nothing looks ahead at the padding, so it needs no mask of its own."""
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad([row["input_ids"] for row in rows], batch_first=True, padding_value=0),
        "labels": pad([row["labels"] for row in rows], batch_first=True, padding_value=IGNORED),
    }


@dataclass(frozen=True)
class Lessons:
    """What an adapter is trained and measured on.

    Attributes:
        training: windows or conversations.
        held_out: the same.
        description: where they come from, in words.
    """

    training: Windows
    held_out: Windows
    description: str


def read_lessons(options: Adaptation, tokenizer: PreTrainedTokenizerFast, name: str, reporter: Reporter) -> Lessons:
    """Read the conversations, or the text, that the options name.

    Args:
        options: sources, context, and what is held out.
        tokenizer: of the model, with its chat template.
        name: the model as the user named it, for errors.
        reporter: told about the progress, and about what is left out.

    Raises:
        BitconvertError: a source is missing or malformed, too short, or the model has no chat template.
    """
    data, context = options.data, options.training.context
    if hold_conversations(data.sources):
        return _read_conversations(options, tokenizer, name, reporter)
    tokens = tokenize(data.sources, tokenizer, reporter)
    if data.held_out:
        held_out = first_windows(tokenize(data.held_out, tokenizer, reporter), data.held_out_tokens, context)
        return Lessons(first_windows(tokens, len(tokens), context), held_out, tokens.description)
    return Lessons(*split_held_out(tokens, data.held_out_tokens, context), tokens.description)


def _read_conversations(
    options: Adaptation, tokenizer: PreTrainedTokenizerFast, name: str, reporter: Reporter
) -> Lessons:
    data, context = options.data, options.training.context
    description = ", ".join(data.sources)
    reporter.stage(f"reading the conversations of {description}")
    training = _encoded(data.sources, tokenizer, context, name, reporter)
    if data.held_out:
        measured = _encoded(data.held_out, tokenizer, context, name, reporter)
        count = _whole_rows(measured, data.held_out_tokens)
        return Lessons(Conversations(training, context), Conversations(measured[:count], context), description)
    count = min(_whole_rows(training[::-1], data.held_out_tokens), max(1, len(training) // 10))
    if count == len(training):
        raise BitconvertError(f"{description}: one conversation is too few", "give more, or name data.held_out too")
    return Lessons(Conversations(training[:-count], context), Conversations(training[-count:], context), description)


def _whole_rows(conversations: Sequence[Conversation], tokens: int) -> int:
    """How many of the first conversations hold so many tokens together, at least one."""
    total = 0
    for count, conversation in enumerate(conversations, start=1):
        total += len(conversation.ids)
        if total >= tokens:
            return count
    return len(conversations)


def _in_template(sources: Sequence[str], tokenizer: PreTrainedTokenizerFast, name: str) -> Iterator[EncodedChat]:
    with ChatTemplate(tokenizer, name) as template:
        for messages in read_conversations(sources):
            yield encode_chat(tokenizer, template, messages)


def _encoded(
    sources: Sequence[str], tokenizer: PreTrainedTokenizerFast, context: int, name: str, reporter: Reporter
) -> list[Conversation]:
    """The conversations in which the assistant says anything before the context ends."""
    found, cut, silent, untold = [], 0, 0, 0
    for encoded in _in_template(sources, tokenizer, name):
        ids = torch.tensor(encoded.ids[:context])
        said = torch.ones_like(ids, dtype=torch.bool)
        if encoded.said is None:
            untold += 1
        else:
            said = torch.tensor(encoded.said[:context], dtype=torch.bool)
        cut += len(encoded.ids) > context
        if said[1:].any():
            found.append(Conversation(ids, torch.where(said, ids, IGNORED)))
        else:
            silent += 1
    for count, what in (
        (cut, f"are longer than training.context={context} and were cut off there"),
        (silent, "were left out: the assistant says nothing before the context ends"),
        (untold, "are learned whole: the chat template does not let the assistant's turns be told apart"),
    ):
        if count:
            reporter.warn(f"{count:,} conversations {what}")
    if not found:
        raise BitconvertError(f"{', '.join(sources)}: no conversation to learn from", "give some with assistant turns")
    return found
