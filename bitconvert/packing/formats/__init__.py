"""The output types: one file each, one row here."""

from __future__ import annotations

from collections.abc import Container

from bitconvert.errors import UsageError
from bitconvert.packing.formats.base import EVERYWHERE, Format, GgufFormat
from bitconvert.packing.formats.bf16 import BF16
from bitconvert.packing.formats.compressed_tensors import CompressedTensors
from bitconvert.packing.formats.f16 import F16
from bitconvert.packing.formats.hf_bitnet import HfBitnet
from bitconvert.packing.formats.i2_s import I2S
from bitconvert.packing.formats.onnx import Onnx
from bitconvert.packing.formats.q2_0 import Q2_0
from bitconvert.packing.formats.q8_0 import Q8_0
from bitconvert.packing.formats.tq1_0 import TQ1_0
from bitconvert.packing.formats.tq2_0 import TQ2_0
from bitconvert.recipe import Scaling

FORMATS: dict[str, Format] = {
    row.name: row
    for row in (TQ1_0(), TQ2_0(), Q2_0(), I2S(), Q8_0(), F16(), BF16(), HfBitnet(), CompressedTensors(), Onnx())
}
"""What ``--format`` accepts."""

FALLBACKS: tuple[GgufFormat, ...] = (Q2_0(), Q8_0(), F16())
"""Where the ternary rows of a GGUF file go that its own type cannot hold, best first. All of them keep every code and
scale. Q4_0, llama-quantize's choice, stores one sign of each block at 7/8 of its size and ruins a ternary model."""

__all__ = ["FALLBACKS", "FORMATS", "Format", "GgufFormat", "find_format", "formats_that_hold", "runs_in"]


def formats_that_hold(scaling: Scaling) -> list[str]:
    """Names of the formats that can store the scales of this scaling."""
    return [name for name, row in FORMATS.items() if row.refusal(scaling) is None]


def find_format(name: str) -> Format:
    """The format that ``--format NAME`` means.

    Raises:
        UsageError: there is none of this name.
    """
    if name.lower() not in FORMATS:
        raise UsageError(f"{name}: no such format", f"formats: {', '.join(FORMATS)}, or all")
    return FORMATS[name.lower()]


def runs_in(form: Format, types: Container[str]) -> str:
    """The runtimes that compute with a file, in words.

    Args:
        form: of the file.
        types: that its ternary matrices have; those whose rows the format cannot hold have another.
    """
    others = [
        row for row in FALLBACKS if row.type.name in types and row.name != form.name and row.runs_in != EVERYWHERE
    ]
    return "; ".join([form.runs_in, *(f"its matrices in {row.type.name}: {row.runs_in}" for row in others)])
