"""Safetensors as stock transformers load them: ``quant_method: bitnet``, ``linear_class: bitlinear``, offline.

A linear layer is two tensors (transformers/integrations/bitnet.py): ``weight``, uint8 (out / 4, in), where with
R = out / 4 bits 2i and 2i + 1 of byte [r, c] hold code[i R + r, c] + 1; and ``weight_scale``, shape (1,), by which the
layer *divides*: the inverse of our scale. Inverse scales exist in this file only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitconvert.packing.formats.base import Format
from bitconvert.recipe import Scaling
from bitconvert.ternary.quantize import TernaryTensor

_CODES_PER_BYTE = 4


class HfBitnet(Format):
    """Four trits a byte along ``out``, one scale per tensor."""

    name = "safetensors"
    container = "bitnet"
    bits_per_weight = 2.0
    row_multiple = 1
    runs_in = "transformers, mlx-lm"

    def refusal(self, scaling: Scaling) -> str | None:
        """Only a scale per tensor: transformers' BitLinear holds a single number."""
        if scaling.granularity == "tensor":
            return None
        return f"transformers' BitLinear has one scale per tensor, and this model has one per {scaling.granularity}"

    def usage(self, path: str) -> str:
        """See ``Format``."""
        return (
            "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{path}")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{path}")\n```'
        )

    def shape_refusal(self, shape: tuple[int, ...]) -> str | None:
        """Why a matrix (out, in) cannot be packed; None if it can."""
        if shape[0] % _CODES_PER_BYTE == 0:
            return None
        return f"it has {shape[0]} rows, and transformers packs {_CODES_PER_BYTE} rows into one"

    def packed_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Shape of ``weight`` for a matrix (out, in)."""
        return (shape[0] // _CODES_PER_BYTE, shape[1])

    def encode(self, tensor: TernaryTensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The two tensors of a layer.

        Args:
            tensor: codes (out, in), out a multiple of 4, and one scale.
            dtype: of the model, and so of ``weight_scale``.

        Returns:
            ``weight``, uint8 (out / 4, in), and ``weight_scale``, (1,). An all-zero tensor gets the scale 1: its own is
            the floor 1e-5, whose inverse would only be an invitation to overflow.
        """
        quarters = (tensor.codes + 1).view(torch.uint8).chunk(_CODES_PER_BYTE)
        weight = quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6
        scale = tensor.scale if bool(tensor.codes.any()) else torch.ones(1)
        return weight, (1 / scale).to(dtype)

    def decode(self, weight: Tensor, weight_scale: Tensor) -> TernaryTensor:
        """The inverse of ``encode``: codes int8 (out, in) and the scale, float32 (1,), as the layer applies it."""
        codes = torch.cat([(weight >> 2 * i & 3).view(torch.int8) - 1 for i in range(_CODES_PER_BYTE)])
        return TernaryTensor(codes, 1 / weight_scale.float())
