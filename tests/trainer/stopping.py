"""Run a plan as one of two gloo ranks, with a stop request to rank 1 only; print how it ended.

Usage: python stopping.py RANK RENDEZVOUS_FILE PLAN FOLDER CHECK
Rank 1 is asked to stop from its CHECK-th check on.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tuneyard.api.plan import Plan
from tuneyard_trainer.running.runner import PlanRunner, StageInputs
from tuneyard_trainer.storage.records import Store
from tuneyard_trainer.worker import Interrupted, Worker


def main(rank: int, rendezvous: str, plan: Path, folder: Path, check: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=2)
    store = Store(str(folder / "out"), folder / f"scratch-{rank}")
    read = Plan.model_validate_json(plan.read_text())
    if rank == 0:
        store.claim(read.job, attempt=1)
    checks = itertools.count(1)
    worker = Worker(rank, 2, torch.device("cpu"), stop=lambda: rank == 1 and next(checks) >= check)
    runner = PlanRunner(
        StageInputs(read, store, folder, folder / "cache"), worker, emit=lambda _: None
    )
    try:
        runner.run()
    except Interrupted as stopped:
        saved = sorted(path.parent.name for path in (folder / "out").rglob("state.json"))
        print(json.dumps({"stage": stopped.stage, "step": stopped.step, "saved": saved}))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5]))
