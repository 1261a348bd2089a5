"""A simulation for `observe`: a clock, a cluster and a controller that may be killed."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from tests.planning.jobs import job as golden_job
from tuneyard.api.finetunejob import FineTuneJob
from tuneyard.api.meta import Condition
from tuneyard.api.progress import Outcome, Post
from tuneyard.api.status import AttemptStatus, Failure, JobStatus, MemoryEstimate, Result
from tuneyard.planning.plan import plan_job
from tuneyard.rendering.names import queue as queue_of
from tuneyard.status.events import Event, transition_events
from tuneyard.status.observe import Decision, Planned, is_preparing, observe
from tuneyard.status.observed import (
    CreateError,
    ObservedState,
    Pod,
    PodProblem,
    Preparation,
    RayJob,
    Workload,
)

UID = "job-uid"
PLACED = "2030-01-01T00:00:00Z"
"""When the scheduler gives a pod a node, unless a test says otherwise."""
PLAN = plan_job(golden_job())
"""The plan of every job: the run policy is no part of a plan."""
GPU_PLAN = PLAN.model_copy(
    update={"compute": PLAN.compute.model_copy(update={"gpus_per_worker": 1})}
)
"""The same plan on workers with a GPU: a Job prepares the data first."""


def new_job(**changes: Any) -> FineTuneJob:
    job = golden_job(**changes)
    return job.model_copy(
        update={"metadata": job.metadata.model_copy(update={"uid": UID, "generation": 1})}
    )


def ray_job(attempt: int, **changes: Any) -> RayJob:
    """A RayJob that was just created."""
    fresh = RayJob(
        name=f"minimal-{attempt}",
        uid=f"ray-{attempt}",
        attempt=attempt,
        deleting=False,
        owner=UID,
        suspended=False,
        job_status="",
        deployment_status="",
        reason="",
        message="",
        cluster="",
        start_time=None,
        cluster_failure="",
        workers=1,
        min_workers=1,
        queue=None,
    )
    return fresh._replace(**changes)


def preparation(attempt: int, **changes: Any) -> Preparation:
    """A Job that prepares data and was just created."""
    fresh = Preparation(
        name=f"minimal-{attempt}-prepare",
        uid=f"prepare-{attempt}",
        attempt=attempt,
        deleting=False,
        owner=UID,
        suspended=False,
        succeeded=False,
        failed=False,
        message="",
    )
    return fresh._replace(**changes)


def pod(attempt: int, role: str = "worker", *problems: PodProblem, **changes: Any) -> Pod:
    fresh = Pod(f"minimal-{attempt}-{role}", attempt, role, "Running", False, problems, PLACED)
    return fresh._replace(**changes)


def post(
    attempt: int, step: int = 0, *, stage: str = "sft", outcome: Outcome | None = None, **more: Any
) -> Post:
    report = {"attempt": attempt, "stage": stage, "step": step, "totalSteps": 100, **more}
    value = {
        "trainerStatus": {
            "progressPercentage": step,
            "metrics": [{"name": "loss", "value": 2.0}],
            "lastUpdatedTime": f"2030-01-01T00:00:{step % 60:02d}Z",
        },
        "tuneyard": report,
    }
    built = Post.model_validate(value)
    if outcome and built.tuneyard:
        changed = built.tuneyard.model_copy(update={"outcome": outcome})
        built = built.model_copy(update={"tuneyard": changed})
    return built


def failed(reason: str, *, retryable: bool = False, advice: str = "") -> Outcome:
    failure = Failure(reason=reason, message=f"it was {reason}", advice=advice)
    return Outcome(state="Failed", failure=failure, retryable=retryable)


SUCCESS = Outcome(state="Succeeded", result=Result(uri="s3://models/minimal/result", digest="d"))
INTERRUPTED = Outcome(state="Interrupted", retryable=True)


class KilledError(Exception):
    """The controller was killed."""


@dataclass
class Simulation:
    """One job, its cluster and its controller, whose reconcile is `reconcile`."""

    job: FineTuneJob = field(default_factory=new_job)
    now: datetime = datetime(2030, 1, 1, tzinfo=UTC)
    planned: Planned | None = None
    """None: PLAN."""
    ray_jobs: dict[str, RayJob] = field(default_factory=dict)
    preparations: dict[str, Preparation] = field(default_factory=dict)
    pods: dict[str, Pod] = field(default_factory=dict)
    deleted_pods: dict[str, Pod] = field(default_factory=dict)
    workload: Workload | None = None
    warnings: tuple[str, ...] = ()
    create_error: CreateError | None = None
    post: Post | None = None
    memory: MemoryEstimate | None = None
    missing_since: datetime | None = None
    workers: int = 1
    min_workers: int = 1
    default_queue: str | None = None
    """The queue that Kueue sets on a RayJob without one."""
    hidden: bool = False
    """The controller's cache shows no RayJob and no Job."""
    is_deleted: bool = False
    created: list[str] = field(default_factory=list)
    """Names of RayJobs and Jobs in order of creation."""
    events: list[Event] = field(default_factory=list)
    actions: int = 0
    """Number of writes so far."""
    killed_at: int | None = None
    """The write at which the controller is killed, before it or after it."""
    killed_after: bool = False
    last: Decision | None = None

    # ---- reading --------------------------------------------------------------------------------

    @property
    def status(self) -> JobStatus:
        return self.job.status or JobStatus()

    @property
    def attempt(self) -> AttemptStatus:
        return self.status.attempts[-1]

    @property
    def phase(self) -> str | None:
        return self.status.phase

    def condition(self, type_: str) -> Condition | None:
        return next((c for c in self.status.conditions if c.type == type_), None)

    def why(self, type_: str = "Running") -> str:
        found = self.condition(type_)
        return f"{found.status} {found.reason}" if found else "absent"

    def event_reasons(self) -> list[str]:
        return [event.reason for event in self.events]

    # ---- the controller -------------------------------------------------------------------------

    def observed_state(self) -> ObservedState:
        ray_jobs = () if self.hidden else tuple(self.ray_jobs.values())
        preparations = () if self.hidden else tuple(self.preparations.values())
        last = self.status.attempts[-1] if self.status.attempts else None
        prepares = last is not None and is_preparing(last)
        awaited: tuple[RayJob | Preparation, ...] = preparations if prepares else ray_jobs
        is_lost = (
            last is not None
            and not last.finished_at
            and (last.prepare_job_uid if prepares else last.ray_job_uid) is not None
            and not any(item.attempt == last.number for item in awaited)
        )
        if not is_lost:
            self.missing_since = None
        elif self.missing_since is None:
            self.missing_since = self.now
        since = self.missing_since
        return ObservedState(
            ray_jobs=ray_jobs,
            preparations=preparations,
            pods=tuple(self.pods.values()),
            deleted_pods=tuple(self.deleted_pods.values()),
            workload=self.workload,
            warnings=self.warnings,
            create_error=self.create_error,
            post=self.post,
            memory=self.memory,
            missing_seconds=(self.now - since).total_seconds() if since else 0.0,
        )

    def decide(self) -> Decision:
        return observe(self.job, self.planned or PLAN, self.observed_state(), self.now)

    def reconcile(self) -> Decision:
        """Reconcile once: decide, write the status, act. Raises KilledError."""
        decision = self.last = self.decide()
        before = self.job.status
        if decision.status != (before or JobStatus()):
            self._write(lambda: self._take(decision.status))
        for name in decision.stop:
            self._write(lambda name=name: self.delete(name))
        if decision.start is not None:
            start = decision.start
            self._write(lambda: self._create(start))
        for name in decision.stop_preparing:
            self._write(lambda name=name: self.delete_preparation(name))
        if decision.delete:
            self.is_deleted = True
        return decision

    def _write(self, act: Any) -> None:
        number, self.actions = self.actions, self.actions + 1
        if number == self.killed_at and not self.killed_after:
            raise KilledError
        act()
        if number == self.killed_at:
            raise KilledError

    def _take(self, status: JobStatus) -> None:
        self.events += transition_events(self.job.status, status)
        self.job = self.job.model_copy(update={"status": status})

    def _create(self, attempt: int) -> None:
        name = f"minimal-{attempt}-prepare"
        if is_preparing(self.attempt):
            if self.create_error is None and name not in self.preparations:
                uid = f"prepare-{attempt}-{len(self.created)}"
                queue = self.job.spec.run_policy.prepare_queue
                self.preparations[name] = preparation(attempt, uid=uid, suspended=bool(queue))
                self.created.append(name)
            return
        if self.create_error is None and f"minimal-{attempt}" not in self.ray_jobs:
            name = f"minimal-{attempt}"
            uid = f"ray-{attempt}-{len(self.created)}"
            queue = queue_of(self.job) or self.default_queue
            rendered = {
                "suspended": queue is not None,
                "queue": queue,
                "workers": self.attempt.workers or self.workers,
                "min_workers": self.min_workers,
            }
            self.ray_jobs[name] = ray_job(attempt, uid=uid, **rendered)
            self.created.append(name)

    # ---- the cluster ----------------------------------------------------------------------------

    def wait(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    def delete(self, name: str) -> None:
        if name in self.ray_jobs:
            self.change(name, deleting=True)

    def delete_preparation(self, name: str) -> None:
        if name in self.preparations:
            self.prepare(name, deleting=True)

    def prepare(self, name: str = "", **changes: Any) -> None:
        """Change a Job that prepares data; without a name the newest."""
        name = name or list(self.preparations)[-1]
        self.preparations[name] = self.preparations[name]._replace(**changes)

    def change(self, name: str, **changes: Any) -> None:
        self.ray_jobs[name] = self.ray_jobs[name]._replace(**changes)

    def ray(self, **changes: Any) -> None:
        """Changes the newest RayJob."""
        self.change(list(self.ray_jobs)[-1], **changes)

    def add_pods(self, *pods: Pod) -> None:
        self.pods |= {item.name: item for item in pods}

    def collect(self) -> None:
        """Collect garbage: RayJobs and Jobs first, their pods at the next call. The pods of an
        object that a queue evicted are deleted too."""
        owners = {item.attempt for item in self.ray_jobs.values() if not item.evicted_by_queue}
        jobs = {item.attempt for item in self.preparations.values() if not item.suspended}
        for item in [
            pod
            for pod in self.pods.values()
            if pod.attempt not in (jobs if pod.role == "prepare" else owners)
        ]:
            del self.pods[item.name]
            if item.problems:
                self.deleted_pods[item.name] = item
        self.ray_jobs = {n: item for n, item in self.ray_jobs.items() if not item.deleting}
        kept = {n: item for n, item in self.preparations.items() if not item.deleting}
        self.preparations = kept

    def edit(self, **policy: Any) -> None:
        """Change the run policy, as the user does."""
        job = self.job
        new = job.spec.run_policy.model_copy(update=policy)
        generation = (job.metadata.generation or 0) + 1
        self.job = job.model_copy(
            update={
                "spec": job.spec.model_copy(update={"run_policy": new}),
                "metadata": job.metadata.model_copy(update={"generation": generation}),
            }
        )

    # ---- sequences of steps ---------------------------------------------------------------------

    def settle(self, times: int = 6) -> None:
        """Reconcile several times and collect garbage in between."""
        for _ in range(times):
            self.reconcile()
            self.collect()
            self.wait(1)

    def start(self) -> None:
        """Proceed to an attempt whose pods exist."""
        self.reconcile()
        self.reconcile()
        number = self.attempt.number
        self.ray(
            suspended=False,
            deployment_status="Initializing",
            cluster=f"minimal-{number}-x",
            start_time=self.now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        )
        self.add_pods(pod(number, "head"), pod(number, "worker"))
        self.reconcile()

    def run(self) -> None:
        """Proceed to an attempt whose driver runs."""
        self.start()
        self.ray(job_status="RUNNING", deployment_status="Running")
        self.reconcile()

    def end(self, outcome: Outcome, step: int = 50) -> None:
        """Post the outcome of the attempt."""
        self.post = post(self.attempt.number, step, outcome=outcome)
        self.reconcile()

    def next_attempt(self) -> None:
        """Proceed from a closed attempt to the RayJob of the next."""
        self.settle()
        self.wait(3600)
        self.reconcile()
        self.reconcile()
