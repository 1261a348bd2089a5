"""GPUs with the memory, the speed and the bandwidth that the plan calculates with."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from tuneyard.api.compute import Compute
from tuneyard.api.quantity import QUANTITY_PATTERN, quantity_value

GIB = 1 << 30
CONTEXT_BYTES = 1 << 30
"""Memory of CUDA's context, its libraries' workspaces and NCCL. An estimate."""
CPU_PROCESS_BYTES = 840 << 20
"""Resident memory of Python with torch, transformers and PEFT before a model is loaded, as measured
with torch 2.15 on Linux."""
PRODUCT_LABEL = "nvidia.com/gpu.product"
"""The node label of NVIDIA's GPU feature discovery."""
FRAGMENTS = 0.04
"""Share of a GPU's memory that the allocator's gaps may take. An estimate."""


@dataclass(frozen=True)
class Gpu:
    """One GPU."""

    name: str
    memory: int
    """Bytes that CUDA or ROCm reports, rounded down to GiB."""
    teraflops: float | None
    """Dense bfloat16 operations per second, in 1e12, by the maker's data sheet. None: unknown."""
    bandwidth: float | None
    """Bytes per second between GPU and its memory, in 1e9. None: unknown."""
    estimated: bool = False
    """Whether only the memory is known, and not what the GPU is."""

    @property
    def usable(self) -> int:
        """Bytes that a job can use."""
        return int(self.memory * (1 - FRAGMENTS)) - CONTEXT_BYTES

    @property
    def most(self) -> int:
        """Bytes beyond which no job can run, whatever the estimates of `usable` are worth."""
        return self.memory


@dataclass(frozen=True)
class Cpu:
    """The memory of a worker without a GPU, which computes in its own process."""

    memory: int
    """Bytes that the process may take."""
    name: str = "CPU"
    estimated: bool = False

    @property
    def usable(self) -> int:
        """Bytes that a job can use."""
        return self.memory - CPU_PROCESS_BYTES

    @property
    def most(self) -> int:
        """Bytes beyond which no job can run."""
        return self.usable


GPUS: Final = (
    Gpu("T4", 14 * GIB, 65, 320),  # float16: it has no bfloat16
    Gpu("A10G", 22 * GIB, 70, 600),
    Gpu("L4", 22 * GIB, 121, 300),
    Gpu("RTX4090", 23 * GIB, 165, 1008),
    Gpu("A100-40GB", 39 * GIB, 312, 1555),
    Gpu("L40S", 44 * GIB, 362, 864),
    Gpu("A6000", 47 * GIB, 155, 768),
    Gpu("A100-80GB", 79 * GIB, 312, 2039),
    Gpu("H100", 79 * GIB, 989, 3350),
    Gpu("H200", 139 * GIB, 989, 4800),
    Gpu("B200", 178 * GIB, 2250, 8000),
    Gpu("MI300X", 191 * GIB, 1307, 5300),
)
"""The described GPUs, by memory."""

_SPELLINGS = {"A100": "A100-80GB", "RTX-4090": "RTX4090", "GEFORCERTX4090": "RTX4090"}


UNKNOWN = Gpu("unknown", 79 * GIB, None, None, estimated=True)
"""The GPU of a job whose hardware is not described: nothing is refused on it."""


class UnknownGpuError(ValueError):
    """A name that is neither a described GPU nor an amount of memory."""


def gpu_of(name: str) -> Gpu:
    """Return the GPU of a name such as `H100`, of a product label such as `NVIDIA-H100-80GB-HBM3`,
    or with a memory such as `48Gi`, of which nothing else is known. Raises UnknownGpuError."""
    if re.fullmatch(QUANTITY_PATTERN, name) and quantity_value(name) >= GIB:
        return Gpu(name, int(quantity_value(name)), None, None, estimated=True)
    plain = _plain(name)
    spelled = _plain(_SPELLINGS.get(name.upper(), name))
    for gpu in sorted(GPUS, key=lambda gpu: -len(gpu.name)):
        if _plain(gpu.name) in (plain, spelled):
            return gpu
    for gpu in sorted(GPUS, key=lambda gpu: -len(gpu.name)):
        if all(_plain(part) in plain for part in gpu.name.split("-")):
            return gpu
    known = ", ".join(gpu.name for gpu in GPUS)
    raise UnknownGpuError(
        f"{name!r} is not described: name one of {known}, or its memory, such as 48Gi"
    )


def declared_gpu(compute: Compute) -> Gpu | None:
    """Return the GPU that `compute.gpu` names, or the product label of the nodes. None: neither
    names one that is described."""
    for name in (compute.gpu, compute.node_selector.get(PRODUCT_LABEL)):
        with suppress(UnknownGpuError):
            if name is not None:
                return gpu_of(name)
    return None


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
