"""The time to prepare a data set, and to copy what another job has prepared of it.

    .venv/bin/python benchmarks/reuse.py

The stage `prepare` of one job after another, each with an output of its own, runs in this process
on 30,000 conversations of hh-rlhf. Jobs without a cache of prepared data and jobs that find their
data there take turns. The times include reading the digests of the sources, and what the first job
stores; imports are not timed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from prepare import model, write_rows

from tuneyard.api.plan import Plan
from tuneyard.manifests.manifest import read
from tuneyard.planning.plan import plan_job
from tuneyard_trainer.running.runner import PlanRunner, StageInputs, emit_nothing
from tuneyard_trainer.storage.records import Store
from tuneyard_trainer.storage.results import Results
from tuneyard_trainer.worker import Worker

MANIFEST = """
apiVersion: tuneyard.io/v1alpha1
kind: FineTuneJob
metadata: {{name: reuse}}
spec:
  model: {{uri: "file://{model}"}}
  data:
    train: [{{uri: "file://rows.jsonl"}}]
    validation: {{fraction: 0.05}}
    onOverlength: truncate
  adapter: {{lora: {{}}}}
  output: {{uri: "file://out"}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=30_000)
    parser.add_argument("--rounds", type=int, default=3)
    shared = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser.add_argument("--data", type=Path, default=shared)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        write_rows(options.data, options.rows, scratch / "rows.jsonl")
        plan = plan_job(read(MANIFEST.format(model=model(scratch)))[0])
        plan = plan.model_copy(update={"stages": plan.stages[:1]})
        results = Results(scratch / "cache" / "results", 1 << 40)
        prepare(plan, scratch, "imports", None)
        first = prepare(plan, scratch, "first", results)
        found: dict[str, list[float]] = {"prepared": [], "copied": []}
        for number in range(options.rounds):
            found["prepared"].append(prepare(plan, scratch, f"alone-{number}", None))
            found["copied"].append(prepare(plan, scratch, f"copied-{number}", results))
        size = sum(path.stat().st_size for path in (scratch / "cache/results").rglob("*"))
    print(f"{options.rows:,} rows, {size / 2**20:.0f} MiB prepared")
    for name, seconds in found.items():
        print(f"{name:<22}{statistics.median(seconds):>7.2f} s")
    print(f"{'prepared and stored':<22}{first:>7.2f} s")


def prepare(plan: Plan, folder: Path, output: str, results: Results | None) -> float:
    """Return the seconds that the plan takes in a new output."""
    store = Store(str(folder / output), folder / "scratch")
    store.claim(plan.job, 1)
    start = time.perf_counter()
    PlanRunner(
        StageInputs(plan, store, folder, folder / "cache"),
        Worker(rank=0, world_size=1, device=torch.device("cpu")),
        emit_nothing,
        results=results,
    ).run()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
