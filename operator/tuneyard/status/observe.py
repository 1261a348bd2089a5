"""What follows from what was seen: a job's next status, and what to do. Pure.

An attempt is written into the status before anything of it is created, and closed in the status
before anything of it is deleted. So whoever reads the status knows everything: an operator that
dies between any two writes leaves nothing behind that the next one would not find or repeat.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import NamedTuple

from tuneyard.api.alignmentjob import AlignmentJob
from tuneyard.api.compute import RunPolicy
from tuneyard.api.finetunejob import FineTuneJob
from tuneyard.api.meta import Condition, ConditionType
from tuneyard.api.plan import Plan
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
from tuneyard.rendering.names import plan_digest, ray_job_name
from tuneyard.status import reasons
from tuneyard.status.observed import RayJob, Seen
from tuneyard.status.reasons import Cause
from tuneyard.status.reported import DONE, merged, progress_of, rfc3339, with_loss

Job = FineTuneJob | AlignmentJob

UNCOUNTED = ("Suspended", "Preempted")
"""Ends of attempts that are nobody's fault and do not count towards maxAttempts."""
MISSING_SECONDS = 10.0
"""How long a RayJob that was there must be missing before its attempt is given up: a cache may lag
behind, and a second cluster beside the first would be worse than the wait."""
LOOK_AGAIN_SECONDS = 15.0
"""When to look again at what should have been told by a watch."""
PODS_SECONDS = GRACE_SECONDS + 60.0
"""How long an ended attempt's pods may take to go before the status wonders."""
MAX_BACKOFF_SECONDS = 3600
MAX_ATTEMPTS = 100
"""Attempts in all, also those that do not count: a status holds no more of them."""
_ATTEMPT_TEXT, _FAILURE_TEXT = 1024, 4096
"""Characters of a message that are kept: a hundred attempts must fit into one object."""


class Waiting(NamedTuple):
    """Planning waits for another job."""

    reason: str
    message: str


Planned = Plan | PlanError | Waiting


class Decision(NamedTuple):
    """What the controller shall do: write the status if it changed, then the rest."""

    status: JobStatus
    start: int | None = None
    """Create this attempt's objects, unless they are there; None: nothing to start."""
    stop: tuple[str, ...] = ()
    """RayJobs to delete."""
    delete: bool = False
    """The job's time to live is over."""
    wake_after: float | None = None
    """Look again after so many seconds; None: when something changes."""


def observe(job: Job, planned: Planned, seen: Seen, now: datetime) -> Decision:
    """A job's next status, and what to do. Raises nothing."""
    return _Observer(job, planned, seen, now).decide()


def is_finished(job: Job) -> bool:
    """Whether nothing will run any more. A job that could not be planned gets a second chance when
    its spec changes."""
    status = job.status
    if status is None or status.phase not in ("Succeeded", "Failed"):
        return False
    if status.plan_digest is not None or (status.failure and status.failure.reason == "Cancelled"):
        return True
    return status.observed_generation == job.metadata.generation


def wants_stop(job: Job) -> bool:
    """Whether the newest attempt, if it still runs, shall checkpoint and end."""
    policy, attempts = job.spec.run_policy, job.status.attempts if job.status else []
    last = attempts[-1] if attempts else None
    return policy.suspend or policy.cancel or bool(last and (last.stopping_at or last.finished_at))


_NO_QUEUE = ("NoQueue", "the job names no queue")
_STARTING = ("Starting", "the pods are starting")
"""Said when an attempt begins: a RayJob that is there at last is then no reason to write again."""


class _Observer:
    """One decision in the making: `status` is what will be written."""

    def __init__(self, job: Job, planned: Planned, seen: Seen, now: datetime) -> None:
        self.job, self.planned, self.seen, self.now = job, planned, seen, now
        self.policy: RunPolicy = job.spec.run_policy
        self.status = job.status or JobStatus()
        self.wake: list[float] = []

    def decide(self) -> Decision:
        if is_finished(self.job):
            return self._finished()
        if not self._plan():
            return self._decision()
        self._set(observed_generation=self.job.metadata.generation)
        attempt = self._attempt
        if attempt is None or attempt.finished_at:
            return self._between()
        return self._follow(attempt)

    # ---- planning -------------------------------------------------------------------------------

    def _plan(self) -> bool:
        """Whether there is a plan."""
        if self.status.plan_digest is not None:
            return True
        self._set(observed_generation=self.job.metadata.generation)
        if self.policy.cancel:
            self._fail(_CANCELLED)
            return False
        if isinstance(self.planned, Waiting):
            self._begin_anew()
            self._condition("Planned", False, self.planned.reason, self.planned.message)
            self.wake.append(LOOK_AGAIN_SECONDS)
            return False
        if isinstance(self.planned, PlanError):
            self._condition("Planned", False, "PlanRejected", str(self.planned))
            self._fail(Cause("PlanRejected", str(self.planned), "Correct the manifest."))
            return False
        stages = [StageStatus(name=s.name, kind=s.kind) for s in self.planned.stages]
        self._begin_anew()
        self._set(plan_digest=plan_digest(self.planned), stages=stages)
        self._condition("Planned", True, "Planned", f"{len(stages)} stages")
        return True

    def _begin_anew(self) -> None:
        """Takes back that an earlier spec was rejected."""
        self._phase("Pending")
        self._set(failure=None)
        for type_ in ("Failed", "Running"):
            self._drop_condition(type_)

    # ---- between attempts -----------------------------------------------------------------------

    def _between(self) -> Decision:
        if self.policy.cancel:
            self._fail(_CANCELLED)
        elif cause := self._late_evidence():
            return self._close(cause)
        elif self.seen.ray_jobs or self.seen.pods:
            self._wait_for_pods()
        elif self._is_exhausted():
            last = self.status.attempts[-1]
            self._fail(Cause(last.reason or "", last.message or ""))
        elif self.policy.suspend:
            self._suspend()
        elif self._over_deadline(self._spent()):
            pass
        elif (wait := self._backoff()) > 0:
            self.wake.append(wait)
        elif len(self.status.attempts) >= MAX_ATTEMPTS:
            self._fail(_TOO_MANY)
        else:
            return self._decision(start=self._open())
        return self._decision()

    def _late_evidence(self) -> Cause | None:
        """Why the last attempt's processes vanished: a driver can tell of a worker's death before
        the kubelet tells of its cause."""
        last = self._attempt
        if last is None or last.reason not in reasons.WORDLESS:
            return None
        return reasons.of_killing(self.seen, last.number)

    def _wait_for_pods(self) -> None:
        """What is left of earlier attempts must be gone before anything else happens."""
        self.wake.append(LOOK_AGAIN_SECONDS)
        if self.policy.suspend:
            self._condition("Suspended", None, "Stopping", "waiting for the pods to end")
        last = self._attempt
        since = _time(last.finished_at) if last and last.finished_at else self.now
        if (self.now - since).total_seconds() > PODS_SECONDS:
            left = [ray.name for ray in self.seen.ray_jobs] + [pod.name for pod in self.seen.pods]
            names = ", ".join(sorted(left)[:3])
            text = f"the last attempt's {names} should be gone: is a node lost?"
            self._condition("Running", False, "PodsLeft", text)

    def _is_exhausted(self) -> bool:
        last = self._attempt
        counts = last is not None and last.reason not in UNCOUNTED
        return counts and len(self._counted()) >= self.policy.max_attempts

    def _suspend(self) -> None:
        self._phase("Suspended")
        self._condition("Suspended", True, "Suspended", "runPolicy.suspend is set")
        self._condition("Running", False, "Suspended", "runPolicy.suspend is set")

    def _backoff(self) -> float:
        """Seconds until the next attempt may start."""
        attempt = self._attempt
        if attempt is None or attempt.reason in UNCOUNTED or not attempt.finished_at:
            return 0.0
        failures = len(self._counted())
        wait = min(self.policy.backoff_seconds * 2 ** max(0, failures - 1), MAX_BACKOFF_SECONDS)
        due = _time(attempt.finished_at) + timedelta(seconds=wait)
        return (due - self.now).total_seconds()

    def _open(self) -> int:
        """Begins the next attempt in the status; its number."""
        last, queue = self._attempt, self.policy.queue
        number = last.number + 1 if last else 1
        name = ray_job_name(self.job.kind, self.job.metadata.name, number)
        attempt = AttemptStatus(number=number, ray_job=name, started_at=rfc3339(self.now))
        self._set(attempts=[*self.status.attempts, attempt])
        self._phase("Queued" if queue else "Pending")
        if queue:
            text = f"attempt {number} waits for queue {queue}"
            self._condition("Admitted", False, "Queued", text)
        else:
            self._condition("Admitted", True, *_NO_QUEUE)
        if "Suspended" in self._conditions():
            self._condition("Suspended", False, "Resumed", "runPolicy.suspend is not set")
        self._condition("Running", False, *_STARTING)
        return number

    # ---- during an attempt ----------------------------------------------------------------------

    def _follow(self, attempt: AttemptStatus) -> Decision:
        ray = self._ray_job(attempt)
        if ray is not None and attempt.ray_job_uid is None:
            attempt = self._update(ray_job_uid=ray.uid)
        attempt = self._report(attempt)
        outcome = self._ending(attempt, ray)
        if outcome and outcome.state == "Succeeded":
            return self._succeed(outcome)
        if ray is not None and ray.job_status == "SUCCEEDED":
            return self._succeed(None)
        if outcome or (ray is not None and ray.ended):
            return self._close(self._why_ended(attempt, ray, outcome))
        if ray is None:
            return self._without_ray_job(attempt)
        if ray.deleting:
            return self._close(self._wish(attempt) or reasons.of_loss(self.seen, attempt.number))
        if attempt.running_at and ray.withdrawn:
            text = self._queues_word() or "it suspended the RayJob"
            self._condition("Admitted", False, "Queued", text)
            return self._close(reasons.PREEMPTED._replace(message=f"the queue took over: {text}"))
        self._describe(attempt, ray)
        return self._stop_or_go_on(self._attempt or attempt, ray)

    def _ray_job(self, attempt: AttemptStatus) -> RayJob | None:
        """The attempt's own: not a namesake of a deleted job of this name, nor one that somebody
        made anew."""
        for ray in self.seen.ray_jobs:
            is_ours = ray.owner == self.job.metadata.uid
            if is_ours and ray.attempt == attempt.number:
                return ray if attempt.ray_job_uid in (None, ray.uid) else None
        return None

    def _why_ended(
        self, attempt: AttemptStatus, ray: RayJob | None, outcome: Outcome | None
    ) -> Cause:
        """That the attempt was asked to end, unless it failed for good by itself meanwhile."""
        cause = reasons.of_end(ray, self.seen, outcome)
        is_final = outcome is not None and outcome.state == "Failed" and not cause.retryable
        return cause if is_final else self._wish(attempt) or cause

    def _without_ray_job(self, attempt: AttemptStatus) -> Decision:
        if attempt.ray_job_uid is not None:
            rest = MISSING_SECONDS - self.seen.missing_seconds
            is_replaced = self.seen.ray_job(attempt.number) is not None
            if rest > 0 and not is_replaced:
                self.wake.append(rest)
                return self._decision()
            return self._close(self._wish(attempt) or reasons.of_loss(self.seen, attempt.number))
        if wish := self._wish(attempt):
            return self._close(wish)
        if obstacle := self.seen.obstacle:
            cause = reasons.of_obstacle(obstacle)
            if obstacle.code == 422 or self._too_late(_time(attempt.started_at)):
                return self._close(cause._replace(retryable=False))
            self._condition("Running", False, cause.reason, cause.message)
        if self.seen.ray_jobs or self.seen.pods:
            self.wake.append(LOOK_AGAIN_SECONDS)
            return self._decision()
        return self._decision(start=attempt.number)

    def _describe(self, attempt: AttemptStatus, ray: RayJob) -> None:
        """Phase and conditions of an attempt that goes on."""
        waits = ray.suspended and not attempt.running_at
        self._describe_admission(waits)
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
            cause = reasons.of_waiting(ray, self.seen)
            known = cause.reason != "StartTimeout"
            told = (cause.reason, cause.message) if known else _STARTING
            self._condition("Running", False, *told)

    def _describe_admission(self, waits: bool) -> None:
        queue = self.policy.queue
        if queue is None:
            self._condition("Admitted", True, *_NO_QUEUE)
        elif waits:
            text = self._queues_word() or "the queue has not taken notice yet"
            self._condition("Admitted", False, "Queued", text)
        else:
            self._condition("Admitted", True, "Admitted", f"admitted by queue {queue}")

    def _queues_word(self) -> str:
        """Why the attempt waits or was evicted; "": nothing is known."""
        return self.seen.workload.message if self.seen.workload else ""

    def _stop_or_go_on(self, attempt: AttemptStatus, ray: RayJob) -> Decision:
        """Ends an attempt that shall end or starts too slowly; else lets it go on."""
        if wish := self._wish(attempt):
            if attempt.stopping_at is None:
                attempt = self._update(stopping_at=rfc3339(self.now))
            asked = (self.now - _time(attempt.stopping_at or "")).total_seconds()
            if attempt.running_at is None or asked >= GRACE_SECONDS:
                return self._close(wish)
            self._condition("Suspended", None, "Stopping", "waiting for a checkpoint")
            self.wake.append(GRACE_SECONDS - asked)
            return self._decision()
        is_starting = attempt.running_at is None and not ray.suspended
        if is_starting:
            cause = reasons.of_waiting(ray, self.seen)
            is_hopeless = cause.reason == "OutOfMemory"  # the next pod would need as much
            if self._too_late(self._could_start_at(attempt, ray)) or is_hopeless:
                return self._close(cause._replace(retryable=False))
        if self.policy.deadline_seconds is not None:
            self.wake.append(max(1.0, self.policy.deadline_seconds - self._spent()))
        return self._decision()

    def _wish(self, attempt: AttemptStatus) -> Cause | None:
        """Why the running attempt shall end; None: it shall go on."""
        if self.policy.cancel:
            return _CANCELLED
        if self.policy.suspend:
            return _SUSPENDED
        if self.policy.deadline_seconds and self._spent() >= self.policy.deadline_seconds:
            return self._deadline_exceeded()
        return _SUSPENDED if attempt.stopping_at else None

    def _could_start_at(self, attempt: AttemptStatus, ray: RayJob) -> datetime:
        """From when its pods could start: the time in the queue is not theirs."""
        texts = [attempt.started_at, ray.start_time]
        admitted = self._conditions().get("Admitted")
        if admitted and admitted.status == "True":
            texts.append(admitted.last_transition_time)
        return max(_time(text) for text in texts if text)

    def _too_late(self, since: datetime) -> bool:
        left = self.policy.start_deadline_seconds - (self.now - since).total_seconds()
        if left > 0:
            self.wake.append(left)
        return left <= 0

    # ---- what the driver told -------------------------------------------------------------------

    def _picture(self, attempt: AttemptStatus) -> ProgressReport | None:
        """What this attempt's driver told; None: nothing, or another attempt's did."""
        picture = self.seen.post.tuneyard if self.seen.post else None
        return picture if picture and picture.attempt == attempt.number else None

    def _ending(self, attempt: AttemptStatus, ray: RayJob | None) -> Outcome | None:
        picture = self._picture(attempt)
        told = picture.outcome if picture else None
        return told or (reasons.last_words(ray) if ray and ray.ended else None)

    def _report(self, attempt: AttemptStatus) -> AttemptStatus:
        """Takes the newest post of this attempt into the status."""
        post, picture = self.seen.post, self._picture(attempt)
        if post is None or (picture is None and post.tuneyard is not None):
            return attempt
        if attempt.running_at is None:
            if picture is None:  # Kubeflow's protocol does not say whose post it is
                return attempt
            attempt = self._update(running_at=rfc3339(self.now))
        self._set(progress=progress_of(post, self.status.progress, self.now))
        if picture is not None:
            self._set(stages=merged(self.status.stages, picture.stages))
            if picture.stage:
                attempt = self._update(stage=picture.stage, last_step=picture.step)
            self._count_lost_steps(picture)
        return attempt

    def _count_lost_steps(self, picture: ProgressReport) -> None:
        """What earlier attempts lost, once this one has taken their stage up."""
        if picture.resumed_step is None:
            return
        *earlier, last = self.status.attempts
        told = [with_loss(a, picture.stage, picture.resumed_step) for a in earlier]
        self._set(attempts=[*told, last])

    # ---- ends -----------------------------------------------------------------------------------

    def _succeed(self, outcome: Outcome | None) -> Decision:
        """`ending` None: the driver succeeded without being able to say what came out."""
        result = outcome.result if outcome else None
        result = result or Result(uri=self._result_uri())
        self._update(
            finished_at=rfc3339(self.now), reason="Succeeded", message="all stages are done"
        )
        self._set(result=result, failure=None)
        self._set(stages=[_moved(s, "Succeeded") for s in self.status.stages])
        if self.status.progress:
            done = {"percentage": 100, "estimated_remaining_seconds": 0}
            self._set(progress=self.status.progress.model_copy(update=done))
        self._phase("Succeeded")
        self._condition("Running", False, "Succeeded", "all stages are done")
        self._condition("Succeeded", True, "Succeeded", f"the result lies at {result.uri}")
        self._drop_condition("Suspended")
        return self._decision()

    def _result_uri(self) -> str:
        """Where the trainer puts the last stage's output."""
        last = self.status.stages[-1].name if self.status.stages else "export"
        return f"{self.job.spec.output.uri.rstrip('/')}/{stage_folder(last)}"

    def _close(self, cause: Cause) -> Decision:
        """Ends the attempt in the status; the job too, where nothing is left to try."""
        attempt = self.status.attempts[-1]
        self._update(
            finished_at=attempt.finished_at or rfc3339(self.now),
            reason=cause.reason,
            message=cause.message[:_ATTEMPT_TEXT],
        )
        # Before the pods are gone, nobody knows for sure why a process vanished.
        may_learn_more = cause.reason in reasons.WORDLESS and bool(self.seen.pods)
        is_left = len(self._counted()) < self.policy.max_attempts or may_learn_more
        if cause.reason in UNCOUNTED:
            self._go_on(cause.reason, cause.message)
        elif cause.retryable and is_left:
            self._go_on("Retrying", f"attempt {attempt.number}: {cause.message}")
        else:
            self._fail(cause)
        if self.status.phase != "Failed" and not self._over_deadline(self._spent()):
            self.wake.append(1.0)
        return self._decision()

    def _go_on(self, reason: str, message: str) -> None:
        """Another attempt shall follow."""
        self._phase("Pending")
        self._set(stages=[_moved(stage, "Pending") for stage in self.status.stages])
        self._condition("Running", False, reason, message)

    def _over_deadline(self, spent: float) -> bool:
        limit = self.policy.deadline_seconds
        if limit is None or spent < limit or self.status.phase in ("Succeeded", "Failed"):
            return False
        self._fail(self._deadline_exceeded())
        return True

    def _deadline_exceeded(self) -> Cause:
        return Cause(
            "DeadlineExceeded",
            f"the attempts took longer than runPolicy.deadlineSeconds, "
            f"{self.policy.deadline_seconds}",
            "Raise runPolicy.deadlineSeconds and create the job anew, under the same name and with "
            "the same output: it goes on from its last checkpoint.",
        )

    def _fail(self, cause: Cause) -> None:
        message, advice = cause.message[:_FAILURE_TEXT], cause.advice[:_FAILURE_TEXT]
        self._set(failure=Failure(reason=cause.reason, message=message, advice=advice))
        is_wish = cause.reason in ("Cancelled", "DeadlineExceeded")
        to: StageState = "Pending" if is_wish else "Failed"
        self._set(stages=[_moved(s, to) if s.state == "Running" else s for s in self.status.stages])
        self._phase("Failed")
        self._condition("Running", False, cause.reason, cause.message)
        end = "" if cause.message.endswith((".", "!", "?")) or not cause.advice else "."
        text = f"{cause.message}{end} {cause.advice}".strip()
        self._condition("Failed", True, cause.reason, text)
        self._drop_condition("Suspended")

    def _finished(self) -> Decision:
        lifetime, ended = self.policy.ttl_seconds_after_finished, self._ended_at()
        if lifetime is None or ended is None:
            return self._decision()
        rest = lifetime - (self.now - ended).total_seconds()
        if rest > 0:
            self.wake.append(rest)
        return self._decision()._replace(delete=rest <= 0)

    def _ended_at(self) -> datetime | None:
        conditions = self._conditions()
        last = conditions.get("Succeeded") or conditions.get("Failed")
        return _time(last.last_transition_time) if last else None

    # ---- the status in the making ---------------------------------------------------------------

    @property
    def _attempt(self) -> AttemptStatus | None:
        return self.status.attempts[-1] if self.status.attempts else None

    def _counted(self) -> list[AttemptStatus]:
        return [a for a in self.status.attempts if a.finished_at and a.reason not in UNCOUNTED]

    def _spent(self) -> float:
        """Seconds that the attempts took together, from when their drivers started."""
        total = 0.0
        for attempt in self.status.attempts:
            if attempt.running_at:
                end = _time(attempt.finished_at) if attempt.finished_at else self.now
                total += (end - _time(attempt.running_at)).total_seconds()
        return total

    def _set(self, **values: object) -> None:
        self.status = self.status.model_copy(update=values)

    def _update(self, **values: object) -> AttemptStatus:
        """Changes the newest attempt."""
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
        """`holds` None: Unknown."""
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

    def _drop_condition(self, type_: ConditionType) -> None:
        self._set(conditions=[c for c in self.status.conditions if c.type != type_])

    def _decision(self, *, start: int | None = None) -> Decision:
        """Every RayJob but the open attempt's is deleted: there is never a second one."""
        last = self._attempt
        current = self._ray_job(last) if last and not last.finished_at else None
        if start is not None:
            self.wake.append(LOOK_AGAIN_SECONDS)
        others = [ray for ray in self.seen.ray_jobs if ray != current and not ray.deleting]
        strays = [ray for ray in others if not self._gives_way(ray)]
        if strays != others:
            self.wake.append(LOOK_AGAIN_SECONDS)
        return Decision(
            self.status,
            start=start,
            stop=tuple(sorted(ray.name for ray in strays)),
            wake_after=min(self.wake, default=None),
        )

    def _gives_way(self, ray: RayJob) -> bool:
        """Whether KubeRay is taking the RayJob's cluster down because a queue wants it. Its pods
        save a checkpoint meanwhile; deleting the RayJob would have KubeRay kill the driver."""
        last = self._attempt
        if last is None or last.finished_at is None or not ray.withdrawn:
            return False
        closed_for = (self.now - _time(last.finished_at)).total_seconds()
        has_pods = any(pod.attempt == ray.attempt for pod in self.seen.pods)
        return has_pods and closed_for < PODS_SECONDS


_CANCELLED = Cause("Cancelled", "runPolicy.cancel was set")
_SUSPENDED = Cause("Suspended", "runPolicy.suspend was set", retryable=True)
_TOO_MANY = Cause(
    "TooManyAttempts",
    f"it was suspended or preempted too often: there were {MAX_ATTEMPTS} attempts",
    "Create the job anew, under the same name and with the same output: it goes on from its last "
    "checkpoint.",
)


def _moved(stage: StageStatus, state: StageState) -> StageStatus:
    """A stage that is not done, in another state."""
    return stage if stage.state in DONE else stage.model_copy(update={"state": state})


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))
