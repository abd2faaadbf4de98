"""ONNX: real ONNX Runtime computes the baked model, the weights are exact, and what has no graph is refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor

from bitconvert.errors import BitconvertError
from bitconvert.models.checkpoint import open_checkpoint
from bitconvert.packing.onnx_data import OnnxData
from bitconvert.packing.onnx_graph import FAMILIES
from bitconvert.packing.pack import pack
from bitconvert.recipe import Packing
from tests.models import VARIANTS
from tests.packed import baked, make_checkpoint, pack_directory, ternary_weights
from tests.recording import Recorder

TOLERANCE = 1e-4  # of the largest logit; float32 sums in another order give about 1e-6


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    return pack_directory(tiny, "onnx", tmp_path_factory.mktemp("packed"))


class Runtime:
    """A packed directory in ONNX Runtime, fed as transformers.js feeds it."""

    def __init__(self, directory: Path) -> None:
        self._session = onnxruntime.InferenceSession(directory / "onnx" / "model_q2.onnx")
        self._shapes = {put.name: put.shape for put in self._session.get_inputs()}
        self._outputs = [out.name for out in self._session.get_outputs()]

    def logits(self, ids: Tensor, mask: Tensor, *, steps: tuple[int, ...] = ()) -> Tensor:
        """Logits of all tokens, computed at once or piece by piece with the past of the pieces before."""
        past = {name: self._nothing(name, len(ids)) for name in self._shapes if name.startswith("past")}
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        parts, ends = [], (*steps, ids.shape[1])
        for begin, end in zip((0, *ends), ends, strict=False):
            feed = {
                "input_ids": ids[:, begin:end],
                "position_ids": positions[:, begin:end],
                "attention_mask": mask[:, :end],
            }
            given = self._session.run(None, {name: value.numpy() for name, value in feed.items()} | past)
            outputs = dict(zip(self._outputs, given, strict=True))
            parts.append(torch.from_numpy(outputs.pop("logits")))
            past = {name.replace("present", "past_key_values"): value for name, value in outputs.items()}
        return torch.cat(parts, dim=1)

    def _nothing(self, name: str, batch: int) -> np.ndarray[Any, Any]:
        _, heads, _, size = self._shapes[name]
        return np.zeros((batch, heads, 0, size), np.float32)


def padded_tokens(side: str) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, slice(0, 6) if side == "left" else slice(14, 20)] = 0
    return ids, mask


def require_same_logits(model: Path, directory: Path, side: str = "left") -> None:
    """All at once, then with a past, token by token at the end."""
    ids, mask = padded_tokens(side)
    with torch.no_grad():
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        expected = baked(model)(ids, attention_mask=mask, position_ids=positions).logits
    runtime = Runtime(directory)
    for steps in ((), (11, 17, 18, 19)):
        difference = (runtime.logits(ids, mask, steps=steps) - expected)[mask.bool()].abs().max()
        assert difference <= TOLERANCE * expected.abs().max(), steps


# ---- the computation -------------------------------------------------------------------------------------------------


def architecture(variant: str) -> str:
    return str(VARIANTS[variant][1].get("model_type", "llama"))


@pytest.mark.parametrize("variant", [name for name in VARIANTS if architecture(name) in FAMILIES])
def test_onnx_runtime_computes_the_baked_model(tmp_path: Path, variant: str) -> None:
    model = make_checkpoint(tmp_path / "tiny", variant)
    require_same_logits(model, pack_directory(model, "onnx", tmp_path / "out"))


@pytest.mark.parametrize("granularity", ["row", "group:16", "group:48", "group:256"])
def test_onnx_runtime_computes_every_granularity(tmp_path: Path, granularity: str) -> None:
    shape = {"hidden_size": 192, "intermediate_size": 240} if granularity == "group:48" else {}
    model = make_checkpoint(tmp_path / "tiny", "smollm2", granularity, **shape)
    require_same_logits(model, pack_directory(model, "onnx", tmp_path / "out"), side="right")


@pytest.mark.parametrize("variant", ["mistral", "ministral"])
def test_a_sliding_window_hides_what_is_further_back(tmp_path: Path, variant: str) -> None:
    model = make_checkpoint(tmp_path / "tiny", variant, sliding_window=5)
    require_same_logits(model, pack_directory(model, "onnx", tmp_path / "out"))


def test_rows_that_no_block_divides(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "tiny", intermediate_size=300, hidden_size=200, num_attention_heads=4)
    require_same_logits(model, pack_directory(model, "onnx", tmp_path / "out"))


# ---- what is stored --------------------------------------------------------------------------------------------------


def test_the_initializers_are_the_codes_and_scales(tiny: Path, packed: Path) -> None:
    model = onnx.load(packed / "onnx" / "model_q2.onnx")
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for name, weight in ternary_weights(open_checkpoint(str(tiny))).items():
        blocks, scales = stored[name], stored[f"{name}_scale"]
        codes = np.stack([(blocks >> 2 * place & 3).astype(np.int8) - 2 for place in range(4)], axis=-1)
        np.testing.assert_array_equal(
            (codes.reshape(*scales.shape, -1) * scales[..., np.newaxis]).reshape(weight.shape), weight.numpy()
        )
        assert set(np.unique(codes)) == {-1, 0, 1}
        assert np.unique(scales).size == 1
    assert {node.op_type for node in model.graph.node if node.domain} == {"MatMulNBits"}
    linears = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    assert len(linears) == 14
    for node in linears:
        told = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        assert (told["bits"], told["block_size"]) == (2, 128)
        assert "accuracy_level" not in told  # int8 activations otherwise


def test_the_graph_is_valid_onnx_and_small(packed: Path) -> None:
    path = packed / "onnx" / "model_q2.onnx"
    onnx.checker.check_model(path)
    assert path.stat().st_size < 50_000


def test_the_directory_is_what_transformers_js_reads(tiny: Path, packed: Path) -> None:
    """configs.js and models/session.js of transformers.js 4: file names by dtype, data files by their number."""
    config = json.loads((packed / "config.json").read_text())
    assert config["transformers.js_config"] == {"dtype": "q2", "use_external_data_format": True}
    assert "quantization_config" not in config
    assert {path.relative_to(packed).as_posix() for path in packed.rglob("*") if path.is_file()} >= {
        "onnx/model_q2.onnx",
        "onnx/model_q2.onnx_data",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    session = onnxruntime.InferenceSession(packed / "onnx" / "model_q2.onnx")
    cache = [f"{layer}.{kind}" for layer in range(config["num_hidden_layers"]) for kind in ("key", "value")]
    inputs = {put.name: put.shape for put in session.get_inputs()}
    assert set(inputs) == {
        "input_ids",
        "attention_mask",
        "position_ids",
        *(f"past_key_values.{part}" for part in cache),
    }
    assert [out.name for out in session.get_outputs()] == ["logits", *(f"present.{part}" for part in cache)]
    size = config["hidden_size"] // config["num_attention_heads"]
    assert inputs["past_key_values.0.key"] == ["batch", config["num_key_value_heads"], "past", size]


@pytest.mark.parametrize("victim", ["model.norm.weight", "1.mlp.down_proj.weight", "1.mlp.down_proj.weight_scale"])
def test_a_flipped_byte_is_noticed(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, victim: str) -> None:
    write = OnnxData.write

    def write_badly(self: OnnxData, name: str, values: np.ndarray[Any, Any]) -> None:
        if name.endswith(victim):
            values = values.copy()
            values.view(np.uint8).flat[0] ^= 0x03
        write(self, name, values)

    monkeypatch.setattr(OnnxData, "write", write_badly)
    with pytest.raises(BitconvertError, match="does not read back"):
        pack_directory(tiny, "onnx", tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---- what is refused -------------------------------------------------------------------------------------------------


def change_config(model: Path, **values: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"hidden_act": "gelu"}, "no graph for activation 'gelu'"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
            "no graph for rope type 'dynamic'",
        ),
    ],
)
def test_what_the_graph_does_not_compute_is_refused(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    model = make_checkpoint(tmp_path / "tiny")
    change_config(model, **change)
    with pytest.raises(BitconvertError, match=told):
        pack_directory(model, "onnx", tmp_path / "out")


@pytest.mark.parametrize("variant", [name for name in VARIANTS if architecture(name) not in FAMILIES])
def test_other_architectures_are_refused_by_name(tmp_path: Path, variant: str) -> None:
    model = make_checkpoint(tmp_path / "tiny", variant, layers=1)
    with pytest.raises(BitconvertError, match=f"no graph for architecture '{architecture(variant)}'") as told:
        pack_directory(model, "onnx", tmp_path / "out")
    assert told.value.hint == f"architectures that it has: {', '.join(FAMILIES)}"


def test_without_the_onnx_package_the_error_says_what_to_install(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "onnx" else find(name, *rest))
    with pytest.raises(BitconvertError, match="needs the onnx package") as told:
        pack_directory(tiny, "onnx", tmp_path)
    assert told.value.hint == "pip install 'bitconvert[onnx]'"


def test_onnx_is_not_read_back(packed: Path) -> None:
    with pytest.raises(BitconvertError, match="ONNX files are not read back"):
        open_checkpoint(str(packed)).load()
    with pytest.raises(BitconvertError, match="ONNX files are not read back"):
        open_checkpoint(str(packed / "onnx" / "model_q2.onnx"))


def test_a_shard_size_is_answered(tmp_path: Path, tiny: Path) -> None:
    told = Recorder()
    pack(open_checkpoint(str(tiny)), Packing(formats=("onnx",), max_shard_size=100_000), tmp_path, reporter=told)
    assert any("one file, whatever --max-shard-size says" in note for note in told.notes)
