"""What llama.cpp must be told about a model besides its tensors and its vocabulary.

Sources: GGUF specification (ggml/docs/gguf.md); ``llama_model::load_hparams`` for what each key means.
"""

from __future__ import annotations

import numpy as np
from gguf import GGUFWriter, RopeScalingType
from numpy.typing import NDArray
from transformers import PreTrainedConfig

from bitconvert.errors import BitconvertError
from bitconvert.models.rope import llama3_factors

_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_YARN_DEFAULTS = {"attention_factor": None, "beta_fast": 32, "beta_slow": 1, "mscale": None, "mscale_all_dim": None}
"""What llama.cpp's arch llama computes with; it has no key for other values."""


def require_expressible(config: PreTrainedConfig, name: str) -> None:
    """Refuse what llama.cpp's graph of this architecture does not compute.

    Raises:
        BitconvertError: naming the config key.
    """
    if config.hidden_act != "silu":
        raise _not_computed(name, f"hidden_act '{config.hidden_act}'", "silu")
    rope = config.rope_parameters
    if rope["rope_type"] not in _ROPE_TYPES:
        raise _not_computed(name, f"rope_type '{rope['rope_type']}'", ", ".join(_ROPE_TYPES))
    if rope.get("partial_rotary_factor", 1) != 1:
        raise _not_computed(name, f"partial_rotary_factor {rope['partial_rotary_factor']}", "1")
    if rope["rope_type"] == "yarn":
        for key, default in _YARN_DEFAULTS.items():
            if rope.get(key, default) != default:
                raise _not_computed(name, f"yarn with {key} {rope[key]}", f"yarn with {key} left out")


def add_hparams(writer: GGUFWriter, config: PreTrainedConfig, rows: int) -> None:
    """Write the architecture's keys.

    Args:
        writer: its architecture is the prefix of the keys.
        config: with every default filled in.
        rows: rows of the embedding, which is the vocabulary's size to llama.cpp.
    """
    writer.add_vocab_size(rows)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    _add_rope(writer, config)


def rope_factors(config: PreTrainedConfig) -> NDArray[np.float32] | None:
    """The tensor ``rope_freqs.weight``, float32 of shape (head_dim / 2,), for models whose rope_type is llama3."""
    if config.rope_parameters["rope_type"] != "llama3":
        return None
    return llama3_factors(config.rope_parameters, config.head_dim)


def _add_rope(writer: GGUFWriter, config: PreTrainedConfig) -> None:
    rope = config.rope_parameters
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        writer.add_rope_scaling_orig_ctx_len(
            int(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
        )


def _not_computed(name: str, what: str, known: str) -> BitconvertError:
    return BitconvertError(f"{name}: llama.cpp does not compute {what} for this architecture", f"supported: {known}")
