"""Erase the output of a deleted job by a Job (batch) of its own."""

from __future__ import annotations

from tuneyard.controller.cluster import ApiError, Cluster, Key, Object, controller_of
from tuneyard.controller.event_poster import EventPoster
from tuneyard.controller.planner import Planner
from tuneyard.errors import ManifestError
from tuneyard.rendering import rayjob
from tuneyard.rendering.names import erasure_name
from tuneyard.status.events import Event
from tuneyard.status.observe import Job


class Erasure:
    """The erasure of outputs. An output that cannot be erased stays, and an event says why."""

    def __init__(self, cluster: Cluster, planner: Planner, image: str, events: EventPoster) -> None:
        """`image`: the trainer image of jobs that set no image."""
        self._cluster, self._planner, self._image = cluster, planner, image
        self._events = events

    async def step(self, key: Key, body: Object, job: Job) -> str:
        """Take the next step to erase the output of a job without pods. Return what it waits for;
        "": the output is erased or cannot be erased. Raises ApiError."""
        name = erasure_name(job)
        found = await self._cluster.batch_job(key.namespace, name)
        if found is None:
            is_created = await self._create(key, body, job)
            return _to_erase(name) if is_created else ""
        if controller_of(found) != job.metadata.uid:
            # The garbage collector removes the Job of a deleted job of this name.
            return f"Job {name}, which belongs to another owner, to be removed: its name is needed"
        conditions = (found.get("status") or {}).get("conditions") or ()
        results = {c["type"]: c for c in conditions if c.get("status") == "True"}
        # A Job with a pod on a lost node has FailureTarget and never Failed.
        if failed := results.get("Failed") or results.get("FailureTarget"):
            await self._report(key, body, job, failed.get("message") or "it failed")
            return ""
        return "" if "Complete" in results else _to_erase(name)

    async def _create(self, key: Key, body: Object, job: Job) -> bool:
        """Create the Job that erases the output; return whether that was possible."""
        try:
            plan = await self._planner.for_erasure(key, job)
            config_map = rayjob.render(plan, job, attempt=1).config_map
            await self._cluster.ensure(config_map, is_new=False)
            erasure = rayjob.render_erasure(plan, job, image=self._image)
            await self._cluster.ensure(erasure, is_new=True)
        except (ManifestError, ApiError) as error:
            if isinstance(error, ApiError) and not error.is_refusal:
                raise
            await self._report(key, body, job, str(error))
            return False
        return True

    async def _report(self, key: Key, body: Object, job: Job, why: str) -> None:
        """Post the event before the job goes: nothing else tells that its output stays."""
        await self._events.post(key, body, output_left(job.spec.output.uri, why))


def _to_erase(name: str) -> str:
    return f"Job {name} to erase the output, which may take {rayjob.ERASE_SECONDS} s"


def output_left(uri: str, why: str) -> Event:
    """Return the event of an output that was not erased."""
    return Event("Warning", "OutputLeft", f"the output at {uri} was not removed: {why}")
