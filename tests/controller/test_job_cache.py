"""What the operator believes when its own writes and its watches tell of the same thing."""

from __future__ import annotations

from typing import Any

from tuneyard.controller.cluster import Key
from tuneyard.controller.job_cache import JobCache

KEY = Key("FineTuneJob", "team", "job")


def ray_job(version: int, **status: Any) -> dict[str, Any]:
    labels = {"tuneyard.io/attempt": "1"}
    metadata = {"name": "job-1", "uid": "u", "resourceVersion": str(version), "labels": labels}
    return {"metadata": metadata, "status": status}


def job_status(cache: JobCache) -> str:
    ((_, found),) = cache.job(KEY).ray_jobs.values()
    return found.job_status


def test_an_answer_to_an_apply_that_changed_nothing_hides_no_status_that_a_watch_told() -> None:
    """A restarted operator applies the RayJob again; the answer may come after the watch's word."""
    cache = JobCache()
    cache.update_ray_job(KEY, ray_job(7, jobStatus="RUNNING"), deleted=False)
    cache.add_created_ray_job(KEY, ray_job(7))
    assert job_status(cache) == "RUNNING"


def test_what_was_just_created_is_known_before_a_watch_tells_and_then_the_watch_is_believed() -> (
    None
):
    cache = JobCache()
    cache.add_created_ray_job(KEY, ray_job(7))
    assert job_status(cache) == ""
    assert cache.update_ray_job(KEY, ray_job(7, jobStatus="RUNNING"), deleted=False)
    assert job_status(cache) == "RUNNING"


def test_a_pod_that_ended_badly_before_it_was_ever_noticed_is_evidence_and_news() -> None:
    cache = JobCache()
    ended = {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}
    pod = ray_job(9, containerStatuses=[{"name": "ray-worker", "state": ended}])
    assert cache.update_pod(KEY, pod, deleted=True)
    assert [each.reason for each in cache.job(KEY).deleted_pods["job-1"].problems] == ["OOMKilled"]
