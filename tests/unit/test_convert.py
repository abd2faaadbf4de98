"""The whole way in one command: what comes of it, what is done again after an interruption, what is refused at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from bitconvert.conversion import convert as conversion
from bitconvert.conversion.convert import convert, unfinished_conversion
from bitconvert.errors import BitconvertError, UsageError
from bitconvert.evaluation.evaluate import evaluate
from bitconvert.evaluation.verify import verify
from bitconvert.models.hub import Repository
from bitconvert.recipe import Recipe, load_recipe
from bitconvert.report.conversion import ConvertReport
from bitconvert.report.reporter import Silent
from bitconvert.training.trainer import Diverged, WarmupTrainer
from tests.hub import Hub, running_hub

SMALL = (
    "training.tokens=512",
    "training.context=32",
    "training.batch_size=4",
    "data.held_out_tokens=128",
    "init.method=none",
    "lam.curve=instant",
    "optimizer.name=adamw",
    "training.precision=float32",
)


def small(story: Path, *overrides: str) -> Recipe:
    return load_recipe(None, [*SMALL, f"data.sources=[{story}]", *overrides])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub(monkeypatch) as hub:
        yield hub


class Converted(NamedTuple):
    output: Path
    report: ConvertReport


@pytest.fixture(scope="module")
def converted(smollm: Path, story: Path, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    output = tmp_path_factory.mktemp("convert") / "tiny-1.58"
    recipe = small(story, "pack.formats=[tq2_0, safetensors, onnx]")
    return Converted(output, convert(str(smollm), output, recipe, reporter=Silent()))


def tree(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


# ---- what comes of it ----


def test_one_directory_holds_it_all(converted: Converted) -> None:
    output, report = converted
    made = {path.name for path in output.iterdir()}
    assert made == {"packed", "latent", "held-out.txt", "recipe.yaml", "report.json", "SHA256SUMS"}
    packed = {path.name for path in (output / "packed").iterdir()}
    assert packed - {"tiny-1.58-TQ2_0.gguf"} == {"README.md", "SHA256SUMS", "tiny-1.58-bitnet", "tiny-1.58-onnx"}
    for directory in (output, output / "packed", output / "latent"):
        found = verify(directory, Silent())
        assert found.intact
        assert not (*found.changed, *found.missing, *found.extra)
    assert [file.format for file in report.packed.files] == ["tq2_0", "safetensors", "onnx"]
    paths = [report.warmup.output, *report.packed.companions, *(file.path for file in report.packed.files)]
    assert all(Path(path).exists() for path in paths)
    assert report.warmup.steps == 4
    assert json.loads((output / "report.json").read_text()) == json.loads(json.dumps(asdict(report)))
    assert [path.name for path in output.parent.iterdir()] == ["tiny-1.58"]


def test_the_files_themselves_are_measured(converted: Converted, smollm: Path) -> None:
    output, report = converted
    assert [each.model for each in report.measured] == [file.path for file in report.packed.files[:2]]
    card = (output / "packed" / "README.md").read_text()
    for told in report.measured:
        again = evaluate(told.model, data=output / "held-out.txt", context=32, against=str(smollm))
        assert again.perplexity == told.perplexity
        assert again.comparison == told.comparison
        assert told.comparison is not None
        assert f"{told.comparison.ppl_ratio:.4f} | {told.comparison.kl:.4f}" in card
    assert f"`{Path(report.packed.files[0].path).name}` | " in card


def test_the_text_is_what_the_training_never_saw(converted: Converted, story: Path) -> None:
    text = (converted.output / "held-out.txt").read_text()
    assert len(text) > 100
    assert story.read_text().rstrip().endswith(text.rstrip()[-100:])


# ---- interruptions ----


def test_finished_stages_are_not_done_again(
    converted: Converted, smollm: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "tiny-1.58"
    recipe = small(story, "pack.formats=[tq2_0, safetensors, onnx]")

    def interrupted(model: str, **options: Any) -> Any:
        if model.endswith("bitnet"):
            raise KeyboardInterrupt
        return evaluate(model, **options)

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "evaluate", interrupted)
        with pytest.raises(BitconvertError, match="interrupted; what was finished is saved") as stopped:
            convert(str(smollm), output, recipe, reporter=Silent())
    assert stopped.value.exit_code == 130
    assert f"bitconvert convert --resume --output {output}" in stopped.value.hint
    assert not output.exists()
    assert unfinished_conversion(output) == (str(smollm), recipe)

    measured: list[str] = []

    def noted(model: str, **options: Any) -> Any:
        measured.append(model)
        return evaluate(model, **options)

    for stage in ("warmup", "pack"):
        monkeypatch.setattr(conversion, stage, None)
    monkeypatch.setattr(conversion, "evaluate", noted)
    convert(str(smollm), output, recipe, resume=True, reporter=Silent())
    assert [Path(model).name for model in measured] == ["tiny-1.58-bitnet"]
    again, before = tree(output), tree(converted.output)
    assert again.keys() == before.keys()
    for name in again:
        if name.endswith((".gguf", ".safetensors", "README.md", "_data")):
            assert again[name] == before[name], name


def test_an_interrupted_training_goes_on(
    converted: Converted, smollm: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, recipe = tmp_path / "tiny-1.58", small(story, "pack.formats=[tq2_0]")
    set_progress = WarmupTrainer.set_progress

    def stopping(trainer: WarmupTrainer, step: int) -> None:
        set_progress(trainer, step)
        trainer.stop_requested = step == 1

    with monkeypatch.context() as patch:
        patch.setattr(WarmupTrainer, "set_progress", stopping)
        with pytest.raises(BitconvertError, match="interrupted at step 2") as stopped:
            convert(str(smollm), output, recipe, reporter=Silent())
    assert stopped.value.hint == f"continue with: bitconvert convert --resume --output {output}"
    report = convert(str(smollm), output, recipe, resume=True, reporter=Silent())
    assert report.warmup.steps == 4
    file = Path(report.packed.files[0].path).name
    assert (output / "packed" / file).read_bytes() == (converted.output / "packed" / file).read_bytes()


def test_what_a_loss_that_diverged_asks_for_may_change(
    smollm: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, options = tmp_path / "tiny-1.58", ("pack.formats=[tq2_0]", "training.save_every=1")

    def diverge(trainer: WarmupTrainer) -> bool:
        if trainer.state.global_step == 2:
            raise Diverged(2)
        return end_step(trainer)

    end_step = WarmupTrainer.end_step
    with monkeypatch.context() as patch:
        patch.setattr(WarmupTrainer, "end_step", diverge)
        with pytest.raises(BitconvertError, match="not finite at step 2") as stopped:
            convert(str(smollm), output, small(story, *options), reporter=Silent())
    assert f"continue with: bitconvert convert --resume --output {output} --set optimizer.lr=" in stopped.value.hint
    with pytest.raises(UsageError, match=r"other options \(training.tokens\)"):
        convert(str(smollm), output, small(story, *options, "training.tokens=1024"), resume=True, reporter=Silent())
    recipe = small(story, *options, "optimizer.lr=1e-5")
    assert convert(str(smollm), output, recipe, resume=True, reporter=Silent()).warmup.steps == 4
    assert "lr: 1.0e-05" in (output / "latent" / "recipe.yaml").read_text()


def test_other_options_are_no_resumption(smollm: Path, story: Path, tmp_path: Path, interrupted: Path) -> None:
    for other in ("pack.formats=[q8_0]", "optimizer.lr=1e-5"):
        with pytest.raises(UsageError, match="was begun with other options, and is trained"):
            convert(str(smollm), interrupted, small(story, other), resume=True, reporter=Silent())
    with pytest.raises(UsageError, match="was begun with"):
        convert("owner/other", interrupted, small(story), resume=True, reporter=Silent())
    with pytest.raises(BitconvertError, match="an unfinished conversion is here"):
        convert(str(smollm), interrupted, small(story), reporter=Silent())


@pytest.fixture
def interrupted(smollm: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a conversion would have come that was interrupted while it packed."""

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "pack", stop)
        with pytest.raises(BitconvertError):
            convert(str(smollm), tmp_path / "stopped", small(story), reporter=Silent())
    return tmp_path / "stopped"


# ---- what is refused before anything is done ----


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["scaling.granularity=row"], "safetensors cannot hold what this run makes: .*one scale per tensor"),
        (["control=true"], "control: "),
        (["pack.formats=[q4_0]"], "q4_0: no such format"),
        (["training.context=4096"], "made for contexts of up to"),
        (["data.sources=[/no/text.txt]"], "/no/text.txt: no such file"),
    ],
)
def test_what_cannot_be_is_refused_at_once(
    overrides: list[str], message: str, smollm: Path, story: Path, tmp_path: Path
) -> None:
    with pytest.raises(BitconvertError, match=message):
        convert(str(smollm), tmp_path / "out", small(story, *overrides), reporter=Silent())
    assert list(tmp_path.iterdir()) == []


def test_with_all_formats_those_that_can_are_enough(
    smollm: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reached(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion, "warmup", reached)
    recipe = small(story, "scaling.granularity=row", "pack.formats=[all]")
    with pytest.raises(BitconvertError, match="interrupted"):
        convert(str(smollm), tmp_path / "out", recipe, reporter=Silent())


def test_a_disk_that_is_too_small_is_told(
    smollm: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage: Callable[..., Any] = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=100_000))
    with pytest.raises(BitconvertError, match=r"out.partial: .* GB are needed there, and 0.0 GB are free"):
        convert(str(smollm), tmp_path / "out", small(story), reporter=Silent())
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_there_stays(smollm: Path, story: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BitconvertError, match="exists already"):
        convert(str(smollm), tmp_path, small(story), reporter=Silent())
    (tmp_path / "out.partial").mkdir()
    with pytest.raises(BitconvertError, match="exists, and is no conversion"):
        convert(str(smollm), tmp_path / "out", small(story), reporter=Silent())
    assert (tmp_path / "file").read_text() == "mine"


# ---- the hub ----


def test_what_is_finished_is_pushed_and_nothing_else(smollm: Path, story: Path, tmp_path: Path, hub: Hub) -> None:
    recipe, repository = small(story, "pack.formats=[tq2_0]"), Repository("somebody/tiny", private=True)
    report = convert(str(smollm), tmp_path / "tiny", recipe, repository=repository, reporter=Silent())
    assert report.pushed_to == f"{hub.address}/somebody/tiny"
    (file,) = report.packed.files
    assert hub.files == {Path(file.path).name, "README.md", "SHA256SUMS"}
    assert hub.created == [("tiny", True)]


def test_a_hub_that_will_refuse_is_asked_first(smollm: Path, story: Path, tmp_path: Path, hub: Hub) -> None:
    with pytest.raises(BitconvertError, match="somebody may not write to strangers"):
        convert(str(smollm), tmp_path / "t", small(story), repository=Repository("strangers/tiny"), reporter=Silent())
    assert list(tmp_path.iterdir()) == []


def test_a_push_that_fails_loses_nothing(interrupted: Path, smollm: Path, story: Path, hub: Hub) -> None:
    hub.full = True
    with pytest.raises(BitconvertError, match="the storage is full") as refused:
        convert(
            str(smollm),
            interrupted,
            small(story),
            resume=True,
            repository=Repository("somebody/tiny"),
            reporter=Silent(),
        )
    assert refused.value.hint.endswith(f"hf upload somebody/tiny {interrupted / 'packed'}")
    assert (interrupted / "report.json").exists()
