"""The energy estimate: the numbers that the BitNet papers print, and the arithmetic of each way to store a weight."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest

from bitconvert.evaluation.energy import FP16, INT8, estimate_energy
from bitconvert.evaluation.inspect import inspect
from bitconvert.models.checkpoint import Checkpoint, open_checkpoint
from bitconvert.models.lineage import Lineage
from bitconvert.recipe import Scaling
from bitconvert.report.inspection import EnergyReport, EnergyRow, ScaleSummary, TensorReport
from tests.models import write_model
from tests.packed import make_checkpoint, pack_directory

PUBLISHED = {
    "LLaMA 3.2 1B": (0.258, False, (16, 2048, 8192, 32, 8, 64)),
    "Gemma-3 1B": (0.186, False, (26, 1152, 6912, 4, 1, 256)),
    "Qwen2.5 1.5B": (0.347, False, (28, 1536, 8960, 12, 2, 128)),
    "SmolLM2 1.7B": (0.425, False, (24, 2048, 8192, 32, 32, 64)),
    "MiniCPM 2B": (0.649, False, (40, 2304, 5760, 36, 36, 64)),
    "BitNet b1.58 2B": (0.028, True, (30, 2560, 6912, 20, 5, 128)),
}
"""Joules for 512 tokens in table 1 of the BitNet b1.58 2B4T report (arXiv 2504.12285), without the output head; then
whether it is ternary, its layers, hidden size, intermediate size, heads, heads of keys, and their size."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_is_the_estimate_of_the_papers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    joules, ternary, (layers, hidden, intermediate, heads, kv_heads, head) = PUBLISHED[name]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head,
        "vocab_size": 1000,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    if ternary:
        Lineage(source="somewhere", lam=1.0, scaling=Scaling(), tokens_seen=0).save(tmp_path)
    monkeypatch.setattr(Checkpoint, "stored_as", lambda self, name: "BF16")
    checkpoint = open_checkpoint(str(tmp_path))
    report = estimate_energy(checkpoint, [told(name, shape, ternary) for name, shape in shapes(checkpoint).items()])
    found = sum(row.joules for row in report.rows if row.part != "output head")
    assert round(report.context * found, 3) == joules


def shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in checkpoint.skeleton().named_parameters()}


def told(name: str, shape: tuple[int, ...], ternary: bool) -> TensorReport:
    """A tensor as ``inspect`` would tell of it."""
    size = math.prod(shape)
    scale = ScaleSummary(1, 0.1, 0.1, 0.1) if ternary and "proj" in name else None
    return TensorReport(name, "BF16", shape, scale is not None, size, 2 * size, 16.0, 0.0, scale, hf_name=name)


def test_a_ternary_product_saves_what_the_paper_says() -> None:
    """arXiv 2402.17764, section 3: 71.4 times the arithmetic energy of a matrix product on 7 nm chips."""
    assert (FP16.add + FP16.multiply) / INT8.add == pytest.approx(71.4, abs=0.05)


# ---- what a stored type means ----

LINEAR_WEIGHTS = 2 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 512 * 256)  # of two layers of the tiny model


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("latent") / "tiny", kept=("model.layers.0.mlp.down_proj",))


def energy_of(model: Path) -> tuple[EnergyReport, dict[str, EnergyRow]]:
    report = inspect(str(model), energy=True).energy
    assert report is not None
    return report, {row.part: row for row in report.rows}


def test_the_text_is_no_longer_than_the_model_takes(tmp_path: Path) -> None:
    contexts = {
        limit: energy_of(write_model(tmp_path / str(limit), "llama2", max_position_embeddings=limit))[0].context
        for limit in (256, 4096)
    }
    assert contexts == {256: 256, 4096: 512}


@pytest.mark.parametrize(
    ("name", "linears", "kept", "head"),
    [
        ("tq2_0", "INT8 additions", "INT8", "FP16"),
        ("q8_0", "INT8", "INT8", "FP16"),
        ("f16", "FP16", "INT8", "FP16"),
        ("safetensors", "INT8 additions", "FP32", "FP32"),
        ("compressed-tensors", "FP16", "FP32", "FP32"),
    ],
)
def test_each_file_costs_what_its_runtime_computes(
    latent: Path, tmp_path: Path, name: str, linears: str, kept: str, head: str
) -> None:
    report, _ = energy_of(pack_directory(latent, name, tmp_path))
    counted = Counter({row.arithmetic: row.additions for row in report.rows if "linears" in row.part})
    kept_weights = 256 * 512
    assert counted == Counter({linears: LINEAR_WEIGHTS - kept_weights}) + Counter({kept: kept_weights})
    (last,) = [row for row in report.rows if row.part == "output head"]  # the embedding, which is tied
    assert (last.arithmetic, last.additions) == (head, 256 * open_checkpoint(str(latent)).config["vocab_size"])


def test_scales_are_multiplied_and_counted(tmp_path: Path) -> None:
    coarse = make_checkpoint(tmp_path / "tensor", granularity="tensor")
    fine = make_checkpoint(tmp_path / "group", granularity="group:64")
    few, many = (energy_of(model)[1]["ternary linears"] for model in (coarse, fine))
    inputs_and_outputs = 2 * (2 * (256 + 256) + 2 * (256 + 128) + 2 * (256 + 512) + (512 + 256))
    inputs = 2 * (6 * 256 + 512)
    assert few.multiplications == inputs_and_outputs
    assert many.multiplications == inputs + LINEAR_WEIGHTS // 64
    assert many.joules > few.joules


def test_memory_is_what_the_tensors_take(tmp_path: Path) -> None:
    model = write_model(tmp_path / "tiny", "smollm2")
    report, rows = energy_of(model)
    assert report.weight_bytes == 2 * report.fp16_weight_bytes  # float32
    assert report.kv_bytes_per_token == 2 * 2 * 128 * 2  # two layers, keys and values, two bytes
    assert report.joules_per_token == pytest.approx(sum(row.joules for row in rows.values()))
    assert rows["attention"].joules == rows["attention"].fp16_joules
