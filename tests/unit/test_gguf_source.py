"""A GGUF file as input: the same model, configuration and token ids as the directory it was made from."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from bitconvert.errors import BitconvertError
from bitconvert.evaluation.runtimes import LlamaCpp
from bitconvert.models.gguf_source import (
    LINEAGE_KEY,
    gguf_config,
    gguf_lineage,
    load_gguf_model,
    load_gguf_tokenizer,
    tensor_types,
)
from bitconvert.models.gguf_types import F16, Q2_0, Q8_0, TQ2_0, GgufType
from bitconvert.models.tokenizers import load_tokenizer
from tests.models import NASTY, write_gguf, write_model


@pytest.mark.parametrize("variant", ["llama2", "llama3", "smollm2", "falcon3"])
def test_tokenizer_round_trip(variant: str, tmp_path: Path) -> None:
    directory = write_model(tmp_path / "hf", variant, layers=1)
    original = load_tokenizer(directory)
    restored = load_gguf_tokenizer(write_gguf(directory, tmp_path / "model.gguf"))
    marked = [f"a{token}b {token} c" for token in [*original.all_special_tokens, "<think>"]]
    for text in (*NASTY, *marked):
        assert restored(text)["input_ids"] == original(text)["input_ids"]
        ids = original(text, add_special_tokens=False)["input_ids"]
        assert restored.decode(ids) == original.decode(ids)
    for role in ("bos_token_id", "eos_token_id", "unk_token_id", "chat_template"):
        assert getattr(restored, role) == getattr(original, role)
    restored.save_pretrained(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again")(NASTY[9])["input_ids"] == original(NASTY[9])["input_ids"]


@pytest.mark.parametrize("kind", [F16, Q8_0])
def test_quantized_weights_are_those_of_transformers_own_loader(kind: GgufType, tmp_path: Path) -> None:
    directory = write_model(tmp_path / "hf", "smollm2")
    path = write_gguf(directory, tmp_path / "model.gguf", kind)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).state_dict()
    ours = load_gguf_model(path).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("kind", [Q2_0, TQ2_0])
def test_our_own_types_are_read(kind: GgufType, tmp_path: Path) -> None:
    path = write_gguf(write_model(tmp_path / "hf", "smollm2", layers=1), tmp_path / "model.gguf", kind)
    weight = load_gguf_model(path).get_parameter("model.layers.0.mlp.up_proj.weight")
    blocks = weight.detach().view(-1, kind.block)
    assert tensor_types(path)["model.layers.0.mlp.up_proj.weight"] == kind.name
    assert all(len(block.abs().unique()) <= 2 for block in blocks)


def test_tensor_types_have_hugging_face_names(tmp_path: Path) -> None:
    types = tensor_types(write_gguf(write_model(tmp_path / "hf", "llama3"), tmp_path / "model.gguf", Q8_0))
    assert types["model.layers.1.mlp.down_proj.weight"] == "Q8_0"
    assert types["model.norm.weight"] == "F32"
    assert len(types) == 20  # rope_freqs is no weight


def test_a_file_of_another_program_has_no_lineage(tmp_path: Path) -> None:
    path = write_gguf(write_model(tmp_path / "hf", "smollm2", layers=1), tmp_path / "model.gguf")
    assert gguf_lineage(path) is None


def _rewritten(path: Path, changes: dict[str, object], *, without: str = "", arch: str = "llama") -> Path:
    """A copy of a file with other metadata, or without one tensor."""
    reader, copy = gguf.GGUFReader(path), path.with_name("changed.gguf")
    writer = gguf.GGUFWriter(copy, arch)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in changes or name == "general.architecture":
            continue
        sub_type = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    for key, value in changes.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, np.ndarray):
            pass
        elif value is not None:
            writer.add_uint32(key, int(str(value)))
    for tensor in reader.tensors:
        if tensor.name != without:
            data = changes.get(tensor.name, tensor.data)
            writer.add_tensor(tensor.name, np.asarray(data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return copy


@pytest.fixture(scope="module")
def llama3_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama3")
    return write_gguf(write_model(folder / "hf", "llama3", layers=1), folder / "model.gguf")


def test_other_architectures_are_refused(llama3_file: Path) -> None:
    with pytest.raises(BitconvertError, match="architecture 'falcon' is not supported"):
        gguf_config(_rewritten(llama3_file, {}, arch="falcon"))


def test_rope_factors_of_another_formula_are_refused(llama3_file: Path) -> None:
    factors = np.linspace(1, 40, 32, dtype=np.float32)
    with pytest.raises(BitconvertError, match=r"rope_freqs\.weight does not follow"):
        gguf_config(_rewritten(llama3_file, {"rope_freqs.weight": factors}))


def _rewritten_rope(path: Path, changes: dict[str, object], arch: str = "llama") -> Path:
    return _rewritten(path, {f"{arch}.rope.{key}": value for key, value in changes.items()}, arch=arch)


@pytest.mark.parametrize(
    "changes", [{"scaling.type": None}, {"scaling.type": None, "scaling.factor": None, "scale_linear": 4.0}], ids=str
)
def test_a_factor_without_a_type_is_linear_as_in_llama_cpp(changes: dict[str, object], tmp_path: Path) -> None:
    named = write_gguf(write_model(tmp_path / "hf", "linear", layers=1), tmp_path / "named.gguf")
    unnamed = _rewritten_rope(named, changes)
    ids = list(range(5, 69))
    with LlamaCpp(named, len(ids), threads=1) as one, LlamaCpp(unnamed, len(ids), threads=1) as other:
        assert np.array_equal(one.logits(ids, 0), other.logits(ids, 0))
    assert gguf_config(unnamed)["rope_parameters"] == gguf_config(named)["rope_parameters"]
    assert gguf_config(unnamed)["rope_parameters"]["rope_type"] == "linear"


@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        ("smollm2", {"scaling.attn_factor": 2.0}),
        ("llama3", {"scaling.attn_factor": 2.0}),
        ("yarn", {"scaling.attn_factor": 2.0}),
        ("ministral3", {"scaling.yarn_beta_fast": 2.0}),
        ("ministral3", {"scaling.yarn_beta_slow": 3.0}),
        ("ministral3", {"scaling.yarn_log_multiplier": 0.5}),
        ("ministral3", {"scaling.yarn_log_multiplier": None}),
    ],
    ids=str,
)
def test_rotations_that_a_config_cannot_state_are_refused(
    variant: str, changes: dict[str, object], tmp_path: Path
) -> None:
    path = write_gguf(write_model(tmp_path / "hf", variant, layers=1), tmp_path / "model.gguf")
    arch = "mistral3" if variant == "ministral3" else "llama"
    with pytest.raises(BitconvertError, match=rf"{arch}\.rope\.{next(iter(changes))} is .* rotary embedding"):
        gguf_config(_rewritten_rope(path, changes, arch))


@pytest.mark.parametrize(
    ("changes", "without", "named"),
    [
        ({"llama.expert_count": 8}, "", "mixture of experts"),
        ({"llama.rope.dimension_count": 32}, "", "rotates 32 of 64"),
        ({"llama.context_length": None}, "", "context_length is missing"),
        ({}, "blk.0.ffn_up.weight", "mlp.up_proj.weight is missing"),
        ({}, "token_embd.weight", "token_embd.weight is missing"),
        ({"llama.feed_forward_length": 128}, "", "has shape"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    changes: dict[str, object], without: str, named: str, llama3_file: Path
) -> None:
    with pytest.raises(BitconvertError, match=named):
        load_gguf_model(_rewritten(llama3_file, changes, without=without))


@pytest.mark.parametrize(
    ("changes", "named"), [({"tokenizer.ggml.pre": "viking"}, "viking"), ({"tokenizer.ggml.model": "bert"}, "bert")]
)
def test_unsupported_tokenizers_are_refused(changes: dict[str, object], named: str, llama3_file: Path) -> None:
    with pytest.raises(BitconvertError, match=named) as caught:
        load_gguf_tokenizer(_rewritten(llama3_file, changes))
    assert "changed.gguf" in caught.value.message


def test_lineage_of_another_version_is_one_clear_error(llama3_file: Path) -> None:
    with pytest.raises(BitconvertError, match=r"bitconvert\.lineage"):
        gguf_lineage(_rewritten(llama3_file, {LINEAGE_KEY: json.dumps({"unknown": 1})}))


def test_damaged_files_are_named(llama3_file: Path, tmp_path: Path) -> None:
    content = llama3_file.read_bytes()
    damaged = tmp_path / "damaged.gguf"
    cuts = [0, 3, 10, 24, 100, 5000, len(content) // 2, len(content) - 1]
    for cut in cuts:
        damaged.write_bytes(content[:cut])
        with pytest.raises(BitconvertError, match=r"damaged\.gguf"):
            gguf_config(damaged)


def test_flipped_bytes_never_raise_anything_else(llama3_file: Path, tmp_path: Path) -> None:
    content = bytearray(llama3_file.read_bytes()[:3000])
    rest = llama3_file.read_bytes()[3000:]
    source = random.Random(0)
    damaged = tmp_path / "damaged.gguf"
    for _ in range(15):
        flipped = bytearray(content)
        flipped[source.randrange(4, 1500)] ^= 1 << source.randrange(8)
        damaged.write_bytes(bytes(flipped) + rest)
        with contextlib.suppress(BitconvertError):
            gguf_config(damaged)
            load_gguf_tokenizer(damaged)
