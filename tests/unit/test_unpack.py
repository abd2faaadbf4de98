"""The way back: what packed files mean, as floats that can be evaluated, trained on and packed to the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitNetQuantConfig, LlamaForCausalLM
from transformers.integrations.bitnet import WeightQuant, pack_weights, replace_with_bitnet_linear

from bitconvert.errors import BitconvertError, UsageError
from bitconvert.evaluation.subjects import llama_cpp_subject
from bitconvert.models.checkpoint import open_checkpoint
from bitconvert.models.gguf_types import Q2_0, TQ1_0, TQ2_0, GgufType, register_q2_0
from bitconvert.models.latent import ONLINE_BITNET, claims_bitnet
from bitconvert.models.lineage import Lineage
from bitconvert.models.packed import unpack_bitnet
from bitconvert.models.safetensors_file import SafetensorsFile
from bitconvert.packing.formats import FORMATS
from bitconvert.packing.pack import pack
from bitconvert.packing.unpack import unpack
from bitconvert.recipe import Packing, Scaling, load_recipe
from bitconvert.report.packing import PackedFile, UnpackReport
from bitconvert.report.reporter import Silent
from bitconvert.ternary.bitlinear import bitlinears
from bitconvert.ternary.quantize import ternarize
from bitconvert.training.student import require_trainable
from bitconvert.training.warmup import warmup
from tests.models import VARIANTS, write_gguf, write_model
from tests.packed import free
from tests.recipes import FROM_THE_ORIGINAL
from tests.recording import Recorder

TOKENS = torch.arange(3, 60).view(1, -1)
READ_BACK = [name for name in FORMATS if name != "onnx"]
A_LINEAR = "model.layers.0.mlp.up_proj.weight"


def latent(directory: Path, variant: str = "smollm2", scaling: Scaling | None = None, **options: Any) -> Path:
    """A tiny random model as warmup leaves it behind."""
    write_model(directory, variant, **options)
    lineage = Lineage(source="owner/original", lam=1.0, scaling=scaling or Scaling(), tokens_seen=7)
    lineage.save(directory)
    if claims_bitnet(lineage):
        edit(directory, {"quantization_config": ONLINE_BITNET})
    return directory


def packed(model: Path, form: str, output: Path, **options: Any) -> PackedFile:
    packing = Packing(formats=(form,), **options)
    return pack(open_checkpoint(str(model)), packing, free(output), reporter=Silent()).files[0]


def unpacked(model: Path | str, output: Path) -> UnpackReport:
    return unpack(open_checkpoint(str(model)), output, reporter=Silent())


def content(path: Path) -> dict[str, bytes]:
    """Every byte of an output, whatever it is called."""
    files = [path] if path.is_file() else sorted(path.iterdir())
    return {"" if path.is_file() else file.name: file.read_bytes() for file in files}


def weights(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "model.safetensors")


def edit(directory: Path, config: dict[str, Any] | None = None, **tensors: Tensor | None) -> None:
    """Change a directory's tensors (None removes one; '__' stands for a dot) and keys of its config."""
    state = weights(directory) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    kept = {name: tensor.contiguous() for name, tensor in state.items() if tensor is not None}
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **(config or {})}))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    with torch.compiler.set_stance("force_eager"):
        found: Tensor = model(TOKENS, use_cache=False).logits
    return found


def stock(directory: Path, **options: Any) -> nn.Module:
    with torch.compiler.set_stance("force_eager"):
        model: nn.Module = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options)
    return nn.Module.float(model).eval()  # bfloat16 buffers keep their dtype otherwise


def distance(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@torch.no_grad()
def assert_same_model(ours: nn.Module, theirs: nn.Module) -> None:
    """Each linear computes the same; in the logits a few activations round the other way."""
    for name, module in ours.named_modules():
        if name.endswith("_proj"):
            x = torch.randn(1, 5, module.in_features)
            with torch.compiler.set_stance("force_eager"):
                assert distance(module(x), theirs.get_submodule(name)(x)) < 1e-6, name
    assert distance(logits(ours), logits(theirs)) < 0.02


# ---- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["tensor", "row", "group:64", "group:256"])
@pytest.mark.parametrize("form", READ_BACK)
def test_packing_again_gives_the_same_bytes(tmp_path: Path, form: str, granularity: str) -> None:
    scaling = Scaling(estimator="mse", granularity=granularity)
    if FORMATS[form].refusal(scaling):
        pytest.skip("this format has no place for these scales")
    first = Path(packed(latent(tmp_path / "tiny", scaling=scaling), form, tmp_path).path)
    report = unpacked(first, tmp_path / "elsewhere")
    assert report.scaling == f"mse per {granularity}"
    second = Path(packed(tmp_path / "elsewhere", form, tmp_path / "again").path)
    assert content(second) == content(first)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_family_tokenizer_and_rope_comes_back(tmp_path: Path, variant: str) -> None:
    model = latent(tmp_path / "tiny", variant, layers=1)
    for form in ("tq2_0", "safetensors"):
        first = Path(packed(model, form, tmp_path, embedding_type="f32").path)
        unpacked(first, tmp_path / form)
        second = Path(packed(tmp_path / form, form, tmp_path / "again", embedding_type="f32").path)
        assert content(second) == content(first)
    from_gguf, from_safetensors = (logits(stock(tmp_path / form)) for form in ("tq2_0", "safetensors"))
    assert distance(from_gguf, from_safetensors) < 1e-5


@pytest.mark.parametrize("columns", [576, 544, 520])  # rows for Q2_0, Q8_0, F16
def test_fallbacks_are_ternary_too(tmp_path: Path, columns: int) -> None:
    model = latent(tmp_path / "tiny", layers=1, intermediate_size=columns)
    first = Path(packed(model, "tq2_0", tmp_path, embedding_type="q8_0").path)
    unpacked(first, tmp_path / "baked")
    second = Path(packed(tmp_path / "baked", "tq2_0", tmp_path / "again", embedding_type="q8_0").path)
    assert content(second) == content(first)


def test_all_formats_and_the_latents_mean_the_same_weights(tmp_path: Path) -> None:
    model = latent(tmp_path / "tiny", padding_rows=0)
    unpacked(model, tmp_path / "latent")
    meant = weights(tmp_path / "latent")
    rounded = ternarize(weights(model)[A_LINEAR], Scaling()).with_fp16_scale().dequantize()
    assert torch.equal(meant[A_LINEAR], rounded)
    for form in READ_BACK:
        unpacked(packed(model, form, tmp_path / "out").path, tmp_path / form)
        found = weights(tmp_path / form)
        assert found.keys() == meant.keys()
        rounding = 2**-8 if form == "bf16" else 0  # the one format whose numbers are coarser than a float16 scale
        for name, value in meant.items():
            if name.endswith("proj.weight"):
                torch.testing.assert_close(found[name], value, rtol=rounding, atol=0)


def test_the_models_name_survives_that_of_its_file(tmp_path: Path) -> None:
    file = Path(packed(latent(tmp_path / "my model"), "tq2_0", tmp_path).path).rename(tmp_path / "downloaded.gguf")
    unpacked(file, tmp_path / "x")
    again = packed(tmp_path / "x", "tq2_0", tmp_path)
    assert Path(again.path).name == "x-TQ2_0.gguf"
    assert gguf.GGUFReader(again.path).fields["general.name"].contents() == "my model"


def test_the_directory_is_a_plain_model_to_stock_transformers(tmp_path: Path) -> None:
    file = packed(latent(tmp_path / "tiny"), "tq2_0", tmp_path)
    unpacked(file.path, tmp_path / "baked")
    model = stock(tmp_path / "baked")
    assert type(model.get_submodule("model.layers.0.mlp.up_proj")) is nn.Linear
    assert {path.name for path in (tmp_path / "baked").iterdir()} == {
        "SHA256SUMS",
        "baked.json",
        "bitconvert.json",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((tmp_path / "baked" / "config.json").read_text())
    assert list(config) == sorted(config)
    expected = stock(Path(file.path).parent, gguf_file=Path(file.path).name)  # transformers' own reader
    assert torch.equal(logits(model), logits(expected))


def test_eval_means_the_same_model_as_the_packed_directory(tmp_path: Path) -> None:
    file = packed(latent(tmp_path / "tiny"), "safetensors", tmp_path)
    unpacked(file.path, tmp_path / "baked")
    checkpoint = open_checkpoint(str(tmp_path / "baked"))
    ours = checkpoint.load()
    assert checkpoint.kind == "baked"
    assert all(module.weight is None and module.activation_block is None for module in bitlinears(ours))
    assert torch.equal(logits(ours), logits(open_checkpoint(file.path).load()))
    assert_same_model(ours, stock(Path(file.path)))


# ---- other people's files --------------------------------------------------------------------------------------------


def foreign_bitnet(directory: Path, linear_class: str, *, codes: str, dtype: torch.dtype = torch.float32) -> Path:
    """A model with biases as other programs pack it: transformers' own packing, scales and saving."""
    write_model(directory, "biased", padding_rows=0)
    state: dict[str, Tensor] = {}
    for name, value in weights(directory).items():
        state[name] = value.to(dtype)
        if name.endswith("proj.weight"):
            scale = value.abs().mean().clamp(min=1e-5).reshape(1)
            ternary = (value / scale).round().clamp(-1, 1)
            state[name] = pack_weights(ternary) if codes == "packed" else ternary.to(dtype)
            state[f"{name}_scale"] = (1 / scale if linear_class == "bitlinear" else scale).to(dtype)
    quantization = {"quant_method": "bitnet", "linear_class": linear_class, "quantization_mode": "offline"}
    edit(directory, {"quantization_config": quantization}, **state)
    return directory


@pytest.mark.parametrize(
    ("linear_class", "codes", "dtype"),
    [
        ("bitlinear", "packed", torch.float32),
        ("bitlinear", "packed", torch.bfloat16),
        ("autobitlinear", "packed", torch.float32),
        ("autobitlinear", "float", torch.float32),
        ("autobitlinear", "float", torch.bfloat16),
    ],
)
def test_bitnet_directories_of_others(tmp_path: Path, linear_class: str, codes: str, dtype: torch.dtype) -> None:
    source = foreign_bitnet(tmp_path / "theirs", linear_class, codes=codes, dtype=dtype)
    theirs = stock(source)
    report = unpacked(source, tmp_path / "baked")
    assert (report.kind, report.scaling) == ("packed", "absmean per tensor")
    assert report.formats == list(FORMATS)
    for name in (source, tmp_path / "baked"):
        assert_same_model(open_checkpoint(str(name)).load(), theirs)
    assert "quantization_config" not in json.loads((tmp_path / "baked" / "config.json").read_text())


def test_codes_that_transformers_saves_as_floats(tmp_path: Path) -> None:
    """transformers cannot save what it has loaded from packed codes; its layers with codes in them, it can."""
    source = foreign_bitnet(tmp_path / "theirs", "autobitlinear", codes="float")
    config = LlamaForCausalLM.config_class.from_pretrained(source)
    quantization = BitNetQuantConfig(linear_class="autobitlinear", modules_to_not_convert=["lm_head"])
    del config.quantization_config
    model = replace_with_bitnet_linear(LlamaForCausalLM(config), ["lm_head"], quantization)
    model.to_empty(device="cpu").load_state_dict(weights(source), assign=True)
    model.config.quantization_config = quantization
    model.save_pretrained(tmp_path / "saved")
    open_checkpoint(str(source)).tokenizer().save_pretrained(tmp_path / "saved")
    for name in ("theirs", "saved"):
        unpacked(tmp_path / name, tmp_path / f"{name}-baked")
    assert weights(tmp_path / "saved").keys() == weights(source).keys()
    assert (
        content(tmp_path / "saved-baked")["model.safetensors"]
        == content(tmp_path / "theirs-baked")["model.safetensors"]
    )


def test_a_linear_that_was_left_out_is_evaluated_as_it_is_and_not_unpacked(tmp_path: Path) -> None:
    source = foreign_bitnet(tmp_path / "theirs", "bitlinear", codes="packed")
    config = json.loads((source / "config.json").read_text())["quantization_config"]
    latents = torch.randn(512, 256) / 16
    config["modules_to_not_convert"] = ["lm_head", A_LINEAR.removesuffix(".weight")]
    edit(source, {"quantization_config": config}, **{A_LINEAR: latents, f"{A_LINEAR}_scale": None})
    assert_same_model(open_checkpoint(str(source)).load(), stock(source))
    with pytest.raises(BitconvertError, match=rf"tensor {A_LINEAR} \(F32\) is not ternary"):
        unpacked(source, tmp_path / "baked")


def test_online_latents_are_rounded_as_transformers_rounds_them(tmp_path: Path) -> None:
    source = write_model(tmp_path / "theirs", "smollm2", padding_rows=0)
    online = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
    edit(source, {"quantization_config": online})
    told = Recorder()
    report = unpack(open_checkpoint(str(source)), tmp_path / "baked", reporter=told)
    assert (report.kind, report.scaling) == ("latent", "absmean per tensor")
    assert "to train on, start from" in told.notes[0]
    with torch.compiler.set_stance("force_eager"):
        theirs = WeightQuant.apply(weights(source)[A_LINEAR])
    ours = weights(tmp_path / "baked")[A_LINEAR]
    assert torch.equal(ours.sign(), theirs.sign())
    assert torch.equal(ours.abs().max(), theirs.abs().max().half().float())  # the scale as every file holds it


@pytest.mark.parametrize(("kind", "granularity"), [(TQ1_0, 256), (TQ2_0, 256), (Q2_0, 64)])
def test_gguf_files_of_others_with_scales_of_their_own(tmp_path: Path, kind: GgufType, granularity: int) -> None:
    register_q2_0()
    source = write_gguf(write_model(tmp_path / "latents", "llama3", padding_rows=0), tmp_path / "theirs.gguf", kind)
    told = Recorder()
    report = unpack(open_checkpoint(str(source)), tmp_path / "baked", reporter=told)
    assert report.scaling == f"absmean per group:{granularity}"
    assert "round them in blocks" in told.notes[0]
    expected = stock(tmp_path, gguf_file=source.name)  # dequantized by gguf-py, through transformers' own reader
    assert torch.equal(weights(tmp_path / "baked")[A_LINEAR], expected.get_parameter(A_LINEAR))
    again = packed(tmp_path / "baked", kind.name.lower(), tmp_path / "out")
    before, after = gguf.GGUFReader(source).tensors, gguf.GGUFReader(again.path).tensors
    stored = {tensor.name: tensor.data.tobytes() for tensor in after}
    linears = [tensor for tensor in before if ".attn_" in tensor.name or ".ffn_" in tensor.name]
    assert all(stored[tensor.name] == tensor.data.tobytes() for tensor in linears)


def test_llama_cpp_computes_what_the_unpacked_directory_means(tmp_path: Path) -> None:
    source = write_gguf(write_model(tmp_path / "latents", "smollm2", padding_rows=0), tmp_path / "their.gguf", TQ2_0)
    unpacked(source, tmp_path / "baked")
    ours = logits(open_checkpoint(str(tmp_path / "baked")).load())
    with llama_cpp_subject(open_checkpoint(str(source)), context=128, threads=1) as theirs:
        assert (
            distance(ours[:, -2:-1], next(theirs.predict(TOKENS, 1))[None]) < 0.06
        )  # int8 per token here, per 256 there


def test_fused_projections_stay_fused(tmp_path: Path) -> None:
    source = write_gguf(write_model(tmp_path / "latents", "phi3", padding_rows=0), tmp_path / "theirs.gguf", TQ2_0)
    assert unpacked(source, tmp_path / "baked").scaling == "absmean per group:256"
    assert "model.layers.0.self_attn.qkv_proj.weight" in weights(tmp_path / "baked")
    stored = {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(source).tensors}
    for tensor in gguf.GGUFReader(packed(tmp_path / "baked", "tq2_0", tmp_path).path).tensors:
        if ".attn_qkv." in tensor.name or ".ffn_up." in tensor.name:
            assert tensor.data.tobytes() == stored[tensor.name]


def test_the_licence_of_a_model_without_lineage_survives(tmp_path: Path) -> None:
    source = write_model(tmp_path / "latents", "smollm2")
    (source / "README.md").write_text("---\nlicense: mit\n---\n")
    theirs = write_gguf(source, tmp_path / "theirs.gguf", TQ2_0)
    unpacked(theirs, tmp_path / "baked")
    again = packed(tmp_path / "baked", "tq2_0", tmp_path / "out")
    assert gguf.GGUFReader(again.path).fields["general.license"].contents() == "mit"


def test_a_card_does_not_call_the_models_of_others_rounded(tmp_path: Path) -> None:
    source = write_gguf(write_model(tmp_path / "latents", "smollm2"), tmp_path / "theirs.gguf", TQ2_0)
    unpacked(source, tmp_path / "baked")
    packed(tmp_path / "baked", "tq2_0", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"Made from {source.name} by" in card
    assert "rounding alone" not in card


@pytest.mark.parametrize("granularity", ["tensor", "row", "group:128", "group:32"])
def test_floats_that_are_ternary_tell_what_shares_a_scale(tmp_path: Path, granularity: str) -> None:
    source = write_model(tmp_path / "theirs", "smollm2")
    linears = {name: value for name, value in weights(source).items() if name.endswith("proj.weight")}
    baked = {name: ternarize(value, Scaling(granularity=granularity)).dequantize() for name, value in linears.items()}
    edit(source, **baked)
    assert unpacked(source, tmp_path / "baked").scaling == f"absmean per {granularity}"
    assert torch.equal(weights(tmp_path / "baked")[A_LINEAR], baked[A_LINEAR])


def test_every_scale_that_formats_hold_survives_its_inverse() -> None:
    halves = torch.arange(1, 0x7C00, dtype=torch.int16).view(torch.float16).float()
    for scale in halves[halves > 1e-5][::7]:
        beside = (1 / scale).reshape(1)
        found = unpack_bitnet(torch.zeros(1, 1), beside, {"quantization_config": {}})
        assert found.scale == scale


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_a_model_that_is_not_ternary_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    plain = write_model(tmp_path / "plain", "smollm2")
    q4_1 = GgufType("Q4_1", 3, 3, 32, 20)
    for source, kind in ((plain, "F32"), (write_gguf(plain, tmp_path / "plain.gguf", q4_1), "Q4_1")):
        with pytest.raises(BitconvertError, match=rf"proj\.weight \({kind}\) is not ternary"):
            unpacked(source, tmp_path / "baked")
    assert {path.name for path in tmp_path.iterdir()} == {"plain", "plain.gguf"}


def test_a_q2_0_block_with_its_fourth_value_is_not_ternary(tmp_path: Path) -> None:
    source = write_gguf(write_model(tmp_path / "plain", "smollm2"), tmp_path / "theirs.gguf", Q2_0)
    tensor = next(t for t in gguf.GGUFReader(source).tensors if t.name == "blk.1.ffn_up.weight")
    with source.open("r+b") as file:
        file.seek(tensor.data_offset + 2)
        file.write(b"\xff")
    with pytest.raises(BitconvertError, match=r"model\.layers\.1\.mlp\.up_proj\.weight \(Q2_0\) is not ternary"):
        unpacked(source, tmp_path / "baked")


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (A_LINEAR, torch.full((512, 256), 0.5), f"tensor {A_LINEAR}: it holds other values than -1, 0 and 1"),
        (f"{A_LINEAR}_scale", torch.ones(512, 1), r"its scale has shape \(512, 1\)"),
        (f"{A_LINEAR}_scale", None, "is not ternary"),
        (f"{A_LINEAR}_scale", torch.tensor([float("nan")]), "NaN or infinity"),
        ("lm_head.weight_scale", torch.ones(1), "tensor lm_head.weight_scale has no place"),
        (A_LINEAR.replace("up_proj", "up_proj.rms_norm"), torch.ones(256), "has no place in the model"),
    ],
)
def test_damaged_bitnet_directories(tmp_path: Path, name: str, tensor: Tensor | None, message: str) -> None:
    source = foreign_bitnet(tmp_path / "theirs", "autobitlinear", codes="float")
    weight = weights(source)[A_LINEAR] * (2 if "is not ternary" in message else 1)
    weight[0, 0] = 1
    edit(source, **{A_LINEAR: weight, name: tensor})
    with pytest.raises(BitconvertError, match=message):
        unpacked(source, tmp_path / "baked")


def test_a_norm_inside_the_linears_is_refused_by_name(tmp_path: Path) -> None:
    source = write_model(tmp_path / "theirs", "smollm2")
    edit(source, {"quantization_config": {"quant_method": "bitnet", "use_rms_norm": True}})
    with pytest.raises(BitconvertError, match="use_rms_norm puts a norm before every linear layer"):
        open_checkpoint(str(source))


def test_a_model_on_its_way_to_ternary_is_refused(tmp_path: Path) -> None:
    source = write_model(tmp_path / "half", "smollm2")
    Lineage(source="x", lam=0.5, scaling=Scaling(), tokens_seen=7).save(source)
    with pytest.raises(BitconvertError, match="its training stopped at λ = 0.5"):
        unpacked(source, tmp_path / "baked")


def test_what_does_not_read_back_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = packed(latent(tmp_path / "tiny"), "tq2_0", tmp_path)
    write = SafetensorsFile.write
    monkeypatch.setattr(SafetensorsFile, "write", lambda self, name, tensor: write(self, name, tensor * 2))
    with pytest.raises(BitconvertError, match="does not read back as it was written"):
        unpacked(file.path, tmp_path / "baked")
    assert not (tmp_path / "baked").exists()


def test_the_current_directory_is_not_pulled_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = packed(latent(tmp_path / "tiny"), "tq2_0", tmp_path)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for here in (Path(), tmp_path / "empty"):
        with pytest.raises(UsageError, match="holds the directory that you are in"):
            unpacked(file.path, here)


def test_baked_weights_that_have_moved_are_not_packed(tmp_path: Path) -> None:
    unpacked(latent(tmp_path / "tiny"), tmp_path / "baked")
    moved = weights(tmp_path / "baked")[A_LINEAR]
    moved[3, 5] += 0.001
    edit(tmp_path / "baked", **{A_LINEAR: moved})
    with pytest.raises(BitconvertError, match=f"tensor {A_LINEAR} is not ternary with one scale per tensor"):
        packed(tmp_path / "baked", "tq2_0", tmp_path)
    (tmp_path / "baked" / "baked.json").write_text("{}")
    with pytest.raises(BitconvertError, match=r"baked\.json: not a baked record"):
        open_checkpoint(str(tmp_path / "baked"))


# ---- training on -----------------------------------------------------------------------------------------------------

SMALL = ("training.context=32", "training.batch_size=2", "training.tokens=256", "data.held_out_tokens=64")
ON = (*FROM_THE_ORIGINAL, "lam.curve=instant", "distill.kl=0")


def test_a_baked_model_is_trained_on_as_the_ternary_model_that_it_is(tmp_path: Path, story: Path) -> None:
    scaling = Scaling(granularity="row")
    file = packed(latent(tmp_path / "tiny", scaling=scaling), "tq2_0", tmp_path)
    unpacked(file.path, tmp_path / "baked")
    options = (*SMALL, *ON, f"data.sources=[{story}]", "scaling.granularity=row", "scaling.estimator=mse")
    recipe = load_recipe(None, [*options, "optimizer.lr=1e-3"])
    report = warmup(str(tmp_path / "baked"), tmp_path / "on", recipe, reporter=Silent())
    assert report.original_ppl == report.rounded_ppl  # the ternary model, not what it would be with float activations
    assert report.held_out_ppl < report.original_ppl
    assert packed(tmp_path / "on", "tq2_0", tmp_path / "out").nbytes


def test_only_mse_keeps_the_scale_of_baked_weights_that_have_moved() -> None:
    baked = ternarize(torch.randn(64, 256), Scaling(granularity="row")).dequantize()
    moved = baked + 1e-4 * torch.randn(64, 256)
    before = baked.abs().amax(dim=-1, keepdim=True)
    for estimator, kept in (("mse", True), ("absmean", False)):
        scale = ternarize(moved, Scaling(estimator=estimator, granularity="row")).scale
        assert torch.allclose(scale, before, rtol=0.001) == kept


@pytest.mark.parametrize("kind", ["latent", "baked"])
def test_a_ternary_model_is_no_original(tmp_path: Path, story: Path, kind: str) -> None:
    source = latent(tmp_path / "latent", scaling=Scaling(estimator="absmean", granularity="row"))
    unpacked(source, tmp_path / "baked")
    recipe = load_recipe(None, [*FROM_THE_ORIGINAL, *SMALL, "control=true"])
    with pytest.raises(BitconvertError, match="ternary already" if kind == "baked" else "was warmed up already") as no:
        require_trainable(open_checkpoint(str(tmp_path / kind)), recipe)
    estimator = " --set scaling.estimator=mse" if kind == "baked" else ""
    assert no.value.hint.endswith(
        "--set control=False --set lam.curve=instant --set distill.kl=0.0 --set scaling.granularity=row"
        f"{estimator} --data TEXT"
    )
    told = [word for word in no.value.hint.split() if "=" in word]
    require_trainable(
        open_checkpoint(str(tmp_path / kind)),
        load_recipe(None, [*FROM_THE_ORIGINAL, *SMALL, *told, f"data.sources=[{story}]"]),
    )
