"""BitLinear: a linear layer that sees ternary weights and int8 activations; how it gets into a model and out of one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitconvert.recipe import Scaling
from bitconvert.ternary.quantize import fake_int8, fake_ternarize, ternarize


class Lambda(nn.Module):
    """The λ that all BitLinears of a model share: 0 is the latent model, 1 the ternary one.

    One module, referenced by every layer, so that moving the model keeps it shared. A buffer, so that a compiled graph
    does not depend on its value; not persistent, so that checkpoints stay plain.
    """

    value: Tensor

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("value", torch.tensor(float(value)), persistent=False)

    def set(self, value: float) -> None:
        """Move λ to ``value`` in place."""
        self.value.fill_(value)

    @contextmanager
    def at(self, value: float) -> Iterator[None]:
        """Hold λ at ``value`` for the duration of a block."""
        before = self.value.clone()
        self.set(value)
        try:
            yield
        finally:
            self.value.copy_(before)


class BitLinear(nn.Linear):
    """``y = int8(x) @ ternary(W).T + b``, both blended in by λ, gradients straight through (arXiv 2402.17764).

    It keeps the names and shapes of the nn.Linear that it replaces, so the state dict stays that of the plain model.

    Attributes:
        weight: latent weight, float32, shape (out, in); after ``freeze`` the ternary weight codes * scale.
        lam: the model's shared λ.
        scaling: estimator and granularity of the weight's scale.
        frozen: whether ``weight`` already is ternary, so that no forward has to round it again.
        activation_block: how many activations share an int8 scale; None for all of a token's (see ``fake_int8``).
    """

    def __init__(self, linear: nn.Linear, scaling: Scaling, lam: Lambda) -> None:
        nn.Module.__init__(self)
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.weight = linear.weight
        self.bias = linear.bias
        self.scaling = scaling
        self.lam = lam
        self.frozen = False
        self.activation_block: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map activations (..., in) to (..., out)."""
        weight = self.weight if self.frozen else fake_ternarize(self.weight, self.lam.value, self.scaling)
        return functional.linear(fake_int8(x, self.lam.value, self.activation_block), weight, self.bias)

    @torch.no_grad()
    def freeze(self) -> None:
        """Replace the latent weight by its ternary value, for evaluation and generation."""
        self.weight.copy_(ternarize(self.weight, self.scaling).dequantize())
        self.frozen = True


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


def freeze_ternary(model: nn.Module) -> None:
    """Fix every BitLinear of a model at its ternary weight."""
    for module in bitlinears(model):
        module.freeze()


@contextmanager
def held_ternary(model: nn.Module) -> Iterator[None]:
    """Measure the ternary model (λ = 1): round each BitLinear once, not at each forward. The latents come back."""
    modules = bitlinears(model)
    latents = [module.weight.data for module in modules]
    try:
        for module in modules:
            module.weight.data = ternarize(module.weight.data, module.scaling).dequantize()
        with _held(modules, lam=1.0):
            yield
    finally:
        for module, latent in zip(modules, latents, strict=True):
            module.weight.data = latent


@contextmanager
def held_latent(model: nn.Module) -> Iterator[None]:
    """Measure the float model (λ = 0), without rounding anything on the way."""
    with _held(bitlinears(model), lam=0.0):
        yield


@contextmanager
def _held(modules: list[BitLinear], lam: float) -> Iterator[None]:
    with ExitStack() as stack:
        for shared in {id(module.lam): module.lam for module in modules}.values():
            stack.enter_context(shared.at(lam))
        for module in modules:
            module.frozen = True
        try:
            yield
        finally:
            for module in modules:
                module.frozen = False


def bitlinears(model: nn.Module) -> list[BitLinear]:
    """The BitLinears of a model, in order."""
    return [module for module in model.modules() if isinstance(module, BitLinear)]
