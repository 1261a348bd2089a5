"""What follows from what was seen: a job's next status, and what to do. Pure.

An attempt is written into the status before anything of it is created, and closed in the status
before anything of it is deleted. So whoever reads the status knows everything: an operator that
dies between any two writes leaves nothing behind that the next one would not find or repeat.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

from tuneyard.api.alignmentjob import AlignmentJob
from tuneyard.api.compute import RunPolicy
from tuneyard.api.finetunejob import FineTuneJob
from tuneyard.api.meta import Condition, ConditionType
from tuneyard.api.plan import Plan
from tuneyard.api.progress import Ending, Post
from tuneyard.api.status import (
    AttemptStatus,
    Failure,
    JobStatus,
    Phase,
    Progress,
    Result,
    StageStatus,
)
from tuneyard.errors import PlanError
from tuneyard.planning import causes
from tuneyard.planning.causes import Cause
from tuneyard.planning.rayjob import GRACE_SECONDS, plan_digest, ray_job_name
from tuneyard.planning.seen import RayJob, Seen

Job = FineTuneJob | AlignmentJob

UNCOUNTED = ("Suspended", "Preempted")
"""Ends of attempts that are nobody's fault and do not count towards maxAttempts."""
MISSING_SECONDS = 10.0
"""How long a RayJob that was there must be missing before its attempt is given up: a cache may lag
behind, and a second cluster beside the first would be worse than the wait."""
LOOK_AGAIN_SECONDS = 15.0
"""When to look again at what should have been told by a watch."""
MAX_BACKOFF_SECONDS = 3600


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
    return status.plan_digest is not None or status.observed_generation == job.metadata.generation


def wants_stop(job: Job) -> bool:
    """Whether a running attempt shall checkpoint and end."""
    attempts = job.status.attempts if job.status else []
    policy = job.spec.run_policy
    return policy.suspend or policy.cancel or bool(attempts and attempts[-1].stopping_at)


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
        if isinstance(self.planned, Waiting):
            self._phase("Pending")
            self._condition("Planned", False, self.planned.reason, self.planned.message)
            self.wake.append(LOOK_AGAIN_SECONDS)
            return False
        if isinstance(self.planned, PlanError):
            self._set(observed_generation=self.job.metadata.generation)
            self._condition("Planned", False, "PlanRejected", str(self.planned))
            self._fail(Cause("PlanRejected", str(self.planned), "Correct the manifest."))
            return False
        stages = [StageStatus(name=s.name, kind=s.kind) for s in self.planned.stages]
        self._set(plan_digest=plan_digest(self.planned), stages=stages, failure=None)
        self._condition("Planned", True, "Planned", f"{len(stages)} stages")
        self._drop_condition("Failed")
        return True

    # ---- between attempts -----------------------------------------------------------------------

    def _between(self) -> Decision:
        left = [item for item in self.seen.ray_jobs if not item.deleting]
        if self.policy.cancel:
            self._fail(Cause("Cancelled", "runPolicy.cancel was set"))
            return self._decision(stop=left)
        if self.seen.ray_jobs or self.seen.pods:
            self.wake.append(LOOK_AGAIN_SECONDS)
            if self.policy.suspend:
                self._condition("Suspended", None, "Stopping", "waiting for the pods to end")
            return self._decision(stop=left)
        if self.policy.suspend:
            self._suspend()
            return self._decision()
        if (spent := self._spent()) and self._over_deadline(spent):
            return self._decision()
        if (wait := self._backoff()) > 0:
            self.wake.append(wait)
            return self._decision()
        number = len(self.status.attempts) + 1
        self._open(number)
        return self._decision(start=number)

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

    def _open(self, number: int) -> None:
        name = ray_job_name(self.job.kind, self.job.metadata.name, number)
        attempt = AttemptStatus(number=number, ray_job=name, started_at=_text(self.now))
        self._set(attempts=[*self.status.attempts, attempt])
        self._phase("Queued" if self.policy.queue else "Pending")
        if "Suspended" in self._conditions():
            self._condition("Suspended", False, "Resumed", "runPolicy.suspend is not set")
        self._condition("Running", False, "Starting", f"attempt {number} is being started")

    # ---- during an attempt ----------------------------------------------------------------------

    def _follow(self, attempt: AttemptStatus) -> Decision:
        ray = self.seen.ray_job(attempt.number)
        if ray is not None and attempt.ray_job_uid is None:
            attempt = self._update(ray_job_uid=ray.uid)
        if ray is None:
            return self._without_ray_job(attempt)
        self._report(attempt)
        attempt = self._attempt or attempt
        ending = self._ending(ray)
        if ending and ending.state == "Succeeded":
            return self._succeed(ending)
        if ray.job_status == "SUCCEEDED":
            return self._succeed(None)
        if ending or ray.ended:
            if attempt.stopping_at or self._wish(attempt):
                return self._close(self._wish(attempt) or _SUSPENDED)
            return self._close(causes.of_end(ray, self.seen, ending))
        if ray.deleting:
            return self._close(causes.of_loss(self.seen, attempt.number))
        if attempt.running_at and ray.withdrawn:
            text = self.seen.workload.message if self.seen.workload else "its queue suspended it"
            return self._close(causes.PREEMPTED._replace(message=f"the queue took over: {text}"))
        self._describe(attempt, ray)
        return self._stop_or_go_on(self._attempt or attempt, ray)

    def _without_ray_job(self, attempt: AttemptStatus) -> Decision:
        if attempt.ray_job_uid is not None:
            if self.seen.missing_seconds < MISSING_SECONDS:
                self.wake.append(MISSING_SECONDS - self.seen.missing_seconds)
                return self._decision()
            return self._close(self._wish(attempt) or causes.of_loss(self.seen, attempt.number))
        if wish := self._wish(attempt):
            return self._close(wish)
        if obstacle := self.seen.obstacle:
            cause = causes.of_obstacle(obstacle)
            if obstacle.code == 422 or self._too_late(attempt.started_at):
                return self._close(cause._replace(retryable=False))
            self._condition("Running", False, cause.reason, cause.message)
            self.wake.append(LOOK_AGAIN_SECONDS)
        return self._decision(start=attempt.number)

    def _describe(self, attempt: AttemptStatus, ray: RayJob) -> None:
        """Phase and conditions of an attempt that goes on."""
        waits = ray.suspended and not attempt.running_at
        self._describe_admission(waits)
        if ray.running or attempt.running_at:
            if attempt.running_at is None:
                self._update(running_at=_text(self.now))
            self._phase("Running")
            self._condition("Running", True, "Running", f"attempt {attempt.number} runs")
        elif waits:
            self._phase("Queued")
            self._condition("Running", False, "Queued", "waiting for the queue")
        else:
            self._phase("Pending")
            cause = causes.of_waiting(ray, self.seen)
            known = cause.reason != "StartTimeout"
            message = cause.message if known else "the pods are starting"
            self._condition("Running", False, cause.reason if known else "Starting", message)

    def _describe_admission(self, waits: bool) -> None:
        workload, queue = self.seen.workload, self.policy.queue
        if queue is None:
            self._condition("Admitted", True, "NoQueue", "the job names no queue")
        elif waits:
            text = workload.message if workload else "the queue has not taken notice yet"
            self._condition("Admitted", False, "Queued", text)
        else:
            self._condition("Admitted", True, "Admitted", f"admitted by queue {queue}")

    def _stop_or_go_on(self, attempt: AttemptStatus, ray: RayJob) -> Decision:
        """Ends an attempt that shall end or starts too slowly; else lets it go on."""
        if wish := self._wish(attempt):
            if attempt.stopping_at is None:
                attempt = self._update(stopping_at=_text(self.now))
            asked = (self.now - _time(attempt.stopping_at or "")).total_seconds()
            if attempt.running_at is None or asked >= GRACE_SECONDS:
                return self._close(wish)
            self._condition("Suspended", None, "Stopping", "waiting for a checkpoint")
            self.wake.append(GRACE_SECONDS - asked)
            return self._decision()
        if attempt.stopping_at:  # the wish was taken back after the driver was told
            self.wake.append(LOOK_AGAIN_SECONDS)
        starting = attempt.running_at is None and not ray.suspended
        if starting and self._too_late(ray.start_time or attempt.started_at):
            return self._close(causes.of_waiting(ray, self.seen)._replace(retryable=False))
        if self.policy.deadline_seconds is not None:
            self.wake.append(max(1.0, self.policy.deadline_seconds - self._spent()))
        return self._decision()

    def _wish(self, attempt: AttemptStatus) -> Cause | None:
        """Why the running attempt shall end; None: it shall go on."""
        if self.policy.cancel:
            return Cause("Cancelled", "runPolicy.cancel was set")
        if self.policy.suspend:
            return _SUSPENDED
        if self.policy.deadline_seconds and self._spent() >= self.policy.deadline_seconds:
            return self._deadline_exceeded()
        return _SUSPENDED if attempt.stopping_at else None

    def _too_late(self, since: str) -> bool:
        left = self.policy.start_deadline_seconds - (self.now - _time(since)).total_seconds()
        if left > 0:
            self.wake.append(left)
        return left <= 0

    # ---- what the driver told -------------------------------------------------------------------

    def _ending(self, ray: RayJob) -> Ending | None:
        picture = self.seen.post.tuneyard if self.seen.post else None
        told = picture.ending if picture and picture.attempt == ray.attempt else None
        return told or (causes.last_words(ray) if ray.ended else None)

    def _report(self, attempt: AttemptStatus) -> None:
        """Takes the newest post of this attempt into the status."""
        post = self.seen.post
        if post is None:
            return
        picture = post.tuneyard
        if picture is not None and picture.attempt != attempt.number:
            return
        if attempt.running_at is None:
            self._update(running_at=_text(self.now))
        self._set(progress=_progress(post, self.status.progress, self.now))
        if picture is not None:
            self._set(stages=_merged(self.status.stages, picture.stages))
            if picture.stage:
                self._update(stage=picture.stage, last_step=picture.step)
            self._count_lost_steps(picture.stage, picture.resumed_step)

    def _count_lost_steps(self, stage: str, resumed_step: int | None) -> None:
        """What the attempt before lost, once this one has taken its stage up."""
        attempts = self.status.attempts
        if resumed_step is None or len(attempts) < 2:
            return
        before = attempts[-2]
        if before.stage != stage or before.last_step is None or before.steps_lost is not None:
            return
        lost = max(0, before.last_step - resumed_step)
        told = before.model_copy(update={"steps_lost": lost})
        self._set(attempts=[*attempts[:-2], told, attempts[-1]])

    # ---- ends -----------------------------------------------------------------------------------

    def _succeed(self, ending: Ending | None) -> Decision:
        """`ending` None: the driver succeeded without being able to say what came out."""
        result = ending.result if ending else None
        uri = f"{self.job.spec.output.uri.rstrip('/')}/result"
        self._update(finished_at=_text(self.now), reason="Succeeded", message="all stages are done")
        self._set(result=result or Result(uri=uri), failure=None)
        if self.status.progress:
            done = {"percentage": 100, "estimated_remaining_seconds": 0}
            self._set(progress=self.status.progress.model_copy(update=done))
        self._phase("Succeeded")
        self._condition("Running", False, "Succeeded", "all stages are done")
        self._condition("Succeeded", True, "Succeeded", f"the result lies at {uri}")
        self._drop_condition("Suspended")
        return self._decision(stop=self.seen.ray_jobs)

    def _close(self, cause: Cause) -> Decision:
        """Ends the attempt in the status; the job too, where nothing is left to try."""
        number = len(self.status.attempts)
        self._update(finished_at=_text(self.now), reason=cause.reason, message=cause.message)
        self._set(stages=[_stopped(stage) for stage in self.status.stages])
        if cause.reason in UNCOUNTED:
            self._condition("Running", False, cause.reason, cause.message)
            self._phase("Pending")
        elif cause.retryable and len(self._counted()) < self.policy.max_attempts:
            self._condition("Running", False, "Retrying", f"attempt {number}: {cause.message}")
            self._phase("Pending")
        else:
            self._fail(cause)
        if not self._over_deadline(self._spent()):
            self.wake.append(1.0)
        return self._decision(stop=self.seen.ray_jobs)

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
            "Raise runPolicy.deadlineSeconds in a job of another name with the same output.uri; it "
            "goes on from the last checkpoint only under the same name.",
        )

    def _fail(self, cause: Cause) -> None:
        self._set(failure=Failure(reason=cause.reason, message=cause.message, advice=cause.advice))
        self._phase("Failed")
        self._condition("Running", False, cause.reason, cause.message)
        text = f"{cause.message} {cause.advice}".strip()
        self._condition("Failed", True, cause.reason, text)
        self._drop_condition("Suspended")

    def _finished(self) -> Decision:
        left = [item for item in self.seen.ray_jobs if not item.deleting]
        lifetime, ended = self.policy.ttl_seconds_after_finished, self._ended_at()
        if lifetime is None or ended is None:
            return self._decision(stop=left)
        rest = lifetime - (self.now - ended).total_seconds()
        if rest > 0:
            self.wake.append(rest)
            return self._decision(stop=left)
        return self._decision(stop=left)._replace(delete=True)

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
        since = old.last_transition_time if old and old.status == status else _text(self.now)
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

    def _decision(self, *, start: int | None = None, stop: Sequence[RayJob] = ()) -> Decision:
        return Decision(
            self.status,
            start=start,
            stop=tuple(item.name for item in stop if not item.deleting),
            wake_after=min(self.wake, default=None),
        )


_SUSPENDED = Cause("Suspended", "runPolicy.suspend was set", retryable=True)


def _progress(post: Post, before: Progress | None, now: datetime) -> Progress:
    """The newest numbers; what a post leaves out stays as it was."""
    told, picture = post.trainer_status, post.tuneyard
    metrics = dict(before.metrics) if before else {}
    for item in told.metrics:
        if (value := _number(item.value)) is not None:
            metrics[item.name] = value
    percentage = told.progress_percentage
    if percentage is None:
        percentage = before.percentage if before else 0
    return Progress(
        stage=picture.stage if picture else "",
        step=picture.step if picture else 0,
        total_steps=picture.total_steps if picture else 0,
        percentage=percentage,
        estimated_remaining_seconds=told.estimated_remaining_seconds,
        metrics=metrics,
        last_updated_time=told.last_updated_time or _text(now),
    )


def _number(value: float | str) -> float | None:
    """None for what is no finite number: a status cannot hold it."""
    try:
        number = float(value)
    except ValueError:
        return None
    return number if abs(number) < float("inf") else None


def _merged(stages: Sequence[StageStatus], told: Sequence[StageStatus]) -> list[StageStatus]:
    """The plan's stages with what the driver told of them; a stage that is not in the plan is not
    taken, and none goes back from Succeeded."""
    news = {stage.name: stage for stage in told}
    return [
        news[stage.name] if stage.name in news and news[stage.name].kind == stage.kind else stage
        for stage in stages
    ]


def _stopped(stage: StageStatus) -> StageStatus:
    """A stage of an ended attempt: what ran waits again."""
    return stage.model_copy(update={"state": "Pending"}) if stage.state == "Running" else stage


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


def _text(moment: datetime) -> str:
    """RFC 3339, UTC, to the second, as Kubernetes writes it."""
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
