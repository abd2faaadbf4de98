"""What is large is never there twice: peaks of resident memory, as Linux counts them, while it is saved or packed."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bitconvert.models.checkpoint import open_checkpoint
from bitconvert.models.latent import save_latent
from bitconvert.models.lineage import Lineage
from bitconvert.packing import fill
from bitconvert.packing.pack import pack
from bitconvert.recipe import Packing, Scaling, load_recipe
from bitconvert.report.reporter import Silent
from bitconvert.training.rehearsal import Rehearsal
from bitconvert.training.teacher import frozen_copy
from tests.models import write_model

_RESET_PEAK = Path("/proc/self/clear_refs")

pytestmark = pytest.mark.skipif(not _RESET_PEAK.exists(), reason="only Linux resets the peak of a process's memory")

SCALING = Scaling(estimator="absmean")
LINEAGE = Lineage(source="test", lam=1.0, scaling=SCALING, tokens_seen=1)


def peak_rise(work: Callable[[], object]) -> int:
    """Bytes by which the process's resident memory rose at the most during the work."""

    def status(key: str) -> int:
        found = re.search(rf"{key}:\s*(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None
        return 1024 * int(found[1])

    gc.collect()
    _RESET_PEAK.write_text("5")
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Rehearsal:
    """A training of 16 million weights, 64 MB, after its first step."""
    directory = tmp_path_factory.mktemp("training")
    write_model(directory / "model", "smollm2", hidden_size=512, intermediate_size=2048, vocab_size=18_000)
    options = ("init.method=none", "lam.curve=linear", "distill.kl=0", "distill.ce=1", "training.context=16")
    recipe = load_recipe(None, [*options, "training.batch_size=2", "training.precision=float32"])
    rehearsal = Rehearsal(open_checkpoint(str(directory / "model")), recipe, directory / "run")
    rehearsal.micro_step(0)
    rehearsal.update()
    return rehearsal


def weight_bytes(rehearsal: Rehearsal) -> int:
    return sum(parameter.nbytes for parameter in rehearsal.student.parameters())


def test_a_checkpoint_is_written_from_where_its_tensors_are(rehearsal: Rehearsal) -> None:
    assert weight_bytes(rehearsal) > 50e6
    assert sum(state.nbytes for state in rehearsal.states()) > 50e6
    assert peak_rise(rehearsal.save) < weight_bytes(rehearsal) / 4


def test_so_is_the_result(rehearsal: Rehearsal, smollm: Path, tmp_path: Path) -> None:
    tokenizer = open_checkpoint(str(smollm)).tokenizer()
    rise = peak_rise(lambda: save_latent(rehearsal.student, tokenizer, LINEAGE, "", tmp_path))
    assert (tmp_path / "model.safetensors").stat().st_size >= weight_bytes(rehearsal)
    assert rise < weight_bytes(rehearsal) / 4


def test_a_teacher_in_bf16_takes_two_bytes_a_weight_from_the_start(rehearsal: Rehearsal) -> None:
    model = rehearsal.student
    copies = []
    rise = peak_rise(lambda: copies.append(frozen_copy(model, torch.bfloat16)))
    assert rise < 0.7 * weight_bytes(rehearsal)
    for (name, ours), theirs in zip(copies[0].named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs.bfloat16()), name
        assert not ours.requires_grad
    assert copies[0].lm_head.weight is copies[0].model.embed_tokens.weight


@pytest.mark.parametrize("form", ["tq2_0", "tq1_0", "safetensors"])
def test_packing_takes_no_more_memory_for_more_layers(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fill, "_WEIGHTS_AT_ONCE", 2**20)  # of models this small: a matrix at a time
    rises = []
    for layers in (2, 2, 10):  # what the first run loads and touches is not counted
        model = tmp_path / f"{len(rises)}-{layers}"
        write_model(model, "llama3", layers=layers, hidden_size=512, intermediate_size=2048)
        LINEAGE.save(model)
        rises.append(packing_rise(model, form, tmp_path / "packed"))
    of_more_layers = (10 - 2) * 4 * 4_000_000  # float32
    assert rises[2] < rises[1] + of_more_layers / 8


def packing_rise(model: Path, form: str, output: Path) -> int:
    checkpoint = open_checkpoint(str(model))
    return peak_rise(lambda: pack(checkpoint, Packing(formats=(form,)), output / model.name, reporter=Silent()))
