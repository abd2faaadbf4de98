"""How many codes change: against a count by hand, of codes that the one arithmetic gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bitconvert.recipe import Scaling
from bitconvert.ternary.bitlinear import insert_bitlinear, learn_scales
from bitconvert.ternary.quantize import ternarize
from bitconvert.training.flips import FlipMeter, sampled_codes


def model(*shapes: tuple[int, int], scaling: Scaling | None = None) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(columns, rows) for rows, columns in shapes))
    insert_bitlinear(layers, [name for name, _ in layers.named_children()], scaling or Scaling())
    return layers


@pytest.mark.parametrize("granularity", ["tensor", "row", "group:32"])
def test_flips_are_those_of_the_weights_rounded(granularity: str) -> None:
    scaling = Scaling(granularity=granularity)
    layers = model((40, 64), (64, 32), scaling=scaling)
    meter = FlipMeter(layers)
    meter.begin()
    before = [ternarize(layer.weight, scaling).codes for layer in layers]
    with torch.no_grad():
        for layer in layers:
            layer.weight += 0.1 * torch.randn_like(layer.weight)
    after = [ternarize(layer.weight, scaling).codes for layer in layers]
    total = sum(codes.numel() for codes in after)
    pairs = [
        pair for old, new in zip(before, after, strict=True) for pair in zip(old.flatten(), new.flatten(), strict=True)
    ]
    flips = sum(bool(old != new) for old, new in pairs)
    sign_flips = sum(bool(old * new == -1) for old, new in pairs)
    assert flips > sign_flips > 0
    looked = meter.look(steps=4)
    assert looked == pytest.approx(
        {
            "flips": flips / total / 4,
            "sign_flips": sign_flips / total / 4,
            "sparsity": sum(bool(new == 0) for _, new in pairs) / total,
        }
    )
    assert meter.look(steps=1) == pytest.approx({"flips": 0, "sign_flips": 0, "sparsity": looked["sparsity"]})


def test_a_large_matrix_is_sampled_in_rows_that_are_evenly_spread() -> None:
    layers = model((512, 1024))
    codes = sampled_codes(layers)["0"]
    assert torch.equal(codes, ternarize(layers[0].weight, Scaling()).codes[::8])
    assert codes.numel() == 65536


def test_a_row_that_is_longer_than_the_sample_is_looked_at_whole() -> None:
    assert sampled_codes(model((3, 70_000)))["0"].shape == (1, 70_000)


def test_a_scale_that_is_learned_decides_the_codes() -> None:
    layers = model((8, 64))
    learn_scales(layers)
    assert 0 < sampled_codes(layers)["0"].count_nonzero() < 512
    with torch.no_grad():
        layers[0].learned_scale.mul_(100)
    assert not sampled_codes(layers)["0"].any()


def test_a_model_without_ternary_matrices_has_no_flips() -> None:
    meter = FlipMeter(nn.Linear(4, 4))
    meter.begin()
    assert meter.look(1) == {}
