"""Packing: what stands in the files, that stock readers agree, what is refused, and that nothing is half-written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from bitconvert.errors import BitconvertError, UsageError
from bitconvert.models.checkpoint import open_checkpoint
from bitconvert.models.gguf_types import register_q2_0
from bitconvert.models.latent import ONLINE_BITNET
from bitconvert.models.lineage import Lineage
from bitconvert.models.safetensors_file import SafetensorsFile, TensorSpec
from bitconvert.packing.formats import FORMATS
from bitconvert.packing.formats.hf_bitnet import HfBitnet
from bitconvert.packing.gguf.container import GgufContainer
from bitconvert.packing.pack import foresee_refusals, pack
from bitconvert.recipe import Packing, Scaling
from bitconvert.report.packing import PackedFile, PackReport
from bitconvert.report.reporter import Silent
from bitconvert.ternary.quantize import ternarize
from tests.models import write_model
from tests.recording import Recorder


def make_latent(
    directory: Path, *, variant: str = "smollm2", lam: float = 1.0, scaling: Scaling | None = None, **options: Any
) -> Path:
    """A tiny random SmolLM2 (tied, grouped-query attention, hidden 256) as warmup leaves it behind."""
    write_model(directory, variant, **options)
    lineage = Lineage(source="test", lam=lam, scaling=scaling or Scaling(estimator="absmean"), tokens_seen=1000)
    lineage.save(directory)
    if lineage.scaling == Scaling(estimator="absmean"):
        edit_config(directory, quantization_config=ONLINE_BITNET)
    return directory


def edit_config(directory: Path, drop: tuple[str, ...] = (), **values: Any) -> None:
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in drop}))


def edit_weights(directory: Path, edit: Mapping[str, Tensor | None]) -> None:
    weights = load_file(directory / "model.safetensors")
    weights.update({name: tensor for name, tensor in edit.items() if tensor is not None})
    kept = {name: tensor for name, tensor in weights.items() if edit.get(name, tensor) is not None}
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})


def embedding_of(model: Path) -> Tensor:
    return load_file(model / "model.safetensors")["model.embed_tokens.weight"]


def pack_one(model: Path, name: str, output: Path, **options: Any) -> PackedFile:
    return run_pack(model, [name], output, **options).files[0]


def run_pack(
    model: Path,
    names: list[str],
    output: Path,
    *,
    reporter: Silent | None = None,
    round_plain: bool = False,
    **options: Any,
) -> PackReport:
    packing = Packing(formats=tuple(names), **options)
    return pack(open_checkpoint(str(model)), packing, output, round_plain=round_plain, reporter=reporter or Silent())


def gguf_tensors(file: PackedFile) -> dict[str, gguf.ReaderTensor]:
    register_q2_0()
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file.path).tensors}


def weights_of(tensor: gguf.ReaderTensor) -> np.ndarray[Any, Any]:
    return gguf.dequantize(tensor.data, tensor.tensor_type)


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_latent(tmp_path_factory.mktemp("models") / "tiny")


# ---- GGUF ------------------------------------------------------------------------------------------------------------


def llama_cpp_order(rows: Tensor, heads: int) -> Tensor:
    """Row 2i + j of a head is Hugging Face's row i + j * head_dim / 2, spelled out."""
    dim = rows.shape[0] // heads
    order = [head * dim + i + j * dim // 2 for head in range(heads) for i in range(dim // 2) for j in range(2)]
    return rows[order]


@pytest.mark.parametrize(
    ("name", "granularity"),
    [(name, scaling) for name in ("tq1_0", "tq2_0", "q2_0") for scaling in ("tensor", "row", "group:256")]
    + [("q8_0", "group:32"), ("f16", "group:16")],
)
def test_gguf_holds_the_ternary_weights_of_training(tmp_path: Path, name: str, granularity: str) -> None:
    scaling = Scaling(granularity=granularity)
    model = make_latent(tmp_path / "tiny", scaling=scaling)
    file = pack_one(model, name, tmp_path / "out")
    assert file.path == str(tmp_path / "out" / f"tiny-{name.upper()}.gguf")
    source, stored = load_file(model / "model.safetensors"), gguf_tensors(file)
    modules = {"attn_q": ("self_attn.q_proj", 4), "attn_k": ("self_attn.k_proj", 2), "ffn_down": ("mlp.down_proj", 0)}
    for ours, (theirs, heads) in modules.items():
        expected = ternarize(source[f"model.layers.1.{theirs}.weight"], scaling).with_fp16_scale().dequantize()
        expected = llama_cpp_order(expected, heads) if heads else expected
        tensor = stored[f"blk.1.{ours}.weight"]
        assert tensor.tensor_type.name == name.upper()
        np.testing.assert_array_equal(weights_of(tensor), expected.numpy())


def test_what_is_not_ternary_stays_as_it_is(tmp_path: Path, latent: Path) -> None:
    stored = gguf_tensors(pack_one(latent, "tq2_0", tmp_path))
    source = load_file(latent / "model.safetensors")
    assert stored["token_embd.weight"].tensor_type.name == "F16"
    np.testing.assert_array_equal(stored["token_embd.weight"].data, source["model.embed_tokens.weight"].half().numpy())
    assert stored["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    np.testing.assert_array_equal(stored["output_norm.weight"].data, source["model.norm.weight"].numpy())
    assert "output.weight" not in stored


def test_an_untied_head_is_stored_like_the_embedding(tmp_path: Path) -> None:
    model = make_latent(tmp_path / "tiny", tie_word_embeddings=False)
    stored = gguf_tensors(pack_one(model, "tq2_0", tmp_path / "out", embedding_type="q8_0"))
    assert {stored[name].tensor_type.name for name in ("token_embd.weight", "output.weight")} == {"Q8_0"}


@pytest.mark.parametrize(
    ("hidden", "intermediate", "attention", "down"),
    [(256, 320, "TQ2_0", "Q2_0"), (192, 288, "Q2_0", "Q8_0"), (64, 40, "Q2_0", "F16")],
)
def test_rows_that_do_not_divide_get_the_next_best_type(
    tmp_path: Path, hidden: int, intermediate: int, attention: str, down: str
) -> None:
    model = make_latent(tmp_path / "tiny", hidden_size=hidden, intermediate_size=intermediate)
    told = Recorder()
    file = pack_one(model, "tq2_0", tmp_path / "out", reporter=told)
    stored = gguf_tensors(file)
    assert stored["blk.0.attn_output.weight"].tensor_type.name == attention
    assert stored["blk.0.ffn_down.weight"].tensor_type.name == down
    weight = load_file(model / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    expected = ternarize(weight, Scaling(estimator="absmean")).with_fp16_scale().dequantize()
    np.testing.assert_array_equal(weights_of(stored["blk.0.ffn_down.weight"]), expected.numpy())
    reason = f"rows of {intermediate} do not divide by 256, as TQ2_0 requires"
    assert f"2 tensors are stored as {down}: {reason} (blk.*.ffn_down.weight)" in told.notes
    assert len(told.notes) == (2 if attention != "TQ2_0" else 1)
    assert len(file.fallbacks) == (14 if attention != "TQ2_0" else 2)


def test_a_tied_head_is_dropped_even_where_the_checkpoint_repeats_it(tmp_path: Path) -> None:
    model = make_latent(tmp_path / "tiny")
    edit_weights(model, {"lm_head.weight": torch.zeros_like(embedding_of(model))})
    assert "output.weight" not in gguf_tensors(pack_one(model, "tq2_0", tmp_path / "out"))
    directory = Path(pack_one(model, "safetensors", tmp_path / "other").path)
    assert "lm_head.weight" not in load_file(directory / "model.safetensors")


def test_the_file_type_is_that_of_most_weights(tmp_path: Path) -> None:
    model = make_latent(tmp_path / "tiny", hidden_size=192, intermediate_size=256)
    file = pack_one(model, "tq2_0", tmp_path / "out")  # only down_proj has rows of 256
    assert gguf.GGUFReader(file.path).fields["general.file_type"].contents() == 41


def test_the_report_counts_the_whole_file(tmp_path: Path, latent: Path) -> None:
    told = Recorder()
    report = run_pack(latent, ["tq1_0", "tq2_0", "tq1_0"], tmp_path, reporter=told)
    assert [file.format for file in report.files] == ["tq1_0", "tq2_0"]
    weights = sum(tensor.numel() for tensor in load_file(latent / "model.safetensors").values())
    for file in report.files:
        assert file.nbytes == Path(file.path).stat().st_size
        assert sum(tensor.weights for tensor in file.tensors) == weights
        assert file.bits_per_weight == pytest.approx(8 * file.nbytes / weights)
        assert file.ternary_bits_per_weight == pytest.approx(FORMATS[file.format].bits_per_weight)
    assert told.progress[-1] == (weights, weights)
    assert report.scaling == "absmean per tensor"
    assert report.warnings == []


# ---- safetensors -----------------------------------------------------------------------------------------------------


class ReferenceBitLinear(torch.nn.Module):
    """BitNet b1.58's linear layer in float64, written from the papers' formulas."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        magnitude = weight.abs().mean()
        scale = magnitude.half().double()
        self.weight = (weight / magnitude).round().clamp(-1, 1).double() * scale
        self.bias = None if bias is None else bias.double()

    def forward(self, x: Tensor) -> Tensor:
        scale = 127 / x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5)
        return torch.nn.functional.linear((x * scale).round().clamp(-128, 127) / scale, self.weight, self.bias)


def reference_logits(model: Path, ids: Tensor) -> Tensor:
    config = LlamaConfig.from_pretrained(model)
    del config.quantization_config
    reference = LlamaForCausalLM(config)
    reference.load_state_dict(load_file(model / "model.safetensors"), strict=False)
    reference.tie_weights()
    linears = {name: module for name, module in reference.named_modules() if isinstance(module, torch.nn.Linear)}
    replaced = {name: ReferenceBitLinear(module.weight, module.bias) for name, module in linears.items()}
    reference.double().eval()
    for name, module in replaced.items():
        if name != "lm_head":
            reference.set_submodule(name, module)
    with torch.no_grad():
        return reference(ids).logits


@pytest.mark.parametrize(
    "options",
    [{}, {"tie_word_embeddings": False}, {"attention_bias": True, "mlp_bias": True}, {"num_hidden_layers": 6}],
    ids=["tied", "untied", "biases", "deep"],
)
def test_stock_transformers_computes_the_reference(tmp_path: Path, options: dict[str, Any]) -> None:
    model = make_latent(tmp_path / "tiny", **options)
    file = pack_one(model, "safetensors", tmp_path / "out")
    assert file.path == str(tmp_path / "out" / "tiny-bitnet")
    ids = torch.arange(1, 49).view(2, 24)
    torch.compiler.set_stance("force_eager")  # transformers compiles BitLinear; the numbers are the same, the time not
    try:
        stock, info = AutoModelForCausalLM.from_pretrained(file.path, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        with torch.no_grad():
            logits = stock.eval()(ids).logits
    finally:
        torch.compiler.set_stance("default")
    assert logits.dtype == torch.float32
    expected = reference_logits(model, ids)
    assert ((logits - expected).norm() / expected.norm()).item() <= 0.02


def test_the_directory_is_what_the_format_page_says(tmp_path: Path, latent: Path) -> None:
    directory = Path(pack_one(latent, "safetensors", tmp_path).path)
    config = json.loads((directory / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "bitnet",
        "linear_class": "bitlinear",
        "quantization_mode": "offline",
        "modules_to_not_convert": ["lm_head"],
    }
    assert config["dtype"] == "float32"
    stored = load_file(directory / "model.safetensors")
    weight = load_file(latent / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    codes, scale = ternarize(weight, Scaling(estimator="absmean")).with_fp16_scale()
    assert "lm_head.weight" not in stored
    assert stored["model.layers.0.mlp.up_proj.weight"].shape == (128, 256)
    assert stored["model.layers.0.mlp.up_proj.weight"].dtype == torch.uint8
    assert stored["model.layers.0.mlp.up_proj.weight"][3, 5] >> 4 & 3 == codes[2 * 128 + 3, 5] + 1
    assert stored["model.layers.0.mlp.up_proj.weight_scale"].tolist() == (1 / scale).tolist()
    assert {tensor.dtype for name, tensor in stored.items() if not name.endswith("proj.weight")} == {torch.float32}
    for companion in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "bitconvert.json"):
        assert (directory / companion).read_bytes() == (latent / companion).read_bytes()
    assert AutoTokenizer.from_pretrained(directory)("the lazy dog").input_ids


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    "stated",
    [
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
        {"rope_scaling": {"rope_type": "llama3", **LLAMA3}, "rope_theta": 5e5},
    ],
    ids=["transformers 5", "transformers 4"],
)
def test_rope_is_written_for_every_reader(tmp_path: Path, stated: dict[str, Any]) -> None:
    model = make_latent(tmp_path / "tiny")
    edit_config(model, drop=("rope_parameters",) if "rope_scaling" in stated else (), **stated)
    directory = Path(pack_one(model, "safetensors", tmp_path / "out").path)
    config = json.loads((directory / "config.json").read_text())
    assert config["rope_theta"] == 5e5
    assert config["rope_parameters"] == {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}
    assert config["rope_scaling"] == {"rope_type": "llama3", **LLAMA3}
    assert LlamaConfig.from_pretrained(directory).rope_parameters == config["rope_parameters"]


def test_float16_models_are_stored_in_float32(tmp_path: Path) -> None:
    """BitLinear in float16 divides by 127 / absmax / scale, which overflows."""
    model = write_model(tmp_path / "tiny", "smollm2")
    weights = load_file(model / "model.safetensors")
    edit_weights(model, {name: tensor.half() for name, tensor in weights.items()})
    edit_config(model, dtype="float16")
    directory = Path(pack_one(model, "safetensors", tmp_path / "out", round_plain=True).path)
    assert LlamaConfig.from_pretrained(directory).dtype == torch.float32


def test_the_streamed_file_is_a_safetensors_file(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(5, dtype=torch.uint8), "a": torch.randn(3, 2), "c": torch.randn(3).bfloat16()}
    tensors["transposed"] = torch.randn(4, 3).T
    specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with SafetensorsFile(tmp_path / "x.safetensors", specs) as file:
        for name, tensor in tensors.items():
            file.write(name, tensor)
    assert {name: tensor.tolist() for name, tensor in load_file(tmp_path / "x.safetensors").items()} == {
        name: tensor.tolist() for name, tensor in tensors.items()
    }
    with safe_open(tmp_path / "x.safetensors", framework="pt") as read:
        assert read.metadata() == {"format": "pt"}


def test_the_streamed_file_insists_on_what_was_announced(tmp_path: Path) -> None:
    specs = {"a": TensorSpec(torch.float32, (2,))}
    with pytest.raises(ValueError, match="announced"), SafetensorsFile(tmp_path / "x", specs) as file:
        file.write("a", torch.zeros(3))
    with pytest.raises(ValueError, match="never written"), SafetensorsFile(tmp_path / "x", specs):
        pass


# ---- refusals: before anything is written ----------------------------------------------------------------------------


def refused(model: Path, names: list[str], output: Path, **options: Any) -> BitconvertError:
    with pytest.raises(BitconvertError) as caught:
        run_pack(model, names, output, **options)
    assert not output.exists() or not list(output.iterdir())
    assert caught.value.hint
    return caught.value


def test_a_half_trained_model_is_refused(tmp_path: Path) -> None:
    error = refused(make_latent(tmp_path / "tiny", lam=0.62), ["tq2_0"], tmp_path / "out", round_plain=True)
    assert "λ = 0.62" in error.message


def test_a_plain_model_needs_round_and_is_told_what_that_does(tmp_path: Path) -> None:
    model = write_model(tmp_path / "tiny", "smollm2")
    error = refused(model, ["tq2_0"], tmp_path / "out")
    assert "--round" in error.hint
    told = Recorder()
    report = run_pack(model, ["tq2_0"], tmp_path / "out", round_plain=True, reporter=told)
    assert report.warnings == told.warnings
    assert "baseline" in report.warnings[0]


def test_texts_that_llama_cpp_reads_otherwise_are_told(tmp_path: Path) -> None:
    told = Recorder()
    model = make_latent(tmp_path / "tiny", variant="tinyllama")
    report = run_pack(model, ["tq2_0"], tmp_path / "out", reporter=told)
    assert report.warnings == told.warnings
    assert "one more space in llama.cpp" in report.warnings[0]
    assert run_pack(model, ["safetensors"], tmp_path / "other").warnings == []  # llama.cpp does not read that


def test_packed_models_are_refused(tmp_path: Path, latent: Path) -> None:
    report = run_pack(latent, ["safetensors", "tq2_0"], tmp_path / "first")
    for file in report.files:
        assert "already packed" in refused(Path(file.path), ["q2_0"], tmp_path / "second").message


def test_weights_that_do_not_fit_their_config_are_refused(tmp_path: Path) -> None:
    model = make_latent(tmp_path / "tiny")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": 4096}))
    error = refused(model, ["tq2_0"], tmp_path / "out")
    assert "tensor model.embed_tokens.weight has shape" in error.message
    assert "4096" in error.message


def test_unknown_names_are_refused_with_the_known_ones(tmp_path: Path, latent: Path) -> None:
    error = refused(latent, ["tq2_0", "q4_0"], tmp_path / "out")
    assert isinstance(error, UsageError)
    assert error.hint == f"formats: {', '.join(FORMATS)}, or all"
    for names in (["tq2_0"], ["all"]):
        assert isinstance(refused(latent, names, tmp_path / "out", embedding_type="q4_0"), UsageError)


def test_what_will_be_refused_is_known_before_the_training(
    tmp_path: Path, latent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny-bitnet").mkdir()
    (tmp_path / "tiny-bitnet" / "thesis.txt").write_text("in the way of nothing: the files go elsewhere")
    monkeypatch.chdir(tmp_path)
    original, formats = open_checkpoint(str(latent)), ("tq2_0", "i2_s", "safetensors")
    assert foresee_refusals(original, Packing(formats=formats), Scaling(estimator="absmean")) == {}
    by_row = foresee_refusals(original, Packing(formats=formats), Scaling(granularity="row"))
    assert by_row.keys() == {"i2_s", "safetensors"}
    with pytest.raises(UsageError, match="unknown embedding type 'q4_0'"):
        foresee_refusals(original, Packing(formats=formats, embedding_type="q4_0"), Scaling(estimator="absmean"))


def test_a_scaling_that_a_format_cannot_hold_is_refused_with_those_that_can(tmp_path: Path) -> None:
    by_row = make_latent(tmp_path / "row", scaling=Scaling(granularity="row"))
    error = refused(by_row, ["tq2_0", "safetensors"], tmp_path / "out")
    assert "one scale per tensor" in error.message
    assert error.hint == "formats that can: tq1_0, tq2_0, q2_0, q8_0, f16, bf16, compressed-tensors, onnx"
    by_group = make_latent(tmp_path / "group", scaling=Scaling(granularity="group:64"))
    error = refused(by_group, ["tq2_0"], tmp_path / "out")
    assert "a group is 64" in error.message
    assert error.hint == "formats that can: q2_0, q8_0, f16, bf16, compressed-tensors, onnx"


def test_rows_that_transformers_cannot_pack_are_refused_by_name(tmp_path: Path) -> None:
    model = make_latent(tmp_path / "tiny", intermediate_size=258)
    error = refused(model, ["tq2_0", "safetensors"], tmp_path / "out")
    assert "model.layers.0.mlp.gate_proj.weight" in error.message
    assert "258 rows" in error.message


def test_groups_that_do_not_divide_a_row_are_refused_by_name(tmp_path: Path) -> None:
    model = make_latent(tmp_path / "tiny", intermediate_size=320, scaling=Scaling(granularity="group:256"))
    assert "down_proj" in refused(model, ["tq2_0"], tmp_path / "out").message


def test_a_missing_tensor_is_refused_by_name(tmp_path: Path) -> None:
    model = make_latent(tmp_path / "tiny")
    edit_weights(model, {"model.layers.1.mlp.up_proj.weight": None})
    assert "model.layers.1.mlp.up_proj.weight is missing" in refused(model, ["tq2_0"], tmp_path / "out").message


@pytest.mark.parametrize("name", ["tq2_0", "safetensors"])
@pytest.mark.parametrize(("value", "told"), [(float("nan"), "NaN"), (1e6, "cannot be stored as float16")])
def test_weights_that_no_file_can_hold_leave_nothing(tmp_path: Path, name: str, value: float, told: str) -> None:
    model = make_latent(tmp_path / "tiny")
    edit_weights(model, {"model.layers.1.mlp.up_proj.weight": torch.full((512, 256), value)})
    error = refused(model, [name], tmp_path / "out")
    assert "model.layers.1.mlp.up_proj.weight" in error.message
    assert told in error.message


def test_an_embedding_that_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    model = make_latent(tmp_path / "tiny")
    edit_weights(model, {"model.embed_tokens.weight": torch.full_like(embedding_of(model), 1e5)})
    assert "--embedding-type f32" in refused(model, ["tq2_0"], tmp_path / "out").hint
    assert pack_one(model, "tq2_0", tmp_path / "out", embedding_type="f32")


@pytest.mark.parametrize("name", ["tq2_0", "safetensors"])
def test_an_output_that_cannot_be_written_is_named(tmp_path: Path, latent: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BitconvertError, match="cannot be written"):
        run_pack(latent, [name], tmp_path / "file" / "out")


# ---- nothing half-written, nothing wrongly written -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tq2_0", "safetensors"])
def test_an_interruption_leaves_nothing(tmp_path: Path, latent: Path, name: str) -> None:
    class Impatient(Silent):
        def advance(self, done: int, total: int) -> None:
            if done > total / 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_pack(latent, [name], tmp_path, reporter=Impatient())
    assert list(tmp_path.iterdir()) == []


def flip_a_byte(data: bytearray) -> None:
    data[len(data) // 2] ^= 0xFF


@pytest.mark.parametrize("victim", ["token_embd.weight", "blk.1.ffn_down.weight", "output_norm.weight"])
@pytest.mark.parametrize("name", ["tq1_0", "tq2_0", "q2_0"])
def test_a_flipped_byte_in_a_gguf_file_is_noticed(
    tmp_path: Path, latent: Path, monkeypatch: pytest.MonkeyPatch, name: str, victim: str
) -> None:
    write = GgufContainer.write

    def write_badly(self: GgufContainer, data: np.ndarray[Any, Any]) -> None:
        if self._announced[self._written][0] == victim:
            damaged = bytearray(data.tobytes())
            flip_a_byte(damaged)
            data = np.frombuffer(bytes(damaged), data.dtype).reshape(data.shape)
        write(self, data)

    monkeypatch.setattr(GgufContainer, "write", write_badly)
    assert f"tensor {victim} does not read back" in refused(latent, [name], tmp_path / "out").message


@pytest.mark.parametrize("victim", ["embed_tokens.weight", "1.mlp.down_proj.weight", "1.mlp.down_proj.weight_scale"])
def test_a_flipped_byte_in_safetensors_is_noticed(
    tmp_path: Path, latent: Path, monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    write = SafetensorsFile.write

    def write_badly(self: SafetensorsFile, name: str, tensor: Tensor) -> None:
        if name.endswith(victim):
            damaged = bytearray(tensor.numpy().tobytes())
            flip_a_byte(damaged)
            tensor = torch.frombuffer(damaged, dtype=tensor.dtype).view(tensor.shape)
        write(self, name, tensor)

    monkeypatch.setattr(SafetensorsFile, "write", write_badly)
    assert "does not read back" in refused(latent, ["safetensors"], tmp_path / "out").message


def test_a_wrong_encoder_is_noticed(tmp_path: Path, latent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = HfBitnet.encode
    monkeypatch.setattr(HfBitnet, "encode", lambda self, ternary: right(self, ternary._replace(codes=-ternary.codes)))
    assert "does not read back" in refused(latent, ["safetensors"], tmp_path / "out").message
