"""Open anything: a hub id, a Hugging Face directory (plain, latent, baked, packed), a GGUF file. Lazily, warily."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub import metadata_load
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from yaml import YAMLError

from bitconvert.errors import BitconvertError, UsageError
from bitconvert.models import gguf_source, tokenizers
from bitconvert.models.baked import BAKED_FILE, Baked, read_baked
from bitconvert.models.families import Family, family_of
from bitconvert.models.gguf_file import open_gguf, whole_set
from bitconvert.models.lineage import LINEAGE_FILE, Lineage, Origin, read_lineage
from bitconvert.models.location import HUB_ID as HUB_ID
from bitconvert.models.location import HubName, hub_name, locate, require_own_files, revision_of
from bitconvert.models.manifest import hashes
from bitconvert.models.packed import (
    has_int8_activations,
    is_readable,
    packed_weights,
    scaled_bias,
    unpack,
    unpacked_shape,
)
from bitconvert.models.record import read_json_object
from bitconvert.recipe import Scaling
from bitconvert.ternary.bitlinear import BitLinear, freeze_ternary, insert_bitlinear
from bitconvert.ternary.blocks import all_finite
from bitconvert.ternary.quantize import GRANULARITIES, TernaryTensor, is_baked

Kind = Literal["plain", "latent", "baked", "packed", "gguf"]

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLED = ("pytorch_model.bin*", "pytorch_model-*.bin", "*.pth", "*.pt", "*.ckpt", "*.pkl")
_NEEDLESS = ("rotary_emb.inv_freq", "lm_head.weight")  # written by older programs: computed anew, tied to the embedding
_WEIGHTS_AT_ONCE = 2**24  # of a tensor that is read in parts
_MOST_LAYERS = 10_000  # many times those of any model; a damaged count would build empty layers for hours
_SIZES = (
    *("hidden_size", "intermediate_size", "head_dim", "vocab_size", "max_position_embeddings"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
)
_LARGEST_SIZE = 2**31 - 1
_FLOATS = ("F64", "F32", "F16", "BF16")
_PACKED = ("U8", "I8", "I32", "I64")  # codes, and the shapes of what they stand for
_BESIDE_WEIGHTS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    LINEAGE_FILE,
    BAKED_FILE,
)
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "README.md", "LICENSE*", "NOTICE*"]
_HUB_FILES_BUT_WEIGHTS = [pattern for pattern in _HUB_FILES if pattern != "*.safetensors"]


class Checkpoint:
    """A model on disk, opened but not loaded.

    Attributes:
        name: the model as the user named it.
        path: the local directory, or the GGUF file.
        revision: the hub's commit of it; empty for a model that does not come from there.
        kind: plain (float weights), latent (float weights that mean ternary ones), baked (float weights that are
            ternary and say so), packed (codes and scales), gguf.
        config: ``config.json`` as a dictionary (for GGUF, the same keys derived from its metadata).
        complete: the same with every default filled in, old and new names alike, as transformers reads it.
        family: the architecture's row.
        lineage: bitconvert's own record; None for a model that another program wrote.
        baked: what ``unpack`` recorded of a baked model; None for any other.
        rounding: the scaling under which a model without lineage is rounded, if it is.
        keeping: the linears that are left alone then, modules by their dotted names.
    """

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.path = path
        self.revision = revision_of(path)
        is_gguf = path.is_file()
        if not is_gguf:
            require_own_files(path)
        self.config = gguf_source.gguf_config(path) if is_gguf else _read_config(path)
        self.family: Family = family_of(self.config, name)
        self.rounding = Scaling(estimator="absmean")
        self.keeping: tuple[str, ...] = ()
        self.complete = _complete(name, self.config, self.family)
        self.lineage: Lineage | None = gguf_source.gguf_lineage(path) if is_gguf else read_lineage(path)
        self.baked: Baked | None = None if is_gguf else read_baked(path)
        self.kind: Kind = "gguf" if is_gguf else _kind(name, self.config, self.lineage, self.baked)
        _require_final(name, self.kind, self.lineage)

    @property
    def scaling(self) -> Scaling:
        """How the ternary scales are computed: as recorded, else BitNet's absmean per tensor unless changed."""
        if self.baked:
            return self.baked.scaling
        return self.lineage.scaling if self.lineage else self.rounding

    @property
    def kept(self) -> tuple[str, ...]:
        """The linears of the blocks that are not ternary, or will not be: as recorded, else those of ``keeping``."""
        return self.lineage.kept if self.lineage else self.keeping

    def is_ternary_module(self, name: str) -> bool:
        """Whether the module of this dotted name (no ``.weight``) is ternary where the model is: linears are."""
        return self.family.is_ternary_module(name) and name not in self.kept

    def ternary_modules(self, names: Iterable[str]) -> list[str]:
        """Those of the dotted module names that are, in the order given."""
        return [name for name in names if self.is_ternary_module(name)]

    @property
    def base_name(self) -> str:
        """The model's name without the way to it; files made of it are called so."""
        return Path(self.unpinned_name).expanduser().resolve().name

    @property
    def unpinned_name(self) -> str:
        """The model as the user named it, without the revision, of which ``revision`` knows more."""
        named = None if Path(self.name).expanduser().exists() else hub_name(self.name)
        return "/".join(filter(None, (named.repository, named.file))) if named else self.name

    def origin(self) -> Origin:
        """The files that decide what the model computes and how it reads text, hashed: about a second a gigabyte."""
        if self.kind == "gguf":
            files = list(open_gguf(self.path).paths)
        else:
            beside = [self.path / name for name in (_INDEX, *_BESIDE_WEIGHTS)]
            files = [*sorted(set(self._files.values())), *(file for file in beside if file.is_file())]
        return Origin(revision=self.revision, files={file.name: digest for file, digest in hashes(files).items()})

    @property
    def license(self) -> str:
        """The model's licence as it names it itself (an SPDX-like identifier on the hub); empty where it does not."""
        if self.lineage is not None:
            return self.lineage.license
        if self.baked:
            return self.baked.license
        return gguf_source.gguf_license(self.path) if self.kind == "gguf" else _card_license(self.path / "README.md")

    @property
    def title(self) -> str:
        """What the model calls itself; unlike ``base_name`` it survives packing and unpacking."""
        if self.baked:
            return self.baked.title
        if self.kind == "gguf":
            return gguf_source.gguf_title(self.path) or self.base_name.removesuffix(".gguf")
        return re.sub("-(bitnet|compressed-tensors)$", "", self.base_name) if self.kind == "packed" else self.base_name

    @property
    def max_context(self) -> int:
        """Tokens that the model was made for."""
        return int(self.complete.max_position_embeddings)

    @property
    def file_bytes(self) -> int:
        """Size of the weight files."""
        files = open_gguf(self.path).paths if self.kind == "gguf" else self.path.glob("*.safetensors")
        return sum(file.stat().st_size for file in files)

    def require_context(self, tokens: int, hint: str) -> None:
        """Refuse more tokens than the model was made for.

        Raises:
            UsageError: with the caller's hint.
        """
        if tokens > self.max_context:
            raise UsageError(f"{self.name}: made for contexts of up to {self.max_context} tokens, not {tokens}", hint)

    # ---- tensors, one at a time -----------------------------------------------------------------------------------

    def tensor_names(self) -> list[str]:
        """Names of all tensors, in the files' order."""
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        with open_safetensors(self._files[name]) as tensors:
            return tuple(tensors.get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Dtype of a tensor as safetensors names it (F32, BF16, U8 …), without reading it."""
        with open_safetensors(self._files[name]) as tensors:
            return str(tensors.get_slice(name).get_dtype())

    def read(self, name: str) -> Tensor:
        """Read one tensor in its stored dtype.

        Raises:
            BitconvertError: it is missing, cut off, or holds NaN or infinity.
        """
        if name not in self._files:
            raise BitconvertError(f"{self.name}: tensor {name} is missing", "download or pack the model again")
        with open_safetensors(self._files[name]) as tensors:
            tensor: Tensor = tensors.get_tensor(name)
        self._require_floats(name)
        _check_finite(self.name, name, tensor)
        return tensor

    def read_rows(self, name: str) -> Iterator[Tensor]:
        """Read one tensor in its stored dtype, a part of its rows at a time, however large it is.

        Raises:
            BitconvertError: as ``read``.
        """
        self._require_floats(name)
        for rows in read_rows(self._files[name], name):
            _check_finite(self.name, name, rows)
            yield rows

    # ---- tensors as the file means them -----------------------------------------------------------------------------

    def weights(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the model's tensors in Hugging Face's form, whatever they are stored as.

        Raises:
            BitconvertError: they are not those that the config describes.
        """
        if self.kind == "gguf":
            return self.fitting(self._gguf.shapes())
        beside = {part for parts in self.packed.values() for part in parts[1:]}
        weight_of = {parts[0]: weight for weight, parts in self.packed.items()}
        for name in self.tensor_names():
            self._require_floats(name)
        names = [weight_of.get(name, name) for name in self.tensor_names() if name not in beside]
        return self.fitting({name: self._meant_shape(name) for name in names})

    def read_weight(self, name: str) -> Tensor:
        """Read one of ``weights`` in float32: codes and quantized values decoded, latents as they are.

        Raises:
            BitconvertError: as ``read``.
        """
        if self.kind == "gguf":
            weight = self._gguf.read(name)
            _check_finite(self.name, name, weight)
            return weight
        if name in self.packed:
            return self.unpack(name).dequantize()
        stored = self.read(name)
        parts = self.packed.get(f"{name.removesuffix('.bias')}.weight")
        return scaled_bias(stored, self.read(parts[1]), self.config) if parts else stored.float()

    def unpack(self, name: str) -> TernaryTensor:
        """Codes and scale of a packed weight.

        Raises:
            BitconvertError: a part of it is missing or damaged.
        """
        parts = [self.read(part) for part in self.packed[name]]
        try:
            return unpack(parts, self.config)
        except BitconvertError as error:
            raise BitconvertError(f"{self.name}: tensor {name}: {error.message}", error.hint) from error

    def stored_as(self, name: str) -> str:
        """How one of ``weights`` is stored: F32, U8, Q4_1 …"""
        return self._gguf.stored_as(name) if self.kind == "gguf" else self.dtype(self.packed.get(name, (name,))[0])

    @cached_property
    def packed(self) -> dict[str, tuple[str, ...]]:
        """The linears' weights that a packed directory holds as codes and scales, each with the tensors it is in.

        Raises:
            BitconvertError: codes without a scale.
        """
        if self.kind != "packed":
            return {}
        found = packed_weights(self._files, self.config)
        for name in self._files.keys() - found.keys():
            if self._is_linear(name) and self.dtype(name) == "U8":
                raise BitconvertError(
                    f"{self.name}: tensor {name}_scale is missing", "download or pack the model again"
                )
        return {name: parts for name, parts in found.items() if self._is_linear(name)}

    def _require_floats(self, name: str) -> None:
        """Refuse a tensor of numbers that mean others, unless it is a part of what the config says is packed."""
        dtype = self.dtype(name)
        if dtype not in _FLOATS and not (self.kind == "packed" and dtype in _PACKED):
            raise BitconvertError(
                f"{self.name}: tensor {name} is {dtype}, which is not a type of plain weights",
                f"give the original, unquantized model; its weights are {', '.join(_FLOATS)}",
            )

    def _is_linear(self, name: str) -> bool:
        return self.is_ternary_module(name.removesuffix(".weight"))

    def _meant_shape(self, name: str) -> tuple[int, ...]:
        if name not in self.packed:
            return self.shape(name)
        codes, _, *told = self.packed[name]
        if told:  # by a tensor of its own
            return tuple(self.read(told[0]).flatten().tolist())
        return unpacked_shape(self.shape(codes), self.dtype(codes))

    @cached_property
    def _gguf(self) -> gguf_source.GgufWeights:
        return gguf_source.open_weights(self.path)

    @cached_property
    def _files(self) -> dict[str, Path]:
        files = dict(_tensor_files(self.path))
        if not files:
            raise BitconvertError(f"{self.path}: its weight files hold no tensor", "download the model again")
        return files

    # ---- what the config promises ---------------------------------------------------------------------------------

    def skeleton(self) -> nn.Module:
        """The model without storage: every parameter with its name and shape.

        Raises:
            BitconvertError: the config describes no such model.
        """
        with torch.device("meta"), _bad_config_named(self.name):
            model: nn.Module = getattr(transformers, self.family.architecture)(self.complete)
        return model

    @cached_property
    def parameters(self) -> int:
        """How many weights the config promises."""
        return sum(parameter.numel() for parameter in self.skeleton().parameters())

    def fitting(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Hold tensors against the config.

        Args:
            shapes: of all tensors that are stored, in Hugging Face's order of rows, by name.

        Returns:
            Those that the model has: no tied head, no buffers that are computed anew.

        Raises:
            BitconvertError: one is missing, has another shape or no place in the model.
        """
        wanted = {name: tuple(parameter.shape) for name, parameter in self.skeleton().named_parameters()}
        missing = sorted(wanted.keys() - shapes.keys())
        if missing:
            raise BitconvertError(
                f"{self.name}: tensor {missing[0]} is missing ({len(missing)} in all)", "download the model again"
            )
        for name, shape in shapes.items():
            if name in wanted and shape != wanted[name]:
                raise BitconvertError(
                    f"{self.name}: tensor {name} has shape {shape}, its config.json means {wanted[name]}",
                    "the weights must belong to their config.json: download both again",
                )
            if name not in wanted and not name.endswith(_NEEDLESS):
                raise BitconvertError(
                    f"{self.name}: tensor {name} has no place in the model that config.json describes",
                    "the weights must belong to their config.json: download both again",
                )
        return {name: shape for name, shape in shapes.items() if name in wanted}

    # ---- whole models ---------------------------------------------------------------------------------------------

    @property
    def has_tokenizer(self) -> bool:
        """Whether there are files of one; a config alone describes a model too."""
        return self.kind == "gguf" or tokenizers.has_tokenizer(self.path)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer, with the pre-tokenizer that the model was trained with.

        Raises:
            BitconvertError: it is missing or damaged, or knows more tokens than the model.
        """
        is_gguf = self.kind == "gguf"
        tokenizer = gguf_source.load_gguf_tokenizer(self.path) if is_gguf else tokenizers.load_tokenizer(self.path)
        with tokenizers.tokenizer_damage(f"{self.name}: its tokenizer is damaged"):
            tokenizers.require_rows(tokenizer, self.complete.vocab_size)
        return tokenizer

    def load_latent(self) -> PreTrainedModel:
        """The model in float32 for training: every linear still a plain nn.Linear.

        The ternary weights of a baked model are the only latents that it has left.

        Raises:
            BitconvertError: the latent weights are gone (packed, or baked without a word of it), or a weight is missing
                or not finite.
        """
        self._require_latents()
        model = self._load_float()
        for module in self._linears(model):
            self._require_latent(f"{module}.weight", model.get_submodule(module).weight)  # type: ignore[arg-type]
        return model

    def read_latent(self, name: str) -> Tensor:
        """Read one weight of ``load_latent``, for a model that is never whole in one process.

        Raises:
            BitconvertError: as ``load_latent``.
        """
        self._require_latents()
        weight = self.read_weight(name)
        if self._is_linear(name):
            self._require_latent(name, weight)
        return weight

    def _require_latents(self) -> None:
        if self.kind == "packed":
            raise _no_latent_weights(f"{self.name}: its weights are packed ternary codes")

    def _require_latent(self, name: str, weight: Tensor) -> None:
        stored = gguf_source.activation_blocks(self.path) if self.kind == "gguf" else {}
        require_alive(self.name, name, weight)
        if name in stored or (self.kind != "baked" and is_baked(weight)):
            raise _no_latent_weights(f"{self.name}: tensor {name} already is ternary (baked)")

    def load(self) -> PreTrainedModel:
        """The model as its file means it, in float32 and evaluation mode.

        A latent checkpoint is rounded, packed and GGUF codes are decoded, and int8 activations come with them, and with
        baked weights: one scale per token as in training, or for GGUF one per block as in llama.cpp. A plain model, a
        GGUF file without ternary weights, and compressed-tensors, whose runtimes keep activations as they are, do not
        round them.
        """
        weights = self.weights()  # held against the configuration before there is a model of whatever size that says
        model = self.without_weights()
        ternary = self._ternary_linears(model)
        insert_bitlinear(model, ternary, self.scaling, lam=self.lineage.lam if self.lineage else 1.0)
        for name, block in ternary.items():
            model.get_submodule(name).activation_block = block  # type: ignore[assignment]
        for name in weights:
            self._fill(model, name)
        model.tie_weights()
        model.train(False)
        return model

    def load_rounded(self) -> PreTrainedModel:
        """A plain model with its linears simply rounded to ternary: the naive baseline."""
        model = self.load_latent()
        insert_bitlinear(model, self._linears(model), self.scaling, lam=1.0)
        freeze_ternary(model)
        model.train(False)
        return model

    def without_weights(self) -> PreTrainedModel:
        """The model with every parameter on the meta device; buffers, which are computed, are there."""
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = getattr(transformers, self.family.architecture)(copy.deepcopy(self.complete))
        model.tie_weights()
        if self.kind != "gguf":
            self._set_generation_config(model)
        return model

    def _set_generation_config(self, model: PreTrainedModel) -> None:
        """Take over generation_config.json; without one, or one that is no JSON, what config.json says stays."""
        try:
            with suppress(OSError):
                model.generation_config = GenerationConfig.from_pretrained(self.path)
        except Exception as error:  # as for the config: exceptions of many kinds
            reason = " ".join(str(error).split()) or type(error).__name__
            reason = "nested too deeply" if isinstance(error, RecursionError) else reason
            raise BitconvertError(
                f"{self.name}: its generation_config.json does not load ({reason})", "download the file again"
            ) from error

    def _fill(self, model: PreTrainedModel, name: str) -> None:
        """Read one weight into a model; of a ternary one, only codes and scale are left before the next is read."""
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        setattr(module, attribute, nn.Parameter(self.read_weight(name)))
        if isinstance(module, BitLinear) and attribute == "weight":
            self._freeze(module, path)

    def _freeze(self, module: BitLinear, name: str) -> None:
        if self.kind == "latent" and self.lineage is not None and self.lineage.lam < 1:
            return  # half-way models are blended at each forward
        if self.kind != "latent":
            module.scaling = Scaling(estimator="absmean", granularity=self._granularity_of(module.weight, name))
        module.freeze()

    def _granularity_of(self, weight: Tensor, name: str) -> str:
        for granularity in (self.scaling.granularity, *GRANULARITIES):
            if is_baked(weight, granularity):
                return granularity
        raise BitconvertError(
            f"{self.name}: tensor {name}.weight is not ternary, though the file says so", "convert the original again"
        )

    def _ternary_linears(self, model: PreTrainedModel) -> dict[str, int | None]:
        """The linears that the file holds as ternary, in the model's order, each with its block of activations."""
        if self.kind == "plain":
            return {}
        linears = self._linears(model)
        if self.kind == "packed":
            packed = [name for name in linears if f"{name}.weight" in self.packed]
            return dict.fromkeys(packed if has_int8_activations(self.config) else [])
        if self.kind != "gguf":
            return dict.fromkeys(linears)
        blocks = gguf_source.activation_blocks(self.path)
        return {name: blocks[f"{name}.weight"] for name in linears if f"{name}.weight" in blocks}

    def _linears(self, model: PreTrainedModel) -> list[str]:
        return self.ternary_modules(name for name, _ in model.named_modules())

    def _load_float(self) -> PreTrainedModel:
        if self.kind == "gguf":
            model: PreTrainedModel = gguf_source.load_gguf_model(self.path)
        else:
            model = _load_directory(self)
        for name, tensor in model.state_dict().items():
            _check_finite(self.name, name, tensor)
        require_alive(self.name, "model.embed_tokens.weight", model.get_parameter("model.embed_tokens.weight"))
        return model


def open_checkpoint(name: str, *, weights: bool = True) -> Checkpoint:
    """Open a model.

    Args:
        name: hub id, Hugging Face directory or GGUF file; what is only on the hub is fetched.
        weights: whether those of a hub's directory are fetched too; a GGUF file comes whole.

    Raises:
        BitconvertError: it is not there, or not a model that bitconvert can read.
    """
    path = locate(name)
    if path is None:
        named = hub_name(name)
        assert named is not None, "locate lets no other names through"
        path = _download(name, named, _HUB_FILES if weights else _HUB_FILES_BUT_WEIGHTS)
    return Checkpoint(name, path)


def _download(name: str, named: HubName, patterns: list[str]) -> Path:
    """Fetch a model from the hub: safetensors and what is beside them, or the GGUF file that was asked for."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, revision, file = named
    try:
        if file:
            parts = [part.as_posix() for part in whole_set(Path(file))]
            return {part: Path(hf_hub_download(repository, part, revision=revision)) for part in parts}[file]
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise BitconvertError(
            f"{name}: neither a local path nor to be had from the Hugging Face hub",
            "check the spelling and the network; gated models need `hf auth login`",
        ) from error


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    if not path.exists():
        raise BitconvertError(f"{path}: missing", "a Hugging Face model directory holds config.json and *.safetensors")
    return read_json_object(path, "download the file again")


def _complete(name: str, config: dict[str, Any], family: Family) -> PreTrainedConfig:
    """config.json with every default filled in, without its quantization: the latents themselves are wanted.

    transformers itself reads it, so that GGUF and safetensors agree on what a missing key means.
    """
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int) and layers > _MOST_LAYERS:
        raise BitconvertError(
            f"{name}: its config.json tells of {layers} layers", "download the original config.json again"
        )
    unsaid = ("model_type", "quantization_config")
    known = {key: value for key, value in config.items() if key not in unsaid}
    with _bad_config_named(name):
        complete: PreTrainedConfig = AutoConfig.for_model(family.model_type, **known)
        values = complete.to_dict()
    _require_possible(name, values)
    return complete


def _require_possible(name: str, config: Mapping[str, Any]) -> None:
    """Refuse numbers that no model has, before they are divided by, allocated or written into other files."""
    for key, value in _numbers(config):
        is_size, is_base = key in _SIZES, key == "rope_theta"
        if (is_size and not 0 < value <= _LARGEST_SIZE) or (is_base and value <= 0) or not math.isfinite(value):
            raise BitconvertError(
                f"{name}: its configuration says that {key} is {value}", "download the original again"
            )


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Every number in a configuration, with its key; those of a list have the key of the list."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _numbers(value)
            continue
        for one in value if isinstance(value, list | tuple) else [value]:
            if isinstance(one, int | float):
                yield key, one


@contextmanager
def _bad_config_named(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # transformers and huggingface_hub check with exceptions of many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BitconvertError(
            f"{name}: its config.json describes no model ({reason})", "download the original config.json again"
        ) from error


def _require_final(name: str, kind: Kind, lineage: Lineage | None) -> None:
    """Refuse codes that are said to be half-way: there are no latents to blend them with."""
    if kind in ("packed", "gguf") and lineage is not None and lineage.lam < 1:
        raise BitconvertError(
            f"{name}: is recorded to have stopped at λ = {lineage.lam:.3g}, and holds ternary codes",
            "download it again",
        )


def _kind(name: str, config: dict[str, Any], lineage: Lineage | None, baked: Baked | None) -> Kind:
    quantization = config.get("quantization_config")
    if quantization is not None and not isinstance(quantization, dict):
        raise BitconvertError(f"{name}: quantization_config is not an object", "download config.json again")
    if quantization is None and baked:
        return "baked"
    if quantization is None:
        return "latent" if lineage else "plain"
    if not is_readable(quantization):
        raise BitconvertError(
            f"{name}: already quantized ({quantization.get('quant_method')})",
            "give the original, unquantized model",
        )
    if quantization.get("use_rms_norm"):
        raise BitconvertError(
            f"{name}: use_rms_norm puts a norm before every linear layer, which no supported architecture has",
            "give a model whose quantization_config does not say use_rms_norm",
        )
    online = quantization.get("linear_class") == "autobitlinear" and quantization.get("quantization_mode") == "online"
    return "latent" if online else "packed"


def _card_license(card: Path) -> str:
    """``license`` in the YAML header of a model card."""
    try:
        header = metadata_load(card) if card.exists() else None
    except (ValueError, OSError, RecursionError, YAMLError):
        return ""  # a card is prose: what is wrong with it must not keep anybody from training
    named = header.get("license") if isinstance(header, dict) else None
    return named if isinstance(named, str) else ""


def _tensor_files(directory: Path) -> Iterator[tuple[str, Path]]:
    """Each tensor's name and the file that holds it, from the weight index or the single file."""
    index, weights = directory / _INDEX, directory / _WEIGHTS
    if index.exists() and weights.exists():
        raise BitconvertError(
            f"{directory}: holds both {_WEIGHTS} and {_INDEX}", "remove the one that is not the model's"
        )
    if index.exists():
        yield from _indexed_files(index)
        return
    if not weights.exists():
        raise _no_safetensors(directory)
    with open_safetensors(weights) as tensors:
        yield from ((name, weights) for name in tensors.keys())  # noqa: SIM118 - not a dictionary


def _indexed_files(index: Path) -> Iterator[tuple[str, Path]]:
    weight_map = read_json_object(index, "download the file again").get("weight_map")
    if not isinstance(weight_map, dict):
        raise BitconvertError(f"{index}: not a weight index (no weight_map)", "download the file again")
    if not all(isinstance(shard, str) for shard in weight_map.values()):
        raise BitconvertError(f"{index}: not a weight index (a shard has no name)", "download the file again")
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise BitconvertError(f"{index}: shard '{shard}' lies outside the directory", "do not trust this model")
        if not (index.parent / shard).exists():
            raise BitconvertError(
                f"{index.parent / shard}: missing, but named in {index.name}", "download the model again"
            )
        _require_as_indexed(index.parent / shard, {name for name, file in weight_map.items() if file == shard})
    yield from ((name, index.parent / shard) for name, shard in weight_map.items())


def _require_as_indexed(shard: Path, named: set[str]) -> None:
    """A tensor of which there are two is another model for each reader that takes another one."""
    with open_safetensors(shard) as tensors:
        held = set(tensors.keys())
    for name in sorted(held ^ named):
        what = "is missing, though the index says that it is here" if name in named else "is not the index's"
        raise BitconvertError(f"{shard}: tensor {name} {what}", "download the model again")


def _no_safetensors(directory: Path) -> BitconvertError:
    if (directory / "onnx").is_dir():
        return BitconvertError(
            f"{directory / 'onnx'}: ONNX files are not read back", "give the checkpoint that they were packed from"
        )
    pickled = sorted(file for pattern in _PICKLED for file in directory.glob(pattern))
    if pickled:
        return BitconvertError(
            f"{pickled[0]}: pickled weights are never loaded",
            "convert them to safetensors first (the hub's 'safetensors convert' does)",
        )
    return BitconvertError(
        f"{directory}: no {_WEIGHTS}", "a Hugging Face model directory holds config.json and *.safetensors"
    )


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """``safe_open`` whose errors name the file, those of a tensor that is not in it too."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        reason = str(error).partition(", expected one of")[0]  # all types that there are
        raise BitconvertError(f"{path}: truncated or not safetensors ({reason})", "download it again") from error


def read_rows(path: Path, name: str) -> Iterator[Tensor]:
    """Read a tensor of a safetensors file, a part of its rows at a time; a vector comes whole.

    Of the file, which is mapped, no more is in memory than the rows that are in use.

    Raises:
        BitconvertError: it is not there, or the file is damaged.
    """
    with open_safetensors(path) as tensors:
        shape = tensors.get_slice(name).get_shape()
    step = max(1, _WEIGHTS_AT_ONCE // max(1, math.prod(shape[1:]))) if len(shape) > 1 else max([1, *shape])
    for begin in range(0, shape[0] if shape else 1, step):
        with open_safetensors(path) as tensors:
            rows = tensors.get_slice(name)[begin : begin + step] if shape else tensors.get_tensor(name)
        yield rows


def _load_directory(checkpoint: Checkpoint) -> PreTrainedModel:
    """Load a float32 model from its directory; every weight must be there."""
    checkpoint.weights()
    model_class = getattr(transformers, checkpoint.family.architecture)
    try:
        model = model_class.from_pretrained(
            checkpoint.path,
            config=copy.deepcopy(checkpoint.complete),
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
        )
    except Exception as error:  # as for the config: exceptions of many kinds, also from generation_config.json
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BitconvertError(
            f"{checkpoint.name}: its weights do not load ({reason})", "the weights must belong to its config.json"
        ) from error
    loaded: PreTrainedModel = model
    return loaded


def _check_finite(name: str, tensor_name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and not all_finite(tensor):
        raise BitconvertError(
            f"{name}: tensor {tensor_name} holds NaN or infinity",
            "the model is damaged, or its training diverged: use an earlier checkpoint",
        )


def require_alive(name: str, tensor_name: str, weight: Tensor) -> None:
    """Refuse a matrix that is zero all over: nothing passes it, and nothing would be learned from what it gives.

    Raises:
        BitconvertError: it is.
    """
    if not (weight[:1].any() or weight.any()):  # the first row tells for nearly all
        raise zero_all_over(name, tensor_name)


def zero_all_over(name: str, tensor_name: str) -> BitconvertError:
    """What is said of such a matrix."""
    return BitconvertError(
        f"{name}: tensor {tensor_name} is zero all over", "the model is damaged: download or convert it again"
    )


def _no_latent_weights(what: str) -> BitconvertError:
    return BitconvertError(
        f"{what}: there are no latent weights left to train",
        "warmup needs the original model; to train this one on, make a directory of it first: bitconvert unpack",
    )
