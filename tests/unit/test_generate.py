"""``bitconvert generate``: the most probable text in both runtimes, draws that repeat, chat templates, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from bitconvert.errors import BitconvertError, UsageError
from bitconvert.evaluation import subjects
from bitconvert.evaluation.generate import generate
from bitconvert.models import generation
from bitconvert.models.checkpoint import open_checkpoint
from tests.models import write_gguf, write_model

PROMPT = "hello"
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}[assistant]"


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer puts BOS first and has a chat template that does so too."""
    directory = write_model(tmp_path_factory.mktemp("bos") / "tiny", "llama3")
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    return directory


@pytest.fixture(scope="module")
def gguf(with_bos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(with_bos, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def greedy_ids(model: Path, prompt: str, count: int, *, special: bool = True) -> list[int]:
    """The most probable continuation, token by token, without a cache."""
    checkpoint = open_checkpoint(str(model))
    loaded, tokenizer = checkpoint.load(), checkpoint.tokenizer()
    start = ids = tokenizer(prompt, add_special_tokens=special, return_tensors="pt")["input_ids"]
    for _ in range(count):
        with torch.no_grad():
            ids = torch.cat([ids, loaded(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids[0, start.shape[1] :].tolist()


def greedy(model: Path, prompt: str, count: int, *, special: bool = True) -> str:
    """The same as text."""
    return decoded(model, greedy_ids(model, prompt, count, special=special))


def decoded(model: Path, ids: list[int]) -> str:
    return str(open_checkpoint(str(model)).tokenizer().decode(ids, skip_special_tokens=True))


def test_torch_writes_the_most_probable_text(with_bos: Path) -> None:
    report = generate(str(with_bos), PROMPT, max_tokens=12)
    assert (report.runtime, report.prompt, report.temperature) == ("torch", PROMPT, 0.0)
    assert report.text == greedy(with_bos, PROMPT, 12)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_models_own_sampling_defaults_change_nothing(with_bos: Path, tmp_path: Path, temperature: float) -> None:
    copy = shutil.copytree(with_bos, tmp_path / "copy")
    settings = {"do_sample": True, "temperature": 0.1, "top_p": 0.01, "top_k": 1, "repetition_penalty": 3.0}
    (copy / "generation_config.json").write_text(json.dumps(settings))
    plain, bent = (generate(str(m), PROMPT, max_tokens=12, temperature=temperature) for m in (with_bos, copy))
    assert bent.text == plain.text


def test_llama_cpp_writes_the_same(gguf: Path, with_bos: Path) -> None:
    pytest.importorskip("xllamacpp")
    report = generate(str(gguf), PROMPT, max_tokens=12)
    assert report.runtime.startswith("llama.cpp")
    assert report.text == greedy(with_bos, PROMPT, 12)


def test_auto_falls_back_to_torch(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise BitconvertError("llama.cpp is not installed", "install it")

    monkeypatch.setattr(subjects, "find_library", missing)
    assert generate(str(gguf), PROMPT, max_tokens=2).runtime == "torch"


@pytest.mark.parametrize("runtime", ["torch", "llama.cpp"])
def test_draws_repeat_with_their_seed(gguf: Path, runtime: Any) -> None:
    if runtime == "llama.cpp":
        pytest.importorskip("xllamacpp")
    texts = [
        generate(str(gguf), PROMPT, max_tokens=12, temperature=2.0, seed=seed, runtime=runtime).text
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_the_callers_random_numbers_are_left_alone(with_bos: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    generate(str(with_bos), PROMPT, max_tokens=2, temperature=1.0, seed=1)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("runtime", ["torch", "llama.cpp"])
def test_chat_goes_through_the_template_with_one_bos(gguf: Path, with_bos: Path, runtime: Any) -> None:
    if runtime == "llama.cpp":
        pytest.importorskip("xllamacpp")
    report = generate(str(gguf), "Who?", chat=True, max_tokens=12, runtime=runtime)
    assert report.prompt == "<|begin|>[user] Who?[assistant]"
    assert report.text == greedy(with_bos, report.prompt, 12, special=False)


def test_chat_without_a_template_is_refused(smollm: Path) -> None:
    with pytest.raises(BitconvertError, match="no chat template"):
        generate(str(smollm), "Who?", chat=True)


def test_the_text_ends_where_the_model_ends_it(with_bos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = greedy_ids(with_bos, PROMPT, 12)
    end = next(token for token in whole if token != whole[0])
    monkeypatch.setattr(generation, "ends_of", lambda *_: [end])
    expected = decoded(with_bos, whole[: whole.index(end)])
    assert generate(str(with_bos), PROMPT, max_tokens=12).text == expected


def test_the_ends_are_the_models_and_the_tokenizers(with_bos: Path) -> None:
    loaded = subjects.TorchModel.load(open_checkpoint(str(with_bos)))
    assert loaded.model.generation_config is not None
    loaded.model.generation_config.eos_token_id = [7, 5]
    assert generation.ends_of(loaded.model, loaded.tokenizer) == sorted({5, 7, loaded.tokenizer.eos_token_id})


@pytest.mark.parametrize("runtime", ["torch", "llama.cpp"])
def test_a_full_context_ends_the_text(tmp_path: Path, runtime: Any) -> None:
    if runtime == "llama.cpp":
        pytest.importorskip("xllamacpp")
    model = write_model(tmp_path / "short", "smollm2", layers=1, max_position_embeddings=32, tie_word_embeddings=False)
    gguf = write_gguf(model, tmp_path / "short.gguf")
    tokenizer = open_checkpoint(str(model)).tokenizer()
    prompt = "Once upon"
    written = greedy_ids(gguf, prompt, 32 - len(tokenizer(prompt)["input_ids"]))
    assert tokenizer.eos_token_id not in written
    assert generate(str(gguf), prompt, max_tokens=500, runtime=runtime).text == decoded(gguf, written)
    with pytest.raises(BitconvertError, match="fills the model's context of 32"):
        generate(str(gguf), PROMPT * 20, runtime=runtime)


def test_arguments_that_make_no_sense(smollm: Path) -> None:
    with pytest.raises(UsageError, match="--max-tokens is 0"):
        generate(str(smollm), PROMPT, max_tokens=0)
    with pytest.raises(UsageError, match="--temperature is -1"):
        generate(str(smollm), PROMPT, temperature=-1)
    with pytest.raises(UsageError, match="the prompt is empty"):
        generate(str(smollm), "")
    with pytest.raises(UsageError, match="GGUF files only"):
        generate(str(smollm), PROMPT, runtime="llama.cpp")
