"""The result of the calculation: named parts of memory at the moments of a stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

GIB = 1 << 30

Sharding = Literal["none", "fsdp"]
"""none: every device holds the whole model. fsdp: FSDP2 shards parameters, gradients and optimizer
state over all devices, layer by layer. The native trainer has `none` only."""


def gib(size: int) -> str:
    """Return bytes as GiB with one decimal."""
    return f"{size / GIB:.1f}"


class Part(NamedTuple):
    """A part of memory."""

    name: str
    """Name of the part in the view."""
    size: int
    """Bytes."""


@dataclass(frozen=True)
class Moment:
    """The content of the memory at one moment of a stage."""

    name: str
    """Name of the moment, e.g. `backward pass of a layer`."""
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, name: str, *parts: tuple[str, int]) -> Moment:
        """Return a moment with the parts that are not empty."""
        return cls(name, tuple(Part(part, size) for part, size in parts if size))

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(part.size for part in self.parts)


@dataclass(frozen=True)
class StageMemory:
    """The memory of one stage on one worker."""

    stage: str
    """Name of the stage in the plan."""
    device: tuple[Moment, ...]
    """Moments on one GPU, or, in a job without GPUs, in the process. Empty: it uses no GPU."""
    host: tuple[Moment, ...]
    """Moments in the memory of the worker's pod, apart from the process itself."""
    assumptions: tuple[str, ...] = ()
    """Assumptions about values that neither the plan holds nor a worker has reported, as clauses.
    What rests on them refuses no job."""

    @property
    def peak(self) -> Moment:
        """The moment that takes most of the GPU."""
        return max(self.device, key=lambda moment: moment.total, default=Moment("", ()))

    @property
    def host_peak(self) -> Moment:
        """The moment that takes most of the pod's memory."""
        return max(self.host, key=lambda moment: moment.total, default=Moment("", ()))


class Settings(NamedTuple):
    """The settings that an attempt may choose: they change no result beyond rounding."""

    micro_batch_tokens: int
    """Most tokens of a micro-batch, padding included; a longer row is a micro-batch of its own."""
    gradient_checkpointing: bool = False
    """Whether activations are recomputed in the backward pass."""
    sharding: Sharding = "none"
