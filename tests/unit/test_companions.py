"""What lies beside packed files: a model card that the hub understands, a Modelfile that names what Ollama reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import metadata_load

from bitconvert.models.checkpoint import open_checkpoint
from bitconvert.models.latent import ONLINE_BITNET
from bitconvert.models.lineage import HeldOut, Lineage
from bitconvert.packing.pack import foresee_files, pack
from bitconvert.recipe import Packing, Scaling
from bitconvert.report.packing import PackReport
from bitconvert.report.reporter import Silent
from tests.models import write_model


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_model(tmp_path_factory.mktemp("models") / "Tiny", "smollm2")
    Lineage(
        source="someone/original",
        lam=1.0,
        scaling=Scaling(),
        tokens_seen=123_456,
        steps=7,
        data="stories.txt",
        license="apache-2.0",
        held_out=HeldOut(original=10.0, rounded=2e6, ternary=12.5),
    ).save(directory)
    (directory / "recipe.yaml").write_text("training:\n  tokens: 123456\n")
    return directory


def run(model: Path, output: Path, *formats: str, reporter: Silent | None = None, **options: bool) -> PackReport:
    checkpoint = open_checkpoint(str(model))
    return pack(checkpoint, Packing(formats=formats), output, reporter=reporter or Silent(), **options)


def test_the_card_tells_what_a_buyer_would_ask(tmp_path: Path, latent: Path) -> None:
    report = run(latent, tmp_path, "tq2_0", "safetensors")
    assert report.companions == [str(tmp_path / "README.md"), str(tmp_path / "SHA256SUMS")]
    header = metadata_load(tmp_path / "README.md")
    assert header["base_model"] == "someone/original"
    assert header["license"] == "apache-2.0"
    assert {"ternary", "bitnet", "1.58-bit"} <= set(header["tags"])
    card = (tmp_path / "README.md").read_text()
    for told in (
        "`Tiny-TQ2_0.gguf`",
        "llama-cli -m Tiny-TQ2_0.gguf",
        'from_pretrained("Tiny-bitnet")',
        "12.50 (ratio 1.25)",
        "2e+06",
        "123,456 tokens in 7 steps",
        "stories.txt",
        "tokens: 123456",
    ):
        assert told in card


def test_a_rounded_model_is_called_a_baseline(tmp_path: Path) -> None:
    model = write_model(tmp_path / "plain", "smollm2")
    run(model, tmp_path / "out", "tq2_0", round_plain=True)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "a baseline to compare with" in card
    assert "What it costs" not in card
    assert "base_model" not in metadata_load(tmp_path / "out" / "README.md")  # a path is no model of the hub


def test_latents_that_another_program_trained_are_not_called_rounded(tmp_path: Path) -> None:
    model = write_model(tmp_path / "Theirs", "smollm2")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": ONLINE_BITNET}))
    run(model, tmp_path / "out", "tq2_0")
    assert "rounding alone" not in (tmp_path / "out" / "README.md").read_text()


def test_the_modelfile_names_a_file_that_ollama_reads(tmp_path: Path, latent: Path) -> None:
    report = run(latent, tmp_path, "tq2_0", "q2_0")
    assert report.companions == [str(tmp_path / name) for name in ("README.md", "Modelfile", "SHA256SUMS")]
    assert (tmp_path / "Modelfile").read_text().splitlines() == [
        "# ollama create tiny -f Modelfile",
        "FROM ./Tiny-Q2_0.gguf",
        "PARAMETER num_ctx 512",
        'PARAMETER stop "<|end|>"',
    ]


def test_a_model_without_an_end_token_stops_at_no_text(tmp_path: Path) -> None:
    """Its GGUF file names a byte that no text holds, and the spelling of that byte is a letter."""
    model = write_model(tmp_path / "Endless", "smollm2", eos_token_id=None)
    for file, key in (("tokenizer_config.json", "eos_token"), ("config.json", "eos_token_id")):
        (model / file).write_text(json.dumps(json.loads((model / file).read_text()) | {key: None}))
    run(model, tmp_path / "out", "q2_0", round_plain=True)
    assert "PARAMETER stop" not in (tmp_path / "out" / "Modelfile").read_text()


def test_no_modelfile_where_ollama_reads_nothing(tmp_path: Path, latent: Path) -> None:
    run(latent, tmp_path, "tq1_0", "tq2_0", "safetensors")
    assert not (tmp_path / "Modelfile").exists()


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: mit\n---\n# Model\n", "mit"),
        ("# no header\n", ""),
        ("---\nlicense: [a, b]\n---\n", ""),
        ("---\nlicense: {\n---\n", ""),
        ("---\n- a list\n---\n", ""),
    ],
)
def test_the_licence_comes_from_the_originals_card(tmp_path: Path, card: str, licence: str) -> None:
    model = write_model(tmp_path / "plain", "smollm2")
    (model / "README.md").write_text(card)
    assert open_checkpoint(str(model)).license == licence
    if licence:
        gguf = run(model, tmp_path / "out", "tq2_0", round_plain=True).files[0].path
        assert open_checkpoint(gguf).license == licence


def test_the_card_does_not_tell_the_way_to_the_original(tmp_path: Path) -> None:
    model = write_model(tmp_path / "plain", "smollm2")
    run(model, tmp_path / "out", "tq2_0", round_plain=True)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Made from plain by" in card
    assert str(tmp_path) not in card


def test_what_a_user_must_know_of_a_file_stands_in_card_and_modelfile(tmp_path: Path) -> None:
    model = write_model(tmp_path / "long", "phi4")
    run(model, tmp_path / "out", "q2_0", round_plain=True)
    for name in ("README.md", "Modelfile"):
        assert "llama.cpp takes the long rope factors" in (tmp_path / "out" / name).read_text()


def test_a_file_of_several_types_runs_where_all_of_them_do(tmp_path: Path, latent: Path) -> None:
    model = write_model(tmp_path / "narrow", "smollm2", hidden_size=64, intermediate_size=256)
    row = "its matrices in Q2_0: recent llama.cpp (CPU, CUDA, Metal, Vulkan), recent Ollama |"
    report = run(model, tmp_path / "out", "tq2_0", round_plain=True)
    assert {tensor.type for tensor in report.files[0].tensors if tensor.ternary} == {"TQ2_0", "Q2_0"}
    assert row in (tmp_path / "out" / "README.md").read_text()
    run(latent, tmp_path / "wide", "tq2_0", "q8_0")
    assert "its matrices in" not in (tmp_path / "wide" / "README.md").read_text()
    foreseen = {file.format: file.runs_in for file in foresee_files(open_checkpoint(str(model)), Packing(), Scaling())}
    assert foreseen["tq2_0"].endswith(row.removesuffix(" |"))
    assert "Q2_0:" not in foreseen["q2_0"] + foreseen["q8_0"]
