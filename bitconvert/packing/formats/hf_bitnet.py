"""Safetensors as stock transformers load them: ``quant_method: bitnet``, ``linear_class: bitlinear``, offline.

A linear layer is two tensors (transformers/integrations/bitnet.py): ``weight``, uint8 (out / 4, in), where with
R = out / 4 bits 2i and 2i + 1 of byte [r, c] hold code[i R + r, c] + 1; and ``weight_scale``, shape (1,), by which the
layer *divides*: the inverse of our scale. Inverse scales exist in this file only.

Everything that is not ternary is stored in float32. Measured against a float64 BitLinear, the relative error of the
logits of tiny-llama (and of an untrained model of SmolLM2-135M's 30 layers) is

    stored in float32                       0.005 (0.009)   what is left: int8 activations that round the other way
    stored in bfloat16, run in float32      0.011 (0.020)   1/scale loses up to 0.4 % in every matrix
    stored and run in bfloat16              0.013 (0.024)
    stored and run in float16               0.009 (0.064)   BitLinear's 127/absmax * 1/scale overflows on quiet tokens

so float16 is unsafe, and bfloat16 would save half of the embedding at twice the error. Whoever wants to compute in
bfloat16 passes ``dtype=torch.bfloat16`` when loading.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bitconvert.models.safetensors_file import TensorSpec
from bitconvert.packing.formats.directory import PLAIN_DTYPE, DirectoryFormat
from bitconvert.recipe import Scaling
from bitconvert.ternary.quantize import TernaryTensor

_CODES_PER_BYTE = 4


class HfBitnet(DirectoryFormat):
    """Four trits a byte along ``out``, one scale per tensor."""

    name = "safetensors"
    bits_per_weight = 2.0
    runs_in = "transformers, mlx-lm"
    directory = "bitnet"
    method = "bitnet"
    codes = "weight"
    codes_dtype = "U8"

    def refusal(self, scaling: Scaling) -> str | None:
        """Only a scale per tensor: transformers' BitLinear holds a single number."""
        if scaling.granularity == "tensor":
            return None
        return f"transformers' BitLinear has one scale per tensor, and this model has one per {scaling.granularity}"

    def shape_refusal(self, shape: tuple[int, ...]) -> str | None:
        """See ``DirectoryFormat``."""
        if shape[0] % _CODES_PER_BYTE == 0:
            return None
        return f"it has {shape[0]} rows, and transformers packs {_CODES_PER_BYTE} rows into one"

    def quantization(self, scaling: Scaling, plain_linears: Sequence[str]) -> dict[str, Any]:
        """See ``DirectoryFormat``."""
        return {
            "quant_method": self.method,
            "linear_class": "bitlinear",
            "quantization_mode": "offline",
            "modules_to_not_convert": list(plain_linears),
        }

    def specs(self, shape: tuple[int, ...], scaling: Scaling) -> dict[str, TensorSpec]:
        """See ``DirectoryFormat``."""
        return {
            "weight": TensorSpec(torch.uint8, (shape[0] // _CODES_PER_BYTE, shape[1])),
            "weight_scale": TensorSpec(PLAIN_DTYPE, (1,)),
        }

    def encode(self, tensor: TernaryTensor) -> dict[str, Tensor]:
        """The two tensors of a layer.

        Args:
            tensor: codes (out, in), out a multiple of 4, and one scale. An all-zero tensor gets the scale 1: its own is
                the floor 1e-5, whose inverse would only be an invitation to overflow.
        """
        quarters = (tensor.codes + 1).view(torch.uint8).chunk(_CODES_PER_BYTE)
        weight = quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6
        scale = tensor.scale if bool(tensor.codes.any()) else torch.ones(1)
        return {"weight": weight, "weight_scale": (1 / scale).to(PLAIN_DTYPE)}

    def decode(self, stored: Mapping[str, Tensor]) -> TernaryTensor:
        """See ``DirectoryFormat``; one scale, shape (1,)."""
        weight = stored["weight"]
        codes = torch.cat([(weight >> 2 * i & 3).view(torch.int8) - 1 for i in range(_CODES_PER_BYTE)])
        return TernaryTensor(codes, 1 / stored["weight_scale"].float())
