"""Conversations in a model's chat template, which is a program that came with the model.

jinja2's sandbox (transformers renders in its immutable one) keeps it from everything but its own values. It may still
count to infinity, or build a string larger than memory: so it runs in a child process, for seconds and megabytes.
"""

from __future__ import annotations

import json
import re
import subprocess
import threading
from types import TracebackType
from typing import Any, NamedTuple, Self

from transformers import PreTrainedTokenizerFast

from bitconvert.errors import BitconvertError
from bitconvert.models.child import child_command, child_environment

Message = dict[str, str]
"""``role`` (system, user, assistant) and ``content``."""

SECONDS = 5
"""Of computing for a conversation; real templates take thousandths of one."""

_MEGABYTES = 512  # beyond what the interpreter itself takes
_START_SECONDS = 60  # until the child has imported what it needs, on a machine that is busy
_HINT = "do without --chat, or conversations; or mend chat_template.jinja"

_MARKS_TURNS = re.compile(r"\{%-?\s*generation\b")
"""By this tag a template says itself which parts of a conversation are the assistant's."""


class Rendered(NamedTuple):
    """A conversation as text with special tokens.

    Attributes:
        text: all of it.
        said: where in it the assistant's turns stand, as far as the template marks them.
    """

    text: str
    said: list[range]


class ChatTemplate:
    """A model's template at work, inside a ``with`` block.

    Args:
        tokenizer: of the model, with its template.
        name: of the model, for the error lines.

    Raises:
        BitconvertError: there is no template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, name: str) -> None:
        if tokenizer.chat_template is None:
            raise BitconvertError(f"{name}: it has no chat template", "give plain text: it continues a text")
        template = tokenizer.get_chat_template()
        self.marks_turns = bool(_MARKS_TURNS.search(template))
        self._name = name
        self._setup = {
            "template": template,
            "marks_turns": self.marks_turns,
            "tokens": {key: str(token) for key, token in tokenizer.special_tokens_map.items()},
            "seconds": SECONDS,
            "megabytes": _MEGABYTES,
        }

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            child_command("bitconvert.models.chat_child"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=child_environment(),
            text=True,
            encoding="utf-8",
        )
        self._ask(self._setup)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def render(self, messages: list[Message], *, asks_for_more: bool = False) -> Rendered:
        """A conversation as the model reads it.

        Args:
            messages: in order.
            asks_for_more: whether the assistant's next turn is to be begun.

        Raises:
            BitconvertError: the template fails, asks for what a template has no business with, does not end, or writes
                nothing or a book.
        """
        answer = self._ask({"messages": messages, "asks_for_more": asks_for_more})
        if "refusal" in answer:
            raise BitconvertError(f"{self._name}: its chat template fails ({answer['refusal']})", _HINT)
        if not answer["text"].strip():
            raise BitconvertError(f"{self._name}: its chat template writes nothing", _HINT)
        return Rendered(answer["text"], [range(*span) for span in answer["said"]])

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        alarm = threading.Timer(_START_SECONDS + SECONDS, process.kill)  # where the system limits no computing
        alarm.start()
        try:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            answer: dict[str, Any] = json.loads(process.stdout.readline())
        except (OSError, ValueError) as error:  # killed at its limit, it has said nothing
            raise BitconvertError(
                f"{self._name}: its chat template does not end within {SECONDS} seconds", _HINT
            ) from error
        finally:
            alarm.cancel()
        return answer
