"""The number from llama.cpp itself: its tokens, its logits, its text.

The `xllamacpp` wheel is a recent llama.cpp in one shared object which also exports the plain C API, so ctypes reaches
the logits that the wheel's own Python API hides; any other libllama named by $LLAMA_CPP_LIB works the same way.
`LlamaCpp` talks over two pipes to the child process that the library lives in (see models/llama_cpp_library.py).
A user's `llama-perplexity` is the third client: perplexity only.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

from bitconvert.errors import BitconvertError
from bitconvert.evaluation.llama_cpp_child import receive, send
from bitconvert.models.llama_cpp_library import INSTALL, find_library, start_child

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Logits = npt.NDArray[np.float32]

_HINTS = [  # what llama.cpp says, what to do about it; the first that matches
    (
        "ggml type|type 36 ",
        "I2_S: --runtime torch, or bitnet.cpp; a newer type: pip install -U 'bitconvert[llamacpp]'",
    ),
    ("C API|cannot load", INSTALL),
    ("the prompt is", "shorten the prompt or ask for a longer context"),
    ("context|memory|alloc|status -9", "ask for a shorter context, or use a machine with more memory"),
    ("", "look at it with `bitconvert inspect`; a damaged or half-written file must be packed again"),
]


class Runtime(Protocol):
    """A runtime with a model loaded, ready to be measured."""

    name: str
    version: str
    n_ctx: int
    n_vocab: int
    add_bos: bool
    """Whether the model's tokenizer puts BOS first when asked for special tokens."""
    bos_token_id: int
    """-1 when the model has none."""

    def tokenize(self, text: str, add_special: bool = False, parse_special: bool = False) -> list[int]:
        """Token ids; `add_special` adds the BOS the model wants, `parse_special` reads `<|im_end|>` as one token."""

    def logits(self, tokens: Sequence[int], first: int = 0) -> Logits:
        """Logits [len(tokens) - first, n_vocab] of positions `first`.., from an empty cache."""

    def generate(self, prompt: str, max_tokens: int = 128, temperature: float = 0.0, seed: int = 0) -> str:
        """What follows a prompt, to its end or the context's; greedy at temperature 0; reads special tokens."""

    def close(self) -> None:
        """Free the model. Harmless when repeated."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *exc: object) -> None: ...


def open_runtime(
    path: str | Path,
    n_ctx: int = 512,
    *,
    lora: Path | None = None,
    threads: int | None = None,
    verbose: bool = False,
) -> Runtime:
    """Load a GGUF file, and perhaps a LoRA adapter beside it, into llama.cpp.

    Raises:
        BitconvertError: no llama.cpp is installed, or the one that is cannot load a file.
    """
    return LlamaCpp(path, n_ctx, lora=lora, threads=threads, verbose=verbose)


class LlamaCpp:
    """A GGUF file in a llama.cpp that runs as a child process. Not for use by several threads at once.

    Args:
        path: The GGUF file.
        n_ctx: The longest window that will be evaluated.
        lora: The GGUF file of an adapter.
        threads: CPU threads; all of them by default.
        verbose: Let llama.cpp's own log through to stderr.
    """

    def __init__(
        self,
        path: str | Path,
        n_ctx: int = 512,
        *,
        lora: Path | None = None,
        threads: int | None = None,
        verbose: bool = False,
    ) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise BitconvertError(f"{path} is not a file", "llama.cpp reads a .gguf file, not a directory or an id")
        if n_ctx < 1:
            raise ValueError(f"n_ctx is {n_ctx} but must be at least 1")
        library, client, version = find_library()
        self.name, self.n_ctx = f"llama.cpp ({client})", n_ctx
        self._log = None if verbose else tempfile.TemporaryFile()  # noqa: SIM115
        self._child = start_child("bitconvert.evaluation.llama_cpp_child", library, log=self._log)
        options = n_ctx, threads or os.cpu_count() or 1, verbose, None if lora is None else str(lora)
        facts = self._call("open", str(library), str(self.path), *options)
        self.n_vocab, self.add_bos, self.bos_token_id, native_version = facts
        self.version = version or native_version

    def tokenize(self, text: str, add_special: bool = False, parse_special: bool = False) -> list[int]:
        ids: list[int] = self._call("tokenize", text, add_special, parse_special)
        return ids

    def logits(self, tokens: Sequence[int], first: int = 0) -> Logits:
        ids = [int(token) for token in tokens]
        if not 1 <= len(ids) <= self.n_ctx or not 0 <= first < len(ids):
            raise ValueError(f"{len(ids)} tokens from position {first} do not fit a context of {self.n_ctx}")
        if min(ids) < 0 or max(ids) >= self.n_vocab:
            raise ValueError(f"a token id is outside 0..{self.n_vocab - 1}")
        rows: Logits = self._call("logits", ids, first)
        return rows

    def generate(self, prompt: str, max_tokens: int = 128, temperature: float = 0.0, seed: int = 0) -> str:
        if temperature < 0:
            raise ValueError(f"temperature is {temperature} but must not be negative")
        text: str = self._call("generate", prompt, max_tokens, temperature, seed)
        return text

    def close(self) -> None:
        """End the child process and with it everything it holds."""
        if self._child.poll() is None:
            self._child.kill()  # it writes nothing, so there is nothing to save
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout, self._log):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _call(self, method: str, *arguments: Any) -> Any:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        if self._child.stdin.closed:
            raise ValueError(f"the runtime of {self.path} is closed")
        try:
            send(self._child.stdin, [method, arguments])
            error, value = receive(self._child.stdout)
        except (OSError, EOFError):
            error = f"llama.cpp died (exit status {self._child.wait(timeout=30)}): {self._last_words()}"
            self.close()
        except BaseException:  # interrupted half-way: the pipes no longer agree on where a message starts
            self.close()
            raise
        if error is not None:
            if method == "open":
                self.close()
            hint = next(hint for pattern, hint in _HINTS if re.search(pattern, error))
            raise BitconvertError(f"{self.path}: {error}", hint)
        return value

    def _last_words(self) -> str:
        """What the dead child printed last, which for a failed assertion names it."""
        if self._log is None:
            return "see above"
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        return next((line for line in lines if "GGML_ASSERT" in line), lines[-1] if lines else "no message")


class PerplexityEstimate(NamedTuple):
    """What `llama-perplexity` printed last."""

    ppl: float
    stderr: float


def llama_perplexity(
    path: str | Path, text: str | Path, n_ctx: int = 512, threads: int | None = None
) -> PerplexityEstimate:
    """Perplexity of a GGUF file on a text file by the user's own binary: $LLAMA_PERPLEXITY, else the one on PATH."""
    asked = os.environ.get("LLAMA_PERPLEXITY", "llama-perplexity")
    binary = shutil.which(asked)
    if binary is None:
        raise BitconvertError(f"{asked} is not an executable on PATH", "install llama.cpp or set LLAMA_PERPLEXITY")
    options = ["-m", path, "-f", text, "-c", n_ctx, "-t", threads or os.cpu_count() or 1]
    command = [binary, *map(str, options)]
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, check=False)
    output = (done.stdout + b"\n" + done.stderr).decode(errors="replace")
    final = re.search(r"Final estimate: PPL = ([\d.]+) \+/- ([\d.]+)", output)
    if done.returncode or final is None:  # too short a text ends with status 0 and no estimate
        lines = [line.strip() for line in output.splitlines() if line.strip()] or ["it printed nothing"]
        told = next((line for line in lines if re.search(r"error|fail|need|unable|assert", line, re.I)), lines[-1])
        message = f"{binary} gave no perplexity of {path} (exit status {done.returncode}): {told}"
        raise BitconvertError(message, f"run it yourself: {shlex.join(command)}")
    return PerplexityEstimate(float(final[1]), float(final[2]))
