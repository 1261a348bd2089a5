"""The decision whether a job trains, from the facts that its driver reports."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from tuneyard.api.earlier import current
from tuneyard.api.job_facts import ChosenSettings, Device, FitAnswer, JobFacts
from tuneyard.api.plan import Plan
from tuneyard.api.status import Failure, MemoryEstimate, MemoryPart, StageEstimate
from tuneyard.planning import fit as fitting
from tuneyard.planning.fit import Fit, Job
from tuneyard.planning.hardware import CPU_PROCESS_BYTES, UNKNOWN, Cpu, Gpu, declared_gpu
from tuneyard.planning.memory.lengths import CPU_BIN_TOKENS, Lengths
from tuneyard.planning.memory.parts import Part, StageMemory, gib
from tuneyard.planning.memory.stages import settings_of

MOST_BYTES = (1 << 63) - 1
"""The largest number that a status can hold."""


class Decision(NamedTuple):
    """The estimate of a job and the answer to its driver."""

    estimate: MemoryEstimate
    """For the status."""
    answer: FitAnswer
    """For the driver."""


def decide(plan: Plan, facts: JobFacts) -> Decision | None:
    """Return whether a job may train, and with which settings. None: its memory is not known.

    Nothing is refused on a device that is not described.
    """
    job = job_of(plan, facts)
    if job is None:
        return None
    found = fitting.fit(job)
    return Decision(_estimate(job, found), answer_of(job, found))


def job_of(plan: Plan, facts: JobFacts) -> Job | None:
    """Return the job of a plan and its facts. None: its model is not described."""
    model = facts.model
    if model is None:
        return None
    plan = plan.model_copy(update={"stages": [current(stage) for stage in plan.stages]})
    allowed = Lengths.of(plan, model)
    device = device_of(plan, facts.device)
    most = CPU_BIN_TOKENS if isinstance(device, Cpu) else allowed.rows + allowed.pairs
    lengths = replace(
        allowed,
        row_bins=min(allowed.rows, most),
        pair_bins=min(allowed.pairs, most),
        measured_rows=facts.rows,
        measured_prompts=facts.prompts,
    )
    done = frozenset(facts.done)
    return Job(plan, model, device, facts.devices, lengths, done=done, models=facts.models)


def device_of(plan: Plan, reported: Device | None) -> Gpu | Cpu:
    """Return a worker's device: as it reports it, else as the manifest or its profile names it."""
    if reported is not None and reported.gpu is None:
        return Cpu(reported.memory, max(reported.memory, reported.most or 0))
    if reported is not None:
        return Gpu(reported.gpu or "", reported.memory, exact=True)
    return declared_gpu(plan.compute) or UNKNOWN


def answer_of(job: Job, found: Fit) -> FitAnswer:
    """Return the answer to the driver of a job.

    It is refused only if it takes more than all of its device for certain: what is assumed, and the
    bytes that a device keeps for itself, are estimates.
    """
    planned = {stage.name: stage.total_bytes for stage in _estimate(job, found).stages}
    if job.device == UNKNOWN:
        return FitAnswer(planned_bytes=planned)
    if found.impossible(job.device.most):
        return FitAnswer(refusal=refusal(job, found))
    changed = {
        stage.name: found.chosen[stage.name]
        for stage in job.training
        if found.chosen[stage.name] != settings_of(stage, job.facts, job.machine)
    }
    return FitAnswer(
        settings={
            name: ChosenSettings(
                micro_batch_tokens=settings.micro_batch_tokens,
                gradient_checkpointing=settings.gradient_checkpointing,
            )
            for name, settings in changed.items()
        },
        planned_bytes=planned,
    )


def refusal(job: Job, found: Fit) -> Failure:
    """Return why a job does not fit, with the changes that would make it fit."""
    needs = " ".join(
        f"{stage.stage} takes at least {gib(stage.peak.total)} GiB ({stage.peak.name})."
        for stage in found.impossible(job.device.most)
    )
    ways = [
        change if peak is None else f"{change} ({gib(peak)} GiB)" for change, peak in found.remedies
    ]
    return Failure(
        reason="DoesNotFit",
        message=f"the job does not fit: each worker has {gib(job.device.most)} GiB of "
        f"{job.device.name}. {needs}",
        advice=f"Do one of these: {'; '.join(ways)}.",
    )


def _estimate(job: Job, found: Fit) -> MemoryEstimate:
    """Return the estimate. On the CPU the process's own memory is a part, as it is measured too."""
    process = CPU_PROCESS_BYTES if isinstance(job.device, Cpu) else 0
    return MemoryEstimate(
        device=job.device.name,
        capacity_bytes=None if job.device == UNKNOWN else _clipped(found.limit + process),
        stages=[_stage(stage, process) for stage in found.memory if stage.peak.parts],
    )


def _stage(stage: StageMemory, process: int) -> StageEstimate:
    parts = [*stage.peak.parts, *([Part("process", process)] if process else [])]
    return StageEstimate(
        name=stage.stage,
        moment=stage.peak.name,
        total_bytes=_clipped(sum(size for _, size in parts)),
        parts=[MemoryPart(name=name, bytes=_clipped(size)) for name, size in parts],
        assumptions=list(stage.assumptions),
    )


def _clipped(size: int) -> int:
    return max(0, min(size, MOST_BYTES))
