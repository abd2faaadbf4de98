"""Matrices that are kept from being ternary: stored beside the others, computed by everything that reads them."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from bitconvert.errors import UsageError
from bitconvert.evaluation.inspect import inspect
from bitconvert.evaluation.runtimes import open_runtime
from bitconvert.models.checkpoint import open_checkpoint
from bitconvert.models.gguf_source import activation_blocks
from bitconvert.models.latent import save_latent
from bitconvert.models.lineage import Lineage
from bitconvert.packing.pack import pack
from bitconvert.packing.unpack import unpack
from bitconvert.recipe import Packing, Scaling
from bitconvert.report.reporter import Silent
from bitconvert.ternary.bitlinear import bitlinears
from tests.models import write_model
from tests.packed import baked, make_checkpoint, pack_directory
from tests.unit.test_onnx import require_same_logits
from tests.unit.test_pack import gguf_tensors, llama_cpp_order, pack_one, refused, run_pack
from tests.unit.test_unpack import assert_same_model, content, stock

Q, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"
GGUF_Q, GGUF_DOWN = "blk.1.attn_q.weight", "blk.0.ffn_down.weight"
KEPT_WEIGHTS, LINEAR_WEIGHTS = 256 * 256 + 512 * 256, 2 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 512 * 256)
IDS = torch.arange(1, 65)[None]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "tiny", kept=(Q, DOWN))


@pytest.fixture(scope="module")
def source(mixed: Path) -> dict[str, Tensor]:
    return load_file(mixed / "model.safetensors")


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(IDS).logits[0]
    return found


def kl(expected: Tensor, found: Tensor) -> float:
    p, q = expected.double().log_softmax(-1), found.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


# ---- the checkpoint itself -------------------------------------------------------------------------------------------


def test_a_kept_linear_is_computed_as_it_is(mixed: Path, source: dict[str, Tensor]) -> None:
    model = open_checkpoint(str(mixed)).load()
    assert len(bitlinears(model)) == 12
    for module in (Q, DOWN):
        assert type(model.get_submodule(module)) is nn.Linear
        assert torch.equal(model.get_submodule(module).weight, source[f"{module}.weight"])


def test_stock_transformers_rounds_none_of_them_in_the_latent_checkpoint(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(write_model(tmp_path / "plain", "smollm2")))
    lineage = Lineage(source="test", lam=1.0, scaling=Scaling(estimator="absmean"), kept=(Q, DOWN), tokens_seen=1)
    (tmp_path / "latent").mkdir()
    save_latent(checkpoint.load_latent(), checkpoint.tokenizer(), lineage, "", tmp_path / "latent")
    theirs = stock(tmp_path / "latent")
    plain = {name for name, module in theirs.named_modules() if type(module) is nn.Linear}
    assert plain == {Q, DOWN, "lm_head"}
    assert_same_model(open_checkpoint(str(tmp_path / "latent")).load(), theirs)


# ---- GGUF ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tq1_0", "tq2_0", "q2_0"])
def test_gguf_holds_them_as_the_reference_quantizes_them(
    tmp_path: Path, mixed: Path, source: dict[str, Tensor], name: str
) -> None:
    file = pack_one(mixed, name, tmp_path)
    stored = gguf_tensors(file)
    expected = {GGUF_Q: llama_cpp_order(source[f"{Q}.weight"], heads=4), GGUF_DOWN: source[f"{DOWN}.weight"]}
    for tensor, weight in expected.items():
        assert stored[tensor].tensor_type.name == "Q8_0"
        np.testing.assert_array_equal(stored[tensor].data, gguf.quantize(weight.numpy(), stored[tensor].tensor_type))
    assert stored["blk.0.attn_q.weight"].tensor_type.name == name.upper()
    file_type = gguf.GGUFReader(file.path).fields["general.file_type"].contents()
    assert file_type == {"tq1_0": 36, "tq2_0": 37, "q2_0": 41}[name]


@pytest.mark.parametrize("kept_type", ["q8_0", "q6_k", "q4_k", "f16"])
def test_llama_cpp_computes_with_them(tmp_path: Path, mixed: Path, kept_type: str) -> None:
    all_ternary = make_checkpoint(tmp_path / "ternary")
    file = pack_one(mixed, "tq2_0", tmp_path / "out", kept_type=kept_type)
    assert {tensor.type for tensor in file.kept} == {kept_type.upper()}
    with open_runtime(file.path, n_ctx=IDS.numel(), threads=1) as runtime:
        theirs = torch.tensor(runtime.logits(IDS[0].tolist()))
    assert len(activation_blocks(Path(file.path))) == 12
    loaded = open_checkpoint(file.path).load()
    assert len(bitlinears(loaded)) == 12
    assert kl(logits(loaded), theirs) < 0.001
    trained = logits(open_checkpoint(str(mixed)).load())
    assert kl(trained, theirs) < (0.01 if kept_type == "q4_k" else 0.001)
    assert kl(trained, logits(open_checkpoint(str(all_ternary)).load())) > 0.1


def test_rows_that_do_not_divide_get_the_next_best_type(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "tiny", kept=[DOWN], intermediate_size=320)
    file = pack_one(model, "tq2_0", tmp_path / "out", kept_type="q4_k")
    assert [(tensor.type, tensor.note) for tensor in file.kept] == [
        ("Q8_0", "rows of 320 do not divide by 256, as Q4_K requires")
    ]


def test_a_large_one_is_written_whole(
    tmp_path: Path, mixed: Path, source: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In parts, its rows would change places within the parts."""
    monkeypatch.setattr("bitconvert.models.checkpoint._WEIGHTS_AT_ONCE", 96 * 256)
    stored = gguf_tensors(pack_one(mixed, "tq2_0", tmp_path / "out", kept_type="f32"))
    expected = llama_cpp_order(source[f"{Q}.weight"], heads=4)
    np.testing.assert_array_equal(stored[GGUF_Q].data, expected.numpy())


def test_unpacking_and_packing_again_gives_the_same_bytes(tmp_path: Path, mixed: Path) -> None:
    for form in ("tq2_0", "safetensors", "compressed-tensors"):
        first = Path(pack_one(mixed, form, tmp_path / form, embedding_type="f32").path)
        directory = tmp_path / f"{form}-baked"
        report = unpack(open_checkpoint(str(first)), directory, reporter=Silent())
        assert report.ternary_parameters == LINEAR_WEIGHTS - KEPT_WEIGHTS
        assert open_checkpoint(str(directory)).kept == (Q, DOWN)
        assert len(bitlinears(open_checkpoint(str(directory)).load())) == 12
        again = Path(pack_one(directory, form, tmp_path / f"{form}-again", embedding_type="f32").path)
        assert content(again) == content(first)


# ---- directories -----------------------------------------------------------------------------------------------------


def test_stock_transformers_computes_the_packed_directory(tmp_path: Path, mixed: Path) -> None:
    directory = pack_directory(mixed, "safetensors", tmp_path)
    config = json.loads((directory / "config.json").read_text())
    assert set(config["quantization_config"]["modules_to_not_convert"]) == {"lm_head", Q, DOWN}
    theirs = stock(directory)
    assert {type(theirs.get_submodule(name)) for name in (Q, DOWN)} == {nn.Linear}
    assert_same_model(open_checkpoint(str(directory)).load(), theirs)


def test_compressed_tensors_ignores_them(tmp_path: Path, mixed: Path) -> None:
    file = pack_one(mixed, "compressed-tensors", tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(file.path)
    torch.testing.assert_close(logits(theirs), logits(baked(mixed)), rtol=0, atol=1e-5)
    assert f"vLLM will refuse it, transformers will not: {Q} is kept" in file.note


@pytest.mark.parametrize("kept", [[DOWN], [f"model.layers.1.self_attn.{name}_proj" for name in "qkv"]])
def test_what_vllm_computes_in_one_may_be_kept_together(tmp_path: Path, kept: list[str]) -> None:
    model = make_checkpoint(tmp_path / "tiny", kept=kept)
    assert pack_one(model, "compressed-tensors", tmp_path / "out").note == ""


@pytest.mark.parametrize("variant", ["smollm2", "biased"])
def test_onnx_runtime_computes_with_them(tmp_path: Path, variant: str) -> None:
    model = make_checkpoint(tmp_path / "tiny", variant, kept=(Q, DOWN))
    require_same_logits(model, pack_directory(model, "onnx", tmp_path / "out"))


# ---- what it costs ---------------------------------------------------------------------------------------------------


def test_the_price_is_told(tmp_path: Path, mixed: Path) -> None:
    report = run_pack(mixed, ["tq2_0", "safetensors"], tmp_path)
    in_gguf, in_directory = report.files
    assert [tensor.name for tensor in in_gguf.kept] == [GGUF_DOWN, GGUF_Q]
    assert (in_gguf.kept_bytes, in_directory.kept_bytes) == (KEPT_WEIGHTS * 34 // 32, KEPT_WEIGHTS * 4)
    assert in_gguf.ternary_bits_per_weight == 2.0625
    ternary_weights = LINEAR_WEIGHTS - KEPT_WEIGHTS
    expected = (2.0625 * ternary_weights + 8.5 * KEPT_WEIGHTS) / LINEAR_WEIGHTS
    assert in_gguf.linear_bits_per_weight == pytest.approx(expected)
    assert in_gguf.notes() == [
        f"2 matrices are kept from being ternary, as Q8_0: 0.21 MB of {in_gguf.nbytes / 1e6:.2f}; the linear layers "
        f"take {expected:.3f} bits per weight with them ({GGUF_DOWN}, {GGUF_Q})"
    ]
    card = (tmp_path / "README.md").read_text()
    assert f"2.06 in the ternary layers, {expected:.2f} with the kept ones" in card
    assert f"`{Q}`, `{DOWN}`" in card
    assert f"| `tiny-TQ2_0.gguf` | Q8_0 | 0.21 MB | {in_gguf.kept_bytes / in_gguf.nbytes:.1%} |" in card
    assert "the linear layers of every block, all but 2, are ternary" in card


def test_inspect_tells_them_apart(tmp_path: Path, mixed: Path) -> None:
    report = run_pack(mixed, ["tq2_0", "safetensors"], tmp_path)
    forms = {
        str(mixed): ({f"{Q}.weight", f"{DOWN}.weight"}, "F32", 32.0),
        report.files[0].path: ({GGUF_Q, GGUF_DOWN}, "Q8_0", 8.5),
        report.files[1].path: ({f"{Q}.weight", f"{DOWN}.weight"}, "F32", 32.0),
    }
    for (name, (kept, kind, bits)), linear_bits in zip(
        forms.items(), (32.0, *(file.linear_bits_per_weight for file in report.files)), strict=True
    ):
        told = inspect(name)
        found = [tensor for tensor in told.tensors if tensor.kept]
        assert {tensor.name for tensor in found} == kept
        assert {(tensor.type, tensor.bits_per_weight, tensor.ternary) for tensor in found} == {(kind, bits, False)}
        assert sum(tensor.ternary for tensor in told.tensors) == 12
        assert told.kept_bytes == KEPT_WEIGHTS * bits / 8
        assert told.linear_bits_per_weight == pytest.approx(linear_bits)
        assert told.metadata["lineage.kept"] == f"{Q}, {DOWN}"


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_i2_s_has_no_place_for_them(tmp_path: Path, mixed: Path) -> None:
    error = refused(mixed, ["i2_s"], tmp_path / "out")
    assert f"tensor {DOWN}.weight is kept from being ternary, and format i2_s cannot hold it" in error.message
    report = pack(open_checkpoint(str(mixed)), Packing(formats=("all",)), tmp_path / "all", reporter=Silent())
    assert report.refusals.keys() == {"i2_s"}


def test_types_that_mean_nothing_are_refused(tmp_path: Path, mixed: Path) -> None:
    error = refused(mixed, ["tq2_0"], tmp_path / "out", kept_type="q4_0")
    assert isinstance(error, UsageError)
    assert error.message == "unknown kept type 'q4_0'"
    all_ternary = make_checkpoint(tmp_path / "ternary")
    error = refused(all_ternary, ["tq2_0"], tmp_path / "out", kept_type="q6_k")
    assert isinstance(error, UsageError)
    assert error.hint == "leave out --kept-type"


def test_values_that_float16_cannot_hold_name_their_option(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "tiny", kept=[DOWN])
    weights = load_file(model / "model.safetensors")
    weights[f"{DOWN}.weight"] *= 1e6
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert "--kept-type f32" in refused(model, ["tq2_0"], tmp_path / "out", kept_type="f16").hint
