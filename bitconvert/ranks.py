"""Which of several processes this one is, as ``torchrun`` and ``accelerate launch`` tell each of them."""

from __future__ import annotations

import os


def world_size() -> int:
    """How many processes train together."""
    return _told("WORLD_SIZE", 1)


def is_main() -> bool:
    """Whether this process is the one that writes and speaks for all."""
    return _told("RANK", 0) == 0


def local_world_size() -> int:
    """How many of the processes run on this machine."""
    return _told("LOCAL_WORLD_SIZE", 1)


def local_rank() -> int:
    """Which of those on this machine this process is."""
    return _told("LOCAL_RANK", 0)


def node() -> int:
    """Which of the machines this one is."""
    return _told("GROUP_RANK", 0)


def _told(name: str, alone: int) -> int:
    return int(os.environ.get(name, alone))
