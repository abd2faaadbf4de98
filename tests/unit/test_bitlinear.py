"""BitLinear in a model: names, sharing, freezing, compiling."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.integrations.bitnet import AutoBitLinear

from bitconvert.recipe import Scaling
from bitconvert.ternary.bitlinear import (
    BitLinear,
    bitlinears,
    freeze_ternary,
    insert_bitlinear,
    refresh,
)
from bitconvert.ternary.quantize import ternarize


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.SiLU(), nn.Linear(32, 16, bias=False), nn.Linear(16, 8))


def test_it_keeps_names_and_parameters() -> None:
    model = small_model()
    before = {name: value.data_ptr() for name, value in model.state_dict().items()}
    insert_bitlinear(model, ["0", "2"], Scaling())
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == before
    assert [type(module) for module in model] == [BitLinear, nn.SiLU, BitLinear, nn.Linear]


def test_lambda_zero_is_the_model_it_was() -> None:
    model, x = small_model(), torch.randn(5, 64)
    before = model(x)
    insert_bitlinear(model, ["0", "2"], Scaling(), lam=0.0)
    torch.testing.assert_close(model(x), before)


def test_lambda_one_is_transformers_own_bitlinear() -> None:
    linear, x = nn.Linear(64, 32), torch.randn(5, 64)
    peer = AutoBitLinear(64, 32, bias=True, online_quant=True)
    peer.load_state_dict(linear.state_dict())
    model = nn.Sequential(linear)
    insert_bitlinear(model, ["0"], Scaling(estimator="absmean"), lam=1.0)
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(model(x), peer(x), rtol=1e-5, atol=1e-5)


def test_one_lambda_moves_all_layers_even_after_the_model_moved() -> None:
    model = small_model()
    lam = insert_bitlinear(model, ["0", "2"], Scaling(estimator="absmean"))
    model.to(torch.float64).to(torch.float32)
    lam.set(0.5)
    assert [layer.lam.value.item() for layer in bitlinears(model)] == [0.5, 0.5]


def test_freezing_leaves_the_codes_and_keeps_the_output() -> None:
    model, x = small_model(), torch.randn(5, 64)
    insert_bitlinear(model, ["0", "2"], Scaling(estimator="mse", granularity="row"), lam=1.0)
    before, expected = model(x), [ternarize(layer.weight, layer.scaling) for layer in bitlinears(model)]
    freeze_ternary(model)
    assert torch.equal(model(x), before)
    for layer, ternary in zip(bitlinears(model), expected, strict=True):
        assert layer.weight is None
        assert torch.equal(layer.codes, ternary.codes)
        assert torch.equal(layer.scale, ternary.scale)


def test_measuring_leaves_no_trace() -> None:
    model, x = small_model(), torch.randn(5, 64)
    original = model(x)
    lam = insert_bitlinear(model, ["0", "2"], Scaling(), lam=1.0)
    ternary = model(x)
    lam.set(0.3)
    blended, weights = model(x), [layer.weight.clone() for layer in bitlinears(model)]
    with lam.at(1.0):
        assert torch.equal(model(x), ternary)
    with lam.at(0.0):
        torch.testing.assert_close(model(x), original)
    assert torch.equal(model(x), blended)
    assert all(torch.equal(layer.weight, w) for layer, w in zip(bitlinears(model), weights, strict=True))


def test_only_linears_are_replaced() -> None:
    with pytest.raises(TypeError, match="1 is a SiLU"):
        insert_bitlinear(small_model(), ["1"], Scaling())


def test_only_the_ends_of_lambda_have_compiled_graphs_of_their_own() -> None:
    model, x = small_model(), torch.randn(5, 64)
    lam = insert_bitlinear(model, ["0", "2"], Scaling())
    torch._dynamo.reset()
    graphs = 0

    def count(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(model, backend=count, fullgraph=True)
    for values, expected in (((0, 0), 1), ((0.2, 0.5), 2), ((0.5, 0.75), 2), ((0.6, 1), 3), ((0.7, 1), 3), ((1, 1), 4)):
        lam.set(*values)
        refresh(model)
        torch.testing.assert_close(compiled(x), model(x))
        assert graphs == expected


def test_a_model_can_be_copied_and_saved_whole(tmp_path: Path) -> None:
    model, x = small_model(), torch.randn(5, 64)
    insert_bitlinear(model, ["0", "2"], Scaling(), lam=1.0)
    expected = model(x)
    torch.save(model, tmp_path / "model.pt")
    for again in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(again(x), expected)
        with torch.no_grad():
            again[0].weight.neg_()
        assert not torch.equal(again(x), expected)
    assert torch.equal(model(x), expected)
