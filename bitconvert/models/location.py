"""Where a model is, by its name: on this disk or on the hub. Imports nothing heavy: a wrong name is told at once."""

from __future__ import annotations

import re
from pathlib import Path

from bitconvert.errors import BitconvertError

HUB_ID = r"\w[\w.-]*/[\w.-]+"
HUB_FILE = rf"({HUB_ID})/(.+\.gguf)"


def locate(name: str) -> Path | None:
    """The directory or file that a name stands for; None for what is to be fetched from the hub.

    Args:
        name: a path, a hub id ``owner/model``, or a file on the hub ``owner/model/file.gguf``.

    Raises:
        BitconvertError: it is neither, or a file of a kind that is not read.
    """
    path = Path(name).expanduser()
    if path.is_file() and path.suffix in (".onnx", ".onnx_data"):
        raise BitconvertError(f"{name}: ONNX files are not read back", "give the checkpoint that it was packed from")
    if path.is_dir() or path.is_file():
        return path
    if re.fullmatch(f"{HUB_FILE}|{HUB_ID}", name):
        return None
    raise BitconvertError(
        f"{name}: no such file or directory", "give a directory, a .gguf file or a hub id owner/model"
    )
