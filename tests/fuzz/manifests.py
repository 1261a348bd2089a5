"""Random manifests through reading, planning and rendering: objects, or errors of our own."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.fuzz.mutations import mutated_text, mutated_value
from tests.manifests.manifests import VALID
from tuneyard.api.compute import Compute
from tuneyard.errors import ManifestError
from tuneyard.manifests.manifest import Job, parse, read
from tuneyard.planning.plan import plan_job
from tuneyard.rendering.placement import placed
from tuneyard.rendering.rayjob import render, render_erasure

ROOT = Path(__file__).parents[2]
PROFILES = {"a100-small": Compute(gpus_per_worker=1)}

Object = dict[str, Any]


def seeds() -> list[Object]:
    """Return valid manifests, which together set every field."""
    paths = [*sorted((ROOT / "examples").rglob("*.yaml"))]
    paths += sorted((ROOT / "tests/golden/manifests").glob("*.yaml"))
    texts = [path.read_text(encoding="utf-8") for path in paths if "out" not in path.parts]
    found = [item for text in texts for item in yaml.safe_load_all(text) if item]
    return [*VALID.values(), *(_on_cluster(item) for item in (*found, *VALID.values()))]


def _on_cluster(value: Any) -> Any:
    """Return a value with locations that pods can reach, so that rendering is fuzzed too."""
    if isinstance(value, dict):
        return {key: _on_cluster(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_on_cluster(part) for part in value]
    is_local = isinstance(value, str) and value.startswith(("file://", "job://"))
    return "pvc://data/file.jsonl" if is_local else value


def values(runs: int, seed: int) -> Iterator[Object]:
    """Yield random manifests as values."""
    random_, known = random.Random(seed), seeds()
    for _ in range(runs):
        yield mutated_value(random_, random_.choice(known), known)


def texts(runs: int, seed: int) -> Iterator[str]:
    """Yield random manifests as texts: two of three are YAML, and the third may be anything."""
    random_ = random.Random(seed)
    for value in values(runs, seed):
        text = as_yaml(value)
        yield text if random_.random() < 2 / 3 else mutated_text(random_, text)


def as_yaml(value: Any) -> str:
    return yaml.safe_dump(value, allow_unicode=False, sort_keys=False)


def problem(text: str) -> str | None:
    """Return how a manifest broke Tuneyard; None: it was rendered, or refused as it should be."""
    try:
        try:
            jobs = read(text, "fuzz.yaml")
        except ManifestError as error:
            return unclear(error)
        for job in jobs:
            if found := _problem_of(job):
                return found
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _problem_of(job: Job) -> str | None:
    try:
        plan = placed(plan_job(job), profiles=PROFILES)
    except ManifestError as error:
        return unclear(error)
    objects = [*render(plan, job, attempt=1), render_erasure(plan, job)]
    json.dumps(objects, allow_nan=False, ensure_ascii=False).encode()
    again = parse(json.loads(json.dumps(plan.manifest, allow_nan=False)))
    same = again.spec.model_copy(update={"run_policy": job.spec.run_policy}) == job.spec
    return None if same else "the manifest in the plan means something else"


def unclear(error: ManifestError) -> str | None:
    """Return what an error lacks; None: each fault has a text that can be printed, and a place."""
    for fault in error.faults:
        str(fault).encode()
        has_place = fault.path or fault.line or "the manifest" in fault.message
        if not fault.message or not has_place:
            return f"a fault without a place: {fault!r}"
    return None if error.faults else "an error without a fault"
