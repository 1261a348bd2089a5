"""A worker group of this machine: one process for each rank, without Ray.

It runs local jobs, and the leading stages of a job on a cluster before its RayJob exists.
The driver starts the ranks as `python -m tuneyard_trainer.running.processes`. Ray would start six
processes of its own first, and import torch in two of them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from tuneyard.api.compute import Compute
from tuneyard.api.plan import Plan
from tuneyard.errors import StageError
from tuneyard_trainer.running import group
from tuneyard_trainer.running.channel import EventServer
from tuneyard_trainer.running.group import Places, Resources, Task
from tuneyard_trainer.running.waits import wait_event

POLL_SECONDS = 0.2
LOST_SECONDS = 10.0
"""How long the other ranks may go on after one has failed: each reports what it noticed."""
COLLECTIVE_SECONDS = 1800.0
"""The time limit of a collective operation, which is also Ray Train's."""
_GPU_FILES = ("nvidia[0-9]*", "kfd", "dxg")
"""The files in /dev of GPUs: NVIDIA, AMD, and any GPU in WSL."""
_VISIBLE = "CUDA_VISIBLE_DEVICES"


def run(
    plan: Plan,
    *,
    places: Places,
    resources: Resources,
    on_event: Callable[[dict[str, Any]], None],
    stop: threading.Event,
    review: group.Review | None = None,
    attempt: int = 1,
    preparing: bool = False,
) -> None:
    """Run the plan in processes of this machine; return when it is done. `stop`, `on_event`,
    `review` and the errors are those of `distributed.run`. `preparing`: run only the leading
    stages, which need no GPU, in one process."""
    on_event(wait_event("starting the workers"))
    server = EventServer("127.0.0.1")
    task = {
        "plan": plan.to_json(),
        "places": asdict(places),
        "threads": resources.threads,
        "address": server.address,
        "key": server.key.hex(),
        "worldSize": resources.workers,
        "attempt": attempt,
        "preparing": preparing,
        "rendezvous": str(Path(places.scratch, "rendezvous").absolute()),
    }
    with _ranks(task, resources, Path(places.scratch)) as ranks:
        group.follow(plan, lambda: _wait(ranks), server, on_event, stop, review)


def local_resources(compute: Compute) -> Resources:
    """Divide this machine evenly among the workers. Raises StageError NotEnoughGpus."""
    workers = compute.workers or 1
    present = _num_gpus()
    gpus = compute.gpus_per_worker if compute.gpus_per_worker is not None else present // workers
    if gpus * workers > present:
        raise StageError(
            "NotEnoughGpus",
            f"the job needs {workers} workers with {gpus} GPUs each; this machine has {present}.",
            advice="Lower compute.gpusPerWorker or compute.workers.",
        )
    cpus = len(os.sched_getaffinity(0))
    return Resources.divided(workers, workers, gpus, max(1, cpus // workers))


def _num_gpus() -> int:
    """Return the number of GPUs that torch can use. Its import takes 3 s of processor time, so it
    is not imported on a machine without the device file of a GPU."""
    if not any(any(Path("/dev").glob(name)) for name in _GPU_FILES):
        return 0
    import torch

    return torch.cuda.device_count()


# ---- the processes ------------------------------------------------------------------------------


@contextmanager
def _ranks(
    task: dict[str, Any], resources: Resources, scratch: Path
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """While active, the ranks run, each with a log file in `scratch`."""
    # -P: no module of the working directory, which a user may have downloaded, is imported.
    command = [sys.executable, "-P", "-m", __name__]
    gpus = _gpus(os.environ.get(_VISIBLE), resources)
    with ExitStack() as stack:
        ranks = []
        for rank in range(resources.workers):
            environment = {**os.environ, _VISIBLE: gpus[rank]}
            with (scratch / f"worker-{rank}.log").open("wb") as log:
                process = subprocess.Popen(  # noqa: S603  our own module
                    command,
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C is the driver's: it asks the ranks to stop
                )
            stack.callback(_end, process)
            ranks.append(process)
            stdin = process.stdin
            with suppress(BrokenPipeError):  # it has ended, which `_wait` reports
                if stdin:
                    # Not an argument: other users can read those.
                    text = json.dumps({**task, "rank": rank})
                    stdin.write(text.encode())
                    stdin.close()
        yield ranks


def _gpus(visible: str | None, resources: Resources) -> list[str]:
    """Return the GPU that each rank sees; "": none. `visible`: CUDA_VISIBLE_DEVICES; None: all."""
    if not resources.gpus_per_worker:
        return [""] * resources.workers
    names = visible.split(",") if visible else map(str, range(resources.workers))
    return list(names)[: resources.workers]


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait until all ranks have ended. Raises ChildProcessError for the first that failed."""
    while _first_failed(ranks) is None and _is_any_running(ranks):
        time.sleep(POLL_SECONDS)
    failed = _first_failed(ranks)
    if failed is None:
        return
    deadline = time.monotonic() + LOST_SECONDS
    while _is_any_running(ranks) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    for process in ranks:
        _end(process)
    code = ranks[failed].returncode
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    raise ChildProcessError(f"worker {failed} was ended {how}")


def _first_failed(ranks: Sequence[subprocess.Popen[bytes]]) -> int | None:
    return next((rank for rank, process in enumerate(ranks) if process.poll()), None)


def _is_any_running(ranks: Sequence[subprocess.Popen[bytes]]) -> bool:
    return any(process.poll() is None for process in ranks)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a rank and the processes that it started."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# ---- inside a rank ------------------------------------------------------------------------------


def main() -> None:
    """Run one rank, as standard input says."""
    # Slurm and systemd send it to every process of a job: the driver asks the ranks to stop.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    task = json.load(sys.stdin)
    client = group.connect(tuple(task["address"]), bytes.fromhex(task["key"]))
    client.emit(wait_event("importing torch"))
    import torch
    import torch.distributed as dist

    rank, world_size = task["rank"], task["worldSize"]
    device = torch.device("cuda", 0) if os.environ[_VISIBLE] else torch.device("cpu")
    if world_size > 1:
        client.emit(wait_event("connecting the workers"))
        limit = timedelta(seconds=COLLECTIVE_SECONDS)
        # Not a file:// URL: torch would cut the path at a "#" or "?".
        store = dist.FileStore(task["rendezvous"], world_size)  # type: ignore[attr-defined]
        store.set_timeout(limit)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            timeout=limit,
            rank=rank,
            world_size=world_size,
        )
    plan = Plan.model_validate_json(task["plan"])
    work = Task(
        plan,
        Places(**task["places"]),
        attempt=task["attempt"],
        threads=task["threads"],
        neighbors=world_size,
        preparing=task["preparing"],
    )
    group.run_rank(work, client, rank, world_size, device)


if __name__ == "__main__":
    main()
