"""What differs between architectures: one row each, nothing else.

A new architecture is one row here and one tiny random model in the tests; it may enter when its GGUF gives the same
log-probabilities in llama.cpp as the model gives in transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from bitconvert.errors import BitconvertError


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        model_type: ``model_type`` of the Hugging Face config.
        architecture: class name that ``architectures`` of the config must hold.
        gguf_arch: ``general.architecture`` of the GGUF file.
        linears: module names inside a block that become ternary.
        permute_rope: whether llama.cpp wants the rows of q and k interleaved per head (its NORM style of RoPE).
    """

    model_type: str
    architecture: str
    gguf_arch: str
    linears: tuple[str, ...]
    permute_rope: bool

    def is_ternary_module(self, name: str) -> bool:
        """Whether the module of this dotted name (no ``.weight``) is one of the block's linears."""
        return re.fullmatch(r"model\.layers\.\d+\.(?:" + "|".join(map(re.escape, self.linears)) + ")", name) is not None

    def ternary_modules(self, names: Iterable[str]) -> list[str]:
        """Those of the dotted module names that become ternary, in the order given."""
        return [name for name in names if self.is_ternary_module(name)]


_LLAMA_LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)

FAMILIES = {
    row.model_type: row for row in (Family("llama", "LlamaForCausalLM", "llama", _LLAMA_LINEARS, permute_rope=True),)
}


def family_of(model_type: str, name: str) -> Family:
    """The row of an architecture.

    Args:
        model_type: as the model's config says.
        name: the model as the user named it, for the error line.

    Raises:
        BitconvertError: the architecture is not supported.
    """
    if model_type not in FAMILIES:
        raise BitconvertError(
            f"{name}: architecture '{model_type}' is not supported",
            f"supported architectures: {', '.join(sorted(FAMILIES))}",
        )
    return FAMILIES[model_type]
