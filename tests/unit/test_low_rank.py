"""Warmup of low-rank changes: Q(W + BA) with W frozen, its gradients, its merge, what it leaves alone."""

from __future__ import annotations

import copy
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitconvert.errors import UsageError
from bitconvert.models.checkpoint import open_checkpoint
from bitconvert.models.latent import save_latent
from bitconvert.models.lineage import Lineage
from bitconvert.recipe import Recipe, Scaling, load_recipe
from bitconvert.report.reporter import Silent
from bitconvert.ternary.bitlinear import BitLinear, Lambda, bitlinears, insert_bitlinear, merge_low_rank, train_low_rank
from bitconvert.training.rehearsal import Account, account
from bitconvert.training.run_directory import Interrupted
from bitconvert.training.warmup import warmup
from tests.unit.test_warmup import SMALL

RANK = 4


def small(story: Path, *overrides: str) -> Recipe:
    return load_recipe(None, [*SMALL, f"lora.rank={RANK}", f"data.sources=[{story}]", *overrides])


def low_rank(model: PreTrainedModel, names: list[str], scaling: Scaling) -> Lambda:
    """BitLinears at λ = 1 whose changes are not 0."""
    lam = insert_bitlinear(model, names, scaling, lam=1.0)
    train_low_rank(model, RANK)
    generator = torch.Generator().manual_seed(0)
    for module in bitlinears(model):
        assert module.lora_b is not None
        module.lora_b.data = 0.05 * torch.randn(module.lora_b.shape, generator=generator)
    return lam


@pytest.mark.parametrize("lam", [(1.0, 1.0), (0.5, 1.0), (0.5, 0.5), (0.0, 0.0)])
@pytest.mark.parametrize("granularity", ["tensor", "group:32"])
def test_gradients_are_those_of_the_whole_latent_weight(lam: tuple[float, float], granularity: str) -> None:
    torch.manual_seed(1)
    shared, scaling = Lambda(), Scaling(granularity=granularity)
    shared.set(*lam)
    thin = BitLinear(nn.Linear(64, 48), scaling, shared)
    thin.train_low_rank(RANK)
    assert thin.lora_a is not None
    assert thin.lora_b is not None
    thin.lora_b.data = torch.randn(48, RANK)
    whole = BitLinear(nn.Linear(64, 48), scaling, shared)
    whole.weight.data, whole.bias.data = thin.latent_weight().detach(), thin.bias.detach().clone()

    x = torch.randn(3, 7, 64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [layer(given) for layer, given in zip((thin, whole), inputs, strict=True)]
    gradient = torch.randn_like(outputs[0])
    for output in outputs:
        output.backward(gradient)
    assert torch.equal(*outputs)
    assert inputs[0].grad is not None
    assert inputs[1].grad is not None
    assert whole.weight.grad is not None
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close(thin.bias.grad, whole.bias.grad)
    torch.testing.assert_close(thin.lora_b.grad, whole.weight.grad @ thin.lora_a.detach().t(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(thin.lora_a.grad, thin.lora_b.detach().t() @ whole.weight.grad, rtol=1e-4, atol=1e-4)
    assert thin.weight.grad is None


def test_the_scale_follows_the_factors() -> None:
    layer = BitLinear(nn.Linear(64, 48), Scaling(), Lambda(1.0))
    layer.train_low_rank(RANK)
    x = torch.randn(2, 64)
    before = layer(x)
    assert layer.lora_b is not None
    with torch.no_grad():
        layer.lora_b += 3.0
    assert layer.scale is not None
    scale = layer.scale.clone()
    after = layer(x)
    assert not torch.equal(before, after)
    assert layer.scale != scale


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.arange(5, 45)[None]).logits
    return found


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_merged_saved_and_frozen_it_computes_the_same_bits(granularity: str, smollm: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(smollm))
    model, scaling = checkpoint.load_latent(), Scaling(granularity=granularity)
    model.train(False)
    names = checkpoint.ternary_modules(name for name, _ in model.named_modules())
    low_rank(model, names, scaling)
    trained = logits(model)
    merge_low_rank(model)
    assert torch.equal(logits(model), trained)
    assert all(module.weight.dtype == torch.float32 and module.lora_a is None for module in bitlinears(model))
    lineage = Lineage(source="test", lam=1.0, scaling=scaling, tokens_seen=1)
    (tmp_path / "saved").mkdir()
    save_latent(model, checkpoint.tokenizer(), lineage, "", tmp_path / "saved")
    assert torch.equal(logits(open_checkpoint(str(tmp_path / "saved")).load()), trained)


def test_warmup_changes_the_matrices_by_a_low_rank_and_leaves_the_embedding(
    smollm: Path, story: Path, tmp_path: Path
) -> None:
    report = warmup(str(smollm), tmp_path / "out", small(story, "training.tokens=3072"), reporter=Silent())
    assert report.held_out_ppl < 0.8 * report.rounded_ppl
    before, after = load_file(smollm / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert not torch.equal(before["model.norm.weight"], after["model.norm.weight"])
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        change = after[name].double() - before[name].bfloat16().double()
        values = torch.linalg.svdvals(change)
        assert values[RANK - 1] > 100 * values[RANK]  # the rest is float32's rounding
        assert after[name].dtype == torch.float32


def test_a_fit_of_each_layer_goes_through_the_low_rank_too(smollm: Path, story: Path, tmp_path: Path) -> None:
    still = ("lam.curve=instant", "training.tokens=256", "optimizer.lr=1e-12")
    recipe = small(story, "init.method=blockwise", "init.tokens=256", *still)
    report = warmup(str(smollm), tmp_path / "out", recipe, reporter=Silent())
    assert report.init_tokens == 256
    name = "model.layers.1.mlp.down_proj.weight"
    before, after = load_file(smollm / "model.safetensors")[name], load_file(tmp_path / "out/model.safetensors")[name]
    values = torch.linalg.svdvals(after.double() - before.bfloat16().double())
    assert values[0] > 1e-3
    assert values[RANK - 1] > 100 * values[RANK]


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(smollm: Path, story: Path, tmp_path: Path) -> None:
    class Signalled(Silent):
        def metrics(self, values) -> None:
            if values["step"] == 3 and "loss" in values:
                os.kill(os.getpid(), signal.SIGTERM)

    first, second, recipe = tmp_path / "first", tmp_path / "second", small(story)
    warmup(str(smollm), first, recipe, reporter=Silent())
    with pytest.raises(Interrupted):
        warmup(str(smollm), second, recipe, reporter=Signalled())
    saved = next((tmp_path / "second.partial" / "checkpoints").glob("checkpoint-*/model.safetensors"))
    stored = load_file(saved)
    assert "model.layers.0.mlp.up_proj.weight" not in stored
    assert stored["model.layers.0.mlp.up_proj.lora_b"].shape == (512, RANK)
    warmup(str(smollm), second, recipe, resume=True, reporter=Silent())
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_plan_foresees_what_it_saves(smollm: Path, story: Path) -> None:
    def accounted(*overrides: str) -> Account:
        recipe = load_recipe(None, [*SMALL, f"data.sources=[{story}]", "distill.kl=0", *overrides])
        return account(open_checkpoint(str(smollm)), recipe)

    full, thin = accounted(), accounted("lora.rank=4")
    trained = sum(weight.numel() for weight in linears(smollm))
    assert full.peak["weights"] - thin.peak["weights"] > 1.8 * trained  # bytes: two of four, less the factors
    assert sum(full.peak.values()) - sum(thin.peak.values()) > 5 * trained
    assert thin.checkpoint_bytes < 0.1 * full.checkpoint_bytes


def linears(directory: Path) -> list[Tensor]:
    weights = load_file(directory / "model.safetensors")
    return [weight for name, weight in weights.items() if name.endswith("proj.weight")]


@pytest.mark.parametrize(
    "override", ["control=true", "scaling.estimator=learned", "init.method=gptq", "training.shard=true"]
)
def test_what_does_not_go_with_a_low_rank(override: str, story: Path) -> None:
    with pytest.raises(UsageError, match=f"lora.rank does not go with {override}"):
        small(story, override)


def test_copies_do_not_share_their_factors() -> None:
    layer = BitLinear(nn.Linear(64, 48), Scaling(), Lambda(1.0))
    layer.train_low_rank(RANK)
    twin = copy.deepcopy(layer)
    assert twin.lora_b is not None
    twin.lora_b.data += 1
    assert not torch.equal(twin(torch.ones(1, 64)), layer(torch.ones(1, 64)))
