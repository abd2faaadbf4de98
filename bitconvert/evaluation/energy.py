"""What a model's matrix products cost in energy, and its weights in memory, beside the same model in FP16.

The estimate is that of the BitNet papers: additions and multiplications of matrix products, each with the energy of one
such operation at 7 nm. A ternary product has no multiplications but those by the scales: "BitNet" (arXiv 2310.11453),
equations 16 to 18; "The Era of 1-bit LLMs" (arXiv 2402.17764), figure 3; "BitNet b1.58 2B4T Technical Report" (arXiv
2504.12285), whose numbers for six models come out of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from bitconvert.models.checkpoint import Checkpoint
from bitconvert.models.gguf_types import TERNARY
from bitconvert.models.hparams import head_dim
from bitconvert.models.packed import has_int8_activations
from bitconvert.report.inspection import EnergyReport, EnergyRow, TensorReport

CONTEXT = 512
"""Tokens of the text, as in the papers, where the model takes so many: they decide what attention costs."""

_SOURCE = (
    "7 nm: Jouppi et al., Ten Lessons From Three Generations Shaped Google's TPUv4i (ISCA 2021), table 2, after "
    "Horowitz (ISSCC 2014); counted as in BitNet (arXiv 2310.11453) and BitNet b1.58 (arXiv 2402.17764)"
)
_ASSUMPTIONS = (
    "hardware that adds int8 activations where a weight is -1 or +1; what runs today multiplies them all the same",
    "a zero counts as an addition, and every sum as one of its operands' type, as in the papers; BF16 counts as FP16",
    "left out: moving weights and activations through memory; norms, softmax, activation functions",
)


class Arithmetic(NamedTuple):
    """What an operation on numbers of one type costs.

    Attributes:
        name: of the type.
        add: energy of an addition, in picojoules.
        multiply: of a multiplication.
    """

    name: str
    add: float
    multiply: float


FP32 = Arithmetic("FP32", 0.38, 1.31)
FP16 = Arithmetic("FP16", 0.16, 0.34)
INT8 = Arithmetic("INT8", 0.007, 0.07)

_FLOATS = {"F64": FP32, "F32": FP32, "F16": FP16, "BF16": FP16}


class Product(NamedTuple):
    """The products of a token's activations with a matrix, or with the keys and values of all tokens.

    Attributes:
        part: of the model.
        arithmetic: the type of the operands.
        terms: number of products that are summed up, which is the number of the matrix's weights.
        scalings: multiplications in FP16 by the scales of weights and activations, where these are all there are; None
            where every term is multiplied.
    """

    part: str
    arithmetic: Arithmetic
    terms: int
    scalings: int | None = None

    @property
    def kind(self) -> str:
        """The arithmetic in words."""
        return self.arithmetic.name if self.scalings is None else f"{self.arithmetic.name} additions"

    @property
    def multiplications(self) -> int:
        """Of terms or by scales."""
        return self.terms if self.scalings is None else self.scalings

    @property
    def picojoules(self) -> float:
        """Of one token."""
        multiply = self.arithmetic.multiply if self.scalings is None else FP16.multiply
        return self.terms * self.arithmetic.add + self.multiplications * multiply


def estimate_energy(checkpoint: Checkpoint, tensors: Iterable[TensorReport]) -> EnergyReport:
    """Estimate the energy of a token's matrix products, and the memory that a model takes.

    Args:
        checkpoint: the model.
        tensors: all of it, as ``inspect`` tells of them.
    """
    tensors = tuple(tensors)
    rows = tuple(_rows([*_matrix_products(checkpoint, tensors), _attention(checkpoint)]))
    return EnergyReport(
        context=_context(checkpoint),
        rows=rows,
        joules_per_token=sum(row.joules for row in rows),
        fp16_joules_per_token=sum(row.fp16_joules for row in rows),
        weight_bytes=sum(tensor.bytes for tensor in tensors),
        fp16_weight_bytes=2 * sum(tensor.parameters for tensor in tensors),
        kv_bytes_per_token=_kv_bytes(checkpoint),
        source=_SOURCE,
        assumptions=_ASSUMPTIONS,
    )


def _rows(products: list[Product]) -> Iterator[EnergyRow]:
    """The products of each part and kind, added up."""
    for part, kind in dict.fromkeys((product.part, product.kind) for product in products):
        alike = [product for product in products if (product.part, product.kind) == (part, kind)]
        terms = sum(product.terms for product in alike)
        yield EnergyRow(
            part=part,
            arithmetic=kind,
            additions=terms,
            multiplications=sum(product.multiplications for product in alike),
            joules=1e-12 * sum(product.picojoules for product in alike),
            fp16_joules=1e-12 * terms * (FP16.add + FP16.multiply),
        )


def _matrix_products(checkpoint: Checkpoint, tensors: tuple[TensorReport, ...]) -> Iterator[Product]:
    """The linears of the blocks, then the output head, which may be the embedding's matrix."""
    head = "model.embed_tokens.weight" if checkpoint.complete.tie_word_embeddings else "lm_head.weight"
    for tensor in tensors:
        if checkpoint.family.is_ternary_module(tensor.hf_name.removesuffix(".weight")):
            yield _linear(checkpoint, tensor)
    for tensor in tensors:
        if tensor.hf_name == head:
            yield Product("output head", _arithmetic(checkpoint, tensor), tensor.parameters)


def _linear(checkpoint: Checkpoint, tensor: TensorReport) -> Product:
    """A linear of a block. A ternary one multiplies each input to round it, and each sum that has a scale by that."""
    if not _adds_only(checkpoint, tensor):
        return Product("other linears", _arithmetic(checkpoint, tensor), tensor.parameters)
    rows, columns = tensor.shape
    scales = tensor.scale.count if tensor.scale else 0
    return Product("ternary linears", INT8, tensor.parameters, scalings=columns + max(rows, scales))


def _adds_only(checkpoint: Checkpoint, tensor: TensorReport) -> bool:
    """Whether int8 activations meet codes: in GGUF by the type, in a directory by what it says of its linears."""
    if checkpoint.kind == "gguf":
        return checkpoint.stored_as(tensor.hf_name) in {known.name for known in TERNARY}
    if checkpoint.kind == "packed":
        return tensor.hf_name in checkpoint.packed and has_int8_activations(checkpoint.config)
    return checkpoint.kind in ("latent", "baked") and tensor.ternary


def _arithmetic(checkpoint: Checkpoint, tensor: TensorReport) -> Arithmetic:
    """What a matrix is multiplied in: floats as they are, llama.cpp's quantized types with int8 activations."""
    otherwise = INT8 if checkpoint.kind == "gguf" else FP16  # compressed-tensors' codes become floats
    return _FLOATS.get(checkpoint.stored_as(tensor.hf_name), otherwise)


def _attention(checkpoint: Checkpoint) -> Product:
    """Queries with the keys of all tokens, and what comes of it with their values."""
    heads = int(checkpoint.complete.num_attention_heads)
    return Product(
        "attention", FP16, 2 * _layers(checkpoint) * heads * head_dim(checkpoint.complete) * _context(checkpoint)
    )


def _kv_bytes(checkpoint: Checkpoint) -> int:
    """Of a key and a value of each layer, in FP16."""
    return 2 * 2 * _layers(checkpoint) * int(checkpoint.complete.num_key_value_heads) * head_dim(checkpoint.complete)


def _context(checkpoint: Checkpoint) -> int:
    return min(CONTEXT, checkpoint.max_context)


def _layers(checkpoint: Checkpoint) -> int:
    return int(checkpoint.complete.num_hidden_layers)
