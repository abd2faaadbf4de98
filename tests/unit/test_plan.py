"""What plan foresees: memory as torch then allocates it, what fits and what would, which numbers are estimates."""

from __future__ import annotations

import gc
from collections import Counter
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import profile

from bitconvert.errors import UsageError
from bitconvert.models.checkpoint import open_checkpoint
from bitconvert.recipe import Recipe, load_recipe
from bitconvert.report.reporter import Silent
from bitconvert.training import plan as planning
from bitconvert.training import trainer
from bitconvert.training.distill import DistillationLoss, distillation_loss
from bitconvert.training.gpus import GPUS, gpu_of
from bitconvert.training.layers import Layer
from bitconvert.training.ledger import Ledger, Work
from bitconvert.training.plan import plan_warmup
from bitconvert.training.rehearsal import Rehearsal, account, phases
from bitconvert.training.warmup import warmup
from tests.recipes import FROM_THE_ORIGINAL

SMALL = (
    *FROM_THE_ORIGINAL,
    "training.tokens=1024",
    "lam.reach_one_at=0.5",
    "training.context=128",
    "training.batch_size=4",
    "training.micro_batch_size=2",
    "training.precision=float32",
    "data.held_out_tokens=256",
)


def small(*overrides: str) -> Recipe:
    return load_recipe(None, [*SMALL, *overrides])


# ---- memory ----


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("training.activation_checkpointing=true", "distill.kl=0"),
    ],
)
def test_counted_memory_is_what_torch_allocates(
    overrides: tuple[str, ...], smollm: Path, story: Path, tmp_path: Path
) -> None:
    recipe = small(f"data.sources=[{story}]", *overrides)
    gc.collect()  # what is freed meanwhile would count as less memory taken
    with profile(profile_memory=True, acc_events=True) as profiler:
        warmup(str(smollm), tmp_path / "out", recipe, reporter=Silent())
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    measured = max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    assert sum(account(open_checkpoint(str(smollm)), recipe).peak.values()) == pytest.approx(measured, rel=0.15)


def test_memory_is_told_by_kind(smollm: Path) -> None:
    checkpoint = open_checkpoint(str(smollm))
    weights = 4 * sum(parameter.numel() for parameter in checkpoint.skeleton().parameters())
    plain = account(checkpoint, small())
    assert plain.peak["weights"] == pytest.approx(weights, rel=0.01)
    assert plain.peak["teacher"] == pytest.approx(weights, rel=0.01)
    assert plain.peak["gradients"] <= weights
    assert plain.peak["optimizer"] == pytest.approx(2 * weights, rel=0.01)
    assert plain.checkpoint_bytes == pytest.approx(3 * weights, rel=0.01)

    lean = account(checkpoint, small("optimizer.name=adafactor", "distill.kl=0"))
    assert "teacher" not in lean.peak
    assert lean.peak.get("optimizer", 0) < 0.1 * weights
    assert lean.checkpoint_bytes < 1.1 * weights

    skeleton = checkpoint.skeleton()
    hidden = 4 * sum(weight.numel() for name, weight in skeleton.named_parameters() if "_proj" in name)
    muon = account(checkpoint, small("optimizer.name=muon"))
    assert muon.peak["optimizer"] == pytest.approx(2 * weights - hidden, rel=0.01)

    on_gpu = account(checkpoint, small(), bf16=True)
    assert on_gpu.peak["teacher"] == pytest.approx(weights / 2, rel=0.01)
    assert account(checkpoint, small()) == plain  # the trainers before it have left nothing behind


def test_a_teacher_on_disk_or_in_cpu_memory_takes_none_on_the_gpu(smollm: Path) -> None:
    checkpoint = open_checkpoint(str(smollm))
    live = account(checkpoint, small(), bf16=True).peak
    assert "teacher" not in account(checkpoint, small("distill.cache=true"), bf16=True).peak
    waiting = account(checkpoint, small("distill.teacher_offload=true"), bf16=True).peak
    embedding = 2 * checkpoint.skeleton().get_input_embeddings().weight.numel()
    assert embedding <= waiting["teacher"] < live["teacher"]
    assert waiting["teacher"] == pytest.approx(embedding, rel=0.01)
    assert waiting["activations"] == live["activations"]


def test_bf16_is_on_where_the_loss_is_computed(smollm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()

    def loss(*arguments: Any) -> DistillationLoss:
        device = arguments[0].device.type
        seen.add((torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)))
        return distillation_loss(*arguments)

    monkeypatch.setattr(trainer, "distillation_loss", loss)
    Rehearsal(open_checkpoint(str(smollm)), small(), tmp_path, bf16=True).micro_step(0)
    assert seen == {(True, torch.bfloat16)}


def test_activation_checkpointing_and_smaller_batches_take_less(smollm: Path) -> None:
    checkpoint = open_checkpoint(str(smollm))
    whole, parted, small_batch = (
        account(checkpoint, small("distill.kl=0", "lam.curve=instant", *options)).peak["activations"]
        for options in (
            ("training.micro_batch_size=4",),
            ("training.micro_batch_size=4", "training.activation_checkpointing=true"),
            ("training.micro_batch_size=1",),
        )
    )
    assert whole > parted
    assert whole > 2 * small_batch


def test_a_ledger_books_storages_once_and_while_they_live() -> None:
    with Ledger() as ledger:
        a = torch.zeros(1000)
        ledger.book("kept", [a, None])
        b = a.view(10, 100) + 1
        del b
        c = a.expand(3, 1000).sum()
        ledger.book("kept", [c])
    assert ledger.peak() == {"kept": 4000, "activations": 4000}
    assert ledger.nbytes("kept") == 4004


def test_a_ledger_counts_products_and_traffic() -> None:
    with Ledger() as ledger:
        torch.ones(8, 32) @ torch.ones(32, 16)
        ledger.work.clear()
        torch._int_mm(torch.ones(8, 32).to(torch.int8), torch.ones(32, 16).to(torch.int8))
    product = max(ledger.work, key=lambda work: work.flops)
    assert product == Work(2 * 8 * 32 * 16, 8 * 32 + 32 * 16 + 4 * 8 * 16, torch.int8)


@torch.library.custom_op("bitconvert::product_for_the_ledger", mutates_args=())
def product_of_ours(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a @ b


def test_a_ledger_counts_products_of_our_own_operators() -> None:
    with Ledger() as ledger:
        product_of_ours(torch.ones(8, 32), torch.ones(32, 16))
    assert max(work.flops for work in ledger.work) == 2 * 8 * 32 * 16


# ---- the plan ----


def test_a_plan_counts_what_becomes_ternary(smollm: Path) -> None:
    plan = plan_warmup(str(smollm), small(), [GPUS["h100"]], reporter=Silent())
    skeleton = open_checkpoint(str(smollm)).skeleton()
    parameters = dict(skeleton.named_parameters())
    assert plan.parameters == sum(tensor.numel() for tensor in parameters.values())
    assert plan.ternary_parameters == sum(t.numel() for name, t in parameters.items() if "_proj" in name)
    assert (plan.ternary_modules, plan.steps, plan.tokens, plan.accumulation) == (14, 2, 1024, 2)
    assert plan.steps_by_phase == {"training, λ = 1 of activations": 1, "training, λ = 1": 1}

    here, there = plan.forecasts
    assert here.fits
    assert here.measured
    assert list(here.seconds) == [*plan.steps_by_phase, "optimizer", "evaluations", "checkpoints"]
    assert all(seconds > 0 for seconds in here.seconds.values())
    assert here.total_seconds == sum(here.seconds.values())
    assert here.peak_bytes == sum(here.memory.values())
    assert (there.device, there.measured, there.capacity_bytes) == ("h100", False, 80 * 2**30)
    assert any("never measured" in note for note in plan.notes)


def test_the_time_of_a_fit_is_that_of_all_its_text_and_epochs(
    smollm: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that moves when a layer is called."""
    calls, call = Counter[str](), Layer.__call__
    monkeypatch.setattr(Layer, "__call__", lambda layer, hidden: (calls.update(["layer"]), call(layer, hidden))[1])
    recipe = small("init.method=blockwise", "init.tokens=768", "init.epochs=3", f"data.sources=[{story}]")
    plan = plan_warmup(str(smollm), recipe, [GPUS["h100"]], reporter=Silent(), clock=lambda: calls["layer"])
    calls.clear()
    warmup(str(smollm), tmp_path / "out", recipe, reporter=Silent())
    here, there = plan.forecasts
    assert here.seconds["initialisation"] == calls["layer"] == 2 * 3 * (1 + 3 + 1)  # layers x batches x passes
    assert there.seconds["initialisation"] > 0
    assert any("initialisation on named GPUs" in note for note in plan.notes)


def test_what_does_not_fit_is_not_timed_but_told_how_it_would(smollm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = "training.batch_size=32", "training.micro_batch_size=32", "training.tokens=4096", "distill.kl=0"
    recipe = small(*options)  # without a teacher, the cache of its answers is no help
    needed = sum(account(open_checkpoint(str(smollm)), recipe).peak.values())
    monkeypatch.setattr(planning, "_resident_bytes", lambda: 0)
    monkeypatch.setattr(planning, "_free_bytes", lambda: needed * 3 // 4)
    monkeypatch.setattr(planning, "_SAVINGS", (("training.micro_batch_size=1",), ("distill.cache=true",)))
    (here,) = plan_warmup(str(smollm), recipe, reporter=Silent()).forecasts
    assert not here.fits
    assert here.seconds == {}
    assert here.total_seconds is None
    assert list(here.remedies) == ["training.micro_batch_size=1"]  # it is the activations that are too many
    assert here.remedies["training.micro_batch_size=1"] <= here.capacity_bytes


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("lam.activations_reach_one_at=0.3", ["training, λ < 1", "training, λ = 1"]),
        ("control=true", ["training"]),
        ("lam.curve=instant", ["training, λ = 1"]),
        ("lam.reach_one_at=1.0", ["training, λ = 1 of activations"]),
    ],
)
def test_phases_without_a_step_are_left_out(override: str, names: list[str]) -> None:
    found = phases(small(override))
    assert [phase.name for phase in found] == names
    assert sum(phase.steps for phase in found) == 2


def test_a_gpu_takes_as_long_as_its_slower_half() -> None:
    gpu = GPUS["h100"]
    products, traffic = Work(10**15, 0, torch.bfloat16), Work(0, 10**12, torch.float32)
    assert gpu.seconds(Counter([products])) == pytest.approx(1e15 / 0.6 / 989e12)
    assert gpu.seconds(Counter([traffic])) == pytest.approx(1e12 / 0.75 / 3.35e12)
    assert gpu.seconds(Counter({products: 2, traffic: 1})) > gpu.seconds(Counter([products])) * 2
    integers = Work(10**15, 0, torch.int8)
    assert gpu.seconds(Counter([integers])) == pytest.approx(gpu.seconds(Counter([products])) / 2, rel=0.01)


def test_gpus_are_known_by_name() -> None:
    assert gpu_of("RTX 4090").memory == 24
    with pytest.raises(UsageError, match="--gpu abacus: not in the table") as caught:
        gpu_of("abacus")
    assert "a100-80" in caught.value.hint
