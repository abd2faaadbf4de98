"""The process in which a chat template runs: ``python -m bitconvert.models.chat_child``, started by ``chat``.

Asked once, in JSON over stdin, it answers in JSON over stdout; it never imports torch.
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
    request = json.load(sys.stdin)
    from transformers.utils.chat_template_utils import render_jinja_template

    with contextlib.suppress(ImportError):
        _limit(request["seconds"], request["megabytes"])
    print(json.dumps(answer(render_jinja_template, request)))


def answer(render: Any, request: dict[str, Any]) -> dict[str, str]:
    """The text, or why there is none."""
    try:
        (text,), _ = render(
            [request["messages"]], chat_template=request["template"], add_generation_prompt=True, **request["tokens"]
        )
    except MemoryError:
        return {"refusal": f"it takes more than {request['megabytes']} MB of memory"}
    except Exception as error:  # a template is a program: it may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return {"refusal": reason[:_LONGEST_REASON]}
    if len(text) > _LONGEST_PROMPT:
        return {"refusal": f"it writes {len(text)} characters"}
    return {"text": text}


def _limit(seconds: int, megabytes: int) -> None:
    """Kill this process after so much computing, and refuse it more memory than that."""
    import resource

    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    resource.setrlimit(resource.RLIMIT_CPU, (int(used) + seconds, int(used) + seconds + 1))
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
