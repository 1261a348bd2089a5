"""Looks at one job, decides with `planning.status`, and carries the decision out.

In this order: the status, then everything else. Each step may fail or be the operator's last; the
next look starts from what is there.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime

from tuneyard.api.plan import Plan
from tuneyard.api.pods import model_uri
from tuneyard.api.progress import Post
from tuneyard.api.status import AttemptStatus, JobStatus, Progress
from tuneyard.controller import metrics
from tuneyard.controller.cluster import FINALIZER, MANAGER, ApiError, Cluster, Key, Object
from tuneyard.controller.job_cache import Entry, World
from tuneyard.controller.queue import Again, Queue
from tuneyard.controller.settings import Settings
from tuneyard.errors import Fault, ManifestError, PlanError
from tuneyard.manifests.manifest import parse
from tuneyard.planning.plan import plan_job
from tuneyard.rendering import names, rayjob
from tuneyard.rendering.placement import awaited_jobs, placed
from tuneyard.status.events import Event, told
from tuneyard.status.observe import Decision, Job, Planned, Waiting, is_finished, observe
from tuneyard.status.observed import Obstacle

PROGRESS_SECONDS = 10.0
"""Least time between two status writes of one job that tell of progress alone."""
READ_SECONDS = 60.0
"""How often an active job's objects are read afresh: watches make it quick, this makes it right."""
PODS_SECONDS = 5.0
"""When to look again for an ended attempt's pods."""

_IN_FORCE = Waiting("Planned", "the plan is in force")
"""Stands for a plan that a decision does not ask for any more."""

log = logging.getLogger("tuneyard")


class Reconciler:
    """Everything that is done to jobs."""

    def __init__(
        self,
        cluster: Cluster,
        settings: Settings,
        *,
        ca: str = "",
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """`ca`: the certificate, in PEM, that training pods check the status server by."""
        self.cluster, self.settings, self.clock = cluster, settings, clock
        self.world = World()
        self.queue: Queue[Key] = Queue(self._work, settings.concurrency)
        self._reporting = (
            rayjob.Reporting(settings.progress_url, ca) if settings.progress_url else None
        )
        self._events: asyncio.Queue[tuple[Key, Object, Event]] = asyncio.Queue(maxsize=10_000)

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.queue.run())
            for _ in range(2):
                tasks.create_task(self._tell_events())

    def take_post(self, key: Key, post: Post) -> None:
        """A post of the newest attempt: an ending is looked at now, progress when it is due."""
        entry = self.world.entry(key)
        entry.post = post
        picture = post.tuneyard
        if picture is not None and picture.outcome is not None:
            self.queue.add(key)
        else:
            self.queue.add_after(key, entry.told_at + PROGRESS_SECONDS - time.monotonic())

    async def current(self, key: Key) -> Job | None:
        """The job as this operator knows it; None: there is none. Raises ApiError."""
        entry = self.world.entries.get(key)
        body = entry.body if entry and entry.body else await self.cluster.job(key)
        try:
            return parse(body) if body is not None else None
        except ManifestError:
            return None

    # ---- one look ---------------------------------------------------------------------------

    async def _work(self, key: Key) -> None:
        started = time.monotonic()
        try:
            await self._look(key)
        except ApiError as error:
            if error.code == 409:  # decided on an old version: read it anew
                self.world.entry(key).body = None
            metrics.RECONCILE_ERRORS.labels(error.reason).inc()
            level = logging.DEBUG if error.code == 409 else logging.WARNING
            log.log(level, "%s %s/%s: %s", key.kind, key.namespace, key.name, error)
            raise Again(error.retry_after) from error
        except Exception as error:
            # One job's defect is not another's: it is logged and tried again, ever less often.
            metrics.RECONCILE_ERRORS.labels(type(error).__name__).inc()
            log.exception("%s %s/%s", key.kind, key.namespace, key.name)
            raise Again from error
        finally:
            metrics.RECONCILE_SECONDS.observe(time.monotonic() - started)

    async def _look(self, key: Key) -> None:
        entry = self.world.entry(key)
        body = entry.body or await self.cluster.job(key)
        if body is None:
            self.world.forget(key)
            self.queue.forget(key)
            return
        entry.body = body
        try:
            job = parse(body)
        except ManifestError as error:
            if "deletionTimestamp" in body["metadata"]:
                await self._delete(key, entry, None)
            else:
                await self._refuse(key, body, error)
            return
        if "deletionTimestamp" in body["metadata"]:
            await self._delete(key, entry, job)
            return
        if not is_finished(job):
            await self._read_if_due(key, entry)
            if FINALIZER not in (body["metadata"].get("finalizers") or ()):
                entry.body = await self.cluster.add_finalizer(body, key)
        await self._decide(key, entry, job)

    async def _decide(self, key: Key, entry: Entry, job: Job) -> None:
        attempt = job.status.attempts[-1] if job.status and job.status.attempts else None
        is_planned = job.status is not None and job.status.plan_digest is not None
        planned = _IN_FORCE if is_planned else await self._planned(key, job)
        decision = observe(job, planned, entry.seen(attempt), self.clock())
        if attempt is not None and _ends_badly(attempt, decision.status):
            # Each kind has a watch of its own: that of pods may not have told yet why.
            await self._read(key)
            decision = observe(job, planned, entry.seen(attempt), self.clock())
        wait = entry.told_at + _patience(job.status, decision.status) - time.monotonic()
        if wait > 0:
            self.queue.add_after(key, wait)
        else:
            job = await self._write(key, entry, job, decision.status)
        await self._act(key, entry, job, decision, planned)
        self.world.count_phase(key, decision.status.phase or "Pending")
        metrics.show_progress((key.namespace, key.kind, key.name), decision.status)
        if is_finished(job) and entry.is_empty:
            self.world.rest(key)
        elif not is_finished(job):
            self.queue.add_after(key, READ_SECONDS)
        if decision.wake_after is not None:
            self.queue.add_after(key, decision.wake_after)

    async def _read_if_due(self, key: Key, entry: Entry) -> None:
        if entry.read_at == 0.0:  # the watches have just listed everything
            entry.read_at = time.monotonic()
        elif time.monotonic() - entry.read_at >= READ_SECONDS:
            await self._read(key)

    async def _read(self, key: Key) -> None:
        ray_jobs, pods = await self.cluster.ray_jobs(key), await self.cluster.pods(key)
        self.world.read_afresh(key, ray_jobs, pods)

    # ---- planning -----------------------------------------------------------------------------

    async def _planned(self, key: Key, job: Job) -> Planned:
        """The plan, or why there is none."""
        try:
            plan = plan_job(job)
            models: dict[str, str] = {}
            for name in awaited_jobs(plan):
                found = await self._model_of(key, name)
                if isinstance(found, Waiting):
                    return found
                models[name] = found
            return placed(plan, profiles=self.settings.profiles, models=models)
        except PlanError as error:
            return error

    async def _model_of(self, key: Key, name: str) -> str | Waiting:
        """Where another job's model lies, or what it is waited for. Raises PlanError."""
        found = [
            body
            for kind in ("FineTuneJob", "AlignmentJob")
            if (body := await self.cluster.job(Key(kind, key.namespace, name)))
            and (kind, name) != (key.kind, key.name)
        ]
        if not found:
            return Waiting("WaitingForModel", f"there is no job {name} in the namespace yet")
        phase = (found[0].get("status") or {}).get("phase")
        if phase == "Succeeded":
            return model_uri(found[0]["spec"]["output"]["uri"])
        if phase == "Failed":
            message = f"job {name} failed, so there is no model: name another one"
            raise PlanError([Fault("spec.model.uri", message)])
        return Waiting("WaitingForModel", f"job {name} is not done yet: {phase or 'Pending'}")

    async def _plan_in_force(self, key: Key, job: Job) -> Plan:
        """The plan whose digest the status names: an operator of another version might plan
        otherwise. Raises ManifestError if it cannot be had any more."""
        digest = (job.status.plan_digest if job.status else None) or ""
        planned = await self._planned(key, job)
        if isinstance(planned, Plan) and names.plan_digest(planned) == digest:
            return planned
        name = names.config_map_name(key.name, digest)
        stored = await self.cluster.config_map(key.namespace, name)
        if stored is None:
            message = f"the plan was in ConfigMap {name}, and that is gone"
            raise ManifestError([Fault("status.planDigest", message)])
        return Plan.model_validate_json(stored["data"]["plan.json"])

    # ---- writing --------------------------------------------------------------------------------

    async def _write(self, key: Key, entry: Entry, job: Job, status: JobStatus) -> Job:
        """Writes what changed in the status; the job as it is then."""
        before, written = job.status, _dump(status)
        patch = _difference(_dump(before), written)
        if not patch:
            return job
        entry.body = await self.cluster.write_status(entry.body or {}, key, patch, written)
        entry.told_at = time.monotonic()
        metrics.count_change(job, before, status)
        for event in told(before, status):
            self._queue_event(key, entry.body, event)
        return job.model_copy(update={"status": status})

    async def _act(
        self, key: Key, entry: Entry, job: Job, decision: Decision, planned: Planned
    ) -> None:
        for name in decision.stop:
            if not await self.cluster.delete_ray_job(key.namespace, name):
                entry.ray_jobs.pop(name, None)  # a read was stale
                self.queue.add(key)
        if decision.start is not None:
            await self._start(key, entry, job, decision.start, planned)
        if decision.delete:
            await self.cluster.delete_job(entry.body or {}, key)
        await self._ask_why(key, entry, job)

    async def _start(self, key: Key, entry: Entry, job: Job, number: int, planned: Planned) -> None:
        """Creates an attempt's objects, once nothing of another attempt is left."""
        if number > 1:
            await self._read(key)
            attempts = {item.attempt for _, item in entry.ray_jobs.values()}
            attempts |= {item.attempt for _, item in entry.pods.values()}
            if attempts - {number}:
                self.queue.add_after(key, PODS_SECONDS)
                return
        try:
            if isinstance(planned, Plan):
                plan = planned
            else:
                plan = await self._plan_in_force(key, job)
            rendered = rayjob.render(
                plan, job, attempt=number, image=self.settings.image, reporting=self._reporting
            )
            await self.cluster.apply(rendered.config_map)
            made = await self.cluster.apply(rendered.ray_job)
        except ManifestError as error:
            entry.obstacle = Obstacle(422, "PlanLost", str(error))
            self.queue.add(key)
        except ApiError as error:
            if not error.is_refusal:
                raise
            if entry.obstacle is None or entry.obstacle.message != error.message:
                entry.obstacle = Obstacle(error.code, error.reason, error.message)
                self.queue.add(key)
        else:
            entry.obstacle = None
            self.world.expect_ray_job(key, {**rendered.ray_job, **made})

    async def _ask_why(self, key: Key, entry: Entry, job: Job) -> None:
        """Reads the RayCluster's warnings while an attempt does not start: nothing else tells of
        pods that were refused."""
        attempt = job.status.attempts[-1] if job.status and job.status.attempts else None
        if attempt is None or attempt.running_at or attempt.finished_at:
            entry.warnings = ()
            return
        ray = next((r for _, r in entry.ray_jobs.values() if r.attempt == attempt.number), None)
        if ray is None or not ray.cluster or ray.suspended or entry.pods:
            return
        warnings = tuple(await self.cluster.warnings(key.namespace, ray.cluster))
        if warnings != entry.warnings:
            entry.warnings = warnings
            self.queue.add(key)
        else:
            self.queue.add_after(key, PROGRESS_SECONDS)

    async def _refuse(self, key: Key, body: Object, error: ManifestError) -> None:
        """Says in the status of a malformed job what is wrong with it. One that was planned has
        been well-formed: it is left as it is, whoever broke it, until it is well again."""
        old, text = body.get("status") or {}, str(error)[:4096]
        self.world.count_phase(key, old.get("phase") or "Failed")
        if old.get("planDigest"):
            log.error("%s %s/%s is malformed: %s", key.kind, key.namespace, key.name, text)
            self.queue.add_after(key, READ_SECONDS)
            return
        if (old.get("failure") or {}).get("message") == text:
            return
        now = self.clock().strftime("%Y-%m-%dT%H:%M:%SZ")
        failure = {"reason": "Malformed", "message": text, "advice": "Correct the manifest."}
        condition = {
            "type": "Failed",
            "status": "True",
            "reason": "Malformed",
            "message": text,
            "lastTransitionTime": now,
        }
        patch = {"phase": "Failed", "failure": failure, "conditions": [condition]}
        await self.cluster.write_status(body, key, patch, old | patch)

    # ---- deletion -------------------------------------------------------------------------------

    async def _delete(self, key: Key, entry: Entry, job: Job | None) -> None:
        """The cluster first, then the output if that is the policy, then the job itself. `job`
        None: it is malformed, so its output stays."""
        body = entry.body or {}
        if FINALIZER not in (body["metadata"].get("finalizers") or ()):
            return
        await self._read(key)
        there = [item.name for _, item in entry.ray_jobs.values() if not item.deleting]
        for name in there:  # not the entry itself: a watch may change it during each wait
            await self.cluster.delete_ray_job(key.namespace, name)
        training = [pod for _, pod in entry.pods.values() if pod.role != "erase"]
        if entry.ray_jobs or training:
            self.queue.add_after(key, PODS_SECONDS)
            return
        if job and _shall_be_erased(job) and not await self._erase(key, body, job):
            self.queue.add_after(key, PODS_SECONDS)
            return
        entry.body = await self.cluster.remove_finalizer(body, key)

    async def _erase(self, key: Key, body: Object, job: Job) -> bool:
        """Whether the output is gone, or cannot be removed."""
        found = await self.cluster.batch_job(key.namespace, names.erasure_name(job))
        if found is None:
            try:
                plan = await self._plan_in_force(key, job)
                await self.cluster.apply(rayjob.render(plan, job, attempt=1).config_map)
                image = self.settings.image
                await self.cluster.apply(rayjob.render_erasure(plan, job, image=image))
            except (ManifestError, ApiError) as error:
                if isinstance(error, ApiError) and not error.is_refusal:
                    raise
                self._queue_event(key, body, _not_erased(job, str(error)))
                return True
            return False
        conditions = (found.get("status") or {}).get("conditions") or ()
        ends = {c["type"]: c for c in conditions if c.get("status") == "True"}
        if "Failed" in ends:
            why = ends["Failed"].get("message") or "its pods failed"
            self._queue_event(key, body, _not_erased(job, why))
        return bool({"Complete", "Failed"} & set(ends))

    # ---- events ---------------------------------------------------------------------------------

    def _queue_event(self, key: Key, body: Object, event: Event) -> None:
        if self._events.full():
            log.warning("too many events wait; dropped %s of %s", event.reason, key.name)
            return
        self._events.put_nowait((key, body["metadata"], event))

    async def _tell_events(self) -> None:
        """Posts events, beside everything else: nothing waits for them."""
        while True:
            key, metadata, event = await self._events.get()
            try:
                await self.cluster.post_event(key.namespace, _event(key, metadata, event))
            except ApiError as error:
                if error.code not in (404, 409):
                    log.warning("event %s of %s was not taken: %s", event.reason, key.name, error)


def _event(key: Key, metadata: Object, event: Event) -> Object:
    """Named by what it says at which version, so that it is there once."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    said = f"{metadata['uid']} {metadata['resourceVersion']} {event.reason} {event.message}"
    regarding = {
        "apiVersion": "tuneyard.io/v1alpha1",
        "kind": key.kind,
        "namespace": key.namespace,
        "name": key.name,
        "uid": metadata["uid"],
    }
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {
            "name": f"{key.name}.{hashlib.sha256(said.encode()).hexdigest()[:16]}",
            "namespace": key.namespace,
        },
        "involvedObject": regarding,
        "type": event.type,
        "reason": event.reason,
        "message": event.message[:1024],
        "source": {"component": MANAGER},
        "reportingComponent": MANAGER,
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
    }


def _shall_be_erased(job: Job) -> bool:
    began = job.status is not None and bool(job.status.attempts)
    return began and job.spec.output.deletion_policy == "Delete"


def _not_erased(job: Job, why: str) -> Event:
    text = f"the output at {job.spec.output.uri} was not removed: {why}"
    return Event("Warning", "OutputLeft", text)


# ---- statuses as JSON ---------------------------------------------------------------------------


def _dump(status: JobStatus | None) -> Object:
    return status.model_dump(mode="json", by_alias=True, exclude_none=True) if status else {}


def _difference(before: Object, after: Object) -> Object:
    """The merge patch (RFC 7386) from one to the other."""
    patch: Object = {name: None for name in before if name not in after}
    for name, value in after.items():
        old = before.get(name)
        if isinstance(old, dict) and isinstance(value, dict):
            if inner := _difference(old, value):
                patch[name] = inner
        elif name not in before or old != value:
            patch[name] = value
    return patch


def _ends_badly(attempt: AttemptStatus, after: JobStatus) -> bool:
    """Whether an attempt that was open is closed, and not by success."""
    last = after.attempts[-1]
    return not attempt.finished_at and bool(last.finished_at) and last.reason != "Succeeded"


def _patience(before: JobStatus | None, after: JobStatus) -> float:
    """How many seconds after the last write a change is written."""
    if before is None or before == after or _but_numbers(before) != _but_numbers(after):
        return 0.0
    # That the RayJob which was wanted is there: the next change tells it along, and a write of it
    # alone would be one in seven of a burst of new jobs.
    is_identity = _but_identity(before) == _but_identity(after)
    return READ_SECONDS if is_identity else PROGRESS_SECONDS


def _but_identity(status: JobStatus) -> JobStatus:
    attempts = [attempt.model_copy(update={"ray_job_uid": None}) for attempt in status.attempts]
    return status.model_copy(update={"attempts": attempts})


def _but_numbers(status: JobStatus) -> JobStatus:
    quiet = {"stage": None, "last_step": None, "ray_job_uid": None}
    attempts = [attempt.model_copy(update=quiet) for attempt in status.attempts]
    rest: Object = {"stages": [], "attempts": attempts}
    if status.progress is not None:
        rest["progress"] = _SOME_PROGRESS
    return status.model_copy(update=rest)


_SOME_PROGRESS = Progress(
    stage="", step=0, total_steps=0, percentage=0, last_updated_time="1970-01-01T00:00:00Z"
)
