"""Where a model is, by its name: on this disk or on the hub. Imports nothing heavy: a wrong name is told at once.

A model's directory is taken at its word about nothing: what it holds must lie in it. A link that leads elsewhere could
carry any file of this machine into what is published, and a pipe in place of weights would never end. The hub's cache,
whose snapshots are links into the ``blobs`` beside them, is the one exception.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from bitconvert.errors import BitconvertError

HUB_ID = r"\w[\w.-]*/[\w.-]+"

_HUB_NAME = re.compile(rf"({HUB_ID})(?:@([\w.-]+))?(?:/(.+\.gguf))?")
_SNAPSHOT = re.compile(r".*/snapshots/([0-9a-f]{40})(?:/.*)?")


class HubName(NamedTuple):
    """A model on the hub: ``owner/model``, ``owner/model@revision``, ``owner/model@revision/file.gguf``.

    Attributes:
        repository: ``owner/model``.
        revision: a commit, branch or tag; None for the newest.
        file: the GGUF file that is meant; None for the repository's safetensors.
    """

    repository: str
    revision: str | None
    file: str | None


def hub_name(name: str) -> HubName | None:
    """A name as one of the hub's; None for a name that cannot be one."""
    found = _HUB_NAME.fullmatch(name)
    return HubName(*found.groups()) if found else None


def revision_of(path: Path) -> str:
    """The commit that a file or directory of the hub's cache is of; empty for any other."""
    found = _SNAPSHOT.fullmatch(path.absolute().as_posix())
    return found[1] if found else ""


def locate(name: str) -> Path | None:
    """The directory or file that a name stands for; None for what is to be fetched from the hub.

    Args:
        name: a path, or a model on the hub as ``HubName`` spells it.

    Raises:
        BitconvertError: it is neither, or a file of a kind that is not read.
    """
    path = Path(name).expanduser()
    if path.is_file() and path.suffix in (".onnx", ".onnx_data"):
        raise BitconvertError(f"{name}: ONNX files are not read back", "give the checkpoint that it was packed from")
    if path.is_dir() or path.is_file():
        return path
    if hub_name(name):
        return None
    raise BitconvertError(
        f"{name}: no such file or directory", "give a directory, a .gguf file or a hub id owner/model"
    )


def require_own_files(directory: Path) -> None:
    """Refuse a model's directory whose entries lead out of it, or are neither files nor directories.

    Raises:
        BitconvertError: naming the entry.
    """
    home = directory.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    for entry in sorted([*directory.iterdir(), *directory.glob("additional_chat_templates/*")]):
        try:
            place = entry.resolve(strict=True)
        except (OSError, RuntimeError) as error:
            raise BitconvertError(f"{entry}: a link that leads nowhere", "remove it, or restore the file") from error
        if not (place.is_relative_to(home) or place.is_relative_to(blobs)):
            raise BitconvertError(
                f"{entry}: leads out of the model's directory, to {place}",
                "do not trust this model; if the link is your own, put the file itself there",
            )
        if not (place.is_file() or place.is_dir()):
            raise BitconvertError(f"{entry}: neither a file nor a directory", "do not trust this model")
