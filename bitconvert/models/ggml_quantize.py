"""Types that only llama.cpp itself quantizes to (the ``gguf`` package reads them, no more): Q4_K, Q6_K.

``python -m bitconvert.models.ggml_quantize`` is the child process that does it: rows of float32 on stdin, as many at a
time as it is told, quantized rows on stdout.
"""

from __future__ import annotations

import ctypes
import struct
import subprocess
import sys
from contextlib import suppress
from typing import IO, TYPE_CHECKING

from bitconvert.errors import BitconvertError
from bitconvert.models.llama_cpp_library import INSTALL, find_library, open_library, start_child

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from bitconvert.models.gguf_types import GgufType

_CHUNK = 2**24  # weights that lie in memory a second time
_LARGEST_ERROR = 0.25  # of the weights' norm; four bits lose about 0.08 of it, and garbage is at 1 or more


def quantize_by_ggml(rows: NDArray[np.float32], kind: GgufType) -> NDArray[np.uint8]:
    """Quantize a matrix as llama-quantize does (without an importance matrix).

    Args:
        rows: shape (out, in), ``in`` a multiple of the type's block.
        kind: one of ggml's types.

    Returns:
        Shape (out, bytes per row). The ``gguf`` package's decoder, which is another program, has found the weights in
        it again.

    Raises:
        BitconvertError: there is no llama.cpp, or it cannot do this.
    """
    import numpy as np
    from gguf import dequantize

    library, _, _ = find_library()
    height, columns = rows.shape
    quantized = np.empty((height, kind.row_bytes(columns)), np.uint8)
    child = start_child(__name__, library, str(library), str(kind.type_id), str(columns), log=subprocess.DEVNULL)
    try:
        for first in range(0, height, step := max(1, _CHUNK // columns)):
            part = np.ascontiguousarray(rows[first : first + step], np.float32)
            answer = _ask(child, part.tobytes(), len(part), kind.row_bytes(columns))
            quantized[first : first + step] = np.frombuffer(answer, np.uint8).reshape(len(part), -1)
            error = np.linalg.norm(dequantize(quantized[first : first + step], kind.ggml()) - part)
            if not error <= _LARGEST_ERROR * np.linalg.norm(part):
                raise _unable(kind.name, "what it gives back does not decode to the weights")
    except (OSError, EOFError) as error:
        raise _unable(kind.name, f"it ended with status {child.wait()}") from error
    finally:
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            assert pipe is not None
            with suppress(OSError):
                pipe.close()
    return quantized


def _ask(child: subprocess.Popen[bytes], rows: bytes, count: int, row_bytes: int) -> bytes:
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(struct.pack("<Q", count) + rows)
    child.stdin.flush()
    return _read(child.stdout, count * row_bytes)


def _unable(name: str, why: str) -> BitconvertError:
    return BitconvertError(f"llama.cpp cannot quantize to {name}: {why}", f"choose another type, or: {INSTALL}")


def _read(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError("the other side has gone")
    return data


def _serve(path: str, kind: int, columns: int) -> None:
    """Quantize what comes on stdin until it ends."""
    ggml = open_library(path)
    quantize, row_size = ggml.ggml_quantize_chunk, ggml.ggml_row_size
    quantize.restype = row_size.restype = ctypes.c_size_t
    row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    quantize.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    with suppress(EOFError, BrokenPipeError):
        while True:
            (count,) = struct.unpack("<Q", _read(sys.stdin.buffer, 8))
            rows = _read(sys.stdin.buffer, 4 * count * columns)
            room = ctypes.create_string_buffer(count * row_size(kind, columns))
            quantize(kind, rows, room, 0, count, columns, None)
            sys.stdout.buffer.write(room.raw)
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
