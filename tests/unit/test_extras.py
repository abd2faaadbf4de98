"""What is optional may be missing: the command that needs it says how to install it, and leaves nothing behind."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest

from tests.commands import Command
from tests.pages import read

EXTRAS = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]


@pytest.fixture(scope="module")
def gguf(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that llama.cpp could read."""
    import bitconvert

    packing = bitconvert.Packing(formats=("q8_0",))
    checkpoint, output = bitconvert.open_checkpoint(str(smollm)), tmp_path_factory.mktemp("gguf")
    report = bitconvert.pack(checkpoint, packing, output, round_plain=True, reporter=bitconvert.Silent())
    return Path(report.files[0].path)


MISSING = [
    ("xllamacpp", "'bitconvert[llamacpp]'", "eval GGUF --ppl --data STORY --runtime llama.cpp"),
    ("xllamacpp", "'bitconvert[llamacpp]'", "generate GGUF --prompt x --runtime llama.cpp"),
    ("xllamacpp", "'bitconvert[llamacpp]'", "pack MODEL --round --format q8_0 --embedding-type q6_k --output OUT"),
    ("onnx", "'bitconvert[onnx]'", "pack MODEL --round --format onnx --output OUT"),
    ("bitsandbytes", "'bitconvert[optim8bit]'", "warmup --model MODEL --output OUT --set optimizer.name=adamw8bit"),
    ("lm_eval", "'bitconvert[tasks]'", "eval MODEL --tasks arc_easy"),
    (
        "tensorboard",
        "'bitconvert[tensorboard]'",
        "warmup --model MODEL --output OUT --set training.trackers=[tensorboard]",
    ),
    ("wandb", "'bitconvert[wandb]'", "warmup --model MODEL --output OUT --set training.trackers=[wandb]"),
    ("trackio", "'bitconvert[trackio]'", "warmup --model MODEL --output OUT --set training.trackers=[trackio]"),
]
"""Module that is missing, what pip is told to install, a command line that needs it."""


@pytest.mark.parametrize(("module", "install", "line"), MISSING)
def test_a_missing_package_is_named_with_the_command_that_brings_it(
    module: str,
    install: str,
    line: str,
    bitconvert: Command,
    smollm: Path,
    gguf: Path,
    story: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # an import of None fails
    monkeypatch.delenv("LLAMA_CPP_LIB", raising=False)
    places = {"GGUF": gguf, "MODEL": smollm, "STORY": story, "OUT": tmp_path / "out"}
    outcome = bitconvert(*(places.get(word, word) for word in line.split()))
    assert outcome.code in (1, 2), outcome.err
    outcome.error()
    assert f"hint: pip install {install}" in outcome.err
    assert not list(tmp_path.rglob("*.gguf")) + list(tmp_path.rglob("*.safetensors"))


def test_every_extra_that_a_hint_names_exists() -> None:
    package = Path(__file__).parent.parent.parent / "bitconvert"
    sources = (path.read_text(encoding="utf-8") for path in package.rglob("*.py"))
    named = {extra for source in sources for extra in re.findall(r"bitconvert\[(\w+)\]", source)}
    assert named
    assert named <= set(EXTRAS)
    assert named >= set(EXTRAS) - {"dev", "optim8bit"}, "an extra that no hint names"
