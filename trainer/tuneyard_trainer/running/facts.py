"""The facts of a job that decide whether it fits: its model, its rows and its device."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from tuneyard.api.job_facts import Device, JobFacts
from tuneyard.api.model_config import UnknownModelError, facts_of
from tuneyard.api.model_facts import ModelFacts
from tuneyard.api.plan import StageRecord

OWN_GROUPS = Path("/proc/self/cgroup")
"""The cgroups of this process, one a line: ID:CONTROLLERS:PATH."""
MOUNT = Path("/sys/fs/cgroup")


def job_facts(
    model: Path,
    records: Mapping[str, StageRecord],
    device: torch.device,
    *,
    devices: int,
    neighbors: int,
) -> JobFacts:
    """Return the facts of a job.

    `model`: the folder that the first stage which trains starts from. `records`: of the stages
    that are done. `devices`: workers that train together. `neighbors`: workers that share the
    memory of this machine or pod.
    """
    known, why = _model(model / "config.json")
    return JobFacts(
        model=known,
        unknown_model=why,
        done=list(records),
        rows=_longest(records, "prepare"),
        pairs=_longest(records, "pairs"),
        device=device_of(device, neighbors),
        devices=devices,
    )


def _model(config: Path) -> tuple[ModelFacts | None, str]:
    """Return the model's facts, or None and the reason."""
    try:
        read = json.loads(config.read_text(encoding="utf-8"))
        return facts_of(read if isinstance(read, dict) else {}), ""
    except (OSError, ValueError) as error:  # the stage that loads the model reports what is wrong
        why = str(error) if isinstance(error, UnknownModelError) else "it has no readable config"
        return None, why[:1024]


def _longest(records: Mapping[str, StageRecord], kind: str) -> int | None:
    """Return the tokens of the longest row that a stage of this kind kept. None: none did."""
    lengths = [
        int(min(longest, record.details.get("maxLength", longest)))
        for record in records.values()
        if record.kind == kind and (longest := record.metrics.get("longestRow"))
    ]
    return max(lengths, default=None)


def device_of(device: torch.device, neighbors: int) -> Device:
    """Return the description of a worker's device."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return Device(gpu=properties.name, memory=properties.total_memory)
    return Device(memory=memory_limit() // neighbors)


def memory_limit() -> int:
    """Return the most bytes that the processes of this machine or pod may take together."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([pages, *filter(None, map(_limit, _limit_files()))])


def _limit_files() -> Iterator[Path]:
    """Yield the files with the limits of this process's cgroups and of those around them. A
    container may see its own group as the root."""
    try:
        lines = OWN_GROUPS.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount = MOUNT / "memory" if controllers else MOUNT
        file = "memory.limit_in_bytes" if controllers else "memory.max"  # version 1, version 2
        group = Path(path)
        for each in (group, *group.parents):
            yield mount / each.relative_to("/") / file


def _limit(path: Path) -> int | None:
    """Return the limit in a cgroup's file. None: there is no limit."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def facts_event(facts: JobFacts) -> dict[str, Any]:
    """Return the event that asks the driver whether and how the job trains."""
    value = facts.model_dump(mode="json", by_alias=True, exclude_none=True)
    return {"type": "facts", "facts": value}
