"""BitLinear: a linear layer that sees ternary weights and int8 activations; how it gets into a model and out of one."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitconvert.recipe import Scaling
from bitconvert.ternary.products import LowRankLinear, StraightThroughLinear, low_rank_sum, product_dtype
from bitconvert.ternary.quantize import (
    SMALLEST_SCALE,
    TernaryTensor,
    codes_of,
    quantize_int8,
    rounded,
    scale_of,
    ternarize,
)


class Lambda(nn.Module):
    """The λ that all BitLinears of a model share: 0 is the latent model, 1 the ternary one.

    One module, referenced by every layer, so that moving the model keeps it shared. Its values are buffers, so that a
    compiled graph does not depend on them; only the ends 0 and 1, where other products are made, have graphs of their
    own. The buffers are not persistent, so that checkpoints stay plain.

    Attributes:
        value: λ of the weights, a scalar tensor.
        of_activations: λ of the activations, a scalar tensor; it may run ahead.
        settings: both, as numbers.
        is_latent: whether both are 0.
        has_ternary_weights: whether λ of the weights is 1.
        has_int8_activations: whether λ of the activations is 1.
    """

    value: Tensor
    of_activations: Tensor

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("value", torch.tensor(0.0), persistent=False)
        self.register_buffer("of_activations", torch.tensor(0.0), persistent=False)
        self.rounded = _LastRounded()
        self.set(value)

    def set(self, value: float, of_activations: float | None = None) -> None:
        """Move λ in place; without a value of their own the activations go with the weights."""
        self.settings = value, value if of_activations is None else of_activations
        for buffer, number in zip((self.value, self.of_activations), self.settings, strict=True):
            buffer.fill_(number)
        self.is_latent = self.settings == (0, 0)
        self.has_ternary_weights = self.settings[0] == 1
        self.has_int8_activations = self.settings[1] == 1

    @contextmanager
    def at(self, value: float) -> Iterator[None]:
        """Hold λ at ``value`` for the duration of a block."""
        before = self.settings
        self.set(value)
        try:
            yield
        finally:
            self.set(*before)


def _nothing() -> None:
    """What a weak reference gives that never referred to anything."""


class _LastRounded:
    """The activations that were rounded last: q, k and v round the same ones, and so do gate and up."""

    def __init__(self) -> None:
        self._of: Callable[[], Tensor | None] = _nothing  # a weak reference, which does not keep them alive
        self._under: tuple[object, ...] = ()
        self._rounded: tuple[Tensor, Tensor | None] | None = None

    def __reduce__(self) -> tuple[type[_LastRounded], tuple[()]]:
        return _LastRounded, ()  # a copy, or what comes back from a file, has rounded nothing yet

    def activations(self, x: Tensor, lam: Lambda, block: int | None) -> tuple[Tensor, Tensor | None]:
        """Codes and scale of ``x``; or, where λ of the activations is not 1, the blend and None."""
        if torch.compiler.is_compiling():
            return _round(x, lam, block)  # the compiler sees by itself that it is the same thing again
        under = (None if x.is_inference() else x._version, lam.settings, block, torch.is_inference_mode_enabled())
        if self._rounded is None or self._of() is not x or self._under != under:
            self._of, self._under, self._rounded = weakref.ref(x), under, _round(x, lam, block)
        return self._rounded


@torch.no_grad()
def _round(x: Tensor, lam: Lambda, block: int | None) -> tuple[Tensor, Tensor | None]:
    rounded = quantize_int8(x, block)
    if lam.has_int8_activations:
        return rounded
    return torch.lerp(x, rounded.dequantize().to(x.dtype), lam.of_activations.to(x.dtype)), None


class BitLinear(nn.Linear):
    """``y = int8(x) @ ternary(W).T + b``, both blended in by λ, gradients straight through (arXiv 2402.17764).

    It keeps the names and shapes of the nn.Linear that it replaces, so the state dict stays that of the plain model.
    The weight's scale is estimated once for each of its values, so once per optimizer step, however many forward and
    backward passes there are; a compiled forward leaves that to ``refresh``.

    Attributes:
        weight: latent weight, float32, shape (out, in); None once it is frozen. With a low rank it is the frozen part
            of the latent weight, bfloat16.
        lora_a, lora_b: the trained part's factors, float32, (rank, in) and (out, rank): the latent weight is
            ``weight + lora_b @ lora_a``; else None.
        lam: the model's shared λ.
        scaling: estimator and granularity of the weight's scale.
        codes: of a frozen weight, int8, shape (out, in), else None.
        scale: of the ternary weight, float32, for its shape see TernaryTensor; None before the first use.
        learned_scale: the scale where it is a parameter, float32, a vector, so that it does not decay; else None.
        activation_block: how many activations share an int8 scale; None for all of a token's (see ``quantize_int8``).
    """

    codes: Tensor | None
    scale: Tensor | None
    learned_scale: nn.Parameter | None
    lora_a: nn.Parameter | None
    lora_b: nn.Parameter | None

    def __init__(self, linear: nn.Linear, scaling: Scaling, lam: Lambda) -> None:
        nn.Module.__init__(self)
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.weight = linear.weight
        self.bias = linear.bias
        self.scaling = scaling
        self.lam = lam
        self.register_buffer("codes", None, persistent=False)
        self.register_buffer("scale", None, persistent=False)
        for name in ("learned_scale", "lora_a", "lora_b"):
            self.register_parameter(name, None)
        self.activation_block: int | None = None
        self._estimated_of: tuple[Callable[[], Tensor | None], tuple[int, ...]] = _nothing, ()

    def forward(self, x: Tensor) -> Tensor:
        """Map activations (..., in) to (..., out)."""
        if self.lam.is_latent:
            return functional.linear(x, self.latent_weight(), self.bias)
        if not torch.compiler.is_compiling():
            self.refresh()
        lam = None if self.lam.has_ternary_weights else self.lam.value
        rounded = self.lam.rounded.activations(x, self.lam, self.activation_block)
        scale = self._used_scale()
        if self.lora_a is not None:
            return cast(
                Tensor,
                LowRankLinear.apply(  # type: ignore[no-untyped-call]
                    x, self.weight, self.lora_a, self.lora_b, self.bias, *rounded, scale, lam, product_dtype(x)
                ),
            )
        weight = self.weight if self.codes is None else self.codes
        y: Tensor = StraightThroughLinear.apply(  # type: ignore[no-untyped-call]
            x, weight, self.bias, *rounded, scale, lam, product_dtype(x)
        )
        return y

    @property
    def qweight(self) -> Tensor:
        """The codes, under the name by which peft finds stored weights: an adapter goes to their device."""
        if self.codes is None:
            raise AttributeError("qweight: the weight is not frozen")
        return self.codes

    @torch.inference_mode(False)  # or a scale from an evaluation could not be trained with
    @torch.no_grad()
    def refresh(self) -> None:
        """Estimate the scale again if the weight has changed.

        A change that leaves ``weight._version`` as it is goes unnoticed, by ``weight.data``, by a fused optimizer, by
        gathering shards: ``forget`` after it.
        """
        of, version = self._estimated_of
        if (
            self.weight is None
            or self.learned_scale is not None
            or (of() is self.weight and version == self._changes())
        ):
            return
        scale = scale_of(self.latent_weight(), self.scaling)
        self.scale = scale if self.scale is None else self.scale.copy_(scale)  # in place: a compiled graph may hold it
        self._estimated_of = weakref.ref(self.weight), self._changes()

    def _changes(self) -> tuple[int, ...]:
        """Counts the changes of all that the latent weight is made of."""
        return tuple(part._version for part in (self.weight, self.lora_a, self.lora_b) if part is not None)

    def latent_weight(self) -> Tensor:
        """The weight that is rounded: float32, shape (out, in)."""
        if self.lora_a is None or self.lora_b is None:
            return self.weight
        return low_rank_sum(self.weight, self.lora_a, self.lora_b)

    def forget(self) -> None:
        """Take the weight for changed."""
        self._estimated_of = _nothing, ()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_estimated_of": (_nothing, ())}  # a copy has a weight of its own

    def _used_scale(self) -> Tensor | None:
        if self.learned_scale is None:
            return self.scale
        return self.learned_scale.clamp(min=SMALLEST_SCALE).view(self._scale_shape)

    def learn_scale(self) -> None:
        """Make the scale a parameter; it starts at its estimate."""
        scale = scale_of(self.weight, self.scaling)
        self._scale_shape = scale.shape
        self.learned_scale = nn.Parameter(scale.flatten())

    @torch.no_grad()
    def train_low_rank(self, rank: int) -> None:
        """Freeze the weight in bfloat16 and train a change of low rank, which is 0 to begin with.

        A is drawn with variance 1 / rank, so that a step of B of some size is a step of about that size of the latent
        weight, and the learning rates of full training keep their meaning.
        """
        self.weight = nn.Parameter(self.weight.bfloat16(), requires_grad=False)
        columns, device = self.in_features, self.weight.device
        self.lora_a = nn.Parameter(torch.randn(rank, columns, device=device) / rank**0.5)
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, rank, device=device))

    @torch.no_grad()
    def merge_low_rank(self) -> None:
        """Make the latent weight one float32 matrix again, bit by bit the one that was rounded."""
        if self.lora_a is not None:
            self.weight = nn.Parameter(self.latent_weight())
            self.lora_a = self.lora_b = None

    @torch.no_grad()
    def settle_scale(self) -> None:
        """Round the weight by the scale that it has learned; estimated, it is the same from now on."""
        scale = self._used_scale()
        if self.learned_scale is not None and scale is not None:
            self.weight.copy_(rounded(self.weight, scale))
            self.learned_scale = None

    @torch.no_grad()
    def ternary_rows(self, step: int) -> TernaryTensor:
        """Every ``step``-th row, from the first on, as the whole weight's scale rounds it now."""
        self.refresh()
        scale = self._used_scale()
        assert scale is not None, "refresh has estimated it, unless it is learned"
        scale = scale if scale.dim() == 1 else scale[::step].contiguous()
        codes = codes_of(self.latent_weight()[::step].contiguous(), scale) if self.codes is None else self.codes[::step]
        return TernaryTensor(codes, scale)

    def freeze(self) -> None:
        """Keep nothing of the weight but its codes and scale, for evaluation and generation at λ = 1."""
        self.merge_low_rank()
        self.settle_scale()
        self.codes, self.scale = ternarize(self.weight, self.scaling)
        self.weight = None  # type: ignore[assignment]


def insert_bitlinear(model: nn.Module, names: Iterable[str], scaling: Scaling, lam: float = 0.0) -> Lambda:
    """Put a BitLinear in place of each named nn.Linear, sharing its parameters.

    Args:
        model: changed in place.
        names: dotted module names.
        scaling: estimator and granularity of the weights' scales.
        lam: where λ starts.

    Returns:
        The λ that the new layers share.
    """
    shared = Lambda(lam)
    for name in names:
        linear = model.get_submodule(name)
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{name} is a {type(linear).__name__}, not a linear layer")
        model.set_submodule(name, BitLinear(linear, scaling, shared))
    return shared


def learn_scales(model: nn.Module) -> None:
    """Make the scales of a model's BitLinears parameters (arXiv 2502.02631); they start at their estimates."""
    for module in bitlinears(model):
        module.learn_scale()


def settle_scales(model: nn.Module) -> None:
    """Round every weight whose scale was learned, so that the weights alone say all."""
    for module in bitlinears(model):
        module.settle_scale()


def train_low_rank(model: nn.Module, rank: int) -> None:
    """Let a model train changes of low rank of its ternary matrices, its norms and biases, and nothing else."""
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.ndim < 2)
    for module in bitlinears(model):
        module.train_low_rank(rank)


def merge_low_rank(model: nn.Module) -> None:
    """Make the latent weights of a model whole, so that they alone say all."""
    for module in bitlinears(model):
        module.merge_low_rank()


def compile_blocks(decoder: nn.Module) -> None:
    """Compile a decoder's layers one by one: that is quick, since equal ones share their graphs.

    The scales of changed weights are estimated before each forward pass of the decoder, outside of the graphs.
    """
    decoder.register_forward_pre_hook(lambda module, _: refresh(module))
    for layer in decoder.get_submodule("layers").children():
        layer.compile()


def refresh(model: nn.Module) -> None:
    """Estimate the scales of a model's weights that have changed, as an eager forward pass does by itself."""
    for module in bitlinears(model):
        module.refresh()


def forget_scales(model: nn.Module) -> None:
    """Have the scales of a model's weights estimated again at the next forward pass."""
    for module in bitlinears(model):
        module.forget()


def freeze_ternary(model: nn.Module) -> None:
    """Leave of every BitLinear of a model its codes and scale alone."""
    for module in bitlinears(model):
        module.freeze()


def bitlinears(model: nn.Module) -> list[BitLinear]:
    """The BitLinears of a model, in order."""
    return [module for module in model.modules() if isinstance(module, BitLinear)]
