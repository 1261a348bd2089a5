"""What a newer version of Tuneyard leaves in a cluster: its CRDs, and the status of a job."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.controller.scene import Job, Object, Scene, eventually
from tests.status.test_patches import THROTTLED

DEFINITION = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/finetunejobs.tuneyard.io"


@contextmanager
def newer_crds(scene: Scene, takes_effect: Callable[[], bool]) -> Iterator[None]:
    """While active, the CRD is a newer version's: it has one more field, with a default, in the
    spec, and one more in the status; enums have one more value; a planned job may be changed."""
    original = scene.api("GET", DEFINITION)
    newer = copy.deepcopy(original)
    schema = newer["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    schema.pop("x-kubernetes-validations")
    spec = schema["properties"]["spec"]["properties"]
    status = schema["properties"]["status"]["properties"]
    for fields in (spec, spec["training"]["properties"]):
        fields["ofANewerVersion"] = {"type": "integer", "default": 3}
    for fields in (status, status["attempts"]["items"]["properties"]):
        fields["ofANewerVersion"] = {"type": "string"}
    spec["method"]["enum"].append("distill")
    status["conditions"]["items"]["properties"]["type"]["enum"].append("Throttled")
    scene.api("PUT", DEFINITION, newer)
    try:
        eventually(takes_effect)  # a changed schema takes effect after a moment
        yield
    finally:
        version = scene.api("GET", DEFINITION)["metadata"]["resourceVersion"]
        original["metadata"]["resourceVersion"] = version
        scene.api("PUT", DEFINITION, original)
        eventually(lambda: not takes_effect())


def of_a_newer_version(job: Job) -> Object:
    """Write what only a newer operator writes into the status; return the status."""
    attempts = [attempt | {"ofANewerVersion": "node-7"} for attempt in job.attempts]
    conditions = [c for c in job.status.get("conditions") or () if c["type"] != THROTTLED["type"]]
    patch = {
        "ofANewerVersion": "x",
        "attempts": attempts,
        "conditions": [*conditions, THROTTLED],
    }
    job.scene.api.merge(f"{job.path}/status", {"status": patch})
    return job.status
