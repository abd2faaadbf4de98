"""Commands of bitconvert in processes of their own, with what they cost; all of them end when we are told to."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

_HEAVY = (
    "bitconvert.training.warmup",
    "bitconvert.evaluation.evaluate",
    "bitconvert.packing.pack",
    "bitconvert.ui.progress",
)


@dataclass(frozen=True)
class Finished:
    """A command that has ended.

    Attributes:
        code: its exit code; negative for the signal that killed it.
        stdout: all of it.
        stderr: all of it.
        seconds: wall clock.
        cpu_seconds: of all its threads.
        peak_bytes: resident memory at its highest.
    """

    code: int
    stdout: str
    stderr: str
    seconds: float
    cpu_seconds: float
    peak_bytes: int

    @property
    def error(self) -> str:
        """The message behind the last ``error:``; empty where there is none."""
        return next((line[6:].strip() for line in reversed(self._lines) if line.startswith("error:")), "")

    @property
    def last_line(self) -> str:
        """Of stderr, for when there is no message."""
        return self._lines[-1] if self._lines else ""

    @property
    def _lines(self) -> list[str]:
        return [line for line in self.stderr.splitlines() if line.strip()]


class Stopped(Exception):
    """There will be no more commands."""


class Caller(Protocol):
    """Runs a command line of ``bitconvert``."""

    def __call__(self, argv: Sequence[str]) -> Finished:
        """Return when it has ended."""


class Children:
    """Runs commands side by side.

    Each is the command line's own ``main`` in a fork of a process that has imported torch and the rest once: what takes
    seconds of CPU. Each is in a session of its own: Ctrl-C comes to us alone, and we pass it on once.

    Args:
        threads: CPU threads of each command.
        imported: modules that they find loaded.
    """

    def __init__(self, threads: int, imported: Sequence[str] = _HEAVY) -> None:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # read once, by the process that the others are forks of
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # to look for a GPU must not open it before the fork
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([*imported])
        self._running: set[int] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def __call__(self, argv: Sequence[str]) -> Finished:
        """See ``Caller``.

        Raises:
            Stopped: before it began.
        """
        with tempfile.TemporaryDirectory() as name:
            directory, began = Path(name), time.monotonic()
            process = self._context.Process(target=_run, args=(tuple(argv), directory))
            with self._lock:
                if self._stopped:
                    raise Stopped
                process.start()
                pid = process.pid or 0
                self._running.add(pid)
            process.join()
            with self._lock:
                self._running.remove(pid)
            cpu_seconds, peak_bytes = _cost(directory / "cost")
            return Finished(
                code=process.exitcode or 0,
                stdout=(directory / "stdout").read_text(encoding="utf-8", errors="replace"),
                stderr=(directory / "stderr").read_text(encoding="utf-8", errors="replace"),
                seconds=time.monotonic() - began,
                cpu_seconds=cpu_seconds,
                peak_bytes=peak_bytes,
            )

    def stop(self) -> None:
        """Let the running ones save and end, and begin no others."""
        with self._lock:
            self._stopped = True
            for pid in self._running:
                os.kill(pid, signal.SIGTERM)


def _run(argv: tuple[str, ...], directory: Path) -> None:
    """In the child: be the command, and leave behind what it printed and what it cost."""
    os.setsid()
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(directory / name, os.O_WRONLY | os.O_CREAT), stream)
    sys.argv = ["bitconvert", *argv]
    before = time.process_time()
    try:
        from bitconvert.cli.main import main

        main()
    finally:
        peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        (directory / "cost").write_text(f"{time.process_time() - before} {peak_kib * 1024}", encoding="ascii")


def _cost(path: Path) -> tuple[float, int]:
    """CPU seconds and peak bytes as a command left them; 0 of one that was killed."""
    if not path.exists():
        return 0.0, 0
    cpu_seconds, peak_bytes = path.read_text(encoding="ascii").split()
    return float(cpu_seconds), int(peak_bytes)
