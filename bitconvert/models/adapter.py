"""Low-rank adapters (LoRA) over a model's frozen linears, as peft and as llama.cpp keep them on disk.

peft computes them in torch. The layout of the GGUF file is that of llama.cpp's convert_lora_to_gguf.py: beside a few
keys it holds ``NAME.lora_a`` (rank, in) and ``NAME.lora_b`` (out, rank) for each tensor ``NAME`` of the model's file.
Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from gguf import GGUFType, GGUFWriter, Keys
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from bitconvert.errors import BitconvertError, UsageError
from bitconvert.models.checkpoint import Checkpoint
from bitconvert.models.gguf_parse import damaged, parse_gguf
from bitconvert.models.gguf_tensors import from_gguf_rows, gguf_names, to_gguf_rows
from bitconvert.models.record import read_json_object
from bitconvert.recipe import Lora

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_REMEDY = "train or download the adapter again"
_ACTIVE = "default"  # peft's name for the only adapter of a model
_PEFT_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
_PLAIN: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    **dict.fromkeys(("use_dora", "use_rslora", "lora_bias", "fan_in_fan_out", "use_qalora"), (False, None)),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), ({}, None)),
    **dict.fromkeys(("modules_to_save", "layer_replication", "alora_invocation_tokens", "use_bdlora"), (None,)),
    **dict.fromkeys(("trainable_token_indices", "target_parameters"), (None, [], {})),
}
"""What a peft config says of an adapter that is ``alpha / rank * B A`` for each linear, and nothing else."""


class Factors(NamedTuple):
    """What is added to one linear's output: ``alpha / rank * B (A x)``.

    Attributes:
        a: float32, shape (rank, in).
        b: float32, shape (out, rank).
    """

    a: Tensor
    b: Tensor


class Adapter(NamedTuple):
    """A low-rank change of a model.

    Attributes:
        alpha: what is added is multiplied by alpha / rank.
        factors: by the dotted names of the linears, all of one rank.
    """

    alpha: float
    factors: dict[str, Factors]

    @property
    def rank(self) -> int:
        """Rows of each A, columns of each B."""
        return len(next(iter(self.factors.values())).a)

    @property
    def parameters(self) -> int:
        """How many numbers it holds."""
        return sum(a.numel() + b.numel() for a, b in self.factors.values())


# ---- in torch -------------------------------------------------------------------------------------------------------


def with_new_adapter(model: PreTrainedModel, checkpoint: Checkpoint, options: Lora) -> PeftModel:
    """Freeze a model and put an adapter of zeros (A random, B zero) beside its linears, to be trained.

    Args:
        model: as ``Checkpoint.load`` gives it; changed in place.
        checkpoint: where it came from.
        options: rank, alpha, dropout, and beside which linears.

    Raises:
        UsageError: the model has no linear of a name that is asked for.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=chosen_modules(checkpoint, options.modules),
        task_type="CAUSAL_LM",
    )
    adapted: PeftModel = get_peft_model(model, config)
    config.base_model_name_or_path = checkpoint.name  # peft takes the name that a model from the hub has
    return adapted


def with_adapter(model: PreTrainedModel, adapter: Adapter) -> PreTrainedModel:
    """The model with an adapter beside its linears, for evaluation; changed in place."""
    from peft import LoraConfig, inject_adapter_in_model

    alpha: Any = adapter.alpha  # an int, says peft, but llama.cpp's files hold a float
    config = LoraConfig(r=adapter.rank, lora_alpha=alpha, target_modules=list(adapter.factors), inference_mode=True)
    inject_adapter_in_model(config, model)
    for name, factors in adapter.factors.items():
        for held, factor in zip(_held_factors(model.get_submodule(name)), factors, strict=True):
            held.data.copy_(factor)
    model.train(False)
    return model


def adapter_of(model: PeftModel) -> Adapter:
    """The adapter beside a model's linears, as it is now."""
    from peft.tuners.lora import LoraLayer

    config = cast("LoraConfig", model.peft_config[_ACTIVE])
    layers = {name: layer for name, layer in model.get_base_model().named_modules() if isinstance(layer, LoraLayer)}
    found = {name: (factor.detach().float().cpu() for factor in _held_factors(layer)) for name, layer in layers.items()}
    return Adapter(float(config.lora_alpha), {name: Factors(*factors) for name, factors in found.items()})


def chosen_modules(checkpoint: Checkpoint, last_names: Iterable[str]) -> list[str]:
    """The last names of the blocks' linears (``q_proj`` …) that get an adapter: those asked for, or all.

    Raises:
        UsageError: there is none of a name that is asked for.
    """
    known = [linear.rpartition(".")[2] for linear in checkpoint.family.linears]
    for name in last_names:
        if name not in known:
            raise UsageError(
                f"lora.modules: {checkpoint.name} has no linear {name} in its blocks", f"there are {', '.join(known)}"
            )
    return list(last_names) or known


def _held_factors(layer: Any) -> tuple[Tensor, Tensor]:
    """The parameters A and B of a layer of peft's."""
    return layer.lora_A[_ACTIVE].weight, layer.lora_B[_ACTIVE].weight


# ---- on disk --------------------------------------------------------------------------------------------------------


def read_adapter(path: Path, checkpoint: Checkpoint) -> Adapter:
    """Read an adapter: a directory of peft's, or a GGUF file.

    Args:
        path: of either.
        checkpoint: the model that it belongs to.

    Raises:
        BitconvertError: it is neither, damaged, of a kind that is more than a low-rank product, or of another model.
    """
    adapter = _read_peft(path) if path.is_dir() else _read_gguf(path, checkpoint)
    _require_fitting(adapter, path, checkpoint)
    return adapter


def checked_gguf_adapter(path: Path, checkpoint: Checkpoint) -> Path:
    """The GGUF file of an adapter, for llama.cpp: the file itself, or the one in a directory that ``adapt`` made.

    Raises:
        UsageError: there is none, or more than one.
        BitconvertError: as ``read_adapter``.
    """
    files = sorted(path.glob("*.gguf")) if path.is_dir() else [path]
    if len(files) != 1:
        raise UsageError(f"{path}: {len(files)} GGUF files, where llama.cpp needs one adapter", "name the file")
    read_adapter(files[0], checkpoint)
    return files[0]


def write_gguf_adapter(adapter: Adapter, checkpoint: Checkpoint, path: Path) -> None:
    """Write an adapter as the GGUF file that llama.cpp's ``--lora`` loads, in float32.

    Args:
        adapter: of the model.
        checkpoint: the model, whose rows llama.cpp may have in another order.
        path: of the file; the caller moves it into place.
    """
    config, family = checkpoint.complete, checkpoint.family
    names = _gguf_names(adapter.factors, checkpoint)
    with closing(GGUFWriter(path, family.gguf_arch)) as writer:
        writer.add_type(GGUFType.ADAPTER)
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(Keys.Adapter.LORA_ALPHA, adapter.alpha)
        writer.add_name(path.stem)
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, checkpoint.title)
        for module, (a, b) in adapter.factors.items():
            rows = to_gguf_rows(b, f"{module}.weight", config, family)
            writer.add_tensor(f"{names[module]}.lora_a", a.contiguous().numpy())
            writer.add_tensor(f"{names[module]}.lora_b", rows.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def _gguf_names(modules: Iterable[str], checkpoint: Checkpoint) -> dict[str, str]:
    """The tensors of the model's GGUF file, by the dotted names of the modules whose weights they are."""
    weights = {f"{module}.weight": module for module in modules}
    tied = checkpoint.complete.tie_word_embeddings
    asked = list(weights) if tied else [*weights, "lm_head.weight"]  # without which a model that has one is refused
    names = gguf_names(asked, checkpoint.complete, checkpoint.family)
    return {module: names[weight] for weight, module in weights.items()}


def _read_gguf(path: Path, checkpoint: Checkpoint) -> Adapter:
    try:
        file = parse_gguf(path)
    except OSError as error:
        raise BitconvertError(f"{path}: {error.strerror}", "give an adapter's directory, or its GGUF file") from error
    if file.fields.get(Keys.General.TYPE) != GGUFType.ADAPTER or file.fields.get(Keys.Adapter.TYPE) != "lora":
        raise BitconvertError(f"{path}: not a LoRA adapter", "give one that `bitconvert adapt` made")
    architecture, alpha = file.fields.get(Keys.General.ARCHITECTURE), file.fields.get(Keys.Adapter.LORA_ALPHA)
    if architecture != checkpoint.family.gguf_arch:
        raise _of_another_model(path, checkpoint, f"it is one for {architecture}")
    if not isinstance(alpha, float):
        raise damaged(path, f"key {Keys.Adapter.LORA_ALPHA} is {alpha}")
    linears = checkpoint.family.ternary_modules(name.removesuffix(".weight") for name in checkpoint.weights())
    modules = {name: module for module, name in _gguf_names(linears, checkpoint).items()}
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in file.tensors.items():
        target, _, factor = name.rpartition(".")
        if target not in modules or factor not in ("lora_a", "lora_b"):
            raise _of_another_model(path, checkpoint, f"tensor {name} has no place beside its linears")
        values = torch.from_numpy(tensor.values())
        if factor == "lora_b":
            values = from_gguf_rows(values, f"{modules[target]}.weight", checkpoint.complete, checkpoint.family)
        found.setdefault(modules[target], {})[factor[-1]] = values
    return Adapter(alpha, _paired(path, found))


class _PeftConfig(BaseModel):
    """Of a peft config, what is needed; the rest is looked at by ``_PLAIN``."""

    model_config = ConfigDict(extra="allow")

    r: int = Field(gt=0)
    lora_alpha: FiniteFloat


def _read_peft(directory: Path) -> Adapter:
    """A directory of peft's, without peft: no other file is opened, nothing is fetched or unpickled."""
    for name in (PEFT_CONFIG, PEFT_WEIGHTS):
        if not (directory / name).is_file():
            raise BitconvertError(
                f"{directory / name}: missing", f"an adapter's directory holds {PEFT_CONFIG} and {PEFT_WEIGHTS}"
            )
    config = read_json_object(directory / PEFT_CONFIG, _REMEDY)
    try:
        known = _PeftConfig.model_validate(config)
        tensors = load_file(directory / PEFT_WEIGHTS)
    except (ValidationError, OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise BitconvertError(f"{directory}: its adapter is damaged ({reason})", _REMEDY) from error
    for key, plain in _PLAIN.items():
        if config.get(key, plain[0]) not in plain:
            raise BitconvertError(
                f"{directory / PEFT_CONFIG}: {key} is {config[key]!r}, which is more than a low-rank product",
                "only plain LoRA adapters are read",
            )
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        matched = _PEFT_TENSOR.fullmatch(name)
        if matched is None:
            raise BitconvertError(
                f"{directory / PEFT_WEIGHTS}: tensor {name} is no matrix of a LoRA", "only plain LoRA adapters are read"
            )
        found.setdefault(matched["module"], {})[matched["factor"].lower()] = tensor.float()
    return Adapter(known.lora_alpha, _paired(directory, found))


def _paired(path: Path, found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Factors]:
    if not found:
        raise BitconvertError(f"{path}: it holds no matrix", _REMEDY)
    for module, factors in found.items():
        if factors.keys() != {"a", "b"}:
            raise BitconvertError(f"{path}: {module} has A or B alone", _REMEDY)
    return {module: Factors(factors["a"], factors["b"]) for module, factors in found.items()}


def _require_fitting(adapter: Adapter, path: Path, checkpoint: Checkpoint) -> None:
    """Hold an adapter's shapes against those of the model."""
    shapes = checkpoint.weights()
    for module, (a, b) in adapter.factors.items():
        rows, columns = shapes.get(f"{module}.weight", (0, 0))
        if not checkpoint.family.is_ternary_module(module) or not rows:
            raise _of_another_model(path, checkpoint, f"{module} is none of the linears of its blocks")
        if a.shape != (adapter.rank, columns) or b.shape != (rows, adapter.rank):
            raise _of_another_model(
                path, checkpoint, f"A {tuple(a.shape)} and B {tuple(b.shape)} do not fit {module} ({rows}, {columns})"
            )
        if not (a.isfinite().all() and b.isfinite().all()):
            raise BitconvertError(f"{path}: {module} holds NaN or infinity", "train the adapter again, at a lower rate")


def _of_another_model(path: Path, checkpoint: Checkpoint, why: str) -> BitconvertError:
    return BitconvertError(
        f"{path}: not an adapter of {checkpoint.name}: {why}", "give the model that the adapter was trained on"
    )
