"""Conversations: read from JSON lines, put into a model's chat template; which of their tokens the assistant says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerFast

from bitconvert.errors import BitconvertError
from bitconvert.models.chat import ChatTemplate, Message
from bitconvert.models.texts import ending_of, read_records, require_encodable, text_files

MESSAGES_FIELD = "messages"
ASSISTANT = "assistant"

_JSON_LINES = ".jsonl"  # compressed or not


class EncodedChat(NamedTuple):
    """A conversation as the model sees it.

    Attributes:
        ids: its tokens.
        said: for each, whether the assistant says it; None where the template does not let that be told.
    """

    ids: list[int]
    said: list[bool] | None


def hold_conversations(sources: Iterable[str]) -> bool:
    """Whether the first record of the sources is a conversation; then all of them are to be."""
    local = [source for source in sources if Path(source).expanduser().exists()]
    first = next((file for file in text_files(local) if ending_of(file).startswith(_JSON_LINES)), None)
    record = next((record for _, record in read_records(first)), None) if first else None
    return isinstance(record, dict) and MESSAGES_FIELD in record


def read_conversations(sources: Iterable[str]) -> Iterator[list[Message]]:
    """The conversations of .jsonl files, one a line, in order.

    Args:
        sources: files, or directories (all texts below them, sorted by path).

    Raises:
        BitconvertError: naming the line that is none, or the file of another type.
    """
    for file in text_files(sources):
        if not ending_of(file).startswith(_JSON_LINES):
            raise BitconvertError(
                f"{file}: conversations are read from {_JSON_LINES} files", "give texts and conversations apart"
            )
        for where, record in read_records(file):
            yield _checked(where, record)


def _checked(where: str, record: Any) -> list[Message]:
    messages = record.get(MESSAGES_FIELD) if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages:
        raise BitconvertError(
            f"{where}: no list '{MESSAGES_FIELD}'",
            f'each line reads {{"{MESSAGES_FIELD}": [{{"role": "user", "content": "…"}}, …]}}',
        )
    return [_checked_message(f"{where}: message {number}", message) for number, message in enumerate(messages, start=1)]


def _checked_message(where: str, message: Any) -> Message:
    checked: Message = {}
    for key in ("role", "content"):
        text = message.get(key) if isinstance(message, dict) else None
        if not isinstance(text, str):
            raise BitconvertError(f"{where} has no string '{key}'", "a message has a role and a content")
        require_encodable(where, text)
        checked[key] = text
    return checked


def encode_chat(tokenizer: PreTrainedTokenizerFast, template: ChatTemplate, messages: list[Message]) -> EncodedChat:
    """The tokens of a conversation in the model's chat template, and which of them the assistant says.

    The template tells by its ``generation`` tags. Most have none: then a turn of the assistant's is what the text grows
    by from the conversation before it, with the turn begun, to the one that it ends. That is so if each is the start of
    the next; not where a template writes earlier turns in another way, without their reasoning for instance.

    Raises:
        BitconvertError: as ``ChatTemplate.render``.
    """
    text, marked = template.render(messages)
    turns = marked if template.marks_turns else _assistant_turns(template, messages, text)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    if turns is None:
        return EncodedChat(encoded["input_ids"], None)
    begins = (begin for begin, _ in encoded["offset_mapping"])
    return EncodedChat(encoded["input_ids"], [any(begin in turn for turn in turns) for begin in begins])


def _assistant_turns(template: ChatTemplate, messages: list[Message], text: str) -> list[range] | None:
    """Where in the text the assistant's turns stand, end marks included; None if that cannot be told."""
    turns = []
    for index, message in enumerate(messages):
        if message["role"] == ASSISTANT:
            before = template.render(messages[:index], asks_for_more=True).text if index else ""
            after = template.render(messages[: index + 1]).text
            if not (after.startswith(before) and text.startswith(after)):
                return None
            turns.append(range(len(before), len(after)))
    return turns
