"""Warmup from the outside: what comes out, what survives a kill, what is refused."""

from __future__ import annotations

import html
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch._inductor.config
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from bitconvert.errors import BitconvertError, UsageError
from bitconvert.evaluation.generate import generate
from bitconvert.models.checkpoint import open_checkpoint
from bitconvert.models.lineage import read_lineage
from bitconvert.packing.pack import pack
from bitconvert.recipe import Packing, Recipe, load_recipe
from bitconvert.report.reporter import Silent
from bitconvert.report.training import WarmupReport
from bitconvert.ternary.bitlinear import bitlinears, insert_bitlinear
from bitconvert.training.data import ShuffledWindows, Windows, tokenize
from bitconvert.training.plan import plan_warmup
from bitconvert.training.run_directory import Interrupted, partial_directory
from bitconvert.training.teacher import LiveTeacher
from bitconvert.training.trainer import WarmupTrainer, training_arguments, uses_bf16
from bitconvert.training.warmup import warmup
from tests.recipes import FROM_THE_ORIGINAL
from tests.recording import Recorder

SMALL = (
    *FROM_THE_ORIGINAL,
    "training.tokens=768",
    "training.context=32",
    "training.batch_size=4",
    "training.precision=float32",  # so that they say the same on every machine
    "training.eval_every=3",
    "training.save_every=2",
    "data.held_out_tokens=64",
)


ENDED = "(the text ends here)"


def small(story: Path, *overrides: str) -> Recipe:
    return load_recipe(None, [*SMALL, f"data.sources=[{story}]", *overrides])


@pytest.fixture(scope="module")
def done(smollm: Path, story: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, WarmupReport]:
    output = tmp_path_factory.mktemp("warmup") / "ternary"
    return output, warmup(str(smollm), output, small(story), reporter=Silent())


@pytest.fixture(scope="module")
def unfinished(smollm: Path, story: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that was killed after its first checkpoint."""
    output = tmp_path_factory.mktemp("unfinished") / "out"
    run_until(3, signal.SIGKILL, smollm, output, small(story))
    return partial_directory(output)


def weights(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


# ---- what comes out ----


def test_the_directory_is_complete(done: tuple[Path, WarmupReport], smollm: Path) -> None:
    output, report = done
    assert {path.name for path in output.iterdir()} == {
        "README.md",
        "SHA256SUMS",
        "bitconvert.json",
        "config.json",
        "generation_config.json",
        "metrics.jsonl",
        "model.safetensors",
        "recipe.yaml",
        "report.html",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.png",
        "warmup.json",
    }
    assert not partial_directory(output).exists()
    lineage = read_lineage(output)
    assert lineage is not None
    assert (lineage.source, lineage.lam, lineage.tokens_seen, lineage.steps) == (str(smollm), 1.0, 768, 6)
    assert (report.steps, report.tokens) == (6, 768)
    assert str(report.held_out_ppl)[:5] in (output / "README.md").read_text()
    assert (output / "training.png").read_bytes().startswith(b"\x89PNG")


def test_it_learns(done: tuple[Path, WarmupReport]) -> None:
    output, report = done
    assert report.held_out_ppl < report.rounded_ppl
    steps = [line for line in map(json.loads, (output / "metrics.jsonl").open()) if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert [line["lam"] for line in steps] == pytest.approx([1 / 3, 1, 1, 1, 1, 1])  # (step - 0.5) / 6 over 0.25
    assert all(line["tokens_per_second"] > 0 and line["grad_norm"] > 0 for line in steps)


def test_the_latents_are_float32_and_keep_their_names(done: tuple[Path, WarmupReport], smollm: Path) -> None:
    before, after = load_file(smollm / "model.safetensors"), load_file(done[0] / "model.safetensors")
    assert before.keys() == after.keys()
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}


def test_stock_transformers_loads_it_as_ternary(done: tuple[Path, WarmupReport]) -> None:
    stock = AutoModelForCausalLM.from_pretrained(done[0], dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(done[0])("The quick brown fox", return_tensors="pt").input_ids
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        ours = open_checkpoint(str(done[0])).load()(tokens).logits
        theirs = stock(tokens).logits
        latent = AutoModelForCausalLM.from_config(stock.config).eval()
    assert type(stock.model.layers[0].mlp.up_proj).__name__ == "AutoBitLinear"
    assert not bitlinears(latent)
    # Float32 rounds otherwise than integers, and of 64 activations one that goes to the next int8 is 0.3 % of them.
    assert ((ours - theirs).norm() / ours.norm()).item() < 2e-2


def test_another_scaling_does_not_claim_to_be_bitnet(smollm: Path, story: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    warmup(str(smollm), output, small(story, "scaling={estimator: mse, granularity: row}"), reporter=Silent())
    assert "quantization_config" not in json.loads((output / "config.json").read_text())
    assert "The config therefore does not say bitnet" in (output / "README.md").read_text()
    assert str(open_checkpoint(str(output)).scaling) == "mse per row"


def test_a_model_stopped_half_way_is_not_ternary(smollm: Path, story: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    warmup(str(smollm), output, small(story, "lam.reach_one_at=1.0"), reporter=Silent())
    lineage = read_lineage(output)
    assert lineage is not None
    assert lineage.lam == 1.0
    lineage.model_copy(update={"lam": 0.5}).save(output)
    with pytest.raises(BitconvertError, match="not ternary yet"):
        pack(open_checkpoint(str(output)), Packing(formats=("tq2_0",)), tmp_path / "packed", reporter=Silent())


def test_without_a_text_it_samples_one(smollm: Path, tmp_path: Path) -> None:
    told = Recorder()
    warmup(str(smollm), tmp_path / "out", load_recipe(None, [*SMALL, "data.sampled_tokens=1024"]), reporter=told)
    assert "sampled from the original model" in told.warnings[0]
    lineage = read_lineage(tmp_path / "out")
    assert lineage is not None
    assert lineage.data.startswith("1024 tokens sampled")


def written(directory: Path) -> list[str]:
    """Prompt, original's text and ternary text of each place, as report.html has them."""
    page = (directory / "report.html").read_text(encoding="utf-8")
    return [html.unescape(text) for text in re.findall(r'<p class="(?:prompt|text)">(.*?)</p>', page, re.DOTALL)]


def test_the_report_sets_the_originals_text_beside_the_ternary_one(
    done: tuple[Path, WarmupReport], smollm: Path
) -> None:
    texts = written(done[0])
    assert len(texts) == 6  # of two held-out windows
    for prompt, *continued in (texts[:3], texts[3:]):
        models = (str(smollm), str(done[0]))
        assert continued == [generate(model, prompt, max_tokens=16).text or ENDED for model in models]


def test_metrics_tell_how_many_codes_changed(
    done: tuple[Path, WarmupReport], smollm: Path, story: Path, tmp_path: Path
) -> None:
    lines = [line for line in map(json.loads, (done[0] / "metrics.jsonl").open()) if "loss" in line]
    assert all(0 <= line["sign_flips"] <= line["flips"] < 1 for line in lines)
    assert all(line["flips"] > 0 and 0 < line["sparsity"] < 1 for line in lines)
    warmup(str(smollm), tmp_path / "out", small(story, "training.log_every=3"), reporter=Silent())
    rarer = [line for line in map(json.loads, (tmp_path / "out" / "metrics.jsonl").open()) if "loss" in line]
    for line, three in zip(rarer, (lines[:3], lines[3:]), strict=True):
        per_step = sum(each["flips"] for each in three) / 3
        assert 0 < line["flips"] <= per_step  # what goes and comes back in between is no flip
        assert line["sparsity"] == three[-1]["sparsity"]


def test_tensorboard_gets_the_metrics(smollm: Path, story: Path, tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    warmup(str(smollm), tmp_path / "out", small(story, "training.trackers=[tensorboard]"), reporter=Silent())
    (run,) = (tmp_path / "out" / "runs").iterdir()
    events = reader.EventAccumulator(str(run)).Reload()
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").open()]
    for name in ("original_ppl", "held_out_ppl", "lam", "kl", "flips", "sparsity"):
        told = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        expected = [(line["step"], line[name]) for line in lines if name in line]
        assert [step for step, _ in told] == [step for step, _ in expected]
        assert [value for _, value in told] == pytest.approx([value for _, value in expected])


def test_a_tracker_without_an_account_is_refused(
    smollm: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb.py").write_text("run = None\ndef login(prompt, verify): return False\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(UsageError, match="wandb is not logged in") as caught:
        warmup(str(smollm), tmp_path / "out", small(story, "training.trackers=[wandb]"), reporter=Silent())
    assert "WANDB_MODE=offline" in caught.value.hint
    assert not partial_directory(tmp_path / "out").exists()
    sys.modules.pop("wandb")


def test_what_a_tracker_wrote_is_kept(smollm: Path, story: Path, tmp_path: Path) -> None:
    class Tracking(Silent):
        def metrics(self, values: Mapping[str, float]) -> None:
            runs = partial_directory(tmp_path / "out") / "checkpoints" / "runs"
            runs.mkdir(parents=True, exist_ok=True)
            (runs / "events").write_text(str(values["step"]))

    warmup(str(smollm), tmp_path / "out", small(story), reporter=Tracking())
    assert (tmp_path / "out" / "runs" / "events").read_text() == "6"


def test_a_control_run_stays_in_full_precision(smollm: Path, story: Path, tmp_path: Path) -> None:
    report = warmup(str(smollm), tmp_path / "out", small(story, "control=true"), reporter=Silent())
    checkpoint = open_checkpoint(str(tmp_path / "out"))
    assert (checkpoint.kind, checkpoint.lineage) == ("plain", None)
    assert report.held_out_ppl < report.original_ppl


@pytest.mark.parametrize(("until_surpassed", "goes_on"), [("true", False), ("false", True)])
def test_the_original_teaches_while_it_is_better(
    smollm: Path, story: Path, tmp_path: Path, until_surpassed: str, goes_on: bool
) -> None:
    told = Recorder()
    recipe = small(story, "training.eval_every=2", "optimizer.lr=0.02", f"distill.until_surpassed={until_surpassed}")
    warmup(str(smollm), tmp_path / "out", recipe, reporter=told)
    original = told.lines[0]["original_ppl"]
    measured = {line["step"]: line["held_out_ppl"] for line in told.lines if "held_out_ppl" in line}
    taught = {line["step"]: line["kl"] > 0 for line in told.lines if "kl" in line}
    surpassed = {step: measured[(step - 1) // 2 * 2] < original for step in taught}
    assert {False, True} == set(surpassed.values())
    assert taught == {step: goes_on or not is_better for step, is_better in surpassed.items()}
    assert any("the text alone teaches now" in note for note in told.notes) != goes_on


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("also", ["training.micro_batch_size=1", "training.activation_checkpointing=true"])
def test_compiled_layers_learn_the_same(smollm: Path, story: Path, tmp_path: Path, also: str) -> None:
    runs = []
    for compiled in ("false", "true"):
        torch._dynamo.reset()
        told = Recorder()
        recipe = small(
            story, "lam.reach_one_at=0.7", "lam.activations_reach_one_at=0.3", also, f"training.compile={compiled}"
        )
        warmup(str(smollm), tmp_path / compiled, recipe, reporter=told)
        runs.append([line for line in told.lines if "loss" in line or "held_out_ppl" in line])
    for eager, ours in zip(*runs, strict=True):
        for key in {"loss", "kl", "ce", "grad_norm", "held_out_ppl"} & eager.keys():
            # A last bit that a fused norm rounds otherwise moves activations to the next int8, and steps amplify that.
            tolerance = 1e-4 if eager["step"] <= 1 else 5e-2
            assert ours[key] == pytest.approx(eager[key], rel=tolerance), (eager["step"], key)


@torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})
def test_compiling_needs_a_compiler(smollm: Path, story: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"training\.compile: torch\.compile needs a C\+\+ compiler"):
        warmup(str(smollm), tmp_path / "o", small(story, "training.compile=true"), reporter=Silent())


def test_activations_may_reach_one_before_the_weights(smollm: Path, story: Path, tmp_path: Path) -> None:
    settings = []

    class Watching(Silent):
        def metrics(self, values: Mapping[str, float]) -> None:
            settings.append(lam.settings)

    original = insert_bitlinear

    def watched(*given, **named):
        nonlocal lam
        lam = original(*given, **named)
        return lam

    lam = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bitconvert.training.student.insert_bitlinear", watched)
        recipe = small(story, "lam.reach_one_at=1.0", "lam.activations_reach_one_at=0.5", "training.eval_every=100")
        warmup(str(smollm), tmp_path / "o", recipe, reporter=Watching())
    training = settings[1:7]
    assert [round(w * 12) for w, _ in training] == [1, 3, 5, 7, 9, 11]
    assert [round(a * 12) for _, a in training] == [2, 6, 10, 12, 12, 12]


def test_activation_checkpointing_changes_nothing(
    done: tuple[Path, WarmupReport], smollm: Path, story: Path, tmp_path: Path
) -> None:
    warmup(str(smollm), tmp_path / "o", small(story, "training.activation_checkpointing=true"), reporter=Silent())
    for before, after in zip(
        load_file(done[0] / "model.safetensors").values(),
        load_file(tmp_path / "o/model.safetensors").values(),
        strict=True,
    ):
        torch.testing.assert_close(after, before)


# ---- the teacher ----


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BITCONVERT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_all_tokens_from_disk_teach_as_the_teacher_does(
    done: tuple[Path, WarmupReport], smollm: Path, story: Path, tmp_path: Path, cache: Path
) -> None:
    recipe = small(story, "distill.cache=true", "distill.cache_top_k=100000")
    report = warmup(str(smollm), tmp_path / "out", recipe, reporter=Silent())
    ours, lives = (
        [line["kl"] for line in map(json.loads, (output / "metrics.jsonl").open()) if "kl" in line]
        for output in (tmp_path / "out", done[0])
    )
    assert ours[0] == pytest.approx(lives[0], rel=1e-4)
    assert ours == pytest.approx(lives, rel=0.02)  # AdamW makes more of the rounding to float16 than it is
    assert report.held_out_ppl == pytest.approx(done[1].held_out_ppl, rel=0.02)


def test_a_second_run_needs_no_teacher_even_if_interrupted(
    smollm: Path, story: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Signalled(Silent):
        def metrics(self, values) -> None:
            if values["step"] == 3 and "loss" in values:
                os.kill(os.getpid(), signal.SIGTERM)

    recipe = small(story, "distill.cache=true", "distill.cache_top_k=8")
    first, second = tmp_path / "first", tmp_path / "second"
    warmup(str(smollm), first, recipe, reporter=Silent())
    (file,) = cache.glob("*.teacher")
    monkeypatch.setattr("bitconvert.training.warmup.LiveTeacher", None)
    with pytest.raises(Interrupted):
        warmup(str(smollm), second, recipe, reporter=Signalled())
    warmup(str(smollm), second, recipe, resume=True, reporter=Silent())
    assert weights(first) == weights(second)
    assert list(cache.glob("*.teacher")) == [file]


@pytest.mark.parametrize("override", ["control=true", "distill.kl=0"])
def test_what_has_no_teacher_keeps_none(
    override: str, smollm: Path, story: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitconvert.training.warmup.LiveTeacher", None)
    recipe = small(story, "distill.cache=true", "training.tokens=128", override)
    warmup(str(smollm), tmp_path / "out", recipe, reporter=Silent())
    assert list(cache.glob("*.teacher")) == []


def test_layers_in_cpu_memory_teach_the_same(
    done: tuple[Path, WarmupReport], smollm: Path, story: Path, tmp_path: Path
) -> None:
    warmup(str(smollm), tmp_path / "out", small(story, "distill.teacher_offload=true"), reporter=Silent())
    assert weights(tmp_path / "out") == weights(done[0])


# ---- the loop ----


def first_step(smollm: Path, story: Path, directory: Path, *overrides: str) -> dict[str, torch.Tensor]:
    """The parameters after one optimizer step, by plain SGD so that they show the gradient itself."""
    recipe = small(story, "training.tokens=128", "optimizer.max_grad_norm=1e9", *overrides)
    checkpoint = open_checkpoint(str(smollm))
    teacher = LiveTeacher(checkpoint.load_latent(), recipe.distill, torch.device("cpu"), torch.float32)
    student = checkpoint.load_latent()
    names = checkpoint.family.ternary_modules(name for name, _ in student.named_modules())
    windows = Windows(tokenize([str(story)], checkpoint.tokenizer(), Silent()).ids, 32)
    lam = insert_bitlinear(student, names, recipe.scaling)
    order = ShuffledWindows(windows, 4, 0)

    class BySgd(WarmupTrainer):
        def create_optimizer(self, model=None):
            self.optimizer = torch.optim.SGD([{"params": list(self.model.parameters()), "decays": False}], lr=1.0)
            return self.optimizer

    trainer = BySgd(student, teacher, lam, recipe, training_arguments(recipe, directory), order, windows, Silent())
    trainer.train()
    return {name: parameter.detach() for name, parameter in student.named_parameters()}


def test_accumulation_gives_the_gradient_of_one_large_batch(smollm: Path, story: Path, tmp_path: Path) -> None:
    whole = first_step(smollm, story, tmp_path / "whole", "training.micro_batch_size=4")
    parts = first_step(smollm, story, tmp_path / "parts", "training.micro_batch_size=1")
    before = load_file(smollm / "model.safetensors")
    moved = sum((whole[name] - before[name]).abs().sum() for name in before)
    assert moved > 1e-3
    for name, parameter in whole.items():
        torch.testing.assert_close(parts[name], parameter, rtol=1e-4, atol=1e-7)


def test_schedules_move_each_step(smollm: Path, story: Path, tmp_path: Path) -> None:
    told = Recorder()
    overrides = (
        "optimizer.lr_schedule=two_stage",
        "optimizer.weight_decay=0.1",
        "optimizer.weight_decay_schedule=two_stage",
    )
    warmup(str(smollm), tmp_path / "out", small(story, *overrides), reporter=told)
    steps = [line for line in told.lines if "loss" in line]
    assert [line["weight_decay"] for line in steps] == [0.1, 0.1, 0.1, 0, 0, 0]
    assert [line["lr"] for line in steps] == pytest.approx(
        [1e-3 * (1 - t) * (1 if t < 0.5 else 0.1) for t in (1 / 12, 3 / 12, 5 / 12, 7 / 12, 9 / 12, 11 / 12)]
    )
    assert steps[-1]["steps"] == 6


def test_a_diverging_loss_stops_the_run(smollm: Path, story: Path, tmp_path: Path) -> None:
    recipe = small(story, "optimizer.lr=1e30", "optimizer.lr_warmup=0", "optimizer.max_grad_norm=1e30")
    with pytest.raises(BitconvertError, match="the loss is not finite at step"):
        warmup(str(smollm), tmp_path / "out", recipe, reporter=Silent())
    assert not (tmp_path / "out").exists()


# ---- interrupted ----

_RUN = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from bitconvert.recipe import load_recipe
from bitconvert.report.reporter import Silent
from bitconvert.training.warmup import warmup
model, output, recipe, step, number = sys.argv[1:]
class Fatal(Silent):
    def metrics(self, values):
        if "loss" in values and values["step"] == int(step):
            os.kill(os.getpid(), int(number))
warmup(model, Path(output), load_recipe(recipe), reporter=Fatal())
"""


def run_until(step: int, number: int, smollm: Path, output: Path, recipe: Recipe) -> subprocess.CompletedProcess[str]:
    file = output.parent / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    arguments = [str(smollm), str(output), str(file), str(step), str(number)]
    return subprocess.run([sys.executable, "-c", _RUN, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("step", [1, 5])
def test_kill_9_and_resume_give_the_same_weights_bit_for_bit(
    step: int, done: tuple[Path, WarmupReport], smollm: Path, story: Path, tmp_path: Path
) -> None:
    output, recipe = tmp_path / "out", small(story)
    killed = run_until(step, signal.SIGKILL, smollm, output, recipe)
    assert killed.returncode == -signal.SIGKILL
    assert not output.exists()
    warmup(str(smollm), output, recipe, resume=True, reporter=Silent())
    assert weights(output) == weights(done[0])
    lines = [[json.loads(line) for line in (d / "metrics.jsonl").open()] for d in (output, done[0])]
    for line in (*lines[0], *lines[1]):
        line.pop("tokens_per_second", None)
    assert lines[0] == lines[1]
    assert written(output) == written(done[0])


def test_a_resumed_run_knows_whether_the_original_still_teaches(smollm: Path, story: Path, tmp_path: Path) -> None:
    recipe = small(story, "training.eval_every=2", "optimizer.lr=0.02")
    warmup(str(smollm), tmp_path / "whole", recipe, reporter=Silent())
    run_until(5, signal.SIGKILL, smollm, tmp_path / "out", recipe)
    told = Recorder()
    warmup(str(smollm), tmp_path / "out", recipe, resume=True, reporter=told)
    assert told.lines[0]["step"] == 5
    assert told.lines[0]["kl"] == 0
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_a_checkpoint_cut_off_while_being_written_is_not_used(
    done: tuple[Path, WarmupReport], smollm: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, recipe = tmp_path / "out", small(story)

    def cut_off(self: WarmupTrainer, directory: str) -> None:
        if "checkpoint-4" in directory:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="what is done is in"):
        patch.setattr(WarmupTrainer, "_save_rng_state", cut_off)
        warmup(str(smollm), output, recipe, reporter=Silent())
    assert [path.name for path in (partial_directory(output) / "checkpoints").glob("checkpoint-*")] == ["checkpoint-2"]
    warmup(str(smollm), output, recipe, resume=True, reporter=Silent())
    assert weights(output) == weights(done[0])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(
    number: int, done: tuple[Path, WarmupReport], smollm: Path, story: Path, tmp_path: Path
) -> None:
    class Signalled(Silent):
        def metrics(self, values) -> None:
            if values["step"] == 3 and "loss" in values:
                os.kill(os.getpid(), number)

    output, recipe = tmp_path / "out", small(story)
    with pytest.raises(Interrupted) as caught:
        warmup(str(smollm), output, recipe, reporter=Signalled())
    assert caught.value.exit_code == 128 + number
    assert caught.value.hint == f"continue with: bitconvert warmup --resume --output {output}"
    warmup(str(smollm), output, recipe, resume=True, reporter=Silent())
    assert weights(output) == weights(done[0])


def test_resume_refuses_other_options(smollm: Path, story: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run_until(3, signal.SIGKILL, smollm, output, small(story))
    with pytest.raises(UsageError, match=r"begun with other options \(optimizer.eps, training.seed\)"):
        other = small(story, "training.seed=1", "optimizer.eps=1", "optimizer.lr=1")
        warmup(str(smollm), output, other, resume=True, reporter=Silent())
    with pytest.raises(UsageError, match=f"begun with {smollm}"):
        warmup(str(story), output, small(story), resume=True, reporter=Silent())
    with pytest.raises(UsageError, match="an unfinished run is here"):
        warmup(str(smollm), output, small(story), reporter=Silent())


# ---- refused ----


def test_an_output_that_exists_is_left_alone(smollm: Path, story: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        warmup(str(smollm), tmp_path / "mine", small(story), reporter=Silent())
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_nothing_to_resume(smollm: Path, story: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no unfinished run"):
        warmup(str(smollm), tmp_path / "out", small(story), resume=True, reporter=Silent())


def test_baked_and_packed_models_have_nothing_to_train(
    done: tuple[Path, WarmupReport], story: Path, tmp_path: Path
) -> None:
    files = pack(
        open_checkpoint(str(done[0])),
        Packing(
            formats=(
                "tq2_0",
                "safetensors",
            )
        ),
        tmp_path / "packed",
        reporter=Silent(),
    ).files
    for file in files:
        with pytest.raises(BitconvertError, match="no latent weights left"):
            warmup(file.path, tmp_path / "again", small(story), reporter=Silent())
    assert not (tmp_path / "again").exists()


def test_a_loss_that_diverges_in_the_last_step_saves_nothing(smollm: Path, story: Path, tmp_path: Path) -> None:
    overrides = ("training.tokens=128", "optimizer.lr=1e36", "optimizer.lr_warmup=0", "optimizer.max_grad_norm=1e30")
    with pytest.raises(BitconvertError, match="the loss is not finite at step 1"):
        warmup(str(smollm), tmp_path / "out", small(story, *overrides), reporter=Silent())
    assert not (tmp_path / "out").exists()


def test_a_refused_resume_leaves_the_run_as_it_was(smollm: Path, story: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run_until(1, signal.SIGKILL, smollm, output, small(story))
    with pytest.raises(UsageError, match="begun with other options"):
        warmup(str(smollm), output, small(story, "training.seed=1"), resume=True, reporter=Silent())
    assert (partial_directory(output) / "run.json").exists()
    (partial_directory(output) / "run.json").write_text("{}")
    with pytest.raises(BitconvertError, match="run.json: not a begun record"):
        warmup(str(smollm), output, small(story), resume=True, reporter=Silent())


def test_a_run_whose_metrics_are_gone_is_refused_before_training(smollm: Path, story: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run_until(3, signal.SIGKILL, smollm, output, small(story))
    (partial_directory(output) / "metrics.jsonl").unlink()
    with pytest.raises(BitconvertError, match="metrics.jsonl: its beginning is gone"):
        warmup(str(smollm), output, small(story), resume=True, reporter=Silent())


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("texts.json", None, "texts.json: it is gone"),
        ("texts.json", "{}", "texts.json: not a"),
        ("codes.safetensors", None, "codes.safetensors: cannot be read"),
        ("codes.safetensors", "{}", "codes.safetensors: cannot be read"),
    ],
)
def test_a_run_whose_view_of_the_original_is_gone_is_refused_before_training(
    file: str, content: str | None, message: str, unfinished: Path, smollm: Path, story: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    shutil.copytree(unfinished, partial_directory(output))
    record = partial_directory(output) / "original" / file
    record.unlink()
    if content is not None:
        record.write_text(content)
    told = Recorder()
    with pytest.raises(BitconvertError, match=message):
        warmup(str(smollm), output, small(story), resume=True, reporter=told)
    assert told.lines == []


def test_options_that_cannot_work_are_refused(smollm: Path, story: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="optimizer.betas"):
        warmup(str(smollm), tmp_path / "out", small(story, "optimizer.betas=[2,3]"), reporter=Silent())


@pytest.mark.parametrize(
    ("precision", "instructions", "expected"),
    [
        ("auto", {"avx512_bf16": True}, True),
        ("auto", {"amx_bf16": True}, True),
        ("auto", {"avx512_f": True}, False),
        ("bf16", {}, True),
        ("float32", {"avx512_bf16": True}, False),
    ],
)
def test_a_cpu_computes_in_bf16_where_it_has_instructions_for_it(
    precision: str, instructions: dict[str, bool], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
    assert uses_bf16(load_recipe(None, [f"training.precision={precision}"])) == expected


def test_bf16_on_a_cpu_learns_what_float32_learns(
    done: tuple[Path, WarmupReport], smollm: Path, story: Path, tmp_path: Path
) -> None:
    report = warmup(str(smollm), tmp_path / "out", small(story, "training.precision=bf16"), reporter=Silent())
    assert report.held_out_ppl != done[1].held_out_ppl
    assert report.held_out_ppl == pytest.approx(done[1].held_out_ppl, rel=0.02)
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.float32}


def test_odd_places_are_refused(smollm: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="holds the directory that you are in"):
        warmup(str(smollm), Path(), small(story), reporter=Silent())
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BITCONVERT_CACHE", str(tmp_path / "file"))
    with pytest.raises(BitconvertError, match="cannot be written"):
        warmup(str(smollm), tmp_path / "out", small(story), reporter=Silent())


def test_a_model_is_warmed_up_once(done: tuple[Path, WarmupReport], smollm: Path, story: Path, tmp_path: Path) -> None:
    for attempt in (
        lambda: warmup(str(done[0]), tmp_path / "again", small(story), reporter=Silent()),
        lambda: plan_warmup(open_checkpoint(str(done[0])), small(story), reporter=Silent()),
    ):
        with pytest.raises(BitconvertError, match="was warmed up already") as caught:
            attempt()
        assert str(smollm) in caught.value.hint


def test_a_scale_per_group_does_not_hide_that_a_file_is_packed(smollm: Path, story: Path, tmp_path: Path) -> None:
    recipe = small(story, "scaling.granularity=group:64")
    warmup(str(smollm), tmp_path / "out", recipe, reporter=Silent())
    trained, packing = open_checkpoint(str(tmp_path / "out")), Packing(formats=("q2_0",))
    file = pack(trained, packing, tmp_path / "packed", reporter=Silent()).files[0]
    with pytest.raises(BitconvertError, match="no latent weights left"):
        warmup(file.path, tmp_path / "again", small(story), reporter=Silent())


def test_windows_longer_than_the_models_context_are_refused(smollm: Path, story: Path, tmp_path: Path) -> None:
    recipe = small(story, "training.context=1024", "training.tokens=8192")
    with pytest.raises(UsageError, match="contexts of up to 512 tokens, not 1024"):
        warmup(str(smollm), tmp_path / "out", recipe, reporter=Silent())


def test_what_fails_before_the_first_checkpoint_leaves_nothing(smollm: Path, tmp_path: Path) -> None:
    with pytest.raises(BitconvertError, match="no such file"):
        warmup(str(smollm), tmp_path / "out", small(tmp_path / "missing.txt"), reporter=Silent())
    assert list(tmp_path.iterdir()) == []


def test_a_directory_of_someone_else_is_left_alone(smollm: Path, story: Path, tmp_path: Path) -> None:
    partial_directory(tmp_path / "out").mkdir()
    (partial_directory(tmp_path / "out") / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="exists, and is no run"):
        warmup(str(smollm), tmp_path / "out", small(story), reporter=Silent())
    assert (partial_directory(tmp_path / "out") / "thesis.txt").read_text() == "years of work"


def test_a_run_has_its_directory_for_itself(smollm: Path, story: Path, tmp_path: Path) -> None:
    class Meddling(Silent):
        refusals = 0

        def metrics(self, values: Mapping[str, float]) -> None:
            for resume in (False, True):
                with pytest.raises(UsageError, match="another process is at work there"):
                    warmup(str(smollm), tmp_path / "out", small(story), resume=resume, reporter=Silent())
                self.refusals += 1

    meddling = Meddling()
    warmup(str(smollm), tmp_path / "out", small(story), reporter=meddling)
    assert meddling.refusals > 2


def test_a_tracker_that_is_not_installed_is_named(smollm: Path, story: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("trackio"):
        pytest.skip("trackio is installed")
    with pytest.raises(UsageError, match="trackio is not installed"):
        warmup(str(smollm), tmp_path / "out", small(story, "training.trackers=[trackio]"), reporter=Silent())


def test_one_of_several_gpus_is_used(story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = TrainingArguments._setup_devices.func  # type: ignore[attr-defined]

    def two_gpus(arguments: TrainingArguments) -> torch.device:
        device = setup(arguments)
        arguments._n_gpu = 2
        return device

    monkeypatch.setattr(TrainingArguments, "_setup_devices", property(two_gpus))
    monkeypatch.setattr(TrainingArguments, "device", torch.device("cpu"))
    assert training_arguments(small(story), tmp_path).n_gpu == 1


def test_a_group_that_does_not_fit_is_refused_before_training(smollm: Path, story: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="rows of 256 .* do not divide into groups of 96"):
        warmup(str(smollm), tmp_path / "out", small(story, "scaling.granularity=group:96"), reporter=Silent())
