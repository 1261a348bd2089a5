"""From `kubectl apply` to a tuned model, on a real node with KubeRay and real pods."""

from __future__ import annotations

import json
import sys

import pytest

from tests.cluster.conftest import Platform
from tests.cluster.jobs import quickstart

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1200)]

LOADS = """
import json
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base = AutoModelForCausalLM.from_pretrained("/models/whole/result/model")
tokenizer = AutoTokenizer.from_pretrained("/models/whole/result/model")
ids = tokenizer("Hello", return_tensors="pt")
print(json.dumps({"logits": list(base(**ids).logits.shape), "ids": ids["input_ids"].shape[1]}))
"""

STRANGER = """
import json, os, sys, urllib.error, urllib.request
def code(path, body=None, token=None):
    headers = {"Content-Type": "application/json"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    data = json.dumps(body).encode() if body else None
    url = f"http://HEAD:8265{path}"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=30) as got:
            return got.status
    except urllib.error.HTTPError as error:
        return error.code
print(code("/api/jobs/"), code("/api/jobs/", {"entrypoint": "id"}), code("/api/jobs/", token="x"))
"""
"""List and submit Ray jobs without a token, and list them with a wrong one."""


def test_an_applied_manifest_becomes_a_tuned_model(platform: Platform) -> None:
    job = quickstart("whole", steps=40, output={"uri": "pvc://models/whole", "merge": True})
    platform.apply(job)

    shown = [_shown_beyond(platform, 0)]
    (cluster,) = platform.items("rayclusters")
    head = cluster["status"]["head"]["serviceName"]
    codes = platform.run("stranger", STRANGER.replace("HEAD", head)).split()
    assert codes == ["401", "401", "403"], "another pod of the namespace can submit nothing"
    while len(shown) < 3:
        shown.append(_shown_beyond(platform, _progress(shown[-1])))
    platform.wait("whole", "Succeeded")
    sys.stdout.write("\n".join([*shown, platform.kubectl("get", "ftj", "whole")]))
    assert [_progress(text) < 100 for text in shown] == [True] * 3, "it was seen at work"

    status = platform.status("whole")
    assert [stage["state"] for stage in status["stages"]] == ["Succeeded"] * 4
    assert status["result"]["digest"].startswith("sha256:")
    assert status["result"]["metrics"]["lossReduction"] > 0.3
    (attempt,) = status["attempts"]
    assert attempt["reason"] == "Succeeded"

    platform.until("the cluster is removed", lambda: not platform.items("rayclusters"), 120)
    platform.until("its RayJob too", lambda: not platform.items("rayjobs"), 30)
    platform.until("the pods are removed", lambda: not platform.pods("whole"), 120)
    assert _event_reasons(platform, "whole") == [
        *("AttemptStarted", "Running"),
        *("StageSucceeded", "StageSucceeded", "StageSucceeded", "StageSucceeded"),
        "Succeeded",
    ]

    loaded = json.loads(platform.run("loads", LOADS).strip().splitlines()[-1])
    assert loaded["logits"][:2] == [1, loaded["ids"]]


def _shown_beyond(platform: Platform, percentage: int) -> str:
    """Return the output of `kubectl get ftj` once the progress exceeds `percentage`."""

    def shown() -> str:
        progress = platform.status("whole").get("progress") or {}
        return platform.kubectl("get", "ftj", "whole") if "percentage" in progress else ""

    return str(
        platform.until(
            f"the job is beyond {percentage}%",
            lambda: (text := shown()) and _progress(text) > percentage and text,
            480,
        )
    )


def _progress(text: str) -> int:
    """Return the column `Progress%` of `kubectl get ftj`."""
    heading, row = text.splitlines()
    start = heading.index("PROGRESS%")
    return int(row[start:].split()[0])


def _event_reasons(platform: Platform, job: str) -> list[str]:
    """Return the reasons of the job's events in order of time; within a second they are sorted."""
    order = ["AttemptStarted", "Running", "StageSucceeded", "Succeeded"]
    events = [
        (event["firstTimestamp"], event["reason"])
        for event in platform.items("events")
        if event["involvedObject"]["name"] == job
        and event["involvedObject"]["kind"] == "FineTuneJob"
    ]
    return [reason for _, reason in sorted(events, key=lambda e: (e[0], order.index(e[1])))]
