"""The llama.cpp that is installed: where its shared library lies, and how a child process of ours works with it.

The library lives in child processes, because llama.cpp aborts the whole process when an assertion of it fails, prints
on stderr, and brings an OpenMP runtime of its own beside torch's. Nothing here imports torch: the children import this.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from bitconvert.errors import BitconvertError
from bitconvert.models.child import child_command, child_environment

INSTALL = "pip install 'bitconvert[llamacpp]', or set LLAMA_CPP_LIB to a libllama shared library of your own"


def find_library() -> tuple[Path, str, str]:
    """(shared library, client, its version if known) of the llama.cpp to use: $LLAMA_CPP_LIB before xllamacpp."""
    if own := os.environ.get("LLAMA_CPP_LIB"):
        if not Path(own).is_file():
            raise BitconvertError(f"LLAMA_CPP_LIB names {own}, which is not a file", "give the path of libllama")
        return Path(own).absolute(), Path(own).name, ""
    spec = importlib.util.find_spec("xllamacpp")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    found = sorted(folder.glob("xllamacpp*.so")) if folder else []
    if folder and not found:
        raise BitconvertError(
            "the xllamacpp wheel for this system does not export llama.cpp's C API",
            "set LLAMA_CPP_LIB to a libllama shared library (llama.dll) of your own",
        )
    if not found:
        raise BitconvertError("llama.cpp is not installed", INSTALL)
    return found[0], "xllamacpp", importlib.metadata.version("xllamacpp")


def start_child(module: str, library: Path, *arguments: str, log: Any) -> subprocess.Popen[bytes]:
    """Start ``python -m module``, to be talked to over its stdin and stdout.

    Args:
        module: of this package.
        library: that it will open.
        arguments: for its command line.
        log: where its stderr goes, as for ``subprocess.Popen``.
    """
    env = child_environment(GGML_NO_BACKTRACE="1")
    if sys.platform == "win32":
        env["PATH"] = f"{library.parent}{os.pathsep}{env.get('PATH', '')}"
    command = child_command(module, *arguments)
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=env)


def open_library(path: str) -> ctypes.CDLL:
    """Open a shared library; where the system has no OpenMP runtime (slim images), lend it torch's."""
    try:
        return ctypes.CDLL(path)
    except OSError as error:
        torch = importlib.util.find_spec("torch")
        if "libgomp" not in str(error) or torch is None or torch.origin is None:
            raise
        ctypes.CDLL(str(Path(torch.origin).parent / "lib" / "libgomp.so.1"), mode=ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(path)
