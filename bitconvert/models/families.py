"""What differs between architectures: one row each, nothing else.

A new architecture is one row here and one tiny random model in the tests; it may enter when its GGUF gives the same
log-probabilities in llama.cpp as the model gives in transformers. What a row says of llama.cpp's graphs was read in its
src/models/*.cpp and proven by those tests.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bitconvert.errors import BitconvertError
from bitconvert.models.hparams import (
    LAYER_NORM_EPS,
    ORIGINAL_CONTEXT,
    RMS_NORM_EPS,
    SLIDING_WINDOW,
    Hparam,
    Value,
)

_LLAMA_LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
_FUSED_MLP = (*_LLAMA_LINEARS[:4], "mlp.gate_up_proj", "mlp.down_proj")
_FUSED = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        model_type: ``model_type`` of the Hugging Face config.
        architecture: class name that ``architectures`` of the config must hold.
        gguf_arch: ``general.architecture`` of the GGUF file. Of several families that share one, a file is read as the
            first.
        linears: module names inside a block that become ternary; fused ones stay fused, with one scale.
        permute_rope: whether llama.cpp wants the rows of q and k interleaved per head (its NORM style of RoPE).
        norm_shift: added to the weights of all norms on the way to llama.cpp, which multiplies by them alone.
        logits_divisor: attribute of the config that the logits are divided by.
        logits_softcap: attribute of the config that they cannot exceed, whatever their size before; it may be None.
        hparams: numbers that the file holds besides those that every file holds.
        flags: attributes of the config that are true if a tensor is there, and the tensor.
        computed: attributes of the config that the graph takes for granted, and with what; a tuple holds several
            spellings of one thing. A config that says otherwise is not packed, a file is read with the first.
        rope_types: kinds of ``rope_parameters`` that the graph computes.
        rope: values inside ``rope_parameters`` that the graph takes for granted, like ``computed``.
        partial_rope: whether a part of each head may stay unrotated.
        local_theta: where layers with a sliding window rotate by a base of their own, that base if a file does not say.
        constants: keys that every file of this family holds as they are.
    """

    model_type: str
    architecture: str
    gguf_arch: str
    linears: tuple[str, ...] = _LLAMA_LINEARS
    permute_rope: bool = False
    norm_shift: float = 0.0
    logits_divisor: str | None = None
    logits_softcap: str | None = None
    hparams: tuple[Hparam, ...] = (RMS_NORM_EPS,)
    flags: Mapping[str, str] = field(default_factory=dict)
    computed: Mapping[str, Value] = field(default_factory=dict)
    rope_types: tuple[str, ...] = ("default", "linear", "yarn")
    rope: Mapping[str, Value] = field(default_factory=dict)
    partial_rope: bool = False
    local_theta: float | None = None
    constants: Mapping[str, float] = field(default_factory=dict)

    def is_ternary_module(self, name: str) -> bool:
        """Whether the module of this dotted name (no ``.weight``) is one of the block's linears."""
        return re.fullmatch(r"model\.layers\.\d+\.(?:" + "|".join(map(re.escape, self.linears)) + ")", name) is not None

    def ternary_modules(self, names: Iterable[str]) -> list[str]:
        """Those of the dotted module names that become ternary, in the order given."""
        return [name for name in names if self.is_ternary_module(name)]


# ---- what llama.cpp's graphs take for granted --------------------------------------------------------------------

_LLAMA_ROPE = ("default", "linear", "llama3", "yarn")
_SILU = {"hidden_act": ("silu", "swish")}
_BIASED_ATTENTION = {"attention_bias": "blk.0.attn_q.bias"}
_BIASED_ATTENTION_AND_MLP = {**_BIASED_ATTENTION, "mlp_bias": "blk.0.ffn_down.bias"}
_GEMMA = {
    "attention_bias": False,
    "use_bidirectional_attention": (False, None),
}


def _square_head_dim(config: Any) -> tuple[int, None]:
    """Heads that share hidden_size among them; a config that leaves their size out means just this."""
    return (config.hidden_size // config.num_attention_heads, None)


def _every(period: int, kind: Any, others: Any) -> Value:
    """One entry per layer: ``kind`` for every layer whose number, counted from 1, the period divides."""

    def pattern(config: Any) -> list[Any]:
        return [kind if (layer + 1) % period == 0 else others for layer in range(config.num_hidden_layers)]

    return pattern


def _query_scalar(largest: int) -> Value:
    """Gemma divides by the root of the head's size, and in its largest model by that of hidden_size / heads."""

    def scalar(config: Any) -> int:
        shared = config.hidden_size // config.num_attention_heads
        return int(shared if config.num_hidden_layers == largest else config.head_dim)

    return scalar


FAMILIES = {
    row.model_type: row
    for row in (
        Family(
            "llama",
            "LlamaForCausalLM",
            "llama",
            permute_rope=True,
            flags=_BIASED_ATTENTION_AND_MLP,
            computed=_SILU,
            rope_types=_LLAMA_ROPE,
        ),
        Family("mistral", "MistralForCausalLM", "llama", permute_rope=True, computed=_SILU, rope_types=_LLAMA_ROPE),
        Family("ministral", "MinistralForCausalLM", "llama", permute_rope=True, computed=_SILU, rope_types=_LLAMA_ROPE),
        Family(
            "ministral3",
            "Ministral3ForCausalLM",
            "mistral3",
            permute_rope=True,
            computed=_SILU,
            rope_types=("yarn",),
            rope={"mscale": 1, "mscale_all_dim": 1},
            constants={"rope.scaling.yarn_log_multiplier": 1.0},
        ),
        Family("qwen2", "Qwen2ForCausalLM", "qwen2", computed={**_SILU, "head_dim": _square_head_dim}),
        Family("qwen3", "Qwen3ForCausalLM", "qwen3", computed={**_SILU, "attention_bias": False}),
        Family(
            "gemma",
            "GemmaForCausalLM",
            "gemma",
            norm_shift=1.0,
            computed={**_GEMMA, "hidden_act": ("gelu_pytorch_tanh", "gelu_new"), "tie_word_embeddings": True},
        ),
        Family(
            "gemma2",
            "Gemma2ForCausalLM",
            "gemma2",
            norm_shift=1.0,
            logits_softcap="final_logit_softcapping",
            hparams=(
                RMS_NORM_EPS,
                SLIDING_WINDOW,
                Hparam("attn_logit_softcapping", "attn_logit_softcapping", float, default=50.0),
                Hparam("final_logit_softcapping", "final_logit_softcapping", float, default=30.0),
            ),
            computed={
                **_GEMMA,
                "hidden_activation": ("gelu_pytorch_tanh", "gelu_new"),
                "tie_word_embeddings": True,
                "layer_types": _every(2, "full_attention", "sliding_attention"),
                "query_pre_attn_scalar": _query_scalar(largest=46),
            },
        ),
        Family(
            "gemma3_text",
            "Gemma3ForCausalLM",
            "gemma3",
            norm_shift=1.0,
            logits_softcap="final_logit_softcapping",
            hparams=(RMS_NORM_EPS, SLIDING_WINDOW),
            computed={
                **_GEMMA,
                "hidden_activation": ("gelu_pytorch_tanh", "gelu_new"),
                "layer_types": _every(6, "full_attention", "sliding_attention"),
                "query_pre_attn_scalar": _query_scalar(largest=62),
                "attn_logit_softcapping": None,
                "final_logit_softcapping": None,
            },
            rope_types=("default", "linear"),
            local_theta=10000.0,
        ),
        Family(
            "phi3",
            "Phi3ForCausalLM",
            "phi3",
            linears=_FUSED,
            hparams=(RMS_NORM_EPS, ORIGINAL_CONTEXT),
            computed={**_SILU, "head_dim": _square_head_dim},
            rope_types=("default", "longrope"),
            partial_rope=True,
        ),
        Family(
            "smollm3",
            "SmolLM3ForCausalLM",
            "smollm3",
            permute_rope=True,
            computed={**_SILU, "attention_bias": False, "mlp_bias": False, "no_rope_layers": _every(4, 0, 1)},
        ),
        Family(
            "granite",
            "GraniteForCausalLM",
            "granite",
            permute_rope=True,
            logits_divisor="logits_scaling",
            hparams=(
                RMS_NORM_EPS,
                Hparam("attention.scale", "attention_multiplier", float),
                Hparam("embedding_scale", "embedding_multiplier", float),
                Hparam("residual_scale", "residual_multiplier", float),
                Hparam("logit_scale", "logits_scaling", float),
            ),
            flags=_BIASED_ATTENTION_AND_MLP,
            computed=_SILU,
            rope_types=_LLAMA_ROPE,
        ),
        Family(
            "olmo2",
            "Olmo2ForCausalLM",
            "olmo2",
            computed={**_SILU, "attention_bias": False, "tie_word_embeddings": False, "head_dim": _square_head_dim},
        ),
        Family(
            "stablelm",
            "StableLmForCausalLM",
            "stablelm",
            hparams=(LAYER_NORM_EPS, Hparam("use_parallel_residual", "use_parallel_residual", bool)),
            flags={"use_qkv_bias": "blk.0.attn_q.bias"},
            computed={**_SILU, "qk_layernorm": False, "tie_word_embeddings": False, "head_dim": _square_head_dim},
            partial_rope=True,
        ),
        Family(
            "glm4",
            "Glm4ForCausalLM",
            "glm4",
            linears=_FUSED_MLP,
            flags=_BIASED_ATTENTION,
            computed=_SILU,
            partial_rope=True,
        ),
    )
}


def family_of(config: Mapping[str, Any], name: str) -> Family:
    """The row of a model's architecture.

    Args:
        config: ``config.json``.
        name: the model as the user named it, for the error line.

    Raises:
        BitconvertError: the architecture is not supported.
    """
    model_type = str(config.get("model_type"))
    if _experts(config):
        raise BitconvertError(
            f"{name}: architecture '{model_type}' is a mixture of experts", _supported("dense models")
        )
    if model_type not in FAMILIES:
        wraps = ", which wraps a text model in a multimodal one," if "text_config" in config else ""
        raise BitconvertError(f"{name}: architecture '{model_type}'{wraps} is not supported", _supported("supported"))
    return FAMILIES[model_type]


def gguf_family_of(arch: str, name: str) -> Family:
    """The row that reads a GGUF file of this ``general.architecture``; arguments and errors as ``family_of``."""
    for family in FAMILIES.values():
        if family.gguf_arch == arch:
            return family
    raise BitconvertError(f"{name}: architecture '{arch}' is not supported", _supported("supported"))


def _experts(config: Mapping[str, Any]) -> bool:
    """Whether a config, or the text model inside it, counts its experts."""
    counts = (value for key, value in config.items() if "expert" in key)
    inside = config.get("text_config")
    return any(isinstance(count, int) and count > 1 for count in counts) or (
        isinstance(inside, Mapping) and _experts(inside)
    )


def _supported(what: str) -> str:
    return f"{what}: {', '.join(sorted(FAMILIES))}"
