"""What warmup keeps from being ternary: by name, or what costs most when it is rounded; and that it stays so."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from bitconvert.cli import arguments
from bitconvert.errors import BitconvertError, UsageError
from bitconvert.models.checkpoint import open_checkpoint
from bitconvert.models.lineage import Lineage, read_lineage
from bitconvert.packing.pack import pack
from bitconvert.recipe import Packing, Recipe, Scaling, load_recipe
from bitconvert.report.reporter import Silent
from bitconvert.ternary.bitlinear import Lambda, bitlinears
from bitconvert.ternary.quantize import quantize_int8, ternarize
from bitconvert.training.data import tokenize
from bitconvert.training.keep import foreseen_kept, rounding_costs, within_budget
from bitconvert.training.plan import plan_warmup
from bitconvert.training.run_directory import Interrupted, partial_directory
from bitconvert.training.student import make_student
from bitconvert.training.warmup import warmup
from tests.recording import Recorder
from tests.unit.test_warmup import SMALL

DOWNS = ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj")
Q = "model.layers.0.self_attn.q_proj"


def short(story: Path, *overrides: str) -> Recipe:
    return load_recipe(None, [*SMALL, "training.tokens=256", f"data.sources=[{story}]", *overrides])


def lineage_of(directory: Path) -> Lineage:
    lineage = read_lineage(directory)
    assert lineage is not None
    return lineage


# ---- by name ---------------------------------------------------------------------------------------------------------


def test_what_a_recipe_names_stays_plain_and_learns(smollm: Path, story: Path, tmp_path: Path) -> None:
    report = warmup(str(smollm), tmp_path / "out", short(story, "keep.modules=['*.down_proj']"), reporter=Silent())
    assert report.kept == list(DOWNS)
    assert (lineage_of(tmp_path / "out").kept, lineage_of(tmp_path / "out").keep_tokens) == (DOWNS, 0)
    before, after = (load_file(path / "model.safetensors") for path in (smollm, tmp_path / "out"))
    assert all((after[f"{name}.weight"] != before[f"{name}.weight"]).any() for name in DOWNS)
    checkpoint = open_checkpoint(str(tmp_path / "out"))
    assert len(bitlinears(checkpoint.load())) == 12
    assert DOWNS[0] in (tmp_path / "out" / "README.md").read_text()
    file = pack(checkpoint, Packing(formats=("tq2_0",)), tmp_path / "packed", reporter=Silent()).files[0]
    assert {tensor.name: tensor.type for tensor in file.kept} == {
        "blk.0.ffn_down.weight": "Q8_0",
        "blk.1.ffn_down.weight": "Q8_0",
    }


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        ("keep.modules=['*.down_proj', '*.layers.7.*']", r"no linear layer is called \*\.layers\.7\.\*"),
        ("keep.modules=[lm_head]", "no linear layer is called lm_head"),
        ("keep.modules=['*']", "every linear layer would be kept"),
        ("keep.budget=0.01", "keep.budget: 0.01 of the linear weights are fewer than the smallest matrix has"),
    ],
)
def test_what_would_keep_nothing_or_everything_is_refused_before_the_training(
    smollm: Path, story: Path, tmp_path: Path, option: str, problem: str
) -> None:
    with pytest.raises(UsageError, match=problem):
        warmup(str(smollm), tmp_path / "out", short(story, option), reporter=Silent())
    assert not partial_directory(tmp_path / "out").exists()


def test_names_and_a_budget_are_two_ways() -> None:
    with pytest.raises(UsageError, match="keep: modules names what stays, and budget leaves that to warmup"):
        load_recipe(None, ["keep.modules=[x]", "keep.budget=0.1"])
    with pytest.raises(UsageError, match=r"keep\.budget"):
        load_recipe(None, ["keep.budget=1.0"])


def test_a_control_run_has_nothing_to_keep(smollm: Path, story: Path, tmp_path: Path) -> None:
    recipe = short(story, "control=true", "keep.budget=0.2")
    assert warmup(str(smollm), tmp_path / "out", recipe, reporter=Silent()).kept == []


def test_a_ternary_model_goes_on_with_what_it_has_kept(smollm: Path, story: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    warmup(str(smollm), first, short(story, "keep.modules=['*.down_proj']"), reporter=Silent())
    on = ("lam.curve=instant", "distill.kl=0")
    with pytest.raises(UsageError, match="keep: it is ternary already"):
        warmup(str(first), second, short(story, *on, f"keep.modules=[{Q}]"), reporter=Silent())
    warmup(str(first), second, short(story, *on), reporter=Silent())
    assert lineage_of(second).kept == DOWNS


# ---- by what rounding costs ------------------------------------------------------------------------------------------


def text(model: Path, story: Path, windows: int) -> Tensor:
    ids = tokenize([str(story)], open_checkpoint(str(model)).tokenizer(), Silent()).ids
    return torch.from_numpy(ids[: windows * 32].astype("int64")).view(windows, 32)


@torch.no_grad()
def cost_by_hand(model: nn.Module, module: str, tokens: Tensor, scaling: Scaling) -> float:
    """The same from its definition: fake quantization of one linear, and the divergence of all logits."""
    rounded = copy.deepcopy(model)
    linear = rounded.get_submodule(module)
    linear.weight.copy_(ternarize(linear.weight, scaling).dequantize())
    linear.register_forward_pre_hook(lambda _, given: (quantize_int8(given[0]).dequantize(),))
    original, changed = (each(tokens).logits[:, :-1].flatten(0, 1).log_softmax(-1) for each in (model, rounded))
    return float(functional.kl_div(changed, original, reduction="batchmean", log_target=True))


def test_the_cost_of_rounding_is_the_divergence_from_the_original(smollm: Path, story: Path) -> None:
    scaling = Scaling(estimator="mse", granularity="row")
    model, tokens = open_checkpoint(str(smollm)).load_latent(), text(smollm, story, windows=3)
    before = copy.deepcopy(model)
    told = Recorder()
    costs = rounding_costs(model, [Q, *DOWNS], tokens, scaling, told)
    assert costs == pytest.approx({name: cost_by_hand(before, name, tokens, scaling) for name in costs}, rel=1e-3)
    assert len(set(costs.values())) == 3
    assert told.progress == [(1, 3), (2, 3), (3, 3)]
    assert not bitlinears(model)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.state_dict().items())


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 5)), min_size=1, max_size=8),
    st.floats(0.01, 0.99),
)
def test_the_budget_goes_to_what_costs_most_by_weight(matrices: list[tuple[int, int]], budget: float) -> None:
    weights = {str(number): 8 * size for number, (size, _) in enumerate(matrices)}
    costs = {str(number): float(cost) for number, (_, cost) in enumerate(matrices)}
    room = budget * sum(weights.values())
    if room < min(weights.values()):
        with pytest.raises(UsageError, match=r"keep\.budget"):
            within_budget(costs, weights, budget)
        return
    chosen = within_budget(costs, weights, budget)
    assert list(chosen) == [name for name in weights if name in chosen]
    assert sum(weights[name] for name in chosen) <= room
    for left in weights.keys() - set(chosen):  # it does not fit beside those that cost as much or more
        before = [name for name in chosen if costs[name] * weights[left] >= costs[left] * weights[name]]
        assert sum(weights[name] for name in before) + weights[left] > room


def test_warmup_keeps_what_costs_most(
    smollm: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, told = [], Recorder()

    def watched(student: PreTrainedModel, *others: Any, **more: Any) -> Lambda:
        lam = make_student(student, *others, **more)
        trained.extend(name for name, module in student.named_modules() if type(module) is nn.Linear)
        return lam

    monkeypatch.setattr("bitconvert.training.warmup.make_student", watched)
    recipe = short(story, "keep.budget=0.2", "keep.tokens=70", "training.seed=3")
    report = warmup(str(smollm), tmp_path / "out", recipe, reporter=told)
    checkpoint = open_checkpoint(str(smollm))
    model = checkpoint.load_latent()
    modules = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    weights = {name: model.get_parameter(f"{name}.weight").numel() for name in modules}
    ids = tokenize([str(story)], checkpoint.tokenizer(), Silent()).ids
    training = torch.from_numpy(ids.astype("int64"))[: (len(ids) - 64) // 32 * 32].view(-1, 32)
    shuffled = np.random.default_rng((3, 0)).permutation(len(training))
    costs = {name: cost_by_hand(model, name, training[shuffled[:2]], recipe.scaling) for name in modules}
    assert report.kept == list(within_budget(costs, weights, 0.2))
    assert trained == [*report.kept, "lm_head"]
    assert 0 < len(report.kept) < 8
    lineage = lineage_of(tmp_path / "out")
    assert (lineage.kept, lineage.keep_tokens) == (tuple(report.kept), 15 * 64)
    noted = {note.split()[1].strip(","): float(note.split()[-2]) for note in told.notes if note.startswith("kept: ")}
    assert noted == pytest.approx({name: costs[name] for name in report.kept}, rel=1e-3)


def test_a_resumed_run_keeps_the_same_without_measuring_again(
    smollm: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(Silent):
        def metrics(self, values) -> None:
            if values.get("step") == 2 and "loss" in values:
                raise KeyboardInterrupt

    output, recipe = tmp_path / "out", short(story, "keep.budget=0.2", "training.save_every=1")
    with pytest.raises(Interrupted):
        warmup(str(smollm), output, recipe, reporter=Stopped())
    chosen = json.loads((partial_directory(output) / "kept.json").read_text())["modules"]
    monkeypatch.setattr("bitconvert.training.keep.rounding_costs", None)
    assert warmup(str(smollm), output, recipe, resume=True, reporter=Silent()).kept == chosen
    assert not (output / "kept.json").exists()


# ---- what is foreseen ------------------------------------------------------------------------------------------------


def test_a_plan_counts_what_stays(smollm: Path) -> None:
    plan = plan_warmup(open_checkpoint(str(smollm)), load_recipe(None, [*SMALL, "keep.budget=0.2"]), reporter=Silent())
    linears = 2 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 512 * 256)
    first = 2 * 256 * 256 + 3 * 128 * 256  # the first layer's attention, and of what follows a k that still fits
    assert (plan.ternary_modules, plan.ternary_parameters) == (9, linears - first)
    assert any("keep.budget" in note for note in plan.notes)


@pytest.mark.parametrize("option", ["keep.modules=['*.down_proj']", "keep.budget=0.25"])
def test_formats_without_a_place_for_it_are_told_before_the_training(smollm: Path, option: str) -> None:
    told = Recorder()
    recipe = load_recipe(None, [option, "pack.formats=[tq2_0, i2_s]"])
    arguments.warn_of_formats(str(smollm), recipe, told)
    (warning,) = told.warnings
    assert "i2_s cannot hold what this run makes" in warning
    assert "kept from being ternary" in warning


def test_nothing_is_foreseen_where_nothing_is_asked_for(smollm: Path) -> None:
    checkpoint = open_checkpoint(str(smollm))
    assert foreseen_kept(checkpoint, Recipe()) == ()
    with pytest.raises(BitconvertError):
        foreseen_kept(checkpoint, load_recipe(None, ["keep.modules=[nothing]"]))
