"""Announced ends lose no step: a suspension by the user and an eviction from the node."""

from __future__ import annotations

import json
import sys

import pytest

from tests.cluster.conftest import Platform
from tests.cluster.jobs import tiny

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1200)]


def test_a_suspended_and_an_evicted_job_continue_at_the_same_step(platform: Platform) -> None:
    steps = 600  # enough that the job still runs at both ends: it stopped at 68 and 118
    # No checkpoints but those of the two ends.
    platform.apply(tiny("patient", steps=steps, checkpoint_steps=steps + 1, batch_size=64))

    platform.until_step("patient", attempt=1, step=6)
    platform.kubectl("patch", "ftj", "patient", "--type=merge", "-p", _suspend(True))
    platform.wait("patient", "Suspended", 200)
    platform.until("its pods are removed", lambda: not platform.pods("patient"), 120)
    platform.kubectl("patch", "ftj", "patient", "--type=merge", "-p", _suspend(False))

    stopped_at = platform.status("patient")["attempts"][0]["lastStep"]
    platform.until_step("patient", attempt=2, step=stopped_at + 3)
    for pod in platform.pods("patient", role="worker"):
        platform.kubectl("delete", "pod", pod, "--wait=false")  # as `kubectl drain` does
    platform.wait("patient", "Succeeded")

    first, second, third = platform.status("patient")["attempts"]
    sys.stdout.write(json.dumps([first, second, third], indent=2))
    assert [first["reason"], second["reason"], third["reason"]] == [
        "Suspended",
        "Preempted",
        "Succeeded",
    ]
    assert first["stepsLost"] == 0
    assert second["stepsLost"] == 0


def _suspend(suspend: bool) -> str:
    return json.dumps({"spec": {"runPolicy": {"suspend": suspend}}})
