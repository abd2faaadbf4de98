"""The optimizers: what each keeps, that the schedules reach them, that a resumed run is the same run."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bitconvert.errors import UsageError
from bitconvert.recipe import Recipe, Scaling, load_recipe
from bitconvert.report.reporter import Silent
from bitconvert.ternary.bitlinear import insert_bitlinear
from bitconvert.training.optimizers import make_optimizer
from bitconvert.training.run_directory import Interrupted
from bitconvert.training.trainer import training_arguments
from bitconvert.training.warmup import warmup

NAMES = [
    "adamw",
    "adafactor",
    "muon",
    pytest.param(
        "adamw8bit",
        marks=pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="bitsandbytes is not installed"),
    ),
]

SHORT = ("training.tokens=640", "training.context=32", "training.batch_size=4", "data.held_out_tokens=64")


def options(name: str, *overrides: str) -> Recipe:
    return load_recipe(None, [f"optimizer.name={name}", *overrides])


def metrics(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def tiny() -> LlamaForCausalLM:
    """A model whose ``gate_proj`` is (64, 256)."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=16, tie_word_embeddings=False, **sizes))


def stepped(name: str, lr: float, decay: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.optim.Optimizer]:
    """A matrix of ones and a vector of ones after a step of rate 1e-3 and one of ``lr`` and ``decay``."""
    model = tiny()
    layer = model.model.layers[0]
    matrix, vector = layer.mlp.gate_proj.weight, layer.input_layernorm.weight
    matrix.data.fill_(1)
    optimizer = make_optimizer(model, options(name).optimizer)
    for rate, shrink in ((1e-3, 0.0), (lr, decay)):
        for group in optimizer.param_groups:
            group["lr"] = rate
            group["weight_decay"] = shrink if group["decays"] else 0.0
        for parameter in (matrix, vector):
            parameter.grad = torch.randn(parameter.shape)
        optimizer.step()
    return matrix.detach(), vector.detach(), optimizer


@pytest.mark.parametrize("name", NAMES)
def test_the_rate_and_the_decay_of_each_step_are_those_of_its_groups(name: str) -> None:
    still, once, twice = (stepped(name, lr)[0] for lr in (0.0, 1e-3, 2e-3))
    torch.testing.assert_close(twice - still, 2 * (once - still), atol=1e-6, rtol=1e-3)
    assert 1e-4 < (once - still).square().mean().sqrt() < 2e-3  # the rate means the same to all of them
    matrix, vector, _ = stepped(name, 1e-3, decay=10.0)
    torch.testing.assert_close(matrix - once, -0.01 * still, atol=1e-4, rtol=0.01)
    assert torch.equal(vector, stepped(name, 1e-3)[1])


@pytest.mark.parametrize("name", NAMES)
def test_a_rounded_weight_is_renewed_after_a_step(name: str) -> None:
    model, gate = tiny(), "model.layers.0.mlp.gate_proj"
    insert_bitlinear(model, [gate], Scaling(), lam=1.0)
    x = torch.randn(8, 256)
    optimizer = make_optimizer(model, options(name, "optimizer.lr=0.1").optimizer)
    before = model.get_submodule(gate)(x)
    before.square().sum().backward()
    optimizer.step()
    after = model.get_submodule(gate)(x)
    assert (after - before).abs().mean() > 0.1 * before.abs().mean()
    insert_bitlinear(model, [gate], Scaling(), lam=1.0)
    assert torch.equal(after, model.get_submodule(gate)(x))


@pytest.mark.parametrize(("name", "least", "most"), [("adamw", 8, 8.1), ("adafactor", 0, 0.2), ("muon", 4, 4)])
def test_what_is_kept_beside_a_weight(name: str, least: float, most: float) -> None:
    matrix, _, optimizer = stepped(name, 1e-3)
    state = next(iter(optimizer.state.values()))
    nbytes = sum(value.nbytes for value in state.values() if isinstance(value, torch.Tensor))
    assert least <= nbytes / matrix.numel() <= most


def test_adamw8bit_keeps_two_bytes_beside_a_weight() -> None:
    pytest.importorskip("bitsandbytes")
    matrix, _, optimizer = stepped("adamw8bit", 1e-3)
    state = next(iter(optimizer.state.values()))
    own = sum(value.nbytes for key, value in state.items() if isinstance(value, torch.Tensor) and "qmap" not in key)
    assert 2 <= own / matrix.numel() < 2.1


def test_adamw8bit_without_its_package_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="adamw8bit needs bitsandbytes, which is not installed") as caught:
        training_arguments(options("adamw8bit"), tmp_path)
    assert "bitconvert[optim8bit]" in caught.value.hint


def test_muon_orthogonalizes_hidden_matrices_alone_and_survives_saving() -> None:
    def steps(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer) -> None:
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape)
        optimizer.step()

    model = tiny()
    chosen = options("muon", "optimizer.lr=1e-2").optimizer
    optimizer = make_optimizer(model, chosen)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    steps(model, optimizer)
    for name, parameter in model.named_parameters():
        update = (before[name] - parameter).detach() / 1e-2
        if "proj" in name:  # all singular values alike, at the size of AdamW's updates
            singular = torch.linalg.svdvals(update) / (0.2 * max(update.shape) ** 0.5)
            assert singular.quantile(0.05) > 0.5
            assert singular.max() < 1.3
        else:  # AdamW's first step is the gradient's sign
            torch.testing.assert_close(update.abs(), torch.ones_like(update), atol=1e-3, rtol=0)

    copied = copy.deepcopy(model)
    resumed = make_optimizer(copied, chosen)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    torch.manual_seed(1)
    steps(model, optimizer)
    torch.manual_seed(1)
    steps(copied, resumed)
    assert all(map(torch.equal, model.parameters(), copied.parameters()))


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_resumed_run_gives_the_same_weights_bit_for_bit(name: str, smollm: Path, story: Path, tmp_path: Path) -> None:
    class Stopping(Silent):
        def metrics(self, values: Mapping[str, float]) -> None:
            if values["step"] == 3 and "loss" in values:
                os.kill(os.getpid(), signal.SIGINT)

    recipe = options(name, *SHORT, "optimizer.weight_decay=0.1", f"data.sources=[{story}]")
    report = warmup(str(smollm), tmp_path / "whole", recipe, reporter=Silent())
    assert report.held_out_ppl < report.rounded_ppl
    with pytest.raises(Interrupted):
        warmup(str(smollm), tmp_path / "parts", recipe, reporter=Stopping())
    warmup(str(smollm), tmp_path / "parts", recipe, resume=True, reporter=Silent())
    whole, parts = (tmp_path / name / "model.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()
