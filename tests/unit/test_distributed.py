"""Several processes: they train what one trains, whole or split, and go on from each other's checkpoints."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file, save_file

from bitconvert.errors import UsageError
from bitconvert.models.checkpoint import open_checkpoint
from bitconvert.recipe import load_recipe, recipe_directory
from bitconvert.report.reporter import Silent
from bitconvert.training.run_directory import Interrupted
from bitconvert.training.sharding import require_shardable, require_text
from bitconvert.training.trainer import WarmupTrainer, training_arguments
from bitconvert.training.warmup import warmup
from tests.models import write_model
from tests.recipes import FROM_THE_ORIGINAL

SETS = (
    *FROM_THE_ORIGINAL,
    "distill.until_surpassed=false",
    "training.tokens=384",
    "training.context=32",
    "training.batch_size=4",
    "training.micro_batch_size=1",
    "training.precision=float32",
    "training.save_every=2",
    "data.held_out_tokens=160",  # five windows, which two processes cannot share evenly
)
SPLIT = "training.shard=true"
STOPPED_AFTER_A_STEP = (
    "import sys\n"
    "from bitconvert.training.trainer import WarmupTrainer\n"
    "progress = WarmupTrainer.set_progress\n"
    "def stop(self, step):\n    progress(self, step); self.stop_requested = self.args.process_index == 0\n"
    "WarmupTrainer.set_progress = stop\n"
    "from bitconvert.cli.main import main\n"
    "main()\n"
)
"""A command line whose warmup is asked to stop in its first step: one of the processes is, and all must agree."""

Run = Callable[..., Path]


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model the halves of whose matrices have other means than the whole: each process would see another scale."""
    directory = write_model(tmp_path_factory.mktemp("uneven") / "model", "llama3")
    weights = load_file(directory / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith("_proj.weight"):
            weight[: len(weight) // 2] *= 3
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def alone(uneven: Path, story: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("alone") / "ternary"
    warmup(str(uneven), output, load_recipe(None, [*SETS, f"data.sources=[{story}]"]), reporter=Silent())
    return output


@pytest.fixture
def launch(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a program in two processes, as torchrun or another launcher does."""
    program = tmp_path / "stopped.py"
    program.write_text(STOPPED_AFTER_A_STEP)

    def run(*arguments: object, by: tuple[str, ...] = ("torch.distributed.run", "--standalone", "--nproc-per-node=2")):
        command = [sys.executable, "-m", *by, *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    return run


def options(model: Path, story: Path, output: Path, *sets: str) -> list[object]:
    return ["--model", model, "--data", story, "--output", output, *(f"--set={each}" for each in (*SETS, *sets))]


def assert_same(one: Path, other: Path, tolerance: float) -> None:
    """The same numbers at each step, and the same weights, but for the order in which floats are added."""
    ours, theirs = (
        [json.loads(line) for line in (each / "metrics.jsonl").read_text().splitlines()] for each in (one, other)
    )
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for line, same in zip(ours, theirs, strict=True):
        for key in line.keys() & {"loss", "kl", "ce", "grad_norm", "held_out_ppl", "original_ppl", "flips", "sparsity"}:
            assert math.isclose(line[key], same[key], rel_tol=tolerance), (key, line, same)
    ours, theirs = (load_file(each / "model.safetensors") for each in (one, other))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert (weight - theirs[name]).abs().max() <= tolerance * weight.abs().max(), name


def written(page: str) -> list[str]:
    """The texts of a report."""
    texts = re.findall(r"<p class=\"text\">(.*?)</p>", page, re.DOTALL)
    assert len(texts) > 4
    return texts


@pytest.mark.parametrize("sets", [(), (SPLIT, "training.activation_checkpointing=true")], ids=["ddp", "fsdp2"])
def test_two_processes_train_what_one_trains(
    sets: tuple[str, ...], alone: Path, uneven: Path, story: Path, tmp_path: Path, launch: Run
) -> None:
    output = tmp_path / "ternary"
    done = launch("-m", "bitconvert", "warmup", *options(uneven, story, output, *sets), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 3  # said once
    assert "[transformers]" not in done.stderr
    assert_same(alone, output, 2e-4)
    assert {file.name for file in output.iterdir()} == {file.name for file in alone.iterdir()}
    ours, theirs = ((each / "report.html").read_text() for each in (output, alone))
    assert written(ours) == written(theirs)
    assert open_checkpoint(str(output)).lineage is not None
    assert sorted(file.name for file in tmp_path.iterdir()) == ["stopped.py", "ternary"]


def test_a_run_goes_on_with_another_number_of_processes(
    alone: Path, uneven: Path, story: Path, tmp_path: Path, launch: Run
) -> None:
    output = tmp_path / "ternary"
    stopped = launch(tmp_path / "stopped.py", "warmup", *options(uneven, story, output, SPLIT))
    assert "interrupted at step 1; everything is saved" in stopped.stderr
    recipe = load_recipe(None, [*SETS, SPLIT, f"data.sources=[{story}]"])
    warmup(str(uneven), output, recipe, resume=True, reporter=Silent())
    assert_same(alone, output, 2e-4)


@pytest.mark.slow
def test_a_run_goes_on_in_more_processes(alone: Path, uneven: Path, story: Path, tmp_path: Path, launch: Run) -> None:
    output = tmp_path / "ternary"
    command = [sys.executable, tmp_path / "stopped.py", "warmup", *options(uneven, story, output, SPLIT)]
    stopped = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert "interrupted at step 1" in stopped.stderr, stopped.stderr
    resumed = launch("-m", "bitconvert", "warmup", "--resume", "--output", output)
    assert resumed.returncode == 0, resumed.stderr
    assert_same(alone, output, 2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "fsdp2"])
def test_accelerate_launches_it(
    config: str, alone: Path, uneven: Path, story: Path, tmp_path: Path, launch: Run
) -> None:
    file = recipe_directory() / "accelerate" / f"{config}.yaml"
    by = (
        "accelerate.commands.launch",
        "--config_file",
        str(file),
        "--cpu",
        "--num_processes=2",
        "--main_process_port=0",
    )
    output = tmp_path / "ternary"
    done = launch("-m", "bitconvert", "warmup", *options(uneven, story, output), by=by)
    assert done.returncode == 0, done.stderr
    assert_same(alone, output, 2e-4)


STREAMED = ("data.streaming=true", "data.shard_tokens=96")
BF16 = ("training.precision=bf16",)
MUON = ("optimizer.name=muon",)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sets", "split", "tolerance"),
    [
        pytest.param(STREAMED, (), 2e-4, id="streamed-ddp"),
        pytest.param(STREAMED, (SPLIT,), 2e-3, id="streamed-fsdp2"),
        pytest.param(BF16, (), 1e-2, id="bf16-ddp"),
        pytest.param(BF16, (SPLIT,), 1e-2, id="bf16-fsdp2"),
        pytest.param(MUON, (SPLIT,), 3e-2, id="muon-fsdp2"),
    ],
)
def test_other_ways_to_train_do_too(
    sets: tuple[str, ...],
    split: tuple[str, ...],
    tolerance: float,
    uneven: Path,
    story: Path,
    tmp_path: Path,
    launch: Run,
) -> None:
    """Sums in another order move a weight over to another code now and then; in bf16, Muon's too, more often."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in ("one.txt", "other.txt"):  # a stream holds whole documents out
        (texts / name).write_text(story.read_text())
    recipe = load_recipe(None, [*SETS, *sets, f"data.sources=[{texts}]"])
    warmup(str(uneven), tmp_path / "alone", recipe, reporter=Silent())
    done = launch("-m", "bitconvert", "warmup", *options(uneven, texts, tmp_path / "two", *sets, *split))
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "alone", tmp_path / "two", tolerance)


@pytest.mark.parametrize("file", sorted((recipe_directory() / "accelerate").glob("*.yaml")), ids=lambda file: file.stem)
def test_accelerate_reads_what_is_shipped(file: Path) -> None:
    config = load_config_from_file(str(file))
    assert config.num_processes == 8 * config.num_machines
    assert config.mixed_precision == "no"


def test_a_batch_that_does_not_divide_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UsageError, match="4 windows do not divide into micro-batches of 1 for 3 processes") as refused:
        training_arguments(load_recipe(None, SETS), tmp_path)
    assert "training.batch_size=6" in refused.value.hint


@pytest.mark.parametrize(
    "needs_it_whole",
    [
        "init.method=blockwise",
        "keep.budget=0.1",
        "scaling.estimator=learned",
        "optimizer.name=adafactor",
        "distill.cache=true",
        "distill.teacher_offload=true",
        "training.compile=true",
    ],
)
def test_what_needs_the_whole_model_is_refused_by_name(needs_it_whole: str, story: Path) -> None:
    recipe = load_recipe(None, [*SETS, f"data.sources=[{story}]", needs_it_whole])
    with pytest.raises(UsageError, match=needs_it_whole.partition("=")[0]):
        require_shardable(recipe)


def test_a_split_model_cannot_sample_a_text() -> None:
    with pytest.raises(UsageError, match="cannot sample a text"):
        require_text(load_recipe(None, SETS))


def test_checkpoints_are_safetensors_and_hold_all(
    uneven: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = WarmupTrainer.set_progress

    def stop(self: WarmupTrainer, step: int) -> None:
        progress(self, step)
        self.stop_requested = True

    monkeypatch.setattr(WarmupTrainer, "set_progress", stop)
    with pytest.raises(Interrupted, match="interrupted at step 1"):
        recipe = load_recipe(None, [*SETS, f"data.sources=[{story}]"])
        warmup(str(uneven), tmp_path / "ternary", recipe, reporter=Silent())
    checkpoint = tmp_path / "ternary.partial" / "checkpoints" / "checkpoint-1"
    weights, kept = (load_file(checkpoint / f"{name}.safetensors") for name in ("model", "optimizer"))
    assert kept.keys() == {f"{name}/{key}" for name in weights for key in ("exp_avg", "exp_avg_sq", "step")}
    assert all(kept[f"{name}/exp_avg"].shape == weight.shape for name, weight in weights.items())
    assert all(torch.equal(kept[f"{name}/step"], torch.tensor(1.0)) for name in weights)
