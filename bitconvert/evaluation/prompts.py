"""The prompts that models are compared on: the user's, or a few of ours. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path

from bitconvert.errors import BitconvertError
from bitconvert.models.texts import ending_of, read_texts

CONTINUED = (
    "The capital of France is",
    "Water boils when",
    "Once upon a time, there was a little",
    "The three primary colors are red,",
    "def fibonacci(n):",
)
"""Beginnings for any language model: a fact, a rule, a story, a list, a program."""

ASKED = (
    "What is the capital of France?",
    "Why is the sky blue? Answer in one sentence.",
    "Write the beginning of a story about a lighthouse.",
    "Name the three primary colors.",
    "Write a Python function that returns the n-th Fibonacci number.",
)
"""The same for chat models."""


def read_prompts(file: Path) -> list[str]:
    """The prompts of a file: of a .jsonl its records' ``text``, of a .txt its lines; blank ones do not count.

    Raises:
        BitconvertError: the file is missing, malformed, of another type, or holds none.
    """
    if ending_of(file) not in (".txt", ".jsonl"):
        raise BitconvertError(
            f"{file}: not a kind of prompt list that is known", "give a .txt with a prompt a line, or a .jsonl"
        )
    documents = read_texts([str(file)])
    prompts = [line for text in documents for line in (text.splitlines() if ending_of(file) == ".txt" else [text])]
    return [prompt for prompt in prompts if prompt.strip()]
