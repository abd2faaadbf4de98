"""Hugging Face's packed bitnet tensors: 2-bit or float codes, a scale beside them. Reading only; packing/ writes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.bitnet import unpack_weights

from bitconvert.errors import BitconvertError
from bitconvert.ternary.quantize import TernaryTensor

_CODES_PER_BYTE = 4


def scale_name(name: str) -> str:
    """The tensor that scales a weight or a bias, where a layer is packed."""
    return f"{name.rpartition('.')[0]}.weight_scale"


def unpacked_shape(shape: tuple[int, ...], dtype: str) -> tuple[int, ...]:
    """Shape of the weight that a stored tensor means: four rows of codes lie in one of bytes."""
    return (shape[0] * _CODES_PER_BYTE, *shape[1:]) if dtype == "U8" else shape


def unpack_bitnet(stored: Tensor, beside: Tensor, config: dict[str, Any]) -> TernaryTensor:
    """Codes and scale of a packed weight.

    Args:
        stored: uint8, shape (out / 4, in), or codes in any float dtype, shape (out, in).
        beside: ``weight_scale``, shape (1,): holds 1 / scale for linear_class bitlinear, the scale for autobitlinear.
        config: the model's ``config.json``.

    Raises:
        BitconvertError: floats that are no codes, or not one scale.
    """
    if stored.dtype == torch.uint8:
        with torch.compiler.set_stance("force_eager"):  # transformers compiles it, which needs a C++ compiler
            codes = unpack_weights(stored, dtype=torch.float32).to(torch.int8)
    else:
        codes = stored.sign().to(torch.int8)
        if not torch.equal(codes, stored):
            raise BitconvertError("it holds other values than -1, 0 and 1", "its scale belongs to ternary codes")
    if beside.numel() != 1:
        raise BitconvertError(f"its scale has shape {tuple(beside.shape)}", "bitnet has one scale per tensor")
    return TernaryTensor(codes, _multiplier(beside.float().reshape(1), config))


def scaled_bias(bias: Tensor, beside: Tensor, config: dict[str, Any]) -> Tensor:
    """The bias that a packed layer adds, float32: autobitlinear multiplies it by the weight's scale."""
    return bias.float() if _divides(config) else bias.float() * beside.float()


def _divides(config: dict[str, Any]) -> bool:
    return bool(config["quantization_config"].get("linear_class", "bitlinear") == "bitlinear")


def _multiplier(beside: Tensor, config: dict[str, Any]) -> Tensor:
    """The scale as a factor. Where it is the inverse of a float16, that float16: inverting twice may miss it."""
    if not _divides(config):
        return beside
    scale = 1 / beside
    half = scale.half().float()
    return torch.where(1 / half == beside, half, scale)
