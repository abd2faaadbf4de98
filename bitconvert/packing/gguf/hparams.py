"""What llama.cpp must be told about a model besides its tensors and its vocabulary, and what it cannot be told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from gguf import GGUFWriter
from transformers import PreTrainedConfig

from bitconvert.errors import BitconvertError
from bitconvert.models.families import FAMILIES, Family
from bitconvert.models.gguf_rope import rope_keys
from bitconvert.models.hparams import COMMON, SLIDING_WINDOW, head_dim, resolve, spellings
from bitconvert.models.rope import global_rope, local_rope

_YARN: dict[str, Any] = {
    "attention_factor": None,
    "beta_fast": (32, None),
    "beta_slow": (1, None),
    "mscale": None,
    "mscale_all_dim": None,
    "truncate": (True, None),
}
"""What llama.cpp's graphs compute with, unless a family says otherwise; a tuple holds several spellings."""


def require_expressible(config: PreTrainedConfig, name: str) -> None:
    """Refuse what llama.cpp's graph of this architecture does not compute.

    Args:
        config: with every default filled in.
        name: the model as the user named it.

    Raises:
        BitconvertError: naming the config key.
    """
    family = FAMILIES[config.model_type]
    for what, known in (*_unlike_the_graph(config, family), *_unlike_its_rope(config, family)):
        raise BitconvertError(f"{name}: llama.cpp does not compute {what} for this architecture", f"supported: {known}")
    _require_window(config, family, name)


def note_on_graph(config: PreTrainedConfig) -> str:
    """Where llama.cpp and transformers part although both compute this architecture; empty where they do not."""
    rope = global_rope(config)
    if rope["rope_type"] != "longrope":
        return ""
    original = rope["original_max_position_embeddings"]
    return (
        f"llama.cpp takes the long rope factors as soon as its context (-c) exceeds {original} tokens, transformers "
        f"as soon as the text does: run short texts with -c {original}"
    )


def add_hparams(writer: GGUFWriter, config: PreTrainedConfig, rows: int) -> None:
    """Write the architecture's keys.

    Args:
        writer: its architecture is the prefix of the keys.
        config: with every default filled in.
        rows: rows of the embedding, which is the vocabulary's size to llama.cpp.
    """
    family = FAMILIES[config.model_type]
    keys: dict[str, Any] = {"vocab_size": rows, "attention.value_length": head_dim(config)}
    keys |= {row.key: row.stated(config) for row in (*COMMON, *family.hparams)}
    for key, value in {**keys, **rope_keys(config), **family.constants}.items():
        _add(writer, f"{family.gguf_arch}.{key}", value)


def _add(writer: GGUFWriter, key: str, value: int | float | bool | str) -> None:
    add: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
    }
    add[type(value)](key, value)


Unlike = Iterator[tuple[str, str]]
"""What a config says and llama.cpp does not compute, and what it does compute."""


def _unlike_the_graph(config: PreTrainedConfig, family: Family) -> Unlike:
    for key, value in family.computed.items():
        said, computed = getattr(config, key, None), spellings(resolve(value, config))
        if said not in computed:
            yield f"{key} {said!r}", str(computed[0])
    for row in family.hparams:
        if getattr(config, row.attribute) is None:
            yield f"{row.attribute} None", "a number"


def _unlike_its_rope(config: PreTrainedConfig, family: Family) -> Unlike:
    rope, local = global_rope(config), local_rope(config)
    if rope["rope_type"] not in family.rope_types:
        yield f"rope_type '{rope['rope_type']}'", ", ".join(family.rope_types)
    if local is not None and local["rope_type"] != "default":
        yield f"rope_type '{local['rope_type']}' in layers with a sliding window", "default"
    if not family.partial_rope and rope.get("partial_rotary_factor", 1) != 1:
        yield f"partial_rotary_factor {rope['partial_rotary_factor']}", "1"
    if rope["rope_type"] in ("linear", "llama3", "yarn") and rope.get("factor") is None:
        yield f"{rope['rope_type']} with factor None", "a number"
    if rope["rope_type"] == "yarn":
        for key, value in (_YARN | dict(family.rope)).items():
            if rope.get(key) not in spellings(value):
                yield f"yarn with {key} {rope.get(key)}", f"yarn with {key} {spellings(value)[0]}"


def _require_window(config: PreTrainedConfig, family: Family, name: str) -> None:
    """Refuse a sliding window that the graph ignores, unless it is as long as the context."""
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    if SLIDING_WINDOW in family.hparams or not window or not slides or window >= config.max_position_embeddings:
        return
    raise BitconvertError(
        f"{name}: llama.cpp ignores this architecture's sliding_window of {window}, shorter than its context of "
        f"{config.max_position_embeddings}",
        f'within the window both compute the same: set "max_position_embeddings": {window} in config.json',
    )
