"""Weights at λ < 1, and their gradients, against the published formulas in float64, differentiated by autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bitconvert.errors import UsageError
from bitconvert.recipe import Scaling, load_recipe
from bitconvert.ternary.bitlinear import BitLinear, Lambda, insert_bitlinear, refresh
from bitconvert.ternary.blends import BLENDS
from bitconvert.ternary.quantize import quantize_int8, scale_of


def straight(value: Tensor, rounded: Tensor) -> Tensor:
    """The value of ``rounded``, the gradient of ``value``."""
    return value + (rounded - value).detach()


def linear(w: Tensor, s: Tensor, lam: float) -> Tensor:
    return straight(w, w + lam * ((w / s).round().clamp(-1, 1) * s - w))


def levels(w: Tensor, s: Tensor, _: float) -> Tensor:
    return straight(w, (w / s * 2).round().clamp(-4, 4) / 4 * 2 * s)


PUBLISHED: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {"linear": linear, "levels": levels}
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
