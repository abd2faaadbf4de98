"""Ternarizing in blocks: the codes and scales of ``ternarize``, for every dtype, scaling and odd value."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitconvert.recipe import Scaling
from bitconvert.ternary import blocks, quantize
from bitconvert.ternary.blocks import all_finite, baked_blocks, ternary_blocks
from bitconvert.ternary.quantize import TernaryTensor, row_blocks, ternarize

settings.register_profile("busy machines", deadline=None)
settings.load_profile("busy machines")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SCALINGS = [Scaling(estimator=e, granularity=g) for e in ("absmean", "mse") for g in ("tensor", "row", "group:32")]
INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}

by_scaling = pytest.mark.parametrize("scaling", SCALINGS, ids=str)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_BLOCK", 256)
    monkeypatch.setattr(quantize, "_WEIGHTS_AT_ONCE", 256)


def joined(parts: list[TernaryTensor], scaling: Scaling) -> TernaryTensor:
    codes = torch.cat([part.codes for part in parts])
    shared = scaling.granularity == "tensor"
    return TernaryTensor(codes, parts[0].scale if shared else torch.cat([part.scale for part in parts]))


def require_same(weight: Tensor, scaling: Scaling) -> None:
    expected, found = ternarize(weight, scaling), joined(list(ternary_blocks(weight, scaling)), scaling)
    assert found.codes.dtype == torch.int8
    assert found.scale.dtype == torch.float32
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scale, expected.scale)


@by_scaling
@by_dtype
@pytest.mark.parametrize("shape", [(1, 64), (2, 96), (13, 64), (5, 512)])
def test_blocks_are_those_of_ternarize(shape: tuple[int, int], dtype: torch.dtype, scaling: Scaling) -> None:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(3)) * 0.02
    require_same(weight.to(dtype), scaling)


@by_scaling
@pytest.mark.parametrize("rows", [1, 2, 5, 12, 13])
def test_a_scale_does_not_depend_on_the_blocks(rows: int, scaling: Scaling, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(rows, 64) * torch.logspace(-2, 0, rows).view(-1, 1)
    weight[:3] *= 0  # a first block that knows nothing of the rest
    parts = ternarize(weight, scaling)
    heights = [rows.stop - rows.start for rows in row_blocks(weight)]
    monkeypatch.setattr(quantize, "_WEIGHTS_AT_ONCE", 2**18)
    whole = ternarize(weight, scaling)
    assert sum(heights) == rows
    assert len(heights) == max(1, rows // 4)
    assert min(heights) > 1 or rows == 1
    torch.testing.assert_close(parts.scale, whole.scale, rtol=1e-6, atol=0)
    assert torch.equal(parts.codes, whole.codes)


@by_scaling
@given(data=st.data())
def test_any_bits_become_the_same_codes(scaling: Scaling, data: st.DataObject) -> None:
    """Zeros of either sign, denormals, thresholds, ternary parts: whatever finite bits there are."""
    dtype = data.draw(st.sampled_from(list(INTEGERS)))
    width = torch.iinfo(INTEGERS[dtype]).bits
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    low = data.draw(st.sampled_from([0, 1, width - 8, width - 2]))  # few different values, or many
    values = torch.randint(-(2 ** (width - 1)), 2 ** (width - 1), (9, 64), generator=generator)
    weight = (values >> low << low).to(INTEGERS[dtype]).view(dtype)
    limit = 2.0 ** data.draw(st.sampled_from([-130, -20, 10]))  # sums stay finite
    weight = torch.where(torch.isfinite(weight) & (weight.abs() <= limit), weight, 0.0 * torch.ones_like(weight))
    weight[data.draw(st.integers(0, 8))] = 0
    require_same(weight, scaling)


@pytest.mark.parametrize("dtype", list(INTEGERS), ids=str)
def test_the_threshold_is_exact(dtype: torch.dtype) -> None:
    """The neighbours of scale / 2 on either side, and scale / 2 itself, which rounds to the even 0."""
    around = torch.tensor([0.5, 0.5, 0.5], dtype=dtype)
    around.view(INTEGERS[dtype]).add_(torch.tensor([-1, 0, 1], dtype=INTEGERS[dtype]))
    row = torch.cat([around, -around]).float()
    filler = (6 - row.abs().sum()) / 2  # makes the mean magnitude of eight values, not all alike, 0.75
    weight = torch.cat([row, torch.tensor([filler, -filler])]).view(1, 8)
    for scale in (weight.abs().mean(), weight.abs().mean() / 0.75):
        require_same(weight.to(dtype) * scale.to(dtype), Scaling())
        require_same(weight.to(dtype), Scaling(granularity="row"))


@by_scaling
@by_dtype
def test_baked_weights_keep_their_codes_and_scales(dtype: torch.dtype, scaling: Scaling) -> None:
    weight = torch.randn(13, 64, generator=torch.Generator().manual_seed(4))
    weight[:5] = 0  # the first blocks show no magnitude
    baked = ternarize(weight, scaling).dequantize().to(dtype)
    baked[6][baked[6] == 0] = -0.0
    expected = ternarize(baked, scaling)
    found = joined(list(baked_blocks(baked, scaling)), scaling)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scale, expected.scale)
    assert torch.equal(found.dequantize(), baked.float())


@by_scaling
@by_dtype
@pytest.mark.parametrize("shift", [1.01, 0.5, 1e-3])
def test_what_is_not_baked_is_refused(dtype: torch.dtype, scaling: Scaling, shift: float) -> None:
    baked = ternarize(torch.randn(13, 64), scaling).dequantize().to(dtype)
    where = tuple(torch.nonzero(baked)[-1])
    baked[where] *= shift
    with pytest.raises(ValueError, match="other values"):
        list(baked_blocks(baked, scaling))


def test_all_zeros_are_baked() -> None:
    for scaling in SCALINGS:
        zeros = torch.zeros(4, 64)
        assert torch.equal(joined(list(baked_blocks(zeros, scaling)), scaling).scale, ternarize(zeros, scaling).scale)


@by_dtype
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -float("nan")])
def test_one_value_that_is_not_finite_is_found(dtype: torch.dtype, value: float) -> None:
    tensor = torch.randn(30, 31).to(dtype)
    tensor[3, 4], tensor[5, 6] = torch.finfo(dtype).max, torch.finfo(dtype).min
    assert all_finite(tensor)
    assert all_finite(tensor.T)
    tensor[29, 30] = value
    assert not all_finite(tensor)
    assert not all_finite(tensor.T)


def test_nothing_and_scalars_are_finite() -> None:
    assert all_finite(torch.empty(0))
    assert all_finite(torch.tensor(1.0))
    assert not all_finite(torch.tensor(float("nan")))


def test_groups_must_divide_rows() -> None:
    for make in (ternary_blocks, baked_blocks):
        with pytest.raises(ValueError, match="do not divide"):
            list(make(torch.zeros(4, 96), Scaling(granularity="group:64")))
