"""The memory of a job in the output of `tuneyard plan`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tuneyard.api.quantity import quantity_value
from tuneyard.planning.fit import Fit, Job
from tuneyard.planning.memory.host import PROCESS_BYTES
from tuneyard.planning.memory.parts import GIB, Moment, StageMemory, gib
from tuneyard.planning.memory.stages import settings_of
from tuneyard.rendering.compute import workers

BAR = 16
"""Characters of a bar, which stands for all of a GPU's memory that a job can use."""


def print_memory(console: Console, job: Job, found: Fit) -> None:
    """Print a row for each stage that loads a model, and what to do if one is too large."""
    console.print()
    console.print(Text(_title(job), style="bold"))
    table = Table("Stage", "Worker's GPU", box=None, pad_edge=False)
    table.add_column("GiB", justify="right", no_wrap=True)
    table.add_column("Pod", justify="right", no_wrap=True)
    table.add_column("Most, in GiB", overflow="fold")
    for stage in found.memory:
        table.add_row(*_row(job, stage, found.limit))
    console.print(table)
    for line in notes(job, found):
        console.print(Text(line, overflow="fold"))


def memory_lines(job: Job, found: Fit) -> Iterator[str]:
    """Yield the memory of a job that is about to train, in lines of text."""
    yield _title(job)
    for stage in found.memory:
        if stage.peak.parts:
            yield f"{stage.stage}: {gib(stage.peak.total)} GiB: {_parts(stage.peak)}"
    yield from _assumed(found)
    yield from _chosen(job, found)


def _title(job: Job) -> str:
    device = f"a GPU with {job.device.name}" if job.device.estimated else job.device.name
    workers = "one worker" if job.devices == 1 else f"each of {job.devices} workers"
    return f"Memory of {workers} with {device}: {gib(job.device.usable)} GiB can be used"


def _row(job: Job, stage: StageMemory, limit: int) -> Iterable[str]:
    peak, host = stage.peak, _pod_bytes(job, stage)
    if not peak.parts:
        return stage.stage, "", "", gib(host), f"{stage.host_peak.name}, on the CPU"
    return stage.stage, _bar(peak.total, limit), gib(peak.total), gib(host), _parts(peak)


def _parts(moment: Moment) -> str:
    """Return the parts of a moment, without those that would be shown as 0.0."""
    shown = [part for part in moment.parts if part.size >= GIB // 20]
    sizes = ", ".join(f"{part.name} {gib(part.size)}" for part in shown)
    return f"{sizes} ({moment.name})" if sizes else moment.name


def _bar(size: int, limit: int) -> str:
    """Return a bar. One that is too long ends with an arrow."""
    filled = round(BAR * size / limit) if limit else BAR
    if size > limit:
        return "#" * (BAR - 1) + ">"
    return "#" * min(BAR, filled) + "." * (BAR - min(BAR, filled))


def notes(job: Job, found: Fit) -> Iterator[str]:
    """Yield the lines below the table: assumptions, and what does not fit with its remedies."""
    yield from _assumed(found)
    if job.device.estimated:
        yield f"Nothing but the memory of this GPU is known, which was given as {job.device.name}."
    yield from _chosen(job, found)
    yield from _pod_memory(job, found)
    if found.fits:
        return
    for stage in found.too_large:
        yield (
            f"{stage.stage} does not fit: it takes {gib(stage.peak.total)} GiB "
            f"({stage.peak.name}), and {gib(found.limit)} GiB can be used."
        )
    yield "To make the job fit:"
    for remedy in found.remedies:
        size = "" if remedy.peak is None else f" ({gib(remedy.peak)} GiB)"
        yield f"  - {remedy.change}{size}"


def _assumed(found: Fit) -> Iterator[str]:
    """Yield what is assumed, each once."""
    for text in dict.fromkeys(text for stage in found.memory for text in stage.assumptions):
        yield f"{text[0].upper()}{text[1:]}."


def _chosen(job: Job, found: Fit) -> Iterator[str]:
    """Yield a line for each stage whose settings are others than the defaults."""
    for stage in job.training:
        given, settings = settings_of(stage, job.facts, job.machine), found.chosen[stage.name]
        if settings == given:
            continue
        recomputed = settings.gradient_checkpointing and not given.gradient_checkpointing
        yield (
            f"{stage.name} will use micro-batches of {settings.micro_batch_tokens} tokens"
            f"{' and recompute activations' if recomputed else ''}, to fit."
        )


def _pod_memory(job: Job, found: Fit) -> Iterator[str]:
    """Yield a line if a worker's pod has too little memory beside its GPU."""
    most = max(found.memory, key=lambda stage: stage.host_peak.total, default=None)
    if most is None:
        return
    needed = _pod_bytes(job, most)
    given = workers(job.plan.compute).memory
    if needed > quantity_value(given):
        wanted = -(-needed // GIB)
        yield (
            f"{most.stage} takes {gib(needed)} GiB of the pod's memory ({most.host_peak.name}), "
            f"and compute.memory is {given}: set spec.compute.memory to {wanted}Gi."
        )


def _pod_bytes(job: Job, stage: StageMemory) -> int:
    """Return the memory of a pod beside its GPUs: one process for each of them, of which one writes
    checkpoints and the result."""
    return stage.host_peak.total + PROCESS_BYTES * (job.plan.compute.gpus_per_worker or 1)
