"""Random models to measure with."""

from __future__ import annotations

from transformers import LlamaConfig, LlamaForCausalLM


def random_llama(hidden: int, layers: int, vocabulary: int, **options: object) -> LlamaForCausalLM:
    """A Llama of the proportions of Llama 3; ``options`` of its configuration come on top."""
    shape = {
        "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 128,
        "vocab_size": vocabulary,
    }
    return LlamaForCausalLM(LlamaConfig(**{**shape, **options}))
