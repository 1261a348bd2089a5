"""Whether the evaluation in an output is of the present model: from the files of its stages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

EVALUATED, RECORD, BEGUN = "/evaluation.json", "/record.json", ".begun.json"
"""How the names of these files end: what an evaluation measured, the record of a finished stage,
and the mark of a stage that has begun and has no record yet."""
PATTERNS = tuple(f"stages/*{name}" for name in (EVALUATED, RECORD, BEGUN))


def changed_after_evaluation(
    files: Mapping[str, Any], sources: Mapping[str, Mapping[str, str]] | None = None
) -> list[str]:
    """Return what has changed after the evaluation, sorted: names of stages and roles of inputs.
    []: the evaluation is of the present model. `files`: the JSON of the files of PATTERNS, by their
    paths in the output. `sources`: the stages whose output an evaluation measures, by its name and
    the role of the input. None: they are not known."""
    named = {path.removeprefix("stages/"): value for path, value in files.items()}
    begun = {path.removesuffix(BEGUN) for path in named if path.endswith(BEGUN)}
    evaluated = {path.removesuffix(EVALUATED) for path in named if path.endswith(EVALUATED)}
    records = {
        path.removesuffix(RECORD): value for path, value in named.items() if path.endswith(RECORD)
    }
    changed = begun - evaluated - {"export"}
    digests = {record.get("digest") for record in records.values()}
    for name in evaluated:  # one that missed a gate has no record
        found = records.get(name) or named[f"{name}{EVALUATED}"]
        inputs = found.get("inputDigests") or {}
        model = "tuned" if "tuned" in inputs else "reward"  # of a job that trains only a reward
        roles = inputs.keys() & {model, "data", "pairs"}
        changed |= {role for role in roles if inputs[role] not in digests}
        for role, source in (sources or {}).get(name, {}).items():
            if role in inputs and inputs[role] != records.get(source, {}).get("digest"):
                changed.add(role)
    return sorted(changed)
