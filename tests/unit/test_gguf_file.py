"""GGUF files as they are packed and opened again: I2_S, floats, shards, embeddings of every type, damage."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bitconvert.errors import BitconvertError, UsageError
from bitconvert.evaluation.inspect import inspect
from bitconvert.evaluation.runtimes import open_runtime
from bitconvert.models import ggml_quantize
from bitconvert.models.checkpoint import open_checkpoint
from bitconvert.models.gguf_file import open_gguf
from bitconvert.models.gguf_source import activation_blocks
from bitconvert.models.gguf_types import Q4_K, Q6_K, register_q2_0
from bitconvert.packing.pack import pack
from bitconvert.recipe import Packing, Scaling
from bitconvert.report.packing import PackedFile
from bitconvert.report.reporter import Silent
from bitconvert.ternary.bitlinear import bitlinears
from bitconvert.ternary.quantize import ternarize
from tests.unit.test_formats import i2_s_weights
from tests.unit.test_pack import embedding_of, llama_cpp_order, make_latent, pack_one, refused

IDS = list(range(1, 65))


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untied, so that there is a head of its own."""
    return make_latent(tmp_path_factory.mktemp("models") / "tiny", tie_word_embeddings=False)


def torch_logits(model: Path) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = open_checkpoint(str(model)).load()(torch.tensor([IDS])).logits[0]
    return logits


def llama_cpp_logits(path: str) -> torch.Tensor:
    with open_runtime(path, n_ctx=len(IDS), threads=1) as runtime:
        return torch.tensor(runtime.logits(IDS))


def kl(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Mean KL(expected || found) per token, in nats."""
    p, q = expected.double().log_softmax(-1), found.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


# ---- I2_S ------------------------------------------------------------------------------------------------------------


def test_an_i2_s_file_holds_what_the_layout_says(tmp_path: Path, latent: Path) -> None:
    file = pack_one(latent, "i2_s", tmp_path)
    assert file.path == str(tmp_path / "tiny-I2_S.gguf")
    opened = open_gguf(Path(file.path))
    assert opened.get("general.file_type") == 40
    assert opened.get("general.architecture") == "llama"
    types = {name: tensor.tensor_type.value for name, tensor in opened.tensors.items()}
    assert {types[name] for name in ("token_embd.weight", "output.weight")} == {1}
    assert {kind for name, kind in types.items() if "norm" in name} == {0}
    assert {kind for name, kind in types.items() if ".attn_" in name or ".ffn_" in name} - {0} == {36}
    weight = load_file(latent / "model.safetensors")["model.layers.1.self_attn.q_proj.weight"]
    expected = llama_cpp_order(ternarize(weight, Scaling(estimator="absmean")).with_fp16_scale().dequantize(), heads=4)
    stored = opened.tensors["blk.1.attn_q.weight"]
    assert stored.n_bytes == 256 * 256 // 4 + 32
    raw = Path(file.path).read_bytes()[stored.data_offset : stored.data_offset + stored.n_bytes]
    assert i2_s_weights(raw, 256, 256) == (expected + 0.0).tolist()
    np.testing.assert_array_equal(stored.values(), expected.numpy())


def test_an_i2_s_file_computes_what_was_trained(tmp_path: Path, latent: Path) -> None:
    """One int8 scale for each token: given the same weights, bitnet.cpp's arithmetic is that of the training."""
    file = Path(pack_one(latent, "i2_s", tmp_path).path)
    assert set(activation_blocks(file).values()) == {None}
    assert len(activation_blocks(file)) == 14
    assert kl(torch_logits(latent), torch_logits(file)) < 1e-3  # scales and embeddings are rounded to float16
    trained = open_checkpoint(str(latent)).load()
    stored = open_checkpoint(str(file)).load()
    trained.load_state_dict(stored.state_dict())
    for ours, theirs in zip(bitlinears(trained), bitlinears(stored), strict=True):
        ours.codes, ours.scale = theirs.codes, theirs.scale
    with torch.no_grad():
        assert torch.equal(trained(torch.tensor([IDS])).logits[0], torch_logits(file))
    report = inspect(str(file))
    told = {tensor.name: tensor for tensor in report.tensors}["blk.0.ffn_up.weight"]
    assert told.type == "I2_S"
    assert told.ternary
    assert told.scale is not None
    assert told.scale.count == 1


def test_i2_s_keeps_its_embedding_in_f16(tmp_path: Path, latent: Path) -> None:
    file = pack_one(latent, "i2_s", tmp_path, embedding_type="q8_0")
    assert {tensor.type for tensor in file.tensors if not tensor.ternary} == {"F16", "F32"}
    assert any("agree on F16 only" in note for note in file.notes())
    assert any("bitnet.cpp and 0xBitNet only" in note for note in file.notes())


def test_i2_s_is_refused_where_bitnet_cpp_would_compute_garbage(tmp_path: Path, latent: Path) -> None:
    odd = make_latent(tmp_path / "odd", intermediate_size=320)
    error = refused(odd, ["i2_s"], tmp_path / "out")
    assert "model.layers.0.mlp.down_proj.weight" in error.message
    assert "rows of 320 do not divide by 128" in error.message
    rows = make_latent(tmp_path / "rows", scaling=Scaling(granularity="row"))
    assert "one scale per tensor" in refused(rows, ["i2_s"], tmp_path / "out").message


def test_i2_s_is_refused_for_other_architectures(tmp_path: Path, latent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(str(latent))
    checkpoint.family = replace(checkpoint.family, gguf_arch="qwen3")
    with pytest.raises(
        BitconvertError, match=r"architecture qwen3: its runtimes \(bitnet\.cpp, 0xBitNet\) compute only llama"
    ):
        pack(checkpoint, Packing(formats=("i2_s",)), tmp_path / "out", reporter=Silent())


# ---- the baked weights as they are -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "file_type", "bound"), [("f16", 1, 1e-4), ("bf16", 32, 1e-4), ("q8_0", 7, 1e-3)])
def test_whole_files_of_general_types_run_everywhere(
    tmp_path: Path, latent: Path, name: str, file_type: int, bound: float
) -> None:
    file = pack_one(latent, name, tmp_path)
    assert {tensor.type for tensor in file.tensors if tensor.ternary} == {name.upper()}
    assert open_gguf(Path(file.path)).get("general.file_type") == file_type
    assert bool(file.note) == (name == "bf16")
    assert set(activation_blocks(Path(file.path)).values()) == ({32} if name == "q8_0" else set())
    model = open_checkpoint(file.path).load()
    assert len(bitlinears(model)) == (14 if name == "q8_0" else 0)
    assert kl(torch_logits(Path(file.path)), llama_cpp_logits(file.path)) < bound


def test_f16_files_hold_the_weights_of_the_other_formats(tmp_path: Path, latent: Path) -> None:
    files = [open_gguf(Path(pack_one(latent, name, tmp_path / name).path)) for name in ("tq2_0", "f16", "i2_s", "q8_0")]
    rounded = open_gguf(Path(pack_one(latent, "bf16", tmp_path / "bf16").path))
    for name in ("blk.0.attn_k.weight", "blk.1.ffn_down.weight"):
        first, *others = (file.tensors[name].values() for file in files)
        for other in others:
            np.testing.assert_array_equal(first, other)
        np.testing.assert_array_equal(np.sign(first), np.sign(rounded.tensors[name].values()))
        np.testing.assert_allclose(first, rounded.tensors[name].values(), rtol=2**-8)


# ---- embedding and head ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Q4_K, Q6_K], ids=lambda kind: kind.name)
def test_k_quants_come_from_llama_cpp_and_decode_in_gguf(kind: Any) -> None:
    rows = torch.randn(5, 512, generator=torch.Generator().manual_seed(3)).numpy()
    quantized = ggml_quantize.quantize_by_ggml(rows, kind)
    error = np.linalg.norm(gguf.dequantize(quantized, kind.ggml()) - rows) / np.linalg.norm(rows)
    assert error < {"Q4_K": 0.09, "Q6_K": 0.025}[kind.name]


def test_rows_are_quantized_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(7, 256, generator=torch.Generator().manual_seed(3)).numpy()
    whole = ggml_quantize.quantize_by_ggml(rows, Q6_K)
    monkeypatch.setattr(ggml_quantize, "_CHUNK", 3 * 256)
    np.testing.assert_array_equal(whole, ggml_quantize.quantize_by_ggml(rows, Q6_K))


def test_a_quantizer_that_gives_back_garbage_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.ones((2, 256), np.float32)
    monkeypatch.setattr(ggml_quantize, "_ask", lambda child, rows, count, size: bytes(count * size))
    with pytest.raises(BitconvertError, match="Q6_K: what it gives back does not decode"):
        ggml_quantize.quantize_by_ggml(rows, Q6_K)


def test_a_quantizer_that_dies_is_an_error() -> None:
    with pytest.raises(BitconvertError, match="llama.cpp cannot quantize to Q6_K: it ended with status"):
        ggml_quantize.quantize_by_ggml(np.ones((2, 256), np.float32), replace(Q6_K, type_id=9999))


@pytest.mark.parametrize(
    ("options", "embedding", "head"),
    [
        ({"embedding_type": "q6_k"}, "Q6_K", "Q6_K"),
        ({"embedding_type": "q4_k", "output_type": "q6_k"}, "Q4_K", "Q6_K"),
        ({"embedding_type": "bf16", "output_type": "f32"}, "BF16", "F32"),
        ({"output_type": "q8_0"}, "F16", "Q8_0"),
    ],
)
def test_embedding_and_head_get_the_types_asked_for(
    tmp_path: Path, latent: Path, options: dict[str, str], embedding: str, head: str
) -> None:
    file = pack_one(latent, "tq2_0", tmp_path, **options)
    types = {tensor.name: tensor.type for tensor in file.tensors}
    assert (types["token_embd.weight"], types["output.weight"]) == (embedding, head)
    stored = open_gguf(Path(file.path)).tensors["token_embd.weight"]
    assert stored.tensor_type.name == embedding
    source = embedding_of(latent).numpy()
    assert np.linalg.norm(stored.values() - source) < 0.1 * np.linalg.norm(source)
    assert kl(torch_logits(Path(file.path)), llama_cpp_logits(file.path)) < 0.01


def test_embeddings_whose_rows_do_not_divide_get_the_next_best(tmp_path: Path) -> None:
    for hidden, stored in ((192, "Q8_0"), (80, "F16")):
        model = make_latent(tmp_path / str(hidden), hidden_size=hidden)
        file = pack_one(model, "q2_0", tmp_path / stored, embedding_type="q6_k")
        (embedding,) = [tensor for tensor in file.tensors if tensor.name == "token_embd.weight"]
        assert embedding.type == stored
        assert embedding.note == f"rows of {hidden} do not divide by 256, as Q6_K requires"


def test_a_tied_head_has_no_type_of_its_own(tmp_path: Path) -> None:
    error = refused(make_latent(tmp_path / "tied"), ["tq2_0"], tmp_path / "out", output_type="q8_0")
    assert isinstance(error, UsageError)
    assert "--embedding-type decides for both" in error.hint


def test_k_quants_without_llama_cpp_are_refused_before_anything_is_written(
    tmp_path: Path, latent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LLAMA_CPP_LIB", raising=False)
    monkeypatch.setattr("bitconvert.models.llama_cpp_library.importlib.util.find_spec", lambda *_: None)
    error = refused(latent, ["tq2_0"], tmp_path / "out", embedding_type="q6_k")
    assert "Q6_K" in error.message
    assert "pip install 'bitconvert[llamacpp]'" in error.hint


# ---- shards ----------------------------------------------------------------------------------------------------------


def packed_shards(latent: Path, output: Path, size: int, name: str = "tq2_0") -> tuple[PackedFile, list[Path]]:
    file = pack_one(latent, name, output, max_shard_size=size)
    return file, sorted(output.glob("*.gguf"))


@pytest.mark.parametrize("name", ["tq2_0", "i2_s"])
def test_shards_hold_the_bytes_of_the_single_file(tmp_path: Path, latent: Path, name: str) -> None:
    whole = open_gguf(Path(pack_one(latent, name, tmp_path / "whole").path))
    file, paths = packed_shards(latent, tmp_path / "split", 400_000, name)
    count = len(paths)
    stem = f"tiny-{name.upper()}"
    assert count > 2
    assert [path.name for path in paths] == [f"{stem}-{n + 1:05}-of-{count:05}.gguf" for n in range(count)]
    assert file.path == str(paths[0])
    assert file.nbytes == sum(path.stat().st_size for path in paths)
    split = open_gguf(paths[0])
    assert split.paths == tuple(paths)
    assert split.tensors.keys() == whole.tensors.keys()
    for key, tensor in whole.tensors.items():
        assert tensor.data.tobytes() == split.tensors[key].data.tobytes()
    extra = {"split.no": 0, "split.count": count, "split.tensors.count": len(whole.tensors)}
    assert split.fields == whole.fields | extra
    assert inspect(str(paths[0])).file_bytes == file.nbytes


def test_each_shard_says_what_gguf_split_says(tmp_path: Path, latent: Path) -> None:
    _, paths = packed_shards(latent, tmp_path, 400_000)
    register_q2_0()
    for number, path in enumerate(paths):
        reader = gguf.GGUFReader(path)
        assert reader.fields["split.no"].contents() == number
        assert reader.fields["split.count"].contents() == len(paths)
        assert sum(tensor.n_bytes for tensor in reader.tensors) <= 400_000 or len(reader.tensors) == 1
        assert ("tokenizer.ggml.tokens" in reader.fields) == (number == 0)


def test_llama_cpp_and_torch_load_shards(tmp_path: Path, latent: Path) -> None:
    whole = pack_one(latent, "tq2_0", tmp_path / "whole")
    file, _ = packed_shards(latent, tmp_path / "split", 400_000)
    assert torch.equal(llama_cpp_logits(whole.path), llama_cpp_logits(file.path))
    assert torch.equal(torch_logits(Path(whole.path)), torch_logits(Path(file.path)))
    assert open_checkpoint(file.path).tokenizer()("the lazy dog").input_ids


def test_another_shard_than_the_first_is_refused_with_its_name(tmp_path: Path, latent: Path) -> None:
    _, paths = packed_shards(latent, tmp_path, 400_000)
    with pytest.raises(BitconvertError) as caught:
        open_checkpoint(str(paths[1]))
    assert str(paths[0]) in caught.value.hint
    renamed = paths[1].rename(tmp_path / "renamed.gguf")
    with pytest.raises(BitconvertError, match="it says that it is shard 2 of"):
        open_gguf(renamed)
    with pytest.raises(BitconvertError, match="00002-of-.*missing, one of the"):
        open_gguf(paths[0])


def test_no_modelfile_names_a_shard(tmp_path: Path, latent: Path) -> None:
    """Ollama takes a model in one file."""
    pack_one(latent, "q8_0", tmp_path / "whole")
    assert (tmp_path / "whole" / "Modelfile").exists()
    packed_shards(latent, tmp_path / "split", 400_000, "q8_0")
    assert not (tmp_path / "split" / "Modelfile").exists()


def test_all_shards_are_downloaded(tmp_path: Path, latent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, paths = packed_shards(latent, tmp_path, 400_000)
    asked: list[str] = []

    def download(repository: str, name: str, revision: str | None) -> str:
        asked.append(f"{repository}/{name}")
        return str(tmp_path / Path(name).name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    opened = open_checkpoint(f"owner/model/folder/{paths[0].name}")
    assert asked == [f"owner/model/folder/{path.name}" for path in paths]
    assert opened.path == paths[0]


def test_shards_of_different_models_do_not_mix(tmp_path: Path, latent: Path) -> None:
    _, paths = packed_shards(latent, tmp_path, 400_000)
    paths[1].write_bytes(paths[2].read_bytes())
    with pytest.raises(BitconvertError, match="it says that it is shard 3 of"):
        open_gguf(paths[0])


def test_a_model_that_fits_is_not_split(tmp_path: Path, latent: Path) -> None:
    _, paths = packed_shards(latent, tmp_path, 10**9)
    assert [path.name for path in paths] == ["tiny-TQ2_0.gguf"]
    assert "split.count" not in open_gguf(paths[0]).fields


# ---- opening ---------------------------------------------------------------------------------------------------------


def test_our_reader_agrees_with_the_gguf_package(tmp_path: Path, latent: Path) -> None:
    for name, options in (("tq1_0", {}), ("q2_0", {"embedding_type": "q6_k"}), ("bf16", {"embedding_type": "bf16"})):
        path = Path(pack_one(latent, name, tmp_path / name, **options).path)
        ours, theirs = open_gguf(path), gguf.GGUFReader(path)
        expected = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
        assert ours.fields.keys() == expected.keys()
        for key, value in ours.fields.items():
            assert value == pytest.approx(expected[key]) if isinstance(value, float) else value == expected[key]
        assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
        for tensor in theirs.tensors:
            mine = ours.tensors[tensor.name]
            assert (mine.tensor_type, mine.shape) == (tensor.tensor_type, tuple(tensor.shape.tolist()))
            assert (mine.n_bytes, mine.data_offset) == (tensor.n_bytes, tensor.data_offset)
            np.testing.assert_array_equal(mine.data, tensor.data)


def header(*fields: bytes, tensors: bytes = b"", tensor_count: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensor_count, len(fields)) + b"".join(fields) + tensors


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def tensor_info(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    dimensions = b"".join(struct.pack("<Q", size) for size in shape)
    return text(name) + struct.pack("<I", len(shape)) + dimensions + struct.pack("<IQ", kind, offset)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "empty"),
        (b"GGUF", "the header, at offset 4"),
        (b"GGUG" + bytes(20), "not a GGUF file"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (header(text("a") + struct.pack("<IQ", 8, 2**60)), "key a, at offset"),
        (header(text("a") + struct.pack("<IIQ", 9, 5, 2**61)), f"{4 * 2**61} bytes are announced"),
        (header(text("a") + struct.pack("<IIQ", 9, 8, 2**61)), "key a, at offset"),
        (header(text("a") + struct.pack("<IIQ", 9, 9, 1) + bytes(64)), "arrays of arrays"),
        (header(text("a") + struct.pack("<I", 77)), "no value has the type 77"),
        (header(*[text("a") + struct.pack("<IB", 0, 1)] * 2), "key a, at offset 47: it stands there twice"),
        (header(text("a") + struct.pack("<IQ", 8, 1) + b"\xff"), "not UTF-8"),
        (header(text("general.alignment") + struct.pack("<II", 4, 24)), "general.alignment is 24"),
        (header(tensor_count=2**62), "the list of tensors, at offset 24"),
        (header(tensors=tensor_info("t", (2**40, 2**40), 0, 0), tensor_count=1), "tensor t, at offset 96: "),
        (header(tensors=tensor_info("t", (0,), 0, 0), tensor_count=1), "does not fit the type F32"),
        (header(tensors=tensor_info("t", (100, 1), 35, 0), tensor_count=1), "does not fit the type TQ2_0"),
        (header(tensors=tensor_info("t", (128,), 36, 0) + bytes(99), tensor_count=1), "does not fit the type I2_S"),
        (header(tensors=tensor_info("t", (1,), 99, 0), tensor_count=1), "reads the tensor type 99"),
        (header(tensors=tensor_info("t", (1,), 0, 32) + bytes(99), tensor_count=1), "it should begin at 64"),
        (header(tensors=tensor_info("t", (1,) * 5, 0, 0), tensor_count=1), "5 dimensions"),
    ],
)
def test_damage_is_named_with_its_place(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(BitconvertError) as caught:
        open_gguf(path)
    assert caught.value.message.startswith(f"{path}: ")
    assert told in caught.value.message


def test_a_config_that_promises_a_giant_allocates_nothing(tmp_path: Path, latent: Path) -> None:
    """The tensors are held against the config before there is a model of the size that it says."""
    content = Path(pack_one(latent, "tq2_0", tmp_path).path).read_bytes()
    for key, value, told in (
        ("feed_forward_length", 2**30, r"ffn_\w+\.weight has shape \(\d+, \d+\), expected"),
        ("block_count", 2**31, "block_count is 2147483648, with 21 tensors"),
        ("attention.head_count_kv", 2**31, "num_key_value_heads is 2147483648"),
    ):
        name = f"llama.{key}".encode()
        at = content.index(name) + len(name) + 4
        damaged = tmp_path / "giant.gguf"
        damaged.write_bytes(content[:at] + struct.pack("<I", value) + content[at + 4 :])
        with pytest.raises(BitconvertError, match=told):
            open_checkpoint(str(damaged)).load()


def test_a_weight_that_is_not_ternary_is_told_where_the_file_says_it_is(tmp_path: Path, latent: Path) -> None:
    path = Path(pack_one(latent, "q8_0", tmp_path).path)
    raw = bytearray(path.read_bytes())
    raw[open_gguf(path).tensors["blk.1.ffn_up.weight"].data_offset + 2] = 5  # the first number behind a block's scale
    path.write_bytes(raw)
    with pytest.raises(BitconvertError, match=r"tensor model\.layers\.1\.mlp\.up_proj\.weight is not ternary"):
        open_checkpoint(str(path)).load()
