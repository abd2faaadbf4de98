"""Encoders against gguf's own quantizers: ``python -m benchmarks.packing``. CPU time, one thread, the same weights."""

from __future__ import annotations

import gguf
import torch

from benchmarks.timing import ratio
from bitconvert.models.gguf_types import register_q2_0
from bitconvert.packing.formats import FORMATS, GgufFormat
from bitconvert.recipe import Scaling
from bitconvert.ternary.quantize import ternarize

ROWS, COLUMNS = 4096, 4096


def main() -> None:
    """Print one line per format."""
    torch.set_num_threads(1)
    register_q2_0()
    ternary = ternarize(torch.randn(ROWS, COLUMNS) * 0.02, Scaling()).with_fp16_scale()
    baked = ternary.dequantize().numpy()
    print(f"encode {ROWS} x {COLUMNS}, CPU seconds: bitconvert, gguf-py, ratio")
    for name in ("tq1_0", "tq2_0"):
        form = FORMATS[name]
        assert isinstance(form, GgufFormat)
        kind = form.type.ggml()
        ours, peer, share = ratio(lambda f=form: f.encode(ternary), lambda k=kind: gguf.quantize(baked, k))
        print(f"{name:8} {ours:7.3f} {peer:7.3f} {share:6.2f}")


if __name__ == "__main__":
    main()
