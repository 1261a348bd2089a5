"""Several gloo workers in processes of their own, for tests of stages that they run together.

The processes are forks of a server that has imported the trainer once: an import of torch,
transformers and TRL takes 10 to 20 s of processor time, and the tests start more than 60 workers.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Mapping
from datetime import timedelta
from multiprocessing.managers import ListProxy, SyncManager
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
    """Call `work(rank, notes, *arguments)` on each worker and return what they noted.

    Raises torch's ProcessRaisedException or ProcessExitedException of the first worker that failed,
    and RuntimeError if one ended before its work did. No worker is left, whatever is raised.
    """
    manager = SyncManager(ctx=multiprocessing.get_context("forkserver"))
    manager.start(_end_with_the_tests)
    with manager:
        notes, done = manager.dict(), manager.list()
        inner = (workers, free_port(), dict(os.environ), work, notes, arguments, done)
        context = mp.start_processes(  # type: ignore[attr-defined,no-untyped-call]
            _worker, args=inner, nprocs=workers, start_method="forkserver", join=False
        )
        try:
            while not context.join():
                pass
        finally:
            for process in context.processes:  # those of a test that was interrupted
                process.kill()
                process.join()
        if len(done) < workers:
            missing = sorted({*range(workers)} - {*done})
            raise RuntimeError(f"workers {missing} ended before their work was done")
        return dict(notes)


def _worker(
    rank: int,
    workers: int,
    port: int,
    environment: Mapping[str, str],
    work: Callable[..., None],
    notes: Notes,
    arguments: tuple[Any, ...],
    done: ListProxy[int],
) -> None:
    _end_with_the_tests()
    os.environ.clear()  # the server's are those of its start
    os.environ.update(environment, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=workers, timeout=HANG)
    torch.set_num_threads(1)
    sharing.PATIENCE = HANG
    work(rank, notes, *arguments)
    dist.barrier()
    dist.destroy_process_group()
    done.append(rank)


def _end_with_the_tests() -> None:
    """End this process once the tests' process has ended, were it killed. Every worker holds the
    pipe that the server waits for, and so they would keep each other alive."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


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
