"""The parameters and tags of a run: the manifest, the plan's choices, digests and versions."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from tuneyard.api.plan import Plan, PlannedStage, SourceInput, StageRecord, digest
from tuneyard_trainer.reporting.summary import shareable, without_secrets

MOST_CHARACTERS = 500
"""The longest value of a parameter that every MLflow server accepts."""
_FORBIDDEN = re.compile(r"[^-\w./ ]", re.ASCII)
"""Characters that MLflow does not accept in a name."""


def parameters(plan: Plan) -> dict[str, str]:
    """Return the fields of the manifest as `spec.FIELD`, and the settings of each stage, with the
    values that the planner chose, as `plan.STAGE.FIELD`."""
    spec = {name: value for name, value in plan.manifest["spec"].items() if name != "tracking"}
    stages = {
        stage.name: stage.settings.model_dump(mode="json", by_alias=True, exclude_none=True)
        for stage in plan.stages
    }
    found = _flat(shareable({"spec": spec, "plan": stages}), "")
    return {allowed_name(name): _clipped(text) for name, text in found}


def allowed_name(name: str) -> str:
    """Return the name of a parameter or a metric as MLflow accepts it."""
    return _FORBIDDEN.sub("_", name)[:250]


def _flat(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list):
        items = dict(enumerate(value)).items()
    else:
        yield path, value if isinstance(value, str) else json.dumps(value)
        return
    for name, item in items:
        yield from _flat(item, f"{path}.{name}" if path else f"{name}")


def _clipped(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else text[: MOST_CHARACTERS - 1] + "…"


def tags(plan: Plan, attempt: int) -> dict[str, str]:
    """Return the tags of a run that name the job. `attempt`: the newest that tracks."""
    named = {
        "job": plan.job.name,
        "kind": plan.job.kind,
        "namespace": plan.job.namespace,
        "output": without_secrets(plan.output.uri),
        "plan": digest(plan.model_dump(mode="json", by_alias=True)),
        "attempt": str(attempt),
    }
    return {f"tuneyard.{name}": value for name, value in named.items() if value}


def stage_tags(stage: PlannedStage, record: StageRecord) -> dict[str, str]:
    """Return the tags that a finished stage adds: digests of the models and the data that it read,
    and versions."""
    digests = {
        f"tuneyard.digest.{stage.name}.{role}": record.input_digests[role]
        for role, source in stage.inputs.items()
        if isinstance(source, SourceInput) and role in record.input_digests
    }
    return digests | {f"tuneyard.version.{name}": text for name, text in record.versions.items()}
