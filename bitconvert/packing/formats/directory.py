"""What the formats have in common that fill a Hugging Face directory with safetensors."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from bitconvert.models.safetensors_file import TensorSpec
from bitconvert.packing.formats.base import Format
from bitconvert.recipe import Scaling
from bitconvert.ternary.quantize import TernaryTensor

PLAIN_DTYPE = torch.float32
"""Of everything that is not a code: norms, biases, embeddings, scales. It holds a float16 scale exactly."""


class DirectoryFormat(Format):
    """A linear layer becomes a few tensors: ``<module>.<suffix>``, one of which holds the codes.

    Attributes:
        directory: what the directory is called after the model: ``<model>-<directory>``.
        method: ``quant_method`` of the config.
        codes: suffix of the tensor that holds the codes.
        codes_dtype: of that tensor, as safetensors names it.
    """

    container = "directory"
    row_multiple = 1
    directory: ClassVar[str]
    method: ClassVar[str]
    codes: ClassVar[str]
    codes_dtype: ClassVar[str]

    def usage(self, path: str) -> str:
        """See ``Format``."""
        return (
            "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{path}")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{path}")\n'
            'prompt = tokenizer("Once upon a time", return_tensors="pt")\n'
            "print(tokenizer.decode(model.generate(**prompt, max_new_tokens=40)[0]))\n```"
        )

    def note(self, kept: Sequence[str]) -> str:
        """What the user of a model should know of which some linears, by their dotted names, are not packed."""
        return ""

    @abstractmethod
    def shape_refusal(self, shape: tuple[int, ...]) -> str | None:
        """Why a matrix (out, in) cannot be packed; None if it can."""

    @abstractmethod
    def quantization(self, scaling: Scaling, plain_linears: Sequence[str]) -> dict[str, Any]:
        """``quantization_config`` of a model whose linears are packed, all but the plain ones."""

    @abstractmethod
    def specs(self, shape: tuple[int, ...], scaling: Scaling) -> dict[str, TensorSpec]:
        """The tensors that a matrix (out, in) becomes, by suffix."""

    @abstractmethod
    def encode(self, tensor: TernaryTensor) -> dict[str, Tensor]:
        """Codes (out, in) and scales to the tensors that ``specs`` announces."""

    @abstractmethod
    def decode(self, stored: Mapping[str, Tensor]) -> TernaryTensor:
        """The inverse of ``encode``: codes, int8 (out, in), and the scales that the layer applies, float32."""
