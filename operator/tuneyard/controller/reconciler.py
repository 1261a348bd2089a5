"""Reconcile one job: decide with `status.observe` and carry the decision out.

The status is written first, then the objects. Each step may fail, and the operator may be killed
after any step: the next reconcile starts from the objects that exist.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

from tuneyard.api.job_facts import FitAnswer, JobFacts
from tuneyard.api.plan import Plan
from tuneyard.api.progress import Post
from tuneyard.api.status import AttemptStatus, Failure, JobStatus
from tuneyard.controller import metrics
from tuneyard.controller.cluster import (
    WATCHED_OBJECTS,
    ApiError,
    Cluster,
    Key,
    Object,
    has_finalizer,
    needs_finalizer,
)
from tuneyard.controller.erasure import Erasure, output_left
from tuneyard.controller.event_poster import EventPoster
from tuneyard.controller.job_cache import AttemptFit, CachedJob, JobCache, key_from_labels, version
from tuneyard.controller.planner import Planner
from tuneyard.controller.queue import Queue, Requeue, backoff
from tuneyard.controller.settings import Settings
from tuneyard.controller.write_budget import Turns, WriteBudget
from tuneyard.errors import ManifestError
from tuneyard.manifests.manifest import KINDS, parse, unknown_fields
from tuneyard.planning.decision import Decision as FitDecision
from tuneyard.rendering import names, rayjob
from tuneyard.rendering.stored_plan import PlanLostError, PlanMissingError, PlanUnreadableError
from tuneyard.status.events import Event, transition_events
from tuneyard.status.observe import (
    Decision,
    Job,
    Planned,
    Waiting,
    has_fixed_plan,
    is_finished,
    is_preparing,
    observe,
)
from tuneyard.status.observed import (
    NOT_STORED,
    CreateError,
    ObservedState,
    Pod,
    is_erasing,
    is_lost,
    names_of,
)
from tuneyard.status.patches import status_patch
from tuneyard.status.times import rfc3339

RECHECK_SECONDS = 600.0
"""An active job is reconciled this often, or twice as often, though no watch reports a change. Such
a reconcile sends no request if nothing has changed."""
WARNING_SECONDS, WARNING_READS_PER_SECOND = 3.0, 2.0
"""Least time between two reads of the warnings of one RayCluster, and most reads over all jobs."""
CREATE_TRIES = 3
"""Failed tries to create an attempt's objects before the status reports an error that may pass."""
CREATE_SECONDS = 10.0
"""Time between two tries to create an attempt's objects once the status reports the error, and how
long the error counts: after an outage, the objects are tried again before the start deadline can
end the job."""
PODS_RECHECK_SECONDS = 5.0
"""Interval of the checks for pods that are to be removed."""

QUIET_SECONDS = 2.0
"""How long an operator that starts waits for the next of these objects from its watches."""

ObjectId = tuple[Key, str, str]
"""A RayJob, a Job or a pod by its job, its collection and its name."""
Versions = dict[ObjectId, int]
"""Resource versions."""
DeleteObject = Callable[..., Awaitable[bool]]
"""Deletes an object of a namespace by its name, its UID and its version, and returns whether it
existed."""

_ALREADY_PLANNED = Waiting("Planned", "the plan is in force")
"""Given to `observe` for a job that has been planned, which needs no plan."""

log = logging.getLogger("tuneyard")


class Reconciler:
    """Reconcile the jobs of all watched namespaces."""

    def __init__(
        self,
        cluster: Cluster,
        settings: Settings,
        *,
        ca: str = "",
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Make a reconciler. `ca`: the certificate authorities of the status server, in PEM."""
        self.cluster, self.settings, self.clock = cluster, settings, clock
        self.cache = JobCache()
        self.queue: Queue[Key] = Queue(self._process, settings.concurrency)
        self._write_budget = WriteBudget(settings.progress_writes)
        self._warning_turns = Turns(WARNING_READS_PER_SECOND)
        self._reporting = (
            rayjob.Reporting(settings.progress_url, ca) if settings.progress_url else None
        )
        self._existed: frozenset[Key] | None = None
        """The jobs that had RayJobs or pods when the operator started; None: not listed yet."""
        self._events = EventPoster(cluster, is_busy=lambda: self.queue.is_behind)
        self._planner = Planner(cluster, settings.profiles)
        self._deciding: dict[tuple[Key, str, int], asyncio.Task[FitDecision | None]] = {}
        """The decisions that are being made, by job, its UID and its attempt."""
        self._erasure = Erasure(cluster, self._planner, settings.image, self._events)

    async def run(self) -> None:
        """Work until canceled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._events.run())
            await self._await_watches(tasks)
            tasks.create_task(self.queue.run())

    def trust(self, ca: str) -> None:
        """Give pods of new attempts these certificate authorities, in PEM."""
        self._reporting = self._reporting and self._reporting._replace(ca=ca)

    def accept_post(self, key: Key, uid: str, post: Post) -> None:
        """Store a post of the newest attempt of the job with this UID. A post with an outcome is
        reconciled at once, any other post when the next status write is due."""
        cached = self.cache.job(key)
        if cached.uid not in ("", uid):
            return
        cached.uid, cached.post = uid, post
        if post.tuneyard is not None and post.tuneyard.outcome is not None:
            self.queue.add(key)
        else:
            self.queue.add_after(key, self._write_budget.wait_of_post(cached, post))

    async def fit_of(self, key: Key, job: Job, attempt: int, facts: JobFacts) -> FitAnswer | None:
        """Return whether a job whose attempt asks with these facts fits its workers; keep the
        estimate for its status. None: it cannot be said. Raises ApiError.

        It is decided once for an attempt, and once before while it is preparing: a question that is
        repeated gets the same answer, also while the first one is being decided.
        """
        uid = job.metadata.uid or ""
        cached = self.cache.job(key)
        if cached.uid not in ("", uid):
            return None
        newest = _newest_attempt(job)
        asks = (attempt, newest is not None and is_preparing(newest))
        if cached.fit is None or (cached.fit.attempt, cached.fit.is_preparing) != asks:
            decision = await self._decision(key, job, attempt, facts)
            cached = self.cache.job(key)
            if cached.uid not in ("", uid):  # meanwhile a new job has the name
                return None
            cached.uid, cached.fit = uid, AttemptFit(*asks, decision)
        return cached.fit.answer

    async def _decision(
        self, key: Key, job: Job, attempt: int, facts: JobFacts
    ) -> FitDecision | None:
        """Return the decision about an attempt, of which one is made at a time."""
        asked = (key, job.metadata.uid or "", attempt)
        if asked not in self._deciding:
            task = asyncio.create_task(self._planner.decide(key, job, facts))
            self._deciding[asked] = task
            task.add_done_callback(lambda _: self._deciding.pop(asked))
        return await asyncio.shield(self._deciding[asked])

    async def current(self, key: Key, pod: Pod) -> Job | None:
        """Return the job that a pod belongs to, from the cache if possible; None: it does not exist
        any more, although a new job may have its name, or it is being deleted. Raises ApiError,
        ManifestError."""
        cached = self.cache.jobs.get(key)
        body = cached.body if cached else None
        if body is None or not _is_of(pod, body):  # the cache may be old
            body = await self.cluster.job(key)
        if body is None or not _is_of(pod, body) or "deletionTimestamp" in body["metadata"]:
            return None
        return parse(body)

    async def list_objects(self) -> Versions:
        """List the metadata of all RayJobs, Jobs and pods. Raises ApiError."""
        found = Versions()
        for namespace in self.settings.namespaces or (None,):
            for collection in WATCHED_OBJECTS:
                async for item in self.cluster.list_objects(collection, namespace):
                    if key := key_from_labels(item):
                        found[key, collection, item["metadata"]["name"]] = version(item)
        return found

    async def _await_watches(self, tasks: asyncio.TaskGroup) -> None:
        """Wait until the watches have reported the objects that exist, or none for QUIET_SECONDS:
        each job is then reconciled once, and not again for each of its objects. If the objects
        cannot be listed, do not wait, and list them meanwhile."""
        try:
            left = await self._list_existing()
        except ApiError as error:
            log.warning("the objects of the jobs could not be listed: %s", error)
            tasks.create_task(self._retry_listing(error))
            return
        quiet_at = time.monotonic() + QUIET_SECONDS
        while left and time.monotonic() < quiet_at:
            await asyncio.sleep(QUIET_SECONDS / 20)
            reported = {item for item in left if self.cache.has_object(*item)}
            if reported:
                left -= reported
                quiet_at = time.monotonic() + QUIET_SECONDS

    async def _list_existing(self) -> set[ObjectId]:
        """List the objects of jobs that exist, and note their jobs: each kind has its own watch,
        and that of pods may report them after a new job with the name of a deleted one. Raises
        ApiError."""
        found = set(await self.list_objects())
        self._existed = frozenset(key for key, _, _ in found)
        return found

    async def _retry_listing(self, error: ApiError) -> None:
        for failures in itertools.count(1):
            await asyncio.sleep(backoff(failures, error.retry_after))
            try:
                await self._list_existing()
            except ApiError as next_error:
                error = next_error
                log.warning("the objects of the jobs could not be listed: %s", error)
            else:
                return

    async def check_existence(self) -> None:
        """Read each known job that no list contains: kopf does not report what was deleted while
        it reconnected. Raises ApiError."""
        known, listed = self.cache.known_jobs(), set[Key]()
        for namespace in self.settings.namespaces or (None,):
            for kind in KINDS:
                listed |= await self.cluster.jobs(kind, namespace)
        for key in known - listed:
            self.cache.job(key).body = None
            self.queue.add(key)

    # ---- one reconcile ----------------------------------------------------------------------

    async def _process(self, key: Key) -> None:
        started = time.monotonic()
        try:
            await self._reconcile(key)
        except ApiError as error:
            if error.code in (404, 409):  # the cached version is old: read the job again
                self.cache.job(key).body = None
            metrics.RECONCILE_ERRORS.labels(error.reason).inc()
            level = logging.DEBUG if error.code == 409 else logging.WARNING
            log.log(level, "%s %s/%s: %s", key.kind, key.namespace, key.name, error)
            raise Requeue(error.retry_after) from error
        except Exception as error:
            # A defect that one job triggers must not stop the others: log it, retry with backoff.
            metrics.RECONCILE_ERRORS.labels(type(error).__name__).inc()
            log.exception("%s %s/%s", key.kind, key.namespace, key.name)
            raise Requeue from error
        finally:
            metrics.RECONCILE_SECONDS.observe(time.monotonic() - started)

    async def _reconcile(self, key: Key) -> None:
        cached = self.cache.job(key)
        body = cached.body
        if body is None:
            body = await self.cluster.job(key)
            if body is None:
                self._forget(key)
                return
            cached = self.cache.store_job(key, body)
        try:
            job = parse(body)
        except ManifestError as error:
            if "deletionTimestamp" in body["metadata"]:
                await self._let_go(key, cached, None)
            else:
                await self._report_malformed(key, body, error)
            return
        if "deletionTimestamp" in body["metadata"]:
            await self._let_go(key, cached, job)
            return
        if not is_finished(job) and needs_finalizer(body) and not has_finalizer(body):
            cached.body = await self.cluster.add_finalizer(body, key)
        if has_finalizer(body) and not needs_finalizer(body):  # set by 0.2
            cached.body = await self.cluster.remove_finalizer(body, key)
        await self._decide(key, cached, job)

    async def _decide(self, key: Key, cached: CachedJob, job: Job) -> None:
        attempt = _newest_attempt(job)
        is_fixed = has_fixed_plan(job, cached.create_error)
        planned = _ALREADY_PLANNED if is_fixed else await self._planner.plan(key, job)
        if not is_fixed:
            cached.unknown_fields = tuple(unknown_fields(cached.body or {}))
        if cached.waits_for_next_try and time.monotonic() >= cached.create_after:
            cached.create_error = None
        decision = observe(job, planned, cached.observed_state(attempt), self.clock())
        if attempt is not None and _closes_without_success(attempt, decision.status):
            # Each kind has its own watch: the pods' watch may not have reported the reason yet.
            await self.read(key)
            if name := _owner_without_pods(cached.observed_state(attempt), attempt):
                cached.warnings = tuple(await self.cluster.warnings(key.namespace, name))
            decision = observe(job, planned, cached.observed_state(attempt), self.clock())
        wait = self._write_budget.wait(cached, job.status, decision.status)
        if wait > 0:
            self.queue.add_after(key, wait)
        else:
            job = await self._write(key, cached, job, decision.status)
        await self._act(key, cached, job, decision, planned)
        self.cache.count_phase(key, decision.status.phase or "Pending")
        metrics.set_progress((key.namespace, key.kind, key.name), decision.status)
        if is_finished(job) and cached.is_empty:
            self.cache.evict(key)
        else:
            self.queue.add_after(key, RECHECK_SECONDS * random.uniform(0.5, 1.0))
        if decision.wake_after is not None:
            self.queue.add_after(key, decision.wake_after)

    def _forget(self, key: Key) -> None:
        """Drop a job that does not exist any more. If it still has RayJobs or pods, their deletion
        adds it to the queue once more."""
        self.cache.forget(key)
        self.queue.forget(key)

    async def read(self, key: Key) -> None:
        """Read a job's RayJobs, Jobs and pods from the API server."""
        self.cache.replace_objects(
            key,
            await self.cluster.ray_jobs(key),
            await self.cluster.preparations(key),
            await self.cluster.pods(key),
        )

    # ---- writing --------------------------------------------------------------------------------

    async def _write(self, key: Key, cached: CachedJob, job: Job, status: JobStatus) -> Job:
        """Write the changes of the status; return the job with the new status."""
        before, stored = job.status, (cached.body or {}).get("status") or {}
        patch, written = status_patch(stored, before, status)
        if not patch:
            return job
        cached.body = await self.cluster.write_status(cached.body or {}, key, patch, written)
        self._write_budget.count(cached, before, status, self.clock())
        metrics.count_change(job, before, status)
        for event in transition_events(before, status):
            self._events.add(key, cached.body, event)
        return job.model_copy(update={"status": status})

    async def _act(
        self, key: Key, cached: CachedJob, job: Job, decision: Decision, planned: Planned
    ) -> None:
        for name in decision.stop:
            await self._delete_ray_job(key, cached, name)
        if decision.start is not None:
            await self._start(key, cached, job, decision.start, planned)
        # After the start: a Job that is done and cannot be deleted keeps no RayJob from starting.
        for name in decision.stop_preparing:
            await self._delete_preparation(key, cached, name)
        if decision.delete:
            await self.cluster.delete_job(cached.body or {}, key)
        await self._read_warnings(key, cached, job)

    async def _delete_ray_job(self, key: Key, cached: CachedJob, name: str) -> None:
        """Delete a RayJob as it was observed. Raises ApiError 409 if it has changed since, so that
        everything is read again before the next decision."""
        await self._delete(key, cached.ray_jobs, name, self.cluster.delete_ray_job)

    async def _delete_preparation(self, key: Key, cached: CachedJob, name: str) -> None:
        """Delete a Job that prepares data as it was observed. Raises ApiError 409 as for a
        RayJob."""
        await self._delete(key, cached.preparations, name, self.cluster.delete_preparation)

    async def _delete(
        self, key: Key, known: dict[str, tuple[int, Any]], name: str, delete: DeleteObject
    ) -> None:
        if name not in known:  # a watch has reported its deletion
            return
        version, item = known[name]
        try:
            existed = await delete(key.namespace, name, uid=item.uid, version=str(version))
        except ApiError as error:
            if error.code == 409:
                await self.read(key)
            raise
        if not existed:
            known.pop(name, None)  # the cache was stale
            self.queue.add(key)

    def _may_have_objects(self, key: Key) -> bool:
        """Return whether a deleted job of this name may have objects that no watch has reported."""
        existed = self._existed is None or key in self._existed
        return existed or self.cache.had_former(key)

    async def _start(
        self, key: Key, cached: CachedJob, job: Job, number: int, planned: Planned
    ) -> None:
        """Create an attempt's objects, once no object of another attempt is left: while it is
        preparing its Job, then its RayJob."""
        if cached.waits_for_next_try:
            self.queue.add_after(key, cached.create_after - time.monotonic())
            return
        if number > 1 or self._may_have_objects(key):
            await self.read(key)
            now = self.clock()
            if any(not is_lost(item, now) for item in cached.other_objects(number)):
                self.queue.add_after(key, PODS_RECHECK_SECONDS)
                return
        try:
            if isinstance(planned, Plan):
                plan = planned
            else:
                plan = await self._planner.recorded(key, job)
            created = await self._create(plan, job, number)
        except PlanLostError as error:
            if isinstance(error, PlanMissingError) and not _has_begun(job):
                cached.create_error = CreateError(0, NOT_STORED, str(error))
                self.queue.add(key)
                return
            self._store_create_error(key, cached, CreateError(422, "PlanLost", str(error)))
        except PlanUnreadableError as error:
            self._store_create_error(key, cached, CreateError(0, "PlanUnreadable", str(error)))
        except ApiError as error:
            if error.code == 409:  # the cache does not know the RayJob that has the name
                await self.read(key)
            self._keep_create_error(key, cached, error)
        else:
            cached.create_error, cached.create_failures, cached.warnings = None, 0, ()
            self.cache.add_created(key, created)

    async def _create(self, plan: Plan, job: Job, number: int) -> Object:
        """Create the objects of an attempt; return its Job while it is preparing, else its RayJob.
        Raises ApiError 409 if the name is taken."""
        attempt, image = _newest_attempt(job), self.settings.image
        rendered = rayjob.render(
            plan,
            job,
            attempt=number,
            image=image,
            reporting=self._reporting,
            reduced_to=attempt.workers if attempt else None,
        )
        item = rendered.ray_job
        if attempt is not None and is_preparing(attempt):
            item = rayjob.render_preparation(
                plan, job, attempt=number, image=image, reporting=self._reporting
            )
        # The attempts of a job share all other objects, and so do the Job and the RayJob of one.
        is_new = number == 1 and not (attempt and attempt.prepared_at)
        await self.cluster.ensure(rendered.config_map, is_new=is_new)
        if self.settings.job_network_policies:
            await self.cluster.ensure(rendered.network_policy, is_new=is_new)
        return await self.cluster.create(item)

    def _store_create_error(self, key: Key, cached: CachedJob, error: CreateError) -> None:
        """Reconcile again with the error, which counts until the next try is due."""
        cached.create_error = error
        cached.create_after = time.monotonic() + CREATE_SECONDS
        self.queue.add(key)

    def _keep_create_error(self, key: Key, cached: CachedJob, error: ApiError) -> None:
        """Keep the error for the status. Raises an error that may pass, so that it is retried, up
        to CREATE_TRIES times in a row."""
        cached.create_failures += 1
        if not error.is_refusal and cached.create_failures < CREATE_TRIES:
            raise error
        found = CreateError(error.code, error.reason, error.message)
        self._store_create_error(key, cached, found)

    async def _read_warnings(self, key: Key, cached: CachedJob, job: Job) -> None:
        """Read the warnings of the RayCluster, or of the Job before it, while an attempt does not
        start: only these events report that its pods were refused."""
        attempt = _newest_attempt(job)
        if attempt is None or attempt.running_at or attempt.finished_at:
            cached.warnings = ()
            return
        name = _owner_without_pods(cached.observed_state(attempt), attempt)
        if not name:
            return
        now = time.monotonic()
        if cached.warnings_due > now:
            self.queue.add_after(key, cached.warnings_due - now)
            return
        cached.warnings_due = self._warning_turns.take(now + WARNING_SECONDS)
        warnings = tuple(await self.cluster.warnings(key.namespace, name))
        if warnings != cached.warnings:
            cached.warnings = warnings
            self.queue.add(key)
        else:
            self.queue.add_after(key, cached.warnings_due - now)

    async def _report_malformed(self, key: Key, body: Object, error: ManifestError) -> None:
        """Report the error of a malformed job in its status. The status of a job that was planned
        before, or whose very spec another version of the operator read, stays unchanged until its
        manifest is valid again."""
        old, text = body.get("status") or {}, str(error)[:4096]
        self.cache.count_phase(key, old.get("phase") or "Failed")
        was_read = old.get("observedGeneration") == body["metadata"].get("generation")
        if old.get("planDigest") or was_read:
            log.error("%s %s/%s is malformed: %s", key.kind, key.namespace, key.name, text)
            self.queue.add_after(key, RECHECK_SECONDS)
            return
        if (old.get("failure") or {}).get("message") == text:
            return
        now = rfc3339(self.clock())
        failure = Failure(reason="Malformed", message=text, advice="Correct the manifest.")
        condition = {
            "type": "Failed",
            "status": "True",
            "reason": failure.reason,
            "message": text,
            "lastTransitionTime": now,
        }
        found = failure.model_dump(mode="json", by_alias=True)
        patch = {"phase": "Failed", "failure": found, "conditions": [condition]}
        await self.cluster.write_status(body, key, patch, old | patch)

    # ---- deletion -------------------------------------------------------------------------------

    async def _let_go(self, key: Key, cached: CachedJob, job: Job | None) -> None:
        """Let a deleted job go; first erase its output if the deletion policy asks for it. `job`
        None: the manifest is malformed, and the output stays. Kubernetes' garbage collector removes
        the objects of every deleted job."""
        if not has_finalizer(cached.body or {}):
            return
        if job is None and needs_finalizer(cached.body or {}):
            uri = str((cached.body or {})["spec"]["output"].get("uri"))
            why = "the manifest is malformed"
            await self._events.post(key, cached.body or {}, output_left(uri, why))
        if job and _should_erase(job) and (text := await self._next_step(key, cached, job)):
            await self._report_waiting(key, cached, text)
            self.queue.add_after(key, PODS_RECHECK_SECONDS)
            return
        cached.body = await self.cluster.remove_finalizer(cached.body or {}, key)

    async def _next_step(self, key: Key, cached: CachedJob, job: Job) -> str:
        """Take the next step to erase a deleted job's output; return what it waits for, "" at the
        end."""
        since = (cached.body or {})["metadata"]["deletionTimestamp"]
        await self.read(key)
        existing = [item.name for _, item in cached.ray_jobs.values() if not item.deleting]
        for name in existing:  # a copy: a watch may change the cache during each request
            await self._delete_ray_job(key, cached, name)
        existing = [item.name for _, item in cached.preparations.values() if not item.deleting]
        for name in existing:
            await self._delete_preparation(key, cached, name)
        now = self.clock()
        left = [item for item in cached.objects if not (is_erasing(item) or is_lost(item, now))]
        if left:
            return f"waiting since {since} for {names_of(left)} to be removed"
        try:
            awaited = await self._erasure.step(key, cached.body or {}, job)
        except ApiError as error:
            text = f"waiting since {since} for Job {names.erasure_name(job)}: {error}"
            await self._report_waiting(key, cached, text)
            raise
        return f"waiting since {since} for {awaited}" if awaited else ""

    async def _report_waiting(self, key: Key, cached: CachedJob, text: str) -> None:
        """Write into the status, and into an event, what the deletion of a job waits for."""
        body = cached.body or {}
        old = body.get("status") or {}
        conditions = {each["type"]: each for each in old.get("conditions") or ()}
        running = conditions.get("Running", {})
        if (running.get("reason"), running.get("message")) == ("Deleting", text):
            return
        is_new = running.get("status") != "False"
        since = rfc3339(self.clock()) if is_new else running["lastTransitionTime"]
        conditions["Running"] = {
            "type": "Running",
            "status": "False",
            "reason": "Deleting",
            "message": text,
            "lastTransitionTime": since,
        }
        patch = {"conditions": list(conditions.values())}
        cached.body = await self.cluster.write_status(body, key, patch, old | patch)
        self._events.add(key, cached.body, Event("Normal", "Deleting", text))


def _has_begun(job: Job) -> bool:
    """Return whether an attempt has had a RayJob or a Job, which are created after the stored
    plan."""
    attempts = job.status.attempts if job.status else ()
    return any(attempt.ray_job_uid or attempt.prepare_job_uid for attempt in attempts)


def _newest_attempt(job: Job) -> AttemptStatus | None:
    return job.status.attempts[-1] if job.status and job.status.attempts else None


def _is_of(pod: Pod, body: Object) -> bool:
    metadata = body["metadata"]
    return pod.belongs_to(metadata["uid"], metadata.get("creationTimestamp") or "")


def _should_erase(job: Job) -> bool:
    has_begun = job.status is not None and bool(job.status.attempts)
    return has_begun and job.spec.output.deletion_policy == "Delete"


# ---- changes of a status -------------------------------------------------------------------------


def _owner_without_pods(state: ObservedState, attempt: AttemptStatus) -> str:
    """Return the object that should have created the pods of an attempt, its RayCluster or its Job,
    if there are none and there have been none; "": otherwise."""
    if is_preparing(attempt):
        job = state.preparation(attempt.number)
        if job is None or job.suspended or job.ended or state.pods or attempt.preparing_at:
            return ""
        return job.name
    ray = state.ray_job(attempt.number)
    if ray is None or ray.suspended or state.pods or attempt.running_at:
        return ""
    return ray.cluster


def _closes_without_success(attempt: AttemptStatus, after: JobStatus) -> bool:
    """Return whether the open attempt is closed in `after` without success."""
    last = next((each for each in after.attempts if each.number == attempt.number), attempt)
    return not attempt.finished_at and bool(last.finished_at) and last.reason != "Succeeded"
