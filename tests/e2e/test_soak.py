"""A long training with many checkpoints takes no more memory, files and disk at its end than near its beginning."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest

from bitconvert.recipe import load_recipe
from bitconvert.report.reporter import Silent
from bitconvert.training.run_directory import partial_directory
from bitconvert.training.warmup import warmup
from tests.models import write_model
from tests.recipes import FROM_THE_ORIGINAL

STEPS, EARLY = 1000, 100
A_CHECKPOINT_LATER = 5  # steps: what is compared is measured as far behind a checkpoint


class Measuring(Silent):
    """Looks at its own process, and at the run's directory, at each step."""

    def __init__(self, run_directory: Path) -> None:
        self._run_directory = run_directory
        self.at: dict[int, dict[str, int]] = {}

    def metrics(self, values: Mapping[str, float]) -> None:
        if values["step"] not in (EARLY + A_CHECKPOINT_LATER, STEPS - 10 + A_CHECKPOINT_LATER):
            return
        process = psutil.Process()
        files = [path for path in self._run_directory.rglob("*") if path.is_file()]
        self.at[int(values["step"])] = {
            "memory": process.memory_info().rss,
            "descriptors": process.num_fds(),
            "threads": process.num_threads(),
            "files": len(files),
            "disk": sum(path.stat().st_size for path in files if path.name != "metrics.jsonl"),
        }


@pytest.mark.slow
def test_a_thousand_steps_with_a_hundred_checkpoints(story: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "smollm2", layers=1, hidden_size=64, intermediate_size=64)
    recipe = load_recipe(
        None,
        [
            *FROM_THE_ORIGINAL,
            f"training.tokens={STEPS * 2 * 16}",
            "training.context=16",
            "training.batch_size=2",
            "training.precision=float32",
            "training.save_every=10",
            "training.eval_every=250",
            "data.held_out_tokens=64",
            f"data.sources=[{story}]",
        ],
    )
    measuring = Measuring(partial_directory(tmp_path / "out"))
    warmup(str(model), tmp_path / "out", recipe, reporter=measuring)
    early, late = measuring.at.values()
    print(early, late)
    assert late["memory"] - early["memory"] < 2e6
    assert {key: late[key] for key in ("descriptors", "threads", "files")} == {
        key: early[key] for key in ("descriptors", "threads", "files")
    }
    assert late["disk"] - early["disk"] < 1000  # numbers of more digits
