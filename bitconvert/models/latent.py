"""Save a trained model so that stock transformers loads it, and so that nobody takes it for what it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from bitconvert.models.lineage import Lineage
from bitconvert.recipe import Scaling

ONLINE_BITNET: dict[str, Any] = {
    "quant_method": "bitnet",
    "linear_class": "autobitlinear",
    "quantization_mode": "online",
    "modules_to_not_convert": ["lm_head"],
}
"""The config under which transformers itself rounds latent weights at each forward: absmean, one scale per tensor; but
for the modules that it lists."""


def claims_bitnet(lineage: Lineage) -> bool:
    """Whether transformers' own BitLinear computes what this model was trained to compute."""
    return lineage.scaling == Scaling(estimator="absmean", granularity="tensor") and lineage.lam == 1.0


def save_latent(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, lineage: Lineage, card: str, directory: Path
) -> None:
    """Write a latent checkpoint: weights, config, tokenizer, lineage and card.

    Args:
        model: trained student; its BitLinears save as plain float32 linears.
        tokenizer: saved unchanged.
        lineage: decides whether the config may claim to be bitnet.
        card: README.md, complete.
        directory: exists and is empty; make it appear by rename.
    """
    if claims_bitnet(lineage):
        unrounded = [*ONLINE_BITNET["modules_to_not_convert"], *lineage.kept]
        model.config.quantization_config = {**ONLINE_BITNET, "modules_to_not_convert": unrounded}
    try:
        model.save_pretrained(directory)
    finally:
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    tokenizer.save_pretrained(directory)
    lineage.save(directory)
    (directory / "README.md").write_text(card, encoding="utf-8")
