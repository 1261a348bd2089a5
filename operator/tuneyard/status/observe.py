"""Decide a job's next status and the actions that follow from it. Pure.

An attempt enters the status before any of its objects is created, and the status closes the attempt
before any of them is deleted. If an operator is killed between two writes, the next operator
therefore finds every object in the status and can repeat the second write.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import NamedTuple

from tuneyard.api.alignmentjob import AlignmentJob
from tuneyard.api.compute import RunPolicy
from tuneyard.api.finetunejob import FineTuneJob
from tuneyard.api.gates import overall
from tuneyard.api.meta import Condition, ConditionType
from tuneyard.api.plan import Plan, leading, prepares_first
from tuneyard.api.pods import GRACE_SECONDS, stage_folder
from tuneyard.api.progress import Outcome, ProgressReport
from tuneyard.api.status import (
    AttemptStatus,
    Failure,
    JobStatus,
    Phase,
    Result,
    StageState,
    StageStatus,
)
from tuneyard.errors import PlanError
from tuneyard.rendering.names import PREPARE_ROLE, plan_digest, prepare_job_name, ray_job_name
from tuneyard.rendering.names import queue as queue_of
from tuneyard.status import reasons
from tuneyard.status.gates import gates_condition
from tuneyard.status.observed import (
    LOST_SECONDS,
    NOT_STORED,
    CreateError,
    Item,
    ObservedState,
    Pod,
    Preparation,
    RayJob,
    is_lost,
    names_of,
)
from tuneyard.status.reasons import Cause
from tuneyard.status.reported import DONE, merge_stages, progress_of, with_lost_steps, with_measured
from tuneyard.status.times import moment_of, rfc3339

Job = FineTuneJob | AlignmentJob

UNCOUNTED = ("Suspended", "Preempted", "FewerWorkers")
"""Reasons of attempts that do not count toward maxAttempts."""
MISSING_SECONDS = 10.0
"""How long a known RayJob must be missing before its attempt is closed. The cache may lag behind,
and two clusters at a time would be worse than the wait."""
RECHECK_SECONDS = 15.0
"""Interval of the checks for a change that a watch should have reported."""
POD_REMOVAL_SECONDS = GRACE_SECONDS + 60.0
"""How long the removal of an ended attempt's pods may take before the status reports PodsLeft."""
ELASTIC_SHARE = 6
"""An elastic attempt waits the start deadline divided by this for workers without a node: 300 s of
the default 1800 s, in which a cluster can add nodes."""
MAX_BACKOFF_SECONDS = 3600
KEPT_ATTEMPTS = 100
"""Attempts that a status holds, to fit into one object. The oldest uncounted one is dropped first:
at most `maxAttempts` count, and that is at most 100."""
LEAKED = {"leakedRows": "held-out rows", "leakedItems": "items of suites"}
"""What was searched in the training data, by the metric that counts what was found."""
_ATTEMPT_TEXT, _FAILURE_TEXT = 1024, 4096
"""Characters kept of a message: a hundred attempts must fit into one object."""


class Waiting(NamedTuple):
    """Planning waits for another job."""

    reason: str
    message: str


Planned = Plan | PlanError | Waiting


class Decision(NamedTuple):
    """The next status and the actions. The controller writes the status first, if it changed."""

    status: JobStatus
    start: int | None = None
    """Create the objects of this attempt unless they exist: while it `is_preparing` its Job, then
    its RayJob. None: start nothing."""
    stop: tuple[str, ...] = ()
    """RayJobs to delete."""
    stop_preparing: tuple[str, ...] = ()
    """Jobs that prepare data, to delete."""
    delete: bool = False
    """Delete the job: its time to live has expired."""
    wake_after: float | None = None
    """Seconds until the next reconcile; None: wait for a change."""


def observe(job: Job, planned: Planned, observed: ObservedState, now: datetime) -> Decision:
    """Return the next status of a job and the actions that follow from it. Raises nothing."""
    return _Observer(job, planned, observed, now).decide()


def is_finished(job: Job) -> bool:
    """Return whether the job has ended for good. A job whose plan was rejected is planned again
    when its spec changes."""
    status = job.status
    if status is None or status.phase not in ("Succeeded", "Failed"):
        return False
    if status.plan_digest is not None or (status.failure and status.failure.reason == "Canceled"):
        return True
    return status.observed_generation == job.metadata.generation


def has_fixed_plan(job: Job, create_error: CreateError | None = None) -> bool:
    """Return whether the job's plan stays as it is. A job that was suspended before its first
    attempt is planned again when it is resumed: profiles may have changed since. So is a job whose
    operator ended between the status of its first attempt and the ConfigMap of its plan.
    `create_error`: why the attempt's objects could not be created."""
    if create_error is not None and create_error.reason == NOT_STORED:
        return False
    status = job.status
    is_planned = status is not None and status.plan_digest is not None
    return is_planned and (bool(status and status.attempts) or job.spec.run_policy.suspend)


def should_stop(job: Job) -> bool:
    """Return whether the newest attempt, if it still runs, must write a checkpoint and end."""
    policy, attempts = job.spec.run_policy, job.status.attempts if job.status else []
    last = attempts[-1] if attempts else None
    return policy.suspend or policy.cancel or bool(last and (last.stopping_at or last.finished_at))


def is_preparing(attempt: AttemptStatus) -> bool:
    """Return whether a Job prepares the data of an attempt, which has no RayJob yet."""
    return attempt.prepare_job is not None and attempt.prepared_at is None


_NO_QUEUE = ("NoQueue", "the job names no queue")
_STARTING = ("Starting", "the pods are starting")
"""Set when an attempt begins, so that the creation of its RayJob needs no further status write."""


class _Observer:
    """Build one decision: `status` is the status to write."""

    def __init__(self, job: Job, planned: Planned, observed: ObservedState, now: datetime) -> None:
        self.job, self.planned, self.observed, self.now = job, planned, observed, now
        self.policy: RunPolicy = job.spec.run_policy
        self.status = job.status or JobStatus()
        self.wake_times: list[float] = []

    def decide(self) -> Decision:
        if is_finished(self.job):
            return self._finished()
        if not self._plan():
            return self._decision()
        self._set(observed_generation=self.job.metadata.generation)
        attempt = self._attempt
        if attempt is None or attempt.finished_at:
            return self._between_attempts()
        return self._during_attempt(attempt)

    # ---- planning -------------------------------------------------------------------------------

    def _plan(self) -> bool:
        """Plan the job unless its plan is fixed; return whether it has a plan."""
        if has_fixed_plan(self.job, self.observed.create_error):
            return True
        self._set(observed_generation=self.job.metadata.generation)
        if self.policy.cancel:
            self._fail_job(_CANCELED)
            return False
        if isinstance(self.planned, Waiting):
            self._clear_plan()
            self._clear_rejection()
            self._describe_resumption()
            self._condition("Planned", False, self.planned.reason, self.planned.message)
            self.wake_times.append(RECHECK_SECONDS)
            return False
        if isinstance(self.planned, PlanError):
            self._clear_plan()
            self._condition("Planned", False, "PlanRejected", str(self.planned))
            self._fail_job(Cause("PlanRejected", str(self.planned), "Correct the manifest."))
            return False
        digest = plan_digest(self.planned)
        if digest == self.status.plan_digest:
            return True
        stages = [StageStatus(name=s.name, kind=s.kind) for s in self.planned.stages]
        self._clear_rejection()
        self._set(plan_digest=digest, stages=stages)
        message = f"{len(stages)} stages"
        if unknown := self.observed.unknown_fields:
            message += (
                f", without {', '.join(unknown)[:1024]}, which this version of the operator does "
                "not know: upgrade the operator, or remove the fields"
            )
        self._condition("Planned", True, "Planned", message)
        return True

    def _clear_plan(self) -> None:
        """Remove the plan from the status, and an attempt that has not begun with it: the spec may
        change again."""
        closed = [attempt for attempt in self.status.attempts if attempt.finished_at]
        self._set(plan_digest=None, stages=[], attempts=closed)

    def _clear_rejection(self) -> None:
        """Remove the rejection of an earlier spec from the status."""
        self._phase("Pending")
        self._set(failure=None)
        for type_ in ("Failed", "Running"):
            self._drop_condition(type_)

    # ---- between attempts -----------------------------------------------------------------------

    def _between_attempts(self) -> Decision:
        if self.policy.cancel:
            self._fail_job(_CANCELED)
        elif cause := self._late_explanation():
            return self._close_attempt(cause)
        elif left := self._objects_left():
            self._wait_for_pods(left)
        elif self._is_exhausted():
            last = self.status.attempts[-1]
            self._fail_job(Cause(last.reason or "", last.message or ""))
        elif self.policy.suspend:
            self._suspend()
        elif self._over_deadline(self._spent()):
            pass
        elif (wait := self._backoff()) > 0:
            self.wake_times.append(wait)
        else:
            return self._decision(start=self._open_attempt())
        return self._decision()

    def _late_explanation(self) -> Cause | None:
        """Return why the last attempt's process ended, if Kubernetes reports it only now. A driver
        can report the loss of a worker before the kubelet reports its cause."""
        last = self._attempt
        if last is None or last.reason not in reasons.UNEXPLAINED:
            return None
        return reasons.of_killed_pods(self.observed, last.number)

    def _objects_left(self) -> list[Item]:
        """Return the objects that the next attempt, or the next object of this one, waits for: all
        that are not lost, and the RayJobs and Jobs of a deleted job of this name, which take the
        names of this job's. A Job that has prepared this attempt's data is done, and so is its
        pod."""
        seen, last = self.observed, self._attempt
        objects: list[Item] = [*seen.ray_jobs, *seen.preparations, *seen.pods, *seen.foreign_pods]
        if last and not last.finished_at and last.prepared_at:
            objects = [item for item in objects if not self._has_prepared(item, last)]
        return [
            item
            for item in objects
            if not is_lost(item, self.now) or (not isinstance(item, Pod) and self._is_foreign(item))
        ]

    def _has_prepared(self, item: Item, attempt: AttemptStatus) -> bool:
        is_preparation = isinstance(item, Preparation)
        if isinstance(item, Pod):
            is_preparation = item.role == PREPARE_ROLE and item.phase == "Succeeded"
        return is_preparation and item.attempt == attempt.number and not self._is_foreign(item)

    def _wait_for_pods(self, left: list[Item]) -> None:
        """Wait until the objects of earlier attempts are removed: no other action may come
        first."""
        self.wake_times.append(RECHECK_SECONDS)
        if self.policy.suspend:
            self._condition("Suspended", None, "Stopping", "waiting for the pods to end")
        since = self._waiting_since(left)
        if (self.now - since).total_seconds() > POD_REMOVAL_SECONDS:
            is_own = not any(self._is_foreign(item) for item in left)
            owner = "an earlier attempt" if is_own else "a deleted job of this name"
            cause = Cause(
                "PodsLeft",
                f"waiting since {rfc3339(since)} for {names_of(left)} of {owner} to be removed",
                "Check whether a node was lost: a deleted pod is waited for until "
                f"{LOST_SECONDS:.0f} s after its grace period. Delete what nobody has deleted.",
            )
            self._condition("Running", False, cause.reason, cause.text)

    def _waiting_since(self, left: list[Item]) -> datetime:
        """Return since when the next attempt waits for these objects: since the last one ended, or
        was prepared, or has waited for its start; for a first one since the objects were deleted,
        or since the job was planned if nobody has deleted them."""
        if last := self._attempt:
            return moment_of(last.finished_at or last.prepared_at or last.started_at)
        planned = self._conditions().get("Planned")
        first = planned.last_transition_time if planned else None
        times = [item.deletion_time or first for item in left]
        return min((moment_of(text) for text in times if text), default=self.now)

    def _is_foreign(self, item: Item) -> bool:
        """Return whether an object belongs to a deleted job of this name."""
        if isinstance(item, Pod):
            return item in self.observed.foreign_pods
        return item.owner != self.job.metadata.uid

    def _is_exhausted(self) -> bool:
        last = self._attempt
        counts = last is not None and last.reason not in UNCOUNTED
        return counts and len(self._counted()) >= self.policy.max_attempts

    def _suspend(self) -> None:
        self._phase("Suspended")
        self._condition("Suspended", True, "Suspended", "runPolicy.suspend is set")
        self._condition("Running", False, "Suspended", "runPolicy.suspend is set")

    def _backoff(self) -> float:
        """Return the seconds until the next attempt may start; 0 or less: now."""
        attempt = self._attempt
        if attempt is None or attempt.reason in UNCOUNTED or not attempt.finished_at:
            return 0.0
        failures = len(self._counted())
        wait = min(self.policy.backoff_seconds * 2 ** max(0, failures - 1), MAX_BACKOFF_SECONDS)
        due = moment_of(attempt.finished_at) + timedelta(seconds=wait)
        return (due - self.now).total_seconds()

    def _open_attempt(self) -> int:
        """Add the next attempt to the status; return its number."""
        last, kind, name = self._attempt, self.job.kind, self.job.metadata.name
        number = last.number + 1 if last else 1
        prepares = self._prepares_first()
        attempt = AttemptStatus(
            number=number,
            ray_job=ray_job_name(kind, name, number),
            prepare_job=prepare_job_name(kind, name, number) if prepares else None,
            started_at=rfc3339(self.now),
            workers=last.workers if last and last.reason == "FewerWorkers" else None,
        )
        if len(self.status.attempts) >= KEPT_ATTEMPTS:
            self._drop_attempt()
        self._set(attempts=[*self.status.attempts, attempt])
        self._describe_resumption()
        if prepares:
            self._describe_preparation(attempt, None)
        else:
            self._describe_start(attempt)
        return number

    def _prepares_first(self) -> bool:
        """Return whether a Job prepares the data of the next attempt, unless they are prepared. The
        plan is given until the first attempt begins; from then on the attempts tell."""
        if isinstance(self.planned, Plan):
            prepares = prepares_first(self.planned)
        else:
            prepares = any(attempt.prepare_job for attempt in self.status.attempts)
        return prepares and any(s.state not in DONE for s in leading(self.status.stages))

    def _describe_start(self, attempt: AttemptStatus) -> None:
        """Set phase and conditions of an attempt whose RayJob is created next."""
        queue = queue_of(self.job)
        self._phase("Queued" if queue else "Pending")
        if queue:
            text = f"attempt {attempt.number} waits for queue {queue}"
            self._condition("Admitted", False, "Queued", text)
        else:
            self._condition("Admitted", True, *_NO_QUEUE)
        self._condition("Running", False, *_STARTING)

    def _describe_resumption(self) -> None:
        """Report that a job that was suspended is not any more."""
        if "Suspended" in self._conditions() and not self.policy.suspend:
            self._condition("Suspended", False, "Resumed", "runPolicy.suspend is not set")

    def _drop_attempt(self) -> None:
        """Drop the oldest attempt that counts toward no limit. Its run time still counts."""
        attempts = self.status.attempts
        oldest = next((a for a in attempts if a.reason in UNCOUNTED), attempts[0])
        seconds = (self.status.dropped_seconds or 0.0) + self._seconds_of(oldest)
        self._set(attempts=[a for a in attempts if a != oldest], dropped_seconds=seconds)

    # ---- during an attempt ----------------------------------------------------------------------

    def _during_attempt(self, attempt: AttemptStatus) -> Decision:
        if is_preparing(attempt):
            return self._during_preparation(attempt)
        ray = self._ray_job(attempt)
        if ray is not None and attempt.ray_job_uid is None:
            attempt = self._update(ray_job_uid=ray.uid)
        attempt = self._apply_post(attempt)
        outcome = self._outcome(attempt, ray)
        if outcome and outcome.state == "Succeeded":
            return self._succeed_job(outcome)
        if ray is not None and ray.job_status == "SUCCEEDED":
            return self._succeed_job(None)
        if outcome or (ray is not None and ray.ended):
            return self._close_attempt(self._why_ended(attempt, ray, outcome))
        if ray is None:
            return self._without_object(attempt)
        if ray.deleting:
            return self._close_attempt(self._why_missing(attempt))
        if attempt.running_at and ray.evicted_by_queue:
            text = self._queue_message() or "it suspended the RayJob"
            self._condition("Admitted", False, "Queued", text)
            message = f"the queue evicted the attempt: {text}"
            return self._close_attempt(reasons.PREEMPTED._replace(message=message))
        self._describe(attempt, ray)
        return self._stop_or_continue(self._attempt or attempt, ray)

    def _ray_job(self, attempt: AttemptStatus) -> RayJob | None:
        """Return the attempt's RayJob. A RayJob of the same name that belongs to a deleted job, or
        that was created again by another client, is not the attempt's."""
        for ray in self.observed.ray_jobs:
            is_ours = ray.owner == self.job.metadata.uid
            if is_ours and ray.attempt == attempt.number:
                return ray if attempt.ray_job_uid in (None, ray.uid) else None
        return None

    def _why_ended(
        self, attempt: AttemptStatus, ray: RayJob | None, outcome: Outcome | None
    ) -> Cause:
        """Return the cause of a requested end if there is one, or else the attempt's own cause. A
        final failure always keeps its own cause."""
        cause = reasons.of_end(ray, self.observed, outcome)
        is_final = outcome is not None and outcome.state == "Failed" and not cause.retryable
        return cause if is_final else self._stop_request(attempt) or cause

    def _why_missing(self, attempt: AttemptStatus) -> Cause:
        """Return why the attempt's RayJob, or before it its Job, does not exist any more."""
        if is_preparing(attempt):
            missing = reasons.of_missing_preparation(self.observed, attempt.number)
        else:
            missing = reasons.of_missing_ray_job(self.observed, attempt.number)
        return self._stop_request(attempt) or missing

    def _without_object(self, attempt: AttemptStatus) -> Decision:
        """Create the RayJob of an attempt, or while it is preparing its Job, unless it existed."""
        seen, number = self.observed, attempt.number
        if is_preparing(attempt):
            uid, is_replaced = attempt.prepare_job_uid, seen.preparation(number) is not None
        else:
            uid, is_replaced = attempt.ray_job_uid, seen.ray_job(number) is not None
        if uid is not None:
            left = MISSING_SECONDS - seen.missing_seconds
            if left > 0 and not is_replaced:
                self.wake_times.append(left)
                return self._decision()
            return self._close_attempt(self._why_missing(attempt))
        if request := self._stop_request(attempt):
            return self._close_attempt(request)
        create_error = self.observed.create_error
        if create_error and create_error.reason != NOT_STORED:
            cause = reasons.of_create_error(create_error)
            if create_error.code == 422 or self._start_deadline_passed(
                moment_of(attempt.prepared_at or attempt.started_at)
            ):
                return self._close_attempt(cause._replace(retryable=False))
            self._condition("Running", False, cause.reason, cause.text)
        if objects := self._objects_left():
            self._wait_for_pods(objects)
            return self._decision()
        return self._decision(start=attempt.number)

    # ---- while its data are prepared ------------------------------------------------------------

    def _during_preparation(self, attempt: AttemptStatus) -> Decision:
        """Follow the Job that prepares the data of an attempt. It saves no checkpoints, so an
        attempt that must stop is closed at once."""
        found = self._preparation(attempt)
        if found is not None and attempt.prepare_job_uid is None:
            attempt = self._update(prepare_job_uid=found.uid)
        attempt = self._apply_post(attempt)
        if attempt.preparing_at is None and self._has_preparing_pod(attempt):
            attempt = self._update(preparing_at=rfc3339(self.now))
        outcome = self._preparation_outcome(attempt, found)
        if found is not None and found.succeeded:
            return self._end_preparation(attempt)
        if outcome or (found is not None and found.ended):
            if reasons.cannot_prepare(self.observed, attempt.number):
                return self._give_preparation_up()
            return self._close_attempt(self._why_not_prepared(attempt, found, outcome))
        if found is None:
            return self._without_object(attempt)
        if found.deleting:
            return self._close_attempt(self._why_missing(attempt))
        if attempt.preparing_at and found.suspended:
            text = self._queue_message() or "it suspended the Job"
            message = f"the queue evicted the Job that prepares the data: {text}"
            return self._close_attempt(reasons.PREEMPTED._replace(message=message))
        return self._stop_or_continue_preparing(attempt, found)

    def _stop_or_continue_preparing(self, attempt: AttemptStatus, found: Preparation) -> Decision:
        """End an attempt that must stop or whose Job starts too slowly; let any other continue."""
        if request := self._stop_request(attempt):
            return self._close_attempt(request)
        self._describe_preparation(attempt, found)
        if attempt.preparing_at is None and not found.suspended:
            cause = reasons.of_waiting(found, self.observed)
            is_final = cause.reason == "OutOfMemory"
            if self._start_deadline_passed(self._pod_allowed_at(attempt, found)) or is_final:
                return self._close_attempt(cause._replace(retryable=False))
        if self.policy.deadline_seconds is not None:
            self.wake_times.append(max(1.0, self.policy.deadline_seconds - self._spent()))
        return self._decision()

    def _preparation(self, attempt: AttemptStatus) -> Preparation | None:
        """Return the Job that prepares the attempt's data: neither one of a deleted job of this
        name, nor one that another client created again."""
        for found in self.observed.preparations:
            is_ours = found.owner == self.job.metadata.uid
            if is_ours and found.attempt == attempt.number:
                return found if attempt.prepare_job_uid in (None, found.uid) else None
        return None

    def _has_preparing_pod(self, attempt: AttemptStatus) -> bool:
        """Return whether the pod of the Job runs, perhaps without a way to post its progress."""
        running = (attempt.number, PREPARE_ROLE, "Running")
        return any((pod.attempt, pod.role, pod.phase) == running for pod in self.observed.pods)

    def _preparation_outcome(
        self, attempt: AttemptStatus, found: Preparation | None
    ) -> Outcome | None:
        """Return how the preparation failed, as its driver posted or logged; None: neither. A
        driver that succeeds reports no outcome: that would be the outcome of the job."""
        report = self._progress_report(attempt)
        posted = report.outcome if report and report.preparing else None
        if posted is None and found is not None and found.failed:
            posted = reasons.logged_preparation(self.observed, attempt.number)
        return posted if posted and posted.state != "Succeeded" else None

    def _why_not_prepared(
        self, attempt: AttemptStatus, found: Preparation | None, outcome: Outcome | None
    ) -> Cause:
        """Return the cause of a requested end if there is one, or else the attempt's own cause. A
        final failure always keeps its own cause."""
        cause = reasons.of_preparation(found, self.observed, attempt.number, outcome)
        is_final = outcome is not None and outcome.state == "Failed" and not cause.retryable
        return cause if is_final else self._stop_request(attempt) or cause

    def _end_preparation(self, attempt: AttemptStatus) -> Decision:
        """Go on with the RayJob of an attempt whose data are prepared."""
        attempt = self._update(prepared_at=rfc3339(self.now))
        if request := self._stop_request(attempt):
            return self._close_attempt(request)
        self._describe_start(attempt)
        return self._decision(start=attempt.number)

    def _give_preparation_up(self) -> Decision:
        """Let the workers of this attempt and of all others prepare the data: the trainer image
        is of an earlier release, which cannot do it without them."""
        attempts = [
            attempt.model_copy(update={"prepare_job": None, "prepare_job_uid": None})
            for attempt in self.status.attempts
        ]
        self._set(attempts=attempts)
        # Nothing was prepared: else the time until the end of the attempt would count twice.
        self._describe_start(self._update(preparing_at=None))
        self.wake_times.append(1.0)
        return self._decision()

    def _describe_preparation(self, attempt: AttemptStatus, found: Preparation | None) -> None:
        """Set phase and conditions of an attempt whose data are prepared. `found` None: its Job is
        created next."""
        self._phase("Preparing")
        queue = queue_of(self.job)
        if queue:
            text = f"attempt {attempt.number} asks queue {queue} when its data are prepared"
            self._condition("Admitted", False, "Preparing", text)
        else:
            self._condition("Admitted", True, *_NO_QUEUE)
        text = f"Job {attempt.prepare_job} prepares the data"
        if found is not None and found.suspended:
            message = self._queue_message() or "it has not processed the Job yet"
            text = f"{text} once its queue admits it: {message}"
            self._condition("Running", False, "Preparing", text)
            return
        cause = reasons.of_waiting(found, self.observed)
        is_known = attempt.preparing_at is None and cause.reason != "StartTimeout"
        why = (cause.reason, cause.message) if is_known else ("Preparing", text)
        self._condition("Running", False, *why)

    def _pod_allowed_at(self, attempt: AttemptStatus, found: Preparation) -> datetime:
        """Return when the pod of the Job could start: after its time in a queue."""
        texts = (attempt.started_at, found.creation_time, found.start_time)
        return max(moment_of(text) for text in texts if text)

    # ---- its phase and conditions ---------------------------------------------------------------

    def _describe(self, attempt: AttemptStatus, ray: RayJob) -> None:
        """Set phase and conditions of an attempt that continues."""
        waits = ray.suspended and not attempt.running_at
        self._describe_admission(ray.queue, waits)
        if ray.running or attempt.running_at:
            if attempt.running_at is None:
                self._update(running_at=rfc3339(self.now))
            self._phase("Running")
            self._condition("Running", True, "Running", f"attempt {attempt.number} runs")
        elif waits:
            self._phase("Queued")
            self._condition("Running", False, "Queued", "waiting for the queue")
        else:
            self._phase("Pending")
            cause = reasons.of_waiting(ray, self.observed)
            is_known = cause.reason != "StartTimeout"
            why = (cause.reason, cause.message) if is_known else _STARTING
            self._condition("Running", False, *why)

    def _describe_admission(self, queue: str | None, waits: bool) -> None:
        if queue is None:
            self._condition("Admitted", True, *_NO_QUEUE)
        elif waits:
            text = self._queue_message() or "the queue has not processed the RayJob yet"
            self._condition("Admitted", False, "Queued", text)
        else:
            self._condition("Admitted", True, "Admitted", f"admitted by queue {queue}")

    def _queue_message(self) -> str:
        """Return why the attempt waits or was evicted; "": unknown."""
        return self.observed.workload.message if self.observed.workload else ""

    def _stop_or_continue(self, attempt: AttemptStatus, ray: RayJob) -> Decision:
        """End an attempt that must stop or that starts too slowly; let any other continue."""
        if request := self._stop_request(attempt):
            if attempt.stopping_at is None:
                attempt = self._update(stopping_at=rfc3339(self.now))
            elapsed = (self.now - moment_of(attempt.stopping_at or "")).total_seconds()
            if attempt.running_at is None or elapsed >= GRACE_SECONDS:
                return self._close_attempt(request)
            self._condition("Suspended", None, "Stopping", "waiting for a checkpoint")
            self.wake_times.append(GRACE_SECONDS - elapsed)
            return self._decision()
        is_starting = attempt.running_at is None and not ray.suspended
        if is_starting:
            if fewer := self._shrink(attempt, ray):
                return self._close_attempt(fewer)
            cause = reasons.of_waiting(ray, self.observed)
            is_final = cause.reason == "OutOfMemory"  # a replacement pod would need as much
            if self._start_deadline_passed(self._start_allowed_at(attempt, ray)) or is_final:
                return self._close_attempt(cause._replace(retryable=False))
        if self.policy.deadline_seconds is not None:
            self.wake_times.append(max(1.0, self.policy.deadline_seconds - self._spent()))
        return self._decision()

    def _stop_request(self, attempt: AttemptStatus) -> Cause | None:
        """Return why the running attempt must end; None: it continues."""
        if self.policy.cancel:
            return _CANCELED
        if self.policy.suspend:
            return _SUSPENDED
        if self.policy.deadline_seconds and self._spent() >= self.policy.deadline_seconds:
            return self._deadline_exceeded()
        return _SUSPENDED if attempt.stopping_at else None

    def _shrink(self, attempt: AttemptStatus, ray: RayJob) -> Cause | None:
        """Return why an elastic attempt ends, to continue with the workers that have a node; None:
        it has all workers or waits. KubeRay would wait for all of them."""
        placed = [
            moment_of(pod.placed_at)
            for pod in self.observed.pods
            if (pod.attempt, pod.role) == (attempt.number, "worker")
            and pod.placed_at
            and not pod.has_ended
        ]
        if not 0 < ray.min_workers <= len(placed) < ray.workers:
            return None
        patience = self.policy.start_deadline_seconds // ELASTIC_SHARE
        left = patience - (self.now - max(placed)).total_seconds()
        if left > 0:
            self.wake_times.append(left)
            return None
        self._update(workers=len(placed))
        return reasons.of_missing_workers(ray, self.observed, len(placed), patience)

    def _start_allowed_at(self, attempt: AttemptStatus, ray: RayJob) -> datetime:
        """Return when the pods of the attempt could start: after their time in the queue. The
        RayJob of an attempt can be created late, and KubeRay sees it later still."""
        texts = [attempt.started_at, ray.creation_time, ray.start_time]
        admitted = self._conditions().get("Admitted")
        if admitted and admitted.status == "True":
            texts.append(admitted.last_transition_time)
        return max(moment_of(text) for text in texts if text)

    def _start_deadline_passed(self, since: datetime) -> bool:
        left = self.policy.start_deadline_seconds - (self.now - since).total_seconds()
        if left > 0:
            self.wake_times.append(left)
        return left <= 0

    # ---- the driver's posts ---------------------------------------------------------------------

    def _progress_report(self, attempt: AttemptStatus) -> ProgressReport | None:
        """Return the newest report of this attempt's driver; None: it has posted none."""
        report = self.observed.post.tuneyard if self.observed.post else None
        return report if report and report.attempt == attempt.number else None

    def _outcome(self, attempt: AttemptStatus, ray: RayJob | None) -> Outcome | None:
        """Return the outcome that the driver posted or logged; None: neither."""
        report = self._progress_report(attempt)
        posted = report.outcome if report and not report.preparing else None
        return posted or (reasons.logged_outcome(ray) if ray and ray.ended else None)

    def _apply_post(self, attempt: AttemptStatus) -> AttemptStatus:
        """Copy the newest post of this attempt into the status."""
        post, report = self.observed.post, self._progress_report(attempt)
        if post is None or (report is None and post.tuneyard is not None):
            return attempt
        if report is not None and report.preparing:
            # Also after its end, when the RayJob's driver has not started yet.
            if attempt.preparing_at is None:
                attempt = self._update(preparing_at=rfc3339(self.now))
        elif attempt.running_at is None:
            if report is None:  # a post in Kubeflow's protocol does not name its attempt
                return attempt
            attempt = self._update(running_at=rfc3339(self.now))
        self._set(progress=progress_of(post, self.status.progress, self.now))
        if report is not None:
            if self.observed.memory is not None:
                self._set(memory=self.observed.memory)
            self._set(stages=merge_stages(self.status.stages, report.stages))
            self._note_leaks()
            self._note_gates()
            if self.status.memory is not None:
                self._set(memory=with_measured(self.status.memory, self.status.stages))
            if report.stage:
                attempt = self._update(stage=report.stage, last_step=report.step)
            self._count_lost_steps(report)
        return attempt

    def _count_lost_steps(self, report: ProgressReport) -> None:
        """Set the lost steps of earlier attempts, once this attempt has resumed their stage."""
        if report.resumed_step is None:
            return
        *earlier, last = self.status.attempts
        counted = [with_lost_steps(a, report.stage, report.resumed_step) for a in earlier]
        self._set(attempts=[*counted, last])

    # ---- ends -----------------------------------------------------------------------------------

    def _succeed_job(self, outcome: Outcome | None) -> Decision:
        """Close the attempt and the job as Succeeded. `outcome` None: the driver succeeded but
        could not report its result."""
        result = outcome.result if outcome else None
        result = result or Result(uri=self._result_uri())
        verdict = overall(gate for stage in self.status.stages for gate in stage.gates)
        promotable = None if verdict is None else verdict == "pass"
        result = result.model_copy(update={"promotable": promotable})
        self._update(
            finished_at=rfc3339(self.now), reason="Succeeded", message="all stages are done"
        )
        self._set(result=result, failure=None)
        self._set(stages=[_with_state(s, "Succeeded") for s in self.status.stages])
        if self.status.progress:
            done = {"percentage": 100, "estimated_remaining_seconds": 0}
            self._set(progress=self.status.progress.model_copy(update=done))
        self._phase("Succeeded")
        self._condition("Running", False, "Succeeded", "all stages are done")
        self._condition("Succeeded", True, "Succeeded", f"the result is at {result.uri}")
        self._drop_condition("Suspended")
        return self._decision()

    def _result_uri(self) -> str:
        """Return the URI of the last stage's output."""
        last = self.status.stages[-1].name if self.status.stages else "export"
        return f"{self.job.spec.output.uri.rstrip('/')}/{stage_folder(last)}"

    def _close_attempt(self, cause: Cause) -> Decision:
        """Close the attempt in the status, and the job too if no further attempt is allowed."""
        attempt = self.status.attempts[-1]
        self._update(
            finished_at=attempt.finished_at or rfc3339(self.now),
            reason=cause.reason,
            message=cause.message[:_ATTEMPT_TEXT],
        )
        # As long as pods are left, Kubernetes may still report why a process ended.
        may_learn_more = cause.reason in reasons.UNEXPLAINED and bool(self.observed.pods)
        may_retry = len(self._counted()) < self.policy.max_attempts or may_learn_more
        if cause.reason in UNCOUNTED:
            self._retry(cause.reason, cause.message)
        elif cause.retryable and may_retry:
            self._retry("Retrying", f"attempt {attempt.number}: {cause.message}")
        else:
            self._fail_job(cause)
        if self.status.phase != "Failed" and not self._over_deadline(self._spent()):
            self.wake_times.append(1.0)
        return self._decision()

    def _retry(self, reason: str, message: str) -> None:
        """Set the status of a job that another attempt follows."""
        self._phase("Pending")
        self._set(stages=[_with_state(stage, "Pending") for stage in self.status.stages])
        self._condition("Running", False, reason, message)

    def _over_deadline(self, spent: float) -> bool:
        """Fail the job if its attempts took this many seconds; return whether it failed."""
        limit = self.policy.deadline_seconds
        if limit is None or spent < limit or self.status.phase in ("Succeeded", "Failed"):
            return False
        self._fail_job(self._deadline_exceeded())
        return True

    def _deadline_exceeded(self) -> Cause:
        return Cause(
            "DeadlineExceeded",
            f"the attempts took longer than runPolicy.deadlineSeconds, "
            f"{self.policy.deadline_seconds}",
            "Raise runPolicy.deadlineSeconds and create the job again with the same name "
            "and the same output: it resumes from its last checkpoint.",
        )

    def _fail_job(self, cause: Cause) -> None:
        """Close the job as Failed."""
        message, advice = cause.message[:_FAILURE_TEXT], cause.advice[:_FAILURE_TEXT]
        self._set(failure=Failure(reason=cause.reason, message=message, advice=advice))
        is_requested = cause.reason in ("Canceled", "DeadlineExceeded")
        to: StageState = "Pending" if is_requested else "Failed"
        stages = self.status.stages
        self._set(stages=[_with_state(s, to) if s.state == "Running" else s for s in stages])
        self._phase("Failed")
        self._condition("Running", False, cause.reason, cause.message)
        self._condition("Failed", True, cause.reason, cause.text)
        self._drop_condition("Suspended")

    def _finished(self) -> Decision:
        """Delete a finished job once its time to live has expired."""
        lifetime, ended = self.policy.ttl_seconds_after_finished, self._ended_at()
        if lifetime is None or ended is None:
            return self._decision()
        left = lifetime - (self.now - ended).total_seconds()
        if left > 0:
            self.wake_times.append(left)
        return self._decision()._replace(delete=left <= 0)

    def _ended_at(self) -> datetime | None:
        conditions = self._conditions()
        last = conditions.get("Succeeded") or conditions.get("Failed")
        return moment_of(last.last_transition_time) if last else None

    # ---- changes of the status ------------------------------------------------------------------

    @property
    def _attempt(self) -> AttemptStatus | None:
        return self.status.attempts[-1] if self.status.attempts else None

    def _counted(self) -> list[AttemptStatus]:
        return [a for a in self.status.attempts if a.finished_at and a.reason not in UNCOUNTED]

    def _spent(self) -> float:
        """Return the seconds that all attempts took, each from the start of its driver."""
        listed = sum(self._seconds_of(attempt) for attempt in self.status.attempts)
        return (self.status.dropped_seconds or 0.0) + listed

    def _seconds_of(self, attempt: AttemptStatus) -> float:
        """Return how long an attempt ran, its preparation included."""
        end = moment_of(attempt.finished_at) if attempt.finished_at else self.now
        prepared = moment_of(attempt.prepared_at) if attempt.prepared_at else end
        return _between(attempt.preparing_at, prepared) + _between(attempt.running_at, end)

    def _set(self, **values: object) -> None:
        self.status = self.status.model_copy(update=values)

    def _update(self, **values: object) -> AttemptStatus:
        """Change the newest attempt and return it."""
        *earlier, last = self.status.attempts
        changed = last.model_copy(update=values)
        self._set(attempts=[*earlier, changed])
        return changed

    def _phase(self, phase: Phase) -> None:
        self._set(phase=phase)

    def _conditions(self) -> dict[str, Condition]:
        return {condition.type: condition for condition in self.status.conditions}

    def _condition(
        self, type_: ConditionType, holds: bool | None, reason: str, message: str
    ) -> None:
        """Set a condition. `holds` None: Unknown."""
        conditions = self._conditions()
        old = conditions.get(type_)
        status = "Unknown" if holds is None else str(holds)
        since = old.last_transition_time if old and old.status == status else rfc3339(self.now)
        conditions[type_] = Condition.model_validate(
            {
                "type": type_,
                "status": status,
                "reason": reason,
                "message": message[:4096],
                "last_transition_time": since,
                "observed_generation": self.job.metadata.generation,
            }
        )
        self._set(conditions=list(conditions.values()))

    def _note_leaks(self) -> None:
        """Set the condition of held-out rows and items of suites that were trained on, once a stage
        has looked."""
        counted = {
            what: [s.metrics[name] for s in self.status.stages if name in s.metrics]
            for name, what in LEAKED.items()
        }
        found = {what: int(sum(values)) for what, values in counted.items() if values}
        if not found:
            return
        leaked = any(found.values())
        counts = " and ".join(f"{count} {what}" for what, count in found.items() if count)
        text = (
            f"{counts} have text that is also in the training data, which makes the result look "
            "better than it is: the report names them; remove them from one of the two, or set "
            f"{self._leaks_field(found)}: error"
            if leaked
            else f"no {' or '.join(found)} have text that is also in the training data"
        )
        self._condition("DataLeaked", leaked, "RowsInTraining" if leaked else "NoneFound", text)

    def _leaks_field(self, found: Mapping[str, int]) -> str:
        """Return the field that refuses what was found. `found`: how many leak, by what they
        are."""
        if self.job.kind == "FineTuneJob":
            return "spec.data.leaks"
        return "spec.leaks" if found.get(LEAKED["leakedItems"]) else "spec.sft.data.leaks"

    def _note_gates(self) -> None:
        """Set the condition of the gates, once an evaluation has checked them."""
        found = [gate for stage in self.status.stages for gate in stage.gates]
        if found:
            self._condition("GatesPassed", *gates_condition(found))

    def _drop_condition(self, type_: ConditionType) -> None:
        self._set(conditions=[c for c in self.status.conditions if c.type != type_])

    def _decision(self, *, start: int | None = None) -> Decision:
        """Return the decision, which deletes every RayJob but the open attempt's: a job never has
        two clusters."""
        last = self._attempt
        current = self._ray_job(last) if last and not last.finished_at else None
        if start is not None:
            self.wake_times.append(RECHECK_SECONDS)
        others = [ray for ray in self.observed.ray_jobs if ray != current and not ray.deleting]
        orphans = [ray for ray in others if not self._is_being_evicted(ray)]
        if orphans != others:
            self.wake_times.append(RECHECK_SECONDS)
        preparing = self._preparation(last) if last and self._is_open_preparation(last) else None
        left = [p for p in self.observed.preparations if p != preparing and not p.deleting]
        return Decision(
            self.status,
            start=start,
            stop=tuple(sorted(ray.name for ray in orphans)),
            stop_preparing=tuple(sorted(preparation.name for preparation in left)),
            wake_after=min(self.wake_times, default=None),
        )

    def _is_open_preparation(self, attempt: AttemptStatus) -> bool:
        return is_preparing(attempt) and not attempt.finished_at

    def _is_being_evicted(self, ray: RayJob) -> bool:
        """Return whether KubeRay is removing the RayJob's cluster for a queue. The pods save a
        checkpoint meanwhile; if the RayJob were deleted, KubeRay would kill the driver."""
        last = self._attempt
        if last is None or last.finished_at is None or not ray.evicted_by_queue:
            return False
        closed_for = (self.now - moment_of(last.finished_at)).total_seconds()
        has_pods = any(pod.attempt == ray.attempt for pod in self.observed.pods)
        return has_pods and closed_for < POD_REMOVAL_SECONDS


_CANCELED = Cause("Canceled", "runPolicy.cancel was set")
_SUSPENDED = Cause("Suspended", "runPolicy.suspend was set", retryable=True)


def _between(start: str | None, end: datetime) -> float:
    """Return the seconds between two times. 0: the first is None, or they are out of order, since
    replicas' clocks differ."""
    return max(0.0, (end - moment_of(start)).total_seconds()) if start else 0.0


def _with_state(stage: StageStatus, state: StageState) -> StageStatus:
    """Return the stage in this state, unless it is done."""
    return stage if stage.state in DONE else stage.model_copy(update={"state": state})
