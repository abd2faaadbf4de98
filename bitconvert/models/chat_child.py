"""The process in which a chat template runs: ``python -m bitconvert.models.chat_child``, started by ``chat``.

Each line of JSON on stdin, after a first one about the template, is answered by one on stdout; torch is never imported.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

_LONGEST_PROMPT = 2**20  # characters
_LONGEST_REASON = 200


def main() -> None:
    """Render, under limits that the system enforces (but for Windows, where only the parent's clock remains)."""
    setup = json.loads(sys.stdin.readline())
    from transformers.utils.chat_template_utils import render_jinja_template

    with contextlib.suppress(ImportError):
        _limit_memory(setup["megabytes"])
    print(json.dumps({}), flush=True)
    for line in sys.stdin:
        with contextlib.suppress(ImportError):
            _limit_computing(setup["seconds"])
        print(json.dumps(answer(render_jinja_template, setup | json.loads(line))), flush=True)


def answer(render: Any, request: dict[str, Any]) -> dict[str, Any]:
    """The text and the assistant's spans in it, or why there is none."""
    try:
        (text,), marked = render(
            [request["messages"]],
            chat_template=request["template"],
            return_assistant_tokens_mask=request["marks_turns"],
            add_generation_prompt=request["asks_for_more"],
            **request["tokens"],
        )
    except MemoryError:
        return {"refusal": f"it takes more than {request['megabytes']} MB of memory"}
    except Exception as error:  # a template is a program: it may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return {"refusal": reason[:_LONGEST_REASON]}
    if len(text) > _LONGEST_PROMPT:
        return {"refusal": f"it writes {len(text)} characters"}
    return {"text": text, "said": marked[0] if marked else []}


def _limit_computing(seconds: int) -> None:
    """Kill this process after so much more computing."""
    import resource

    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used) + seconds, most))


def _limit_memory(megabytes: int) -> None:
    """Refuse this process more memory than that, on top of what it has."""
    import resource

    size = _address_space()
    if size:
        resource.setrlimit(resource.RLIMIT_AS, (size + megabytes * 2**20,) * 2)


def _address_space() -> int:
    """Bytes of this process's address space; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
