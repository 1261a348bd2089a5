"""Jobs in real pods keep every invariant under random faults.

The two runs of `make test` kill a worker and a head. `make chaos LEVEL=cluster RUNS=14 SEED=7`
plays more; seven runs in a row, from a multiple of seven on, have every kind of fault once.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.chaos import node
from tests.chaos.results import Verdict, append, table
from tests.cluster.conftest import Object, Platform
from tests.cluster.jobs import tiny

RUNS = int(os.environ.get("TUNEYARD_CHAOS_RUNS", "2"))
SEED = int(os.environ.get("TUNEYARD_CHAOS_SEED", "4"))
FIRST = int(os.environ.get("TUNEYARD_CHAOS_FIRST", "0"))
PARALLEL = int(os.environ.get("TUNEYARD_CHAOS_PARALLEL", "1"))
"""A node with two cores has room for one worker: with less than a core, Ray's probes fail."""
RESULTS = os.environ.get("TUNEYARD_CHAOS_RESULTS")
CALM = "chaos-calm"


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(1200 + 300 * RUNS)
def test_jobs_in_pods_under_random_faults_end_as_if_undisturbed(
    platform: Platform, capsys: pytest.CaptureFixture[str]
) -> None:
    verdicts = []
    runs = [node.draw(SEED, index) for index in range(FIRST, FIRST + RUNS)]
    with node.watched(platform) as doubled, ThreadPoolExecutor(PARALLEL) as pool:
        calm = pool.submit(_reference, platform)
        for verdict in pool.map(lambda run: _played(platform, run, calm, doubled), runs):
            verdicts.append(verdict)
            with capsys.disabled():
                print(f"\n{verdict}", end="", flush=True)
            if RESULTS:
                append(Path(RESULTS), verdict)
    with capsys.disabled():
        print(f"\n\n{table(verdicts)}")
    assert [*node.remove(platform, CALM)] == []
    assert [str(verdict) for verdict in verdicts if verdict.broken] == []


def _reference(platform: Platform) -> Object:
    """Return the weights and the training curve of an undisturbed run."""
    platform.apply(tiny(CALM, steps=node.STEPS, checkpoint_steps=node.CHECKPOINT_STEPS))
    platform.wait(CALM, "Succeeded", node.PATIENCE_SECONDS)
    return _measured(platform, CALM)


def _played(platform: Platform, run: node.Run, calm: Future[Object], doubled: list[str]) -> Verdict:
    began, at = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    verdict = Verdict(run.seed, run.index, at, [f"{run.fault}@{run.step}"])
    try:
        verdict.broken += _broken(platform, run, calm, verdict)
    except Exception as error:
        verdict.broken.append(f"{type(error).__name__}: {error}"[:2000])
    verdict.broken += [f"{name} had two RayJobs" for name in {*doubled} if name == run.name]
    verdict.seconds = round(time.monotonic() - began, 1)
    return verdict


def _broken(
    platform: Platform, run: node.Run, calm: Future[Object], verdict: Verdict
) -> Iterator[str]:
    status = node.play(platform, run)
    verdict.attempts = [attempt["reason"] for attempt in status["attempts"]]
    verdict.started = len(verdict.attempts)
    if node.KINDS[run.fault].ends and verdict.started == 1:  # the attempt ended before the pod
        verdict.missed, verdict.struck = verdict.struck, []
    yield from node.violations(status, _measured(platform, run.name), calm.result(), run)
    yield from node.remove(platform, run.name)


def _measured(platform: Platform, name: str) -> Object:
    """Return the weights' digest and the steps of the training curve."""
    output: Object = json.loads(platform.run(f"of-{name}", node.measure(name)).splitlines()[-1])
    return output


def test_seven_runs_have_every_kind_of_fault_once() -> None:
    runs = [node.draw(3, index) for index in range(7, 14)]
    assert {run.fault for run in runs} == {*node.KINDS}
    assert runs == [node.draw(3, index) for index in range(7, 14)]
