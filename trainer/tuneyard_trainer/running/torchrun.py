"""A plan without Ray: in this process, or in the processes that torchrun started.

python -m tuneyard_trainer.running.torchrun --plan plan.json --output DIR
torchrun --nproc-per-node 2 -m tuneyard_trainer.running.torchrun --plan plan.json --output DIR
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tuneyard.api.plan import Plan
from tuneyard.errors import StageError
from tuneyard_trainer.running.runner import Emit, PlanRunner, StageInputs
from tuneyard_trainer.storage.records import Store
from tuneyard_trainer.worker import Worker


def run(plan: Plan, output: str, *, base_dir: Path, cache_dir: Path, emit: Emit) -> None:
    """Run the plan as the rank in torchrun's RANK, WORLD_SIZE and LOCAL_RANK; as the only rank if
    these variables are not set. Raises StageError."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    with tempfile.TemporaryDirectory(prefix="tuneyard-") as scratch:
        store = Store(output, Path(scratch))
        if rank == 0:
            store.claim(plan.job, attempt=1)
        PlanRunner(
            stage_inputs=StageInputs(plan, store, base_dir, cache_dir),
            worker=Worker(rank=rank, world_size=world_size, device=device),
            emit=emit,
        ).run()


def main() -> int:
    """Run the command line; events go to standard output as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plan", type=Path, required=True, help="as `tuneyard plan --json` prints")
    parser.add_argument("--output", required=True, help="a folder or an fsspec URL")
    parser.add_argument(
        "--base-dir",
        type=Path,
        default=Path(),
        help="the folder that file:// paths are relative to",
    )
    parser.add_argument("--cache-dir", type=Path, default=Path(".tuneyard-cache"))
    arguments = parser.parse_args()

    def emit(event: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(event) + "\n")
        sys.stdout.flush()

    plan = Plan.model_validate_json(arguments.plan.read_text())
    try:
        run(
            plan,
            arguments.output,
            base_dir=arguments.base_dir,
            cache_dir=arguments.cache_dir,
            emit=emit,
        )
    except StageError as error:
        sys.stderr.write(f"{error.reason}: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
