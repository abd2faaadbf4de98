"""``bitconvert eval``: one number for every form a model takes, distances, llama.cpp, lm-eval, and what is refused."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from bitconvert.errors import BitconvertError, UsageError
from bitconvert.evaluation import runtimes, subjects
from bitconvert.evaluation.evaluate import evaluate
from bitconvert.evaluation.inspect import inspect
from bitconvert.models import gguf_source
from bitconvert.models.checkpoint import open_checkpoint
from bitconvert.models.latent import ONLINE_BITNET
from bitconvert.models.lineage import Lineage
from bitconvert.packing.pack import pack
from bitconvert.recipe import Packing, Scaling
from bitconvert.report.evaluation import EvalReport, Perplexity
from bitconvert.report.reporter import Silent
from tests.models import write_gguf, write_model

CONTEXT = 64


def write_latent(directory: Path, **changes: Any) -> Path:
    """A tiny random model as warmup would leave it."""
    write_model(directory, "smollm2", **changes)
    Lineage(source="tiny", lam=1.0, scaling=Scaling(), tokens_seen=1).save(directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": ONLINE_BITNET}))
    return directory


@contextmanager
def edited_safetensors(path: Path) -> Iterator[dict[str, Tensor]]:
    """The tensors of a file, to be changed in place; saved at the end of the block."""
    tensors = load_file(path)
    yield tensors
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def text(story: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "short.txt"
    path.write_text(story.read_text(encoding="utf-8")[:3000] + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as warmup would leave it."""
    return write_latent(tmp_path_factory.mktemp("latent") / "tiny")


@pytest.fixture(scope="module")
def packed(latent: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same weights as files of each kind."""
    output = tmp_path_factory.mktemp("packed")
    report = pack(
        open_checkpoint(str(latent)),
        Packing(
            formats=(
                "safetensors",
                "tq2_0",
                "q2_0",
            )
        ),
        output,
        reporter=Silent(),
    )
    return {file.format: file.path for file in report.files}


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file whose vocabulary puts BOS first."""
    folder = tmp_path_factory.mktemp("bos")
    return write_gguf(write_model(folder / "tiny", "llama3"), folder / "tiny.gguf")


def ppl_of(report: EvalReport) -> Perplexity:
    assert report.perplexity is not None
    return report.perplexity


# ---- torch ----------------------------------------------------------------------------------------------------------


def test_the_report_says_what_the_number_depends_on(smollm: Path, text: Path) -> None:
    report = evaluate(str(smollm), data=text, context=CONTEXT, stride=32, max_tokens=200)
    found = ppl_of(report)
    assert (report.kind, report.runtime, report.data, report.comparison) == ("plain", "torch", str(text), None)
    assert (found.convention, found.context, found.stride, found.bos) == ("hf", CONTEXT, 32, False)
    assert found.tokens_scored == 199
    assert found.text_sha256 == hashlib.sha256(text.read_bytes()).hexdigest()
    assert json.loads(json.dumps(asdict(report), allow_nan=False))["perplexity"]["ppl"] == found.ppl


def test_documents_are_joined_by_an_empty_line(smollm: Path, tmp_path: Path, text: Path) -> None:
    whole = text.read_text(encoding="utf-8")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": half}) + "\n" for half in (whole[:999], whole[999:])))
    (tmp_path / "a.txt").write_text(whole[:999] + "\n\n" + whole[999:])
    records, plain = (evaluate(str(smollm), data=tmp_path / name, context=CONTEXT) for name in ("a.jsonl", "a.txt"))
    assert records.perplexity == plain.perplexity


def test_the_default_context_is_512_or_the_models_limit(smollm: Path, tmp_path: Path, story: Path) -> None:
    assert ppl_of(evaluate(str(smollm), data=story, max_tokens=600)).context == 512
    short = write_model(tmp_path / "short", "smollm2", layers=1, max_position_embeddings=100)
    assert ppl_of(evaluate(str(short), data=story, max_tokens=600)).context == 100
    with pytest.raises(UsageError, match="up to 100 tokens, not 101"):
        evaluate(str(short), data=story, context=101)


def test_every_form_of_a_model_gives_one_number(latent: Path, packed: dict[str, str], text: Path) -> None:
    own = ppl_of(evaluate(str(latent), data=text, context=CONTEXT))
    for form, path in packed.items():
        report = evaluate(path, data=text, context=CONTEXT, against=str(latent))
        assert report.comparison is not None
        # Files hold scales and embeddings in fp16, which tips some int8 activations; the ternary codes are the same.
        assert report.comparison.kl < 5e-4, form
        assert ppl_of(report).ppl == pytest.approx(own.ppl, rel=0.005), form


def test_rounding_shows_in_every_distance(latent: Path, smollm: Path, text: Path) -> None:
    report = evaluate(str(latent), data=text, context=CONTEXT, against=str(smollm))
    original = ppl_of(evaluate(str(smollm), data=text, context=CONTEXT))
    assert report.comparison is not None
    assert report.comparison.original_ppl == pytest.approx(original.ppl)
    assert report.comparison.ppl_ratio == pytest.approx(ppl_of(report).ppl / original.ppl)
    assert report.comparison.kl > 0.05
    assert report.comparison.top1_agreement < 0.9


def test_bos_is_the_tokenizers_habit_unless_asked(with_bos: Path, smollm: Path, text: Path) -> None:
    assert ppl_of(evaluate(str(with_bos), data=text, context=CONTEXT)).bos
    assert not ppl_of(evaluate(str(with_bos), data=text, context=CONTEXT, bos=False)).bos
    assert ppl_of(evaluate(str(smollm), data=text, context=CONTEXT, bos=True)).bos


def test_a_tokenizer_that_only_ends_texts_begins_none(smollm: Path, text: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(smollm, tmp_path / "copy")
    tokenizer = open_checkpoint(str(copy)).tokenizer()
    tokenizer.eos_token = tokenizer.bos_token
    end = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"$A {end[0]}", special_tokens=[end])
    tokenizer.save_pretrained(copy)
    assert not ppl_of(evaluate(str(copy), data=text, context=CONTEXT)).bos


def test_a_packed_model_without_a_scale_is_named(packed: dict[str, str], text: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(packed["safetensors"], tmp_path / "copy")
    name = "model.layers.0.mlp.up_proj.weight_scale"
    with edited_safetensors(copy / "model.safetensors") as tensors:
        tensors.pop(name)
    for use in (lambda: evaluate(str(copy), data=text, context=CONTEXT), lambda: inspect(str(copy))):
        with pytest.raises(BitconvertError, match=f"tensor {name} is missing"):
            use()


def test_threads_are_given_back(smollm: Path, text: Path) -> None:
    before = torch.get_num_threads()
    evaluate(str(smollm), data=text, context=CONTEXT, threads=before + 1)
    assert torch.get_num_threads() == before


# ---- llama.cpp ------------------------------------------------------------------------------------------------------


def naive_llama_perplexity(path: Path, text: str, n_ctx: int) -> tuple[float, float, int]:
    """llama-perplexity's number from llama.cpp's raw logits, token by token: ppl, ±, tokens."""
    values = []
    with runtimes.open_runtime(path, n_ctx) as runtime:
        ids = runtime.tokenize(text, add_special=True)
        for start in range(0, len(ids) // n_ctx * n_ctx, n_ctx):
            chunk = ids[start : start + n_ctx]
            seen = [runtime.bos_token_id, *chunk[1:]] if runtime.add_bos else chunk
            logits = runtime.logits(seen).astype(np.float64)
            for position in range(n_ctx // 2, n_ctx - 1):
                row = logits[position]
                values.append(np.log(np.exp(row - row.max()).sum()) + row.max() - row[chunk[position + 1]])
    ppl = math.exp(np.mean(values))
    return ppl, ppl * math.sqrt((np.mean(np.square(values)) - np.mean(values) ** 2) / (len(values) - 1)), len(values)


def test_llama_cpps_own_number(with_bos: Path, text: Path) -> None:
    pytest.importorskip("xllamacpp")
    report = evaluate(str(with_bos), data=text, context=CONTEXT, convention="llama.cpp", runtime="llama.cpp")
    ppl, stderr, count = naive_llama_perplexity(with_bos, text.read_text(encoding="utf-8"), CONTEXT)
    found = ppl_of(report)
    assert report.runtime.startswith("llama.cpp")
    assert found.ppl == pytest.approx(ppl, rel=1e-5)
    assert found.stderr == pytest.approx(stderr, rel=1e-4)
    assert (found.tokens_scored, found.bos) == (count, True)


@pytest.mark.parametrize("convention", ["hf", "llama.cpp"])
def test_llama_cpp_agrees_with_torch(packed: dict[str, str], latent: Path, text: Path, convention: str) -> None:
    pytest.importorskip("xllamacpp")
    settings = {"data": text, "context": CONTEXT, "convention": convention}
    report = evaluate(packed["tq2_0"], **settings, runtime="llama.cpp", against=str(latent))  # type: ignore[arg-type]
    ours = ppl_of(evaluate(packed["tq2_0"], **settings))  # type: ignore[arg-type]
    assert report.comparison is not None
    assert report.comparison.kl < 1e-3
    assert ppl_of(report).ppl == pytest.approx(ours.ppl, rel=0.01)
    assert (ppl_of(report).tokens_scored, ppl_of(report).bytes_scored) == (ours.tokens_scored, ours.bytes_scored)


@pytest.mark.parametrize(
    ("format_name", "columns", "stored"),
    [
        ("tq1_0", 512, "TQ1_0"),
        ("tq2_0", 512, "TQ2_0"),
        ("q2_0", 512, "Q2_0"),
        ("q2_0", 480, "Q8_0"),
        ("q2_0", 500, "F16"),
    ],
)
def test_activations_are_rounded_in_llama_cpps_blocks(
    tmp_path: Path, text: Path, format_name: str, columns: int, stored: str
) -> None:
    """With outliers among the activations it matters how many of them share a scale."""
    pytest.importorskip("xllamacpp")
    latent = write_latent(tmp_path / "latent", hidden_size=512, intermediate_size=columns, layers=1)
    with edited_safetensors(latent / "model.safetensors") as weights:
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.0.{norm}.weight"][:2] *= 100
    packing = Packing(formats=(format_name,))
    path = pack(open_checkpoint(str(latent)), packing, tmp_path / "out", reporter=Silent()).files[0].path
    assert gguf_source.tensor_types(Path(path))["model.layers.0.mlp.down_proj.weight"] == stored
    settings = {"data": text, "context": CONTEXT, "runtime": "llama.cpp"}
    blocks, tokens = (evaluate(path, **settings, against=original).comparison for original in (path, str(latent)))  # type: ignore[arg-type]
    assert blocks is not None
    assert tokens is not None
    assert blocks.kl < 2e-4
    assert tokens.kl > 5 * blocks.kl


def test_llama_cpp_wants_a_gguf_file(smollm: Path, text: Path) -> None:
    with pytest.raises(UsageError, match=r"llama\.cpp reads GGUF files only"):
        evaluate(str(smollm), data=text, runtime="llama.cpp")


FAKE_BINARY = """#!/bin/sh
while [ $# -gt 0 ]; do [ "$1" = -f ] && cp "$2" "$0.text"; [ "$1" = -c ] && echo "$2" > "$0.context"; shift; done
echo 'Final estimate: PPL = 8.0000 +/- 0.25000'
"""


def test_a_users_llama_perplexity_serves_where_there_is_no_library(
    with_bos: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise BitconvertError("llama.cpp is not installed", "install it")

    binary = tmp_path / "llama-perplexity"
    binary.write_text(FAKE_BINARY)
    binary.chmod(0o755)
    monkeypatch.setenv("LLAMA_PERPLEXITY", str(binary))
    monkeypatch.setattr(subjects, "find_library", missing)
    monkeypatch.setattr(runtimes, "find_library", missing)
    report = evaluate(str(with_bos), data=text, context=CONTEXT, convention="llama.cpp", runtime="llama.cpp")
    ours = ppl_of(evaluate(str(with_bos), data=text, context=CONTEXT, convention="llama.cpp"))
    found = ppl_of(report)
    assert (report.runtime, found.ppl, found.stderr, found.window_stderr) == ("llama-perplexity", 8.0, 0.25, None)
    assert (found.tokens_scored, found.bytes_scored, found.bos) == (ours.tokens_scored, ours.bytes_scored, True)
    assert found.bits_per_byte == pytest.approx(3 * found.tokens_scored / found.bytes_scored)
    assert Path(f"{binary}.text").read_bytes() == text.read_bytes() + b"\n"  # it takes one newline off
    assert Path(f"{binary}.context").read_text() == f"{CONTEXT}\n"
    with pytest.raises(BitconvertError, match="not installed"):
        evaluate(str(with_bos), data=text, context=CONTEXT, convention="hf", runtime="llama.cpp")


# ---- lm-eval --------------------------------------------------------------------------------------------------------

TASK = """
task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def test_tasks_score_the_model_that_is_loaded(latent: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    words = (" the", " fox", " stars", " and", " dog", " girl", " 1, 2", " forest")
    starts = ("She counted", "The quick brown", "Once upon", "They said", "near the", "over", "it's", "He had")
    choices = [[words[at], words[at - 3]] for at in range(len(words))]
    questions = [
        {"question": q, "choices": c, "label": n % 2} for n, (q, c) in enumerate(zip(starts, choices, strict=True))
    ]
    (tmp_path / "letters.json").write_text("\n".join(json.dumps(question) for question in questions))
    (tmp_path / "letters.yaml").write_text(TASK.format(file=tmp_path / "letters.json"))
    report = evaluate(str(latent), tasks=[str(tmp_path / "letters.yaml")])
    assert report.perplexity is None
    assert report.tasks["letters"]["acc"] == pytest.approx(chosen_right(latent, questions))
    assert 0 < report.tasks["letters"]["acc"] < 1  # or the questions tell nothing


def chosen_right(model: Path, questions: list[dict[str, object]]) -> float:
    """Share of questions whose right choice is the likeliest continuation."""
    checkpoint = open_checkpoint(str(model))
    loaded, tokenizer = checkpoint.load(), checkpoint.tokenizer()

    def likelihood(question: str, choice: str) -> float:
        start, ids = (
            len(tokenizer(question)["input_ids"]),
            tokenizer(question + choice, return_tensors="pt")["input_ids"],
        )
        with torch.no_grad():
            logits = loaded(ids).logits[0].log_softmax(-1)
        return sum(float(logits[at - 1, ids[0, at]]) for at in range(start, ids.shape[1]))

    right = []
    for question in questions:
        found = [likelihood(str(question["question"]), str(choice)) for choice in question["choices"]]  # type: ignore[attr-defined]
        right.append(int(np.argmax(found)) == question["label"])
    return float(np.mean(right))


def test_an_unknown_task_is_named(smollm: Path) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(BitconvertError, match="no-such-task"):
        evaluate(str(smollm), tasks=["no-such-task"])


def test_without_lm_eval_its_installation_is_the_hint(smollm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(BitconvertError, match="lm-eval is not installed") as caught:
        evaluate(str(smollm), tasks=["hellaswag"])
    assert "bitconvert[tasks]" in caught.value.hint


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_another_tokenizer_cannot_be_compared(smollm: Path, with_bos: Path, text: Path) -> None:
    with pytest.raises(BitconvertError, match="their tokenizers cut the text differently") as caught:
        evaluate(str(smollm), data=text, context=CONTEXT, against=str(with_bos))
    assert str(smollm) in caught.value.message
    assert str(with_bos) in caught.value.message


def test_another_vocabulary_size_cannot_be_compared(smollm: Path, text: Path, tmp_path: Path) -> None:
    larger = write_model(tmp_path / "larger", "smollm2", padding_rows=8)
    with pytest.raises(BitconvertError, match=r"their vocabularies hold \d+ and \d+ tokens"):
        evaluate(str(smollm), data=text, context=CONTEXT, against=str(larger))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({}, "no text and no tasks"),
        ({"against": "original"}, "no text and no tasks"),
        ({"against": "original", "tasks": ["a"]}, "needs a text"),
        ({"runtime": "llama.cpp"}, "no text"),
        ({"runtime": "llama.cpp", "tasks": ["a"]}, "torch only"),
    ],
)
def test_contradicting_arguments_are_usage_errors(smollm: Path, arguments: dict[str, object], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        evaluate(str(smollm), **arguments)  # type: ignore[arg-type]


def test_a_short_text_is_no_empty_success(smollm: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Too short.")
    with pytest.raises(BitconvertError, match="too short for one window of 64"):
        evaluate(str(smollm), data=tmp_path / "a.txt", context=CONTEXT)
