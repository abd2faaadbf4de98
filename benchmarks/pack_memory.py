"""Peak memory of ``bitconvert pack``: ``python -m benchmarks.pack_memory [LAYERS [FOLDER [8b|70b [FORMAT,...]]]]``.

Packs random bfloat16 shards of the shapes of Llama 3 8B (32 layers are 16 GB) or 70B, by default as TQ1_0 and TQ2_0,
in a process of its own, and prints its peak resident memory, in which mapped files count, and its CPU time. Linux only.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bitconvert.models.lineage import Lineage
from bitconvert.models.safetensors_file import TensorSpec
from bitconvert.packing.shards import Shards
from bitconvert.recipe import Scaling
from tests.models import VARIANTS

COMMON = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
    "max_position_embeddings": 8192,
}
SHAPES = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64},
}
SHARD = 5 * 10**9

_MEASURED = """
import re, resource, sys
from pathlib import Path
from bitconvert.cli.main import main
code = 0
try:
    main()
except SystemExit as end:
    code = end.code or 0
use = resource.getrusage(resource.RUSAGE_SELF)
peak = 1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
print(peak, use.ru_utime + use.ru_stime, file=sys.stderr)
sys.exit(code)
"""


def main() -> None:
    """Write the model, pack it, print one line."""
    layers, place, shape, formats = (*sys.argv[1:], *("4", None, "8b", "tq1_0,tq2_0")[len(sys.argv) - 1 :])
    with tempfile.TemporaryDirectory(dir=place or None) as folder:
        model = Path(folder) / "model"
        size = write_shards(model, int(layers), SHAPES[shape])
        options = [option for name in formats.split(",") for option in ("--format", name)]
        peak, seconds = measure("pack", str(model), *options, "--output", str(Path(folder) / "out"))
        print(f"{size / 1e9:.1f} GB of shards to {formats}: peak {peak / 1e9:.3f} GB, {seconds:.1f} CPU seconds")


def measure(*arguments: str) -> tuple[int, float]:
    """Peak resident bytes and CPU seconds of one command of bitconvert, imports included."""
    command = [sys.executable, "-c", _MEASURED, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    peak, seconds = done.stderr.split()[-2:]
    return int(peak), float(seconds)


def write_shards(model: Path, layers: int, shape: dict[str, int]) -> int:
    """A random latent checkpoint whose tensors repeat one block of rows; returns its bytes."""
    make_tokenizer, _ = VARIANTS["llama3"]
    tokenizer = make_tokenizer()
    config = AutoConfig.for_model(
        **COMMON, **shape, num_hidden_layers=layers, dtype="bfloat16", eos_token_id=tokenizer.eos_token_id
    )
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config).named_parameters()
    specs = {name: TensorSpec(torch.bfloat16, tuple(value.shape)) for name, value in parameters}
    model.mkdir()
    widths = shape["hidden_size"], shape["intermediate_size"]
    noise = {width: (torch.randn(256, width) * 0.02).bfloat16() for width in widths}
    with Shards(model, specs, SHARD) as shards:
        for name, spec in specs.items():
            for begin in range(0, spec.shape[0], 256):
                rows = noise[spec.shape[1]][: spec.shape[0] - begin] if len(spec.shape) > 1 else None
                shards.write(name, torch.ones(spec.shape).bfloat16() if rows is None else rows)
                if rows is None:
                    break
    config.save_pretrained(model)
    tokenizer.save_pretrained(model)
    Lineage(source="benchmark", lam=1.0, scaling=Scaling(estimator="absmean"), tokens_seen=1).save(model)
    assert json.loads((model / "config.json").read_text())["num_hidden_layers"] == layers
    return shards.nbytes


if __name__ == "__main__":
    main()
