"""Weights that became 0 add a share of their sum to the output: Tequila (arXiv 2509.23809)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bitconvert.errors import BitconvertError, UsageError
from bitconvert.models.checkpoint import open_checkpoint
from bitconvert.models.lineage import Lineage
from bitconvert.packing.pack import pack
from bitconvert.recipe import Packing, Scaling, load_recipe
from bitconvert.report import Silent
from bitconvert.ternary.bitlinear import BitLinear, Lambda, bitlinears, freeze_ternary, insert_bitlinear, refresh
from bitconvert.ternary.quantize import quantize_int8, ternarize

SCALING = Scaling(estimator="absmean", granularity="row", dead_zone=0.01)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lam", [0.3, 1.0])
def test_forward_and_gradients_are_those_of_tequila(lam: float, bias: bool) -> None:
    """Ternary codes times the input, and the dead weights, by the factor, times ones."""
    torch.manual_seed(0)
    x, upstream = torch.randn(7, 64), torch.randn(7, 24)
    layer = BitLinear(nn.Linear(64, 24, bias=bias), SCALING, Lambda())
    layer.lam.set(lam, 1.0)
    ternary = ternarize(layer.weight, SCALING)
    w = layer.weight.detach().clone().requires_grad_()
    blended = w + lam * (ternary.dequantize() - w).detach()
    exact = functional.linear(quantize_int8(x).dequantize(), blended, layer.bias)
    exact = exact + lam * functional.linear(torch.ones_like(x), 0.01 * w * (ternary.codes == 0))
    y = layer(x)
    torch.testing.assert_close(y, exact, rtol=1e-5, atol=1e-5)
    (ours,), (theirs,) = torch.autograd.grad(y, [layer.weight], upstream), torch.autograd.grad(exact, [w], upstream)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_at_the_end_it_is_a_bias_and_compiled_it_is_the_same() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 32, bias=False)), torch.randn(5, 64)
    insert_bitlinear(model, ["0"], SCALING, lam=1.0)
    refresh(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    ours, theirs = (torch.autograd.grad(f(x).square().sum(), [*model.parameters()]) for f in (compiled, model))
    torch.testing.assert_close(ours, theirs)
    before = model(x)
    freeze_ternary(model)
    assert torch.equal(model(x), before)
    assert all(isinstance(layer.bias, Tensor) for layer in bitlinears(model))


def test_it_is_evaluated_and_refused_by_name_where_it_cannot_be(smollm: Path, tmp_path: Path) -> None:
    latent = Path(shutil.copytree(smollm, tmp_path / "latent"))
    Lineage(source="x", lam=1.0, scaling=SCALING, tokens_seen=1).save(latent)
    checkpoint = open_checkpoint(str(latent))
    assert all(layer.bias is not None and layer.bias.any() for layer in bitlinears(checkpoint.load()))
    with pytest.raises(BitconvertError, match=r"format tq2_0 cannot hold the bias that scaling\.dead_zone"):
        pack(checkpoint, Packing(formats=("tq2_0",)), tmp_path, reporter=Silent())
    with pytest.raises(UsageError, match="dead_zone"):
        load_recipe(None, ["scaling={estimator: learned, dead_zone: 0.001}"])
