"""Jobs under random faults keep every invariant.

`make chaos LEVEL=apiserver RUNS=200 SEED=7` plays more runs than the handful of `make test`; run
number n of a seed always has the same faults.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.chaos.faults import KINDS, draw
from tests.chaos.results import append, table
from tests.chaos.run import ground, play_all
from tests.controller.scene import CRDS

if TYPE_CHECKING:
    from rig.plugin import Cluster

RUNS = int(os.environ.get("TUNEYARD_CHAOS_RUNS", "6"))
SEED = int(os.environ.get("TUNEYARD_CHAOS_SEED", "11"))
FIRST = int(os.environ.get("TUNEYARD_CHAOS_FIRST", "0"))
PARALLEL = int(os.environ.get("TUNEYARD_CHAOS_PARALLEL", "3"))
RESULTS = os.environ.get("TUNEYARD_CHAOS_RESULTS")
"""A file to which each run appends a line of JSON."""
LOGS = os.environ.get("TUNEYARD_CHAOS_LOGS")
"""A new folder that keeps the logs of all processes."""


@pytest.mark.apiserver
@pytest.mark.slow
@pytest.mark.timeout(600 + 60 * RUNS)
def test_jobs_under_random_faults_end_as_if_undisturbed(
    apiserver: Cluster, helm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    apiserver.define(CRDS)
    verdicts = []
    try:
        with ground(apiserver, helm, tmp_path) as prepared:
            for verdict in play_all(prepared, SEED, range(FIRST, FIRST + RUNS), PARALLEL):
                verdicts.append(verdict)
                with capsys.disabled():
                    print(f"\n{verdict}", end="", flush=True)
                if RESULTS:
                    append(Path(RESULTS), verdict)
    finally:
        if LOGS:
            shutil.copytree(tmp_path, LOGS, ignore=shutil.ignore_patterns("*.socket"))
    with capsys.disabled():
        print(f"\n\n{table(verdicts)}")
    assert [str(verdict) for verdict in verdicts if verdict.broken] == []


def test_a_seed_always_draws_the_same_faults_and_in_time_every_kind() -> None:
    assert draw(3, 5) == draw(3, 5) != draw(3, 6)
    assert {fault.name for index in range(200) for fault in draw(3, index)} == set(KINDS)
