"""Batches of rows in all processes that the machine grants, with the results in order.

The processes are started afresh, since a fork of a process with threads can hang, and they do not
import the main module of this one: it may be a worker of Ray, or a script without a guard.
Nothing here imports numpy or transformers: a new process sets its number of threads before it
imports them.
"""

from __future__ import annotations

import gc
import os
import pickle
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import chain
from multiprocessing import parent_process
from multiprocessing.context import SpawnContext, SpawnProcess
from types import ModuleType, TracebackType
from typing import Any, Generic, Self, TypeVar

from tuneyard.errors import StageError
from tuneyard_trainer.machine import cpu_limit, environment, memory_limit

Given = TypeVar("Given")
Result = TypeVar("Result")

ALONE = 16
"""Batches that one process prepares as fast as several, which take a second to start."""
IN_FLIGHT = 2
"""Batches that each other process has: one at work, and one for the time after it."""
MOST_WAITING = 64
"""Batches in flight beside these, and results that wait for those of earlier batches. A new process
takes a second for its first batch, in which 20 others are done."""
MOST_BYTES = 256 << 20
"""The size of these batches together, which may exceed it by one batch. Few batches have more than
1 MiB, but a row may have 64 MiB. A result counts as much as its batch."""
MOST_PROCESSES = 32
"""One process reads the files and writes the results, and feeds about as many."""
PROCESS_BYTES = 1 << 30
"""Bytes of the memory limit for each process. A process takes 150 MB, and more with documents to
retrieve from."""
_ONE_THREAD = {
    "TOKENIZERS_PARALLELISM": "false",
    "RAYON_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


def num_processes() -> int:
    """Return the number of processes that the machine or pod grants, by processors and memory."""
    return max(1, min(cpu_limit(), memory_limit() // PROCESS_BYTES, MOST_PROCESSES))


class Pool(Generic[Given, Result]):
    """Calls one function on many batches, in this process and in others.

    A context, in which processes start when they are needed. After its end none is left.
    """

    def __init__(
        self,
        function: Callable[[Given], Result],
        processes: int,
        size: Callable[[Given], int],
    ) -> None:
        """`function`: it is pickled once, and each process has its own copy of it. `processes`:
        with this one, which works too. 1: no other is started. `size`: returns the size of a batch,
        in bytes or characters."""
        self._function = function
        self._processes = processes
        self._size = size
        self._executor: ProcessPoolExecutor | None = None
        self._context = _Context()

    def map(self, batches: Iterable[Given]) -> Iterator[Result]:
        """Yield the results of the batches, in their order. Few batches stay in this process.

        Raises what the function raises, and StageError WorkerDied if a process is lost. A
        StageError of `batches` is raised after the results of the batches before it.
        """
        source = _Source(batches)
        rest = iter(source)
        gc.freeze()  # all that exists stays meanwhile: collections need not walk through it
        try:
            if self._executor is None and self._processes > 1:
                first = self._first(rest)
                if not self._are_few(first):
                    self._executor = self._started()
                rest = chain(_taken(first), rest)
            if self._executor is None:
                yield from map(self._function, rest)
            else:
                yield from self._shared(self._executor, rest)
        finally:
            gc.unfreeze()
        if source.error is not None:
            raise source.error

    def _first(self, batches: Iterator[Given]) -> deque[Given]:
        """Return batches until it is known whether they are few, or all of them."""
        first: deque[Given] = deque()
        for batch in batches:
            first.append(batch)
            if not self._are_few(first):
                break
        return first

    def _are_few(self, batches: deque[Given]) -> bool:
        return len(batches) <= ALONE and sum(map(self._size, batches)) <= MOST_BYTES

    def _started(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            self._processes - 1,
            mp_context=self._context,
            initializer=_begin,
            initargs=(pickle.dumps(self._function),),
        )

    def _shared(self, executor: ProcessPoolExecutor, batches: Iterable[Given]) -> Iterator[Result]:
        """Yield the results of batches that go to the other processes, and to this one when each of
        the others has enough: it would wait for them otherwise."""
        given = IN_FLIGHT * (self._processes - 1)
        pending: deque[Future[Result]] = deque()
        sizes: deque[int] = deque()  # of the batches of `pending`

        def earliest() -> Result:
            sizes.popleft()
            return pending.popleft().result()

        def is_full() -> bool:
            return len(pending) > given + MOST_WAITING or sum(sizes) > MOST_BYTES

        try:
            for batch in batches:
                sizes.append(self._size(batch))
                if sum(not each.done() for each in pending) < given:
                    pending.append(executor.submit(_call, batch))
                else:
                    pending.append(self._own(batch))
                while pending and (pending[0].done() or is_full()):
                    yield earliest()
            while pending:
                yield earliest()
        except BrokenProcessPool as error:
            self._end()
            raise self._lost() from error

    def _own(self, batch: Given) -> Future[Result]:
        """Return the result in this process. An error waits until it is the batch's turn."""
        done: Future[Result] = Future()
        try:
            # Tokenizers of this process have one thread: each processor has a process.
            with environment({"TOKENIZERS_PARALLELISM": "false"}):
                done.set_result(self._function(batch))
        except Exception as error:
            done.set_exception(error)
        return done

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def _end(self) -> None:
        """End the processes, after the batch that each has."""
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)

    def _lost(self) -> StageError:
        """Return the error of a process that ended by itself; the pool ends the other ones by
        SIGTERM."""
        codes = [process.exitcode or 0 for process in self._context.processes]
        code = next((code for code in codes if code not in (0, -signal.SIGTERM)), min(codes))
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        why = ", as the kernel does where memory runs out" if code == -signal.SIGKILL else ""
        return StageError(
            "WorkerDied",
            f"one of the {self._processes} processes that prepare rows was ended {how}{why}.",
            advice="If memory ran out, raise compute.memory, or shorten the longest rows.",
            retryable=True,
        )


class _Source(Generic[Given]):
    """Batches up to a StageError of reading them, which is kept: the results of earlier batches
    come before it. Any other exception, such as a request to stop, ends the work at once."""

    def __init__(self, batches: Iterable[Given]) -> None:
        self._batches = batches
        self.error: StageError | None = None

    def __iter__(self) -> Iterator[Given]:
        try:
            yield from self._batches
        except StageError as error:
            self.error = error


def _taken(batches: deque[Given]) -> Iterator[Given]:
    """Yield the batches, and keep none that was yielded."""
    while batches:
        yield batches.popleft()


class _Process(SpawnProcess):
    """A process that does not import the main module of the process that starts it."""

    def start(self) -> None:
        with _no_main_module():
            super().start()


class _Context(SpawnContext):
    """Starts processes, and keeps them for their exit codes."""

    def __init__(self) -> None:
        self.processes: list[SpawnProcess] = []

    def Process(self, *args: Any, **options: Any) -> SpawnProcess:  # type: ignore[override]  # noqa: N802
        process = _Process(*args, **options)
        self.processes.append(process)
        return process


@contextmanager
def _no_main_module() -> Iterator[None]:
    """While active, the main module has neither a name nor a file."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


# ---- inside a process ---------------------------------------------------------------------------


class _Own:
    """The state that a process keeps between its batches."""

    pickled: bytes
    function: Callable[[Any], Any] | None = None


def _begin(function: bytes) -> None:
    """Prepare a new process: one thread, and no reaction to Ctrl-C, which is the parent's."""
    gc.disable()
    os.environ.update(_ONE_THREAD)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _Own.pickled = function


def _end_with_parent() -> None:
    """End this process when its parent has ended, also by SIGKILL."""
    if parent := parent_process():
        parent.join()
        os._exit(1)


def _call(batch: Any) -> Any:
    """Return what the function returns. An error that does not pickle, which would end the pool,
    is raised as RuntimeError with its text."""
    try:
        if _Own.function is None:
            _Own.function = pickle.loads(_Own.pickled)  # noqa: S301 - our parent pickled it
            gc.freeze()  # the modules stay: collections need not walk through them
            gc.enable()
        return _Own.function(batch)
    except Exception as error:
        if _pickles(error):
            raise
        raise RuntimeError(f"{type(error).__name__}: {error}") from None


def _pickles(error: Exception) -> bool:
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
    except Exception:
        return False
    return True
