"""What stages need beside the trainer's own packages. Missing ones are told before anything runs:
the stage that wants them may come hours later."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from tuneyard.api.plan import PlannedStage
from tuneyard.errors import StageError


def require(stages: Iterable[PlannedStage]) -> None:
    """Raises StageError for the first package that any of the stages lacks."""
    for stage in stages:
        adapter = getattr(stage.settings, "adapter", None)
        if adapter and adapter.qlora:
            require_bitsandbytes()
        sampling = getattr(stage.settings, "sampling", None)
        if sampling and sampling.engine == "vllm":
            require_vllm()


def require_bitsandbytes() -> None:
    """For 4-bit bases. Raises StageError."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise StageError(
            "MissingExtra",
            "adapter.qlora needs bitsandbytes, which is not installed.",
            advice='Install it with `pip install "tuneyard[qlora]"`, or use adapter.lora.',
        )


def require_vllm() -> None:
    """For sampling. Raises StageError."""
    if importlib.util.find_spec("vllm") is None:
        raise StageError(
            "MissingExtra",
            "sampling.engine is vllm, which is not installed.",
            advice="Name a trainer image with vLLM in compute.image (on one machine, install "
            '`pip install "tuneyard[trainer,vllm]"` into an environment of its own), or remove '
            "sampling.engine.",
        )
