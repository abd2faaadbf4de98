"""A GGUF file as a model to start from: its configuration and its weights, as llama.cpp understands them.

Tensors are decoded with the ``gguf`` package, one at a time, which is also what transformers' own GGUF loader does for
these architectures. That loader is not called because of what it loses without a word: ``rope_freqs.weight`` and
the ``rope.scaling.*`` keys, biases, pre-tokenizers (smollm's among them) and special tokens spelled outside the byte
alphabet; and what it loads cannot be saved.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from pydantic import ValidationError
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from bitconvert.errors import BitconvertError
from bitconvert.models.families import Family
from bitconvert.models.gguf_file import GgufFile, damage_named, gguf_family, open_gguf
from bitconvert.models.gguf_parse import GgufTensor
from bitconvert.models.gguf_rope import ROPE_TENSORS, rope_parameters
from bitconvert.models.gguf_tensors import from_gguf_rows, gguf_names
from bitconvert.models.gguf_tokenizer import load_gguf_tokenizer as load_gguf_tokenizer
from bitconvert.models.gguf_types import Q8_0, TERNARY
from bitconvert.models.hparams import COMMON, resolve, spellings
from bitconvert.models.lineage import Lineage

LINEAGE_KEY = "bitconvert.lineage"


@damage_named
def gguf_config(path: Path) -> dict[str, Any]:
    """The model's configuration, under the names that config.json uses.

    Raises:
        BitconvertError: the file is damaged, its architecture is not supported, or it rescales rotary embeddings in a
            way that Hugging Face has no name for.
    """
    file = open_gguf(path)
    family = gguf_family(file)
    file.require_blocks(family.gguf_arch)
    if file.get(f"{family.gguf_arch}.expert_count", 0):
        raise BitconvertError(f"{path}: it is a mixture of experts", "only dense models are supported")
    known = _hparams(file, family)
    shape = SimpleNamespace(**known)
    known["rope_parameters"] = rope_parameters(file, family, shape)
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **known,
        **{attribute: spellings(resolve(value, shape))[0] for attribute, value in family.computed.items()},
        **{attribute: tensor in file.tensors for attribute, tensor in family.flags.items()},
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "vocab_size": int(_tensor(file, "token_embd.weight").shape[1]),
        "bos_token_id": file.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": file.get("tokenizer.ggml.padding_token_id"),
        "dtype": "float32",
    }


@damage_named
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


def gguf_title(path: Path) -> str:
    """``general.name``, or nothing."""
    return str(open_gguf(path).get("general.name", ""))


def gguf_license(path: Path) -> str:
    """``general.license``, or nothing."""
    return str(open_gguf(path).get("general.license", ""))


@damage_named
def tensor_types(path: Path) -> dict[str, str]:
    """How each tensor is stored (F16, Q4_1, TQ2_0 …), by its Hugging Face name, without reading any."""
    weights = open_weights(path)
    return {name: weights.stored_as(name) for name in weights.stored}


def activation_blocks(path: Path) -> dict[str, int | None]:
    """How many activations share an int8 scale in the file's runtime, for each ternary matrix that meets int8 there.

    Q8_0 counts as ternary in the files that bitconvert wrote, unless the lineage says that the matrix is kept. A matrix
    in F16 or BF16 meets float activations, and is absent.

    Returns:
        A block length for each weight, by its Hugging Face name; None where all activations of a token share a scale.
    """
    lineage = gguf_lineage(path)
    kinds = TERNARY if lineage is None else (*TERNARY, Q8_0)
    kept = {f"{module}.weight" for module in lineage.kept} if lineage else set()
    blocks = {kind.name: kind.activation_block for kind in kinds}
    return {name: blocks[kind] for name, kind in tensor_types(path).items() if kind in blocks and name not in kept}


@damage_named
def load_gguf_model(path: Path) -> PreTrainedModel:
    """The model in float32, as a fresh object that can be trained and saved.

    Raises:
        BitconvertError: the file is damaged, or its tensors are not those of its architecture.
    """
    weights = open_weights(path)  # held against the configuration before there is a model of whatever size that says
    model = _model(path)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(weights.read(name))
    return model


@dataclass(frozen=True)
class GgufWeights:
    """The weights of a file under their Hugging Face names, each decoded when it is asked for.

    Attributes:
        file: opened.
        config: with every default filled in.
        stored: the tensors, in the file's order.
    """

    file: GgufFile
    config: Any
    stored: dict[str, GgufTensor]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes, (out, in), without reading any."""
        return {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in self.stored.items()}

    def stored_as(self, name: str) -> str:
        """The type of a tensor: F16, Q4_1, TQ2_0 …"""
        return str(self.stored[name].tensor_type.name)

    def read(self, name: str) -> Tensor:
        """One weight in float32 and Hugging Face's form."""
        return _read(self.file.path, self, name)


@damage_named
def open_weights(path: Path) -> GgufWeights:
    """Open the weights of a file; nothing is decoded yet.

    Raises:
        BitconvertError: the file is damaged, or its tensors are not those of its architecture.
    """
    file = open_gguf(path)
    with torch.device("meta"):
        skeleton = _model(path)
    stored = _by_hf_name(file, skeleton)
    _require_fitting(path, stored, skeleton)
    return GgufWeights(file, skeleton.config, stored)


# ---- configuration ---------------------------------------------------------------------------------------------


def _hparams(file: GgufFile, family: Family) -> dict[str, Any]:
    """The numbers of the table, each under its name in the config."""
    known: dict[str, Any] = {}
    for row in (*COMMON, *family.hparams):
        key = f"{family.gguf_arch}.{row.key}"
        default = None if row.required else resolve(row.default, SimpleNamespace(**known))
        known[row.attribute] = file.require(key) if row.required else file.get(key, default)
    return known


# ---- tensors ------------------------------------------------------------------------------------------------------


def _model(path: Path) -> PreTrainedModel:
    """A model of the file's configuration, with weights of chance; without storage under ``torch.device("meta")``."""
    config = AutoConfig.for_model(**gguf_config(path))
    model: PreTrainedModel = getattr(transformers, gguf_family(open_gguf(path)).architecture)(config)
    return model


def _tensor(file: GgufFile, name: str) -> GgufTensor:
    if name not in file.tensors:
        raise BitconvertError(f"{file.path}: tensor {name} is missing", "convert the model to GGUF again")
    return file.tensors[name]


@damage_named
def _read(_path: Path, weights: GgufWeights, name: str) -> Tensor:
    weight = torch.from_numpy(weights.stored[name].values())
    return from_gguf_rows(weight, name, weights.config, gguf_family(weights.file))


def _by_hf_name(file: GgufFile, model: PreTrainedModel) -> dict[str, GgufTensor]:
    """Every weight under its Hugging Face name, in the file's order."""
    places = gguf_names((name for name, _ in model.named_parameters()), model.config, gguf_family(file))
    names = {gguf_name: name for name, gguf_name in places.items()}
    unknown = [name for name in file.tensors if name not in names and name not in ROPE_TENSORS]
    if unknown:
        raise BitconvertError(
            f"{file.path}: tensor {unknown[0]} has no place in a {type(model).__name__} of this configuration",
            "start from the original model's Hugging Face directory",
        )
    return {names[name]: tensor for name, tensor in file.tensors.items() if name in names}


def _require_fitting(path: Path, stored: dict[str, GgufTensor], model: PreTrainedModel) -> None:
    """Every parameter of the model must be there, in the shape that the configuration promises."""
    for name, parameter in model.named_parameters():
        if name not in stored:
            raise BitconvertError(f"{path}: tensor {name} is missing", "convert the model to GGUF again")
        shape = tuple(reversed(stored[name].shape))
        if shape != parameter.shape:
            raise BitconvertError(
                f"{path}: tensor {stored[name].name} has shape {shape}, expected {tuple(parameter.shape)}",
                "convert the model to GGUF again",
            )
