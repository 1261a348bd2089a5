"""A stage's fingerprint: what it would do, never where anything lies.

Two stages with one fingerprint, fed inputs of the same digests, produce the same output.
"""

from __future__ import annotations

from collections.abc import Mapping

from tuneyard.api.plan import Input, StageInput, digest
from tuneyard.api.stage_settings import Settings, StageKind

STAGE_VERSIONS: Mapping[StageKind, int] = {
    "prepare": 1,
    "sft": 1,
    "pretrain": 1,
    "critique": 1,
    "feedback": 1,
    "pairs": 1,
    "reward": 1,
    "dpo": 1,
    "ppo": 1,
    "grpo": 1,
    "evaluate": 1,
    "assess": 1,
    "export": 1,
}
"""Raised when a stage's code makes something else of the same settings and inputs: records of the
version before then no longer stand for it."""


def fingerprint(
    settings: Settings, inputs: Mapping[str, Input], kinds: Mapping[str, StageKind]
) -> str:
    """The digest of a stage's settings, its kind's version and its wiring.

    `kinds` maps the plan's stage names to their kinds. Settings that are None are left out, so that
    a later version can add an optional setting without changing anybody's fingerprint.
    """
    wiring = {
        role: kinds[source.stage] if isinstance(source, StageInput) else "source"
        for role, source in inputs.items()
    }
    return digest(
        {
            "settings": settings.model_dump(mode="json", by_alias=True, exclude_none=True),
            "version": STAGE_VERSIONS[settings.kind],
            "inputs": wiring,
        }
    )
