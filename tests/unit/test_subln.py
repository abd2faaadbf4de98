"""SubLN: where the norms are, how they begin, how λ brings them in, and that nothing reads what comes out."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bitconvert.errors import BitconvertError, UsageError
from bitconvert.models.checkpoint import open_checkpoint
from bitconvert.packing.pack import pack
from bitconvert.recipe import Packing, Scaling, load_recipe
from bitconvert.report import Silent
from bitconvert.ternary.bitlinear import insert_bitlinear
from bitconvert.training.subln import SubLN, insert_subln
from bitconvert.training.warmup import Interrupted, warmup
from tests.models import random_model

SMALL = ("tokens=384", "context=32", "batch_size=4", "micro_batch_size=2", "precision=float32", "save_every=1")


def test_a_norm_before_each_end_comes_with_lambda() -> None:
    model = random_model("smollm2", hidden_size=64, intermediate_size=64)
    names = [name for name, _ in model.named_modules() if name.endswith("_proj")]
    sample, entering = torch.randint(60, (2, 9)), {}
    for name in names:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda module, inputs, name=name: entering.__setitem__(name, inputs[0]))
    original = model(sample).logits
    lam = insert_bitlinear(model, names, Scaling())
    insert_subln(model, names, lam, sample)

    normed = {name.removesuffix(".subln") for name, module in model.named_modules() if isinstance(module, SubLN)}
    assert normed == {name for name in names if name.endswith(("self_attn.o_proj", "mlp.down_proj"))}
    assert torch.equal(model(sample).logits, original)
    for name in normed:
        norm, x = model.get_submodule(name).subln, entering[name]
        rms = x.pow(2).mean(-1, keepdim=True).sqrt()
        torch.testing.assert_close(norm.weight, rms.mean().expand(64))
        error = ((rms.mean() * x / rms - x) ** 2).sum()
        assert all(((gain * rms.mean() * x / rms - x) ** 2).sum() > error for gain in (0.9, 1.1))
        with lam.at(1.0):
            torch.testing.assert_close(norm(x), rms.mean() * x / rms)
        with lam.at(0.25):
            torch.testing.assert_close(norm(x), 0.75 * x + 0.25 * rms.mean() * x / rms)


def test_it_trains_and_resumes_and_nothing_reads_it(smollm: Path, story: Path, tmp_path: Path) -> None:
    class Stopping(Silent):
        def metrics(self, values) -> None:
            if values["step"] == 1 and "loss" in values:
                signal.raise_signal(signal.SIGTERM)

    keys = [*(f"training.{key}" for key in SMALL), "data.held_out_tokens=64", f"data.sources=[{story}]"]
    recipe = load_recipe(None, [*keys, "student.subln=true"])
    with pytest.raises(Interrupted):
        warmup(str(smollm), tmp_path / "whole", recipe, reporter=Stopping())
    report = warmup(str(smollm), tmp_path / "whole", recipe, resume=True, reporter=Silent())
    at_once = warmup(str(smollm), tmp_path / "at once", recipe, reporter=Silent())
    assert report.held_out_ppl == at_once.held_out_ppl
    weights = load_file(tmp_path / "whole/model.safetensors")
    gains = {name: weight for name, weight in weights.items() if name.endswith("subln.weight")}
    assert len(gains) == 4
    assert all(weight.std() > 0 for weight in gains.values())  # each channel has learned its own
    assert "quantization_config" not in json.loads((tmp_path / "whole/config.json").read_text())
    for use in (
        lambda: open_checkpoint(str(tmp_path / "whole")).load(),
        lambda: pack(open_checkpoint(str(tmp_path / "whole")), Packing(), tmp_path / "packed", reporter=Silent()),
    ):
        with pytest.raises(BitconvertError, match=r"subln\.weight has no place in the model"):
            use()


def test_a_control_run_has_none() -> None:
    with pytest.raises(UsageError, match=r"student\.subln: a control run has no λ"):
        load_recipe(None, ["student.subln=true", "control=true"])
