"""Distillation of hidden states: the term itself, where the states come from, what the loss makes of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bitconvert.errors import UsageError
from bitconvert.models.head import hidden_states
from bitconvert.recipe import Distillation, load_recipe
from bitconvert.report import Silent
from bitconvert.training.hidden import hidden_error
from bitconvert.training.inside import Inside
from bitconvert.training.warmup import warmup
from tests.models import random_model
from tests.recipes import FROM_THE_ORIGINAL

SMALL = (
    *FROM_THE_ORIGINAL,
    "training.tokens=256",
    "training.precision=float32",
    "training.context=32",
    "training.batch_size=4",
    "training.micro_batch_size=2",
    "data.held_out_tokens=64",
    "distill.hidden=0.5",
)


def test_each_position_counts_its_error_relative_to_itself() -> None:
    models = [random_model("smollm2", hidden_size=64, intermediate_size=64) for _ in range(2)]
    for parameter in models[0].parameters():
        parameter.data *= 1 + torch.randn_like(parameter) / 2
    tokens = torch.randint(60, (2, 5))
    kept = []
    for model in models:
        model.model.embed_tokens.weight.data[tokens[0, 0]] *= 1000  # massive, as beginnings of texts are
        inside = Inside(model, Distillation(hidden=1.0))
        with inside.kept() as outputs:
            hidden_states(model, tokens)
        hidden_states(model, tokens)
        kept.append(outputs["hidden"])
    student, teacher = (model.model(tokens, output_hidden_states=True).hidden_states for model in models)
    for ours, theirs in zip(kept, (student, teacher), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours[:-1], theirs[1:-1], strict=True))
    assert torch.equal(models[0].model.norm(kept[0][-1]), student[-1])
    expected = sum(
        ((s[b, i] - t[b, i]).norm() ** 2 / t[b, i].norm() ** 2).item()
        for s, t in zip(*kept, strict=True)
        for b in range(2)
        for i in range(4)
    ) / len(kept[0])
    assert hidden_error(*kept).item() == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def accumulated(smollm: Path, story: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("hidden") / "out"
    warmup(str(smollm), output, load_recipe(None, [*SMALL, f"data.sources=[{story}]"]), reporter=Silent())
    return output


@pytest.mark.parametrize(
    "also",
    [
        "training.micro_batch_size=4",
        "training.activation_checkpointing=true",
        pytest.param("training.compile=true", marks=pytest.mark.slow),
    ],
)
def test_the_loss_is_the_sum_however_it_is_computed(
    accumulated: Path, smollm: Path, story: Path, tmp_path: Path, also: str
) -> None:
    recipe = load_recipe(None, [*SMALL, f"data.sources=[{story}]", also])
    warmup(str(smollm), tmp_path / "out", recipe, reporter=Silent())
    first, second = (
        [line for line in map(json.loads, (output / "metrics.jsonl").open()) if "loss" in line]
        for output in (accumulated, tmp_path / "out")
    )
    for line in first:
        parts = 0.65 * line["kl"] + 0.35 * line["ce"] + 0.5 * line["hidden"]
        assert line["hidden"] > 0
        assert line["loss"] == pytest.approx(parts, rel=1e-4)
    for key in ("loss", "hidden", "grad_norm"):
        assert second[0][key] == pytest.approx(first[0][key], rel=1e-4)
    if "compile" not in also:
        for name, weight in load_file(accumulated / "model.safetensors").items():
            torch.testing.assert_close(
                load_file(tmp_path / "out/model.safetensors")[name], weight, rtol=1e-3, atol=1e-4
            )


def test_the_cache_has_no_hidden_states() -> None:
    with pytest.raises(UsageError, match=r"distill: cache keeps .* not what hidden, relations and focus need"):
        load_recipe(None, ["distill.hidden=1", "distill.cache=true"])
