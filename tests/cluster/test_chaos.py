"""Jobs in real pods keep every invariant under random faults.

`make chaos LEVEL=cluster RUNS=14 SEED=7` plays more runs than the two of `make test`; seven runs in
a row have every kind of fault once.
"""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.chaos import node
from tests.cluster.conftest import Platform
from tests.cluster.jobs import tiny

RUNS = int(os.environ.get("TUNEYARD_CHAOS_RUNS", "2"))
SEED = int(os.environ.get("TUNEYARD_CHAOS_SEED", "11"))
FIRST = int(os.environ.get("TUNEYARD_CHAOS_FIRST", "0"))
PARALLEL = int(os.environ.get("TUNEYARD_CHAOS_PARALLEL", "3"))
RESULTS = os.environ.get("TUNEYARD_CHAOS_RESULTS")
CALM = "chaos-calm"


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(900 + 300 * RUNS)
def test_jobs_in_pods_under_random_faults_end_as_if_undisturbed(
    platform: Platform, capsys: pytest.CaptureFixture[str]
) -> None:
    platform.run("tiny", (Path(__file__).parent / "tiny_model.py").read_text())
    runs = [node.draw(SEED, index) for index in range(FIRST, FIRST + RUNS)]
    platform.apply(tiny(CALM, steps=node.STEPS, checkpoint_steps=node.CHECKPOINT_STEPS))
    lines: list[dict[str, Any]] = []

    def play(run: node.Run) -> None:
        began = time.monotonic()
        line: dict[str, Any] = {"seed": SEED, "run": run.name, "fault": run.fault, "step": run.step}
        try:
            line["attempts"] = node.play(platform, run)
            line["broken"] = []
        except Exception as error:
            line["broken"] = [f"{type(error).__name__}: {error}"]
        line["seconds"] = round(time.monotonic() - began)
        lines.append(line)
        with capsys.disabled():
            print(f"\n{json.dumps(line)}", end="", flush=True)

    with node.watched(platform) as doubled, ThreadPoolExecutor(PARALLEL) as pool:
        list(pool.map(play, runs))
        platform.wait(CALM, "Succeeded")
    measured = json.loads(platform.run("measured", node.MEASURE).strip().splitlines()[-1])
    for run, line in ((run, line) for run in runs for line in lines if line["run"] == run.name):
        if not line["broken"]:
            status = platform.status(run.name)
            ends = node.KINDS[run.fault].ends
            found = measured[run.name], measured[CALM]
            line["broken"] += node.violations(status, *found, run, ends)
        line["broken"] += [f"{name} has two RayJobs" for name in doubled if name == run.name]
        line["broken"] += node.remove(platform, run.name)
        if RESULTS:
            with Path(RESULTS).open("a", encoding="utf-8") as results:
                results.write(json.dumps(line) + "\n")
    assert [*node.remove(platform, CALM)] == []
    assert [line for line in lines if line["broken"]] == []
