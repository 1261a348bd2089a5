"""The fingerprint of a stage: its settings and the kinds of its inputs, but no location.

Stages with the same fingerprint and inputs with the same digests produce the same output.
"""

from __future__ import annotations

from collections.abc import Mapping

from tuneyard.api.plan import Input, StageInput, digest
from tuneyard.api.stage_settings import (
    DpoSettings,
    LoopSettings,
    PrepareSettings,
    Settings,
    StageKind,
)
from tuneyard.api.training import EarlyStopping

STAGE_VERSIONS: Mapping[StageKind, int] = {
    "augment": 1,
    "rewrite": 1,
    "prepare": 2,
    "leaks": 1,
    "sft": 1,
    "pretrain": 1,
    "critique": 3,
    "feedback": 3,
    "pairs": 2,
    "reward": 1,
    "dpo": 1,
    "ppo": 2,
    "grpo": 2,
    "distill": 1,
    "evaluate": 4,
    "assess": 3,  # in plans of 0.2
    "export": 2,
}
"""Version of each kind of stage. Increase it when the stage's code produces another output from the
same settings and inputs: records of the previous version then no longer
match."""
KTO_VERSION = 2
"""Version of the stage `dpo` with the loss kto: the other losses keep their records."""
DOCUMENTS_VERSION = 1
"""Version of the stage `prepare` of documents alone, which keeps its records of 0.2. Since 0.3,
conversations are read with their tools, reasoning and weights, and rows with one prompt go to one
split."""


def fingerprint(
    settings: Settings, inputs: Mapping[str, Input], kinds: Mapping[str, StageKind]
) -> str:
    """Return the digest of a stage's settings, its kind's version and the kinds of its inputs.

    `kinds` maps the plan's stage names to their kinds. Settings that are None are left out, so that
    a later version can add an optional setting without changing existing fingerprints.
    """
    wiring = {
        role: kinds[source.stage] if isinstance(source, StageInput) else "source"
        for role, source in inputs.items()
    }
    return digest(
        {
            "settings": settings.model_dump(mode="json", by_alias=True, exclude_none=True),
            "version": _version(settings),
            "inputs": wiring,
        }
    )


def _version(settings: Settings) -> int:
    version = STAGE_VERSIONS[settings.kind]
    if isinstance(settings, DpoSettings) and settings.loss == "kto":
        version = KTO_VERSION
    if isinstance(settings, PrepareSettings) and _reads_documents(settings):
        version = DOCUMENTS_VERSION
    # With minDelta, 0.2 could keep another checkpoint than the one of the lowest held-out loss.
    return version + 1 if _min_delta(settings) else version


def _reads_documents(settings: PrepareSettings) -> bool:
    return all(each.format == "text" for each in (*settings.train, *settings.validation))


def _min_delta(settings: Settings) -> float:
    loop = settings if isinstance(settings, LoopSettings) else getattr(settings, "training", None)
    stopping = loop.early_stopping if isinstance(loop, LoopSettings) else None
    return stopping.min_delta if isinstance(stopping, EarlyStopping) else 0.0
