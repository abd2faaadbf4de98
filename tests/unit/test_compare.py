"""``bitconvert compare``: the answers are generate's, the numbers eval's, and what is wrong is said before any work."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from bitconvert.errors import BitconvertError, UsageError
from bitconvert.evaluation import compare as module
from bitconvert.evaluation.compare import compare
from bitconvert.evaluation.evaluate import evaluate
from bitconvert.evaluation.generate import generate
from bitconvert.evaluation.prompts import ASKED, CONTINUED, read_prompts
from tests.models import write_model
from tests.packed import make_checkpoint, pack_directory
from tests.recording import Recorder

PROMPTS = ("Once upon a time", "def add(a, b):")


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """An original, its ternary latents, and a file packed from those."""
    directory = tmp_path_factory.mktemp("trio")
    latent = make_checkpoint(directory / "ternary")
    original = shutil.copytree(latent, directory / "original")
    (original / "bitconvert.json").unlink()
    return [str(original), str(latent), str(pack_directory(latent, "tq2_0", directory / "packed"))]


def test_answers_are_those_of_generate(trio: list[str]) -> None:
    report = compare(trio, PROMPTS, max_tokens=6, temperature=1.0, seed=3)
    assert report.prompts == PROMPTS
    for model in report.models:
        alone = [generate(model.model, prompt, max_tokens=6, temperature=1.0, seed=3) for prompt in PROMPTS]
        assert model.answers == tuple(one.text for one in alone)
        assert model.runtime == alone[0].runtime
    assert [model.kind for model in report.models] == ["plain", "latent", "gguf"]
    assert [model.ppl for model in report.models] == [None, None, None]


def test_numbers_are_those_of_eval(trio: list[str], story: Path) -> None:
    report = compare(trio, PROMPTS[:1], data=story, max_tokens=1, runtime="torch")
    reference, *others = report.models
    alone = evaluate(trio[0], data=story).perplexity
    assert alone is not None
    assert (reference.ppl, reference.ppl_stderr) == pytest.approx((alone.ppl, alone.stderr))
    assert (reference.ppl_ratio, reference.kl, reference.top1_agreement) == (1.0, 0.0, 1.0)
    for model in others:
        measured = evaluate(model.model, data=story, against=trio[0])
        assert measured.perplexity is not None
        assert measured.comparison is not None
        assert (model.ppl, model.ppl_stderr) == (measured.perplexity.ppl, measured.perplexity.stderr)
        assert (model.kl, model.kl_stderr) == (measured.comparison.kl, measured.comparison.kl_stderr)
        assert model.top1_agreement == measured.comparison.top1_agreement
        assert model.kl > 0
    assert report.tokens_scored == alone.tokens_scored
    json.dumps(asdict(report), allow_nan=False)


def test_windows_are_those_of_the_shortest_context(trio: list[str], story: Path, tmp_path: Path) -> None:
    short = shutil.copytree(trio[0], tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    report = compare([trio[0], trio[1], str(short)], PROMPTS[:1], data=story, max_tokens=1)
    alone = evaluate(trio[1], data=story, context=64).perplexity
    assert alone is not None
    assert report.models[1].ppl == alone.ppl
    assert report.models[2].kl == pytest.approx(0, abs=1e-6)


def test_without_prompts_there_are_some(trio: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert compare(trio[:2], max_tokens=1).prompts == CONTINUED
    monkeypatch.setattr(module, "prompt_texts", lambda *_: [])
    monkeypatch.setattr(module, "generate_all", lambda _, prompts, *__, **___: [generate(trio[0], "a", max_tokens=1)])
    assert compare(trio[:2], chat=True).prompts == ASKED


# ---- said before any work ----


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """A comparison in which nothing may be generated."""
    monkeypatch.setattr(module, "generate_all", lambda *_, **__: pytest.fail("work was done"))


def test_a_damaged_model_among_several(trio: list[str], tmp_path: Path, idle: None) -> None:
    damaged = shutil.copytree(trio[1], tmp_path / "damaged")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(BitconvertError, match=r"damaged.*truncated"):
        compare([*trio, str(damaged)])
    with pytest.raises(BitconvertError, match="no such file"):
        compare([*trio, "/no/such"])


def test_a_model_that_cannot_chat(trio: list[str], idle: None) -> None:
    with pytest.raises(BitconvertError, match="no chat template"):
        compare(trio, chat=True)


def test_models_of_other_tokens(trio: list[str], story: Path, tmp_path: Path, idle: None) -> None:
    other = write_model(tmp_path / "other", "llama2")
    with pytest.raises(BitconvertError, match=r"other cannot be compared with .*original: their tokenizers"):
        compare([trio[0], str(other)], data=story)


def test_a_directory_for_llama_cpp(trio: list[str], idle: None) -> None:
    with pytest.raises(UsageError, match="GGUF files only"):
        compare([trio[2], trio[0]], runtime="llama.cpp")


def test_one_model_is_not_compared(trio: list[str]) -> None:
    with pytest.raises(UsageError, match="one model cannot be compared"):
        compare(trio[:1])


# ---- prompts of a file ----


def test_prompts_of_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\n  two \n")
    (tmp_path / "b.jsonl").write_text('{"text": "of two\\nlines"}\n{"text": "three"}\n')
    assert read_prompts(tmp_path / "a.txt") == ["one", "  two "]
    assert read_prompts(tmp_path / "b.jsonl") == ["of two\nlines", "three"]


def test_files_that_hold_no_prompts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n")
    with pytest.raises(BitconvertError, match=r"a\.txt: holds no text"):
        read_prompts(tmp_path / "a.txt")
    with pytest.raises(BitconvertError, match="not a kind of prompt list"):
        read_prompts(tmp_path / "a.csv")
    with pytest.raises(BitconvertError, match=r"missing\.txt: no such file"):
        read_prompts(tmp_path / "missing.txt")


def test_progress_names_each_model(trio: list[str]) -> None:
    recorder = Recorder()
    compare(trio[:2], PROMPTS[:1], max_tokens=1, reporter=recorder)
    assert recorder.stages == ["open the models", *(f"generate with {name}" for name in trio[:2])]
