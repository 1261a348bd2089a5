"""A job whose workers have GPUs, on a real node without any: its data are prepared all the same."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from tests.cluster.conftest import Platform
from tests.cluster.jobs import tiny

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]

RECORD = """
import json
with open("/models/prepared/stages/prepare/record.json") as file:
    print(json.dumps(json.load(file)))
"""


def test_the_data_are_prepared_before_a_gpu_is_asked_for(platform: Platform) -> None:
    job = tiny("prepared", steps=2, checkpoint_steps=2)
    compute = {"gpusPerWorker": 1, "cpusPerWorker": "1", "memory": "4Gi"}
    job["spec"]["compute"] = {**job["spec"].get("compute", {}), **compute}
    platform.apply(job)
    platform.until("the Job runs", lambda: "preparingAt" in str(platform.status("prepared")), 240)
    assert platform.items("rayjobs") == []

    def started() -> Any:
        status = platform.status("prepared")
        assert status["phase"] != "Failed", yaml.safe_dump(status)
        return platform.items("rayjobs")

    platform.until("the RayJob exists", started, 240)
    (attempt,) = platform.status("prepared")["attempts"]
    assert attempt["preparedAt"]
    stages = {stage["name"]: stage["state"] for stage in platform.status("prepared")["stages"]}
    assert stages["prepare"] == "Succeeded"
    record = json.loads(platform.run("record", RECORD).strip().splitlines()[-1])
    assert (record["stage"], record["attempt"]) == ("prepare", 1)
    waits = "no node has the GPU"
    platform.until(waits, lambda: "nvidia.com/gpu" in str(platform.status("prepared")), 240)
    platform.kubectl("delete", "ftj", "prepared")
    platform.until("its pods are removed", lambda: not platform.pods("prepared"), 180)
