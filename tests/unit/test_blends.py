"""Weights at λ < 1, and their gradients, against the published formulas in float64, differentiated by autograd."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bitconvert.errors import UsageError
from bitconvert.recipe import Scaling, load_recipe
from bitconvert.ternary.bitlinear import BitLinear, Lambda, insert_bitlinear, refresh
from bitconvert.ternary.blends import _SOFTEST, BLENDS
from bitconvert.ternary.quantize import quantize_int8, scale_of


def straight(value: Tensor, rounded: Tensor) -> Tensor:
    """The value of ``rounded``, the gradient of ``value``."""
    return value + (rounded - value).detach()


def linear(w: Tensor, s: Tensor, lam: float) -> Tensor:
    return straight(w, w + lam * ((w / s).round().clamp(-1, 1) * s - w))


def levels(w: Tensor, s: Tensor, _: float) -> Tensor:
    return straight(w, (w / s * 2).round().clamp(-4, 4) / 4 * 2 * s)


def soft(w: Tensor, s: Tensor, lam: float) -> Tensor:
    """Pressure up over a fifth, then the temperature down on a cosine."""
    temperature = 0.351 * (1 + math.cos(math.pi * max(0.0, lam - 0.2) / 0.8)) / 2
    codebook = torch.tensor([-1.0, 0.0, 1.0]).double()
    nearness = -(((w / s).unsqueeze(-1) - codebook) ** 2) / (temperature + 1e-6)
    return torch.lerp(w, s * (nearness.softmax(-1) * codebook).sum(-1), min(1.0, lam / 0.2))


def residual(w: Tensor, s: Tensor, lam: float) -> Tensor:
    return straight(w, (w / s).round().clamp(-1, 1) * s) + (1 - lam) * w


PUBLISHED: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "linear": linear,
    "levels": levels,
    "soft": soft,
    "residual": residual,
}
OTHERS = sorted(BLENDS.keys() - {"linear"})


@pytest.mark.parametrize("granularity", ["tensor", "row", "group:32"])
@pytest.mark.parametrize("lam", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("blend", BLENDS)
def test_forward_and_gradients_are_the_published_ones(blend: str, lam: float, granularity: str) -> None:
    torch.manual_seed(0)
    x, upstream = torch.randn(7, 64), torch.randn(7, 24).double()
    layer = BitLinear(nn.Linear(64, 24), Scaling(estimator="mse", granularity=granularity), Lambda(blend=blend))
    layer.lam.set(lam, 1.0)
    scale = scale_of(layer.weight, layer.scaling).double().view(-1, 1)
    exact_x = quantize_int8(x).dequantize().double().requires_grad_()
    exact_w = layer.weight.detach().double().requires_grad_()
    blended = PUBLISHED[blend](exact_w.view(scale.numel(), -1), scale, lam).view(24, 64)
    exact = functional.linear(exact_x, blended, layer.bias.double())
    y = layer(x.requires_grad_())
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(y, [x, layer.weight], upstream.float()),
        torch.autograd.grad(exact, [exact_x, exact_w], upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


def test_the_softest_codes_are_the_nearest_to_a_gaussian() -> None:
    """Hestia starts at the temperature with the least error for weights in units of their absmean."""
    z = torch.linspace(-8, 8, 100_001).double()
    density = torch.exp(-(z**2) / math.pi)  # the absmean of N(0, pi / 2) is 1

    def error(temperature: float) -> float:
        p = torch.stack([-((z - code) ** 2) / temperature for code in (-1, 0, 1)]).softmax(0)
        return float(((p[2] - p[0] - z) ** 2 * density).sum())

    assert error(_SOFTEST) < min(error(_SOFTEST - 0.002), error(_SOFTEST + 0.002))


@pytest.mark.parametrize("blend", OTHERS)
def test_compiled_and_eager_agree(blend: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 32), nn.SiLU(), nn.Linear(32, 16)), torch.randn(17, 64, requires_grad=True)
    lam = insert_bitlinear(model, ["0", "2"], Scaling(), blend=blend)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    wrt = [x, *model.parameters()]
    for value in (0.3, 0.6):
        lam.set(value, 1.0)
        refresh(model)
        ours, theirs = (torch.autograd.grad(f(x).square().mean(), wrt) for f in (compiled, model))
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("blend", OTHERS)
@pytest.mark.parametrize("never", ["lam.curve=instant", "lam.reach_one_at=0"])
def test_a_blend_that_is_never_seen_is_refused(blend: str, never: str) -> None:
    with pytest.raises(UsageError, match="blend"):
        load_recipe(None, [f"lam.blend={blend}", never])


ARENAS = ("lam.blend=residual", "lam.curve=arenas", "lam.activations_reach_one_at=0")


def test_a_residual_needs_its_curve_and_rounded_activations() -> None:
    assert load_recipe(None, ARENAS).lam.blend == "residual"
    for missing in ARENAS:
        with pytest.raises(UsageError, match="arenas"):
            load_recipe(None, ["lam.curve=linear", *(option for option in ARENAS if option != missing)])
