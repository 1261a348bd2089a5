"""The job cache when the operator's own writes and its watches report the same object."""

from __future__ import annotations

from typing import Any

from tuneyard.api.status import AttemptStatus
from tuneyard.controller.cluster import Key
from tuneyard.controller.job_cache import JobCache, key_from_labels

KEY = Key("FineTuneJob", "team", "job")


def ray_job(version: int, **status: Any) -> dict[str, Any]:
    labels = {"tuneyard.io/attempt": "1"}
    metadata = {"name": "job-1", "uid": "u", "resourceVersion": str(version), "labels": labels}
    return {"kind": "RayJob", "metadata": metadata, "status": status}


def job_status(cache: JobCache) -> str:
    ((_, found),) = cache.job(KEY).ray_jobs.values()
    return found.job_status


def test_the_response_to_an_apply_does_not_replace_a_status_from_a_watch() -> None:
    """A restarted operator applies the RayJob again; the response may come after the watch
    event."""
    cache = JobCache()
    cache.update_ray_job(KEY, ray_job(7, jobStatus="RUNNING"), deleted=False)
    cache.add_created(KEY, ray_job(7))
    assert job_status(cache) == "RUNNING"


def test_a_created_ray_job_is_known_before_its_watch_event_which_then_replaces_it() -> None:
    cache = JobCache()
    cache.add_created(KEY, ray_job(7))
    assert job_status(cache) == ""
    assert cache.update_ray_job(KEY, ray_job(7, jobStatus="RUNNING"), deleted=False)
    assert job_status(cache) == "RUNNING"


def test_a_failed_pod_that_is_first_observed_at_its_deletion_is_kept_and_reported() -> None:
    cache = JobCache()
    ended = {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}
    pod = ray_job(9, containerStatuses=[{"name": "ray-worker", "state": ended}])
    assert cache.update_pod(KEY, pod, deleted=True)
    assert [each.reason for each in cache.job(KEY).deleted_pods["job-1"].problems] == ["OOMKilled"]


def test_labels_that_name_no_kind_of_job_name_no_job() -> None:
    """The operator would look for a resource that does not exist, again and again."""

    def labeled(kind: str) -> dict[str, Any]:
        labels = {"tuneyard.io/kind": kind, "tuneyard.io/job": "job"}
        return {"metadata": {"name": "pod", "namespace": "team", "labels": labels}}

    assert key_from_labels(labeled("FineTuneJob")) == KEY
    assert key_from_labels(labeled("Secret")) is None


def test_while_data_are_prepared_the_job_is_awaited_and_not_the_ray_job() -> None:
    cache = JobCache()
    cached = cache.job(KEY)
    cached.uid = "j"
    owner = {"uid": "j", "controller": True}
    job = ray_job(7) | {"kind": "Job"}
    job["metadata"] |= {"name": "job-1-prepare", "ownerReferences": [owner]}
    cache.add_created(KEY, job)
    waits = {"type": "QuotaReserved", "status": "False", "message": "no CPUs are left"}
    cache.update_workload(KEY, "u", {"status": {"conditions": [waits]}}, deleted=False)
    attempt = AttemptStatus(
        number=1, ray_job="job-1", started_at="", prepare_job="job-1-prepare", prepare_job_uid="u"
    )
    state = cached.observed_state(attempt)
    assert state.missing_seconds == 0.0
    assert cached.missing_since is None
    assert state.workload is not None
    assert state.workload.message == "no CPUs are left"
    cache.update_preparation(KEY, job, deleted=True)
    cached.observed_state(attempt)
    assert cached.missing_since is not None
