"""compressed-tensors, 2-bit ``pack-quantized``: what vLLM reads, and transformers with the compressed-tensors package.

A linear layer is three tensors (compressed_tensors/compressors/pack_quantized): ``weight_packed``, int32
(out, ceil(in / 16)), 16 neighbours of a row a word, low bits first, each stored as code + 2 (two signed bits reach from
-2 to 1); ``weight_scale``, (out, 1) or (out, in / N); ``weight_shape``, int64 (out, in). A row that ends within a word
is padded with zero bits. Scales multiply, and activations stay floats: there is no int8 in these layers.

vLLM wants a scale per row or per group, so one scale per tensor is repeated for each row. In vLLM 0.33 two symmetric
bits are in the table of layers/quantization/compressed_tensors/schemes/compressed_tensors_wNa16.py, and of its kernels
the one that takes them is Humming (kernels/linear/mixed_precision/humming.py): NVIDIA GPUs of capability 7.5 and up.
Marlin, Machete and those of CPU and AMD want four or eight bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bitconvert.models.safetensors_file import TensorSpec
from bitconvert.packing.formats.directory import PLAIN_DTYPE, DirectoryFormat
from bitconvert.recipe import Scaling
from bitconvert.ternary.quantize import TernaryTensor

_BITS = 2
_OFFSET = 2
_CODES_PER_WORD = 32 // _BITS

_FUSED_BY_VLLM = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears that vLLM makes one of; it refuses a model that packs some of them and some not (should_ignore_layer in
layers/quantization/compressed_tensors/utils.py)."""


class CompressedTensors(DirectoryFormat):
    """Sixteen codes a word along ``in``, one scale per row or group."""

    name = "compressed-tensors"
    bits_per_weight = 2.0
    runs_in = "vLLM on NVIDIA GPUs; transformers with the compressed-tensors package"
    directory = "compressed-tensors"
    method = "compressed-tensors"
    codes = "weight_packed"
    codes_dtype = "I32"

    def refusal(self, scaling: Scaling) -> str | None:
        """Every scaling fits."""
        return None

    def usage(self, path: str) -> str:
        """See ``Format``; float16 holds the scales exactly, bfloat16 does not."""
        return f"```sh\nvllm serve {path} --dtype float16\n```\n\n{super().usage(path)}"

    def note(self, kept: Sequence[str]) -> str:
        """See ``DirectoryFormat``."""
        for name in kept:
            parent, _, linear = name.rpartition(".")
            for fused in _FUSED_BY_VLLM:
                if linear in fused and not {f"{parent}.{each}" for each in fused} <= set(kept):
                    return (
                        f"vLLM will refuse it, transformers will not: {name} is kept from being ternary, so all of "
                        f"{', '.join(fused)} must be"
                    )
        return ""

    def shape_refusal(self, shape: tuple[int, ...]) -> str | None:
        """Every shape fits: rows are padded."""
        return None

    def quantization(self, scaling: Scaling, plain_linears: Sequence[str]) -> dict[str, Any]:
        """See ``DirectoryFormat``."""
        weights = {
            "num_bits": _BITS,
            "type": "int",
            "symmetric": True,
            "dynamic": False,
            "strategy": "group" if scaling.group_size else "channel",
            "group_size": scaling.group_size,
        }
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
        return {
            "quant_method": self.method,
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": list(plain_linears),
        }

    def specs(self, shape: tuple[int, ...], scaling: Scaling) -> dict[str, TensorSpec]:
        """See ``DirectoryFormat``."""
        rows, columns = shape
        return {
            "weight_packed": TensorSpec(torch.int32, (rows, -(-columns // _CODES_PER_WORD))),
            "weight_scale": TensorSpec(PLAIN_DTYPE, (rows, columns // (scaling.group_size or columns))),
            "weight_shape": TensorSpec(torch.int64, (2,)),
        }

    def encode(self, tensor: TernaryTensor) -> dict[str, Tensor]:
        """The three tensors of a layer of any shape and scaling."""
        rows, columns = tensor.codes.shape
        stored = functional.pad((tensor.codes + _OFFSET).view(torch.uint8), (0, -columns % _CODES_PER_WORD))
        quads = stored.view(rows, -1, 4)
        packed = quads[..., 0] | quads[..., 1] << 2 | quads[..., 2] << 4 | quads[..., 3] << 6
        return {
            "weight_packed": packed.contiguous().view(torch.int32),
            "weight_scale": tensor.scale.view(-1, tensor.scale.shape[-1]).expand(rows, -1).to(PLAIN_DTYPE),
            "weight_shape": torch.tensor([rows, columns]),
        }

    def decode(self, stored: Mapping[str, Tensor]) -> TernaryTensor:
        """See ``DirectoryFormat``; one scale per row or group."""
        columns = int(stored["weight_shape"][1])
        packed = stored["weight_packed"].view(torch.uint8).unsqueeze(-1)
        codes = (packed >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8) & 3).flatten(1)[:, :columns]
        return TernaryTensor(codes.view(torch.int8) - _OFFSET, stored["weight_scale"].float())
