"""Recipes: read, overridden, refused with every problem at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from bitconvert.errors import UsageError
from bitconvert.recipe import Recipe, Scaling, load_recipe, recipe_directory, shipped_recipes


def test_nothing_given_is_the_defaults() -> None:
    assert load_recipe() == Recipe()


def test_the_resolved_recipe_reads_back(tmp_path: Path) -> None:
    recipe = load_recipe(None, ["scaling.granularity=group:64", "data.sources=[a.txt]", "optimizer.betas=[0.8, 0.9]"])
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    assert load_recipe(str(tmp_path / "r.yaml")) == recipe


def test_overrides_are_yaml() -> None:
    recipe = load_recipe(None, ["optimizer.lr=5e-4", "training.compile=true", "lam.curve=cosine"])
    assert (recipe.optimizer.lr, recipe.training.compile, recipe.lam.curve) == (5e-4, True, "cosine")


def test_every_problem_is_named_at_once(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("scaling: {estimator: median}\nlamb: {}\ndistill: {kl: 0, ce: 0}\ntraining: {batch_size: 3}\n")
    with pytest.raises(UsageError) as caught:
        load_recipe(str(file), ["optimizer.lrr=1"])
    for problem in (
        str(file),
        "scaling.estimator: ",
        "lamb: unknown key",
        "distill: kl and ce cannot both be 0",
        "optimizer.lrr: unknown key",
        "training: micro_batch_size 2 does not divide batch_size 3",
    ):
        assert problem in caught.value.message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a\n- b\n", "a mapping of sections"),
        ("a: [1,\n", "not valid YAML"),
        ("a: !!python/object:x {}\n", "not valid"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(content)
    with pytest.raises(UsageError, match=message):
        load_recipe(str(tmp_path / "r.yaml"))


@pytest.mark.parametrize("override", ["optimizer.lr", "=3", "a..b=3", ".a=1"])
def test_an_override_that_is_none(override: str) -> None:
    with pytest.raises(UsageError, match="section.key=value"):
        load_recipe(None, [override])


def test_an_override_through_a_value() -> None:
    with pytest.raises(UsageError, match="description is not a section"):
        load_recipe("demo", ["description.x=3"])


@pytest.mark.parametrize("name", ["no-such", "../secrets", "no.yaml"])
def test_a_recipe_that_is_not_there(name: str) -> None:
    with pytest.raises(UsageError, match="no such recipe"):
        load_recipe(name)


@pytest.mark.parametrize("granularity", ["group:0", "group:-1", "group:", "column", "group:1.5", "group:64\n"])
def test_an_unknown_granularity(granularity: str) -> None:
    with pytest.raises(ValueError, match="tensor, row or group:N"):
        Scaling(granularity=granularity)


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_load_and_say_what_they_are_for(name: str) -> None:
    assert load_recipe(name).description
    header = (recipe_directory() / f"{name}.yaml").read_text().split("\n\n")[0]
    for word in ("# hardware", "# command", "# result"):
        assert word in (recipe_directory() / f"{name}.yaml").read_text(), (word, header)


def test_a_step_budget_pays_for_at_least_one_step() -> None:
    assert load_recipe(None, ["training.tokens=1"]).training.steps == 1
    assert load_recipe(None, ["training.tokens=40960", "training.context=512"]).training.steps == 10


def test_the_shipped_recipes_are_plain_yaml() -> None:
    for file in recipe_directory().glob("*.yaml"):
        assert isinstance(yaml.safe_load(file.read_text()), dict)


# ---- what is decided by the model ----


@pytest.mark.parametrize(
    ("parameters", "is_ternary", "overrides", "method", "curve"),
    [
        (6_666_667, False, (), "blockwise", "instant"),
        (6_666_666, False, (), "none", "linear"),
        (6_666_667, False, ("lam.curve=cosine",), "none", "cosine"),
        (6_666_666, False, ("lam.curve=instant",), "none", "instant"),
        (6_666_667, False, ("init.method=none",), "none", "linear"),
        (6_666_666, False, ("init.method=blockwise",), "blockwise", "instant"),
        (6_666_666, False, ("init.method=gptq", "lam.curve=linear"), "gptq", "linear"),
        (6_666_667, True, (), "none", "instant"),
    ],
)
def test_what_is_auto_is_decided_by_tokens_a_parameter(
    parameters: int, is_ternary: bool, overrides: tuple[str, ...], method: str, curve: str
) -> None:
    recipe = load_recipe(None, ["training.tokens=1_000_000", *overrides]).settled(parameters, is_ternary=is_ternary)
    assert (recipe.init.method, recipe.lam.curve) == (method, curve)


@pytest.mark.parametrize(
    ("parameters", "is_ternary", "overrides", "weights"),
    [
        (10_000_001, False, (), (0.9, 0.1)),
        (10_000_000, False, (), (0.65, 0.35)),
        (10_000_000, False, ("distill.kl=2",), (2.0, 0.35)),
        (10_000_001, False, ("distill.kl=0",), (0.0, 1.0)),
        (10_000_001, True, (), (0.0, 1.0)),
        (10_000_001, True, ("distill.kl=0.5",), (0.5, 1.0)),
    ],
)
def test_so_are_the_weights_of_the_loss(
    parameters: int, is_ternary: bool, overrides: tuple[str, ...], weights: tuple[float, float]
) -> None:
    recipe = load_recipe(None, ["training.tokens=1_000_000", *overrides]).settled(parameters, is_ternary=is_ternary)
    assert recipe.distill.weights == weights


@pytest.mark.parametrize("weight", ["-1", ".nan", ".inf", "much", "[1]"])
def test_a_weight_of_the_loss_is_auto_or_a_number(weight: str) -> None:
    with pytest.raises(UsageError, match=r"^--set distill\.kl: must be auto, or a number from 0 on$"):
        load_recipe(None, [f"distill.kl={weight}"])
