"""The output of `tuneyard status`: its frozen views, and untrusted text in it."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console, RenderableType

from tests.cli.cluster_jobs import (
    FAILED,
    MEMORY,
    NOW,
    PLANNED,
    RUNNING,
    SUCCEEDED,
    WAITING,
    before,
    condition,
    item,
)
from tests.golden.compare import assert_golden
from tuneyard.cli import jobs, views
from tuneyard.cli.jobs import KINDS, Event, JobView

STATUSES = {"running": RUNNING, "waiting": WAITING, "succeeded": SUCCEEDED, "failed": FAILED}


def job(status: dict[str, Any], **changes: Any) -> JobView:
    return jobs.read_job(KINDS["finetune"], item("FineTuneJob", "support-bot", status, **changes))


def text(shown: RenderableType) -> str:
    out = io.StringIO()
    Console(file=out, width=100, highlight=False, markup=False, emoji=False).print(shown)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def event(reason: str, message: str, *, is_warning: bool = False, count: int = 1) -> Event:
    return Event(jobs.time_of(before(10)), is_warning, reason, message, count)


@pytest.mark.parametrize("name", STATUSES)
def test_the_view_of_one_job_is_frozen(name: str) -> None:
    events = [event("Started", "attempt 1", count=3), event("Failed", "a pod", is_warning=True)]
    assert_golden(f"status/{name}.txt", text(views.job_view(job(STATUSES[name]), events, NOW)))


def test_the_table_of_all_jobs_is_frozen() -> None:
    given = [job(status) for status in STATUSES.values()] + [job({})]
    table = views.jobs_table(given, NOW, with_namespace=True)
    assert_golden("status/jobs.txt", text(table))


def test_a_stage_with_the_files_of_another_job_is_shown_as_reused() -> None:
    prepare, *others = RUNNING["stages"]
    stages = [{**prepare, "state": "Succeeded", "reused": True}, *others]
    shown = text(views.job_view(job({**RUNNING, "stages": stages}), [], NOW))
    assert re.search(r"^ *prepare +reused +", shown, re.MULTILINE), shown


def test_the_measured_peak_stands_beside_the_estimate_and_an_unknown_capacity_is_a_dash() -> None:
    (stage,) = MEMORY["stages"]
    done = {**MEMORY, "stages": [{**stage, "measuredBytes": 39_000_000_000}]}
    shown = text(views.job_view(job({**RUNNING, "memory": done}), [], NOW))
    row = next(line for line in shown.splitlines() if "weights" in line)
    assert row.split()[:7] == ["sft", "37.3", "GiB", "36.3", "GiB", "41.2", "GiB"]
    unknown = {key: value for key, value in MEMORY.items() if key != "capacityBytes"}
    shown = text(views.job_view(job({**RUNNING, "memory": unknown}), [], NOW))
    row = next(line for line in shown.splitlines() if "weights" in line)
    assert row.split()[:5] == ["sft", "37.3", "GiB", views.ABSENT, views.ABSENT]


def test_the_line_names_the_number_of_the_newest_attempt_although_others_were_dropped() -> None:
    first, second = RUNNING["attempts"]
    dropped = {**RUNNING, "attempts": [first, {**second, "number": 102}]}
    assert "attempt 102" in views.line(job(dropped))


def test_a_job_that_was_never_reconciled_has_a_hint() -> None:
    assert "The operator has not reconciled the job yet" in text(views.job_view(job({}), [], NOW))


def test_a_job_with_the_status_of_a_newer_operator_is_still_shown() -> None:
    newer = job({**RUNNING, "stages": [{"name": "x", "kind": "y", "state": "Melting"}]})
    assert newer.status is None
    assert "cannot read the job's status" in text(views.job_view(newer, [], NOW))
    assert "Running" in text(views.jobs_table([newer], NOW, with_namespace=False))


def test_the_phase_shows_a_requested_change_that_has_not_happened_yet() -> None:
    assert views.phase(job(RUNNING, spec__runPolicy={"suspend": True})) == (
        "Running, being suspended"
    )
    assert views.phase(job(RUNNING, spec__runPolicy={"cancel": True})) == "Running, being canceled"
    suspended = {**RUNNING, "phase": "Suspended"}
    assert views.phase(job(suspended)) == "Suspended, being resumed"
    assert views.phase(job(suspended, spec__runPolicy={"suspend": True})) == "Suspended"
    assert views.phase(job(FAILED, spec__runPolicy={"cancel": True})) == "Failed"


def test_a_job_refused_by_the_planner_is_not_finished_once_its_spec_has_changed() -> None:
    refused = {"phase": "Failed", "observedGeneration": 1}
    assert job(refused).is_finished
    assert not job(refused, metadata__generation=2).is_finished
    assert job(FAILED, metadata__generation=2).is_finished


def test_a_line_changes_with_the_step_and_not_with_the_time() -> None:
    later = {**RUNNING, "progress": {**RUNNING["progress"], "lastUpdatedTime": before(0)}}
    further = {**RUNNING, "progress": {**RUNNING["progress"], "step": 431}}
    assert views.line(job(later)) == views.line(job(RUNNING))
    assert views.line(job(further)) != views.line(job(RUNNING))


def test_no_text_of_the_cluster_can_control_the_terminal() -> None:
    untrusted = "a\x1b[2Jb\x07\u202ec\r\nd"
    status = {
        **FAILED,
        "conditions": [condition("Failed", "True", "Untrusted", untrusted)],
        "failure": {"reason": "Untrusted", "message": untrusted, "advice": untrusted},
        "attempts": [{**FAILED["attempts"][0], "message": untrusted, "stage": untrusted}],
        "stages": [
            {"name": untrusted, "kind": "sft", "state": "Pending", "metrics": {untrusted: 1.0}}
        ],
    }
    shown = text(views.job_view(job(status), [event(untrusted, untrusted)], NOW)) + views.line(
        job(status)
    )
    assert not set("\x1b\x07\u202e\r") & set(shown)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (-3, "0 s"),
        (0, "0 s"),
        (59.6, "1 min"),
        (3600, "1 h"),
        (3661, "1 h 1 min"),
        (90061, "1 d 1 h"),
    ],
)
def test_durations_have_at_most_two_units(seconds: float, shown: str) -> None:
    assert views.duration(seconds) == shown


def test_a_pods_role_and_state_are_read_from_its_json() -> None:
    labels = {"tuneyard.io/attempt": "2"}
    driver = {
        "metadata": {"name": "a-2-x", "uid": "1", "creationTimestamp": "t", "labels": labels},
        "spec": {"containers": [{"name": "istio"}, {"name": "ray-job-submitter"}]},
        "status": {
            "containerStatuses": [
                {"name": "istio", "state": {"running": {}}},
                {"name": "ray-job-submitter", "state": {"waiting": {"reason": "ErrImagePull"}}},
            ]
        },
    }
    pod = jobs.read_pod(driver)
    assert (pod.role, pod.attempt, pod.container) == ("driver", 2, "ray-job-submitter")
    assert (pod.started, pod.start_problem) == (False, "ErrImagePull")
    erase = {**driver, "metadata": {**driver["metadata"], "name": "a-erase-x7x", "labels": {}}}
    assert jobs.read_pod(erase).role == "erase"
    assert jobs.pods_of([pod, jobs.read_pod(erase)], "driver", None) == [pod]


def test_a_status_without_details_is_shown_without_tables() -> None:
    assert text(views.job_view(job({**PLANNED, "phase": "Pending"}), [], NOW)).count("\n") == 1
