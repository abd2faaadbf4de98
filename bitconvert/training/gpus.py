"""GPUs by name, and how long they take for counted work: an estimate that nothing here was measured for."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bitconvert.errors import UsageError

if TYPE_CHECKING:  # a name is checked before torch is imported
    from bitconvert.training.ledger import Work

_OF_PEAK_FLOPS = 0.6  # what large matrix products reach in practice
_OF_PEAK_BANDWIDTH = 0.75
_LAUNCH_SECONDS = 5e-6  # of a kernel, where it has less than that to do

CONTEXT_BYTES = 800 * 2**20
"""CUDA's context and libraries, before the first tensor."""


@dataclass(frozen=True)
class Gpu:
    """What a data sheet says of a GPU, without sparsity.

    Attributes:
        name: as ``--gpu`` takes it.
        memory: in GiB.
        bandwidth: of that memory, in GB/s.
        bf16: TFLOP/s of tensor cores, summed in float32.
        int8: TOP/s of tensor cores.
        float32: TFLOP/s outside of tensor cores, as torch multiplies float32 by default.
        source: of the numbers.
    """

    name: str
    memory: int
    bandwidth: int
    bf16: float
    int8: float
    float32: float
    source: str

    def seconds(self, work: Counter[Work]) -> float:
        """Roofline: each operation takes as long as its products or its memory traffic, whichever is longer."""
        return sum(count * self._operation_seconds(each) for each, count in work.items())

    def _operation_seconds(self, work: Work) -> float:
        rate = {"torch.int8": self.int8, "torch.float32": self.float32}.get(str(work.dtype), self.bf16) * 1e12
        traffic = work.nbytes / (self.bandwidth * 1e9 * _OF_PEAK_BANDWIDTH)
        return max(work.flops / (rate * _OF_PEAK_FLOPS), traffic, _LAUNCH_SECONDS)


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("rtx-3060", 12, 360, 25.5, 102, 12.7, "NVIDIA Ampere GA102 whitepaper (rates per core and clock)"),
        Gpu("rtx-3090", 24, 936, 71, 284, 35.6, "NVIDIA Ampere GA102 whitepaper"),
        Gpu("rtx-4090", 24, 1008, 165.2, 660.6, 82.6, "NVIDIA Ada whitepaper"),
        Gpu("rtx-5090", 32, 1792, 209.5, 838, 104.8, "NVIDIA RTX Blackwell whitepaper"),
        Gpu("a10", 24, 600, 125, 250, 31.2, "NVIDIA A10 data sheet"),
        Gpu("l4", 24, 300, 121, 242, 30.3, "NVIDIA L4 data sheet"),
        Gpu("l40s", 48, 864, 362, 733, 91.6, "NVIDIA L40S data sheet"),
        Gpu("a100-40", 40, 1555, 312, 624, 19.5, "NVIDIA A100 data sheet (SXM)"),
        Gpu("a100-80", 80, 2039, 312, 624, 19.5, "NVIDIA A100 data sheet (SXM)"),
        Gpu("h100", 80, 3350, 989, 1979, 67, "NVIDIA H100 data sheet (SXM)"),
        Gpu("h200", 141, 4800, 989, 1979, 67, "NVIDIA H200 data sheet (SXM)"),
        Gpu("b200", 180, 8000, 2250, 4500, 75, "NVIDIA HGX B200 data sheet (a GPU's share)"),
    )
}


def gpu_of(name: str) -> Gpu:
    """A GPU by its name.

    Raises:
        UsageError: it is not in the table.
    """
    key = name.lower().replace(" ", "-").replace("_", "-")
    if key not in GPUS:
        raise UsageError(f"--gpu {name}: not in the table", f"known are {', '.join(GPUS)}")
    return GPUS[key]
