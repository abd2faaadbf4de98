"""Memory that saving and loading a checkpoint takes: ``python -m benchmarks.save_memory [OPTIMIZER]``. Linux only.

For each, the rise of the process's peak of resident memory, in which mapped files count, above what it had before: a
random model of the shape of SmolLM2-135M, after its first step.
"""

from __future__ import annotations

import gc
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from bitconvert.models.checkpoint import open_checkpoint
from bitconvert.recipe import load_recipe
from bitconvert.training.rehearsal import Rehearsal
from bitconvert.training.trainer import last_checkpoint
from tests.models import write_model

SHAPE = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}


def main() -> None:
    """Print one line per piece of work."""
    name = (*sys.argv, "muon")[1]
    options = (
        "training.context=32",
        "training.batch_size=2",
        "training.precision=float32",
        "distill.kl=0",
        "distill.ce=1",
    )
    recipe = load_recipe(None, [*options, f"optimizer.name={name}", "init.method=none", "lam.curve=linear"])
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder) / "model", "smollm2", layers=30, vocab_size=49152, **SHAPE)
        rehearsal = Rehearsal(open_checkpoint(str(model)), recipe, Path(folder) / "run")
        rehearsal.micro_step(0)
        rehearsal.update()
        weights, states = (
            sum(tensor.nbytes for tensor in tensors) for tensors in (rehearsal.student.parameters(), rehearsal.states())
        )
        print(f"weights {weights / 1e6:.0f} MB, {name} {states / 1e6:.0f} MB; above them:")
        _show("checkpoint saved", rehearsal.save)
        _show("model saved", lambda: rehearsal.student.save_pretrained(Path(folder) / "result"))
        saved = str(last_checkpoint(Path(folder) / "run"))
        _show("weights loaded again", lambda: rehearsal.trainer._load_from_checkpoint(saved))
        _show("optimizer loaded again", lambda: rehearsal.trainer._load_optimizer_and_scheduler(saved))


def _show(what: str, work: Callable[[], object]) -> None:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    before = _resident("VmRSS")
    work()
    print(f"{what}: {(_resident('VmHWM') - before) / 1e6:.1f} MB", flush=True)


def _resident(key: str) -> int:
    found = re.search(rf"{key}:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return 1024 * int(found[1])


if __name__ == "__main__":
    main()
