"""The quality bench around its trainings, which are made up here: what is run, kept, chosen, and shown."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from benchmarks.quality.bed import Bed
from benchmarks.quality.child import Children, Finished, Stopped
from benchmarks.quality.files import load, names
from benchmarks.quality.grid import CONTROL, Cell, Grid
from benchmarks.quality.places import Places
from benchmarks.quality.plots import plot
from benchmarks.quality.record import Record, read_records
from benchmarks.quality.runner import Runner
from benchmarks.quality.summary import summarize
from benchmarks.quality.table import table
from benchmarks.quality.texts import prepare
from benchmarks.quality.trial import trials_of
from bitconvert.errors import UsageError
from bitconvert.recipe import load_recipe

BED = Bed(
    name="small",
    about="stories",
    tier="screening",
    model="demo",
    watched_bytes=2000,
    judged_tokens=500,
    recipe="demo",
    set={"training.tokens": 8192, "training.context": 64},
    seeds=(0, 1, 2),
    lr=(0.001, 0.002),
    control_lr=(0.0001,),
)
GRID = Grid(
    name="grid",
    about="which is better?",
    cells={
        "default": Cell(about="as it is"),
        "instant": Cell(about="no ramp", set={"lam.curve": "instant"}),
    },
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITCONVERT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places(models=None, runs=tmp_path / "runs")


class FakeBitconvert:
    """Stands for the command line: keeps what it was called with, and trains models whose ppl a function decides."""

    def __init__(self, ppl: Callable[[list[str]], float]) -> None:
        self.calls: list[list[str]] = []
        self._ppl = ppl
        self.failures: dict[str, Finished] = {}

    def __call__(self, argv: Sequence[str]) -> Finished:
        self.calls.append([*argv])
        for word, failure in self.failures.items():
            if any(given.endswith(word) for given in argv):
                return failure
        return self._warmup([*argv]) if argv[0] == "warmup" else self._eval([*argv])

    def trained(self) -> list[str]:
        return [
            Path(value_of(call, "--output")).relative_to(self._runs(call)).as_posix()
            for call in self.calls
            if call[0] == "warmup"
        ]

    @staticmethod
    def _runs(call: list[str]) -> Path:
        return Path(value_of(call, "--output")).parents[2]

    def _warmup(self, argv: list[str]) -> Finished:
        output = Path(value_of(argv, "--output"))
        output.mkdir(parents=True)
        ppl = self._ppl(argv)
        (output / "ppl").write_text(str(ppl))
        lines = [
            {"step": 0, "tokens": 0, "original_ppl": 2.0, "held_out_ppl": 9.0},
            {"step": 1, "tokens": 64, "loss": 1.0},
        ]
        lines.append({"step": 128, "tokens": 8192, "held_out_ppl": ppl})
        (output / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return done({"held_out_ppl": ppl, "original_ppl": 2.0, "rounded_ppl": 9.0})

    def _eval(self, argv: list[str]) -> Finished:
        ppl = float((Path(argv[1]) / "ppl").read_text())
        perplexity = {"ppl": ppl, "bits_per_byte": ppl / 4, "tokens_scored": 500, "text_sha256": "x", "stderr": 0.1}
        distance = {
            "original_ppl": 2.0,
            "ppl_ratio": ppl / 2,
            "ppl_ratio_stderr": 0.1,
            "kl": 0.5,
            "top1_agreement": 0.75,
        }
        return done({"perplexity": perplexity, "comparison": distance})


def value_of(argv: list[str], option: str) -> str:
    return argv[argv.index(option) + 1]


def setting(argv: list[str], key: str) -> str | None:
    return next((word.partition("=")[2] for word in argv if word.startswith(f"{key}=")), None)


def done(document: dict[str, object]) -> Finished:
    return Finished(0, json.dumps(document), "", seconds=3.0, cpu_seconds=2.0, peak_bytes=2**20)


def ended(code: int, stderr: str) -> Finished:
    return Finished(code, "", stderr, seconds=1.0, cpu_seconds=1.0, peak_bytes=2**20)


def by_method(argv: list[str]) -> float:
    """The default is best with 0.002, everything else with 0.001; a control is better, and seeds differ a little."""
    seed = int(setting(argv, "training.seed") or 0)
    if setting(argv, "control"):
        return 2.0 + seed / 100
    instant = setting(argv, "lam.curve") == "instant"
    wrong_rate = (setting(argv, "optimizer.lr") == "0.001") != instant
    return 3.0 + instant + wrong_rate / 2 + seed / 100


def runner(places: Places, call: FakeBitconvert, told: list[str] | None = None) -> Runner:
    return Runner(places, places.runs.parent / "results", call, tell=(told if told is not None else []).append)


def run(places: Places, call: FakeBitconvert, grid: Grid = GRID, bed: Bed = BED) -> list[Record]:
    one = runner(places, call)
    assert one.run(trials_of(grid, bed, places, print)) == []
    return read_records(one.results)


# ---- what is run --------------------------------------------------------------------------------------------------


def test_the_first_seed_chooses_a_learning_rate_for_each_cell_and_the_others_train_with_it(places: Places) -> None:
    call = FakeBitconvert(by_method)
    run(places, call)
    assert call.trained() == [
        "small/control/lr-0.0001-seed-0",
        "small/default/lr-0.001-seed-0",
        "small/default/lr-0.002-seed-0",
        "small/instant/lr-0.001-seed-0",
        "small/instant/lr-0.002-seed-0",
        "small/control/lr-0.0001-seed-1",
        "small/control/lr-0.0001-seed-2",
        "small/default/lr-0.002-seed-1",
        "small/default/lr-0.002-seed-2",
        "small/instant/lr-0.001-seed-1",
        "small/instant/lr-0.001-seed-2",
    ]


def test_what_has_a_result_is_not_run_again(places: Places) -> None:
    run(places, FakeBitconvert(by_method))
    (gone,) = (places.runs.parent / "results").rglob("default/lr-0.002-seed-1.json")
    gone.unlink()
    call = FakeBitconvert(by_method)
    run(places, call)
    assert call.trained() == ["small/default/lr-0.002-seed-1"]


def test_an_interrupted_training_goes_on(places: Places) -> None:
    trial = trials_of(GRID, BED, places, print)[0]
    checkpoint = trial.output.with_name(f"{trial.output.name}.partial") / "checkpoints" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    call = FakeBitconvert(by_method)
    records = run(places, call)
    assert [call[-1] == "--resume" for call in call.calls if call[0] == "warmup"] == [True] + [False] * 10
    assert [record.cost.interrupted for record in records].count(True) == 1
    assert not checkpoint.exists()


def test_a_trained_model_that_was_not_judged_is_judged_and_not_trained_again(places: Places) -> None:
    call = FakeBitconvert(by_method)
    call.failures["judged.txt"] = ended(-9, "")
    one = runner(places, call)
    trials = trials_of(GRID, BED, places, print)
    assert len(one.run(trials)) == 5
    call.failures.clear()
    call.calls.clear()
    assert one.run(trials) == []
    assert len(call.trained()) == 6  # those of the other seeds alone
    assert not trials[0].output.exists()


def test_a_trained_model_of_another_recipe_is_not_judged_as_the_cells(places: Places) -> None:
    call = FakeBitconvert(by_method)
    call.failures["judged.txt"] = ended(-9, "")
    runner(places, call).run(trials_of(GRID, BED, places, print))
    call.failures.clear()
    call.calls.clear()
    changed = GRID.cells["default"].model_copy(update={"set": {"distill.kl": 1}})
    grid = GRID.model_copy(update={"cells": {"default": changed}})
    assert runner(places, call).run(trials_of(grid, BED, places, print)) == []
    assert [setting(argv, "distill.kl") for argv in call.calls if argv[0] == "warmup"].count("1") == len(BED.lr) + 2


def test_commands_are_the_public_ones_and_can_be_copied(places: Places) -> None:
    record = run(places, FakeBitconvert(by_method))[-1]
    warmup, evaluation = record.commands
    assert warmup == (
        "bitconvert warmup --model bitconvert/demo/model --recipe demo --data $RUNS/texts/small/stories.jsonl "
        "--held-out $RUNS/texts/small/watched.txt --output $RUNS/small/instant/lr-0.002-seed-0 "
        "--set training.tokens=8192 --set training.context=64 --set lam.curve=instant --set optimizer.lr=0.002 "
        "--set training.seed=0 --json"
    )
    assert evaluation == (
        "bitconvert eval $RUNS/small/instant/lr-0.002-seed-0 --ppl --data $RUNS/texts/small/judged.txt --context 64 "
        "--max-tokens 500 --against bitconvert/demo/model --json"
    )


def test_equal_seeds_mean_equal_data_in_every_cell(places: Places) -> None:
    trials = trials_of(GRID, BED, places, print)
    assert len({(trial.seed, trial.order) for trial in trials}) == len(BED.seeds)
    assert len({trial.order for trial in trials}) == len(BED.seeds)


@pytest.mark.parametrize("key", ["training.tokens", "training.context"])
def test_a_cell_with_other_data_is_refused(places: Places, key: str) -> None:
    other = Grid(name="g", about="", cells={"other": Cell(about="", set={key: 128})})
    with pytest.raises(UsageError, match="small/other/.*other tokens than small/control"):
        trials_of(other, BED, places, print)


def test_a_cell_whose_method_was_removed_is_left_out_by_name(places: Places) -> None:
    told: list[str] = []
    cells = {"gone": Cell(about="", set={"lam.no_such_key": 1}, gone="1498702"), **GRID.cells}
    trials = trials_of(Grid(name="g", about="", cells=cells), BED, places, told.append)
    assert {trial.cell for trial in trials} == {"control", "default", "instant"}
    assert len(told) == 1
    assert "small/gone" in told[0]
    assert "1498702" in told[0]


def test_a_result_of_another_recipe_is_not_taken_for_the_cells(places: Places) -> None:
    run(places, FakeBitconvert(by_method))
    changed = GRID.cells["default"].model_copy(update={"set": {"distill.kl": 1}})
    with pytest.raises(UsageError, match=r"default/.*distill\.kl=0\.9, and the grid now says 1"):
        run(places, FakeBitconvert(by_method), GRID.model_copy(update={"cells": {"default": changed}}))


# ---- what fails ---------------------------------------------------------------------------------------------------


def test_a_training_that_diverges_is_a_result(places: Places) -> None:
    call = FakeBitconvert(by_method)
    call.failures["optimizer.lr=0.002"] = ended(1, "step 3\nerror: the loss is not finite at step 4\nhint: lower it\n")
    records = run(places, call)
    failed = [record for record in records if record.error]
    assert {(record.cell, record.lr, record.error) for record in failed} == {
        ("default", 0.002, "the loss is not finite at step 4"),
        ("instant", 0.002, "the loss is not finite at step 4"),
    }
    rows = {row.cell: row for row in summarize(records)}
    assert rows["default"].lr == 0.001
    assert rows["default"].tries == {0.001: 3.5, 0.002: None}
    again = FakeBitconvert(by_method)
    run(places, again)
    assert again.calls == []


def test_a_cell_that_diverges_with_every_learning_rate_is_shown_as_that(places: Places) -> None:
    call = FakeBitconvert(by_method)
    call.failures["lam.curve=instant"] = ended(1, "error: the loss is not finite at step 4\n")
    text = table(run(places, call))
    assert line_of(text, "instant").startswith("|  | instant | diverged |")
    assert "- instant, lr 0.001, seed 0: the loss is not finite at step 4" in text


@pytest.mark.parametrize(
    "failure",
    [
        ended(2, "error: unknown key\n"),
        ended(143, "error: interrupted\n"),
        ended(-9, ""),
        ended(1, "Traceback\nKeyError: 3\n"),
    ],
)
def test_what_is_not_the_trainings_fault_is_no_result(places: Places, failure: Finished) -> None:
    call = FakeBitconvert(by_method)
    call.failures["lam.curve=instant"] = failure
    one = runner(places, call)
    broken = one.run(trials_of(GRID, BED, places, print))
    assert len(broken) == 2
    assert {record.cell for record in read_records(one.results)} == {"control", "default"}


# ---- what is made of it -------------------------------------------------------------------------------------------


def test_a_recipe_that_prepares_ternary_weights_has_a_control_too(places: Places) -> None:
    bed = BED.model_copy(update={"set": {**BED.set, "init.method": "blockwise"}})
    trials = trials_of(GRID, bed, places, pytest.fail)
    assert {trial.cell: trial.recipe.initialises for trial in trials} == {
        "control": False,
        "default": True,
        "instant": True,
    }


def test_means_spreads_and_ratios_to_the_control_of_the_same_seed(places: Places) -> None:
    rows = summarize(run(places, FakeBitconvert(by_method)))
    assert [row.cell for row in rows] == ["control", "default", "instant"]
    default = rows[1]
    assert default.lr == 0.002
    assert default.numbers["ppl"].values == (3.0, 3.01, 3.02)
    assert default.numbers["ppl"].mean == pytest.approx(3.01)
    assert default.numbers["ppl"].deviation == pytest.approx(0.01)
    assert default.numbers["ppl_ratio"].mean == pytest.approx(1.505)
    assert default.numbers["control_ratio"].values == pytest.approx((3.0 / 2.0, 3.01 / 2.01, 3.02 / 2.02))
    assert "control_ratio" not in rows[0].numbers


def line_of(text: str, cell: str) -> str:
    """Of the table's first part."""
    return next(line for line in text.splitlines() if line.startswith("|") and f"| {cell} |" in line)


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def marks_at(places: Places, ppl: dict[str, tuple[float, float, float]]) -> dict[str, str]:
    """Marks of cells with these ppl on three seeds, at a single learning rate."""
    bed = BED.model_copy(update={"lr": (0.001,)})
    cells = {name: Cell(about="", set={"distill.kl": 1 + place}) for place, name in enumerate(ppl)}

    def of_seed(argv: list[str]) -> float:
        name = Path(value_of(argv, "--output")).parent.name
        return ppl.get(name, (2.0, 2.0, 2.0))[int(setting(argv, "training.seed") or 0)]

    return {
        row.cell: row.mark
        for row in summarize(run(places, FakeBitconvert(of_seed), Grid(name="g", about="", cells=cells), bed))
    }


def test_rows_no_further_from_the_best_than_the_larger_spread_are_tied_with_it(places: Places) -> None:
    marks = marks_at(
        places,
        {"steady": (3.0, 3.01, 3.02), "near": (3.01, 3.018, 3.02), "wild": (3.0, 3.2, 3.4), "far": (3.1, 3.11, 3.12)},
    )
    assert marks == {"control": "", "steady": "best", "near": "tied", "wild": "tied", "far": ""}


def test_a_rate_at_the_end_of_those_tried_is_pointed_at(places: Places) -> None:
    bed = BED.model_copy(update={"lr": (0.001, 0.002, 0.004)})
    text = table(run(places, FakeBitconvert(by_method), bed=bed))
    assert cells_of(line_of(text, "instant"))[7] == "<0.001"


def test_the_table_shows_everything(places: Places) -> None:
    text = table(run(places, FakeBitconvert(by_method)))
    assert text.startswith("## small\n\n8,192 tokens of training; judged on 500 tokens (ppl of the original: 2.0000); ")
    assert cells_of(line_of(text, "default")) == [
        "**best**", "default", "1.5050 ± 0.0050", "1.4975 ± 0.0025", "0.5000 ± 0.0000", "0.7500 ± 0.0000",
        "0.7525 ± 0.0025", ">0.002", "3", "2", "1",
    ]  # fmt: skip
    assert "| default |  | 3.5000 | **3.0000** |" in text
    assert "- instant: no ramp" in text
    assert "    bitconvert warmup --model" in text


def test_the_table_can_be_of_some_cells(places: Places) -> None:
    text = table(run(places, FakeBitconvert(by_method)), ["control", "instant"])
    assert "default" not in text
    assert "## small" in text


def test_a_bed_where_nothing_is_compared_is_left_out(places: Places) -> None:
    assert "## small" not in table(run(places, FakeBitconvert(by_method)), ["control", "default"])


def test_records_of_other_data_are_not_compared(places: Places) -> None:
    records = run(places, FakeBitconvert(by_method))
    other = records[-1].model_copy(update={"order": "else"})
    with pytest.raises(UsageError, match="trained on other tokens"):
        summarize([*records[:-1], other])


def test_pictures_are_drawn_from_the_results_alone(places: Places, tmp_path: Path) -> None:
    call = FakeBitconvert(by_method)
    call.failures["lam.curve=instant"] = ended(1, "error: the loss is not finite at step 4\n")
    records = run(places, call)
    shutil.rmtree(places.runs)
    pictures = plot(records, tmp_path, "grid")
    assert [picture.name for picture in pictures] == ["grid-ratios.png", "grid-curves.png"]
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)


# ---- texts, files, children ---------------------------------------------------------------------------------------


def test_no_line_that_is_held_out_is_trained_on(tmp_path: Path) -> None:
    lines = [f"line {number}\n" for number in range(100)]
    models = tmp_path / "models"
    models.mkdir()
    (models / "all.txt").write_text("".join(lines))
    (models / "held.txt").write_text("".join(lines[::5]))
    bed = BED.model_copy(update={"model": "x", "training": ("all.txt",), "held_out": "held.txt", "watched_bytes": 30})
    texts = prepare(bed, 100, Places(models, tmp_path / "runs"))
    training, watched, judged = (
        path.read_text().splitlines(keepends=True) for path in (texts.training[0], texts.watched, texts.judged)
    )
    assert [*watched, *judged] == lines[::5]
    assert len("".join(watched)) in range(30, 40)
    assert set(training) == set(lines) - set(lines[::5])


@pytest.mark.parametrize(("directory", "kind"), [("beds", Bed), ("grids", Grid)])
def test_all_files_are_read(directory: str, kind: type[Bed] | type[Grid]) -> None:
    assert all(load(kind, directory, name).name == name for name in names(directory))


def test_a_name_means_the_same_cell_in_all_grids() -> None:
    known: dict[str, dict[str, object]] = {}
    for grid in (load(Grid, "grids", name) for name in names("grids")):
        for name, cell in grid.cells.items():
            meant = cell.model_dump(exclude={"about"})
            assert known.setdefault(name, meant) == meant, f"{grid.name}: {name}"


@pytest.mark.parametrize("bed", names("beds"))
def test_recipes_of_all_cells_resolve(bed: str) -> None:
    on = load(Bed, "beds", bed)
    for grid in (load(Grid, "grids", name) for name in names("grids")):
        for cell in (cell for cell in grid.cells_on(on).values() if not cell.gone):
            changes = {**on.set, **cell.set}
            load_recipe(cell.recipe or on.recipe, [f"{key}={json.dumps(value)}" for key, value in changes.items()])


PAGES = Path("docs/results/quality")


@pytest.mark.parametrize("page", [page for page in PAGES.glob("*.md") if page.stem != "README"], ids=str)
def test_pages_are_drawn_from_the_results_beside_them(page: Path) -> None:
    cells = [CONTROL, *load(Grid, "grids", page.stem).cells]
    assert page.read_text(encoding="utf-8") == table(read_records(PAGES), cells), "make quality-pages"


def test_a_child_is_the_command_line(tmp_path: Path) -> None:
    children = Children(threads=1, imported=())
    listed = children(["recipes", "--json"])
    assert listed.code == 0
    assert "demo" in json.loads(listed.stdout)
    assert listed.cpu_seconds > 0
    assert listed.peak_bytes > 10 * 2**20
    refused = children(["warmup", "--model", str(tmp_path / "no-such-model")])
    assert refused.code == 1
    assert refused.error.startswith(f"{tmp_path / 'no-such-model'}")
    children.stop()
    with pytest.raises(Stopped):
        children(["recipes"])
