"""A message in a model's chat template, which is a program that came with the model.

jinja2's sandbox (transformers renders in its immutable one) keeps it from everything but its own values. It may still
count to infinity, or build a string larger than memory: so it runs in a child process, for seconds and megabytes.
"""

from __future__ import annotations

import json
import subprocess

from transformers import PreTrainedTokenizerFast

from bitconvert.errors import BitconvertError
from bitconvert.models.child import child_command, child_environment

SECONDS = 5
"""Of computing; real templates take thousandths of one."""

_MEGABYTES = 512  # beyond what the interpreter itself takes
_START_SECONDS = 60  # until the child has imported what it needs, on a machine that is busy
_HINT = "leave --chat out: it continues a text; or mend chat_template.jinja"


def in_chat_template(tokenizer: PreTrainedTokenizerFast, message: str, name: str) -> str:
    """What the model reads when a user says something and it is its turn.

    Args:
        tokenizer: of the model, with its template.
        message: of the user.
        name: of the model, for the error line.

    Raises:
        BitconvertError: there is no template, or it fails, asks for what a template has no business with, does not end,
            or writes nothing or a book.
    """
    if tokenizer.chat_template is None:
        raise BitconvertError(f"{name}: it has no chat template", "leave --chat out: it continues a text")
    request = {
        "template": tokenizer.get_chat_template(),
        "messages": [{"role": "user", "content": message}],
        "tokens": {key: str(token) for key, token in tokenizer.special_tokens_map.items()},
        "seconds": SECONDS,
        "megabytes": _MEGABYTES,
    }
    answer = _ask(json.dumps(request), name)
    if "refusal" in answer:
        raise BitconvertError(f"{name}: its chat template fails ({answer['refusal']})", _HINT)
    if not answer["text"].strip():
        raise BitconvertError(f"{name}: its chat template writes nothing", _HINT)
    return answer["text"]


def _ask(request: str, name: str) -> dict[str, str]:
    try:
        done = subprocess.run(
            child_command("bitconvert.models.chat_child"),
            input=request.encode(),
            capture_output=True,
            env=child_environment(),
            timeout=_START_SECONDS + SECONDS,
            check=False,
        )
        answer: dict[str, str] = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError) as error:  # killed at its limit, it has said nothing
        raise BitconvertError(f"{name}: its chat template does not end within {SECONDS} seconds", _HINT) from error
    return answer
