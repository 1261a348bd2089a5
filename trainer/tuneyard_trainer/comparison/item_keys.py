"""The keys by which the items of two jobs are the same: digests of what was asked.

`evaluation.json` names items for people, such as `row 12`, and the row 12 of another job may be
another row. A key covers the row itself, as the prepare or pairs stage wrote it, or the digest of
the data that the item is from.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_ROW = re.compile(r"row (\d+)")
_PREFERRED = re.compile(r"held-out row (\d+)")
_PAIR = re.compile(r"(?:pair|completion) \d+")


@dataclass(frozen=True)
class AskedItems:
    """The rows and sources that the items of a job's evaluation are from."""

    rows: Sequence[str]
    """Digests of the held-out rows of fine-tuning data, in their order. Empty: unknown."""
    preferences: Sequence[str]
    """Digests of the held-out preferences."""
    sources: Mapping[str, str]
    """Digests of the evaluation's inputs by role, such as `prompts` and `suite.0`."""
    suites: Mapping[str, str]
    """A digest of the data of each suite, by the suite's name."""

    def keys(self, metric: str, ids: Sequence[str]) -> tuple[str, ...] | None:
        """Return the key of each item of a metric. None: what the items are is not known."""
        suite = _suite_of(metric, self.suites)
        if "/" in metric and suite is None:
            return None
        found = [f"{suite} {name}" if suite else self._of(name) for name in ids]
        known = [key for key in found if key is not None]
        return _numbered(known) if len(known) == len(found) else None

    def _of(self, name: str) -> str | None:
        if row := _ROW.fullmatch(name):
            return _at(self.rows, int(row[1]))
        if row := _PREFERRED.fullmatch(name):
            return _at(self.preferences, int(row[1]))
        if _PAIR.fullmatch(name):
            return f"{digest_of_all(self.preferences)} {name}" if self.preferences else None
        prompts = self.sources.get("prompts")
        return None if prompts is None else f"{prompts} {name}"


def _suite_of(metric: str, suites: Mapping[str, str]) -> str | None:
    """Return what the items of a suite's metric are of. A group of tasks has SUITE/TASK/METRIC."""
    return next((of for name, of in suites.items() if metric.startswith(f"{name}/")), None)


def _numbered(keys: Sequence[str]) -> tuple[str, ...]:
    """Return keys that are all different: equal rows are told apart by their order."""
    seen: dict[str, int] = {}
    numbered = []
    for key in keys:
        seen[key] = seen.get(key, 0) + 1
        numbered.append(f"{key} {seen[key]}")
    return tuple(numbered)


def _at(digests: Sequence[str], number: int) -> str | None:
    return digests[number - 1] if 0 < number <= len(digests) else None


def line_digests(content: bytes) -> list[str]:
    """Return the digest of each line of a JSONL file."""
    return [hashlib.sha256(line).hexdigest() for line in content.splitlines()]


def digest_of_all(digests: Sequence[str]) -> str:
    """Return one digest of several, in their order."""
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def suite_sources(
    manifest: Mapping[str, Any], details: Mapping[str, Any], sources: Mapping[str, str]
) -> dict[str, str]:
    """Return what the items of each suite are of: the digest of its rows, or of a task of
    lm-evaluation-harness its settings and version.

    `details`: of each suite, by name. `sources`: digests of the evaluation's inputs by role.
    """
    spec = manifest.get("spec")
    evaluate = spec.get("evaluate") if isinstance(spec, dict) else None
    suites = evaluate.get("suites") if isinstance(evaluate, dict) else None
    found = {}
    for number, suite in enumerate(suites if isinstance(suites, list) else ()):
        if not isinstance(suite, dict):
            continue
        name = str(suite.get("name"))
        if f"suite.{number}" in sources:
            found[name] = sources[f"suite.{number}"]
        elif versions := _versions(details.get(name)):
            settings = {key: value for key, value in suite.items() if key != "name"}
            known = json.dumps([settings, versions], sort_keys=True, default=str)
            found[name] = hashlib.sha256(known.encode()).hexdigest()
    return found


def _versions(details: Any) -> Any:
    return details.get("versions") if isinstance(details, dict) else None
