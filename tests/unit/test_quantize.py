"""The arithmetic against brute force, against transformers' own bitnet, and against its own promises."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations.bitnet import ActQuant, WeightQuant

from bitconvert.recipe import Scaling
from bitconvert.ternary.quantize import (
    SMALLEST_SCALE,
    is_baked,
    quantize_int8,
    scale_shape,
    ternarize,
)

SCALINGS = [Scaling(estimator=e, granularity=g) for e in ("absmean", "mse") for g in ("tensor", "row", "group:32")]

by_scaling = pytest.mark.parametrize("scaling", SCALINGS, ids=str)
shapes = st.tuples(st.integers(1, 9), st.sampled_from([32, 64, 96]))


def random_weight(rows: int, columns: int, seed: int = 0, size: float = 0.02) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * size


@by_scaling
@settings(max_examples=25, deadline=None)
@given(shape=shapes, seed=st.integers(0, 2**20), size=st.sampled_from([1e-3, 0.02, 3.0, 1e4]))
def test_ternarize_is_idempotent(scaling: Scaling, shape: tuple[int, int], seed: int, size: float) -> None:
    once = ternarize(random_weight(*shape, seed, size), scaling)
    twice = ternarize(once.dequantize(), scaling)
    assert torch.equal(once.codes, twice.codes)
    used = (once.codes.view(shape[0], once.scale.shape[-1], -1) != 0).any(-1, keepdim=True)
    if scaling.granularity != "tensor":
        assert torch.equal(once.scale[used.squeeze(-1)], twice.scale[used.squeeze(-1)])
    else:
        assert torch.equal(once.scale, twice.scale)


@by_scaling
def test_codes_are_the_nearest_ternary_values(scaling: Scaling) -> None:
    weight = random_weight(48, 96)
    codes, scale = ternarize(weight, scaling)
    assert scale.shape == scale_shape(48, 96, scaling)
    groups = weight.view(48, scale.shape[-1], -1)
    candidates = torch.stack([(groups - c * scale.view(-1, scale.shape[-1], 1)).abs() for c in (-1, 0, 1)])
    assert torch.equal(codes.view(groups.shape), (candidates.argmin(0) - 1).to(torch.int8))


def test_absmean_is_transformers_own() -> None:
    weight = random_weight(64, 128)
    with torch.compiler.set_stance("force_eager"):
        theirs = WeightQuant.apply(weight)
    ours = ternarize(weight, Scaling(estimator="absmean"))
    assert torch.equal(ours.codes, theirs.sign().to(torch.int8))
    torch.testing.assert_close(ours.dequantize(), theirs, rtol=1e-6, atol=0)


def test_int8_is_transformers_own() -> None:
    x = random_weight(5, 64, size=3.0)
    with torch.compiler.set_stance("force_eager"):  # its functions ask for a C++ compiler
        theirs = ActQuant.apply(x)
    ours = quantize_int8(x)
    assert torch.equal(ours.codes, (theirs / ours.scale).round().to(torch.int8))
    torch.testing.assert_close(ours.dequantize(), theirs, rtol=1e-6, atol=0)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**20), heavy=st.booleans())
def test_mse_scale_is_the_least_squares_optimum(seed: int, heavy: bool) -> None:
    weight = random_weight(1, 512, seed)
    if heavy:
        weight = weight * weight.abs().div(0.02).sqrt()  # heavier tails than a Gaussian's
    magnitude = weight.abs().flatten().sort(descending=True).values.double()
    count = torch.arange(1, 513, dtype=torch.float64)
    least = (magnitude**2).sum() - (magnitude.cumsum(0) ** 2 / count).max()  # best over every number of nonzero codes
    error = ((weight - ternarize(weight, Scaling(estimator="mse")).dequantize()).double() ** 2).sum()
    assert least * (1 - 1e-6) <= error <= least * 1.02


def test_mse_beats_absmean_on_trained_looking_weights() -> None:
    weight = random_weight(64, 256)
    errors = {s: ((weight - ternarize(weight, s).dequantize()) ** 2).sum() / (weight**2).sum() for s in SCALINGS}
    by_name = {str(scaling): error.item() for scaling, error in errors.items()}
    assert by_name["mse per tensor"] == pytest.approx(0.190, abs=0.006)  # a Gaussian's optimum
    assert by_name["absmean per tensor"] == pytest.approx(0.267, abs=0.006)
    assert by_name["mse per group:32"] < by_name["mse per row"] < by_name["mse per tensor"]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**20), size=st.sampled_from([1e-3, 1.0, 1e4]))
def test_int8_error_is_at_most_half_a_step(seed: int, size: float) -> None:
    x = random_weight(7, 33, seed, size)
    step = x.abs().amax(-1, keepdim=True) / 127
    assert ((quantize_int8(x).dequantize() - x).abs() <= step * 0.5001).all()


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**20), size=st.sampled_from([1e-3, 1.0, 1e4]))
def test_int8_in_blocks_of_32_rounds_as_ggml_rounds_to_q8_0(seed: int, size: float) -> None:
    x = random_weight(7, 96, seed, size)
    theirs = gguf.quantize(x.numpy(), gguf.GGMLQuantizationType.Q8_0).reshape(7, 3, 34)[:, :, 2:].view(np.int8)
    ours = quantize_int8(x, block=32).codes.view(7, 3, 32)
    assert np.abs(ours.numpy() - theirs).max() <= 1
    assert np.mean(ours.numpy() != theirs) < 0.01  # a value half-way between two codes may go either way


def test_tiny_weights_are_not_taken_for_ternary() -> None:
    weight = torch.rand(4, 64, generator=torch.Generator().manual_seed(0)) * 1e-24 + 1e-25
    for scaling in SCALINGS:
        codes, scale = ternarize(weight, scaling)
        assert not codes.any()
        assert (scale == torch.tensor(SMALLEST_SCALE)).all()


def test_a_zero_weight_stays_zero() -> None:
    for scaling in SCALINGS:
        codes, scale = ternarize(torch.zeros(4, 64), scaling)
        assert not codes.any()
        assert (scale == torch.tensor(SMALLEST_SCALE)).all()


def test_low_precision_weights_are_rounded_in_float32() -> None:
    weight = random_weight(64, 256).bfloat16()
    assert torch.equal(ternarize(weight, Scaling()).codes, ternarize(weight.float(), Scaling()).codes)


def test_a_group_that_does_not_divide_the_row_is_an_error() -> None:
    with pytest.raises(ValueError, match="96 do not divide into groups of 64"):
        ternarize(random_weight(4, 96), Scaling(granularity="group:64"))


def test_baked_weights_are_recognized() -> None:
    weight = random_weight(8, 64)
    assert not is_baked(weight)
    for scaling in (Scaling(), Scaling(granularity="row")):
        assert is_baked(ternarize(weight, scaling).dequantize())
    assert is_baked(ternarize(weight, Scaling()).dequantize().bfloat16())
