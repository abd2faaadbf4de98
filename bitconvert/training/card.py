"""The README.md beside a latent checkpoint or an adapter: what it is, where it comes from, how it may be used."""

from __future__ import annotations

import json
from pathlib import Path

from bitconvert.models.checkpoint import Checkpoint
from bitconvert.models.latent import claims_bitnet
from bitconvert.models.lineage import Lineage
from bitconvert.recipe import Adaptation
from bitconvert.report.training import AdaptReport, WarmupReport


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


def adapter_card(checkpoint: Checkpoint, options: Adaptation, trained_on: str, report: AdaptReport) -> str:
    """Markdown with the facts of an adapter, under a header that the Hugging Face hub understands."""
    license_line = f"license: {json.dumps(checkpoint.license)}\n" if checkpoint.license else ""
    file = Path(report.gguf).name
    return f"""---
base_model: {json.dumps(checkpoint.name)}
library_name: peft
{license_line}tags: [lora, bitconvert]
---
# LoRA adapter of {checkpoint.name}

Made by [bitconvert](https://pypi.org/project/bitconvert/): a low-rank change beside the model's
frozen ternary weights.

| | |
|---|---|
| model | {checkpoint.name} |
| rank, alpha | {options.lora.rank}, {options.lora.alpha} |
| beside | {report.modules} linear layers, {report.parameters:,} parameters |
| trained on | {trained_on}: {report.steps} steps, seed {options.training.seed} |
| held-out ppl, without the adapter | {report.original_ppl:.3f} |
| held-out ppl, with it | {report.held_out_ppl:.3f} |

llama.cpp and QVAC Fabric load `{file}` beside a GGUF file of the model (`llama-cli -m MODEL.gguf --lora {file}`);
`adapter_model.safetensors` and `adapter_config.json` are peft's. `bitconvert eval` and `bitconvert generate` take
either with `--lora`. `recipe.yaml` holds every option, `metrics.jsonl` and `training.png` the run.
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
