"""Run the trials of a grid that have no results yet, several side by side."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.quality import machine
from benchmarks.quality.child import Caller, Finished
from benchmarks.quality.places import Places
from benchmarks.quality.record import (
    Cost,
    Measured,
    Record,
    Watched,
    read_record,
    record_path,
    require_same_method,
    write_record,
)
from benchmarks.quality.summary import best_lr
from benchmarks.quality.trial import Trial
from bitconvert.atomic import atomic_file
from bitconvert.errors import BitconvertError
from bitconvert.training.run_directory import partial_directory
from bitconvert.training.trainer import METRICS, last_checkpoint, uses_bf16

_WARMUP = "warmup.json"
_TRY_AGAIN = "run the same command again: what has a result is not run twice"
_FAILED = 1  # bitconvert's exit code for what is the training's fault, not the command line's or a signal's


class Broken(BitconvertError):
    """A trial that ended without a result."""


@dataclass(frozen=True)
class Runner:
    """How trials are run.

    Attributes:
        places: where models, texts and trainings lie.
        results: where records go.
        call: runs a command.
        jobs: trials at a time.
        threads: of each.
        keep: whether trained models are kept.
        tell: prints a line.
    """

    places: Places
    results: Path
    call: Caller
    jobs: int = 1
    threads: int = 1
    keep: bool = False
    tell: Callable[[str], None] = print

    def run(self, trials: Sequence[Trial]) -> list[Broken]:
        """Measure every cell with every learning rate on the first seed, and with the best of them on the others.

        Returns:
            What went wrong without being a result.

        Raises:
            UsageError: a result that is there already is one of another recipe.
        """
        broken = self._run_missing(self.firsts(trials))
        return broken + self._run_missing(self.others(trials))

    def firsts(self, trials: Sequence[Trial]) -> list[Trial]:
        """What chooses the learning rates."""
        return [trial for trial in trials if trial.seed == trial.bed.seeds[0]]

    def others(self, trials: Sequence[Trial]) -> list[Trial]:
        """What follows once they are chosen; nothing of the cells for which they are not."""
        tries: dict[tuple[str, str], list[Trial]] = defaultdict(list)
        for trial in self.firsts(trials):
            tries[trial.bed.name, trial.cell].append(trial)
        chosen = {cell: self._chosen(of_cell) for cell, of_cell in tries.items()}
        later = [trial for trial in trials if trial.seed != trial.bed.seeds[0]]
        return [trial for trial in later if trial.lr == chosen[trial.bed.name, trial.cell]]

    def missing(self, trials: Iterable[Trial]) -> list[Trial]:
        """Those without a record."""
        return [trial for trial in trials if self._record(trial) is None]

    def _chosen(self, tries: list[Trial]) -> float | None:
        records = [self._record(trial) for trial in tries]
        done = [record for record in records if record is not None]
        return best_lr(done) if len(done) == len(tries) else None

    def _record(self, trial: Trial) -> Record | None:
        path = record_path(self.results, trial)
        if not path.exists():
            return None
        record = read_record(path)
        require_same_method(record, trial, path)
        return record

    def _run_missing(self, trials: Sequence[Trial]) -> list[Broken]:
        missing = self.missing(trials)
        broken = []
        with ThreadPoolExecutor(self.jobs) as pool:
            running = {pool.submit(self._measure_and_keep, trial): trial for trial in missing}
            for done, future in enumerate(as_completed(running), 1):
                try:
                    told = _in_short(future.result())
                except Broken as error:
                    broken.append(error)
                    told = f"NO RESULT: {error.message}"
                self.tell(f"[{done}/{len(missing)}] {running[future].name}: {told}")
        return broken

    def _measure_and_keep(self, trial: Trial) -> Record:
        record = self._measure(trial)
        write_record(record, record_path(self.results, trial))
        self._tidy(trial)
        return record

    def _measure(self, trial: Trial) -> Record:
        began = datetime.now(UTC).isoformat(timespec="seconds")
        commands = tuple(map(self.places.shown, (trial.warmup, trial.evaluation)))
        self.tell("\n".join(commands))
        warmup = self._train(trial)
        watched = measured = None
        if not warmup["error"]:
            watched = _watched(trial, warmup["report"])
            measured = self._judge(trial)
        return Record(
            bed=trial.bed.name,
            cell=trial.cell,
            about=trial.about,
            lr=trial.lr,
            seed=trial.seed,
            tokens=trial.recipe.training.steps * trial.recipe.training.batch_size * trial.recipe.training.context,
            model=trial.bed.model,
            commands=commands,
            order=trial.order,
            method=trial.method(),
            error=warmup["error"],
            measured=measured,
            watched=watched,
            cost=Cost(**warmup["cost"]),
            precision="bf16" if uses_bf16(trial.recipe) else "float32",
            hardware=machine.hardware(),
            versions=machine.versions(),
            commit=machine.commit(),
            began=began,
        )

    def _train(self, trial: Trial) -> dict[str, Any]:
        """Train, go on with a training, or find that it is done: its report, error and cost."""
        kept = trial.output / _WARMUP
        if kept.exists():
            known: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
            if known["method"] == trial.method():
                return known
        shutil.rmtree(trial.output, ignore_errors=True)  # killed before its cost was written down, or of an older cell
        resumed = last_checkpoint(partial_directory(trial.output)) is not None
        finished = self.call([*trial.warmup, *(["--resume"] if resumed else [])])
        cost = Cost(
            seconds=finished.seconds,
            cpu_seconds=finished.cpu_seconds,
            peak_bytes=finished.peak_bytes,
            threads=self.threads,
            interrupted=resumed,
        )
        report = _document(finished, may_fail=True)
        error = "" if report else finished.error
        done = {"method": trial.method(), "report": report, "error": error, "cost": cost.model_dump()}
        if report:
            with atomic_file(kept) as temporary:
                temporary.write_text(json.dumps(done), encoding="utf-8")
        return done

    def _judge(self, trial: Trial) -> Measured:
        report = _document(self.call(trial.evaluation))
        values = {**report["perplexity"], **report["comparison"]}
        return Measured(**{name: values[name] for name in Measured.model_fields})

    def _tidy(self, trial: Trial) -> None:
        shutil.rmtree(partial_directory(trial.output), ignore_errors=True)
        if not self.keep:
            shutil.rmtree(trial.output, ignore_errors=True)


def _document(finished: Finished, *, may_fail: bool = False) -> dict[str, Any]:
    """The report that a command printed; empty where a training failed that was free to.

    Raises:
        Broken: it was stopped, was called wrongly, or crashed.
    """
    if finished.code == 0:
        report: dict[str, Any] = json.loads(finished.stdout)
        return report
    if may_fail and finished.code == _FAILED and finished.error:
        return {}
    raise Broken(f"{finished.error or finished.last_line} (exit code {finished.code})", _TRY_AGAIN)


def _watched(trial: Trial, report: dict[str, Any]) -> Watched:
    lines = (trial.output / METRICS).read_text(encoding="utf-8").splitlines()
    points = [(line["tokens"], line["held_out_ppl"]) for line in map(json.loads, lines) if "held_out_ppl" in line]
    return Watched(
        ppl=report["held_out_ppl"],
        original_ppl=report["original_ppl"],
        rounded_ppl=report["rounded_ppl"],
        curve=tuple(points),
    )


def _in_short(record: Record) -> str:
    if record.measured is None:
        return record.error
    return f"{record.measured.ppl_ratio:.4f} of the original's ppl, {record.cost.seconds:.0f} s"
