"""One reading of the weights for all formats: the same files, each tensor read once, memory that does not grow."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from bitconvert.errors import BitconvertError
from bitconvert.models import checkpoint as checkpoint_module
from bitconvert.models.checkpoint import Checkpoint, open_checkpoint
from bitconvert.packing import fill
from bitconvert.packing.fill import in_order
from bitconvert.packing.pack import pack
from bitconvert.recipe import Packing
from bitconvert.report.reporter import Silent
from bitconvert.ternary import quantize
from tests.packed import make_checkpoint

FORMATS = ("tq1_0", "tq2_0", "i2_s", "safetensors", "compressed-tensors", "onnx")


def pack_all(model: Path, output: Path, formats: tuple[str, ...] = FORMATS) -> dict[str, bytes]:
    pack(open_checkpoint(str(model)), Packing(formats=formats), output, reporter=Silent())
    beside = [output / name for name in ("README.md", "Modelfile", "SHA256SUMS")]
    kept = (file for file in output.rglob("*") if file.is_file() and file not in beside)
    return {str(file.relative_to(output)): file.read_bytes() for file in kept}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "tiny", "smollm2")


def test_formats_together_are_the_formats_alone(tmp_path: Path, model: Path) -> None:
    together = pack_all(model, tmp_path / "together")
    alone: dict[str, bytes] = {}
    for name in FORMATS:
        alone |= pack_all(model, tmp_path / name, (name,))
    assert together == alone


def test_the_size_of_the_parts_changes_nothing(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pack_all(model, tmp_path / "whole")
    monkeypatch.setattr(checkpoint_module, "_WEIGHTS_AT_ONCE", 1000)
    monkeypatch.setattr(quantize, "_WEIGHTS_AT_ONCE", 3 * 256)
    monkeypatch.setattr(fill, "_WEIGHTS_AT_ONCE", 70_000)
    assert pack_all(model, tmp_path / "parts") == whole


def test_each_tensor_is_read_once(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: Counter[str] = Counter()
    whole, rows = Checkpoint.read, Checkpoint.read_rows
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: read.update([name]) or whole(self, name))
    monkeypatch.setattr(Checkpoint, "read_rows", lambda self, name: read.update([name]) or rows(self, name))
    pack_all(model, tmp_path)
    assert set(read.values()) == {1}
    assert read.keys() == load_file(model / "model.safetensors").keys()


def test_an_error_in_one_output_leaves_nothing_of_the_others(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "tiny", "smollm2")
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"].fill_(1e5)  # float32 holds it, float16 does not
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BitconvertError, match="float16"):
        pack_all(model, tmp_path / "out", ("safetensors", "tq2_0"))
    assert list(tmp_path.iterdir()) == [model]


# ---- threads ---------------------------------------------------------------------------------------------------------


def test_results_come_in_order_and_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fill, "_WEIGHTS_AT_ONCE", 10)
    monkeypatch.setattr(fill, "_WORKERS", 3)  # as many on any machine
    lock, at_work, most = threading.Lock(), [0, 0], [0, 0]

    def work(item: int) -> int:
        with lock:
            at_work[:] = at_work[0] + item, at_work[1] + 1
            most[:] = max(most[0], at_work[0] if at_work[1] > 1 else 0), max(most[1], at_work[1])
        time.sleep(0.02)
        with lock:
            at_work[:] = at_work[0] - item, at_work[1] - 1
        return -item

    items = [3, 1, 4, 1, 5, 9, 2, 6, 50, 3, 5]  # one is larger than the limit, and alone
    assert list(in_order(work, items, lambda item: item)) == [-item for item in items]
    assert most[0] <= 10
    assert 1 < most[1] <= fill._WORKERS


def test_an_error_comes_in_its_place() -> None:
    results = in_order(lambda item: 6 // item, [1, 2, 0, 3], lambda _: 1)
    assert [next(results), next(results)] == [6, 3]
    with pytest.raises(ZeroDivisionError):
        next(results)


# ---- memory ----------------------------------------------------------------------------------------------------------

_PEAK = """
import re, sys
import torch
from pathlib import Path
from bitconvert.models.checkpoint import open_checkpoint
from bitconvert.packing.pack import pack
from bitconvert.recipe import Packing
from bitconvert.report.reporter import Silent
torch.set_num_threads(1)
pack(open_checkpoint(sys.argv[1]), Packing(formats=("tq2_0", "safetensors")), Path(sys.argv[2]), reporter=Silent())
print(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak where Linux tells it")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """What is read grows by 100 MB, what is written by 25 MB, what is held by neither."""
    peaks = []
    for layers in (2, 26):
        model = make_checkpoint(tmp_path / f"of-{layers}", layers=layers, hidden_size=512, intermediate_size=1024)
        weights = load_file(model / "model.safetensors")
        save_file({name: value.bfloat16() for name, value in weights.items()}, model / "model.safetensors")
        arguments = [sys.executable, "-c", _PEAK, str(model), str(tmp_path / f"out-{layers}")]
        peaks.append(int(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout))
    assert peaks[1] - peaks[0] < 20_000
