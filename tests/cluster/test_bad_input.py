"""Faults that no schema can refuse: the job fails with a reason and the field to change.

All of them at once on a real node, where the scheduler, the kubelet, the runtime, KubeRay and the
kernel say what they say.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import yaml

from tests.cluster.conftest import Platform
from tests.cluster.jobs import quickstart

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]

START_SECONDS = 45
"""Enough for a kubelet on a busy machine to report the problem."""
STRICT = "tuning-strict"
"""A namespace whose quota admits a head and no worker."""

Object = dict[str, Any]


@dataclass(frozen=True)
class Bad:
    """A manifest and its expected failure."""

    spec: Object
    reason: str
    message: tuple[str, ...]
    advice: str
    is_patient: bool = False
    """Whether it fails on its own, not by the start deadline."""


def _compute(**more: str | int) -> Object:
    return {**quickstart("any", steps=1)["spec"]["compute"], "cpusPerWorker": "100m", **more}


# The node must have room for the heads of all impatient jobs, 4 GiB each. Their workers are small,
# and the patient jobs, which wait for room, start after them.
BAD: Mapping[str, Bad] = {
    "gpu": Bad(
        # A Job of this size prepares its data first.
        {"compute": _compute(gpusPerWorker=1, cpusPerWorker="1", memory="4Gi")},
        "Unschedulable",
        ("worker", "Insufficient nvidia.com/gpu"),
        "compute.gpusPerWorker",
    ),
    "image": Bad(
        {"compute": _compute(image="registry.invalid/trainer:1", memory="1Gi")},
        "ImagePullFailed",
        ("registry.invalid/trainer:1",),
        "compute.image",
    ),
    "claim": Bad(
        {"output": {"uri": "pvc://archive/claim"}},
        "VolumeMissing",
        ("PersistentVolumeClaim archive",),
        "pvc://archive/",
    ),
    "secret": Bad(
        {
            "output": {"uri": "s3://bucket/secret", "credentials": {"name": "store"}},
            "compute": _compute(memory="1Gi"),
        },
        "SecretMissing",
        ("Secret store",),
        "credentials",
    ),
    "quota": Bad(
        {  # nothing that its namespace would have to contain
            "data": {"train": [{"uri": "hf://datasets/org/rows/train.jsonl"}]},
            "output": {"uri": "s3://bucket/quota"},
        },
        "QuotaExceeded",
        ("exceeded quota: team", "requests.memory"),
        "compute.memory",
    ),
    "memory": Bad(
        {"compute": _compute(cpusPerWorker="500m", memory="1Gi")},
        "OutOfMemory",
        ("container ray-worker",),
        "compute.memory",
        is_patient=True,
    ),
    "model": Bad(
        {"model": {"uri": "pvc://models/nowhere"}, "compute": _compute(cpusPerWorker="500m")},
        "SourceNotFound",
        ("pvc://models/nowhere",),
        "spec.model.uri",
        is_patient=True,
    ),
    "tiny": Bad(
        {"compute": _compute(memory="32Mi", sharedMemory="16Mi")},
        "OutOfMemory",
        ("container ray-worker of pod tiny-1-",),
        "compute.memory",
        is_patient=True,
    ),
}


@pytest.fixture(scope="module")
def ended(platform: Platform) -> Iterator[Mapping[str, Platform]]:
    """Return the platform of each job: the impatient jobs have failed, the patient ones started."""
    cluster = platform.cluster
    cluster.kubectl("create", "namespace", STRICT)
    strict = replace(platform, namespace=STRICT)
    hard = {"requests.memory": "5Gi"}
    strict.apply(
        {
            "apiVersion": "v1",
            "kind": "ResourceQuota",
            "metadata": {"name": "team"},
            "spec": {"hard": hard},
        }
    )
    impatient = [name for name, bad in BAD.items() if not bad.is_patient]
    patient = [name for name in BAD if name not in impatient]
    places = {name: strict if name == "quota" else platform for name in BAD}
    policy = {"runPolicy": {"startDeadlineSeconds": START_SECONDS}}
    for name in impatient:
        places[name].apply(quickstart(name, steps=1, **policy, **BAD[name].spec))
    for name in impatient:
        places[name].wait(name, "Failed", 240)
    for name in patient:
        places[name].apply(quickstart(name, steps=1, **BAD[name].spec))
    yield places
    for name, place in places.items():
        place.kubectl("delete", "ftj", name, "--wait=false")
    cluster.kubectl("delete", "namespace", STRICT, "--wait=false")


@pytest.mark.parametrize("name", BAD)
def test_a_job_that_cannot_run_reports_why_and_what_to_change(
    ended: Mapping[str, Platform], name: str
) -> None:
    place, bad = ended[name], BAD[name]
    place.wait(name, "Failed", 240)

    status = place.status(name)
    sys.stdout.write(yaml.safe_dump(status))
    failure = status["failure"]
    assert failure["reason"] == bad.reason
    for text in bad.message:
        assert text in failure["message"]
    assert bad.advice in failure["advice"]
    (condition,) = [c for c in status["conditions"] if c["type"] == "Failed"]
    assert condition["reason"] == bad.reason
    assert failure["advice"] in condition["message"], "kubectl describe shows it"
    assert len(status["attempts"]) == 1, "the same manifest would fail again"
