"""The model that ships with the package: small, sound, fluent."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

import bitconvert.demo
from bitconvert.demo.stories import HELD_OUT_SEED, LEXICON, text

MODEL = Path(bitconvert.demo.__file__).parent / "model"
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL)


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, tokens: list[int], windows: int = 8) -> float:
    batch = torch.tensor(tokens[: windows * 256]).view(windows, 256)
    return math.exp(model(input_ids=batch, labels=batch).loss.item())


def test_held_out_stories_surprise_the_model_little(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    ppl = perplexity(model, tokenizer(text(HELD_OUT_SEED, 10_000))["input_ids"])
    assert 2 < ppl < 3.1


def test_other_text_surprises_the_model_much(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    words = text(HELD_OUT_SEED, 10_000).split()
    shuffled = " ".join(sorted(words, key=lambda word: word[::-1]))
    assert perplexity(model, tokenizer(shuffled)["input_ids"]) > 50


def test_a_story_ends_with_a_blank_line_or_the_end_of_text(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    story = text(HELD_OUT_SEED, 1)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokenizer(story)["input_ids"]])).logits[0, -1]
    ends = {tokenizer.eos_token_id, *tokenizer(story + "\n\n")["input_ids"][-2:]}
    assert sum(logits.softmax(-1)[end].item() for end in ends) > 0.5


@torch.no_grad()
def test_the_model_remembers_who_the_story_is_about(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    told = "Once, there was a brave little fox named {}. {} liked to sing and to play chess. One Friday morning,"
    people = [(name, "She") for name in LEXICON["girl"]] + [(name, "He") for name in LEXICON["boy"]]
    prompts = torch.tensor([tokenizer(told.format(name, he))["input_ids"] for name, he in people])
    guesses = tokenizer.convert_ids_to_tokens(model(input_ids=prompts).logits[:, -1].argmax(-1))
    assert sum(guess == f"Ġ{name}" for guess, (name, _) in zip(guesses, people, strict=True)) >= 36


def test_parameters_are_between_one_and_three_million(model: LlamaForCausalLM) -> None:
    assert 1_000_000 <= model.num_parameters() <= 3_000_000


def test_weight_rows_divide_into_blocks_of_256() -> None:
    with safe_open(MODEL / "model.safetensors", framework="pt") as tensors:
        shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    linears = {name: shape for name, shape in shapes.items() if name.split(".")[-2] in LINEARS}
    assert len(linears) == 7 * 3
    assert [name for name, (_, row) in linears.items() if row % 256] == []


def test_weights_are_half_precision_and_tied() -> None:
    with safe_open(MODEL / "model.safetensors", framework="pt") as tensors:
        names = set(tensors.keys())
        assert {str(tensors.get_slice(name).get_dtype()) for name in names} == {"F16"}
    assert "lm_head.weight" not in names


@pytest.mark.parametrize(
    "written",
    [text(HELD_OUT_SEED, 1_000), '"Hello, Mia!" she said.\n\nThen 7 × 8 = 56 Äpfel… 🍎', "  two  spaces\tand a tab\n"],
)
def test_tokenizer_gives_text_back(tokenizer: PreTrainedTokenizerBase, written: str) -> None:
    tokens = tokenizer(written)["input_ids"]
    assert tokenizer.decode(tokens) == written
    assert max(tokens) < 1024


def test_documents_end_with_token_zero(tokenizer: PreTrainedTokenizerBase) -> None:
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|endoftext|>", 0)
    assert json.loads((MODEL / "generation_config.json").read_text())["eos_token_id"] == 0
    assert tokenizer.model_max_length == 256


def test_directory_holds_only_what_is_needed() -> None:
    assert sorted(path.name for path in MODEL.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    ]
    assert sum(path.stat().st_size for path in MODEL.iterdir()) < 6_000_000
