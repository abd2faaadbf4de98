"""Packing against llama.cpp's quantizer and gguf-py's: ``python -m benchmarks.packing``. CPU time, one thread.

First encoders alone, from float32 weights that are ternary to bytes; then whole models, from safetensors to GGUF. The
llama.cpp that Python wheels bring exports its quantizer, not llama-quantize; what that does with a tensor is done here:
read its bytes, make them float32, quantize, write.
"""

from __future__ import annotations

import ctypes
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from benchmarks.timing import ratio
from bitconvert.models.checkpoint import open_checkpoint
from bitconvert.models.gguf_types import register_q2_0
from bitconvert.models.lineage import Lineage
from bitconvert.models.llama_cpp_library import find_library, open_library
from bitconvert.packing.formats import FORMATS, GgufFormat
from bitconvert.packing.pack import pack
from bitconvert.packing.unpack import unpack
from bitconvert.recipe import Packing, Scaling
from bitconvert.report.reporter import Silent
from bitconvert.ternary.blocks import baked_blocks
from bitconvert.ternary.quantize import ternarize
from tests.models import write_model

ROWS, COLUMNS = 4096, 4096
NAMES = ("tq1_0", "tq2_0")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SHAPE = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16, "num_key_value_heads": 8}

Floats = NDArray[np.float32]
Quantize = Callable[[Floats], NDArray[np.uint8]]


def main() -> None:
    """Print one line per comparison."""
    torch.set_num_threads(1)
    register_q2_0()
    print("CPU seconds, and how many times ours go into the peer's")
    print(f"{'':34} {'ours':>7} {'peer':>7} {'times':>6}")
    for name in NAMES:
        _compare_encoders(name)
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as folder:
        for dtype in DTYPES:
            with _models(Path(folder), DTYPES[dtype]) as (latent, baked):
                for name in NAMES:
                    _compare_models(f"latent {dtype}", latent, baked, name)
                    _compare_models(f"baked {dtype}", baked, baked, name)


def _compare_encoders(name: str) -> None:
    form = _gguf_format(name)
    weight = ternarize(torch.randn(ROWS, COLUMNS) * 0.02, Scaling(estimator="absmean")).with_fp16_scale().dequantize()

    def ours() -> list[NDArray[np.uint8]]:
        return [form.encode(rows) for rows in baked_blocks(weight, Scaling(estimator="absmean"))]

    for peer, quantize in _peers(form).items():
        np.testing.assert_array_equal(np.concatenate(ours()), quantize(weight.numpy()))
        _show(f"encode {ROWS} x {COLUMNS} {name}", peer, ours, partial(quantize, weight.numpy()), 9)


def _compare_models(what: str, model: Path, baked: Path, name: str) -> None:
    """Ours from a model, the peers' from the ternary weights that they need."""
    form = _gguf_format(name)
    output = baked.parent / "packed"
    options = Packing(formats=(name,))

    def ours() -> None:
        pack(open_checkpoint(str(model)), options, output, overwrite=True, reporter=Silent())

    for peer, quantize in _peers(form).items():
        _show(f"pack {what} {name}", peer, ours, partial(_quantize_model, baked, quantize, baked.parent / "peer"), 5)


def _show(what: str, peer: str, ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> None:
    first, second, share = ratio(ours, theirs, rounds)
    print(f"{what:26} {peer:>9} {first:7.3f} {second:7.3f} {1 / share:6.1f}", flush=True)


def _gguf_format(name: str) -> GgufFormat:
    form = FORMATS[name]
    assert isinstance(form, GgufFormat)
    return form


def _peers(form: GgufFormat) -> dict[str, Quantize]:
    library = open_library(str(find_library()[0]))
    chunk = library.ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]

    def by_llama_cpp(rows: Floats) -> NDArray[np.uint8]:
        quantized = np.empty((len(rows), form.type.row_bytes(rows.shape[1])), np.uint8)
        chunk(form.type.type_id, rows.ctypes.data, quantized.ctypes.data, 0, *rows.shape, None)
        return quantized

    return {"llama.cpp": by_llama_cpp, "gguf-py": lambda rows: gguf.quantize(rows, form.type.ggml())}


def _quantize_model(model: Path, quantize: Quantize, output: Path) -> None:
    """What a converter does at least: nothing but the tensors, matrices of layers quantized, others as float16."""
    with safe_open(model / "model.safetensors", framework="pt") as file, output.open("wb") as written:
        for name in file.keys():  # noqa: SIM118 - not a dictionary
            values = file.get_tensor(name).float().numpy()
            stored = quantize(values) if name.endswith("proj.weight") else values.astype(np.float16)
            written.write(stored.data)


@contextmanager
def _models(folder: Path, dtype: torch.dtype) -> Iterator[tuple[Path, Path]]:
    """A random model of 126 million weights as training leaves it, and as ternary floats; both in one dtype."""
    latent, baked = folder / "latent", folder / "baked"
    write_model(latent, "smollm2", layers=2, **SHAPE)
    Lineage(source="benchmark", lam=1.0, scaling=Scaling(estimator="absmean"), tokens_seen=1).save(latent)
    _store_as(latent, dtype)
    unpack(open_checkpoint(str(latent)), baked, reporter=Silent())
    _store_as(baked, dtype)
    yield latent, baked


def _store_as(model: Path, dtype: torch.dtype) -> None:
    file = model / "model.safetensors"
    weights = {name: value.to(dtype) for name, value in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})


if __name__ == "__main__":
    main()
