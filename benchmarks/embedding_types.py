"""What each ``--embedding-type`` costs: ``python -m benchmarks.embedding_types CHECKPOINT TEXT``.

Packs a warmed-up model with each type, as Q2_0 for the size and as Q8_0, which is faster on every CPU and computes the
same, for the perplexity in llama.cpp. Where the type does not divide the model's rows, and packing would fall back to
another, the weights are rounded in blocks that run across rows and the file stores what comes out in F32: the rounding
of the weights alone, and the size that the type would have.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch
from gguf import dequantize
from safetensors.torch import load_file, save_file

from bitconvert.evaluation.evaluate import evaluate
from bitconvert.models.checkpoint import open_checkpoint
from bitconvert.models.ggml_quantize import quantize_by_ggml
from bitconvert.models.gguf_types import F32, GgufType
from bitconvert.packing.gguf.plan import EMBEDDING_TYPES
from bitconvert.packing.pack import pack
from bitconvert.packing.source import EMBEDDING
from bitconvert.recipe import Packing
from bitconvert.report.packing import PackedFile
from bitconvert.report.reporter import Silent


def main() -> None:
    """Print one line of JSON per type."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("checkpoint", type=Path)
    arguments.add_argument("text", type=Path)
    arguments.add_argument("--max-tokens", type=int, default=16_384)
    given = arguments.parse_args()
    width = int(open_checkpoint(str(given.checkpoint)).complete.hidden_size)
    for name, kind in EMBEDDING_TYPES.items():
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
            fits = width % kind.block == 0
            source = given.checkpoint if fits else _rounded(given.checkpoint, kind, Path(folder) / "rounded")
            file, fast = _packed(source, name if fits else "f32", Path(folder) / "packed")
            weights = sum(tensor.weights for tensor in file.tensors if tensor.name == "token_embd.weight")
            nbytes = file.nbytes - (0 if fits else int(weights * (F32.bits_per_weight - kind.bits_per_weight) / 8))
            report = evaluate(
                fast.path, data=given.text, runtime="llama.cpp", max_tokens=given.max_tokens, threads=1
            ).perplexity
            assert report is not None
            told = {"type": name, "in_runtime": fits, "mb": nbytes / 1e6, "ppl": report.ppl, "stderr": report.stderr}
            print(json.dumps(told), flush=True)


def _packed(checkpoint: Path, embedding_type: str, output: Path) -> list[PackedFile]:
    options = Packing(formats=("q2_0", "q8_0"), embedding_type=embedding_type)
    return pack(open_checkpoint(str(checkpoint)), options, output, reporter=Silent()).files


def _rounded(checkpoint: Path, kind: GgufType, directory: Path) -> Path:
    """A copy of the checkpoint with its embedding rounded as the type would."""
    shutil.copytree(checkpoint, directory)
    weights = load_file(directory / "model.safetensors")
    embedding = weights[EMBEDDING]
    blocks = quantize_by_ggml(embedding.float().numpy().reshape(-1, kind.block), kind)
    weights[EMBEDDING] = torch.from_numpy(dequantize(blocks, kind.ggml())).view(embedding.shape)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


if __name__ == "__main__":
    main()
