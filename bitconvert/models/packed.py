"""Packed linears of Hugging Face directories: codes, and scales beside them. Reading only; packing/ writes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.bitnet import unpack_weights

from bitconvert.errors import BitconvertError
from bitconvert.ternary.quantize import TernaryTensor

_CODES_PER_BYTE = 4
_CODES_PER_WORD = 16

_PARTS = {
    "bitnet": ("weight", "weight_scale"),
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_shape"),
}
"""What a packed weight is stored as, by ``quant_method``; the first holds the codes."""


def is_readable(quantization: dict[str, Any]) -> bool:
    """Whether a ``quantization_config`` is one that this module reads: bitnet, or two bits of compressed-tensors."""
    method = quantization.get("quant_method")
    return method == "bitnet" or (method == "compressed-tensors" and _has_two_bit_weights(quantization))


def has_int8_activations(config: dict[str, Any]) -> bool:
    """Whether the packed layers round their input, as BitNet does; compressed-tensors computes with floats."""
    return bool(config["quantization_config"]["quant_method"] == "bitnet")


def packed_weights(names: Collection[str], config: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """The weights that are stored as codes and scales, each with the names of the tensors that hold it.

    Args:
        names: of all tensors in the files.
        config: the model's ``config.json``.
    """
    suffixes = _PARTS[config["quantization_config"]["quant_method"]]
    modules = [name.removesuffix(suffixes[0]) for name in names if name.endswith(f".{suffixes[0]}")]
    stored = {f"{module}weight": tuple(f"{module}{suffix}" for suffix in suffixes) for module in modules}
    return {weight: parts for weight, parts in stored.items() if parts[1] in names}


def unpacked_shape(shape: tuple[int, ...], dtype: str) -> tuple[int, ...]:
    """Shape of the weight that stored bitnet codes mean: four rows of codes lie in one of bytes."""
    return (shape[0] * _CODES_PER_BYTE, *shape[1:]) if dtype == "U8" else shape


def unpack(parts: Sequence[Tensor], config: dict[str, Any]) -> TernaryTensor:
    """Codes and scale of a packed weight.

    Args:
        parts: what ``packed_weights`` names.
        config: the model's ``config.json``.

    Raises:
        BitconvertError: they are not what a packed weight is stored as.
    """
    if config["quantization_config"]["quant_method"] == "bitnet":
        return unpack_bitnet(parts[0], parts[1], config)
    return _unpack_words(*parts)


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


def _unpack_words(packed: Tensor, scale: Tensor, shape: Tensor) -> TernaryTensor:
    """compressed-tensors: sixteen codes of a row in a word, low bits first, each stored as code + 2."""
    _require(packed.dtype == torch.int32 and packed.dim() == scale.dim() == 2 and shape.shape == (2,))
    rows, columns = (int(size) for size in shape)
    groups = scale.shape[1]
    _require(columns > 0 and packed.shape == (rows, -(-columns // _CODES_PER_WORD)))
    _require(scale.is_floating_point() and scale.shape[0] == rows and groups > 0 and columns % groups == 0)
    bits = packed.contiguous().view(torch.uint8).unsqueeze(-1) >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)
    codes = (bits & 3).view(torch.int8).flatten(1)[:, :columns] - 2
    if int(codes.min()) < -1:
        raise BitconvertError("it holds other values than -1, 0 and 1", "only ternary weights are read")
    return TernaryTensor(codes, scale.float())


def _require(holds: bool) -> None:
    if not holds:
        raise BitconvertError("its codes, scales and shape do not fit together", "the file is damaged: pack it again")


def _has_two_bit_weights(quantization: dict[str, Any]) -> bool:
    """Whether symmetric two-bit weights are all that compressed-tensors quantized."""
    groups = quantization.get("config_groups")
    if quantization.get("format") != "pack-quantized" or not isinstance(groups, dict) or len(groups) != 1:
        return False
    group = next(iter(groups.values()))
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict) or group.get("input_activations"):
        return False
    return weights.get("num_bits") == 2 and weights.get("symmetric") is True
