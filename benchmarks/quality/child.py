"""Commands of bitconvert in processes of their own, with what they cost; all of them end when we are told to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from benchmarks.quality.places import ROOT


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


class Caller(Protocol):
    """Runs a command line of ``bitconvert``."""

    def __call__(self, argv: Sequence[str], threads: int) -> Finished:
        """Return when it has ended."""


class Children:
    """Runs commands side by side, each in a session of its own: Ctrl-C comes to us alone, and we pass it on once."""

    def __init__(self) -> None:
        self._running: set[int] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def __call__(self, argv: Sequence[str], threads: int) -> Finished:
        """See ``Caller``.

        Raises:
            Stopped: before it began.
        """
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        began = time.monotonic()
        with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
            with self._lock:
                if self._stopped:
                    raise Stopped
                process = subprocess.Popen(
                    [sys.executable, "-m", "bitconvert", *argv],
                    cwd=ROOT,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=stdout,
                    stderr=stderr,
                    start_new_session=True,
                )
                self._running.add(process.pid)
            _, status, usage = os.wait4(process.pid, 0)
            with self._lock:
                self._running.remove(process.pid)
            process.returncode = os.waitstatus_to_exitcode(status)
            for stream in (stdout, stderr):
                stream.seek(0)
            return Finished(
                code=process.returncode,
                stdout=stdout.read().decode(errors="replace"),
                stderr=stderr.read().decode(errors="replace"),
                seconds=time.monotonic() - began,
                cpu_seconds=usage.ru_utime + usage.ru_stime,
                peak_bytes=usage.ru_maxrss * 1024,
            )

    def stop(self) -> None:
        """Let the running ones save and end, and begin no others."""
        with self._lock:
            self._stopped = True
            for pid in self._running:
                os.kill(pid, signal.SIGTERM)


class Stopped(Exception):
    """There will be no more commands."""
