"""Rotary embeddings in a GGUF file: ``rope_parameters`` of a config as keys and tensors, and back."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitconvert.errors import BitconvertError
from bitconvert.models.families import Family
from bitconvert.models.gguf_file import GgufFile
from bitconvert.models.hparams import head_dim
from bitconvert.models.rope import Rope, global_rope, llama3_factors, local_rope, recover_llama3

_LLAMA3 = "rope_freqs.weight"
_LONG, _SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = frozenset({_LLAMA3, _LONG, _SHORT})
"""Tensors that are no weights: they hold what a config holds."""

_USUAL = {
    "rope.scaling.attn_factor": 1,
    "rope.scaling.yarn_beta_fast": 32,
    "rope.scaling.yarn_beta_slow": 1,
}
"""Further keys by which llama.cpp's graphs rotate, or some of them, and their values where a file leaves them out."""

_SAME = 1e-5  # relative; float32 stands between the two


def rope_keys(config: Any) -> dict[str, int | float | str]:
    """Keys and values that describe the rotary embedding, without the architecture's name before them."""
    rope, local = global_rope(config), local_rope(config)
    keys: dict[str, int | float | str] = {
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": int(head_dim(config) * rope.get("partial_rotary_factor", 1)),
    }
    if local is not None:
        keys["rope.freq_base_swa"] = float(local["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        keys |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
    if rope["rope_type"] == "longrope":
        keys |= {"rope.scaling.type": "longrope", "rope.scaling.attn_factor": _attention_factor(rope, config)}
    if rope["rope_type"] == "yarn":
        keys["rope.scaling.original_context_length"] = _original_context(rope, config)
    if "llama_4_scaling_beta" in rope:
        keys["attention.temperature_scale"] = float(rope["llama_4_scaling_beta"])
    return keys


def rope_tensors(config: Any) -> dict[str, NDArray[np.float32]]:
    """Tensors of the rotary embedding: by what each frequency is divided, float32 of shape (dimensions / 2,)."""
    rope = global_rope(config)
    if rope["rope_type"] == "llama3":
        return {_LLAMA3: llama3_factors(rope, head_dim(config))}
    if rope["rope_type"] == "longrope":
        factors = {_LONG: rope["long_factor"], _SHORT: rope["short_factor"]}
        return {name: np.array(values, np.float32) for name, values in factors.items()}
    return {}


def rope_parameters(file: GgufFile, family: Family, config: Any) -> dict[str, Any]:
    """The inverse of both, as ``rope_parameters`` of a config.

    Args:
        file: the GGUF file.
        family: its row.
        config: what is known of the model so far: its shape.

    Raises:
        BitconvertError: the file rotates in a way that Hugging Face has no name for.
    """
    theta = float(_get(file, family, "rope.freq_base", 10000.0))
    rope = {"rope_theta": theta} | _rotated_part(file, family, config) | _scaling(file, family, config, theta)
    if family.local_theta is None:
        return rope
    local = float(_get(file, family, "rope.freq_base_swa", family.local_theta))
    return {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": local}}


def _get(file: GgufFile, family: Family, key: str, default: Any = None) -> Any:
    return file.get(f"{family.gguf_arch}.{key}", default)


def _rotated_part(file: GgufFile, family: Family, config: Any) -> Rope:
    whole = head_dim(config)
    rotated = _get(file, family, "rope.dimension_count", whole)
    if family.partial_rope:
        return {"partial_rotary_factor": rotated / whole}
    if rotated != whole:
        raise BitconvertError(
            f"{file.path}: it rotates {rotated} of {whole} dimensions", "this architecture rotates all of them"
        )
    return {}


def _scaling(file: GgufFile, family: Family, config: Any, theta: float) -> Rope:
    """The kind of rotary embedding, and what belongs to the kind."""
    kind = _kind(file, family)
    if kind != "longrope":
        _require_usual(file, family)
    if kind == "llama3":
        return _recovered_llama3(file, theta, head_dim(config))
    rope: Rope = {"rope_type": kind}
    if kind in ("linear", "yarn"):
        rope["factor"] = _factor(file, family) or file.require(f"{family.gguf_arch}.rope.scaling.factor")
    if kind == "yarn":
        key = f"{family.gguf_arch}.rope.scaling.original_context_length"
        rope["original_max_position_embeddings"] = file.require(key)
    if kind == "longrope":
        rope["original_max_position_embeddings"] = config.original_max_position_embeddings
        rope |= {"long_factor": _floats(file, _LONG), "short_factor": _floats(file, _SHORT)}
        rope |= _stated_attention_factor(_get(file, family, "rope.scaling.attn_factor", 1.0), rope, config)
    if (beta := _get(file, family, "attention.temperature_scale")) is not None:
        rope["llama_4_scaling_beta"] = beta
    return rope | {key: value for key, value in family.rope.items() if value is not None}


def _kind(file: GgufFile, family: Family) -> str:
    unnamed = "none" if _factor(file, family) in (None, 1) else "linear"  # as llama.cpp takes it
    named = str(_get(file, family, "rope.scaling.type", unnamed))
    kind = "default" if named == "none" else named
    if _LLAMA3 in file.tensors:
        kind = "llama3"
    if _LONG in file.tensors:
        kind = "longrope"  # whose type some programs leave out
    if kind not in family.rope_types:
        raise BitconvertError(
            f"{file.path}: rope scaling '{kind}' is not supported for {family.model_type}",
            f"supported: {', '.join(family.rope_types)}",
        )
    return kind


def _factor(file: GgufFile, family: Family) -> Any:
    """By how much positions are divided, under the key of today or that of the first files; None if by nothing."""
    return _get(file, family, "rope.scaling.factor", _get(file, family, "rope.scale_linear"))


def _require_usual(file: GgufFile, family: Family) -> None:
    """Refuse rotations that a config cannot state; without a key, llama.cpp takes the usual value, but no constant."""
    stated = {key: _get(file, family, key, usual) for key, usual in _USUAL.items()}
    stated |= {key: _get(file, family, key) for key in family.constants}
    for key, value in stated.items():
        if value != {**_USUAL, **family.constants}[key]:
            raise BitconvertError(
                f"{file.path}: key {family.gguf_arch}.{key} is {value}, which changes the rotary embedding",
                "start from the original model's Hugging Face directory",
            )


def _recovered_llama3(file: GgufFile, theta: float, dimensions: int) -> Rope:
    rope = recover_llama3(np.array(_floats(file, _LLAMA3), np.float32), theta, dimensions)
    if rope is None:
        raise BitconvertError(
            f"{file.path}: {_LLAMA3} does not follow Llama 3's formula",
            "start from the original model's Hugging Face directory",
        )
    return rope


def _floats(file: GgufFile, name: str) -> list[float]:
    if name not in file.tensors:
        raise BitconvertError(f"{file.path}: tensor {name} is missing", "convert the model to GGUF again")
    return [float(str(value)) for value in file.tensors[name].values()]


# ---- LongRoPE --------------------------------------------------------------------------------------------------------


def _original_context(rope: Rope, config: Any) -> int:
    return int(rope.get("original_max_position_embeddings") or config.max_position_embeddings)


def _attention_factor(rope: Rope, config: Any) -> float:
    """By how much LongRoPE enlarges cosine and sine: as said, else by the formula of its paper (arXiv 2402.13753)."""
    said = rope.get("attention_factor")
    return float(said) if said is not None else _usual_attention_factor(rope, config)


def _usual_attention_factor(rope: Rope, config: Any) -> float:
    original = _original_context(rope, config)
    stretch = rope.get("factor") or config.max_position_embeddings / original
    return math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0


def _stated_attention_factor(factor: float, rope: Rope, config: Any) -> Rope:
    usual = math.isclose(factor, _usual_attention_factor(rope, config), rel_tol=_SAME)
    return {} if usual else {"attention_factor": factor}
