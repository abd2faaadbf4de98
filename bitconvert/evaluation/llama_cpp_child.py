"""The process in which llama.cpp lives: its C API through ctypes, asked over stdin, answering over what was stdout.

``python -m bitconvert.evaluation.llama_cpp_child``, started by ``runtimes.LlamaCpp``. It never imports torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import struct
import sys
from typing import IO, TYPE_CHECKING, Any

from bitconvert.models.llama_cpp_library import open_library

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Logits = npt.NDArray[np.float32]

_BATCH = 512  # tokens per llama_decode; llama-perplexity's own physical batch, so its rounding is ours


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
_LORA_API: dict[str, tuple[Any, list[Any]]] = {
    "llama_adapter_lora_init": (_ptr, [_ptr, _str]),
    "llama_set_adapters_lora": (_int, [_ptr, ctypes.POINTER(_ptr), ctypes.c_size_t, ctypes.POINTER(ctypes.c_float)]),
}
"""Of recent versions; asked for when there is an adapter to load."""


def _load_library(path: str) -> ctypes.CDLL:
    """Open llama.cpp's shared library and declare the functions used here."""
    try:
        library = open_library(path)
        _declare(library, _C_API)
    except OSError as error:
        raise _NativeError(f"cannot load {path}: {error}") from error
    except AttributeError as error:
        raise _NativeError(f"{path} does not export llama.cpp's C API: {error}") from error
    return library


def _declare(library: ctypes.CDLL, functions: dict[str, tuple[Any, list[Any]]]) -> None:
    for name, (result, arguments) in functions.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments


class _Model:
    """One model and one context of it, through the C API."""

    def __init__(
        self, library: str, path: str, n_ctx: int, threads: int, verbose: bool, lora: str | None = None
    ) -> None:
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
        if lora is not None:
            self._add_adapter(model, lora)
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

    def _add_adapter(self, model: int, path: str) -> None:
        """Put a LoRA adapter beside the model's weights, at its full strength."""
        try:
            _declare(self._lib, _LORA_API)
        except AttributeError as error:
            raise _NativeError(f"this llama.cpp's C API loads no adapters: {error}") from error
        adapter = self._not_null(self._lib.llama_adapter_lora_init(model, os.fsencode(path)), "use the adapter")
        if self._lib.llama_set_adapters_lora(self._ctx, (_ptr * 1)(adapter), 1, (ctypes.c_float * 1)(1.0)):
            raise _NativeError(f"llama.cpp cannot use the adapter{self._told()}")

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


# ---- messages ----


def send(stream: IO[bytes], message: Any) -> None:
    """Write a message: lengths, JSON, and the bytes of the one array that may stand at its end.

    Not pickle: what comes from a process that has read an untrusted file must not be able to run anything.
    """
    import numpy as np

    raw, shape = b"", None
    if isinstance(message[-1], np.ndarray):
        raw, shape = message[-1].tobytes(), message[-1].shape
        message = [*message[:-1], None]
    text = json.dumps([message, shape]).encode()
    stream.write(struct.pack("<QQ", len(text), len(raw)) + text)
    stream.write(raw)
    stream.flush()


def receive(stream: IO[bytes]) -> Any:
    """Read a message.

    Raises:
        EOFError: the other side has gone.
    """
    import numpy as np

    text, raw = (_read(stream, size) for size in struct.unpack("<QQ", _read(stream, 16)))
    message, shape = json.loads(text)
    if shape is not None:
        message[-1] = np.frombuffer(raw, np.float32).reshape(shape)
    return message


def _read(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError("the other side has gone")
    return data


def _serve() -> None:
    """Answer (method, arguments) on stdin with (error, value) on what was stdout, until stdin ends."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing that C prints may land between two messages
    model: _Model | None = None
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            method, arguments = receive(sys.stdin.buffer)
            error, value = None, None
            try:
                if model is None:
                    model = _Model(*arguments)
                    value = model.facts()
                else:
                    value = getattr(model, method)(*arguments)
            except _NativeError as refusal:
                error = str(refusal)
            send(answers, [error, value])
    os._exit(0)  # without the destructors of a library that may still hold threads


if __name__ == "__main__":
    _serve()
