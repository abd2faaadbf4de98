"""Weights become ternary one after another, the most sensitive last."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from bitconvert.errors import UsageError
from bitconvert.models.checkpoint import open_checkpoint
from bitconvert.recipe import Scaling, load_recipe
from bitconvert.report import Silent
from bitconvert.ternary.bitlinear import bitlinears, insert_bitlinear, rank_by_sensitivity
from bitconvert.ternary.quantize import ternarize
from bitconvert.training import warmup as module
from bitconvert.training.warmup import warmup
from tests.recipes import FROM_THE_ORIGINAL


def test_what_costs_most_is_rounded_last() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(3))), torch.randn(64, 32)
    lam = insert_bitlinear(model, ["0", "1", "2"], Scaling())
    for layer, gradient in zip(bitlinears(model), (1.0, 100.0, 0.1), strict=True):
        layer.weight.grad = torch.full_like(layer.weight, gradient)
    rank_by_sensitivity(model)
    assert [layer.rank for layer in bitlinears(model)] == [0.5, 1.0, 0.0]
    for value, expected in ((0.25, [0.0, 0.0, 0.5]), (0.5, [0.5, 0.0, 1.0]), (0.75, [1.0, 0.5, 1.0]), (1.0, [1.0] * 3)):
        lam.set(value, 0.0)
        for layer, own in zip(bitlinears(model), expected, strict=True):
            weight = torch.lerp(layer.weight, ternarize(layer.weight, Scaling()).dequantize(), own)
            torch.testing.assert_close(layer(x), functional.linear(x, weight), rtol=1e-5, atol=1e-5)


def test_a_run_ranks_by_its_first_windows(
    smollm: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    students = []
    monkeypatch.setattr(module, "settle_scales", students.append)
    small = ("training.tokens=256", "training.context=32", "training.batch_size=4", "data.held_out_tokens=64")
    recipe = load_recipe(None, [*FROM_THE_ORIGINAL, *small, f"data.sources=[{story}]", "lam.order=sensitive_last"])
    warmup(str(smollm), tmp_path / "out", recipe, reporter=Silent())
    ranks = [layer.rank for layer in bitlinears(students[0])]
    assert sorted(ranks) == pytest.approx([place / (len(ranks) - 1) for place in range(len(ranks))])
    assert open_checkpoint(str(tmp_path / "out")).kind == "latent"


@pytest.mark.parametrize("other", ["lam.curve=instant", "lam.reach_one_at=0"])
def test_an_order_that_is_never_seen_is_refused(other: str) -> None:
    with pytest.raises(UsageError, match="order sensitive_last needs"):
        load_recipe(None, ["lam.order=sensitive_last", other])
