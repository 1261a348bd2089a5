"""The reasons of ended and waiting attempts, from the JSON of Kubernetes and KubeRay."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.planning.jobs import job as golden_job
from tests.status.simulation import INTERRUPTED, failed
from tuneyard.api.pods import OUTCOME_PREFIX
from tuneyard.api.progress import Outcome
from tuneyard.planning.plan import plan_job
from tuneyard.rendering.placement import placed
from tuneyard.rendering.rayjob import render
from tuneyard.status import observed, reasons
from tuneyard.status.observed import CreateError, ObservedState, Pod, RayJob, Workload
from tuneyard.status.reasons import Cause

Object = dict[str, Any]
LABELS = {"tuneyard.io/job": "bot", "tuneyard.io/kind": "FineTuneJob", "tuneyard.io/attempt": "2"}
START = "2030-01-01T00:00:00Z"


def ray_job(**status: Any) -> observed.RayJob:
    owner = {"kind": "FineTuneJob", "name": "bot", "uid": "job-uid", "controller": True}
    return observed.ray_job(
        {
            "metadata": {
                "name": "bot-2",
                "uid": "ray-uid",
                "labels": LABELS,
                "ownerReferences": [owner],
            },
            "spec": {"suspend": False},
            "status": {
                "jobId": "bot-2-x7k2p",
                "rayClusterName": "bot-2-l9d4c",
                "startTime": START,
                "jobDeploymentStatus": "Running",
                "jobStatus": "RUNNING",
                "failed": 0,
                "succeeded": 0,
                "rayClusterStatus": {"desiredCPU": "5", "head": {}},
                **status,
            },
        }
    )


def pod_json(role: str = "worker", attempt: str = "2", **status: Any) -> Object:
    labels = {**LABELS, "tuneyard.io/attempt": attempt, "ray.io/node-type": role}
    return {"metadata": {"name": f"bot-2-l9d4c-{role}", "labels": labels}, "status": status}


def pod(role: str = "worker", attempt: str = "2", **status: Any) -> Pod:
    return observed.pod(pod_json(role, attempt, **status))


def container(name: str = "ray-worker", **state: Any) -> Object:
    return {"containerStatuses": [{"name": name, "ready": False, "state": state}]}


def terminated(reason: str, code: int, role: str = "worker", **more: Any) -> Pod:
    ended = {"reason": reason, "exitCode": code, "finishedAt": START, **more}
    return pod(role, phase="Failed", **container(f"ray-{role}", terminated=ended))


OOM = terminated("OOMKilled", 137)
PREEMPTED = pod(
    phase="Running",
    conditions=[
        {"type": "PodScheduled", "status": "True"},
        {
            "type": "DisruptionTarget",
            "status": "True",
            "reason": "PreemptionByScheduler",
            "message": "default-scheduler: preempting to accommodate a higher priority pod",
        },
    ],
)
EVICTED = pod(
    phase="Failed",
    reason="Evicted",
    message="The node was low on resource: memory. Threshold quantity: 100Mi, available: 60Mi.",
    conditions=[
        {
            "type": "DisruptionTarget",
            "status": "True",
            "reason": "TerminationByKubelet",
            "message": "The node was low on resource: memory.",
        }
    ],
)
SHUT_DOWN = pod(
    phase="Failed",
    reason="Terminated",
    message="Pod was terminated in response to imminent node shutdown.",
)
FAILED = ray_job(jobStatus="FAILED", jobDeploymentStatus="Failed", reason="AppFailed")


# ---- the observed state -------------------------------------------------------------------------


class TestReading:
    def test_a_ray_job(self) -> None:
        read = ray_job()
        assert (read.name, read.uid, read.attempt, read.owner) == ("bot-2", "ray-uid", 2, "job-uid")
        assert (read.running, read.ended, read.evicted_by_queue, read.deleting) == (
            True,
            False,
            False,
            False,
        )
        assert (read.cluster, read.start_time, read.cluster_failure) == ("bot-2-l9d4c", START, "")

    def test_a_ray_job_without_a_status(self) -> None:
        read = observed.ray_job({"metadata": {"name": "bot-2", "uid": "u"}})
        assert (read.attempt, read.owner, read.running, read.ended) == (0, None, False, False)

    @pytest.mark.parametrize(
        ("status", "ended"),
        [
            ({"jobStatus": "PENDING"}, False),
            ({"jobStatus": "RUNNING"}, False),
            ({"jobStatus": "SUCCEEDED"}, True),
            ({"jobStatus": "FAILED", "jobDeploymentStatus": "Running"}, True),
            ({"jobStatus": "", "jobDeploymentStatus": "Failed"}, True),
            ({"jobStatus": "", "jobDeploymentStatus": "ValidationFailed"}, True),
            ({"jobStatus": "", "jobDeploymentStatus": "Suspended"}, False),
        ],
    )
    def test_when_a_ray_job_ended(self, status: Object, ended: bool) -> None:
        assert ray_job(**status).ended is ended

    @pytest.mark.parametrize("state", ["Suspending", "Suspended"])
    def test_a_ray_job_that_a_queue_evicted(self, state: str) -> None:
        assert ray_job(jobDeploymentStatus=state).evicted_by_queue

    def test_the_roles_of_pods(self) -> None:
        job = {**LABELS, "job-name": "bot-2"}
        shared = {"tuneyard.io/job": "eraser"}
        submitter = observed.pod({"metadata": {"name": "eraser-1-x", "labels": job}})
        erase = observed.pod({"metadata": {"name": "eraser-erase-x", "labels": shared}})
        assert [pod("head").role, pod().role] == ["head", "worker"]
        assert [submitter.role, erase.role] == ["submitter", "erase"]

    def test_when_a_pod_got_a_node(self) -> None:
        waits = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
        scheduled = {"type": "PodScheduled", "status": "True", "lastTransitionTime": START}
        assert pod(conditions=[waits]).placed_at is None
        assert pod().placed_at is None, "no scheduler has seen it"
        assert pod(conditions=[scheduled]).placed_at == START

    def test_the_workers_of_a_ray_job_are_those_that_were_rendered(self) -> None:
        job = golden_job("support-bot")
        plan = placed(plan_job(job), profiles={})
        for reduced_to, workers in ((None, (4, 2)), (3, (3, 2))):
            item = render(plan, job, attempt=1, reduced_to=reduced_to).ray_job
            item["metadata"]["uid"] = "u"
            read = observed.ray_job(item)
            assert (read.workers, read.min_workers) == workers

    def test_a_healthy_pod_has_no_problem(self) -> None:
        starting = pod(phase="Pending", **container(waiting={"reason": "ContainerCreating"}))
        done = terminated("Completed", 0)
        assert (starting.problems, done.problems) == ((), ())

    def test_a_kueue_workload(self) -> None:
        reserved = {"type": "QuotaReserved", "status": "False", "message": "insufficient quota"}
        evicted = {"type": "Evicted", "status": "True", "message": "Preempted to accommodate x"}
        item: Object = {"status": {"conditions": [reserved]}}
        assert observed.workload(item) == Workload(False, "insufficient quota")
        item["status"]["conditions"].append(evicted)
        assert observed.workload(item) == Workload(False, "Preempted to accommodate x")
        admitted = {"type": "Admitted", "status": "True"}
        reserved = {"type": "QuotaReserved", "status": "True", "message": "Quota reserved in all"}
        item["status"]["conditions"] = [reserved, admitted, {**evicted, "status": "False"}]
        assert observed.workload(item) == Workload(True, ""), (
            "it says why it waits, and it does not"
        )
        assert observed.workload({}) == Workload(False, "")


# ---- ends ---------------------------------------------------------------------------------------


class TestEnds:
    @pytest.mark.parametrize(
        ("pods", "reason", "retryable"),
        [
            ([OOM], "OutOfMemory", False),
            ([PREEMPTED], "Preempted", True),
            ([EVICTED], "Evicted", True),
            ([SHUT_DOWN], "Preempted", True),
            ([PREEMPTED, EVICTED, OOM], "OutOfMemory", False),
            ([PREEMPTED, EVICTED], "Evicted", True),
            ([terminated("Error", 143)], "WorkerDied", True),
        ],
    )
    def test_kubernetes_explains_a_lost_worker(
        self, pods: list[Pod], reason: str, retryable: bool
    ) -> None:
        outcome = failed("WorkerDied", retryable=True)
        for state in (
            ObservedState(pods=tuple(pods)),
            ObservedState(deleted_pods=tuple(pods)),
        ):
            for order in (
                state,
                replace(
                    state,
                    pods=state.pods[::-1],
                    deleted_pods=state.deleted_pods[::-1],
                ),
            ):
                cause = reasons.of_end(FAILED, order, outcome)
                assert (cause.reason, cause.retryable) == (reason, retryable)

    def test_out_of_memory_names_the_container_the_pod_and_the_field(self) -> None:
        cause = reasons.of_end(FAILED, ObservedState(pods=(OOM,)), None)
        assert "container ray-worker of pod bot-2-l9d4c-worker" in cause.message
        assert "compute.memory" in cause.advice
        head = reasons.of_end(
            FAILED, ObservedState(pods=(terminated("OOMKilled", 137, "head"),)), None
        )
        assert "platform team" in head.advice

    def test_pods_of_other_attempts_and_submitters_are_ignored(self) -> None:
        other = OOM._replace(attempt=1)
        submitter = OOM._replace(role="submitter")
        cause = reasons.of_end(FAILED, ObservedState(pods=(other, submitter)), None)
        assert cause.reason == "DriverError"

    def test_a_driver_that_reports_a_reason_takes_precedence(self) -> None:
        advice = "Lower training.learningRate."
        outcome = failed("LossNotFinite", advice=advice)
        cause = reasons.of_end(FAILED, ObservedState(pods=(OOM, PREEMPTED)), outcome)
        assert cause == Cause("LossNotFinite", "it was LossNotFinite", advice, retryable=False)

    def test_a_newest_attempt_that_was_called_stale_is_retried(self) -> None:
        """An operator before 0.3 that cannot read the job tells its driver so."""
        assert reasons.of_outcome(failed("StaleAttempt")).retryable

    def test_an_interrupted_driver_was_preempted(self) -> None:
        assert reasons.of_outcome(INTERRUPTED).reason == "Preempted"
        interrupted = failed("Preempted").model_copy(update={"state": "Interrupted"})
        assert reasons.of_outcome(interrupted) == Cause(
            "Preempted", "it was Preempted", retryable=True
        )

    @pytest.mark.parametrize(
        ("status", "reason", "retryable"),
        [
            ({"reason": "JobStatusCheckTimeoutExceeded"}, "HeadLost", True),
            (
                {"message": "Submitter completed but Ray job not found in RayCluster."},
                "HeadLost",
                True,
            ),
            ({"reason": "JobDeploymentStatusTransitionGracePeriodExceeded"}, "HeadLost", True),
            (
                {
                    "jobStatus": "RUNNING",
                    "reason": "SubmissionFailed",
                    "message": "Job submission has failed. Reason: BackoffLimitExceeded.",
                },
                "HeadLost",
                True,
            ),
            (
                {
                    "jobStatus": "",
                    "reason": "SubmissionFailed",
                    "message": "Job submission has failed. Reason: BackoffLimitExceeded.",
                },
                "SubmissionFailed",
                True,
            ),
            (
                {
                    "jobStatus": "",
                    "jobDeploymentStatus": "ValidationFailed",
                    "reason": "ValidationFailed",
                    "message": "the RayJob spec is invalid",
                },
                "RayJobRefused",
                False,
            ),
            ({"jobStatus": "STOPPED"}, "Stopped", True),
            ({"jobStatus": "", "reason": "PreRunningDeadlineExceeded"}, "StartTimeout", False),
            ({"message": ""}, "DriverError", True),
        ],
    )
    def test_kuberays_reason_is_the_last_resort(
        self, status: Object, reason: str, retryable: bool
    ) -> None:
        ray = ray_job(**{"jobStatus": "FAILED", "jobDeploymentStatus": "Failed", **status})
        cause = reasons.of_end(ray, ObservedState(), None)
        assert (cause.reason, cause.retryable) == (reason, retryable)

    def test_pods_that_kuberay_deleted_still_explain_why_they_did_not_start(self) -> None:
        unschedulable = {
            "type": "PodScheduled",
            "status": "False",
            "reason": "Unschedulable",
            "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
        }
        deleted = pod(phase="Pending", conditions=[unschedulable])
        ray = ray_job(
            jobStatus="", jobDeploymentStatus="Failed", reason="PreRunningDeadlineExceeded"
        )
        assert (
            reasons.of_end(ray, ObservedState(deleted_pods=(deleted,)), None).reason
            == "Unschedulable"
        )

    def test_only_the_last_line_of_a_log_is_reported(self) -> None:
        log = (
            "Job entrypoint command failed with exit code 1, last available logs (truncated to "
            "20,000 chars):\n" + "Traceback (most recent call last):\n" * 200 + "ValueError: no\n\n"
        )
        ray = ray_job(jobStatus="FAILED", message=log)
        assert reasons.of_end(ray, ObservedState(), None).message == "ValueError: no"
        assert len(ray.message) <= 4096

    def test_a_missing_ray_job_was_deleted_unless_pods_report_another_reason(self) -> None:
        assert reasons.of_missing_ray_job(ObservedState(), 2).reason == "RayJobDeleted"
        assert (
            reasons.of_missing_ray_job(ObservedState(deleted_pods=(PREEMPTED,)), 2).reason
            == "Preempted"
        )
        assert (
            reasons.of_missing_ray_job(ObservedState(deleted_pods=(PREEMPTED,)), 3).reason
            == "RayJobDeleted"
        )


class TestLoggedOutcome:
    def outcome(self, text: str) -> Outcome | None:
        return reasons.logged_outcome(ray_job(jobStatus="FAILED", message=text))

    def test_the_last_outcome_line_counts(self) -> None:
        first, last = failed("First"), failed("Last", retryable=True)
        text = "".join(
            f"some log\nTUNEYARD-OUTCOME {e.model_dump_json(by_alias=True)}\n"
            for e in (first, last)
        )
        assert self.outcome(f"{text}and Ray's own words after it") == last

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "no mark",
            "TUNEYARD-OUTCOME ",
            "TUNEYARD-OUTCOME {",
            'TUNEYARD-OUTCOME {"state": "Odd"}',
            "TUNEYARD-OUTCOME [1]",
            "TUNEYARD-OUTCOME nothing",
        ],
    )
    def test_a_malformed_outcome_is_none(self, text: str) -> None:
        assert self.outcome(text) is None

    def test_without_a_ray_job_there_is_no_outcome(self) -> None:
        assert reasons.logged_outcome(None) is None


# ---- attempts that do not start -----------------------------------------------------------------


def waiting(*pods: Pod, cluster: Object | None = None, warnings: tuple[str, ...] = ()) -> Cause:
    ray = ray_job(jobStatus="", jobDeploymentStatus="Initializing", rayClusterStatus=cluster or {})
    return reasons.of_waiting(ray, ObservedState(pods=pods, warnings=warnings))


def unscheduled(message: str, reason: str = "Unschedulable") -> Pod:
    condition = {"type": "PodScheduled", "status": "False", "reason": reason, "message": message}
    return pod(phase="Pending", conditions=[condition])


def held(reason: str, message: str = "") -> Pod:
    return pod(phase="Pending", **container(waiting={"reason": reason, "message": message}))


class TestWaiting:
    @pytest.mark.parametrize(
        ("found", "reason", "advice"),
        [
            (
                unscheduled("0/3 nodes are available: 3 Insufficient nvidia.com/gpu."),
                "Unschedulable",
                "compute.gpusPerWorker",
            ),
            (
                unscheduled(
                    '0/1 nodes are available: persistentvolumeclaim "models" not found. '
                    "preemption: 0/1 nodes are available: 1 Preemption is not helpful."
                ),
                "VolumeMissing",
                "pvc://models/",
            ),
            (
                unscheduled("0/1 nodes: pod has unbound immediate PersistentVolumeClaims."),
                "VolumePending",
                "StorageClass",
            ),
            (
                unscheduled("0/2 nodes are available: 2 node(s) had volume node affinity conflict"),
                "Unschedulable",
                "ReadWriteMany",
            ),
            (
                unscheduled(
                    "0/1 nodes are available: 1 node has pod using PersistentVolumeClaim with the "
                    "same name and ReadWriteOncePod access mode."
                ),
                "Unschedulable",
                "compute.cacheClaim",
            ),
            (
                held("CreateContainerConfigError", 'secret "hf" not found'),
                "SecretMissing",
                "tokenSecret",
            ),
            (
                held("CreateContainerConfigError", "couldn't find key token in Secret ml/hf"),
                "SecretMissing",
                "tokenSecret",
            ),
            (
                held("ErrImagePull", 'failed to pull and unpack image "x/y:1": not found'),
                "ImagePullFailed",
                "compute.image",
            ),
            (
                held("ImagePullBackOff", 'Back-off pulling image "x/y:1"'),
                "ImagePullFailed",
                "image",
            ),
            (held("InvalidImageName"), "ImagePullFailed", "compute.image"),
            (held("CrashLoopBackOff", "back-off 10s"), "ContainerBroken", "compute.image"),
            (held("RunContainerError", "no such file: python"), "ContainerBroken", "compute.image"),
        ],
    )
    def test_a_pods_problem_explains_why_it_waits(
        self, found: Pod, reason: str, advice: str
    ) -> None:
        cause = waiting(found)
        assert cause.reason == reason
        assert advice in cause.advice

    def test_pods_that_a_quota_forbids_are_found_in_the_clusters_condition(self) -> None:
        message = (
            'FailedCreateWorkerPod\npods "bot-2-l9d4c-workers-worker-x" is forbidden: exceeded '
            "quota: team, requested: requests.nvidia.com/gpu=8, used: 8, limited: 8"
        )
        condition = {"type": "ReplicaFailure", "status": "True", "message": message}
        cause = waiting(cluster={"conditions": [condition]})
        assert cause.reason == "QuotaExceeded"
        assert "\n" not in cause.message
        passed = {**condition, "status": "False"}
        assert waiting(cluster={"conditions": [passed]}).reason == "StartTimeout"

    def test_pods_that_a_policy_forbids_are_found_in_events(self) -> None:
        text = 'Failed to create head Pod ml/bot-2: admission webhook "policy" denied the request'
        assert waiting(warnings=(text,)).reason == "PodsRefused"
        quota = 'pods "x" is forbidden: exceeded quota: team'
        assert waiting(warnings=(text, quota)).reason == "QuotaExceeded"

    def test_a_container_that_ran_out_of_memory_is_found_among_replaced_pods(self) -> None:
        ray = ray_job(jobStatus="", jobDeploymentStatus="Initializing")
        for state in (
            ObservedState(pods=(OOM,)),
            ObservedState(deleted_pods=(OOM,), pods=(pod(phase="Pending"),)),
        ):
            cause = reasons.of_waiting(ray, state)
            assert cause.reason == "OutOfMemory"
            assert "compute.memory" in cause.advice
        assert (
            reasons.of_waiting(ray, ObservedState(deleted_pods=(EVICTED,))).reason == "StartTimeout"
        )

    def test_pods_that_are_starting_have_no_reason(self) -> None:
        assert waiting(pod(phase="Pending")).reason == "StartTimeout"
        assert waiting(held("PodInitializing")).reason == "StartTimeout"

    def test_the_order_of_pods_does_not_change_the_reason(self) -> None:
        pods = [
            unscheduled("full")._replace(name="b"),
            held("ErrImagePull", "x")._replace(name="a"),
        ]
        assert waiting(*pods) == waiting(*pods[::-1])


@pytest.mark.parametrize(
    ("create_error", "reason", "advice"),
    [
        (CreateError(404, "NotFound", "404 page not found"), "KubeRayMissing", "KubeRay"),
        (
            CreateError(404, "NotFound", "the server could not find the requested resource"),
            "KubeRayMissing",
            "KubeRay",
        ),
        (CreateError(404, "NotFound", 'namespaces "ml" not found'), "NamespaceGone", ""),
        (
            CreateError(
                403,
                "Forbidden",
                'configmaps "x" is forbidden: unable to create new content in namespace ml '
                "because it is being terminated",
            ),
            "NamespaceGone",
            "",
        ),
        (
            CreateError(403, "Forbidden", "exceeded quota: q, requested: count/rayjobs.ray.io=1"),
            "QuotaExceeded",
            "compute.workers",
        ),
        (
            CreateError(403, "Forbidden", "cannot create resource rayjobs"),
            "Forbidden",
            "permissions",
        ),
        (CreateError(422, "Invalid", "spec.x: Invalid value"), "RayJobRefused", ""),
        (
            CreateError(500, "InternalError", "failed calling webhook x"),
            "ClusterUnavailable",
            "webh",
        ),
        (CreateError(429, "TooManyRequests", "slow down"), "ClusterUnavailable", ""),
    ],
)
def test_a_create_error_has_a_reason_and_advice(
    create_error: CreateError, reason: str, advice: str
) -> None:
    cause = reasons.of_create_error(create_error)
    assert cause.reason == reason
    assert advice in cause.advice


def test_an_outcome_that_is_nested_deeply_counts_as_none() -> None:
    ray_job = SimpleNamespace(message=OUTCOME_PREFIX + "[" * 100_000)
    assert reasons.logged_outcome(cast("RayJob", ray_job)) is None
