"""GPUs by name, one or many, and how long counted work takes on them: by their data sheets, or by measured kernels."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from bitconvert.errors import UsageError

if TYPE_CHECKING:  # a name is checked before torch is imported
    from bitconvert.training.ledger import Work

_OF_PEAK_FLOPS = 0.6  # what large matrix products reach in practice
_OF_PEAK_BANDWIDTH = 0.75
_OF_PEAK_LINK = 0.75
_LAUNCH_SECONDS = 5e-6  # of a kernel, where it has less than that to do

CONTEXT_BYTES = 800 * 2**20
"""CUDA's context and libraries, before the first tensor."""


@dataclass(frozen=True)
class Kernels:
    """What a GPU reaches, as ``python -m benchmarks.kernels`` measures it.

    Attributes:
        gpu: as ``--gpu`` takes it.
        device: as it names itself.
        bf16: TFLOP/s of a large matrix product.
        int8: TOP/s of one.
        float32: TFLOP/s of one.
        bandwidth: GB/s of memory read and written by an addition.
    """

    gpu: str
    device: str
    bf16: float
    int8: float
    float32: float
    bandwidth: float


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
        link: GB/s to the other GPUs of its machine, in one direction: half of what data sheets call the bandwidth.
        network: GB/s to those of other machines, in one direction: one adapter a GPU, as in NVIDIA's DGX of this GPU;
            0 where there is no such machine.
        source: of the numbers.
        kernels: what was measured on such a GPU, in place of what is assumed to be reached of these rates.
    """

    name: str
    memory: int
    bandwidth: int
    bf16: float
    int8: float
    float32: float
    link: int
    network: int
    source: str
    kernels: Kernels | None = None

    def seconds(self, work: Counter[Work]) -> float:
        """Roofline: each operation takes as long as its products or its memory traffic, whichever is longer."""
        return sum(count * self._operation_seconds(each) for each, count in work.items())

    def _operation_seconds(self, work: Work) -> float:
        reached = self.kernels or self._assumed
        rate = {"torch.int8": reached.int8, "torch.float32": reached.float32}.get(str(work.dtype), reached.bf16)
        return max(work.flops / (rate * 1e12), work.nbytes / (reached.bandwidth * 1e9), _LAUNCH_SECONDS)

    @cached_property
    def _assumed(self) -> Kernels:
        bf16, int8, float32 = (_OF_PEAK_FLOPS * rate for rate in (self.bf16, self.int8, self.float32))
        return Kernels(self.name, self.name, bf16, int8, float32, _OF_PEAK_BANDWIDTH * self.bandwidth)


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("rtx-3060", 12, 360, 25.5, 102, 12.7, 32, 0, "NVIDIA Ampere GA102 whitepaper (rates per core and clock)"),
        Gpu("rtx-3090", 24, 936, 71, 284, 35.6, 32, 0, "NVIDIA Ampere GA102 whitepaper"),
        Gpu("rtx-4090", 24, 1008, 165.2, 660.6, 82.6, 32, 0, "NVIDIA Ada whitepaper"),
        Gpu("rtx-5090", 32, 1792, 209.5, 838, 104.8, 64, 0, "NVIDIA RTX Blackwell whitepaper"),
        Gpu("a10", 24, 600, 125, 250, 31.2, 32, 0, "NVIDIA A10 data sheet"),
        Gpu("l4", 24, 300, 121, 242, 30.3, 32, 0, "NVIDIA L4 data sheet"),
        Gpu("l40s", 48, 864, 362, 733, 91.6, 32, 0, "NVIDIA L40S data sheet"),
        Gpu("a100-40", 40, 1555, 312, 624, 19.5, 300, 25, "NVIDIA A100 (SXM) and DGX A100 data sheets"),
        Gpu("a100-80", 80, 2039, 312, 624, 19.5, 300, 25, "NVIDIA A100 (SXM) and DGX A100 data sheets"),
        Gpu("h100", 80, 3350, 989, 1979, 67, 450, 50, "NVIDIA H100 (SXM) and DGX H100 data sheets"),
        Gpu("h200", 141, 4800, 989, 1979, 67, 450, 50, "NVIDIA H200 (SXM) and DGX H200 data sheets"),
        Gpu("b200", 180, 8000, 2250, 4500, 75, 900, 50, "NVIDIA HGX B200 (a GPU's share) and DGX B200 data sheets"),
    )
}


GPUS_A_MACHINE = 8


@dataclass(frozen=True)
class Cluster:
    """Equal GPUs, eight to a machine; one is a cluster too.

    Attributes:
        gpu: each of them.
        count: how many.
    """

    gpu: Gpu
    count: int = 1

    @property
    def name(self) -> str:
        """As ``--gpu`` takes it."""
        return self.gpu.name if self.count == 1 else f"{self.count}x{self.gpu.name}"

    def gathering_seconds(self, nbytes: float) -> float:
        """To give all GPUs what each holds a part of, or to add up what each has and leave a part of it to each.

        In a ring every byte but the own part comes to each GPU once, by its link; to each machine, by all its adapters.
        """
        rate = self.gpu.link
        if self.count > GPUS_A_MACHINE:
            rate = min(rate, self.gpu.network * GPUS_A_MACHINE)
        return nbytes * (self.count - 1) / self.count / (rate * 1e9 * _OF_PEAK_LINK)


def read_kernels(path: Path) -> Kernels:
    """The record of a measurement.

    Raises:
        UsageError: there is none, or of another kind.
    """
    from pydantic import TypeAdapter

    try:
        kernels = TypeAdapter(Kernels).validate_json(path.read_bytes(), strict=True)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not what benchmarks.kernels writes"
        raise UsageError(f"--measured {path}: {reason}", "python -m benchmarks.kernels --gpu NAME > FILE") from error
    if min(kernels.bf16, kernels.int8, kernels.float32, kernels.bandwidth) <= 0:
        raise UsageError(f"--measured {path}: a rate is not above 0", "measure again")
    return kernels


def with_kernels(clusters: Sequence[Cluster], kernels: Kernels) -> list[Cluster]:
    """Clusters whose GPUs of a kind take as long as one of them was measured to.

    Raises:
        UsageError: none of them is of that kind.
    """
    if all(cluster.gpu.name != kernels.gpu for cluster in clusters):
        raise UsageError(f"--measured: it was on {kernels.gpu}, which no --gpu names", f"give --gpu {kernels.gpu}")
    return [
        replace(each, gpu=replace(each.gpu, kernels=kernels)) if each.gpu.name == kernels.gpu else each
        for each in clusters
    ]


def cluster_of(name: str) -> Cluster:
    """GPUs by name and number: ``h100``, ``64xh100``.

    Raises:
        UsageError: it is not in the table, or cannot be so many.
    """
    many = re.fullmatch(r"(?i)(\d+) *x *(.+)", name)
    count, of_one = (int(many[1]), many[2]) if many else (1, name)
    key = of_one.lower().replace(" ", "-").replace("_", "-")
    if key not in GPUS:
        raise UsageError(f"--gpu {name}: not in the table", f"known are {', '.join(GPUS)}; 64xh100 means 64 of them")
    gpu = GPUS[key]
    if not count or (count > GPUS_A_MACHINE and count % GPUS_A_MACHINE):
        raise UsageError(
            f"--gpu {name}: {count} GPUs do not fill machines of {GPUS_A_MACHINE}",
            f"give 1 to {GPUS_A_MACHINE}, or a multiple",
        )
    if count > GPUS_A_MACHINE and not gpu.network:
        raise UsageError(
            f"--gpu {name}: no network between machines of this GPU is known", f"give at most {GPUS_A_MACHINE} of them"
        )
    return Cluster(gpu, count)
