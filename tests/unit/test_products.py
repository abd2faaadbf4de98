"""The products of a BitLinear against fake quantization in floats, as arXiv 2402.17764 writes it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from bitconvert.recipe import Scaling
from bitconvert.ternary import bitlinear, products
from bitconvert.ternary.bitlinear import BitLinear, Lambda, bitlinears, freeze_ternary, insert_bitlinear, refresh
from bitconvert.ternary.quantize import quantize_int8, scale_of, ternarize

SCALINGS = [
    Scaling(estimator="absmean"),
    Scaling(estimator="mse", granularity="row"),
    Scaling(estimator="mse", granularity="group:64"),
    Scaling(estimator="absmean", granularity="group:32"),
]
by_scaling = pytest.mark.parametrize("scaling", SCALINGS, ids=str)
rounding = st.tuples(st.sampled_from(SCALINGS), st.sampled_from([None, 32, 64]))


@pytest.fixture(params=[True, False], ids=["integers", "floats"])
def fast_integers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways to multiply; the integer one works everywhere, if slowly."""
    monkeypatch.setattr(products, "_CPU_IS_FAST", request.param)
    return bool(request.param)


class Straight(torch.autograd.Function):
    """The value of ``quantized``, the gradient of ``value``."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, quantized: Tensor) -> Tensor:
        return quantized.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def fake_quantized(x: Tensor, layer: BitLinear, lam: tuple[float, float]) -> Tensor:
    """The layer in float64, nothing fused, nothing in integers."""
    w = layer.weight.double()
    w = Straight.apply(w, torch.lerp(w, ternarize(layer.weight, layer.scaling).dequantize().double(), lam[0]))
    rounded = quantize_int8(x.float(), layer.activation_block).dequantize().double()
    x = Straight.apply(x.double(), torch.lerp(x.double(), rounded, lam[1]))
    return functional.linear(x, w, None if layer.bias is None else layer.bias.double())


def layer_of(rows: int, columns: int, scaling: Scaling, lam: tuple[float, float], seed: int = 0) -> BitLinear:
    torch.manual_seed(seed)
    shared = Lambda()
    shared.set(*lam)
    return BitLinear(nn.Linear(columns, rows, bias=seed % 2 == 0), scaling, shared)


def activations(*shape: int, seed: int = 1) -> Tensor:
    """Gaussian, with a few large features, as models have them."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    x[..., 3] *= 30
    return x


def close(ours: Tensor, exact: Tensor, tolerance: float) -> None:
    """As float32 products are: within a share of the largest value, not of each value."""
    assert (ours - exact).abs().max() <= tolerance * exact.abs().max()


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 40), st.sampled_from([8, 24, 33]), st.sampled_from([64, 192, 320])),
    how=rounding,
    lam=st.sampled_from([(0.0, 0.4), (0.3, 0.3), (0.7, 1.0), (1.0, 0.5), (1.0, 1.0)]),
    seed=st.integers(0, 2**16),
    integers=st.booleans(),
)
def test_forward_and_gradients_are_those_of_fake_quantization(
    shape: tuple[int, int, int], how: tuple[Scaling, int | None], lam: tuple[float, float], seed: int, integers: bool
) -> None:
    tokens, rows, columns = shape
    layer = layer_of(rows, columns, how[0], lam, seed)
    layer.activation_block = how[1]
    x = activations(tokens, columns, seed=seed).requires_grad_()
    upstream = torch.randn(tokens, rows) * torch.logspace(-6, 0, tokens).unsqueeze(-1)  # quiet tokens beside loud ones
    exact = fake_quantized(x, layer, lam)
    wrt = [p for p in (x, layer.weight, layer.bias) if p is not None]
    expected = torch.autograd.grad(exact, wrt, upstream.double())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "_CPU_IS_FAST", integers)
        y = layer(x)
        gradients = torch.autograd.grad(y, wrt, upstream)
    assert y.dtype == torch.float32
    close(y, exact, 2e-6)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert ours.dtype == torch.float32
        close(ours, theirs, 2e-6)
    if lam == (1.0, 1.0):  # no token's gradient is drowned by a louder one's
        for ours_row, theirs_row in zip(gradients[0], expected[0], strict=True):
            close(ours_row, theirs_row, 2e-6)


@pytest.mark.parametrize("lam", [(0.5, 0.5), (0.5, 1.0), (1.0, 1.0)], ids=str)
@pytest.mark.parametrize("block", [None, 32])
def test_strides_and_dimensions_do_not_matter(block: int | None, lam: tuple[float, float], fast_integers: bool) -> None:
    layer = layer_of(24, 64, Scaling(), lam)
    layer.activation_block = block
    plain = activations(4, 6, 64)
    tokens_apart, features_apart = plain.transpose(0, 1).contiguous().transpose(0, 1), plain.mT.contiguous().mT
    expected = _with_gradients(layer, plain)
    for x in (tokens_apart, features_apart):
        for ours, theirs in zip(_with_gradients(layer, x), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(_with_gradients(layer, plain[0, 0]), _with_gradients(layer, plain[:1, :1]), strict=True):
        torch.testing.assert_close(ours, theirs.view(ours.shape), rtol=1e-5, atol=1e-5)
    y, dx, dw = _with_gradients(layer, plain[:0])
    assert (y.shape, dx.shape) == ((0, 6, 24), (0, 6, 64))
    assert not dw.any()


def _with_gradients(layer: BitLinear, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x)
    return y.detach(), *torch.autograd.grad(y.square().sum(), (x, layer.weight))


@by_scaling
def test_both_ways_to_multiply_give_the_same_bits(scaling: Scaling, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_of(96, 256, scaling, (1, 1)), activations(3, 17, 256)
    ours = layer(x)
    monkeypatch.setattr(products, "_CPU_IS_FAST", not products._CPU_IS_FAST)
    assert torch.equal(layer(x), ours)


def test_one_token_alone_and_among_others_gets_the_same_bits(fast_integers: bool) -> None:
    """Sums of integers do not depend on their order: generation sees what evaluation saw."""
    layer, x = layer_of(96, 256, Scaling(), (1, 1)), activations(2, 9, 256)
    assert torch.equal(layer(x)[1, 4], layer(x[1:, 4:5])[0, 0])


@by_scaling
@pytest.mark.parametrize("lam", [(0.5, 0.5), (1.0, 1.0)], ids=str)
def test_bf16_autocast_gives_bf16_close_to_float32(
    scaling: Scaling, lam: tuple[float, float], fast_integers: bool
) -> None:
    layer, x = layer_of(96, 256, scaling, lam), activations(17, 256).requires_grad_()
    exact = layer(x)
    expected = torch.autograd.grad(exact.square().mean(), [x, layer.weight])
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    gradients = torch.autograd.grad(y.float().square().mean(), [x, layer.weight])
    assert y.dtype == torch.bfloat16
    close(y.float(), exact, 1e-2)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert ours.dtype == torch.float32
        close(ours, theirs, 2e-2)


def test_bf16_models_stay_bf16(fast_integers: bool) -> None:
    layer, x = layer_of(96, 256, Scaling(), (1, 1)), activations(17, 256).bfloat16()
    exact = layer(x.float())
    assert layer.bias is not None
    layer.bias.data = layer.bias.data.bfloat16()
    y = layer(x)
    assert y.dtype == torch.bfloat16
    close(y.float(), exact, 1e-2)


def test_only_codes_and_scales_of_activations_wait_for_the_backward_pass() -> None:
    layer, x = layer_of(96, 256, Scaling(), (1, 1)), activations(17, 256).requires_grad_()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    new = [tensor for tensor in kept if tensor.data_ptr() != layer.weight.data_ptr()]
    assert sorted(tensor.nbytes for tensor in new) == [4, 17 * 4, 17 * 256]


def test_a_scale_is_estimated_once_for_all_micro_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_of(96, 256, Scaling(), (0.5, 1)), activations(17, 256)
    estimated: list[Tensor] = []
    monkeypatch.setattr(bitlinear, "scale_of", lambda w, scaling: estimated.append(w) or scale_of(w, scaling))
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    for step in range(3):
        for lam in (0.5, 0.7, 1.0):
            layer.lam.set(lam)
            layer(x).square().mean().backward()
            assert len(estimated) == step + 1
        optimizer.step()
        before = layer.scale.clone()
        refresh(layer)
        assert len(estimated) == step + 2
        assert torch.equal(layer.scale, ternarize(layer.weight, layer.scaling).scale)
        assert not torch.equal(layer.scale, before)


def test_another_weight_is_rounded_anew() -> None:
    layer, x = layer_of(96, 256, Scaling(), (1, 1)), activations(5, 256)
    layer(x)
    for seed in range(2, 40, 2):  # soon one has the address of one before
        other = layer_of(96, 256, Scaling(), (1, 1), seed)
        layer.weight, layer.bias = other.weight, other.bias
        expected = other(x)
        del other
        assert torch.equal(layer(x), expected)
        twin = copy.deepcopy(layer)
        with torch.no_grad():
            twin.weight.mul_(2)
            twin.bias.mul_(2)
        torch.testing.assert_close(twin(x), 2 * expected)
        assert torch.equal(layer(x), expected)


def test_a_loaded_weight_is_rounded_anew() -> None:
    layer, other, x = layer_of(96, 256, Scaling(), (1, 1)), layer_of(96, 256, Scaling(), (1, 1), 2), activations(5, 256)
    layer(x)
    layer.load_state_dict(other.state_dict())
    torch.testing.assert_close(layer(x), other(x))


def test_activations_are_rounded_once_for_layers_that_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(64, 64) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) + self.k(x) + self.v(x)

    model, x = Attention(), activations(5, 64)
    insert_bitlinear(model, ["q", "k", "v"], Scaling(), lam=1.0)
    rounded: list[Tensor] = []
    monkeypatch.setattr(bitlinear, "quantize_int8", lambda x, block: rounded.append(x) or quantize_int8(x, block))
    y = model(x)
    assert len(rounded) == 1
    x.mul_(-1)  # the same tensor, with other values
    bias = sum(layer.bias for layer in bitlinears(model))
    torch.testing.assert_close(model(x) - bias, bias - y)
    assert len(rounded) == 2
    with torch.inference_mode():
        model(x.clone())
    assert len(rounded) == 3


def test_what_was_evaluated_in_inference_mode_can_be_trained() -> None:
    layer, x = layer_of(24, 64, Scaling(), (1, 1)), activations(5, 64)
    with torch.inference_mode():
        evaluated = layer(x)
    trained = layer(x)
    trained.sum().backward()
    assert torch.equal(trained, evaluated)
    with torch.no_grad():
        layer.weight.mul_(2)
    assert layer(x).shape == evaluated.shape


def test_rounded_activations_do_not_keep_theirs_alive() -> None:
    layer, x = layer_of(96, 256, Scaling(), (1, 1)), activations(5, 256)
    layer(x)
    assert layer.lam.rounded._of() is x
    del x
    assert layer.lam.rounded._of() is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_rounded_away(bad: float, fast_integers: bool) -> None:
    layer, x = layer_of(8, 64, Scaling(), (1, 1)), activations(2, 64)
    x[0, 5] = bad
    assert not layer(x)[0].isfinite().any()
    assert layer(x)[1].isfinite().all()
    x = activations(2, 64).requires_grad_()
    upstream = torch.ones(2, 8)
    upstream[0, 3] = bad
    dx, dw = torch.autograd.grad(layer(x), [x, layer.weight], upstream)
    assert not dx[0].isfinite().any()
    assert dx[1].isfinite().all()
    assert not dw[3].isfinite().any()


def test_zero_gradients_and_zero_activations(fast_integers: bool) -> None:
    layer, x = layer_of(8, 64, Scaling(), (1, 1)), torch.zeros(2, 64, requires_grad=True)
    y = layer(x)
    assert torch.equal(y, layer.bias.expand(2, 8))
    dx, dw = torch.autograd.grad(y, [x, layer.weight], torch.zeros(2, 8))
    assert not dx.any()
    assert not dw.any()


@by_scaling
def test_a_frozen_model_computes_the_same_without_its_weights(scaling: Scaling, fast_integers: bool) -> None:
    model, x = nn.Sequential(nn.Linear(256, 128), nn.SiLU(), nn.Linear(128, 64)), activations(5, 256)
    insert_bitlinear(model, ["0", "2"], scaling, lam=1.0)
    before = model(x)
    freeze_ternary(model)
    assert torch.equal(model(x), before)
    assert not [name for name, _ in model.named_parameters() if "weight" in name]


@by_scaling
@pytest.mark.parametrize("lam", [(0.3, 0.6), (0.3, 1.0), (1.0, 1.0)], ids=str)
def test_compiled_and_eager_agree(scaling: Scaling, lam: tuple[float, float], fast_integers: bool) -> None:
    model, x = nn.Sequential(nn.Linear(256, 128), nn.SiLU(), nn.Linear(128, 64)), activations(17, 256).requires_grad_()
    insert_bitlinear(model, ["0", "2"], scaling).set(*lam)
    refresh(model)
    torch._dynamo.reset()
    wrt = [x, *model.parameters()]
    expected = model(x)
    y = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    close(y, expected, 1e-6)
    gradients = zip(*(torch.autograd.grad(out.square().mean(), wrt) for out in (y, expected)), strict=True)
    for ours, theirs in gradients:
        close(ours, theirs, 1e-6)
