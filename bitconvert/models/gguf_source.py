"""A GGUF file as a model to start from: its configuration and its weights, as llama.cpp understands them.

The file is read with the ``gguf`` package, one tensor at a time, which is also what transformers' own GGUF loader does
for these architectures. That loader is not called because of what it loses without a word: ``rope_freqs.weight`` and
the ``rope.scaling.*`` keys, biases, pre-tokenizers (smollm's among them) and special tokens spelled outside the byte
alphabet; and what it loads cannot be saved.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, ReaderTensor, dequantize, get_tensor_name_map
from pydantic import ValidationError
from torch import Tensor
from transformers import AutoConfig, LlamaForCausalLM

from bitconvert.errors import BitconvertError
from bitconvert.models.families import Family
from bitconvert.models.gguf_file import GgufFile, gguf_family, open_gguf
from bitconvert.models.gguf_tokenizer import load_gguf_tokenizer as load_gguf_tokenizer
from bitconvert.models.gguf_types import Q2_0, Q8_0, TQ1_0, TQ2_0
from bitconvert.models.lineage import Lineage
from bitconvert.models.rope import deinterleave_rows, recover_llama3

LINEAGE_KEY = "bitconvert.lineage"

TERNARY_TYPES = frozenset({TQ1_0.name, TQ2_0.name, Q2_0.name})
"""Types that hold nothing but codes and scales."""

_ROPE_FACTORS = "rope_freqs.weight"


def gguf_config(path: Path) -> dict[str, Any]:
    """The model's configuration, under the names that config.json uses.

    Raises:
        BitconvertError: the file is damaged, its architecture is not supported, or it rescales rotary embeddings in a
            way that Hugging Face has no name for.
    """
    file = open_gguf(path)
    family = gguf_family(file)
    key = family.gguf_arch
    heads = file.require(f"{key}.attention.head_count")
    width = file.require(f"{key}.embedding_length")
    if file.get(f"{key}.expert_count", 0):
        raise BitconvertError(f"{path}: it is a mixture of experts", "only dense models are supported")
    head_dim = file.get(f"{key}.attention.key_length", file.get(f"{key}.rope.dimension_count", width // heads))
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "hidden_size": width,
        "intermediate_size": file.require(f"{key}.feed_forward_length"),
        "num_hidden_layers": file.require(f"{key}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.get(f"{key}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": file.require(f"{key}.context_length"),
        "rms_norm_eps": file.require(f"{key}.attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(file, key, head_dim),
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in file.tensors,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "vocab_size": int(_tensor(file, "token_embd.weight").shape[1]),
        "bos_token_id": file.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": file.get("tokenizer.ggml.padding_token_id"),
        "dtype": "float32",
    }


def gguf_lineage(path: Path) -> Lineage | None:
    """The record that bitconvert left in the file; None if another program wrote it."""
    record = open_gguf(path).get(LINEAGE_KEY)
    if record is None:
        return None
    try:
        return Lineage.model_validate_json(record)
    except ValidationError as error:
        raise BitconvertError(
            f"{path}: {LINEAGE_KEY} is not of this version ({str(error).splitlines()[0]})", "pack the model again"
        ) from error


def gguf_license(path: Path) -> str:
    """``general.license``, or nothing."""
    return str(open_gguf(path).get("general.license", ""))


def tensor_types(path: Path) -> dict[str, str]:
    """How each tensor is stored (F16, Q4_1, TQ2_0 …), by its Hugging Face name, without reading any."""
    file = open_gguf(path)
    return {name: tensor.tensor_type.name for name, tensor in _by_hf_name(file, gguf_family(file)).items()}


def activation_blocks(path: Path) -> dict[str, int]:
    """How many activations share an int8 scale in llama.cpp, for each ternary matrix that meets int8 activations there.

    Q8_0 counts as ternary in the files that bitconvert wrote, where it is the fallback for rows of odd lengths; a
    matrix that fell back to F16 meets float activations and is absent.

    Returns:
        A block length for each weight, by its Hugging Face name.
    """
    kinds = (TQ1_0, TQ2_0, Q2_0) if gguf_lineage(path) is None else (TQ1_0, TQ2_0, Q2_0, Q8_0)
    blocks = {kind.name: kind.activation_block for kind in kinds}
    return {name: block for name, kind in tensor_types(path).items() if (block := blocks.get(kind)) is not None}


def load_gguf_model(path: Path) -> LlamaForCausalLM:
    """The model in float32, as a fresh object that can be trained and saved.

    Raises:
        BitconvertError: the file is damaged, or its tensors are not those of its architecture.
    """
    file = open_gguf(path)
    family = gguf_family(file)
    values = gguf_config(path)
    config = AutoConfig.for_model(**{key: value for key, value in values.items() if value is not None})
    model: LlamaForCausalLM = getattr(transformers, family.architecture)(config)
    state = {name: parameter.data for name, parameter in model.named_parameters()}
    stored = _by_hf_name(file, family)
    _require_same(path, set(state), set(stored))
    for name, tensor in stored.items():
        state[name].copy_(_read(file, tensor, config, family, state[name].shape))
    return model


# ---- configuration ---------------------------------------------------------------------------------------------


def _rope(file: GgufFile, key: str, head_dim: int) -> dict[str, Any]:
    theta = float(file.get(f"{key}.rope.freq_base", 10000.0))
    scaling = str(file.get(f"{key}.rope.scaling.type", "none"))
    rotated = file.get(f"{key}.rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise BitconvertError(
            f"{file.path}: it rotates {rotated} of {head_dim} dimensions", "only full rotation is supported"
        )
    if _ROPE_FACTORS in file.tensors:
        return _llama3_rope(file, theta, head_dim)
    if scaling == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if scaling not in ("linear", "yarn"):
        raise BitconvertError(
            f"{file.path}: rope scaling '{scaling}' is not supported", "supported: linear, yarn, llama3"
        )
    rope = {"rope_type": scaling, "rope_theta": theta, "factor": file.require(f"{key}.rope.scaling.factor")}
    if scaling == "yarn":
        rope["original_max_position_embeddings"] = file.require(f"{key}.rope.scaling.original_context_length")
    return rope


def _llama3_rope(file: GgufFile, theta: float, head_dim: int) -> dict[str, Any]:
    rope = recover_llama3(_dequantized(_tensor(file, _ROPE_FACTORS)), theta, head_dim)
    if rope is None:
        raise BitconvertError(
            f"{file.path}: {_ROPE_FACTORS} does not follow Llama 3's formula",
            "start from the original model's Hugging Face directory",
        )
    return rope


# ---- tensors ------------------------------------------------------------------------------------------------------


def _tensor(file: GgufFile, name: str) -> ReaderTensor:
    if name not in file.tensors:
        raise BitconvertError(f"{file.path}: tensor {name} is missing", "convert the model to GGUF again")
    return file.tensors[name]


def _by_hf_name(file: GgufFile, family: Family) -> dict[str, ReaderTensor]:
    """Every weight under its Hugging Face name, in the file's order."""
    blocks = int(file.require(f"{family.gguf_arch}.block_count"))
    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == family.gguf_arch)
    names = _hf_names(arch, family, blocks)
    unknown = [name for name in file.tensors if name not in names and name != _ROPE_FACTORS]
    if unknown:
        raise BitconvertError(
            f"{file.path}: tensor {unknown[0]} has no place in a {family.architecture}",
            "start from the original model's Hugging Face directory",
        )
    return {names[name]: tensor for name, tensor in file.tensors.items() if name in names}


def _hf_names(arch: MODEL_ARCH, family: Family, blocks: int) -> dict[str, str]:
    """GGUF name -> Hugging Face name, for all the modules that the architecture can have."""
    translate = get_tensor_name_map(arch, blocks)
    in_block = (*family.linears, "input_layernorm", "post_attention_layernorm")
    modules = ["model.embed_tokens", "model.norm", "lm_head"]
    modules += [f"model.layers.{block}.{module}" for block in range(blocks) for module in in_block]
    return {
        f"{translate.get_name(module)}.{kind}": f"{module}.{kind}" for module in modules for kind in ("weight", "bias")
    }


def _require_same(path: Path, wanted: set[str], stored: set[str]) -> None:
    missing, extra = sorted(wanted - stored), sorted(stored - wanted)
    if missing or extra:
        what = f"tensor {missing[0]} is missing" if missing else f"tensor {extra[0]} has no place in the model"
        raise BitconvertError(f"{path}: {what}", "convert the model to GGUF again")


def _read(file: GgufFile, tensor: ReaderTensor, config: Any, family: Family, shape: torch.Size) -> Tensor:
    """One weight in float32 and Hugging Face's row order."""
    weight = torch.from_numpy(_dequantized(tensor))
    if weight.shape != shape:
        raise BitconvertError(
            f"{file.path}: tensor {tensor.name} has shape {tuple(weight.shape)}, expected {tuple(shape)}",
            "convert the model to GGUF again",
        )
    if family.permute_rope and ".attn_q." in tensor.name:
        return deinterleave_rows(weight, config.num_attention_heads)
    if family.permute_rope and ".attn_k." in tensor.name:
        return deinterleave_rows(weight, config.num_key_value_heads)
    return weight


def _dequantized(tensor: ReaderTensor) -> Any:
    """The values of a tensor: float32, shape (out, in); a copy, since the file is mapped read-only."""
    return np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
