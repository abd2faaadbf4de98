"""GGUF files: their keys, names, rows and tokens, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from bitconvert.errors import BitconvertError
from bitconvert.evaluation.runtimes import open_runtime
from bitconvert.models.checkpoint import open_checkpoint
from bitconvert.models.families import FAMILIES
from bitconvert.models.gguf_tensors import gguf_names, to_gguf_rows
from bitconvert.models.gguf_types import F16, F32
from bitconvert.models.rope import deinterleave_rows, interleave_rows, llama3_factors, recover_llama3
from bitconvert.packing.gguf.container import GgufContainer
from tests.models import NASTY, vocabulary, write_gguf, write_model

_LLAMA = FAMILIES["llama"]


@pytest.mark.parametrize("variant", ["llama2", "llama3", "smollm2"])
def test_llama_cpp_tokenizes_like_the_directory(variant: str, tmp_path: Path) -> None:
    directory = write_model(tmp_path / "hf", variant, layers=1)
    tokenizer = open_checkpoint(str(directory)).tokenizer()
    with open_runtime(write_gguf(directory, tmp_path / "model.gguf"), 32, threads=1) as runtime:
        for text in NASTY:
            assert runtime.tokenize(text, add_special=True) == tokenizer(text)["input_ids"]
        marked = f"one{tokenizer.eos_token}two{tokenizer.bos_token}three"
        assert runtime.tokenize(marked, parse_special=True) == tokenizer(marked, add_special_tokens=False)["input_ids"]


def test_required_keys_are_there(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "hf", "falcon3")
    fields = gguf.GGUFReader(write_gguf(directory, tmp_path / "model.gguf", F16)).fields
    written = {name: field.contents() for name, field in fields.items()}
    expected = {
        "general.architecture": "llama",
        "general.name": "hf",
        "general.file_type": 1,
        "general.quantization_version": 2,
        "llama.context_length": 512,
        "llama.attention.key_length": 256,
        "llama.rope.dimension_count": 256,
        "llama.attention.head_count_kv": 1,
    }
    assert {key: written[key] for key in expected} == expected
    assert written["llama.vocab_size"] == len(written["tokenizer.ggml.tokens"])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type 'dynamic'"),
        ({"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}, "rope_type 'proportional'"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "attention_factor": 1.5}},
            "attention_factor 1.5",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "truncate": False}},
            "truncate False",
        ),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": None}}, "yarn with factor None"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    directory = write_model(tmp_path / "hf", "smollm2", layers=1)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(BitconvertError, match=named):
        write_gguf(directory, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_tensor_names() -> None:
    config = LlamaConfig(num_hidden_layers=1, tie_word_embeddings=True)
    names = [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.norm.weight",
        "lm_head.weight",
    ]
    assert gguf_names(names, config, _LLAMA) == {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.layers.0.self_attn.q_proj.weight": "blk.0.attn_q.weight",
        "model.norm.weight": "output_norm.weight",
    }


def test_unknown_and_missing_tensors_are_named() -> None:
    config = LlamaConfig(num_hidden_layers=1, tie_word_embeddings=True)
    with pytest.raises(BitconvertError, match=r"model\.layers\.0\.self_attn\.lora\.weight"):
        gguf_names(["model.layers.0.self_attn.lora.weight"], config, _LLAMA)
    with pytest.raises(BitconvertError, match=r"layers\.1\."):
        gguf_names(["model.layers.1.mlp.up_proj.weight"], config, _LLAMA)
    with pytest.raises(BitconvertError, match=r"lm_head\.weight is missing"):
        gguf_names(["model.norm.weight"], LlamaConfig(num_hidden_layers=1), _LLAMA)


def test_rows_of_q_and_k_move_together_with_their_scales() -> None:
    config = LlamaConfig(num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1)
    query = "model.layers.0.self_attn.q_proj.weight"
    codes = torch.arange(8).reshape(8, 1)
    order = to_gguf_rows(codes, query, config, _LLAMA).flatten().tolist()
    assert order == [0, 2, 1, 3, 4, 6, 5, 7]  # halves of each head interleaved
    assert to_gguf_rows(torch.ones(1), query, config, _LLAMA).shape == (1,)
    value = "model.layers.0.self_attn.v_proj.weight"
    assert torch.equal(to_gguf_rows(codes, value, config, _LLAMA), codes)
    assert torch.equal(deinterleave_rows(interleave_rows(codes, 2), 2), codes)


@pytest.mark.parametrize(
    "rope",
    [
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
        {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
        {"factor": 4.0, "low_freq_factor": 2.0, "high_freq_factor": 3.0, "original_max_position_embeddings": 4096},
    ],
)
def test_llama3_rope_survives_the_tensor(rope: dict[str, Any]) -> None:
    factors = llama3_factors({"rope_theta": 500000.0, **rope}, 128)
    recovered = recover_llama3(factors, 500000.0, 128)
    assert recovered is not None
    np.testing.assert_allclose(llama3_factors(recovered, 128), factors, rtol=1e-5)
    assert recovered["factor"] == rope["factor"]


def test_llama3_factors_agree_with_transformers() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(rope_parameters=rope, head_dim=64, max_position_embeddings=131072)
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500000.0 ** (-np.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(plain / llama3_factors(rope, 64), frequencies.numpy(), rtol=1e-5)


def test_factors_of_another_formula_are_not_mistaken_for_llama3() -> None:
    assert recover_llama3(np.linspace(1, 40, 32, dtype=np.float32), 10000.0, 64) is None
    assert recover_llama3(np.array([1, 5, 2, 9], dtype=np.float32), 10000.0, 8) is None


def test_the_writer_holds_to_what_was_announced(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "hf", "smollm2", layers=1)
    checkpoint = open_checkpoint(str(directory))
    container = GgufContainer(tmp_path / "model.gguf", checkpoint, vocabulary(checkpoint), F32.file_type)
    container.add_tensor("output_norm.weight", (256,), F32.type_id, 1024)
    container.begin()
    with pytest.raises(ValueError, match=r"output_norm\.weight has 1028 bytes or more, announced were 1024"):
        container.write(np.zeros(257, np.float32))
    container.write(np.zeros(100, np.float32))
    container.write(np.zeros(156, np.float32))
    with pytest.raises(ValueError, match="all 1 announced"):
        container.write(np.zeros(256, np.float32))
    container.close()
    container.close()
