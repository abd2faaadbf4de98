"""Memory: how the C library's heap treats what was freed, and how to tell that there was too little."""

from __future__ import annotations

import ctypes
import re
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # of mallopt(3)
_TOO_LITTLE = re.compile("can't allocate memory|cannot allocate memory|out of memory|OutOfMemoryError", re.IGNORECASE)


def keep_freed_memory() -> None:
    """Let this process use freed memory again instead of giving it back to the system.

    By default glibc asks the system for each large tensor and returns it at once, and the system clears every page of
    it anew. In a training on a CPU, whose steps make the same tensors over and over, that can take as long as the
    arithmetic. The price is that the peak of memory stays resident. Other C libraries are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_TOP_PAD, 2**26)


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out: Python, torch on a GPU and on a CPU, and the system when it maps a file say it unlike."""
    return isinstance(error, MemoryError) or bool(_TOO_LITTLE.search(f"{type(error).__name__}: {error}"))
