"""``bitconvert verify``: is an output still what was written?"""

from __future__ import annotations

import time
from pathlib import Path

from bitconvert.errors import BitconvertError
from bitconvert.models.manifest import MANIFEST, files_below, read_manifest, sha256
from bitconvert.report.reporter import Reporter
from bitconvert.report.verification import VerifyReport


def verify(directory: Path, reporter: Reporter) -> VerifyReport:
    """Hash every file of a directory again, and hold it against ``SHA256SUMS``.

    Raises:
        BitconvertError: there is no ``SHA256SUMS``, it is damaged, or a file cannot be read.
    """
    started = time.monotonic()
    if not directory.is_dir():
        raise BitconvertError(f"{directory}: not a directory", f"give the one that {MANIFEST} lies in")
    written, there = read_manifest(directory), set(files_below(directory))
    reporter.stage(f"verifying {directory}")
    found = sorted(there & written.keys())
    sizes = {name: (directory / name).stat().st_size for name in found if (directory / name).is_file()}
    changed, done = [name for name in found if name not in sizes], 0  # a link that leads nowhere, a pipe
    for name, size in sizes.items():
        if sha256(directory / name) != written[name]:
            changed.append(name)
        done += size
        reporter.advance(done, sum(sizes.values()))
    return VerifyReport(
        directory=str(directory),
        intact=len(found) - len(changed),
        changed=changed,
        missing=sorted(written.keys() - there),
        extra=sorted(there - written.keys()),
        nbytes=done,
        seconds=time.monotonic() - started,
    )
