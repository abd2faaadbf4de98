"""Which of several processes this one is, as ``torchrun`` and ``accelerate launch`` tell each of them."""

from __future__ import annotations

import os


def world_size() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is the one that writes and speaks for all."""
    return int(os.environ.get("RANK", "0")) == 0
