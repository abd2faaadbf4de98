"""The number from llama.cpp itself: its tokens, its logits, its text.

The `xllamacpp` wheel is a recent llama.cpp in one shared object which also exports the plain C API, so ctypes reaches
the logits that the wheel's own Python API hides; any other libllama named by $LLAMA_CPP_LIB works the same way.
The library lives in a child process, because llama.cpp aborts the whole process when an assertion of it fails, prints
on stderr, and brings an OpenMP runtime of its own beside torch's. `LlamaCpp` talks to that child over two pipes.
A user's `llama-perplexity` is the third client: perplexity only.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

from bitconvert.errors import BitconvertError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Logits = npt.NDArray[np.float32]

_INSTALL = "pip install 'bitconvert[llamacpp]', or set LLAMA_CPP_LIB to a libllama shared library of your own"
_HINTS = [  # what llama.cpp says, what to do about it; the first that matches
    ("ggml type|type 36 ", "I2_S runs in bitnet.cpp only; for a newer type: pip install -U 'bitconvert[llamacpp]'"),
    ("C API|cannot load", _INSTALL),
    ("the prompt is", "shorten the prompt or ask for a longer context"),
    ("context|memory|alloc|status -9", "ask for a shorter context, or use a machine with more memory"),
    ("", "look at it with `bitconvert inspect`; a damaged or half-written file must be packed again"),
]
_BATCH = 512  # tokens per llama_decode; llama-perplexity's own physical batch, so its rounding is ours


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


def open_runtime(path: str | Path, n_ctx: int = 512, *, threads: int | None = None, verbose: bool = False) -> Runtime:
    """Load a GGUF file into llama.cpp.

    Raises:
        BitconvertError: no llama.cpp is installed, or the one that is cannot load the file.
    """
    return LlamaCpp(path, n_ctx, threads=threads, verbose=verbose)


class LlamaCpp:
    """A GGUF file in a llama.cpp that runs as a child process. Not for use by several threads at once.

    Args:
        path: The GGUF file.
        n_ctx: The longest window that will be evaluated.
        threads: CPU threads; all of them by default.
        verbose: Let llama.cpp's own log through to stderr.
    """

    def __init__(
        self, path: str | Path, n_ctx: int = 512, *, threads: int | None = None, verbose: bool = False
    ) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise BitconvertError(f"{path} is not a file", "llama.cpp reads a .gguf file, not a directory or an id")
        if n_ctx < 1:
            raise ValueError(f"n_ctx is {n_ctx} but must be at least 1")
        library, client, version = find_library()
        self.name, self.n_ctx = f"llama.cpp ({client})", n_ctx
        self._log = None if verbose else tempfile.TemporaryFile()  # noqa: SIM115
        self._child = _start(library, self._log)
        facts = self._call("open", str(library), str(self.path), n_ctx, threads or os.cpu_count() or 1, verbose)
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
            pickle.dump((method, arguments), self._child.stdin)
            self._child.stdin.flush()
            error, value = pickle.load(self._child.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
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
        raise BitconvertError("llama.cpp is not installed", _INSTALL)
    return found[0], "xllamacpp", importlib.metadata.version("xllamacpp")


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


def _start(library: Path, log: Any) -> subprocess.Popen[bytes]:
    """Start this module as a child. -P: a module of this folder must not shadow one of the standard library."""
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "GGML_NO_BACKTRACE": "1"}
    if sys.platform == "win32":
        env["PATH"] = f"{library.parent}{os.pathsep}{env.get('PATH', '')}"
    command = [sys.executable, "-P", "-m", "bitconvert.evaluation.runtimes"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=env)


# ---------------------------------------------------------------------------------------------- inside the child


class _NativeError(Exception):
    """A refusal by llama.cpp, on its way to the parent."""


class _Params(ctypes.Structure):
    """`llama_model_params` or `llama_context_params`, larger than any version of it.

    Every ABI passes a structure of this size by address or on the stack, so only the fields written here need a known
    place: the first four of the context's, checked against their defaults before use.
    """

    _fields_ = [("words", ctypes.c_uint32 * 256)]


class _Batch(ctypes.Structure):
    """`llama_batch`."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


_LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_int, _bool, _ptr, _str = ctypes.c_int32, ctypes.c_bool, ctypes.c_void_p, ctypes.c_char_p
_C_API: dict[str, tuple[Any, list[Any]]] = {  # name: result, arguments
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [_LogCallback, _ptr]),
    "llama_model_default_params": (_Params, []),
    "llama_model_load_from_file": (_ptr, [_str, _Params]),
    "llama_model_get_vocab": (_ptr, [_ptr]),
    "llama_context_default_params": (_Params, []),
    "llama_init_from_model": (_ptr, [_ptr, _Params]),
    "llama_set_n_threads": (None, [_ptr, _int, _int]),
    "llama_n_ctx": (ctypes.c_uint32, [_ptr]),
    "llama_n_batch": (ctypes.c_uint32, [_ptr]),
    "llama_get_memory": (_ptr, [_ptr]),
    "llama_memory_clear": (None, [_ptr, _bool]),
    "llama_batch_init": (_Batch, [_int, _int, _int]),
    "llama_decode": (_int, [_ptr, _Batch]),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), [_ptr]),
    "llama_vocab_n_tokens": (_int, [_ptr]),
    "llama_vocab_bos": (_int, [_ptr]),
    "llama_vocab_get_add_bos": (_bool, [_ptr]),
    "llama_vocab_is_eog": (_bool, [_ptr, _int]),
    "llama_tokenize": (_int, [_ptr, _str, _int, ctypes.POINTER(_int), _int, _bool, _bool]),
    "llama_token_to_piece": (_int, [_ptr, _int, _str, _int, _int, _bool]),
}


def _load_library(path: str) -> ctypes.CDLL:
    """Open llama.cpp's shared library and declare the functions used here."""
    try:
        library = _dlopen(path)
        for name, (result, arguments) in _C_API.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except OSError as error:
        raise _NativeError(f"cannot load {path}: {error}") from error
    except AttributeError as error:
        raise _NativeError(f"{path} does not export llama.cpp's C API: {error}") from error
    return library


def _dlopen(path: str) -> ctypes.CDLL:
    """Open a shared library; where the system has no OpenMP runtime (slim images), lend it torch's."""
    try:
        return ctypes.CDLL(path)
    except OSError as error:
        torch = importlib.util.find_spec("torch")
        if "libgomp" not in str(error) or torch is None or torch.origin is None:
            raise
        ctypes.CDLL(str(Path(torch.origin).parent / "lib" / "libgomp.so.1"), mode=ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(path)


class _Model:
    """One model and one context of it, through the C API."""

    def __init__(self, library: str, path: str, n_ctx: int, threads: int, verbose: bool) -> None:
        self._errors: list[str] = []
        self._verbose = verbose
        self._lib = lib = _load_library(library)
        self._callback = _LogCallback(self._on_log)  # kept: C holds a pointer to it
        lib.llama_log_set(self._callback, None)
        if hasattr(lib, "ggml_backend_load_all"):
            lib.ggml_backend_load_all()
        lib.llama_backend_init()
        model = lib.llama_model_load_from_file(os.fsencode(path), lib.llama_model_default_params())
        self._ctx = self._context(self._not_null(model, "use the file"), n_ctx)
        lib.llama_set_n_threads(self._ctx, threads, threads)
        self._vocab = lib.llama_model_get_vocab(model)
        self._n_ctx, self._n_vocab = n_ctx, lib.llama_vocab_n_tokens(self._vocab)
        self._batch = lib.llama_batch_init(_BATCH, 0, 1)

    def facts(self) -> tuple[int, bool, int, str]:
        """(n_vocab, add_bos, bos_token_id, version)."""
        lib, version = self._lib, "unknown"
        if hasattr(lib, "llama_version"):
            lib.llama_version.restype = ctypes.c_char_p
            version = lib.llama_version().decode()
        return self._n_vocab, lib.llama_vocab_get_add_bos(self._vocab), lib.llama_vocab_bos(self._vocab), version

    def tokenize(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        raw = text.encode()
        room = len(raw) + 16
        for _ in range(2):  # a negative count is the room it wants
            ids = (ctypes.c_int32 * room)()
            n = self._lib.llama_tokenize(self._vocab, raw, len(raw), ids, room, add_special, parse_special)
            if n >= 0:
                return list(ids[:n])
            room = -n
        raise _NativeError("llama.cpp cannot tokenize the text")

    def logits(self, tokens: list[int], first: int) -> Logits:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._ctx), True)
        return self._evaluate(tokens, 0, first)

    def generate(self, prompt: str, max_tokens: int, temperature: float, seed: int) -> str:
        import numpy as np

        random, raw, past = np.random.default_rng(seed), b"", 0
        feed = self.tokenize(prompt, True, True)
        if not feed or len(feed) > self._n_ctx:
            raise _NativeError(f"the prompt is {len(feed)} tokens long; the context holds 1 to {self._n_ctx}")
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._ctx), True)
        for _ in range(max_tokens):
            if past + len(feed) > self._n_ctx:
                break
            last = self._evaluate(feed, past, len(feed) - 1)[0].astype(np.float64)
            past += len(feed)
            if temperature > 0:  # the largest of logits/T plus Gumbel noise is a draw from their softmax
                last = last / temperature + random.gumbel(size=last.shape)
            feed = [int(last.argmax())]
            if self._lib.llama_vocab_is_eog(self._vocab, feed[0]):
                break
            raw += self._piece(feed[0])
        return raw.decode(errors="replace")

    def _context(self, model: int, n_ctx: int) -> int:
        params = self._lib.llama_context_default_params()
        if list(params.words[:4]) != [512, 2048, 512, 1]:  # n_ctx, n_batch, n_ubatch, n_seq_max
            raise _NativeError(f"this llama.cpp's C API has another llama_context_params: {params.words[:4]}")
        params.words[:3] = [n_ctx, _BATCH, _BATCH]
        context = self._not_null(self._lib.llama_init_from_model(model, params), f"make a context of {n_ctx} tokens")
        if self._lib.llama_n_ctx(context) < n_ctx:
            raise _NativeError(f"llama.cpp gives no context of {n_ctx} tokens")
        return context

    def _evaluate(self, tokens: list[int], past: int, first: int) -> Logits:
        """Feed tokens at positions past..; logits [len(tokens) - first, n_vocab] of those from index `first` on."""
        import numpy as np

        rows = np.empty((len(tokens) - first, self._n_vocab), np.float32)
        for start in range(0, len(tokens), _BATCH):
            part = tokens[start : start + _BATCH]
            self._fill(part, past + start, first - start)
            if status := self._lib.llama_decode(self._ctx, self._batch):
                raise _NativeError(f"llama.cpp cannot evaluate the tokens (status {status}){self._told()}")
            if (new := min(len(part), start + len(part) - first)) > 0:
                at = max(0, start - first)
                rows[at : at + new] = np.ctypeslib.as_array(self._lib.llama_get_logits(self._ctx), (new, self._n_vocab))
        return rows

    def _fill(self, tokens: list[int], past: int, first: int) -> None:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, past + i, i >= first
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0

    def _piece(self, token: int) -> bytes:
        """The bytes of a token; a control token has none."""
        room = 32
        while True:
            text = ctypes.create_string_buffer(room)
            n: int = self._lib.llama_token_to_piece(self._vocab, token, text, room, 0, False)
            if n >= 0:
                return text.raw[:n]
            room = -n

    def _on_log(self, level: int, text: bytes, _: object) -> None:
        if self._verbose:
            sys.stderr.write(text.decode(errors="replace"))
        if level == 4:  # GGML_LOG_LEVEL_ERROR
            self._errors.append(text.decode(errors="replace").strip())

    def _not_null(self, pointer: int | None, what: str) -> int:
        if not pointer:
            raise _NativeError(f"llama.cpp cannot {what}{self._told()}")
        return pointer

    def _told(self) -> str:
        told = [re.sub(r"^\w+: ", "", line) for line in self._errors]
        return f": {told[0]}" if told else ""


def _serve() -> None:
    """Answer (method, arguments) on stdin with (error, value) on what was stdout, until stdin ends."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing that C prints may land between two messages
    model: _Model | None = None
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            method, arguments = pickle.load(sys.stdin.buffer)
            error, value = None, None
            try:
                if model is None:
                    model = _Model(*arguments)
                    value = model.facts()
                else:
                    value = getattr(model, method)(*arguments)
            except _NativeError as refusal:
                error = str(refusal)
            pickle.dump((error, value), answers, protocol=5)
            answers.flush()
    os._exit(0)  # without the destructors of a library that may still hold threads


if __name__ == "__main__":
    _serve()
