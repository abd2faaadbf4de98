"""Numbers that a Hugging Face config and a GGUF file both hold: one table for writer and reader.

Sources: GGUF specification (ggml/docs/gguf.md); llama.cpp's ``load_arch_hparams`` for what each key means.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Value = Any | Callable[[Any], Any]
"""A value, or a function that tells it from the rest of the config."""


def resolve(value: Value, config: Any) -> Any:
    """The value itself, for this config."""
    return value(config) if callable(value) else value


def spellings(value: Any) -> tuple[Any, ...]:
    """All that mean the same: the entries of a tuple, or the one value there is. The first is the one to write."""
    return value if isinstance(value, tuple) else (value,)


_REQUIRED = object()


@dataclass(frozen=True)
class Hparam:
    """One number under both its names.

    Attributes:
        key: in the file, after the architecture's name.
        attribute: in the config.
        kind: int, float or bool.
        default: what a file without the key means; a file must have it if there is no default.
    """

    key: str
    attribute: str
    kind: type
    default: Value = _REQUIRED

    @property
    def required(self) -> bool:
        """Whether no file can do without it."""
        return self.default is _REQUIRED

    def stated(self, config: Any) -> Any:
        """What a config says, or the default where it leaves the attribute out."""
        value = getattr(config, self.attribute, None)
        return self.kind(resolve(self.default, config) if value is None and not self.required else value)


def head_dim(config: Any) -> int:
    """Size of an attention head; many configs leave it out."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


COMMON = (
    Hparam("context_length", "max_position_embeddings", int),
    Hparam("embedding_length", "hidden_size", int),
    Hparam("block_count", "num_hidden_layers", int),
    Hparam("feed_forward_length", "intermediate_size", int),
    Hparam("attention.head_count", "num_attention_heads", int),
    Hparam("attention.head_count_kv", "num_key_value_heads", int, default=lambda config: config.num_attention_heads),
    Hparam("attention.key_length", "head_dim", int, default=head_dim),
)
"""What every file holds."""

RMS_NORM_EPS = Hparam("attention.layer_norm_rms_epsilon", "rms_norm_eps", float)
LAYER_NORM_EPS = Hparam("attention.layer_norm_epsilon", "layer_norm_eps", float)
SLIDING_WINDOW = Hparam("attention.sliding_window", "sliding_window", int)
ORIGINAL_CONTEXT = Hparam(
    "rope.scaling.original_context_length",
    "original_max_position_embeddings",
    int,
    default=lambda config: config.max_position_embeddings,
)
