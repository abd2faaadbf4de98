"""What is done before the first step: it lowers the error that rounding makes, and is counted."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from bitconvert.errors import BitconvertError
from bitconvert.models.head import hidden_states
from bitconvert.models.lineage import read_lineage
from bitconvert.recipe import Recipe, Scaling, load_recipe
from bitconvert.report.reporter import Silent
from bitconvert.ternary.bitlinear import Lambda, bitlinears, insert_bitlinear, learn_scales
from bitconvert.ternary.quantize import TernaryTensor, codes_of, scale_of, ternarize
from bitconvert.ternary.schedule import lr_at
from bitconvert.training.data import ShuffledWindows, Windows
from bitconvert.training.gptq import compensated
from bitconvert.training.initialisation import initialise
from bitconvert.training.layers import FittedLayers, taken_apart
from bitconvert.training.warmup import warmup
from tests.models import random_model

SHORT = (
    "training.tokens=256",
    "training.context=32",
    "training.batch_size=4",
    "training.precision=float32",
    "data.held_out_tokens=64",
    "init.tokens=300",
)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).square().sum() / wanted.square().sum()).item()


def ternary_model(recipe: Recipe) -> tuple[PreTrainedModel, Lambda]:
    model = random_model("smollm2")
    names = [name for name, _ in model.named_modules() if name.endswith("_proj")]
    return model, insert_bitlinear(model, names, recipe.scaling)


def correlated_inputs(columns: int) -> Tensor:
    few = torch.randn(2048, columns) * torch.logspace(0, -1.5, columns)
    return few @ torch.randn(columns, columns) / 8 + 0.3 * torch.randn(2048, columns)


@pytest.mark.parametrize("variant", ["smollm2", "gemma3", "glm4", "phi3", "stablelm-parallel"])
def test_layer_by_layer_a_decoder_computes_what_it_does_as_a_whole(variant: str) -> None:
    model: PreTrainedModel = random_model(variant, pad_token_id=0)
    batches = [torch.randint(64, (2, 24)) for _ in range(2)]
    layers, states = taken_apart(model, batches, torch.float32)
    for layer in layers:
        states = layer.all(states)
    with torch.no_grad():
        for batch, state in zip(batches, states, strict=True):
            torch.testing.assert_close(model.get_decoder().norm(state), hidden_states(model, batch))


# ---- gptq ----


@pytest.mark.parametrize("granularity", ["tensor", "row", "group:32"])
@pytest.mark.parametrize("estimator", ["mse", "absmean"])
def test_compensated_latents_round_to_codes_of_a_lower_output_error(estimator: str, granularity: str) -> None:
    torch.manual_seed(0)
    inputs, weight = correlated_inputs(160), 0.05 * torch.randn(96, 160)
    scaling = Scaling(estimator=estimator, granularity=granularity)

    def output_error(latent: Tensor) -> float:
        return (inputs @ (ternarize(latent, scaling).dequantize() - weight).t()).square().sum().item()

    latent = compensated(weight, inputs.t() @ inputs, scaling)
    assert output_error(latent) < 0.65 * output_error(weight)
    assert latent.std() < 1.15 * weight.std()


def test_weights_are_compensated_as_in_optimal_brain_surgery() -> None:
    """Column by column, by the definition: the inverse of the Hessian of the columns that are left, taken anew."""
    torch.manual_seed(0)
    inputs, weight = correlated_inputs(16).double(), torch.randn(8, 16)
    scaling = Scaling(estimator="mse", granularity="row")
    hessian = inputs.t() @ inputs
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(16)
    scale, latent = scale_of(weight, scaling), weight
    for _ in range(3):
        latent = weight.double()
        for column in range(16):
            now = latent[:, column : column + 1]
            error = now - TernaryTensor(codes_of(now.float(), scale), scale).dequantize()
            inverse = damped[column:, column:].inverse()
            latent[:, column + 1 :] -= error / inverse[0, 0] * inverse[0, 1:]
        scale = scale_of(latent.float(), scaling)
    torch.testing.assert_close(compensated(weight, hessian.float(), scaling), latent.float(), atol=1e-3, rtol=1e-3)


def test_a_learned_scale_begins_at_that_of_the_compensated_latents() -> None:
    recipe = load_recipe(None, [*SHORT, "init.method=gptq", "scaling.estimator=learned"])
    model, lam = ternary_model(recipe)
    learn_scales(model)
    windows = Windows(np.random.default_rng(0).integers(64, size=256, dtype=np.uint16), 32)
    before = [linear.learned_scale for linear in bitlinears(model)]
    initialise(model, lam, recipe, ShuffledWindows(windows, 8, 0), torch.float32, Silent(), FittedLayers(None))
    for linear, old in zip(bitlinears(model), before, strict=True):
        assert torch.equal(linear.learned_scale, scale_of(linear.weight, recipe.scaling))
        assert not torch.equal(linear.learned_scale, old)


# ---- blockwise ----


def test_a_layer_learns_what_the_original_gives_from_what_ternary_layers_give_it() -> None:
    """One step of the second layer, by the definition; Adam's first step is the gradient's sign."""
    recipe = load_recipe(None, [*SHORT, "init.method=blockwise", "init.epochs=1", "init.lr=1e-4", "init.tokens=64"])
    model, lam = ternary_model(recipe)
    tokens = torch.randint(64, (64,), generator=torch.Generator().manual_seed(0))
    windows = ShuffledWindows(Windows(tokens.numpy().astype(np.uint16), 32), 2, 0)
    batch = torch.stack([windows[index]["input_ids"] for index in range(2)])

    def states() -> list[Tensor]:
        layers, (state,) = taken_apart(model, [batch], torch.float32)
        return [state := layer(state) for layer in layers]

    with torch.no_grad():
        wanted = states()[1]
    untouched = copy.deepcopy(model.model.layers[1].state_dict())
    initialise(model, lam, recipe, windows, torch.float32, Silent(), FittedLayers(None))
    fitted = copy.deepcopy(model.model.layers[1].state_dict())
    model.model.layers[1].load_state_dict(untouched)
    with lam.at(1.0):
        given = states()[1]
    errors = (given - wanted).square().sum(-1) / wanted.square().sum(-1)
    errors[:, :-1].mean().backward()
    rate = 1e-4 * lr_at(0.5, "cosine", 0.05, 0.05)
    for name, parameter in model.model.layers[1].named_parameters():
        assert parameter.grad is not None
        step = rate * parameter.grad / (parameter.grad.abs() + 1e-8)
        torch.testing.assert_close(fitted[name], untouched[name] - step, atol=1e-7, rtol=1e-6)


def test_the_same_seed_makes_the_same_latents() -> None:
    def latents(seed: int) -> Tensor:
        recipe = load_recipe(None, [*SHORT, "init.method=blockwise", f"training.seed={seed}"])
        model, lam = ternary_model(recipe)
        windows = Windows(np.random.default_rng(0).integers(64, size=256, dtype=np.uint16), 32)
        initialise(model, lam, recipe, ShuffledWindows(windows, 8, 0), torch.float32, Silent(), FittedLayers(None))
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    first = latents(0)
    assert torch.equal(first, latents(0))
    assert not torch.equal(first, latents(1))


def test_a_rate_that_is_too_high_is_told(smollm: Path, story: Path, tmp_path: Path) -> None:
    recipe = recipe_of(story, "init.method=blockwise", "init.lr=1e30")
    with pytest.raises(BitconvertError, match="not finite") as caught:
        warmup(str(smollm), tmp_path / "out", recipe, reporter=Silent())
    assert caught.value.hint == "lower init.lr"
    assert not list(tmp_path.iterdir())


# ---- within a warmup ----


def recipe_of(story: Path, *overrides: str) -> Recipe:
    return load_recipe(None, [*SHORT, f"data.sources=[{story}]", *overrides])


METHODS = ["gptq", "blockwise"]


@pytest.mark.parametrize("method", METHODS)
def test_the_ternary_student_comes_nearer_to_the_original(method: str) -> None:
    recipe = load_recipe(None, [*SHORT, f"init.method={method}", "scaling.estimator=mse"])
    model, lam = ternary_model(recipe)
    windows = Windows(np.random.default_rng(0).integers(64, size=256, dtype=np.uint16), 32)
    tokens = torch.stack([windows[index]["input_ids"] for index in range(8)])

    def error() -> float:
        with lam.at(1.0), torch.no_grad():
            return relative_error(hidden_states(model, tokens), original)

    with torch.no_grad():
        original = hidden_states(model, tokens)
    rounded = error()
    assert (
        initialise(model, lam, recipe, ShuffledWindows(windows, 8, 0), torch.float32, Silent(), FittedLayers(None))
        == 256
    )
    assert error() < 0.8 * rounded


@pytest.mark.parametrize("method", METHODS)
def test_a_warmup_says_what_it_began_with(method: str, smollm: Path, story: Path, tmp_path: Path) -> None:
    report = warmup(str(smollm), tmp_path / "out", recipe_of(story, f"init.method={method}"), reporter=Silent())
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    begun, initialised = lines[:2]
    assert begun["step"] == initialised["step"] == 0
    assert initialised["held_out_ppl"] != begun["held_out_ppl"] == report.rounded_ppl
    assert report.init_tokens == initialised["init_tokens"] == 256  # whole micro-batches of two windows of 32
    lineage = read_lineage(tmp_path / "out")
    assert lineage is not None
    assert lineage.init_tokens == 256
    assert "256 before the first step" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("method", METHODS)
def test_a_control_is_not_initialised(method: str, smollm: Path, story: Path, tmp_path: Path) -> None:
    recipe = recipe_of(story, f"init.method={method}", "control=true")
    report = warmup(str(smollm), tmp_path / "out", recipe, reporter=Silent())
    assert report.init_tokens == 0
