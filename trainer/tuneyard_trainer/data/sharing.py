"""The rows of a stage shared among the workers, each of which holds the whole model.

Each worker works on its own share of the rows, and the workers exchange their results. All of them
know all results, and rank 0 writes them. An exchange also carries errors and stop requests: an
error on one worker ends the stage on all of them, with that error.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist

from tuneyard.errors import StageError
from tuneyard_trainer.storage.journal import Journal
from tuneyard_trainer.worker import Interrupted, Worker

T = TypeVar("T")

PATIENCE = datetime.timedelta(days=7)
"""The longest wait for an exchange. Workers without rows of their own wait while rank 0 asks a
judge at an endpoint, which may take days."""


def any_stops(worker: Worker) -> bool:
    """Return whether any worker was asked to stop, on all of them. All workers call it."""
    flag = torch.tensor(float(worker.stop()), device=worker.device)
    if worker.world_size > 1:
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag > 0)


def stop_together(worker: Worker) -> None:
    """Raise Interrupted on all workers if any of them is asked to stop. All workers call it."""
    if any_stops(worker):
        raise Interrupted(worker.stage, 0)


class SharedStage:
    """A stage that all workers run together, each on its share of the rows.

    A context: its end is the last exchange, so that no worker leaves before the others have
    finished. Everything that may fail belongs inside, and no other collective operation does: an
    error would leave the other workers waiting in it.
    """

    def __init__(self, worker: Worker) -> None:
        """All workers call it together."""
        self.worker = worker
        self._stopped = False
        self._is_awaited = True
        self._group: Any = None
        if worker.world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=PATIENCE)

    def __enter__(self) -> Self:
        """Raises Interrupted if any worker was asked to stop, before a model is loaded."""
        self.stop_together()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._is_awaited and (error is None or isinstance(error, Exception)):
            self._exchange(None, error)

    # ---- rows -----------------------------------------------------------------------------------

    def share(self, lengths: Sequence[int]) -> list[int]:
        """Return the indices of this worker's rows, the shortest row first. The workers take rows
        in turn, so that those of a round have similar lengths. `lengths`: of all rows."""
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        return order[self.worker.rank :: self.worker.world_size]

    def results(self, lengths: Sequence[int], work: Callable[[list[int]], Sequence[T]]) -> list[T]:
        """Return the result of each row. `lengths`: of all rows. `work`: returns the results of the
        rows with these indices, and calls `check_stop` meanwhile."""
        own = self.share(lengths)
        pairs = list(zip(own, work(own), strict=True))
        found = {index: result for each in self.gather(pairs) for index, result in each}
        return [found[index] for index in range(len(lengths))]

    def rounds(self, own: Iterable[Sequence[T]]) -> Iterator[list[T]]:
        """Yield the results of all workers, round by round.

        A worker adds the next item of `own`, its results so far, to each round. `own` ends early
        once `stop` is true. Its results up to there are yielded: the caller keeps them, and calls
        `raise_if_stopped` after the last round.
        """
        remaining = iter(own)
        while True:
            batches = self.gather(next(remaining, None))
            if all(batch is None for batch in batches):
                return
            yield [result for batch in batches if batch is not None for result in batch]

    def gather(self, value: T) -> list[T]:
        """Return the value of each worker, in the order of their ranks. All workers call it. Raises
        the error of a worker that failed meanwhile."""
        return self._exchange(value, None)

    def from_main(self, work: Callable[[], T]) -> T:
        """Return the result of `work` on all workers. Rank 0 alone does it."""
        results: list[Any] = self.gather(work() if self.worker.is_main else None)
        found: T = results[0]
        return found

    @contextmanager
    def journal(self, folder: Path) -> Iterator[SharedJournal]:
        """Open the stage's journal, which is removed when the stage is done. Raises StageError."""
        worker = self.worker
        if not worker.is_main:
            yield SharedJournal(self.from_main(list), None)
            return
        with Journal(folder, worker.identity, worker.persist, worker.owned) as journal:
            yield SharedJournal(self.from_main(lambda: journal.entries), journal)

    @contextmanager
    def in_step(self) -> Iterator[InStep]:
        """While active, all workers do the same work, on a model that they share. An error is not
        exchanged: the other workers wait for the model's layers, and end as for a lost worker."""
        try:
            yield InStep(self.worker)
        except BaseException:
            self._is_awaited = False
            raise

    # ---- stop requests --------------------------------------------------------------------------

    def stop(self) -> bool:
        """Return whether this worker was asked to stop, or any of them before the last exchange."""
        return self._stopped or self.worker.stop()

    def check_stop(self) -> None:
        """Raise Interrupted if `stop` is true. The other workers learn of it as of an error."""
        if self.stop():
            raise Interrupted(self.worker.stage, 0)

    def stop_together(self) -> None:
        """Raise Interrupted on all workers if any was asked to stop. All workers call it."""
        self.gather(None)
        self.raise_if_stopped(0)

    def raise_if_stopped(self, step: int) -> None:
        """Raise Interrupted, after `step`, if any worker was asked to stop before the last
        exchange: all workers raise it, or none does."""
        if self._stopped:
            raise Interrupted(self.worker.stage, step)

    # ---- the exchange ---------------------------------------------------------------------------

    def _exchange(self, value: Any, error: Exception | None) -> list[Any]:
        """Return the value of each worker. Raises the error of one of them, if there is any: a
        failure before a stop request."""
        mine = (value, _portable(error, self.worker.rank), self.worker.stop())
        found: list[Any] = [mine] * self.worker.world_size
        self._is_awaited = False  # unless the exchange succeeds
        if self._group is not None:
            dist.all_gather_object(found, mine, group=self._group)
        self._stopped = self._stopped or any(stop for _, _, stop in found)
        errors = {rank: sent for rank, (_, sent, _) in enumerate(found) if sent is not None}
        if errors:
            rank = min(errors, key=lambda rank: isinstance(errors[rank], Interrupted))
            if rank != self.worker.rank:
                raise errors[rank]
            return []  # its own error, which is on its way
        self._is_awaited = True
        return [value for value, _, _ in found]


@dataclass(frozen=True)
class InStep:
    """The rows of a stage whose workers share its model: each of them works on all rows, since each
    forward pass is one of all workers. Has those methods of SharedStage that such work needs."""

    worker: Worker

    def results(self, lengths: Sequence[int], work: Callable[[list[int]], Sequence[T]]) -> list[T]:
        """Return the result of each row. `lengths`: of all rows. `work`: returns the results of the
        rows with these indices, and calls `check_stop` meanwhile."""
        return list(work([*range(len(lengths))]))

    def stop(self) -> bool:
        """Return whether any worker was asked to stop. All workers call it."""
        return any_stops(self.worker)

    def check_stop(self) -> None:
        """Raise Interrupted on all workers if any was asked to stop. All workers call it."""
        stop_together(self.worker)


@dataclass(frozen=True)
class SharedJournal:
    """A stage's journal: rank 0 writes it, and all workers know the entries of earlier attempts."""

    entries: Sequence[Mapping[str, Any]]
    _journal: Journal | None
    """None: another worker writes."""

    def append(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Write entries, which all workers pass. Raises StageError as the journal does."""
        if self._journal is not None:
            self._journal.append(entries)


def _portable(error: Exception | None, rank: int) -> Exception | None:
    """Return an error as the other workers receive it. They cannot unpickle every error: those that
    the runner names for the user stay as they are, and others become their text."""
    named = (StageError, Interrupted, torch.OutOfMemoryError)
    if error is None or isinstance(error, named):
        return error
    if isinstance(error, MemoryError):
        return MemoryError(str(error))
    if isinstance(error, OSError):
        return OSError(error.errno, error.strerror)
    return RuntimeError(f"{type(error).__name__} on worker {rank}: {error}")
