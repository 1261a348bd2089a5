"""Read a job's plan back from its ConfigMap, where an earlier attempt stored it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from tuneyard.api.plan import Plan, digest
from tuneyard.errors import Fault, ManifestError


class PlanLostError(ManifestError):
    """A stored plan that does not exist any more, or that another client replaced."""


class PlanMissingError(PlanLostError):
    """A plan without a ConfigMap: it was removed, or an operator ended before it wrote it."""


class PlanUnreadableError(ManifestError):
    """A stored plan that only another version of the operator can read."""


def stored_plan(config_map: Mapping[str, Any] | None, name: str, plan_digest: str) -> Plan:
    """Return the plan that a ConfigMap holds. `config_map` None: it does not exist. `name`: its
    name. Raises PlanMissingError if it does not exist, PlanLostError if its plan has another
    digest, PlanUnreadableError if the plan cannot be read."""
    if config_map is None:
        raise PlanMissingError([_fault(f"ConfigMap {name}, which held the plan, does not exist")])
    value = _json((config_map.get("data") or {}).get("plan.json"))
    if digest(value) != plan_digest:
        message = f"ConfigMap {name} was replaced: it does not hold the plan with this digest"
        raise PlanLostError([_fault(message)])
    try:
        return Plan.model_validate_json(json.dumps(value))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        message = f"another version of the operator wrote the plan in ConfigMap {name}"
        raise PlanUnreadableError([_fault(f"{message}: {place}: {first['msg']}")]) from error


def _json(text: Any) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return None


def _fault(message: str) -> Fault:
    return Fault("status.planDigest", message)
