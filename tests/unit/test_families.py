"""Every family: the same log-probabilities in transformers, in llama.cpp and after the way back."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from bitconvert.errors import BitconvertError
from bitconvert.evaluation.runtimes import open_runtime
from bitconvert.models.adapter import adapter_of, with_new_adapter, write_gguf_adapter
from bitconvert.models.checkpoint import open_checkpoint
from bitconvert.models.families import FAMILIES
from bitconvert.models.gguf_source import load_gguf_model
from bitconvert.models.gguf_types import F16
from bitconvert.packing.pack import pack
from bitconvert.recipe import Lora, Packing, load_recipe
from bitconvert.report.packing import PackedFile
from bitconvert.report.reporter import Silent
from bitconvert.training.warmup import warmup
from tests.models import LLAMA3_ROPE, NASTY, VARIANTS, YARN, write_gguf, write_model
from tests.recipes import FROM_THE_ORIGINAL

_TOKENS = 300
_FEW_STEPS = (
    *FROM_THE_ORIGINAL,
    "training.tokens=768",
    "training.context=96",
    "training.batch_size=2",
    "training.activation_checkpointing=true",
    "data.held_out_tokens=192",
)
_UNSAID = {"_name_or_path", "architectures", "bos_token_id", "dtype", "pad_token_id", "transformers_version"}
"""What a GGUF file does not say, or says of the tokenizer."""


class Made(NamedTuple):
    """A tiny model on disk, a text of nasty strings, and what transformers makes of it."""

    variant: str
    directory: Path
    ids: list[int]
    model: PreTrainedModel
    logits: Tensor


@pytest.fixture(scope="module", params=VARIANTS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return _make(request.param, tmp_path_factory.mktemp(request.param))


def _make(variant: str, folder: Path) -> Made:
    directory = write_model(folder / "hf", variant)
    tokenizer = open_checkpoint(str(directory)).tokenizer()
    ids = tokenizer("".join(NASTY[3:]))["input_ids"][:_TOKENS]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return Made(variant, directory, ids, model, _logits(model, ids))


def _logits(model: PreTrainedModel, ids: list[int]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([ids])).logits[0]
    return logits


def _llama_cpp_logits(path: Path | str, ids: list[int], lora: Path | None = None) -> Tensor:
    with open_runtime(path, len(ids), lora=lora, threads=1) as runtime:
        return torch.tensor(runtime.logits(ids))


def _kl(original: Tensor, other: Tensor) -> float:
    """Mean KL(original || other) per token."""
    log_p, log_q = original.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def _pack(directory: Path, formats: list[str], output: Path) -> list[PackedFile]:
    checkpoint = open_checkpoint(str(directory))
    return pack(checkpoint, Packing(formats=formats), output, round_plain=True, reporter=Silent()).files


def _edit_config(directory: Path, change: dict[str, Any]) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | change))


# ---- every family, every way ---------------------------------------------------------------------------------------


def test_llama_cpp_computes_the_same_model(made: Made, tmp_path: Path) -> None:
    path = write_gguf(made.directory, tmp_path / "model.gguf")
    assert _kl(made.logits, _llama_cpp_logits(path, made.ids)) <= 1e-6


def test_llama_cpp_computes_the_same_adapter(made: Made, tmp_path: Path) -> None:
    checkpoint, generator = open_checkpoint(str(made.directory)), torch.Generator().manual_seed(5)
    adapted = with_new_adapter(copy.deepcopy(made.model), checkpoint, Lora(rank=3, alpha=5))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    write_gguf_adapter(adapter_of(adapted), checkpoint, tmp_path / "lora.gguf")
    path = write_gguf(made.directory, tmp_path / "model.gguf")
    theirs = _llama_cpp_logits(path, made.ids, tmp_path / "lora.gguf")
    assert _kl(_logits(adapted, made.ids), theirs) <= 1e-5
    assert _kl(made.logits, theirs) > 1e-2


@pytest.mark.slow
def test_llama_cpp_computes_the_same_model_in_float16(made: Made, tmp_path: Path) -> None:
    path = write_gguf(made.directory, tmp_path / "model.gguf", F16)
    assert _kl(made.logits, _llama_cpp_logits(path, made.ids)) <= 1e-5


def test_a_gguf_file_is_read_as_what_it_was(made: Made, tmp_path: Path) -> None:
    path = write_gguf(made.directory, tmp_path / "model.gguf")
    loaded, original = load_gguf_model(path).eval(), made.model
    assert loaded.state_dict().keys() == original.state_dict().keys()
    for name, value in original.state_dict().items():
        shift = FAMILIES[original.config.model_type].norm_shift if name.endswith("norm.weight") else 0.0
        assert torch.equal(loaded.state_dict()[name] + shift, value + shift), name  # 1 + w forgets a w below 6e-8
    torch.testing.assert_close(_logits(loaded, made.ids), made.logits, atol=1e-5, rtol=1e-5)
    loaded.save_pretrained(tmp_path / "again")
    if loaded.config.model_type == original.config.model_type:
        _assert_same_config(open_checkpoint(str(path)).complete, original.config)


def _assert_same_config(read: PreTrainedConfig, written: PreTrainedConfig) -> None:
    for key in type(written)().to_dict().keys() - _UNSAID:
        value, expected = getattr(read, key, None) or None, getattr(written, key, None) or None
        if key == "rope_parameters":  # recovered from factors in float32
            assert value.keys() == expected.keys()
            assert all(value[name] == pytest.approx(expected[name]) for name in expected)
        else:
            assert value == expected, key


def test_packed_files_mean_the_same_everywhere(made: Made, tmp_path: Path) -> None:
    files = _pack(made.directory, ["tq2_0", "safetensors"], tmp_path)
    gguf, directory = (open_checkpoint(file.path) for file in files)
    theirs = _llama_cpp_logits(gguf.path, made.ids)
    ours, ternary = (_logits(opened.load(), made.ids) for opened in (gguf, directory))
    assert _kl(theirs, ours) <= 5e-4

    stock = AutoModelForCausalLM.from_pretrained(directory.path, dtype=torch.float32).eval()
    assert _kl(_logits(stock, made.ids), ternary) <= 5e-4
    assert stock.config.rope_parameters == made.model.config.rope_parameters


# ---- the comparison itself -------------------------------------------------------------------------------------------

_LOST: list[tuple[str, dict[str, Any]]] = [
    ("llama3", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    ("linear", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    ("yarn", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    ("ministral3", {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.0}}),
    ("gemma2", {"sliding_window": 512}),
    ("gemma2", {"attn_logit_softcapping": 50.0}),
    ("gemma2", {"final_logit_softcapping": 30.0}),
    ("gemma3", {"sliding_window": 512}),
    ("gemma3", {"rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 1000000.0}}}),
    ("phi4", {"partial_rotary_factor": 1.0, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    ("granite", {"embedding_multiplier": 1.0}),
    ("granite", {"attention_multiplier": 0.125}),
    ("granite", {"residual_multiplier": 1.0}),
    ("granite", {"logits_scaling": 1.0}),
    ("glm4", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}}),
]


@pytest.mark.parametrize(("variant", "change"), _LOST, ids=str)
def test_the_comparison_notices_what_is_lost(variant: str, change: dict[str, Any], tmp_path: Path) -> None:
    made = _make(variant, tmp_path)
    _edit_config(made.directory, change)
    path = write_gguf(made.directory, tmp_path / "model.gguf")
    assert _kl(made.logits, _llama_cpp_logits(path, made.ids)) > 1e-3


def test_old_config_names_mean_the_same(tmp_path: Path) -> None:
    made = _make("linear", tmp_path)
    config = json.loads((made.directory / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "linear", "factor": rope["factor"]}}
    config["torch_dtype"] = config.pop("dtype")
    (made.directory / "config.json").write_text(json.dumps(config))
    path = write_gguf(made.directory, tmp_path / "model.gguf")
    assert _kl(made.logits, _llama_cpp_logits(path, made.ids)) <= 1e-6


# ---- what is refused -------------------------------------------------------------------------------------------------

_LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3_ROPE}
_SLIDES = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0, "layer_types": None}
_LONG = {"rope_type": "default", "rope_theta": 1e4}

_REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama2", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ("mistral", {"sliding_window": 64}, "sliding_window of 64"),
    ("ministral", {"sliding_window": 64}, "sliding_window of 64"),
    ("qwen2", _SLIDES, "sliding_window of 64"),
    ("phi3", {"sliding_window": 300}, "sliding_window of 300"),
    ("ministral3", {"rope_parameters": {**YARN, "mscale": 2.0, "llama_4_scaling_beta": 0.1}}, "mscale 2.0"),
    ("ministral3", {"rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1}}, "mscale None"),
    ("qwen2", {"rope_parameters": _LLAMA3}, "rope_type 'llama3'"),
    ("qwen2", {"head_dim": 32}, "head_dim 32"),
    ("qwen3", {"attention_bias": True}, "attention_bias True"),
    ("gemma", {"tie_word_embeddings": False}, "tie_word_embeddings False"),
    ("gemma2", {"query_pre_attn_scalar": 224}, "query_pre_attn_scalar 224"),
    ("gemma2", {"layer_types": ["full_attention"] * 4}, "layer_types"),
    ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping None"),
    ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
    ("gemma3", {"rope_parameters": {"full_attention": YARN, "sliding_attention": _LONG}}, "rope_type 'yarn'"),
    ("smollm3", {"no_rope_layers": [1, 0, 1, 0, 1]}, "no_rope_layers"),
    ("smollm3", {"attention_bias": True}, "attention_bias True"),
    ("olmo2", {"tie_word_embeddings": True}, "tie_word_embeddings True"),
    ("stablelm", {"qk_layernorm": True}, "qk_layernorm True"),
    ("llama2", {"rope_parameters": {**_LONG, "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
]


@pytest.mark.parametrize(("variant", "change", "named"), _REFUSED, ids=str)
def test_what_llama_cpp_does_not_compute_is_refused(
    variant: str, change: dict[str, Any], named: str, tmp_path: Path
) -> None:
    directory = write_model(tmp_path / "hf", variant, **change)
    with pytest.raises(BitconvertError) as caught:
        _pack(directory, ["tq2_0"], tmp_path / "out")
    assert named in caught.value.message
    assert caught.value.hint
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("variant", ["mistral", "phi3"])
def test_a_window_as_long_as_the_context_changes_nothing(variant: str, tmp_path: Path) -> None:
    made = _make(variant, tmp_path)
    _edit_config(made.directory, {"sliding_window": 400, "max_position_embeddings": 400})
    path = write_gguf(made.directory, tmp_path / "model.gguf")
    assert _kl(made.logits, _llama_cpp_logits(path, made.ids)) <= 1e-6


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"model_type": "mixtral", "num_local_experts": 8}, "'mixtral' is a mixture of experts"),
        ({"model_type": "qwen2_moe", "num_experts": 60}, "'qwen2_moe' is a mixture of experts"),
        ({"model_type": "qwen3_moe", "num_experts": 128}, "'qwen3_moe' is a mixture of experts"),
        ({"model_type": "deepseek_v3", "n_routed_experts": 256}, "'deepseek_v3' is a mixture of experts"),
        ({"model_type": "granitemoe", "num_local_experts": 32}, "'granitemoe' is a mixture of experts"),
        (
            {"model_type": "qwen3_5_moe", "text_config": {"num_experts": 128}},
            "'qwen3_5_moe' is a mixture of experts",
        ),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}, "'gemma3', which wraps a text model"),
        ({"model_type": "mistral3", "text_config": {"model_type": "ministral3"}}, "'mistral3', which wraps a text"),
        ({"model_type": "bert"}, "'bert' is not supported"),
        ({}, "'None' is not supported"),
    ],
)
def test_other_architectures_are_refused_by_name(config: dict[str, Any], named: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BitconvertError) as caught:
        open_checkpoint(str(tmp_path))
    assert named in caught.value.message
    assert all(family in caught.value.hint for family in FAMILIES)


def test_the_context_decides_over_long_rope_factors_and_pack_says_so(tmp_path: Path) -> None:
    made = _make("phi3-short", tmp_path)
    file = _pack(made.directory, ["tq2_0"], tmp_path / "packed")[0]
    assert "exceeds 512 tokens" in file.notes()[0]
    other = _pack(write_model(tmp_path / "other", "phi3"), ["tq2_0"], tmp_path / "out")[0]
    assert not other.notes()
    path = write_gguf(made.directory, tmp_path / "model.gguf")
    with open_runtime(path, 1024, threads=1) as runtime:  # the same 300 tokens, in a context that is longer than 512
        assert _kl(made.logits, torch.tensor(runtime.logits(made.ids))) > 1e-3


_ONE_OF_EACH = {overrides.get("model_type", "llama"): variant for variant, (_, overrides) in VARIANTS.items()}


@pytest.mark.slow
@pytest.mark.parametrize("variant", _ONE_OF_EACH.values())
def test_every_family_is_warmed_up_and_packed(variant: str, story: Path, tmp_path: Path) -> None:
    """From a directory and from a GGUF file, with activation checkpointing; the files mean what was trained."""
    directory = write_model(tmp_path / "hf", variant)
    sources = {"directory": directory, "gguf": write_gguf(directory, tmp_path / "model.gguf")}
    recipe = load_recipe(None, [*_FEW_STEPS, f"data.sources=[{story}]"])
    for name, source in sources.items():
        warmup(str(source), tmp_path / name, recipe, reporter=Silent())
        latent = open_checkpoint(str(tmp_path / name))
        file = pack(latent, Packing(formats=["tq2_0"]), tmp_path / f"{name}-packed", reporter=Silent()).files[0]
        ids = open_checkpoint(str(directory)).tokenizer()(story.read_text())["input_ids"][:_TOKENS]
        assert _kl(_llama_cpp_logits(file.path, ids), _logits(latent.load(), ids)) <= 2e-3


def test_null_in_a_config_is_not_the_default(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "hf", "mistral", max_position_embeddings=8192)
    assert json.loads((directory / "config.json").read_text())["sliding_window"] is None
    assert open_checkpoint(str(directory)).complete.sliding_window is None  # MistralConfig's default is 4096
