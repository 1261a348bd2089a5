"""Plan the jobs of a cluster: with its profiles and the models of other jobs, or as recorded."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from tuneyard.api.compute import Compute
from tuneyard.api.job_facts import JobFacts
from tuneyard.api.plan import Plan, SourceInput
from tuneyard.controller.cluster import Cluster, Key
from tuneyard.errors import Fault, ManifestError, PlanError
from tuneyard.manifests.manifest import parse
from tuneyard.planning.decision import Decision, decide
from tuneyard.planning.plan import plan_job
from tuneyard.rendering import names
from tuneyard.rendering.placement import awaited_jobs, placed
from tuneyard.rendering.stored_plan import stored_plan
from tuneyard.status.observe import Job, Planned, Waiting


class Planner:
    """The plans of jobs. Every method raises ApiError."""

    def __init__(self, cluster: Cluster, profiles: Mapping[str, Compute]) -> None:
        """`profiles`: the platform team's compute profiles, by name."""
        self._cluster, self._profiles = cluster, profiles

    async def plan(self, key: Key, job: Job) -> Planned:
        """Return the plan of a job, or why there is none."""
        try:
            plan, jobs, waiting = plan_job(job), dict[str, Plan](), None
            for name, source in awaited_jobs(plan).items():
                found = await self._awaited_job(key, name, source)
                if isinstance(found, Waiting):
                    return found
                jobs[name], phase = found
                if phase != "Succeeded":
                    waiting = Waiting("WaitingForModel", f"job {name} is not done yet: {phase}")
            # Before the other job is done too: a fault does not wait for it.
            result = placed(plan, profiles=self._profiles, jobs=jobs)
        except PlanError as error:
            return error
        return waiting or result

    async def _awaited_job(
        self, key: Key, name: str, source: SourceInput
    ) -> tuple[Plan, str] | Waiting:
        """Return the plan and the phase of another job, or why there is none. `source`: the source
        that names the job. Raises PlanError for a failed job."""
        found = [
            body
            for kind in ("FineTuneJob", "AlignmentJob")
            if (body := await self._cluster.job(Key(kind, key.namespace, name)))
            and (kind, name) != (key.kind, key.name)
        ]
        if not found:
            message = f"the namespace has no job {name}: create it, or change {source.path}"
            return Waiting("WaitingForModel", message)
        phase = (found[0].get("status") or {}).get("phase") or "Pending"
        if phase == "Failed":
            message = f"job {name} failed and has no model: name another job or another model"
            raise PlanError([Fault(source.path, message)])
        try:
            return plan_job(parse(found[0])), phase
        except ManifestError as error:
            message = f"this version of the operator cannot read job {name}: {error}"
            return Waiting("WaitingForModel", message)

    async def recorded(self, key: Key, job: Job) -> Plan:
        """Return the plan that the status records by its digest. If this version of the operator
        plans the job differently, the plan is read from its ConfigMap. Raises PlanLostError,
        PlanUnreadableError."""
        digest = (job.status.plan_digest if job.status else None) or ""
        planned = await self.plan(key, job)
        if isinstance(planned, Plan) and names.plan_digest(planned) == digest:
            return planned
        name = names.config_map_name(key.name, digest)
        return stored_plan(await self._cluster.config_map(key.namespace, name), name, digest)

    async def decide(self, key: Key, job: Job, facts: JobFacts) -> Decision | None:
        """Return whether the job fits its workers, decided in a thread: it takes up to a second
        (32 rounds of PPO). None: its model is not described, or its plan cannot be read, which
        another part reports."""
        try:
            plan = await self.recorded(key, job)
        except ManifestError:
            return None
        return await asyncio.to_thread(decide, plan, facts)

    async def for_erasure(self, key: Key, job: Job) -> Plan:
        """Return the recorded plan, or another plan of the job: all of them have its output. Raises
        ManifestError if there is none."""
        try:
            return await self.recorded(key, job)
        except ManifestError:
            planned = await self.plan(key, job)
            if isinstance(planned, Plan):
                return planned
            raise
