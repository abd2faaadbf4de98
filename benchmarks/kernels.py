"""What a GPU reaches, for `bitconvert plan --measured`: ``python -m benchmarks.kernels --gpu h100 > h100.json``.

Matrix products of a layer's size, by the kernels that training calls, and an addition to as many numbers. The best of
several rounds counts. Without a GPU the CPU is measured, which shows that this works and nothing else.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict

import torch

from bitconvert.training.gpus import Kernels, cluster_of

_ROUNDS = 20


def main() -> None:
    """Print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", required=True, help="what bitconvert plan calls it")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=8192)
    arguments = parser.parse_args()
    print(
        json.dumps(asdict(measured(cluster_of(arguments.gpu).gpu.name, arguments.tokens, arguments.hidden)), indent=2)
    )


def measured(gpu: str, tokens: int, hidden: int) -> Kernels:
    """Rates of products (tokens, hidden) by (hidden, hidden), and of an addition of as many float32 numbers."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    flops = 2 * tokens * hidden * hidden
    x, weight = (torch.randn(rows, hidden, device=device) for rows in (tokens, hidden))
    codes = [each.clamp(-1, 1).round().to(torch.int8) for each in (x, weight)]
    half = [each.bfloat16() for each in (x, weight)]
    return Kernels(
        gpu=gpu,
        device=torch.cuda.get_device_name() if device.type == "cuda" else "a CPU",
        bf16=flops / _seconds(lambda: half[0] @ half[1].T) / 1e12,
        int8=flops / _seconds(lambda: torch._int_mm(codes[0], codes[1].T)) / 1e12,
        float32=flops / _seconds(lambda: x @ weight.T) / 1e12,
        bandwidth=2 * x.nbytes / _seconds(lambda: torch.add(x, 1.0, out=x)) / 1e9,
    )


def _seconds(work: Callable[[], object]) -> float:
    """The shortest of several rounds, after one that is not counted."""
    times = []
    for _ in range(_ROUNDS + 1):
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times[1:])


if __name__ == "__main__":
    main()
