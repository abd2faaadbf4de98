"""The README.md beside a latent checkpoint: what it is, where it comes from, how it may be used."""

from __future__ import annotations

from bitconvert.models.latent import claims_bitnet
from bitconvert.models.lineage import Lineage
from bitconvert.report.training import WarmupReport


def training_card(lineage: Lineage, report: WarmupReport) -> str:
    """Markdown with the facts of a warmup run."""
    initialised = f"; {lineage.init_tokens:,} before the first step" if lineage.init_tokens else ""
    ratio = report.held_out_ppl / report.original_ppl
    stored = "rounded, by learned scales" if lineage.scaling.estimator == "learned" else "the latent ones"
    return f"""# Latent ternary checkpoint of {lineage.source}

Made by [bitconvert](https://pypi.org/project/bitconvert/) {lineage.versions["bitconvert"]}: the linear layers of every
block were trained to be ternary ({{-1, 0, +1}} times a scale, int8 activations). The weights stored here are {stored},
in float32; `bitconvert pack` turns them into 1.58-bit files.

| | |
|---|---|
| source | {lineage.source} |
| scaling | {lineage.scaling} |
| kept from being ternary | {", ".join(lineage.kept) or "nothing"} |
| final λ | {lineage.lam:g} |
| tokens seen | {lineage.tokens_seen:,} in {lineage.steps:,} steps, seed {lineage.seed}{initialised} |
| trained on | {lineage.data} |
| held-out ppl, original | {report.original_ppl:.2f} |
| held-out ppl, rounded without training | {report.rounded_ppl:.4g} |
| held-out ppl, this model at λ = 1 | {report.held_out_ppl:.2f} (ratio {ratio:.2f}) |

{_how_to_load(lineage)}

`report.html` shows the run: curves, texts of the original and of this model, what became of each matrix. `recipe.yaml`
holds every option, `metrics.jsonl` and `training.png` the numbers, `bitconvert.json` the lineage.
"""


def _how_to_load(lineage: Lineage) -> str:
    if claims_bitnet(lineage):
        return (
            "transformers loads this directory as it is (`AutoModelForCausalLM.from_pretrained`): its config says "
            "bitnet, autobitlinear, online, so the weights are rounded at each forward."
        )
    return (
        f"Its scaling is {lineage.scaling} at λ = {lineage.lam:g}, which transformers' bitnet integration (absmean per "
        "tensor, λ = 1) does not compute. The config therefore does not say bitnet: transformers alone would load the "
        "latent weights as a full-precision model. Use `bitconvert eval`, `bitconvert generate` or `bitconvert pack`."
    )
