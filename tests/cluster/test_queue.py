"""A job in a Kueue queue: it waits, is admitted, is evicted, and waits again."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster.conftest import Platform
from tests.cluster.jobs import tiny

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]

QUEUE = "team-a"
KUEUE = {"apiVersion": "kueue.x-k8s.io/v1beta2"}
LABEL = "kueue.x-k8s.io"
JOB = "modest"
URGENT = "urgent-work"

CHECKPOINTS = """
import pathlib
print(*(path.name for path in pathlib.Path("/models/modest").rglob("step-*")))
"""

Object = dict[str, Any]


def _quota(memory: str) -> Object:
    resources = [
        {"name": "cpu", "nominalQuota": "100"},
        {"name": "memory", "nominalQuota": memory},
    ]
    group = {
        "coveredResources": [resource["name"] for resource in resources],
        "flavors": [{"name": QUEUE, "resources": resources}],
    }
    spec = {
        "namespaceSelector": {},
        "preemption": {"withinClusterQueue": "LowerPriority"},
        "resourceGroups": [group],
    }
    return {**KUEUE, "kind": "ClusterQueue", "metadata": {"name": QUEUE}, "spec": spec}


QUEUES = (
    {**KUEUE, "kind": "ResourceFlavor", "metadata": {"name": QUEUE}},
    {**KUEUE, "kind": "WorkloadPriorityClass", "metadata": {"name": URGENT}, "value": 1000},
    {
        **KUEUE,
        "kind": "LocalQueue",
        "metadata": {"name": QUEUE},
        "spec": {"clusterQueue": QUEUE},
    },
)


def _urgent(image: str | None) -> Object:
    """Return another user's job, which takes almost all of the queue's memory; its pod never
    starts."""
    labels = {f"{LABEL}/queue-name": QUEUE, f"{LABEL}/priority-class": URGENT}
    container = {
        "name": "main",
        "image": image,
        "resources": {"requests": {"cpu": "1", "memory": "8Gi"}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "runAsNonRoot": True,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    pod = {
        "restartPolicy": "Never",
        "nodeSelector": {"no-such-node": "true"},
        "containers": [container],
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": URGENT, "labels": labels},
        "spec": {"suspend": True, "template": {"spec": pod}},
    }


@pytest.fixture
def queued(platform: Platform) -> Iterator[Platform]:
    """The platform with a queue whose quota is too small for any job."""
    kinds = platform.cluster.kubectl("api-resources", "--api-group", LABEL, "-o", "name").stdout
    if "clusterqueues" not in kinds:
        pytest.skip("the cluster that was given has no Kueue")
    platform.apply(*QUEUES, _quota(memory="2Gi"))
    yield platform
    # Leave the node empty for the next test.
    platform.kubectl("delete", "finetunejob", JOB, "--ignore-not-found", "--timeout=240s")
    for kind, name in (
        ("job", URGENT),
        ("localqueue", QUEUE),
        ("clusterqueue", QUEUE),
        ("resourceflavor", QUEUE),
        ("workloadpriorityclass", URGENT),
    ):
        platform.kubectl("delete", kind, name, "--ignore-not-found", "--wait=false")


def _condition(platform: Platform, type_: str) -> Object:
    conditions = platform.status(JOB).get("conditions") or ()
    found: Object = next((c for c in conditions if c["type"] == type_), {})
    return found


def _waits_for_quota(platform: Platform) -> bool:
    admitted = _condition(platform, "Admitted")
    return admitted.get("status") == "False" and "memory" in admitted["message"]


def test_a_job_waits_for_its_queue_and_is_evicted_by_a_more_urgent_one(queued: Platform) -> None:
    policy = {"queue": QUEUE, "maxAttempts": 1}  # an eviction does not count
    steps = 50_000  # more than it does, and no checkpoint but the one of the eviction
    queued.apply(tiny(JOB, steps=steps, checkpoint_steps=steps, runPolicy=policy))

    queued.until("it says what it waits for", lambda: _waits_for_quota(queued), 60)
    sys.stdout.write(queued.kubectl("get", "ftj", JOB))
    assert queued.status(JOB)["phase"] == "Queued"
    assert _condition(queued, "Running")["reason"] == "Queued"
    assert "insufficient quota" in _condition(queued, "Admitted")["message"]
    (ray_job,) = queued.items("rayjobs", f"tuneyard.io/job={JOB}")
    assert ray_job["spec"]["suspend"]
    assert queued.pods(JOB) == []

    queued.apply(_quota(memory="12Gi"))
    queued.wait(JOB, "Admitted", 60)
    (ray_job,) = queued.items("rayjobs", f"tuneyard.io/job={JOB}")
    assert not ray_job["spec"].get("suspend")
    queued.until_step(JOB, attempt=1, step=3)
    assert queued.status(JOB)["phase"] == "Running"

    queued.apply(_urgent(queued.cluster.image))
    queued.until("it waits again", lambda: len(queued.status(JOB)["attempts"]) == 2, 200)
    first, _ = queued.status(JOB)["attempts"]
    sys.stdout.write(f"{first}\n{queued.kubectl('get', 'ftj', JOB)}")
    assert first["reason"] == "Preempted"
    assert "Preempted to accommodate" in first["message"]
    queued.until("it says why again", lambda: _waits_for_quota(queued), 60)
    assert queued.status(JOB)["phase"] == "Queued"
    assert queued.pods(JOB) == []
    assert queued.run("looks", CHECKPOINTS).split(), "giving way it saved what it had learned"

    queued.kubectl("delete", "job", URGENT)
    queued.wait(JOB, "Admitted", 60)
    (ray_job,) = queued.items("rayjobs", f"tuneyard.io/job={JOB}")
    assert not ray_job["spec"].get("suspend")
