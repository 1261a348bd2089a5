"""SFT, reward model and PPO in one AlignmentJob that is killed between two of its stages."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import pytest

from tests.cluster.conftest import Platform
from tests.cluster.jobs import pipeline

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]

JOB = "four-steps"
BEFORE, AFTER = ["prepare", "sft", "pairs", "reward"], ["ppo", "evaluate", "export"]
"""The stages on both sides of the kill."""
DONE = ("Succeeded", "Skipped")

CUT = """
import os, pathlib, signal, sys, time
signal.alarm(240)
while not pathlib.Path(sys.argv[1]).exists():
    time.sleep(0.005)
os.kill(-1, signal.SIGKILL)  # every process of the pod
"""
"""Wait in a pod for a stage's record and end the pod at once, early in the next stage."""

RECORDS = """
import json, pathlib
paths = pathlib.Path("/models/four-steps").glob("**/record.json")
records = [json.loads(path.read_text()) for path in paths]
kept = ("attempt", "startedAt", "finishedAt", "digest")
print(json.dumps({record["stage"]: {name: record[name] for name in kept} for record in records}))
"""


def test_a_pipeline_that_is_killed_between_two_stages_continues_at_the_next_one(
    platform: Platform,
) -> None:
    platform = replace(platform, kind="aj")
    platform.apply(pipeline(JOB))

    _kill_worker(platform, after="reward")
    between = platform.until("a second attempt", lambda: _second_attempt(platform), 120)
    sys.stdout.write(json.dumps(between["stages"], indent=2))
    assert [stage["name"] for stage in between["stages"]] == [*BEFORE, *AFTER]
    assert {stage["state"] for stage in between["stages"][:3]} == {"Succeeded"}
    assert {stage["state"] for stage in between["stages"][4:]} == {"Pending"}
    status = platform.until("an end", lambda: _ended(platform), 300)
    sys.stdout.write(json.dumps(status["attempts"], indent=2))
    assert status["phase"] == "Succeeded", status["failure"]
    first, second = status["attempts"]
    assert first["reason"] == "WorkerDied"
    assert second["reason"] == "Succeeded"

    records = json.loads(platform.run("records", RECORDS).strip().splitlines()[-1])
    assert [records[name]["attempt"] for name in BEFORE] == [1] * 4, "none was done again"
    assert [records[name]["attempt"] for name in AFTER] == [2] * 3
    for stage in status["stages"]:
        record = records[stage["name"]]
        assert stage["state"] in DONE
        assert {name: stage[name] for name in ("startedAt", "finishedAt", "digest")} == {
            name: record[name] for name in ("startedAt", "finishedAt", "digest")
        }
    assert {"reward", "rewardGain", "kl"} <= status["result"]["metrics"].keys()


def _kill_worker(platform: Platform, *, after: str) -> None:
    """End the job's worker as soon as the record of this stage exists."""

    def running() -> list[str]:
        pods = platform.items("pods", f"tuneyard.io/job={JOB},ray.io/node-type=worker")
        return [pod["metadata"]["name"] for pod in pods if pod["status"]["phase"] == "Running"]

    (pod,) = platform.until(f"the worker of {JOB} runs", running, 120)
    record = f"/mnt/pvc/models/{JOB}/stages/{after}/record.json"
    platform.cluster.kubectl(
        *("-n", platform.namespace, "exec", pod, "-c", "ray-worker", "--"),
        *("python", "-c", CUT, record),
        check=False,  # it ends with its pod
    )


def _ended(platform: Platform) -> dict[str, Any] | None:
    """Return the final status of the job; None: it has not ended."""
    status = platform.status(JOB)
    return status if status["phase"] in ("Succeeded", "Failed") else None


def _second_attempt(platform: Platform) -> dict[str, Any] | None:
    """Return the status once it has a second attempt; None: not yet."""
    status = platform.status(JOB)
    assert "failure" not in status, status
    return status if len(status.get("attempts") or []) > 1 else None
