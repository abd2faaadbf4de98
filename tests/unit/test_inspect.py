"""``bitconvert inspect``: the same codes and scales seen in every form that a model takes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitconvert.errors import BitconvertError
from bitconvert.evaluation.inspect import inspect
from bitconvert.evaluation.plot import plot_tensors, tensors_by_kind
from bitconvert.models.checkpoint import open_checkpoint
from bitconvert.models.latent import ONLINE_BITNET
from bitconvert.models.lineage import Lineage
from bitconvert.packing.pack import pack
from bitconvert.recipe import Packing, Scaling
from bitconvert.report.inspection import InspectReport, TensorReport
from bitconvert.report.reporter import Silent
from bitconvert.ternary.quantize import ternarize
from tests.models import write_gguf, write_model
from tests.recording import Recorder

DOWN = "model.layers.0.mlp.down_proj.weight"
GGUF_DOWN = "blk.0.ffn_down.weight"


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_latent(tmp_path_factory.mktemp("latent") / "tiny", Scaling())


def make_latent(directory: Path, scaling: Scaling) -> Path:
    write_model(directory, "smollm2")
    Lineage(source="somewhere", lam=1.0, scaling=scaling, tokens_seen=1234).save(directory)
    if scaling == Scaling():
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, "quantization_config": ONLINE_BITNET}))
    return directory


def packed(model: Path, name: str, output: Path) -> str:
    return pack(open_checkpoint(str(model)), Packing(formats=(name,)), output, reporter=Silent()).files[0].path


def tensor(report: InspectReport, name: str) -> TensorReport:
    return next(one for one in report.tensors if one.name == name)


def exact(model: Path, scaling: Scaling) -> tuple[float, torch.Tensor]:
    """Zero fraction and scales of the down projection, from the arithmetic itself."""
    rounded = ternarize(load_file(model / "model.safetensors")[DOWN], scaling)
    return float((rounded.codes == 0).double().mean()), rounded.scale


def test_a_plain_model(smollm: Path) -> None:
    recorder = Recorder()
    report = inspect(str(smollm), recorder)
    weights = load_file(smollm / "model.safetensors")
    assert {one.name: one.shape for one in report.tensors} == {n: tuple(w.shape) for n, w in weights.items()}
    assert (report.kind, report.ternary_share, report.bits_per_weight) == ("plain", 0.0, 32.0)
    assert report.parameters == sum(weight.numel() for weight in weights.values())
    assert report.file_bytes == (smollm / "model.safetensors").stat().st_size
    assert {one.type for one in report.tensors} == {"F32"}
    assert report.metadata["num_hidden_layers"] == 2
    assert report.metadata["tokenizer.pre"] == "smollm"
    assert recorder.progress[-1] == (len(weights), len(weights))


def test_zeros_of_a_plain_tensor_are_counted(tmp_path: Path) -> None:
    model = write_model(tmp_path / "tiny", "smollm2")
    weights = load_file(model / "model.safetensors")
    weights[DOWN][:, ::4] = 0
    weights[DOWN] = weights[DOWN].bfloat16()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    found = tensor(inspect(str(model)), DOWN)
    assert (found.type, found.zero_fraction, found.bits_per_weight, found.ternary) == ("BF16", 0.25, 16.0, False)


@pytest.mark.parametrize(
    "scaling", [Scaling(), Scaling(estimator="mse", granularity="row"), Scaling(granularity="group:64")], ids=str
)
def test_a_latent_checkpoint_as_it_would_be_rounded(tmp_path: Path, scaling: Scaling) -> None:
    model = make_latent(tmp_path / "tiny", scaling)
    report = inspect(str(model))
    zeros, scale = exact(model, scaling)
    found = tensor(report, DOWN)
    assert report.kind == "latent"
    assert (found.type, found.ternary, found.bits_per_weight) == ("F32, latent ternary", True, 32.0)
    assert found.zero_fraction == pytest.approx(zeros)
    assert found.scale is not None
    assert found.scale.count == scale.numel()
    told = (found.scale.mean, found.scale.min, found.scale.max)
    assert told == pytest.approx((float(scale.mean()), float(scale.min()), float(scale.max())))
    assert not tensor(report, "model.embed_tokens.weight").ternary
    assert report.metadata["lineage.scaling"] == str(scaling)
    assert (report.metadata["lineage.source"], report.metadata["lineage.tokens_seen"]) == ("somewhere", 1234)


@pytest.mark.parametrize(
    ("name", "down", "kind", "bits", "scales"),
    [
        ("safetensors", DOWN, "U8, packed ternary", 2.0, 1),
        ("tq1_0", GGUF_DOWN, "TQ1_0", 1.6875, 256 * 512 // 256),
        ("tq2_0", GGUF_DOWN, "TQ2_0", 2.0625, 256 * 512 // 256),
        ("q2_0", GGUF_DOWN, "Q2_0", 2.25, 256 * 512 // 64),
    ],
)
def test_a_packed_file_holds_the_codes_of_the_latent_one(
    latent: Path, tmp_path: Path, name: str, down: str, kind: str, bits: float, scales: int
) -> None:
    path = packed(latent, name, tmp_path)
    report = inspect(path)
    zeros, scale = exact(latent, Scaling())
    found = tensor(report, down)
    assert (found.type, found.ternary, found.shape) == (kind, True, (256, 512))
    assert found.bits_per_weight == pytest.approx(bits, abs=2e-3)
    assert found.zero_fraction == pytest.approx(zeros)
    assert found.scale is not None
    assert found.scale.count == scales
    assert found.scale.min == pytest.approx(found.scale.max)
    assert found.scale.mean == pytest.approx(float(scale), rel=1e-3)  # fp16 in the file
    assert report.metadata["lineage.source"] == "somewhere"
    assert report.parameters == inspect(str(latent)).parameters
    weights = Path(path) if Path(path).is_file() else Path(path) / "model.safetensors"
    assert report.file_bytes == weights.stat().st_size
    ternary = [one for one in report.tensors if one.ternary]
    assert len(ternary) == 14  # seven linears in each of two blocks
    assert report.ternary_share == pytest.approx(sum(one.parameters for one in ternary) / report.parameters)


def test_the_whole_files_bits_per_weight(latent: Path, tmp_path: Path) -> None:
    report = inspect(packed(latent, "tq2_0", tmp_path))
    bits = {"F32": 32, "F16": 16, "TQ2_0": 2.0625}
    expected = sum(bits[one.type] * one.parameters for one in report.tensors) / report.parameters
    assert report.bits_per_weight == pytest.approx(expected)


def test_gguf_metadata_is_plain_and_short(smollm: Path, tmp_path: Path) -> None:
    report = inspect(str(write_gguf(smollm, tmp_path / "tiny.gguf")))
    assert report.metadata["general.architecture"] == "llama"
    assert report.metadata["tokenizer.ggml.pre"] == "smollm"
    assert report.metadata["llama.attention.layer_norm_rms_epsilon"] == 1e-5
    assert not [key for key in report.metadata if "tokens" in key or "merges" in key or "lineage" in key]
    json.dumps(asdict(report), allow_nan=False)


def test_ternary_values_in_a_float_tensor_are_recognized(latent: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "tiny", "smollm2")
    weights = load_file(model / "model.safetensors")
    weights[DOWN] = ternarize(weights[DOWN], Scaling()).dequantize()
    weights["model.layers.0.mlp.up_proj.weight"].zero_()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    report = inspect(str(model))
    zeros, scale = exact(latent, Scaling())
    found = tensor(report, DOWN)
    assert (found.type, found.ternary) == ("F32, ternary values", True)
    assert found.zero_fraction == pytest.approx(zeros)
    assert found.scale is not None
    assert found.scale.mean == pytest.approx(float(scale), rel=1e-5)
    assert not tensor(report, "model.layers.0.mlp.up_proj.weight").ternary  # nothing there to scale


def test_what_llama_cpp_cannot_tokenize_is_told_not_raised(tmp_path: Path) -> None:
    model = write_model(tmp_path / "tiny", "smollm2")
    document = json.loads((model / "tokenizer.json").read_text())
    document["normalizer"] = {"type": "Lowercase"}
    (model / "tokenizer.json").write_text(json.dumps(document))
    assert str(inspect(str(model)).metadata["tokenizer.pre"]).startswith("none: ")


def test_a_truncated_file_is_an_error(smollm: Path, tmp_path: Path) -> None:
    path = write_gguf(smollm, tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(BitconvertError, match=r"tiny\.gguf"):
        inspect(str(path))


# ---- the picture ----


def drawn(report: InspectReport, picture: Path) -> str:
    """The words of a picture: matplotlib leaves each as a comment beside its outlines."""
    plot_tensors(report, picture)
    return picture.read_text(encoding="utf-8")


def test_the_picture_names_its_lines_in_the_order_of_a_layer(latent: Path, tmp_path: Path) -> None:
    words = drawn(inspect(str(latent)), tmp_path / "latent.svg")
    kinds = ("q", "k", "v", "o", "gate", "up", "down")
    places = [words.index(f"<!-- {kind} -->") for kind in kinds]
    assert places == sorted(places)
    assert "(latent): 14 ternary matrices" in words
    assert "relative error against its own latent weights" in words
    assert "not measured" not in words


def test_the_picture_says_what_was_not_measured(latent: Path, tmp_path: Path) -> None:
    words = drawn(inspect(packed(latent, "tq2_0", tmp_path)), tmp_path / "packed.svg")
    assert "not measured: name what it came from with" in words
    assert "<!-- gate -->" in words


def test_a_layer_that_is_kept_leaves_a_gap(tmp_path: Path) -> None:
    model = write_model(tmp_path / "tiny", "smollm2", layers=3)
    kept = ("model.layers.1.mlp.up_proj",)
    Lineage(source="somewhere", lam=1.0, scaling=Scaling(), kept=kept, tokens_seen=0).save(model)
    lines = tensors_by_kind(inspect(str(model)))
    assert {kind: list(line) for kind, line in lines.items() if kind in ("up", "down")} == {
        "up": [0, 2],
        "down": [0, 1, 2],
    }
