"""The demo's text: always the same, never repeating, grammatical where a machine can tell."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterable

import pytest

from bitconvert.demo.stories import HELD_OUT_SEED, LEXICON, MODEL_SEED, WARMUP_SEED, counted, stories, text

# The embedded model was trained on exactly this text: whoever changes the grammar has to train it again.
FROZEN = "a7f20c69582cf0489894ef87534097237490857c913ba3218dc974d5b85f7e3c"
SAMPLE = text(MODEL_SEED, 200_000)


def sha256(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()


def repeated(items: Iterable[object]) -> float:
    """Share of the items that occurred before."""
    everything = list(items)
    return 1 - len(set(everything)) / len(everything)


def test_text_is_what_the_embedded_model_was_trained_on() -> None:
    assert sha256(text(MODEL_SEED, 100_000)) == FROZEN


@pytest.mark.parametrize("hash_seed", ["0", "1", "4242"])
def test_text_does_not_depend_on_string_hashing(hash_seed: str) -> None:
    script = (
        "import sys; from bitconvert.demo.stories import MODEL_SEED, text;"
        "sys.stdout.buffer.write(text(MODEL_SEED, 100_000).encode())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    written = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=True).stdout
    assert sha256(written.decode()) == FROZEN


def test_each_call_starts_the_stories_anew() -> None:
    first, second = (list(itertools.islice(stories(7), 20)) for _ in range(2))
    assert first == second


def test_different_seeds_share_no_story() -> None:
    told = [set(itertools.islice(stories(seed), 2_000)) for seed in (MODEL_SEED, WARMUP_SEED, HELD_OUT_SEED)]
    assert len(set.union(*told)) == 6_000


def test_different_seeds_share_few_sentences() -> None:
    trained, held_out = (set(re.split(r"(?<=[.!?]) ", text(seed, 200_000))) for seed in (MODEL_SEED, HELD_OUT_SEED))
    assert len(held_out & trained) / len(held_out) < 0.01


def test_stories_sentences_and_phrases_hardly_repeat() -> None:
    words = SAMPLE.split()
    assert repeated(SAMPLE.split("\n\n")) == 0
    assert repeated(re.split(r"(?<=[.!?])\s+", SAMPLE)) < 0.005
    assert repeated(zip(*(words[start:] for start in range(8)), strict=False)) < 0.03


def test_text_is_rich_in_words() -> None:
    assert len(set(re.findall(r"[a-z]+", SAMPLE.lower()))) > 700


@pytest.mark.parametrize("characters", [1, 500, 10_000, 33_333])
def test_text_is_whole_stories_and_just_long_enough(characters: int) -> None:
    told = text(5, characters)
    paragraphs = told.split("\n\n")
    assert len(told) >= characters
    assert paragraphs == list(itertools.islice(stories(5), len(paragraphs)))
    assert sum(map(len, paragraphs[:-1])) < characters


def test_no_template_markup_is_left() -> None:
    assert re.findall(r"[\[\]{}<>|_]", SAMPLE) == []


def test_spaces_and_punctuation_are_tidy() -> None:
    assert re.findall(r"  | [,.!?;:]|[,.]{2}| \n|\n\n\n", SAMPLE) == []


def test_every_story_starts_with_a_capital_and_ends_with_a_full_stop() -> None:
    assert [story for story in SAMPLE.split("\n\n") if not (story[0].isupper() and story[-1] in '."')] == []


def test_articles_fit_the_next_word() -> None:
    assert re.findall(r"\b[Aa] (?:[aeiou]|honest)\w*", SAMPLE) == []
    assert re.findall(r"\b[Aa]n (?![aeiou]|honest)\w*", SAMPLE) == []


def test_pronouns_agree_with_names() -> None:
    introductions = re.findall(r"(?:named|called) (\w+)\. (He|She) liked", SAMPLE)
    assert len(introductions) > 10
    assert [name for name, pronoun in introductions if (name in LEXICON["girl"]) != (pronoun == "She")] == []


def test_what_is_left_and_what_is_given_add_up_to_what_there_was() -> None:
    count = ["no", "one", *LEXICON["number"]]
    told = text(MODEL_SEED, 1_000_000).split("\n\n")
    shared = [(story, found) for story in told if (found := re.search(r"Now \w+ had (\w+) .*? had (\w+) ", story))]
    assert len(shared) > 20
    for story, found in shared:
        total = count[count.index(found[1]) + count.index(found[2])]
        before = story[: found.start()]
        assert re.search(rf"(?:had|found|gathered|up|counted|gave|sold|brought)(?: him| her)? {total} ", before), story


@pytest.mark.parametrize(
    ("number", "plural", "words"),
    [(1, "cherries", "one cherry"), (1, "plums", "one plum"), (1, "leaves", "one leaf"), (12, "figs", "twelve figs")],
)
def test_counted_things_agree_in_number(number: int, plural: str, words: str) -> None:
    assert counted(number, plural) == words
