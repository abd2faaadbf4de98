"""The computation of a llama-like decoder as an ONNX graph: read top to bottom, it is the model.

Inputs and outputs are named as transformers.js expects them: ``input_ids``, ``attention_mask``, ``position_ids`` and
``past_key_values.N.key`` in, ``logits`` and ``present.N.key`` out, with (batch, kv heads, tokens, head_dim) for the
cache. All operators but ``MatMulNBits`` are ONNX's own. Padding may stand on either side: the mask is honoured, and the
rotation follows ``position_ids``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike
from onnx import TensorProto, helper, numpy_helper
from transformers import PreTrainedConfig

from bitconvert.errors import BitconvertError
from bitconvert.models.checkpoint import Checkpoint
from bitconvert.packing.formats.onnx import BITS
from bitconvert.packing.source import EMBEDDING, HEAD

FAMILIES = ("llama", "mistral", "ministral", "qwen2", "qwen3", "smollm3", "granite")
"""Architectures that are this graph: biases and norms of q and k come in where the checkpoint has them, and windows,
layers without rotation, and multipliers where the config does."""

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Those whose frequencies do not depend on the length of the text."""

_OPSET = 18
_IR_VERSION = 10  # of the protobuf: what ONNX Runtime 1.18 and later read
_MICROSOFT = "com.microsoft"
_MASKED = float(np.finfo(np.float32).min)


class Graph:
    """Nodes in order of computation; a value is known by its name.

    Attributes:
        stored: name, type and shape of the tensors that the data file will hold.
    """

    def __init__(self) -> None:
        self.stored: dict[str, tuple[int, tuple[int, ...]]] = {}
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}

    def op(self, kind: str, *inputs: str, output: str = "", domain: str = "", **attributes: Any) -> str:
        """Add a node with one output, and give the output's name."""
        name = output or f"{kind}_{len(self._nodes)}"
        self.split(kind, *inputs, outputs=[name], domain=domain, **attributes)
        return name

    def split(self, kind: str, *inputs: str, outputs: Sequence[str], domain: str = "", **attributes: Any) -> list[str]:
        """Add a node with named outputs."""
        self._nodes.append(
            helper.make_node(kind, inputs, outputs, f"node_{len(self._nodes)}", domain=domain, **attributes)
        )
        return list(outputs)

    def integers(self, *values: int) -> str:
        """A constant vector of int64, for shapes and axes."""
        return self._constant("_".join(["int64", *map(str, values)]), np.array(values, np.int64))

    def number(self, value: float) -> str:
        """A constant float32 scalar."""
        return self._constant(f"float_{value}", np.float32(value))

    def floats(self, name: str, values: ArrayLike) -> str:
        """A constant vector of float32."""
        return self._constant(name, np.asarray(values, np.float32))

    def weight(self, name: str, dtype: int, shape: tuple[int, ...]) -> str:
        """A tensor that the data file will hold."""
        self.stored[name] = (dtype, shape)
        return name

    def model(
        self,
        name: str,
        inputs: list[onnx.ValueInfoProto],
        outputs: list[onnx.ValueInfoProto],
        stored: list[TensorProto],
    ) -> onnx.ModelProto:
        """The finished model.

        Args:
            name: of the graph.
            inputs: with types and shapes.
            outputs: likewise.
            stored: where the data file holds each of the weights.
        """
        graph = helper.make_graph(self._nodes, name, inputs, outputs, [*self._constants.values(), *stored])
        opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid(_MICROSOFT, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="bitconvert")

    def _constant(self, name: str, values: Any) -> str:
        self._constants.setdefault(name, numpy_helper.from_array(np.asarray(values), name))
        return name


class Decoder:
    """Builds the graph of one model.

    Args:
        checkpoint: its config decides the shapes.
        shapes: of the tensors it has, among them maybe an untied head, biases, norms of q and k.
        block: weights that share a stored scale.

    Raises:
        BitconvertError: the model computes something else than this graph.
    """

    def __init__(self, checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]], block: int) -> None:
        _require_known(checkpoint.complete, checkpoint.name)
        self._checkpoint = checkpoint
        self._config = checkpoint.complete
        self._shapes = shapes
        self._block = block
        self._head_dim = getattr(self._config, "head_dim", None) or (
            self._config.hidden_size // self._config.num_attention_heads
        )
        self._masks: dict[str, str] = {}
        self.graph = Graph()
        self._inputs = [
            _ids("input_ids", "sequence"),
            _ids("attention_mask", "total"),
            _ids("position_ids", "sequence"),
        ]
        self._outputs = [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", self._config.vocab_size])
        ]
        self._build()

    def model(self, stored: list[TensorProto]) -> onnx.ModelProto:
        """The finished model, its weights where ``stored`` says."""
        return self.graph.model(self._checkpoint.base_name, self._inputs, self._outputs, stored)

    # ---- the model, top to bottom ----------------------------------------------------------------------------------

    def _build(self) -> None:
        x = self.graph.op("Gather", self._plain(EMBEDDING), "input_ids")
        x = self._multiplied(x, "embedding_multiplier")
        rotation = self._rotation()
        for layer in range(self._config.num_hidden_layers):
            x = self._layer(layer, x, rotation)
        self._logits(self._rms_norm(x, "model.norm"))

    def _layer(self, layer: int, x: str, rotation: tuple[str, str]) -> str:
        name = f"model.layers.{layer}"
        attended = self._attention(layer, self._rms_norm(x, f"{name}.input_layernorm"), rotation)
        x = self.graph.op("Add", x, self._multiplied(attended, "residual_multiplier"))
        processed = self._mlp(f"{name}.mlp", self._rms_norm(x, f"{name}.post_attention_layernorm"))
        return self.graph.op("Add", x, self._multiplied(processed, "residual_multiplier"))

    def _attention(self, layer: int, x: str, rotation: tuple[str, str]) -> str:
        """Every key/value head serves a group of query heads, which lie behind each other: (batch, kv, group, s, d)."""
        op, integers = self.graph.op, self.graph.integers
        name = f"model.layers.{layer}.self_attn"
        heads, kv_heads = self._config.num_attention_heads, self._config.num_key_value_heads
        query, key = self._heads(f"{name}.q", x, heads), self._heads(f"{name}.k", x, kv_heads)
        if self._rotates(layer):
            query, key = self._rotated(query, rotation), self._rotated(key, rotation)
        query = op("Mul", query, self.graph.number(self._attention_scale))
        query = op("Reshape", query, integers(0, kv_heads, heads // kv_heads, -1, self._head_dim))
        key = self._cached(layer, "key", key)
        value = self._cached(layer, "value", self._heads(f"{name}.v", x, kv_heads))
        keys = op("Unsqueeze", op("Transpose", key, perm=[0, 1, 3, 2]), integers(2))
        scores = op("Add", op("MatMul", query, keys), self._mask(self._window(layer)))
        mixed = op("MatMul", op("Softmax", scores, axis=-1), op("Unsqueeze", value, integers(2)))
        merged = op("Reshape", op("Transpose", mixed, perm=[0, 3, 1, 2, 4]), integers(0, 0, heads * self._head_dim))
        return self._linear(f"{name}.o_proj", merged)

    def _mlp(self, name: str, x: str) -> str:
        gate = self._linear(f"{name}.gate_proj", x)
        opened = self.graph.op("Mul", gate, self.graph.op("Sigmoid", gate))
        return self._linear(f"{name}.down_proj", self.graph.op("Mul", opened, self._linear(f"{name}.up_proj", x)))

    def _logits(self, x: str) -> None:
        """A tied head is the embedding again: Gemm multiplies with it as it lies, without a transposed copy."""
        op, integers = self.graph.op, self.graph.integers
        head = self._plain(HEAD if HEAD in self._shapes else EMBEDDING)
        flat = op("Gemm", op("Reshape", x, integers(-1, self._config.hidden_size)), head, transB=1)
        shape = op("Concat", op("Shape", "input_ids"), integers(self._config.vocab_size), axis=0)
        if hasattr(self._config, "logits_scaling"):
            flat = op("Div", flat, self.graph.number(self._config.logits_scaling))
        op("Reshape", flat, shape, output="logits")

    # ---- the parts -------------------------------------------------------------------------------------------------

    def _linear(self, name: str, x: str) -> str:
        if self._checkpoint.is_ternary_module(name):
            y = self._packed_product(name, x)
        else:
            y = self.graph.op("MatMul", x, self.graph.op("Transpose", self._plain(f"{name}.weight"), perm=[1, 0]))
        bias = f"{name}.bias"
        return self.graph.op("Add", y, self._plain(bias)) if bias in self._shapes else y

    def _packed_product(self, name: str, x: str) -> str:
        rows, columns = self._shapes[f"{name}.weight"]
        blocks = -(-columns // self._block)
        weight = self.graph.weight(f"{name}.weight", TensorProto.UINT8, (rows, blocks, self._block * BITS // 8))
        scales = self.graph.weight(f"{name}.weight_scale", TensorProto.FLOAT, (rows, blocks))
        return self.graph.op(
            "MatMulNBits", x, weight, scales, domain=_MICROSOFT, N=rows, K=columns, bits=BITS, block_size=self._block
        )

    def _multiplied(self, x: str, multiplier: str) -> str:
        """Times a number that the config may have under this name."""
        value = getattr(self._config, multiplier, 1.0)
        return x if value == 1 else self.graph.op("Mul", x, self.graph.number(value))

    def _rms_norm(self, x: str, name: str) -> str:
        op = self.graph.op
        mean = op("ReduceMean", op("Mul", x, x), self.graph.integers(-1))
        deviation = op("Sqrt", op("Add", mean, self.graph.number(self._config.rms_norm_eps)))
        return op("Mul", op("Div", x, deviation), self._plain(f"{name}.weight"))

    def _heads(self, name: str, x: str, heads: int) -> str:
        """Project, split into heads, normalize them if the model does: (batch, heads, tokens, head_dim)."""
        op = self.graph.op
        split = op("Reshape", self._linear(f"{name}_proj", x), self.graph.integers(0, 0, heads, self._head_dim))
        if f"{name}_norm.weight" in self._shapes:
            split = self._rms_norm(split, f"{name}_norm")
        return op("Transpose", split, perm=[0, 2, 1, 3])

    def _cached(self, layer: int, kind: str, new: str) -> str:
        """Put new keys or values behind those of the past, and give them out for the next step."""
        past, present = f"past_key_values.{layer}.{kind}", f"present.{layer}.{kind}"
        heads = self._config.num_key_value_heads
        self._inputs.append(_cache(past, heads, "past", self._head_dim))
        self._outputs.append(_cache(present, heads, "total", self._head_dim))
        return self.graph.op("Concat", past, new, axis=2, output=present)

    def _rotation(self) -> tuple[str, str]:
        """Cosine and sine of each position's angles: (batch, 1, tokens, head_dim / 2)."""
        op = self.graph.op
        inverse_frequencies, scaling = self._frequencies()
        position = op("Unsqueeze", op("Cast", "position_ids", to=TensorProto.FLOAT), self.graph.integers(1, 3))
        angles = op("Mul", position, self.graph.floats("inverse_frequencies", inverse_frequencies))
        factor = self.graph.number(scaling)
        return op("Mul", op("Cos", angles), factor), op("Mul", op("Sin", angles), factor)

    def _rotated(self, heads: str, rotation: tuple[str, str]) -> str:
        """Turn element i of a head together with element i + head_dim / 2."""
        op, (cosine, sine) = self.graph.op, rotation
        first, second = self.graph.split("Split", heads, outputs=[f"{heads}_1", f"{heads}_2"], axis=-1, num_outputs=2)
        turned_first = op("Sub", op("Mul", first, cosine), op("Mul", second, sine))
        turned_second = op("Add", op("Mul", second, cosine), op("Mul", first, sine))
        return op("Concat", turned_first, turned_second, axis=-1)

    def _mask(self, window: int | None) -> str:
        """What is added to the scores: 0 where a token may look, (batch, 1, 1, tokens, total)."""
        name = f"mask_{window or 'full'}"
        if name not in self._masks:
            op, integers = self.graph.op, self.graph.integers
            total = op("Shape", "attention_mask", start=1)
            past = op("Sub", total, op("Shape", "input_ids", start=1))
            looked_at = op("Range", *(op("Squeeze", end) for end in (integers(0), total, integers(1))))
            looking = op("Range", *(op("Squeeze", end) for end in (past, total, integers(1))))
            distance = op("Sub", op("Unsqueeze", looking, integers(1)), looked_at)
            seen = op("GreaterOrEqual", distance, integers(0))
            if window is not None:
                seen = op("And", seen, op("Less", distance, integers(window)))
            real = op("Cast", op("Unsqueeze", "attention_mask", integers(1, 2, 3)), to=TensorProto.BOOL)
            allowed = op("And", real, seen)
            self._masks[name] = op("Where", allowed, self.graph.number(0.0), self.graph.number(_MASKED), output=name)
        return self._masks[name]

    # ---- what the config says --------------------------------------------------------------------------------------

    @property
    def _attention_scale(self) -> float:
        return float(getattr(self._config, "attention_multiplier", self._head_dim**-0.5))

    def _rotates(self, layer: int) -> bool:
        """SmolLM3 leaves some layers without positions; its name for the list says the opposite of what it holds."""
        rotating = getattr(self._config, "no_rope_layers", None)
        return rotating is None or bool(rotating[layer])

    def _window(self, layer: int) -> int | None:
        """How far back a layer looks; None for as far as there is text."""
        kinds = getattr(self._config, "layer_types", None)
        if kinds is not None and kinds[layer] != "sliding_attention":
            return None
        return getattr(self._config, "sliding_window", None)

    def _frequencies(self) -> tuple[ArrayLike, float]:
        """What transformers computes, whatever the type of rope."""
        rotary: Any = type(self._checkpoint.skeleton().get_submodule("model.rotary_emb"))(self._config)
        return rotary.inv_freq.numpy(), float(rotary.attention_scaling)

    def _plain(self, name: str) -> str:
        return self.graph.weight(name, TensorProto.FLOAT, self._shapes[name])


def _require_known(config: PreTrainedConfig, name: str) -> None:
    """Refuse a model that this graph would compute wrongly."""
    if config.model_type not in FAMILIES:
        raise BitconvertError(
            f"{name}: format onnx has no graph for architecture '{config.model_type}'",
            f"architectures that it has: {', '.join(FAMILIES)}",
        )
    rope = config.rope_parameters["rope_type"]
    if rope not in ROPE_TYPES:
        raise BitconvertError(
            f"{name}: format onnx has no graph for rope type '{rope}'", f"types that it has: {', '.join(ROPE_TYPES)}"
        )
    if config.hidden_act != "silu":
        raise BitconvertError(f"{name}: format onnx has no graph for activation '{config.hidden_act}'", "it has silu")


def _ids(name: str, length: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", length])


def _cache(name: str, heads: int, length: str, head_dim: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", heads, length, head_dim])
