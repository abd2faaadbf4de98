"""What is known before a conversion: the sizes of its files to the byte, the disk, what a config alone tells."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from bitconvert.conversion.foresight import plan
from bitconvert.models.checkpoint import open_checkpoint
from bitconvert.packing.formats import FORMATS
from bitconvert.packing.pack import foresee_files, pack
from bitconvert.recipe import Packing, Recipe, Scaling, load_recipe
from bitconvert.report.reporter import Silent
from bitconvert.training import plan as planning
from bitconvert.training import rehearsal
from bitconvert.training.student import settle
from tests.packed import make_checkpoint

_LINEAGE = 3000  # bytes that a trained model's GGUF file tells of its training


def small(*overrides: str) -> Recipe:
    common = ("init.method=none", "training.tokens=256", "training.context=32", "data.held_out_tokens=64")
    return load_recipe(None, [*common, *overrides])


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("foreseen") / "tiny", hidden_size=256, intermediate_size=512)


@pytest.mark.parametrize("shards", [None, "100kB"])
def test_sizes_are_foreseen_to_the_byte(shards: str | None, latent: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(latent))
    options = Packing.model_validate({"formats": ("all",), "max_shard_size": shards})
    foreseen = {file.format: file.nbytes for file in foresee_files(checkpoint, options, checkpoint.scaling)}
    packed = pack(checkpoint, options, tmp_path, reporter=Silent())
    of_headers = 512 if shards else 0  # whose shards hold other tensors in the file's order
    assert foreseen == pytest.approx({file.format: file.nbytes for file in packed.files}, rel=0, abs=of_headers)
    for file in packed.files:
        weights = Path(file.path).rglob("*.safetensors") if file.format in ("safetensors", "compressed-tensors") else ()
        assert sum(path.stat().st_size for path in weights) in (0, file.nbytes)
    assert foreseen.keys() == FORMATS.keys()


def test_what_is_not_trained_yet_lacks_only_the_story_of_it(latent: Path, tmp_path: Path) -> None:
    original = shutil.copytree(latent, tmp_path / "tiny")
    (original / "bitconvert.json").unlink()
    options, scaling = Packing(formats=("tq2_0", "safetensors")), Scaling()
    before, after = (
        {file.format: file for file in foresee_files(open_checkpoint(str(model)), options, scaling)}
        for model in (original, latent)
    )
    for name in FORMATS:
        assert 0 <= (after[name].nbytes or 0) - (before[name].nbytes or 0) < _LINEAGE
    assert [name for name, file in before.items() if file.wanted] == ["tq2_0", "safetensors"]


def test_formats_that_cannot_be_say_why(smollm: Path) -> None:
    checkpoint = open_checkpoint(str(smollm))
    files = {file.format: file for file in foresee_files(checkpoint, Packing(), Scaling(granularity="row"))}
    assert "one scale per tensor" in files["safetensors"].refusal
    assert files["safetensors"].nbytes is None
    assert files["q8_0"].refusal == ""


def test_a_config_alone_is_enough(latent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config").mkdir()
    shutil.copy(latent / "config.json", tmp_path / "config")
    monkeypatch.setattr(planning, "_free_bytes", lambda: 0)  # so that nothing is timed
    foreseen = plan(str(tmp_path / "config"), small(), output=tmp_path / "out", reporter=Silent())
    whole = foresee_files(open_checkpoint(str(latent)), small().pack, small().scaling)
    assert foreseen.parameters == open_checkpoint(str(latent)).parameters
    for told, known in zip(foreseen.files, whole, strict=True):
        assert told.refusal == known.refusal == ""
        assert 0.8 < (told.nbytes or 0) / (known.nbytes or 1) < 1.001  # no vocabulary in GGUF; another name in ONNX
    assert foreseen.free_disk_bytes == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.2)


@pytest.mark.slow
def test_disk_is_for_checkpoints_or_for_files_whichever_is_more(
    smollm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "_free_bytes", lambda: 0)
    few, many = (
        plan(str(smollm), small(f"training.keep_checkpoints={count}"), output=tmp_path, reporter=Silent())
        for count in (1, 4)
    )
    weights = 4 * few.parameters
    assert many.disk_bytes - few.disk_bytes == pytest.approx(3 * (few.disk_bytes - weights) / 2, rel=0.01)
    every = plan(str(smollm), small("pack.formats=[all]"), output=tmp_path, reporter=Silent())
    assert every.disk_bytes >= weights + sum(file.nbytes or 0 for file in every.files)


@pytest.mark.slow
def test_where_a_recipe_does_not_fit_the_nearest_that_does_is_named(
    smollm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = {"far": small("training.tokens=9999999"), "near": small("training.tokens=8192"), "wide": small()}
    shipped["wide"] = small("training.tokens=4096", "training.micro_batch_size=8")
    recipe = small("training.tokens=4096", "training.batch_size=16", "training.micro_batch_size=16")
    load = planning.load_recipe

    def load_shipped(name: str | None = None, *options: Any, **more: Any) -> Recipe:
        return shipped[name] if name else load(name, *options, **more)

    monkeypatch.setattr(planning, "shipped_recipes", lambda: list(shipped))
    monkeypatch.setattr(planning, "load_recipe", load_shipped)
    monkeypatch.setattr(planning, "_SAVINGS", ())
    monkeypatch.setattr(planning, "_resident_bytes", lambda: 0)
    monkeypatch.setattr(planning, "_TOUCHED_LATER", 0)
    checkpoint = open_checkpoint(str(smollm))
    wide = sum(rehearsal.account(checkpoint, settle(shipped["wide"], checkpoint)).peak.values())
    monkeypatch.setattr(planning, "_free_bytes", lambda: wide + wide // 50)  # not with what is not returned
    foreseen = plan(str(smollm), recipe, output=tmp_path, reporter=Silent())
    assert list(foreseen.forecasts[0].remedies) == ["--recipe near"]
