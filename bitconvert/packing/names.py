"""The names of the formats, for those who do not wait for torch: help and completion."""

from __future__ import annotations

GGUF_NAMES = ("tq1_0", "tq2_0", "q2_0", "i2_s", "q8_0", "f16", "bf16")
FORMAT_NAMES = (*GGUF_NAMES, "safetensors", "compressed-tensors", "onnx")
"""What ``--format`` accepts, besides ``all``; the rows are in ``formats``."""
