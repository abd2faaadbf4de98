"""``python -m benchmarks.quality``: run a grid, print its table, draw its pictures."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from benchmarks.quality import files
from benchmarks.quality.bed import EMBEDDED, Bed, Tier
from benchmarks.quality.grid import CONTROL, Grid
from benchmarks.quality.record import read_records
from benchmarks.quality.table import table
from bitconvert.errors import BitconvertError, UsageError

if TYPE_CHECKING:
    from benchmarks.quality.places import Places
    from benchmarks.quality.trial import Trial

_RESULTS = Path("docs/results/quality")
_RUNS = Path("runs/quality")


def main() -> int:
    """Parse and do."""
    arguments = _parser().parse_args()
    try:
        return int(arguments.do(arguments))
    except BitconvertError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="measure what has no result yet")
    run.set_defaults(do=_run)
    run.add_argument("grids", nargs="+", metavar="GRID", help=f"{', '.join(files.names('grids'))}, or a YAML file")
    run.add_argument("--tier", choices=get_args(Tier), default="screening", help="all beds of this tier")
    run.add_argument("--bed", action="append", metavar="BED", help="these beds instead. Repeatable.")
    run.add_argument("--cell", action="append", metavar="CELL", default=[], help="these cells only. Repeatable.")
    run.add_argument("--first-seed", action="store_true", help="only what chooses learning rates; the seeds can follow")
    run.add_argument("--models", type=Path, metavar="DIR", help="models and texts of beds other than `demo`")
    run.add_argument("--results", type=Path, default=_RESULTS, help=f"where results go. Default: {_RESULTS}")
    run.add_argument("--runs", type=Path, default=_RUNS, help=f"where models are trained. Default: {_RUNS}")
    run.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    run.add_argument("--threads", type=int, default=1, help="CPU threads of each")
    run.add_argument("--keep", action="store_true", help="keep the trained models")
    run.add_argument("--dry-run", action="store_true", help="only print the commands that are due")

    for name, do, told in (("table", _table, "print the table, as Markdown"), ("plot", _plot, "draw the pictures")):
        command = commands.add_parser(name, help=told)
        command.set_defaults(do=do)
        command.add_argument("results", type=Path, nargs="?", default=_RESULTS, help=f"Default: {_RESULTS}")
        command.add_argument("--grid", help="the cells of this grid only")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    from benchmarks.quality import machine
    from benchmarks.quality.child import Children, Stopped
    from benchmarks.quality.places import Places
    from benchmarks.quality.runner import Runner

    places = Places(arguments.models and arguments.models.resolve(), arguments.runs.resolve())
    trials = _trials(arguments, places)
    children = Children(arguments.threads)
    runner = Runner(places, arguments.results, children, arguments.jobs, arguments.threads, arguments.keep, _tell)
    _tell(f"{places.exports()}  # commit {machine.commit()}, {machine.hardware()}")
    if arguments.dry_run:
        return _show(runner.missing([*runner.firsts(trials), *runner.others(trials)]), places)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: children.stop())
    try:
        broken = runner.run(trials)
    except Stopped:
        _tell("stopped; the same command goes on")
        return 130
    return 1 if broken else 0


def _trials(arguments: argparse.Namespace, places: Places) -> list[Trial]:
    """Those of all grids on all beds; a cell that is in several grids is there once."""
    from benchmarks.quality.trial import trials_of

    made: dict[str, Trial] = {}
    for bed in _beds(arguments):
        for name in arguments.grids:
            for trial in trials_of(files.load(Grid, "grids", name), bed, places, _tell):
                if made.setdefault(trial.name, trial).warmup != trial.warmup:
                    raise UsageError(
                        f"{name}: its {trial.cell} is another cell in another grid", "give one another name"
                    )
    cells = {trial.cell for trial in made.values()}
    if unknown := sorted(set(arguments.cell) - cells):
        raise UsageError(f"--cell {unknown[0]}: no such cell", f"there are {', '.join(sorted(cells))}")
    wanted = [trial for trial in made.values() if not arguments.cell or trial.cell in arguments.cell]
    return [trial for trial in wanted if not arguments.first_seed or trial.seed == trial.bed.seeds[0]]


def _beds(arguments: argparse.Namespace) -> list[Bed]:
    """Those that were named, or those of the tier; without --models the embedded model alone."""
    if arguments.bed:
        return [files.load(Bed, "beds", name) for name in arguments.bed]
    of_tier = [
        bed for bed in (files.load(Bed, "beds", name) for name in files.names("beds")) if bed.tier == arguments.tier
    ]
    found = [bed for bed in of_tier if bed.model == EMBEDDED or arguments.models]
    if not found:
        raise UsageError(
            "--models is missing", "name the directory of models and texts; see benchmarks/quality/README.md"
        )
    return found


def _show(due: list[Trial], places: Places) -> int:
    for trial in due:
        _tell(f"\n# {trial.name}\n{places.shown(trial.warmup)}\n{places.shown(trial.evaluation)}")
    _tell(f"\n{len(due)} trials are due; seeds after the first wait for the choice of the learning rate")
    return 0


def _table(arguments: argparse.Namespace) -> int:
    print(table(read_records(arguments.results), _cells(arguments.grid)), end="")
    return 0


def _plot(arguments: argparse.Namespace) -> int:
    from benchmarks.quality.plots import plot

    name = Path(arguments.grid).stem if arguments.grid else "all"
    for picture in plot(read_records(arguments.results), arguments.results, name, _cells(arguments.grid)):
        print(picture)
    return 0


def _cells(grid: str | None) -> list[str]:
    return [CONTROL, *files.load(Grid, "grids", grid).cells] if grid else []


def _tell(line: str) -> None:
    sys.stdout.write(f"{line}\n")  # in one piece, as several threads tell something; print() writes the end by itself
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
