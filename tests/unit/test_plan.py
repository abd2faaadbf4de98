"""What plan foresees: memory as torch then allocates it, what fits and what would, which numbers are estimates."""

from __future__ import annotations

import gc
import json
import random
from collections import Counter
from dataclasses import asdict
from itertools import accumulate, count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import profile

from benchmarks import kernels
from bitconvert.errors import UsageError
from bitconvert.models.checkpoint import open_checkpoint
from bitconvert.recipe import Recipe, load_recipe
from bitconvert.report.reporter import Silent
from bitconvert.training import plan as planning
from bitconvert.training import rehearsal, trainer
from bitconvert.training.distill import DistillationLoss, distillation_loss
from bitconvert.training.gpus import GPUS, Cluster, Kernels, cluster_of, read_kernels, with_kernels
from bitconvert.training.layers import Layer
from bitconvert.training.ledger import Ledger, Work
from bitconvert.training.parts import Parts
from bitconvert.training.plan import plan_warmup
from bitconvert.training.rehearsal import Rehearsal, account, phases
from bitconvert.training.warmup import warmup
from tests.models import write_model
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
    plan = plan_warmup(open_checkpoint(str(smollm)), small(), [Cluster(GPUS["h100"])], reporter=Silent())
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
    plan = plan_warmup(
        open_checkpoint(str(smollm)), recipe, [Cluster(GPUS["h100"])], reporter=Silent(), clock=lambda: calls["layer"]
    )
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
    (here,) = plan_warmup(open_checkpoint(str(smollm)), recipe, reporter=Silent()).forecasts
    assert not here.fits
    assert here.seconds == {}
    assert here.total_seconds is None
    assert next(iter(here.remedies)) == "training.micro_batch_size=1"  # it is the activations that are too many
    assert here.remedies["training.micro_batch_size=1"] <= here.capacity_bytes


@pytest.mark.parametrize("seed", range(3))
def test_a_machine_that_is_busy_meanwhile_makes_no_time_negative(tmp_path: Path, seed: int) -> None:
    checkpoint = open_checkpoint(str(write_model(tmp_path / "deep", "smollm2", layers=30)))
    interruptions = random.Random(seed)
    moments = accumulate(interruptions.expovariate(1) for _ in count())
    recipe = small("init.method=blockwise", "lam.curve=instant")
    here = plan_warmup(checkpoint, recipe, reporter=Silent(), clock=lambda: next(moments)).forecasts[0]
    assert all(seconds >= 0 for seconds in here.seconds.values()), here.seconds


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


def test_gpus_are_known_by_name_and_number() -> None:
    assert cluster_of("RTX 4090") == Cluster(GPUS["rtx-4090"])
    assert cluster_of("64xH100") == Cluster(GPUS["h100"], 64)
    assert cluster_of("8 x rtx 4090") == Cluster(GPUS["rtx-4090"], 8)
    assert (cluster_of("64xh100").name, cluster_of("1xh100").name) == ("64xh100", "h100")
    with pytest.raises(UsageError, match="--gpu abacus: not in the table") as caught:
        cluster_of("abacus")
    assert "a100-80" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("0xh100", "0 GPUs do not fill machines of 8"),
        ("12xh100", "12 GPUs do not fill machines of 8"),
        ("16xrtx-4090", "no network between machines of this GPU is known"),
        ("8xabacus", "--gpu 8xabacus: not in the table"),
    ],
)
def test_gpus_that_cannot_be_so_many_are_refused(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        cluster_of(name)


# ---- several GPUs ----


def test_bytes_go_through_the_narrowest_link() -> None:
    machine, many = Cluster(GPUS["h100"], 8), Cluster(GPUS["h100"], 64)
    assert machine.gathering_seconds(8e9) == pytest.approx(7e9 / (0.75 * 450e9))
    assert many.gathering_seconds(64e9) == pytest.approx(63e9 / (0.75 * 8 * 50e9))  # eight adapters a machine
    assert Cluster(GPUS["h100"]).gathering_seconds(1e9) == 0


def test_gpus_that_split_a_model_hold_parts_of_it_and_what_is_gathered(smollm: Path) -> None:
    checkpoint, recipe = open_checkpoint(str(smollm)), small("training.batch_size=16", "training.precision=bf16")
    parts, counted = Parts.of(checkpoint, recipe), account(checkpoint, recipe, bf16=True)
    skeleton = checkpoint.skeleton()
    layer = sum(weight.numel() for name, weight in skeleton.named_parameters() if ".layers.0." in name)
    rest = sum(weight.numel() for name, weight in skeleton.named_parameters() if ".layers." not in name)
    assert parts == Parts(layer, 2 * layer, rest, teacher_bytes=2)

    of_two, of_eight = parts.memory(counted, 2), parts.memory(counted, 8)
    for kind in ("weights", "gradients", "optimizer"):
        assert of_two[kind] == -(-counted.highest[kind] // 2)
        assert of_eight[kind] == -(-counted.highest[kind] // 8)
    assert of_eight["teacher"] == 2 * (2 * layer // 8 + rest)
    assert of_eight["gathered"] == 4 * (rest + 3 * layer) + 2 * 2 * layer
    assert of_eight["activations"] == counted.highest["activations"]
    assert parts.traffic == 4 * (2 * 2 * layer + rest) + 4 * (2 * layer + rest) + 2 * 2 * layer
    assert Parts.of(checkpoint, small("distill.kl=0")).teacher_bytes == 0
    assert Parts.of(checkpoint, small("distill.cache=true")).teacher_bytes == 0


def test_more_gpus_are_faster_and_cost_what_their_hours_do(smollm: Path) -> None:
    recipe = small("training.batch_size=16", "training.micro_batch_size=1", "training.tokens=8192")
    clusters = [Cluster(GPUS["h100"], count) for count in (1, 8, 16)]
    _, one, eight, sixteen = plan_warmup(
        open_checkpoint(str(smollm)), recipe, clusters, price=2.0, reporter=Silent()
    ).forecasts
    assert [forecast.gpus for forecast in (one, eight, sixteen)] == [1, 8, 16]
    phases_ = [name for name in one.seconds if name.startswith("training")]
    assert sum(one.seconds[name] for name in phases_) == pytest.approx(8 * sum(eight.seconds[name] for name in phases_))
    for forecast in (one, eight, sixteen):
        assert forecast.cost == pytest.approx(2.0 * forecast.gpus * sum(forecast.seconds.values()) / 3600)
    communication = "communication that computing does not hide"
    assert communication not in one.seconds
    training = [*phases_, "optimizer", communication]
    assert eight.tokens_per_second == pytest.approx(8192 / sum(eight.seconds[name] for name in training))


def test_a_batch_that_gpus_cannot_share_is_refused(smollm: Path) -> None:
    with pytest.raises(UsageError, match="--gpu 8xh100: training.batch_size 4 is not a multiple of 16") as refused:
        plan_warmup(open_checkpoint(str(smollm)), small(), [Cluster(GPUS["h100"], 8)], reporter=Silent())
    assert refused.value.hint.startswith("--set training.batch_size=16")


def test_gpus_that_split_a_model_are_foreseen_with_what_they_can_do(smollm: Path) -> None:
    batch = ("training.batch_size=16", "training.micro_batch_size=1", "training.tokens=16384")
    recipe = small("init.method=auto", "lam.curve=auto", *batch)
    clusters = [Cluster(GPUS["h100"], count) for count in (1, 8)]
    plan = plan_warmup(open_checkpoint(str(smollm)), recipe, clusters, reporter=Silent())
    here, one, eight = (forecast.seconds.keys() for forecast in plan.forecasts)
    assert "initialisation" in here & one
    assert "initialisation" not in eight
    assert "training, λ < 1" in eight - one
    note = "GPUs that split the model train with lam.curve=linear, init.method=none"
    assert any(each.startswith(note) for each in plan.notes), plan.notes


def test_what_a_split_model_cannot_do_is_refused_before_it_is_begun(smollm: Path) -> None:
    recipe, clusters = small("scaling.estimator=learned"), [Cluster(GPUS["h100"], 8)]
    with pytest.raises(UsageError, match="--gpu 8xh100: scaling.estimator: needs the whole model") as refused:
        plan_warmup(open_checkpoint(str(smollm)), recipe, clusters, reporter=Silent())
    assert refused.value.hint.startswith("--set scaling.estimator=mse")


@pytest.mark.slow
def test_a_deep_model_is_told_from_few_of_its_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(str(write_model(tmp_path / "deep", "smollm2", num_hidden_layers=9)))
    few = account(checkpoint, small(), bf16=True)
    monkeypatch.setattr(rehearsal, "_SLICES_COUNTED", (9, 9))
    whole = account(checkpoint, small(), bf16=True)
    assert few.checkpoint_bytes == pytest.approx(whole.checkpoint_bytes, rel=1e-3)
    assert few.peak == pytest.approx(whole.peak, rel=0.02)
    assert few.highest == pytest.approx(whole.highest, rel=0.02)
    h100 = GPUS["h100"]
    for phase, work in whole.micro_step.items():
        assert h100.seconds(few.micro_step[phase]) == pytest.approx(h100.seconds(work), rel=0.02)
    assert h100.seconds(few.update) == pytest.approx(h100.seconds(whole.update), rel=0.02)


# ---- measured kernels ----


def test_measured_kernels_take_the_place_of_the_data_sheet(smollm: Path, tmp_path: Path) -> None:
    file = tmp_path / "h100.json"
    file.write_text(json.dumps(asdict(kernels.measured("h100", tokens=64, hidden=64))))
    rates = read_kernels(file)
    assert (rates.gpu, rates.device) == ("h100", "a CPU")
    clusters = with_kernels([Cluster(GPUS["h100"], 8), Cluster(GPUS["a100-80"])], rates)
    products, integers = (Work(10**15, 0, dtype) for dtype in (torch.bfloat16, torch.int8))
    assert clusters[0].gpu.seconds(Counter([products])) == pytest.approx(1e15 / (rates.bf16 * 1e12))
    assert clusters[0].gpu.seconds(Counter([integers])) == pytest.approx(1e15 / (rates.int8 * 1e12))
    assert clusters[0].gpu.seconds(Counter([Work(0, 10**12, torch.float32)])) == pytest.approx(1e3 / rates.bandwidth)
    assert clusters[1] == Cluster(GPUS["a100-80"])
    plan = plan_warmup(open_checkpoint(str(smollm)), small("training.batch_size=16"), clusters, reporter=Silent())
    assert [forecast.kernels for forecast in plan.forecasts] == [None, "a CPU", None]
    assert any(note.startswith("Times of 8xh100") and "measured on a CPU" in note for note in plan.notes)


@pytest.mark.parametrize("content", [None, "no JSON", "{}", '{"gpu": "h100"}'])
def test_a_measurement_that_is_none_is_told(content: str | None, tmp_path: Path) -> None:
    file = tmp_path / "kernels.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UsageError, match="--measured .*kernels.json: ") as refused:
        read_kernels(file)
    assert "benchmarks.kernels" in refused.value.hint


def test_a_measurement_of_another_gpu_is_told() -> None:
    rates = Kernels("b200", "NVIDIA B200", 1.0, 1.0, 1.0, 1.0)
    with pytest.raises(UsageError, match="it was on b200, which no --gpu names"):
        with_kernels([Cluster(GPUS["h100"])], rates)
