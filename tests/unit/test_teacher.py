"""The teacher: the original's own distribution, live or from disk, asked once."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import default_collate
from transformers import PreTrainedModel

from bitconvert.errors import BitconvertError
from bitconvert.recipe import Distillation
from bitconvert.report.reporter import Silent
from bitconvert.training import teacher_cache
from bitconvert.training.data import ShuffledWindows, Windows, cache_directory, model_key
from bitconvert.training.distill import FullTarget, Target
from bitconvert.training.teacher import LiveTeacher
from bitconvert.training.teacher_cache import CachedTeacher, TaughtWindows
from tests.models import random_model
from tests.recording import Recorder

VOCAB, CONTEXT, WINDOWS = 64, 8, 7
EVERYWHERE = slice(None)


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITCONVERT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return random_model("smollm2", hidden_size=64, intermediate_size=64)


def live(model: PreTrainedModel, temperature: float = 1.0, *, offload: bool = False) -> LiveTeacher:
    options = Distillation(temperature=temperature, teacher_offload=offload)
    return LiveTeacher(model, options, torch.device("cpu"), torch.float32)


def order_of(count: int = 2 * WINDOWS, seed: int = 0) -> ShuffledWindows:
    ids = np.random.default_rng(0).integers(VOCAB, size=WINDOWS * CONTEXT).astype(np.uint16)
    return ShuffledWindows(Windows(ids, CONTEXT), count, seed)


def taught(model: PreTrainedModel, order: ShuffledWindows, k: int = VOCAB, temperature: float = 1.0) -> TaughtWindows:
    windows = TaughtWindows(order, "key", VOCAB, k, temperature)
    windows.fill(lambda: live(model, temperature), 2, Silent())
    return windows


def log_probs(target: Target) -> Tensor:
    """At all positions of two windows, for a student that prefers no token."""
    flat = torch.full((2 * (CONTEXT - 1), VOCAB), 1 / VOCAB).log()
    return target.log_probs(EVERYWHERE, flat)


def files() -> Iterator[Path]:
    return cache_directory().glob("*.teacher")


# ---- live ----


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_target_is_the_models_own_distribution(model: PreTrainedModel, temperature: float) -> None:
    tokens = torch.randint(VOCAB, (2, CONTEXT))
    with torch.no_grad():
        logits = model(tokens).logits[:, :-1].flatten(0, 1)
    expected = functional.log_softmax(logits / temperature, -1)
    torch.testing.assert_close(log_probs(live(model, temperature).target({"input_ids": tokens})), expected)


def test_it_keeps_the_precision_of_its_rotary_frequencies() -> None:
    model = random_model("smollm2", hidden_size=64, intermediate_size=64)
    LiveTeacher(model, Distillation(), torch.device("cpu"), torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}


@pytest.mark.parametrize("variant", ["smollm2", "gemma2"])
def test_layers_in_cpu_memory_change_nothing(variant: str) -> None:
    model = random_model(variant, hidden_size=64, intermediate_size=64, pad_token_id=None)
    tokens = {"input_ids": torch.randint(VOCAB, (2, CONTEXT))}
    expected = log_probs(live(model).target(tokens))
    teacher = live(model, offload=True)
    for _ in range(2):
        assert torch.equal(log_probs(teacher.target(tokens)), expected)
        assert all(parameter.is_meta for parameter in model.model.layers.parameters())
        assert not model.get_output_embeddings().weight.is_meta


# ---- from disk ----


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("count", [2 * WINDOWS, 4])
def test_every_window_comes_with_its_own_distribution(model: PreTrainedModel, count: int, temperature: float) -> None:
    order = order_of(count)
    windows = taught(model, order, temperature=temperature)
    teacher = live(model, temperature)
    assert len(windows) == count
    for index in range(0, count, 2):
        batch = default_collate([windows[index], windows[index + 1]])
        assert torch.equal(batch["input_ids"], torch.stack([order[index + i]["input_ids"] for i in (0, 1)]))
        expected = log_probs(teacher.target(batch))
        torch.testing.assert_close(log_probs(CachedTeacher().target(batch)), expected, rtol=2**-10, atol=1e-3)


def test_the_likeliest_tokens_and_the_rest(model: PreTrainedModel) -> None:
    windows = taught(model, order_of(), k=5)
    batch = default_collate([windows[0], windows[1]])
    full = log_probs(live(model).target(batch))
    target = CachedTeacher().target(batch)
    assert (target.tokens.sort().values == full.topk(5).indices.sort().values).all()
    kept = full.gather(-1, target.tokens)
    torch.testing.assert_close(target.shares[:, :-1].float(), kept, rtol=2**-11, atol=0)
    rest = 1 - kept.exp().sum(-1)
    torch.testing.assert_close(target.shares[:, -1].float().exp(), rest, rtol=5e-3, atol=0)


def test_a_file_is_as_large_as_was_told(model: PreTrainedModel) -> None:
    told = Recorder()
    windows = TaughtWindows(order_of(), "key", VOCAB, 16, 1.0)
    windows.fill(lambda: live(model), 2, told)
    (file,) = files()
    assert file.stat().st_size == WINDOWS * (CONTEXT - 1) * (16 * 2 + 17 * 2)
    assert told.notes == [f"3.2KB for the teacher's 16 likeliest tokens, 58 bytes a token of text: {file}"]


def test_the_teacher_is_asked_once(model: PreTrainedModel) -> None:
    def nobody() -> LiveTeacher:
        raise AssertionError("asked again")

    def again(order: ShuffledWindows, key: str = "key", k: int = 5, temperature: float = 1.0) -> None:
        TaughtWindows(order, key, VOCAB, k, temperature).fill(nobody, 2, told)

    told = Recorder()
    taught(model, order_of(), k=5)
    again(order_of())
    again(order_of(count=3 * WINDOWS, seed=8))  # the same windows in another order
    assert all("from an earlier run" in note for note in told.notes)
    for other in (
        lambda: again(order_of(), key="another model or text"),
        lambda: again(order_of(), k=6),
        lambda: again(order_of(), temperature=2.0),
        lambda: again(order_of(count=3)),
    ):
        with pytest.raises(AssertionError, match="asked again"):
            other()


@pytest.mark.parametrize("batch_size", [2, 3])
def test_an_interrupted_run_leaves_its_answers_to_the_next(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, batch_size: int
) -> None:
    class Interrupting(Silent):
        def advance(self, done: int, total: int) -> None:
            if done == 4:
                raise KeyboardInterrupt

    asked: list[Tensor] = []

    class Counting(LiveTeacher):
        def target(self, inputs: Mapping[str, Tensor]) -> FullTarget:
            asked.extend(inputs["input_ids"])
            return super().target(inputs)

    def teacher() -> LiveTeacher:
        return Counting(copy.deepcopy(model), Distillation(), torch.device("cpu"), torch.float32)

    with pytest.raises(KeyboardInterrupt):
        TaughtWindows(order_of(), "key", VOCAB, 5, 1.0).fill(teacher, 2, Interrupting())
    assert list(files()) == []
    asked.clear()
    TaughtWindows(order_of(), "key", VOCAB, 5, 1.0).fill(teacher, batch_size, Silent())
    assert len(asked) == WINDOWS - 4 // batch_size * batch_size
    (resumed,) = cache_directory().iterdir()
    monkeypatch.setenv("BITCONVERT_CACHE", str(tmp_path / "undisturbed"))
    TaughtWindows(order_of(), "key", VOCAB, 5, 1.0).fill(teacher, batch_size, Silent())
    (undisturbed,) = files()
    assert resumed.read_bytes() == undisturbed.read_bytes()


def test_one_of_two_runs_waits_for_the_answers_of_the_other(model: PreTrainedModel) -> None:
    def fill(told: Recorder) -> Recorder:
        TaughtWindows(order_of(), "key", VOCAB, 5, 1.0).fill(lambda: live(model), 2, told)
        return told

    with ThreadPoolExecutor(2) as pool:
        told = [done.result() for done in [pool.submit(fill, Recorder()) for _ in range(2)]]
    assert sorted(len(one.stages) for one in told) == [0, 1]
    assert len(list(cache_directory().iterdir())) == 1


def test_a_disk_too_small_is_named_before_the_work(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(BitconvertError, match=r"\.teacher: 12.6KB are needed, 1.0KB are free"):
        taught(model, order_of())


def test_a_models_key_is_what_it_computes_with() -> None:
    shape = {"hidden_size": 64, "intermediate_size": 64}
    model, same = random_model("smollm2", **shape), random_model("smollm2", **shape)
    same.config._name_or_path = "elsewhere"
    assert model_key(model) == model_key(same)
    same.config.rope_parameters["rope_theta"] = 7.0
    assert model_key(model) != model_key(same)
    other = random_model("smollm2", **shape)
    other.model.norm.weight.data[0] += 1
    assert model_key(model) != model_key(other)
