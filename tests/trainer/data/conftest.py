"""Batches that are prepared by copies, as in several processes, in the tests of data."""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import cycle
from typing import Any

import pytest

from tuneyard_trainer.data import batches, prepare
from tuneyard_trainer.data.parallel import Pool

AHEAD = 4
"""Batches that are read before the first result is taken."""


class Copies(Pool[Any, Any]):
    """Gives each batch to one of two copies. Starts no process: each would import transformers."""

    def map(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield the results of the batches, in their order."""
        if self._processes < 2:
            yield from super().map(batches)
            return
        copies = cycle([copied(self._function), copied(self._function)])
        waiting: deque[Any] = deque()
        for batch in batches:
            waiting.append(copied(batch))
            if len(waiting) > AHEAD:
                yield copied(next(copies)(waiting.popleft()))
        while waiting:
            yield copied(next(copies)(waiting.popleft()))


def copied(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


@pytest.fixture(autouse=True)
def _prepared_by_copies(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the stage prepare have batches of three rows and two copies, so that no feature depends
    on the process that reads the files. test_parallel has processes, and test_memory the batches of
    a job."""
    if request.path.stem in ("test_parallel", "test_memory"):
        return
    monkeypatch.setattr(batches, "BATCH_ROWS", 3)
    monkeypatch.setattr(prepare, "num_processes", lambda: 2)
    monkeypatch.setattr(prepare, "Pool", Copies)
