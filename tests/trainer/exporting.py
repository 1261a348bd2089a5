"""Measure the memory of exports and of loading the model, in a process of its own.

Arguments: the folder of a tiny base and of an adapter for it, which warm the libraries up, then
those of the base and the adapter to measure, and a work folder. Prints JSON: by step, how many
bytes the resident memory grew by at its peak.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from tuneyard_trainer.models.base import load_base
from tuneyard_trainer.models.merging import write_merged
from tuneyard_trainer.models.weight_files import stored_tensors
from tuneyard_trainer.reporting.export import write_cast


def resident(field: str) -> int:
    """Return a field of /proc/self/status in bytes: VmRSS is the memory now, VmHWM its peak."""
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"{field}:\s+(\d+) kB", text)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {field}")
    return int(found[1]) * 1024


def growth(step: Callable[[], object]) -> int:
    """Return by how many bytes the resident memory grew at its peak during the step."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


def main(tiny: Path, tiny_adapter: Path, base: Path, adapter: Path, work: Path) -> None:
    torch.set_num_threads(1)
    write_merged(tiny, tiny_adapter, work / "tiny")
    load_base(tiny, dtype=torch.float32, device=torch.device("cpu"))
    found = {
        "merged": growth(lambda: write_merged(base, adapter, work / "merged")),
        "whole": growth(lambda: write_cast(base, work / "whole", torch.float16, load_base)),
        "loaded": growth(lambda: load_base(base, dtype=torch.float32, device=torch.device("cpu"))),
    }
    specs = [tensor.spec for tensor in stored_tensors(base).values()]
    found["model"] = sum(spec.num_bytes for spec in specs)
    found["tensor"] = max(spec.num_bytes for spec in specs)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
