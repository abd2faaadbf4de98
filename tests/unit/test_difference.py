"""``bitconvert inspect A B``: nothing differs between forms of one model, and every planted change is found."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitconvert.errors import BitconvertError
from bitconvert.evaluation.difference import difference
from bitconvert.evaluation.inspect import inspect
from bitconvert.evaluation.weights import relative_distance
from bitconvert.recipe import Scaling
from bitconvert.report.inspection import DifferenceReport, TensorDifference
from bitconvert.ternary.quantize import ternarize
from tests.models import write_gguf, write_model
from tests.packed import make_checkpoint, pack_directory

DOWN = "model.layers.0.mlp.down_proj.weight"
QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("latent") / "tiny")


def edited(model: Path, copy: Path, name: str, weight: torch.Tensor) -> Path:
    """A copy of a directory in which one tensor is another."""
    shutil.copytree(model, copy)
    weights = load_file(copy / "model.safetensors")
    save_file({**weights, name: weight}, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def told_of(report: DifferenceReport, name: str) -> TensorDifference:
    return next(tensor for tensor in report.tensors if tensor.name == name)


def test_a_model_does_not_differ_from_itself(smollm: Path) -> None:
    report = difference(str(smollm), str(smollm))
    assert (report.tensors, report.metadata, report.shapes) == ((), {}, {})
    assert report.same_tensors == len(load_file(smollm / "model.safetensors"))
    assert report.changed_codes is None


@pytest.mark.parametrize("name", ["tq2_0", "safetensors", "compressed-tensors"])
def test_the_codes_of_a_packed_file_are_those_of_its_latents(latent: Path, tmp_path: Path, name: str) -> None:
    """Rows of q and k lie in another order in GGUF, and scales are rounded to float16."""
    report = difference(str(latent), str(pack_directory(latent, name, tmp_path)))
    assert report.changed_codes == 0.0
    assert (report.only_in_first, report.only_in_second, report.shapes) == ((), (), {})
    for tensor in report.tensors:
        assert tensor.relative == pytest.approx(0, abs=1e-3)
        assert tensor.codes is None or tensor.codes.scale_ratio == pytest.approx(1, abs=1e-3)
    assert not {"hidden_size", "rope_parameters", "vocab_size", "tokenizer", "lineage.scaling"} & report.metadata.keys()


def test_a_plain_gguf_file_says_the_same_as_its_directory(smollm: Path, tmp_path: Path) -> None:
    report = difference(str(smollm), str(write_gguf(smollm, tmp_path / "tiny.gguf")))
    assert (report.tensors, report.only_in_first, report.only_in_second) == ((), (), ())


def test_planted_changes_of_codes_are_counted(tmp_path: Path) -> None:
    plain = write_model(tmp_path / "plain", "smollm2")
    codes, scale = ternarize(load_file(plain / "model.safetensors")[DOWN], Scaling(estimator="absmean"))
    first = edited(plain, tmp_path / "first", DOWN, codes * scale)
    changed = codes.clone()
    flat, before = changed.view(-1), codes.view(-1)
    nonzero, zero = before.nonzero()[:, 0], (before == 0).nonzero()[:, 0]
    flat[nonzero[:5]] *= -1
    flat[nonzero[5:12]] = 0
    flat[zero[:3]] = 1
    second = edited(plain, tmp_path / "second", DOWN, changed * scale * 1.25)
    report = difference(str(first), str(second))
    (told,) = report.tensors
    assert told.name == DOWN
    assert told.codes is not None
    shares = (told.codes.sign_flips, told.codes.to_zero, told.codes.from_zero, told.codes.changed)
    assert shares == pytest.approx([count / codes.numel() for count in (5, 7, 3, 15)])
    assert told.codes.scale_ratio == pytest.approx(1.25)
    assert report.changed_codes == pytest.approx(15 / codes.numel())


def test_a_change_of_plain_values_is_measured(smollm: Path, tmp_path: Path) -> None:
    weight = load_file(smollm / "model.safetensors")[QUERY]
    other = edited(smollm, tmp_path / "other", QUERY, weight * 1.5)
    (told,) = difference(str(smollm), str(other)).tensors
    assert (told.name, told.codes, told.types) == (QUERY, None, ("F32", "F32"))
    assert told.relative == pytest.approx(0.5)


def test_tensors_and_shapes_of_only_one(smollm: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", "smollm2", layers=3, intermediate_size=256, rms_norm_eps=1e-3)
    report = difference(str(smollm), str(other))
    assert report.only_in_first == ()
    assert {name.split(".")[2] for name in report.only_in_second} == {"2"}
    assert report.shapes[DOWN] == ((256, 512), (256, 256))
    assert report.metadata["num_hidden_layers"] == (2, 3)
    assert report.metadata["rms_norm_eps"] == (1e-5, 1e-3)
    json.dumps(asdict(report), allow_nan=False)


def test_other_tokens_are_told(smollm: Path, tmp_path: Path) -> None:
    other = shutil.copytree(smollm, tmp_path / "other")
    document = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(document.replace("<|im_start|>", "<|im_begin|>"))
    assert difference(str(smollm), str(other)).metadata.keys() == {"tokenizer"}


def test_a_matrix_of_zeros_has_no_relative_distance() -> None:
    zeros, ones = torch.zeros(4, 4), torch.ones(4, 4)
    assert relative_distance(zeros, ones) is None
    assert relative_distance(ones, zeros) == 1.0


# ---- how far a ternary model is from what it came from ----


def test_errors_of_latents_and_of_files_packed_from_them(latent: Path, tmp_path: Path) -> None:
    weights = load_file(latent / "model.safetensors")
    rounded = ternarize(weights[QUERY], Scaling()).dequantize()
    exact = float((rounded - weights[QUERY]).norm() / weights[QUERY].norm())
    for model, against in ((latent, None), (pack_directory(latent, "tq2_0", tmp_path), str(latent))):
        report = inspect(str(model), against=against)
        errors = {tensor.hf_name: tensor.error for tensor in report.tensors}
        assert errors[QUERY] == pytest.approx(exact, rel=1e-3)
        assert errors["model.norm.weight"] is None
        assert report.error_against == (against or "its own latent weights")


def test_no_error_is_told_where_there_is_nothing_to_compare_with(latent: Path, tmp_path: Path) -> None:
    report = inspect(str(pack_directory(latent, "q2_0", tmp_path)))
    assert report.error_against is None
    assert {tensor.error for tensor in report.tensors} == {None}


def test_a_stranger_is_refused(latent: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", "smollm2", intermediate_size=256)
    with pytest.raises(
        BitconvertError, match=r"does not come from .*other: tensor model\.layers\.0\.mlp\..* has shape"
    ):
        inspect(str(latent), against=str(other))
