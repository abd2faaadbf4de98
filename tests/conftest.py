"""Shared by all tests: a cache of their own, quiet libraries, and tiny models."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from tests.commands import Command, command
from tests.models import write_model
from tests.texts import STORY

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # of commands that tests start: there are as many tests at a time as cores
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()


@pytest.fixture(scope="session", autouse=True)
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITCONVERT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # tiny models: more threads only wait for each other


@pytest.fixture(scope="session")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random SmolLM2: tied embeddings, byte-level BPE that splits digits."""
    return write_model(tmp_path_factory.mktemp("models") / "smollm", "smollm2")


@pytest.fixture(scope="session")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of a few thousand tokens."""
    path = tmp_path_factory.mktemp("texts") / "story.txt"
    path.write_text(STORY, encoding="utf-8")
    return path


@pytest.fixture
def bitconvert(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs a command line: ``bitconvert("pack", checkpoint, "--format", "tq2_0")``."""
    return command(capsys, monkeypatch)
