"""Scales that are learned: their published gradient, and that what is saved is what was trained."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bitconvert.errors import BitconvertError
from bitconvert.models.checkpoint import open_checkpoint
from bitconvert.recipe import Scaling, load_recipe
from bitconvert.report.reporter import Silent
from bitconvert.ternary.bitlinear import BitLinear, Lambda, freeze_ternary, insert_bitlinear, learn_scales
from bitconvert.ternary.quantize import codes_of, quantize_int8, scale_of
from bitconvert.training.data import split_held_out, tokenize
from bitconvert.training.run_directory import Interrupted
from bitconvert.training.warmup import warmup


def stretched_elastic(w: Tensor, alpha: Tensor) -> Tensor:
    """ParetoQ's ternary quantizer, of 1.5 levels, differentiated as it writes it: straight through the rounding."""
    clipped = (w / alpha).clamp(-0.99, 0.99) * 1.5
    return (clipped + (clipped.round() - clipped).detach()) / 1.5 * alpha


@pytest.mark.parametrize("granularity", ["tensor", "row", "group:32"])
@pytest.mark.parametrize("lam", [0.3, 1.0])
def test_the_gradients_are_those_of_paretoq(lam: float, granularity: str) -> None:
    torch.manual_seed(0)
    x, upstream = torch.randn(7, 64), torch.randn(7, 24).double()
    layer = BitLinear(nn.Linear(64, 24), Scaling(estimator="learned", granularity=granularity), Lambda())
    layer.learn_scale()
    layer.lam.set(lam, 1.0)
    assert layer.learned_scale is not None
    nn.init.normal_(layer.weight, std=0.1)
    with torch.no_grad():
        layer.learned_scale.fill_(0.11).mul_(torch.rand(layer.learned_scale.shape) + 0.5)
    s = layer.learned_scale.detach().double().requires_grad_()
    w = layer.weight.detach().double().requires_grad_()
    rounded = stretched_elastic(w.view(s.numel(), -1), 1.5 * s.view(-1, 1)).view(24, 64)
    exact = functional.linear(quantize_int8(x).dequantize().double(), torch.lerp(w, rounded, lam), layer.bias.double())
    y = layer(x)
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad(y, [layer.weight, layer.learned_scale], upstream.float())
    for_w, for_s = torch.autograd.grad(exact, [w, s], upstream)
    torch.testing.assert_close(ours[0].double(), for_w, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours[1].double(), for_s / math.sqrt(24 * 64), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("granularity", ["tensor", "row", "group:32"])
def test_it_starts_at_least_squares_and_freezes_as_it_is(granularity: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 32), nn.SiLU(), nn.Linear(32, 16)), torch.randn(5, 64)
    scaling = Scaling(estimator="learned", granularity=granularity)
    insert_bitlinear(model, ["0", "2"], scaling, lam=1.0)
    learn_scales(model)
    for layer in (model[0], model[2]):
        least_squares = scale_of(layer.weight, Scaling(estimator="mse", granularity=granularity))
        assert torch.equal(layer.learned_scale, least_squares.flatten())
        with torch.no_grad():
            layer.learned_scale.mul_(torch.rand(layer.learned_scale.shape) + 0.7)
    before, codes = model(x), codes_of(model[0].weight, model[0]._used_scale())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    ours, theirs = (torch.autograd.grad(f(x).square().sum(), [*model.parameters()]) for f in (compiled, model))
    torch.testing.assert_close(ours, theirs)
    freeze_ternary(model)
    assert torch.equal(model(x), before)
    assert torch.equal(model[0].codes, codes)
    assert not [name for name, _ in model.named_parameters() if "scale" in name]


def test_what_is_saved_is_what_was_learned_even_if_interrupted(smollm: Path, story: Path, tmp_path: Path) -> None:
    class StopAtThree(Silent):
        def metrics(self, values) -> None:
            if "loss" in values and values["step"] == 3:
                os.kill(os.getpid(), signal.SIGINT)

    options = ("training.tokens=768", "training.context=32", "training.batch_size=4", "data.held_out_tokens=64")
    options += ("training.precision=float32",)
    recipe = load_recipe(
        None,
        [*options, f"data.sources=[{story}]", "scaling={estimator: learned, granularity: row}", "optimizer.lr=0.01"],
    )
    whole = warmup(str(smollm), tmp_path / "whole", recipe, reporter=Silent())
    with pytest.raises(Interrupted):
        warmup(str(smollm), tmp_path / "parts", recipe, reporter=StopAtThree())
    warmup(str(smollm), tmp_path / "parts", recipe, resume=True, reporter=Silent())
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()

    checkpoint = open_checkpoint(str(tmp_path / "whole"))
    assert "rounded, by learned scales" in (tmp_path / "whole" / "README.md").read_text()
    _, held_out = split_held_out(tokenize([str(story)], checkpoint.tokenizer(), Silent()), 64, 32)
    windows = torch.stack([held_out[index]["input_ids"] for index in range(len(held_out))])
    with torch.no_grad():
        loss = checkpoint.load()(windows, labels=windows).loss
    assert math.exp(loss) == pytest.approx(whole.held_out_ppl, rel=1e-5)
    with pytest.raises(BitconvertError, match="no latent weights left to train"):
        warmup(str(tmp_path / "whole"), tmp_path / "again", recipe, reporter=Silent())
