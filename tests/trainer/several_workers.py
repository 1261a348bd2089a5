"""Several gloo workers in processes of their own, for tests of stages that they run together.

The processes are forks of a server that has imported the trainer once: an import of torch,
transformers and TRL takes 10 to 20 s of processor time, and the tests start more than 60 workers.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.trainer.ports import free_port
from tuneyard.errors import StageError
from tuneyard_trainer.data import sharing
from tuneyard_trainer.worker import Interrupted

multiprocessing.set_forkserver_preload(
    ["tuneyard_trainer.running.runner", "tuneyard_trainer.trl_engine.sft"]
)

Notes = Any
"""A dictionary that all workers and the test share."""

HANG = timedelta(seconds=120)
"""A worker that waits longer for the others fails the test."""


def spawn(workers: int, work: Callable[..., None], *arguments: Any) -> dict[Any, Any]:
    """Call `work(rank, notes, *arguments)` on each worker and return what they noted."""
    with mp.Manager() as manager:
        notes = manager.dict()
        inner = (workers, free_port(), dict(os.environ), work, notes, arguments)
        mp.start_processes(  # type: ignore[attr-defined,no-untyped-call]
            _worker, args=inner, nprocs=workers, start_method="forkserver"
        )
        return dict(notes)


def _worker(
    rank: int,
    workers: int,
    port: int,
    environment: Mapping[str, str],
    work: Callable[..., None],
    notes: Notes,
    arguments: tuple[Any, ...],
) -> None:
    os.environ.clear()  # the server's are those of its start
    os.environ.update(environment, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=workers, timeout=HANG)
    torch.set_num_threads(1)
    sharing.PATIENCE = HANG
    work(rank, notes, *arguments)
    dist.barrier()
    dist.destroy_process_group()


def end_of(work: Callable[[], object]) -> Any:
    """Return the result of `work`, or how it ended: the reason of a StageError, "interrupted", or
    the name and text of another error."""
    try:
        return work()
    except StageError as error:
        return error.reason
    except Interrupted:
        return "interrupted"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
