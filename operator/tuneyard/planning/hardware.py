"""GPUs with the memory that the plan calculates with."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from tuneyard.api.compute import Compute
from tuneyard.api.quantity import QUANTITY_PATTERN, quantity_value
from tuneyard.planning.memory.parts import GIB

CONTEXT_BYTES = 1 << 30
"""Memory of CUDA's context, its libraries' workspaces and NCCL. An estimate."""
CPU_PROCESS_BYTES = 840 << 20
"""Resident memory of Python with torch, transformers and PEFT before a model is loaded, as measured
with torch 2.15 on Linux."""
PRODUCT_LABEL = "nvidia.com/gpu.product"
"""The node label of NVIDIA's GPU feature discovery."""
WHOLE_GPU = "nvidia.com/gpu"
"""The resource of the GPU that the label names."""
FRAGMENTS = 0.04
"""Share of a GPU's memory that the allocator's gaps may take. An estimate."""


@dataclass(frozen=True)
class Gpu:
    """One GPU."""

    name: str
    memory: int
    """Bytes that CUDA or ROCm reports; of a described GPU rounded down to GiB."""
    estimated: bool = False
    """Whether only the memory is known, and not what the GPU is."""
    exact: bool = False
    """Whether a worker has reported the memory."""

    @property
    def usable(self) -> int:
        """Bytes that a job can use."""
        return max(0, int(self.memory * (1 - FRAGMENTS)) - CONTEXT_BYTES)

    @property
    def most(self) -> int:
        """Bytes beyond which no job can run, whatever the estimates of `usable` are worth."""
        return self.memory if self.exact else self.memory + GIB


@dataclass(frozen=True)
class Cpu:
    """The memory of a worker without a GPU, which computes in its own process."""

    memory: int
    """The process's share of the memory of its machine or pod, in bytes."""
    most: int
    """Bytes beyond which no process can run: all memory of the machine or pod, with swap. Neither
    libraries nor the files of weights are taken off: their pages can be dropped, and processes
    share them."""
    name: str = "CPU"
    estimated: bool = False

    @property
    def usable(self) -> int:
        """Bytes that a job can use."""
        return max(0, self.memory - CPU_PROCESS_BYTES)


GPUS: Final = (
    Gpu("T4", 14 * GIB),
    Gpu("A10G", 22 * GIB),
    Gpu("L4", 22 * GIB),
    Gpu("RTX4090", 23 * GIB),
    Gpu("A100-40GB", 39 * GIB),
    Gpu("L40S", 44 * GIB),
    Gpu("A6000", 47 * GIB),
    Gpu("A100-80GB", 79 * GIB),
    Gpu("H100", 79 * GIB),
    Gpu("H100-NVL", 93 * GIB),
    Gpu("H200", 139 * GIB),
    Gpu("B200", 178 * GIB),
    Gpu("MI300X", 191 * GIB),
)
"""The described GPUs, by memory."""

_SPELLINGS = {"A100": "A100-80GB", "GEFORCERTX4090": "RTX4090"}

PARTIAL = frozenset({"mig", "shared", "laptop"})
"""Words in the label of a part of a GPU (MIG), of one that pods share (by time or MPS), or of a
smaller one of the same name."""
VIRTUAL = re.compile(r"\d+[abcq](\d|me)?")
"""A word in the label of a virtual GPU, such as 12q, 2b4 or 10cme: it has 12, 2 or 10 GB of the GPU
that is named."""
SIZE = re.compile(r"(?<![a-z0-9])(\d{1,4})[^a-z0-9]?g(?:i?b)?(?![a-z0-9])")
"""The memory that a label or a user names: 80GB, 80 GB, 144G or 96 GiB."""
ROUNDED = 0.85
"""A described GPU has at least this share of the size that its label names: 14 GiB of 16 GB.
An H100 of 96 GB is another one than that of 80."""

UNKNOWN = Gpu("unknown", 79 * GIB, estimated=True)
"""The GPU of a job whose hardware is not described: nothing is refused on it."""


class UnknownGpuError(ValueError):
    """A name that is neither a described GPU nor an amount of memory."""


def gpu_of(name: str) -> Gpu:
    """Return the GPU of a name such as `H100`, of a product label such as `NVIDIA-H100-80GB-HBM3`,
    or with a memory such as `48Gi`, of which nothing else is known. Raises UnknownGpuError."""
    if re.fullmatch(QUANTITY_PATTERN, name) and quantity_value(name) >= GIB:
        return Gpu(name, int(quantity_value(name)), estimated=True)
    plain = _plain(name)
    spelled = _plain(_SPELLINGS.get(name.upper(), name))
    for gpu in sorted(GPUS, key=lambda gpu: -len(gpu.name)):
        if _plain(gpu.name) in (plain, spelled):
            return gpu
    words = set(re.findall(r"[a-z0-9]+", re.sub(r"rtx\W4090", "rtx4090", name.lower())))
    named = [gpu for gpu in GPUS if set(gpu.name.lower().split("-")) <= words]  # an L40 is no L4
    if named and not words & PARTIAL and not any(map(VIRTUAL.fullmatch, words)):
        gpu = max(named, key=lambda gpu: gpu.name.count("-"))
        sizes = [int(size) << 30 for size in SIZE.findall(name.lower())]
        if all(ROUNDED * size <= gpu.memory <= size for size in sizes):
            return gpu
    raise UnknownGpuError(unknown_gpu(name))


def unknown_gpu(name: str) -> str:
    """Return what is wrong with the name of a GPU that is not described."""
    known = ", ".join(gpu.name for gpu in GPUS)
    return f"{name!r} is not described: name one of {known}, or its memory, such as 48Gi"


def declared_gpu(compute: Compute) -> Gpu | None:
    """Return the GPU that `compute.gpu` names, or else the product label of the nodes. None: it is
    not described. The label tells nothing of another resource, such as `nvidia.com/mig-1g.10gb` or
    `nvidia.com/gpu.shared`: it names the whole GPU that the pods have a part of."""
    name = compute.gpu
    if name is None and compute.gpu_resource == WHOLE_GPU:
        name = compute.node_selector.get(PRODUCT_LABEL)
    with suppress(UnknownGpuError):
        if name is not None:
            return gpu_of(name)
    return None


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
