"""Distillation of attention relations: the published formula, from which layer, what the loss makes of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from bitconvert.errors import UsageError
from bitconvert.models.head import hidden_states
from bitconvert.recipe import Distillation, load_recipe
from bitconvert.report import Silent
from bitconvert.training.inside import Inside
from bitconvert.training.relations import relation_divergence
from bitconvert.training.warmup import warmup
from tests.models import random_model
from tests.recipes import FROM_THE_ORIGINAL

RELATIONS = Distillation(relations=1.0)


def test_it_is_algorithm_1_of_the_paper() -> None:
    torch.manual_seed(0)
    context, widths, heads = 7, (96, 32, 32), 32
    student, teacher = ([torch.randn(2, context, width, dtype=torch.float64) for width in widths] for _ in range(2))
    student[0].requires_grad_()
    expected = 0.0
    for s, t in zip(student, teacher, strict=True):
        likeness = [
            torch.softmax(torch.einsum("bihd,bjhd->bhij", vectors, vectors), -1)[:, :, :-1]
            for vectors in (functional.normalize(x.view(2, context, heads, -1), dim=-1) for x in (s, t))
        ]
        expected = expected + (likeness[1] * (likeness[1] / likeness[0]).log()).sum() / heads
    ours = relation_divergence(student, teacher)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student[0])[0] for loss in (ours, expected)))


def test_it_looks_at_the_projections_of_one_late_layer() -> None:
    model = random_model("smollm2", hidden_size=64, intermediate_size=64, num_hidden_layers=8)
    inside = Inside(model, RELATIONS)
    tokens = torch.randint(60, (2, 5))
    with inside.kept() as outputs:
        hidden_states(model, tokens)
    attention, states = model.model.layers[6], model.model(tokens, output_hidden_states=True).hidden_states[6]
    for name, kept in zip("qkv", outputs["relations"], strict=True):
        projection = attention.self_attn.get_submodule(f"{name}_proj")
        torch.testing.assert_close(kept, projection(attention.input_layernorm(states)))


def test_the_loss_is_the_sum_however_it_is_computed(smollm: Path, story: Path, tmp_path: Path) -> None:
    small = ("tokens=128", "context=32", "batch_size=4", "micro_batch_size=2", "precision=float32")
    options = [*(f"training.{key}" for key in small), "data.held_out_tokens=64", "distill.relations=100"]
    lines = []
    otherwise = ["training.micro_batch_size=4", "training.activation_checkpointing=true"]
    for name, extra in (("one", []), ("other", otherwise)):
        recipe = load_recipe(None, [*FROM_THE_ORIGINAL, *options, f"data.sources=[{story}]", *extra])
        warmup(str(smollm), tmp_path / name, recipe, reporter=Silent())
        lines += [line for line in map(json.loads, (tmp_path / name / "metrics.jsonl").open()) if "loss" in line]
    ours, other = lines
    assert ours["relations"] > 0
    parts = 0.65 * ours["kl"] + 0.35 * ours["ce"] + 100 * ours["relations"]
    assert ours["loss"] == pytest.approx(parts, rel=1e-4)
    for key in ("loss", "relations", "grad_norm"):
        assert other[key] == pytest.approx(ours[key], rel=1e-4)


def test_what_it_does_not_go_with_is_named() -> None:
    with pytest.raises(UsageError, match=r"distill: cache keeps .* not what hidden, relations and focus need"):
        load_recipe(None, ["distill.relations=1", "distill.cache=true"])
    with pytest.raises(UsageError, match=r"distill\.relations looks into one layer, training\.compile"):
        load_recipe(None, ["distill.relations=1", "training.compile=true"])
    fused = random_model("phi3", hidden_size=64, intermediate_size=64, pad_token_id=None)
    with pytest.raises(UsageError, match=r"distill\.relations: phi3 has no queries"):
        Inside(fused, RELATIONS)
