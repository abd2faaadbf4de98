"""An unfinished run: what of it is kept, how it goes on, and what ends it with a word of how to go on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from bitconvert.atomic import discard
from bitconvert.errors import BitconvertError, UsageError
from bitconvert.recipe import Recipe, load_recipe
from bitconvert.report.reporter import Silent
from bitconvert.training import blockwise, gptq
from bitconvert.training.data import cache_directory
from bitconvert.training.run_directory import Interrupted, partial_directory, unfinished_run
from bitconvert.training.trainer import WarmupTrainer, last_checkpoint
from bitconvert.training.warmup import warmup
from tests.models import write_model
from tests.recipes import FROM_THE_ORIGINAL
from tests.recording import Recorder

SMALL = (
    *FROM_THE_ORIGINAL,
    "training.tokens=512",
    "training.context=32",
    "training.batch_size=4",
    "training.precision=float32",
    "training.save_every=2",
    "data.held_out_tokens=64",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "model"
    return write_model(directory, "smollm2", layers=3, hidden_size=64, intermediate_size=64)


def small(story: Path, *overrides: str) -> Recipe:
    return load_recipe(None, [*SMALL, f"data.sources=[{story}]", *overrides])


class At(Recorder):
    """Does something when the numbers of a step are told."""

    def __init__(self, step: int, does: Callable[[], object]) -> None:
        super().__init__()
        self._step, self._does = step, does

    def metrics(self, values: Mapping[str, float]) -> None:
        super().metrics(values)
        if "loss" in values and values["step"] == self._step:
            self._does()


def stop() -> None:
    raise KeyboardInterrupt


def weights(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


def interrupted(model: Path, output: Path, recipe: Recipe, step: int = 3) -> Path:
    """A run that was stopped in a step; returns its directory."""
    with pytest.raises(Interrupted):
        warmup(str(model), output, recipe, reporter=At(step, stop))
    return partial_directory(output)


@pytest.fixture(scope="module")
def whole(model: Path, story: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "out"
    warmup(str(model), output, small(story), reporter=Silent())
    return output


# ---- before the first step ----


@pytest.mark.parametrize(
    ("method", "module", "name"), [("blockwise", blockwise, "_fit"), ("gptq", gptq, "_compensate")]
)
def test_an_interrupted_fit_goes_on_at_the_layer(
    method: str, module: object, name: str, model: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small(story, f"init.method={method}", "init.tokens=512", "training.tokens=256", "training.save_every=1")
    warmup(str(model), tmp_path / "whole", recipe, reporter=Silent())
    fit, fitted = getattr(module, name), []

    def counted(*arguments: object) -> None:
        if len(fitted) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        fit(*arguments)
        fitted.append(arguments[0])

    monkeypatch.setattr(module, name, counted)
    before = signal.signal(signal.SIGTERM, lambda number, _: exit(128 + number))
    with pytest.raises(Interrupted) as caught:
        warmup(str(model), tmp_path / "out", recipe, reporter=Silent())
    signal.signal(signal.SIGTERM, before)
    assert (caught.value.exit_code, len(fitted)) == (143, 2)
    assert caught.value.hint == f"continue with: bitconvert warmup --resume --output {tmp_path / 'out'}"
    with pytest.raises(UsageError, match="an unfinished run is here"):
        warmup(str(model), tmp_path / "out", recipe, reporter=Silent())
    fitted.append(None)  # the third time is another process's
    warmup(str(model), tmp_path / "out", recipe, resume=True, reporter=Silent())
    assert len(fitted) == 4, "the third layer alone was fitted again"
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_fitted_layers_take_no_room_beside_checkpoints(model: Path, story: Path, tmp_path: Path) -> None:
    recipe = small(story, "init.method=blockwise", "init.tokens=256")
    layers = []
    reporter = At(1, lambda: layers.extend(partial_directory(tmp_path / "out").glob("fitted/*")))
    warmup(str(model), tmp_path / "out", recipe, reporter=reporter)
    assert len(layers) == 3
    run_directory = interrupted(model, tmp_path / "again", recipe)
    assert not (run_directory / "fitted").exists()


def test_an_interruption_before_anything_is_done_can_be_resumed(
    whole: Path, model: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(WarmupTrainer, "ternary_ppl", lambda _: stop())
        warmup(str(model), tmp_path / "out", small(story), reporter=Silent())
    warmup(str(model), tmp_path / "out", small(story), resume=True, reporter=Silent())
    assert weights(tmp_path / "out") == weights(whole)


# ---- resumed ----


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "trainer_state.json", "rng_state.pth"])
def test_a_damaged_checkpoint_is_named(file: str, model: Path, story: Path, tmp_path: Path, whole: Path) -> None:
    recipe = small(story)
    newest = last_checkpoint(interrupted(model, tmp_path / "out", recipe))
    assert newest is not None
    (newest / file).write_bytes((newest / file).read_bytes()[:100])
    with pytest.raises(BitconvertError, match=str(newest)) as caught:
        warmup(str(model), tmp_path / "out", recipe, resume=True, reporter=Silent())
    assert caught.value.hint == "remove this checkpoint: --resume goes on from the one before it, or from the start"
    assert "\n" not in caught.value.message
    if file.startswith("trainer"):
        discard(newest)
        warmup(str(model), tmp_path / "out", recipe, resume=True, reporter=Silent())
        assert weights(tmp_path / "out") == weights(whole)


def test_a_teachers_cache_of_another_size_is_named(
    model: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITCONVERT_CACHE", str(tmp_path / "cache"))
    recipe = small(story, "distill.cache=true", "distill.cache_top_k=4")
    warmup(str(model), tmp_path / "out", recipe, reporter=Silent())
    (cache,) = (tmp_path / "cache").rglob("*.teacher")
    os.truncate(cache, cache.stat().st_size - 1)
    with pytest.raises(BitconvertError, match=rf"{cache.name}: damaged, it has [\d,]+ bytes instead of") as caught:
        warmup(str(model), tmp_path / "again", recipe, reporter=Silent())
    assert caught.value.hint == "remove it: it is made again"


def test_a_damaged_layer_that_was_fitted_is_named(model: Path, story: Path, tmp_path: Path) -> None:
    recipe = small(story, "init.method=blockwise", "init.tokens=256")
    with pytest.raises(Interrupted):
        warmup(str(model), tmp_path / "out", recipe, reporter=At(1, stop))
    for damage in (b"", save({"other": torch.ones(2)})):
        file = partial_directory(tmp_path / "out") / "fitted" / "layer-00001.safetensors"
        file.write_bytes(damage)
        with pytest.raises(BitconvertError, match=r"layer-00001\.safetensors: damaged"):
            warmup(str(model), tmp_path / "out", recipe, resume=True, reporter=Silent())


@pytest.mark.parametrize("which", ["training", "held-out"])
def test_another_text_is_noticed(which: str, model: Path, story: Path, tmp_path: Path) -> None:
    texts = {name: tmp_path / f"{name}.txt" for name in ("training", "held-out")}
    for text in texts.values():
        shutil.copy(story, text)
    recipe = small(texts["training"], f"data.held_out=[{texts['held-out']}]")
    interrupted(model, tmp_path / "out", recipe)
    texts[which].write_text(story.read_text() + "And so on.")
    with pytest.raises(BitconvertError, match=f"the {which} text is not what the run began with"):
        warmup(str(model), tmp_path / "out", recipe, resume=True, reporter=Silent())
    shutil.copy(story, texts[which])
    warmup(str(model), tmp_path / "out", recipe, resume=True, reporter=Silent())


def test_what_a_failure_asks_for_may_change(model: Path, story: Path, tmp_path: Path) -> None:
    run_directory = interrupted(model, tmp_path / "out", small(story))
    changed = small(story, "optimizer.lr=5e-4", "training.micro_batch_size=1", "training.keep_checkpoints=1")
    with pytest.raises(Interrupted):
        warmup(str(model), tmp_path / "out", changed, resume=True, reporter=At(4, stop))
    assert unfinished_run(tmp_path / "out", Recipe)[1] == changed
    assert len(list(run_directory.glob("checkpoints/checkpoint-*"))) == 1
    warmup(str(model), tmp_path / "out", changed, resume=True, reporter=Silent())
    rates = [line["lr"] for line in map(json.loads, (tmp_path / "out" / "metrics.jsonl").open()) if "lr" in line]
    assert rates[3] < rates[0] / 2
    assert load_recipe(str(tmp_path / "out" / "recipe.yaml")).optimizer.lr == 5e-4
    first, second = (tmp_path / "out" / "recipe.yaml").read_text().splitlines()[:2]
    assert first.startswith("# resumed with optimizer.lr=0.0005 (was 0.001), training.")
    assert first.endswith(" from step 2 on")
    assert not second.startswith("#")
    assert first in (tmp_path / "out" / "report.html").read_text()


def test_other_options_are_told(model: Path, story: Path, tmp_path: Path) -> None:
    interrupted(model, tmp_path / "out", small(story))
    told = Recorder()
    warmup(str(model), tmp_path / "out", small(story, "optimizer.lr=5e-4"), resume=True, reporter=told)
    assert told.notes[0] == "resumed with optimizer.lr=0.0005 (was 0.001)"


def test_a_run_that_was_killed_after_its_last_rename_is_finished(
    model: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, recipe = tmp_path / "out", small(story)
    with monkeypatch.context() as patch:
        patch.setattr("bitconvert.training.warmup.discard", lambda _: None)
        warmup(str(model), output, recipe, reporter=Silent())
    assert partial_directory(output).exists()
    made = weights(output)
    with pytest.raises(UsageError, match="the run is finished"):
        warmup(str(model), output, recipe, resume=True, reporter=Silent())
    assert not partial_directory(output).exists()
    assert weights(output) == made


def test_an_output_that_came_from_elsewhere_does_not_end_a_run(model: Path, story: Path, tmp_path: Path) -> None:
    run_directory = interrupted(model, tmp_path / "out", small(story))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("theirs")
    with pytest.raises(UsageError, match="exists already"):
        warmup(str(model), tmp_path / "out", small(story), resume=True, reporter=Silent())
    assert last_checkpoint(run_directory)


# ---- a clock that jumps, things that vanish ----


def test_a_clock_that_goes_back_changes_nothing(
    whole: Path, model: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(2_000_000_000, 0, -86_400))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    told = At(3, stop)
    with pytest.raises(Interrupted):
        warmup(str(model), tmp_path / "out", small(story, "training.save_every=1"), reporter=told)
    assert all(line["eta_seconds"] >= 0 and line["tokens_per_second"] > 0 for line in told.lines if "loss" in line)
    for age, checkpoint in enumerate(sorted(partial_directory(tmp_path / "out").glob("checkpoints/checkpoint-*"))):
        os.utime(checkpoint, (2e9 - age, 2e9 - age))  # the newest has the oldest time
    again = At(4, stop)
    warmup(str(model), tmp_path / "again", small(story), reporter=Silent())
    with pytest.raises(Interrupted):
        warmup(str(model), tmp_path / "out", small(story, "training.save_every=1"), resume=True, reporter=again)
    assert again.lines[0]["step"] == 3
    warmup(str(model), tmp_path / "out", small(story, "training.save_every=1"), resume=True, reporter=Silent())
    assert weights(tmp_path / "out") == weights(tmp_path / "again") == weights(whole)


def test_text_cache_and_model_may_vanish_once_they_were_read(
    whole: Path, model: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITCONVERT_CACHE", str(tmp_path / "cache"))
    shutil.copytree(model, tmp_path / "model")
    shutil.copy(story, tmp_path / "story.txt")

    def vanish() -> None:
        for path in (tmp_path / "model", cache_directory()):
            discard(path)
        (tmp_path / "story.txt").unlink()

    recipe = small(tmp_path / "story.txt")
    warmup(str(tmp_path / "model"), tmp_path / "out", recipe, reporter=At(1, vanish))
    assert weights(tmp_path / "out") == weights(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


# ---- a loss that is not finite, memory that is not there ----


def poisoned(monkeypatch: pytest.MonkeyPatch, step: int, what: str) -> None:
    """From a step on the loss is NaN; or its gradient, while it looks well itself."""
    compute = WarmupTrainer.compute_loss

    def compute_loss(self: WarmupTrainer, *arguments: object, **named: object) -> object:
        loss = compute(self, *arguments, **named)  # type: ignore[arg-type]
        if self.model.training and self.state.global_step == step - 1:
            if what == "loss":
                self._parts["ce"] = torch.tensor(float("nan"))
            else:
                loss.register_hook(lambda gradient: gradient * float("nan"))  # type: ignore[union-attr]
        return loss

    monkeypatch.setattr(WarmupTrainer, "compute_loss", compute_loss)


@pytest.mark.parametrize(("what", "step"), [("loss", 3), ("gradient", 4)])
def test_a_loss_that_is_not_finite_names_its_batch_and_keeps_the_last_good_checkpoint(
    what: str, step: int, model: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, recipe = tmp_path / "out", small(story)
    seen: list[int] = []
    with monkeypatch.context() as patch:
        poisoned(patch, step, what)
        order = "bitconvert.training.data.ShuffledWindows.__getitem__"
        patch.setattr(order, lambda self, place: (seen.append(self.window_at(place)), self.windows[seen[-1]])[1])
        with pytest.raises(BitconvertError, match=f"the loss is not finite at step {step}; its batch") as caught:
            warmup(str(model), output, recipe, reporter=Silent())
    batch = seen[(step - 1) * 4 : step * 4]
    assert f"windows {', '.join(map(str, batch))} of the training text" in caught.value.message
    assert caught.value.exit_code == 1
    good = last_checkpoint(partial_directory(output))
    assert good is not None
    assert good.name == "checkpoint-2"
    assert all(tensor.isfinite().all() for tensor in load_file(good / "model.safetensors").values())
    assert f"--resume --output {output} --set optimizer.lr=0.0005" in caught.value.hint
    warmup(str(model), output, small(story, "optimizer.lr=5e-4"), resume=True, reporter=Silent())


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
        MemoryError("Unable to allocate 2.00 GiB for an array"),
    ],
)
def test_too_little_memory_says_what_to_lower(
    error: Exception, model: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = WarmupTrainer.compute_loss

    def too_large(self: WarmupTrainer, *arguments: object, **named: object) -> object:
        if self.state.global_step == 3:
            raise error
        return compute(self, *arguments, **named)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(BitconvertError, match="out of memory") as caught:
        patch.setattr(WarmupTrainer, "compute_loss", too_large)
        warmup(str(model), tmp_path / "out", small(story), reporter=Silent())
    assert "\n" not in caught.value.message
    assert "training.micro_batch_size" in caught.value.hint
    warmup(str(model), tmp_path / "out", small(story, "training.micro_batch_size=1"), resume=True, reporter=Silent())
