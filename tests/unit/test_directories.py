"""Directories of safetensors: compressed-tensors for stock transformers and our own reader; shards; mlx-lm's rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from bitconvert.errors import BitconvertError
from bitconvert.evaluation.inspect import inspect
from bitconvert.models.checkpoint import open_checkpoint
from bitconvert.models.safetensors_file import TensorSpec
from bitconvert.packing.shards import Shards
from bitconvert.ternary.bitlinear import bitlinears
from tests.packed import baked, make_checkpoint, pack_directory, ternary_weights

DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    return pack_directory(tiny, "compressed-tensors", tmp_path_factory.mktemp("packed"))


def tokens(batch: int = 2, length: int = 24) -> Tensor:
    return torch.randint(0, 300, (batch, length), generator=torch.Generator().manual_seed(0))


def all_tensors(directory: Path) -> dict[str, Tensor]:
    return {name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()}


def edit_tensors(directory: Path, **edits: Tensor) -> None:
    """Replace parts of one weight, by suffix."""
    weights = load_file(directory / "model.safetensors")
    weights |= {f"{DOWN}.{suffix}": value for suffix, value in edits.items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


# ---- compressed-tensors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "granularity", "options"),
    [
        ("smollm2", "tensor", {}),
        ("llama2", "row", {"intermediate_size": 520}),  # rows that end within a word
        ("biased", "group:64", {"max_shard_size": 300_000}),
    ],
)
def test_stock_transformers_computes_the_baked_model_from_compressed_tensors(
    tmp_path: Path, variant: str, granularity: str, options: dict[str, int]
) -> None:
    shape = {key: value for key, value in options.items() if key == "intermediate_size"}
    model = make_checkpoint(tmp_path / "tiny", variant, granularity, **shape)
    packing = {key: value for key, value in options.items() if key == "max_shard_size"}
    directory = pack_directory(model, "compressed-tensors", tmp_path / "out", **packing)
    assert directory.name == "tiny-compressed-tensors"
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    assert loaded.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens()).logits, baked(model)(tokens()).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("granularity", "strategy", "group"), [("row", "channel", None), ("group:32", "group", 32)])
def test_the_config_is_what_compressed_tensors_means(
    tmp_path: Path, granularity: str, strategy: str, group: int | None
) -> None:
    model = make_checkpoint(tmp_path / "tiny", granularity=granularity)
    directory = pack_directory(model, "compressed-tensors", tmp_path / "out")
    config = json.loads((directory / "config.json").read_text())
    meant = QuantizationConfig.model_validate(config["quantization_config"])
    (scheme,) = meant.config_groups.values()
    assert (meant.format, meant.ignore, scheme.targets) == ("pack-quantized", ["lm_head"], ["Linear"])
    assert (scheme.weights.num_bits, scheme.weights.symmetric) == (2, True)
    assert (scheme.weights.strategy, scheme.weights.group_size) == (strategy, group)
    assert scheme.input_activations is None
    columns = json.loads((model / "config.json").read_text())["intermediate_size"]
    scale = all_tensors(directory)[f"{DOWN}.weight_scale"]
    assert scale.shape == (256, columns // group if group else 1)


def test_our_reader_gives_the_same_weights_and_float_activations(tiny: Path, compressed: Path) -> None:
    checkpoint = open_checkpoint(str(compressed))
    assert checkpoint.kind == "packed"
    model, reference = checkpoint.load(), baked(tiny)
    assert not bitlinears(model)
    for name, weight in reference.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight + 0.0), name
    with pytest.raises(BitconvertError, match="packed ternary codes"):
        checkpoint.load_latent()
    with pytest.raises(BitconvertError, match="already packed"):
        pack_directory(compressed, "tq2_0", compressed.parent / "again")


def test_inspect_tells_codes_and_scales_of_compressed_tensors(tiny: Path, compressed: Path) -> None:
    report = inspect(str(compressed))
    told = {tensor.name: tensor for tensor in report.tensors}
    assert set(told) == set(open_checkpoint(str(tiny)).tensor_names()) - {"lm_head.weight"}
    weight = ternary_weights(open_checkpoint(str(tiny)))[f"{DOWN}.weight"]
    down = told[f"{DOWN}.weight"]
    assert (down.type, down.shape) == ("I32, packed ternary", tuple(weight.shape))
    assert down.scale is not None
    assert down.scale.max == weight.max().item()
    assert down.zero_fraction == pytest.approx((weight == 0).float().mean().item())


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("weight_shape", torch.tensor([2**40, 512])),
        ("weight_shape", torch.tensor([256, 513])),
        ("weight_shape", torch.tensor([256])),
        ("weight_scale", torch.ones(256, 3)),
        ("weight_scale", torch.ones(255, 1)),
        ("weight_packed", torch.zeros(256, 32, dtype=torch.int32)),  # every code is -2
        ("weight_packed", torch.zeros(256, 32)),
    ],
)
def test_a_damaged_weight_is_refused_by_name(tmp_path: Path, tiny: Path, part: str, value: Tensor) -> None:
    directory = pack_directory(tiny, "compressed-tensors", tmp_path)
    edit_tensors(directory, **{part: value})
    with pytest.raises(BitconvertError, match=rf"tensor {DOWN}\.weight"):
        open_checkpoint(str(directory)).load()


@pytest.mark.parametrize(
    "change",
    [
        {"format": "int-quantized"},
        {"config_groups": {}},
        {"config_groups": {"group_0": {"weights": {"num_bits": 4, "symmetric": True}}}},
        {"config_groups": {"group_0": {"weights": {"num_bits": 2, "symmetric": False}}}},
        {"config_groups": {"group_0": {"weights": {"num_bits": 2, "symmetric": True}, "input_activations": {"a": 1}}}},
    ],
)
def test_what_compressed_tensors_can_also_mean_is_refused(tmp_path: Path, tiny: Path, change: dict[str, Any]) -> None:
    directory = pack_directory(tiny, "compressed-tensors", tmp_path)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] |= change
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(BitconvertError, match=r"already quantized \(compressed-tensors\)"):
        open_checkpoint(str(directory))


# ---- shards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["safetensors", "compressed-tensors"])
def test_shards_hold_what_one_file_holds(tmp_path: Path, tiny: Path, name: str) -> None:
    whole = pack_directory(tiny, name, tmp_path / "whole")
    directory = pack_directory(tiny, name, tmp_path / "split", max_shard_size="250kB")
    files = sorted(directory.glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))
    ]
    assert len(files) >= 3
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    held = {file.name: load_file(file) for file in files}
    assert index["weight_map"] == {tensor: file for file, tensors in held.items() for tensor in tensors}
    sizes = {file: [value.nbytes for value in tensors.values()] for file, tensors in held.items()}
    assert index["metadata"]["total_size"] == sum(sum(sizes[file]) for file in sizes)
    assert all(sum(size) <= 250_000 or len(size) == 1 for size in sizes.values())
    assert max(len(size) for size in sizes.values()) > 1
    one_file, shards = all_tensors(whole), all_tensors(directory)
    assert one_file.keys() == shards.keys()
    assert all(one_file[key].dtype == shards[key].dtype and torch.equal(one_file[key], shards[key]) for key in shards)
    for read in (lambda path: open_checkpoint(str(path)).load(), AutoModelForCausalLM.from_pretrained):
        expected, loaded = read(whole).state_dict(), read(directory).state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in expected.items())


def test_a_model_below_the_limit_stays_one_file(tmp_path: Path, tiny: Path) -> None:
    directory = pack_directory(tiny, "safetensors", tmp_path, max_shard_size="1GB")
    assert [file.name for file in directory.glob("model*")] == ["model.safetensors"]


def test_a_tensor_that_is_never_written_leaves_no_index(tmp_path: Path) -> None:
    specs = {name: TensorSpec(torch.float32, (8,)) for name in "ab"}
    with pytest.raises(ValueError, match="tensor b was never written"), Shards(tmp_path, specs, 32) as shards:
        shards.write("a", torch.zeros(8))
    assert not (tmp_path / "model.safetensors.index.json").exists()


# ---- mlx-lm ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["smollm2", "llama3", "linear", "biased"])
@pytest.mark.parametrize("limit", [None, 300_000])
def test_the_directory_keeps_mlx_lms_rules(tmp_path: Path, variant: str, limit: int | None) -> None:
    """What mlx-lm 0.32 reads, where it would fail or, worse, compute something else."""
    model = make_checkpoint(tmp_path / "tiny", variant)
    directory = pack_directory(model, "safetensors", tmp_path / "out", max_shard_size=limit)
    config = json.loads((directory / "config.json").read_text())
    source = open_checkpoint(str(model)).complete
    stored = {  # utils.load_model takes model*.safetensors and no other name
        name: value for file in directory.glob("model*.safetensors") for name, value in load_file(file).items()
    }

    # bitlinear_layers.bitnet_quantize swaps every nn.Linear whose full name is not listed, and divides by the scale
    # unless the class is autobitlinear.
    quantization = config["quantization_config"]
    assert quantization["quant_method"] == "bitnet"
    assert quantization["modules_to_not_convert"] == ["lm_head"]
    assert quantization["linear_class"] != "autobitlinear"
    expected = ternary_weights(open_checkpoint(str(model)))
    for name, weight in expected.items():
        packed, scale = stored[name], stored[f"{name}_scale"]
        assert packed.dtype == torch.uint8
        assert packed.shape == ((weight.shape[0] + 3) // 4, weight.shape[1])
        assert scale.shape == (1,)  # BitLinear.weight_scale is an array of one
        codes = torch.cat([(packed >> 2 * row & 3).float() - 1 for row in range(4)])  # as its Metal kernel walks them
        torch.testing.assert_close(codes / scale, weight, rtol=1e-6, atol=0)

    # BitLinear asserts that its input has the scale's dtype: embedding, norms and biases must have it too.
    floats = {value.dtype for name, value in stored.items() if value.is_floating_point()}
    assert floats == {torch.float32}

    # models/llama.py: ModelArgs reads the rope at the top level; a missing tie_word_embeddings would mean tied.
    assert config["rope_theta"] == source.rope_parameters["rope_theta"]
    if source.rope_parameters["rope_type"] == "default":
        assert config.get("rope_scaling") is None
    else:
        assert {**config["rope_scaling"], "rope_theta": config["rope_theta"]} == source.rope_parameters
    assert config["tie_word_embeddings"] == source.tie_word_embeddings == ("lm_head.weight" not in stored)
    needed = ("model_type", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")
    assert all(key in config for key in (*needed, "num_key_value_heads", "rms_norm_eps", "vocab_size"))
    assert config.get("attention_bias", False) == any("self_attn.q_proj.bias" in name for name in stored)
    assert config.get("mlp_bias", False) == any("mlp.up_proj.bias" in name for name in stored)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["smollm2", "llama3", "linear", "biased", "falcon3"])
def test_mlx_lm_computes_the_baked_model(tmp_path: Path, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real mlx-lm, which keeps activations as floats; only its Metal kernel is replaced, for machines without Metal."""
    mx = pytest.importorskip("mlx.core")
    utils, layers = pytest.importorskip("mlx_lm.utils"), pytest.importorskip("mlx_lm.models.bitlinear_layers")

    def multiply(self: Any, x: Any, packed: Any) -> Any:
        assert x.dtype == self.weight_scale.dtype
        codes = mx.concatenate([(packed >> 2 * row & 3).astype(x.dtype) - 1 for row in range(4)])
        return x @ codes.T / self.weight_scale if self.invert_weight_scales else x @ codes.T * self.weight_scale

    monkeypatch.setattr(layers.BitLinear, "execute_matmul_kernel", multiply)
    model = make_checkpoint(tmp_path / "tiny", variant)
    theirs, _ = utils.load_model(pack_directory(model, "safetensors", tmp_path / "out", max_shard_size=300_000))
    with torch.no_grad():
        expected = baked(model)(tokens()).logits
    computed = torch.tensor(theirs(mx.array(tokens().tolist())).tolist())
    torch.testing.assert_close(computed, expected, rtol=0, atol=1e-4)
