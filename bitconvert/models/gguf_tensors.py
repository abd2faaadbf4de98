"""Tensors of a Hugging Face model under llama.cpp's names and in llama.cpp's form, and back."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
from torch import Tensor

from bitconvert.errors import BitconvertError
from bitconvert.models.families import Family
from bitconvert.models.rope import deinterleave_rows, interleave_rows

_NOT_WEIGHTS = re.compile(r".*\.rotary_emb\.inv_freq")
"""Buffers that old checkpoints stored although every program computes them."""

_ROTATED = {"self_attn.q_proj": "num_attention_heads", "self_attn.k_proj": "num_key_value_heads"}


def gguf_names(names: Iterable[str], config: Any, family: Family) -> dict[str, str]:
    """The GGUF name of every tensor that belongs into the file, in the order given.

    Buffers that are computed anyway are left out, and so is lm_head when it is tied to the embedding, because
    llama.cpp then uses the embedding in its place.

    Args:
        names: tensor names of the Hugging Face model.
        config: with every default filled in.
        family: the architecture's row.

    Raises:
        BitconvertError: a tensor has no place in this architecture, or an untied model has no lm_head.
    """
    names = list(names)
    tied = bool(config.tie_word_embeddings)
    if not tied and "lm_head.weight" not in names:
        raise BitconvertError(
            "tensor lm_head.weight is missing, and config.json does not tie it to the embedding",
            'if the model shares them, set "tie_word_embeddings": true in config.json',
        )
    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == family.gguf_arch)
    translate = get_tensor_name_map(arch, config.num_hidden_layers)
    kept = [name for name in names if not (_NOT_WEIGHTS.fullmatch(name) or (tied and name == "lm_head.weight"))]
    return {name: _translated(translate.get_name(name, try_suffixes=(".weight", ".bias")), name) for name in kept}


def to_gguf_rows(rows: Tensor, name: str, config: Any, family: Family) -> Tensor:
    """Bring a tensor, or what belongs to its rows, into llama.cpp's form.

    Args:
        rows: shape (out, ...): weights, ternary codes, scales per row or group, or a bias. A scale per tensor, shape
            (1,), passes unchanged.
        name: Hugging Face name of the tensor.
        config: with every default filled in.
        family: the architecture's row.
    """
    if _is_shifted(name, family):
        return rows + family.norm_shift
    heads = _rotated_heads(name, config, family)
    return rows if heads is None or rows.shape[0] == 1 else interleave_rows(rows, heads)


def from_gguf_rows(rows: Tensor, name: str, config: Any, family: Family) -> Tensor:
    """The inverse of ``to_gguf_rows``; a shifted norm comes back within the rounding of float32."""
    if _is_shifted(name, family):
        return rows - family.norm_shift
    heads = _rotated_heads(name, config, family)
    return rows if heads is None or rows.shape[0] == 1 else deinterleave_rows(rows, heads)


def _is_shifted(name: str, family: Family) -> bool:
    return family.norm_shift != 0 and name.endswith("norm.weight")


def _rotated_heads(name: str, config: Any, family: Family) -> int | None:
    """How many heads a tensor's rows make that are to change places within each; None if they stay where they are."""
    module = re.fullmatch(r"model\.layers\.\d+\.(.+)\.(?:weight|bias)", name)
    if not family.permute_rope or module is None or module[1] not in _ROTATED:
        return None
    return int(getattr(config, _ROTATED[module[1]]))


def _translated(gguf_name: str | None, name: str) -> str:
    if gguf_name is None:
        raise BitconvertError(
            f"tensor {name}: llama.cpp has no place for it in this architecture",
            "only unmodified architectures can be packed; merge or remove what was added to the model",
        )
    return gguf_name
