"""Hugging Face's packed bitnet tensors: four 2-bit codes a byte, a scale beside them. Reading only; packing/ writes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.bitnet import unpack_weights

from bitconvert.ternary.quantize import TernaryTensor


def unpack_bitnet(stored: Tensor, beside: Tensor, config: dict[str, Any]) -> TernaryTensor:
    """Codes and scale of a packed weight.

    Args:
        stored: uint8, shape (out / 4, in).
        beside: ``weight_scale``, shape (1,): holds 1 / scale for linear_class bitlinear, the scale for autobitlinear.
        config: the model's ``config.json``.
    """
    with torch.compiler.set_stance("force_eager"):  # transformers compiles this function, which needs a C++ compiler
        codes = unpack_weights(stored, dtype=torch.float32).to(torch.int8)
    divides = config["quantization_config"].get("linear_class", "bitlinear") == "bitlinear"
    return TernaryTensor(codes, 1 / beside.float() if divides else beside.float())
