"""The status server over TLS with real tokens: authentication, refusals and status writes."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest

from tests.controller.faults import Answer, on
from tests.controller.scene import (
    INTERRUPTED,
    SUCCEEDED,
    Attempt,
    Driver,
    Job,
    OperatedScene,
    consistently,
    eventually,
    outcome,
    post,
)
from tests.planning.models import facts as model_facts
from tuneyard.api.progress import MAX_POST_BYTES

pytestmark = pytest.mark.apiserver


@dataclass
class Pair:
    """Two running jobs, both at attempt 1."""

    job: Job
    attempt: Attempt
    other: Attempt


@pytest.fixture(scope="module")
def pair(module_scene: OperatedScene) -> Pair:
    job, other = module_scene.create("mine"), module_scene.create("theirs")
    return Pair(job, job.attempt(1).run(), other.attempt(1).run())


def with_token(attempt: Attempt, token: str) -> Driver:
    given = attempt.environment
    return Driver(given["TUNEYARD_PROGRESS_URL"], given["TUNEYARD_CA"], token, attempt.number)


def is_refused(driver: Driver, status: int, job: Job) -> str:
    """Assert that a post is refused and nothing is written; return the message."""
    version = job.version
    answer = driver.post(99)
    assert answer.status == status
    consistently(lambda: job.version == version, 0.5)
    message: str = answer.body["message"]
    return message


# ---- authentication -----------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["", "garbage", "a.b.c"])
def test_a_post_without_a_token_of_the_cluster_is_refused(
    scene: OperatedScene, pair: Pair, token: str
) -> None:
    is_refused(with_token(pair.attempt, token), 401, pair.job)


def test_a_scheme_other_than_bearer_is_refused(scene: OperatedScene, pair: Pair) -> None:
    driver = pair.attempt.driver()
    basic = {"Authorization": f"Basic {driver.token}"}
    assert Driver.send(with_token(pair.attempt, ""), post(1), **basic).status == 401


def test_a_token_for_the_api_server_is_refused(scene: OperatedScene, pair: Pair) -> None:
    token = scene.token_of(pair.attempt.head, "https://kubernetes.default.svc.cluster.local")
    is_refused(with_token(pair.attempt, token), 401, pair.job)


def test_another_jobs_token_cannot_write_this_jobs_progress(
    scene: OperatedScene, pair: Pair
) -> None:
    token = scene.token_of(pair.other.head, pair.other.audience)
    message = is_refused(with_token(pair.attempt, token), 401, pair.job)
    assert pair.attempt.audience in message


def test_another_jobs_pod_cannot_write_it_even_with_the_right_audience(
    scene: OperatedScene, pair: Pair
) -> None:
    """The owner of a pod may request a token of any audience."""
    token = scene.token_of(pair.other.head, pair.attempt.audience)
    message = is_refused(with_token(pair.attempt, token), 403, pair.job)
    assert "no pod with label tuneyard.io/job=mine" in message


def test_a_token_without_a_pod_is_refused(scene: OperatedScene, pair: Pair) -> None:
    token = scene.token("default", pair.attempt.audience)
    is_refused(with_token(pair.attempt, token), 403, pair.job)


def test_a_token_of_another_namespace_is_refused(scene: OperatedScene, pair: Pair) -> None:
    """Even if its pod has this job's name and labels."""
    name = f"{scene.namespace}-elsewhere"
    scene.cluster.kubectl("create", "namespace", name)
    try:
        template = pair.attempt.body["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
        metadata = {"name": pair.attempt.head, "labels": template["metadata"]["labels"]}
        elsewhere = OperatedScene(
            scene.cluster, name, scene.kubeconfig, proxy=scene.proxy, operator=scene.operator
        )
        account = f"/api/v1/namespaces/{name}/serviceaccounts/default"
        pair.job.until(lambda _: scene.api.find(account))
        elsewhere.create_object("pods", {"metadata": metadata, "spec": template["spec"]})
        token = elsewhere.token_of(pair.attempt.head, pair.attempt.audience)
        message = is_refused(with_token(pair.attempt, token), 403, pair.job)
        assert scene.namespace in message
    finally:
        scene.cluster.kubectl("delete", "namespace", name, "--wait=false")


def test_a_token_of_a_deleted_pod_is_refused(scene: OperatedScene) -> None:
    attempt = scene.create("ghost").attempt(1).run()
    driver = attempt.driver()
    attempt.remove_pod(attempt.head)
    assert driver.post(1).status == 401


def test_a_token_is_reviewed_once_a_minute_and_not_for_every_post(
    scene: OperatedScene, pair: Pair
) -> None:
    driver = pair.attempt.driver()
    before = scene.proxy.count("POST", "/tokenreviews$")
    for step in range(1, 6):
        assert driver.post(step).status == 200
    assert scene.proxy.count("POST", "/tokenreviews$") == before + 1


# ---- the body -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"nonsense",
        b"[]",
        {},
        {"trainerStatus": {"progressPercentage": 400}},
        {"trainerStatus": {}, "tuneyard": {"attempt": 0}},
        {"trainerStatus": {}, "tuneyard": {"attempt": 1, "stages": [{"name": "x" * 100}]}},
        b'{"trainerStatus": {"metrics": [{"name": "loss", "value": 1e999}]}}\xff',
    ],
    ids=["empty", "no JSON", "a list", "nothing", "400%", "attempt 0", "a long name", "no UTF-8"],
)
def test_a_malformed_post_is_refused_with_the_field(
    scene: OperatedScene, pair: Pair, body: Any
) -> None:
    answer = pair.attempt.driver().send(body)
    assert answer.status == 400
    assert answer.body["message"]


def test_a_post_that_is_too_long_is_refused(scene: OperatedScene, pair: Pair) -> None:
    driver = pair.attempt.driver()
    long = post(1, 7, message="m" * MAX_POST_BYTES)
    assert driver.send(long).status == 413
    assert driver.post(7).status == 200


def test_a_post_for_a_missing_job_is_refused(scene: OperatedScene, pair: Pair) -> None:
    driver = pair.attempt.driver()
    driver.url = driver.url.replace("/mine/", "/nobody/")
    assert driver.post(1).status == 401
    driver.url = driver.url.replace("/finetunejobs/", "/pods/")
    assert driver.post(1).status == 404


def test_values_that_are_not_finite_are_left_out_of_the_status(scene: OperatedScene) -> None:
    """JSON has no infinity, so a status with one could not be stored."""
    job = scene.create("infinite")
    driver = job.attempt(1).run().driver()
    odd = [{"name": n, "value": v} for n, v in (("loss", "NaN"), ("x", "inf"), ("lr", "0.5"))]
    body = post(1, 3)
    body["trainerStatus"]["metrics"] = odd
    assert driver.send(body).status == 200
    job.until(lambda job: job.status.get("progress", {}).get("step") == 3)
    assert job.status["progress"]["metrics"] == {"lr": 0.5}


def test_a_post_in_kubeflows_protocol_is_accepted(scene: OperatedScene) -> None:
    job = scene.create("kubeflow")
    driver = job.attempt(1).run().driver()
    metrics = [{"name": "loss", "value": "0.75"}]
    status = {
        "progressPercentage": 45,
        "estimatedRemainingSeconds": 789,
        "metrics": metrics,
        "lastUpdatedTime": "2026-01-23T13:00:00Z",
    }
    assert driver.send({"trainerStatus": status}).status == 200
    job.until(lambda job: job.status.get("progress", {}).get("percentage") == 45)
    progress = job.status["progress"]
    assert (progress["metrics"], progress["estimatedRemainingSeconds"]) == ({"loss": 0.75}, 789)


def test_the_estimate_of_a_job_that_posts_its_facts_is_stored(scene: OperatedScene) -> None:
    job = scene.create("estimated")
    driver = job.attempt(1).run().driver()
    facts = {
        "model": model_facts("8B").model_dump(mode="json", by_alias=True),
        "device": {"gpu": "NVIDIA H100", "memory": 79 << 30},
    }
    cost = {"totalSeconds": 7200, "gpuHours": 2.0, "price": 7.5}
    answer = driver.send(post(1, 1, facts=facts, cost=cost))
    assert answer.status == 200
    assert answer.body["fit"] is not None
    job.until(lambda job: job.status.get("memory"))
    assert job.status["memory"]["device"] == "NVIDIA H100"
    assert job.status["memory"]["stages"][0]["parts"]
    assert job.status["progress"]["cost"] == cost


# ---- attempts -----------------------------------------------------------------------------------


def test_a_stale_attempt_is_asked_to_stop(scene: OperatedScene) -> None:
    """Its pod may still run on a node that does not respond, with a valid token."""
    job = scene.create("stale", policy={"backoffSeconds": 0})
    first = job.attempt(1).run()
    old = first.driver()
    assert old.post(10).status == 200
    first.end(outcome("Failed", "Flaky", retryable=True))
    second = job.attempt(2).run()
    new = second.driver()
    lying = new.send(post(1, 50))
    assert lying.status == 409, "a pod speaks for its own attempt only"
    assert new.post(20).status == 200
    assert old.post(11).status in (401, 409)
    job.until(lambda job: job.status["progress"]["step"] == 20)


def test_a_closed_attempt_may_save_a_checkpoint_while_its_pod_exists(
    scene: OperatedScene,
) -> None:
    job = scene.create("closed", policy={"backoffSeconds": 3600})
    attempt = job.attempt(1).run()
    attempt.hold(attempt.head)
    driver = attempt.driver()
    reported = outcome("Failed", "Flaky", retryable=True)
    assert driver.end(reported, step=9).status == 200
    assert job.reasons == ["Flaky"]
    before = job.status
    assert driver.post(10).body == {"stop": True}
    assert driver.end(reported, step=9).body == {"stop": True}, "the response may have been lost"
    consistently(lambda: job.status == before, 1)
    attempt.let_go(attempt.head)


def test_a_driver_whose_job_was_deleted_is_asked_to_stop_in_order(scene: OperatedScene) -> None:
    """It may save a checkpoint for a new job of this name until its pod is removed."""
    job = scene.create("removed")
    attempt = job.attempt(1).run()
    attempt.hold(attempt.head)
    driver = attempt.driver()
    assert driver.post(8).body == {"stop": False}
    job.delete()
    job.until_gone()
    eventually(lambda: driver.post(9).body == {"stop": True}, context="the watch has reported it")
    assert driver.end(INTERRUPTED, step=9).status == 200
    attempt.let_go(attempt.head)


def test_an_outcome_is_acknowledged_once_it_is_stored(scene: OperatedScene) -> None:
    """It is stored at once, even if progress was written a moment ago."""
    job = scene.create("stored")
    driver = job.attempt(1).run().driver()
    driver.post(1)
    driver.post(2)
    began = time.monotonic()
    assert driver.end(SUCCEEDED).status == 200
    assert job.phase == "Succeeded"
    assert time.monotonic() - began < 9, "it did not wait for the next progress write"


def test_an_outcome_that_cannot_be_stored_is_not_acknowledged(scene: OperatedScene) -> None:
    job = scene.create("unstored")
    driver = job.attempt(1).run().driver()
    scene.proxy.add(Answer(500), on("PATCH", f"{job.path}/status$"), times=None)
    answer = driver.end(SUCCEEDED)
    assert (answer.status, answer.headers["Retry-After"]) == (503, "2")
    assert job.phase == "Running"
    scene.proxy.heal()
    assert driver.end(SUCCEEDED).status == 200
    assert job.phase == "Succeeded"


def test_an_interruption_without_a_stop_request_is_a_preemption(scene: OperatedScene) -> None:
    job = scene.create("evicted", policy={"maxAttempts": 1})
    first = job.attempt(1).run()
    assert first.driver().end(INTERRUPTED).status == 200
    job.attempt(2)
    assert job.reasons == ["Preempted", None]


# ---- the rate of writes -------------------------------------------------------------------------


def test_many_posts_cause_two_writes_and_the_newest_is_kept(scene: OperatedScene) -> None:
    """One write follows the first post, one at most 10 s later; other jobs are not delayed."""
    job = scene.create("storm")
    attempt = job.attempt(1).run()
    driver = attempt.driver()
    before = len(scene.status_writes(job))
    began = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(driver.post, range(1, 101)))
        calm = scene.create("calm")
        calm.attempt(1).run().end(SUCCEEDED)
        calm.until_phase("Succeeded")
    assert {answer.status for answer in answers} == {200}
    assert driver.post(100).status == 200
    job.until(lambda job: job.status.get("progress", {}).get("step") == 100)
    took = time.monotonic() - began
    assert len(scene.status_writes(job)) - before <= 2 + took / 10
    consistently(lambda: len(scene.status_writes(job)) - before <= 2 + took / 10)


def test_a_finished_stage_is_written_at_the_rate_of_progress(scene: OperatedScene) -> None:
    job = scene.create("staged")
    driver = job.attempt(1).run().driver()
    done = {"name": "prepare", "kind": "prepare", "state": "Succeeded", "metrics": {"rows": 12.0}}
    assert driver.post(1, stages=[done]).status == 200
    job.until(lambda job: job.status["stages"][0]["state"] == "Succeeded")
    assert job.status["stages"][0]["metrics"] == {"rows": 12.0}
    job.until(lambda job: job.event_reasons()["StageSucceeded"] == 1)


def test_a_jobs_series_exist_as_long_as_the_job(scene: OperatedScene) -> None:
    job = scene.create("measured")
    driver = job.attempt(1).run().driver()
    driver.post(25, loss=0.5)
    labels = {"namespace": scene.namespace, "kind": "FineTuneJob", "name": "measured"}
    loss, ratio = "tuneyard_training_loss", "tuneyard_training_progress_ratio"
    job.until(lambda _: scene.operator.metric(loss, **labels) == 0.5)
    assert scene.operator.metric(ratio, **labels) == 0.25
    job.delete()
    job.until_gone()
    job.until(lambda _: scene.operator.metric(loss, **labels) is None)
    assert scene.operator.metric(ratio, **labels) is None
