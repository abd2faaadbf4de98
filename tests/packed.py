"""Tiny models on their way into packed files, and the model that all those files mean."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from bitconvert.models.checkpoint import Checkpoint, open_checkpoint
from bitconvert.models.lineage import Lineage
from bitconvert.packing.pack import pack
from bitconvert.packing.source import read_ternary
from bitconvert.recipe import Packing, Scaling
from bitconvert.report.reporter import Silent
from tests.models import write_model


def make_checkpoint(
    directory: Path, variant: str = "smollm2", granularity: str = "tensor", kept: Sequence[str] = (), **options: Any
) -> Path:
    """A tiny random model as warmup leaves it behind."""
    write_model(directory, variant, **options)
    scaling = Scaling(granularity=granularity)
    Lineage(source="test", lam=1.0, scaling=scaling, kept=tuple(kept), tokens_seen=1000).save(directory)
    return directory


def pack_directory(model: Path, name: str, output: Path, **options: Any) -> Path:
    """Pack one format, and give the directory that comes of it."""
    packing = Packing(formats=(name,), **options)
    return Path(pack(open_checkpoint(str(model)), packing, output, reporter=Silent()).files[0].path)


def free(output: Path) -> Path:
    """A directory to pack into: this one, or a new one in it where something lies there already."""
    taken = len(list(output.iterdir())) if output.is_dir() else 0
    return output / f"packed-{taken}" if taken else output


def ternary_weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """codes * scale of every ternary matrix, with the scale that files store."""
    modules = checkpoint.ternary_modules(name.removesuffix(".weight") for name in checkpoint.tensor_names())
    return {f"{module}.weight": read_ternary(checkpoint, f"{module}.weight").dequantize() for module in modules}


def baked(model: Path) -> PreTrainedModel:
    """The model of float activations and ternary weights, in stock transformers."""
    from transformers import AutoModelForCausalLM

    checkpoint = open_checkpoint(str(model))
    config = checkpoint.complete  # without quantization_config: what is loaded are the latents
    reference: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model, config=config, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in ternary_weights(checkpoint).items():
            reference.get_parameter(name).copy_(weight)
    return reference.eval()
