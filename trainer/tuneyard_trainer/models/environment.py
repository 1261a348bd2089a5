"""How accelerate learns of the process group: by environment variables, as torchrun sets them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from tuneyard_trainer.worker import Worker


@contextmanager
def described(worker: Worker) -> Iterator[None]:
    """While active, the environment describes the process group to accelerate. The group exists, so
    that nobody connects to the address."""
    values = {
        "RANK": str(worker.rank),
        "WORLD_SIZE": str(worker.world_size),
        "LOCAL_RANK": str(worker.device.index or 0),
        "LOCAL_WORLD_SIZE": str(worker.world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }
    before = {name: os.environ.get(name) for name in values}
    if worker.world_size > 1:
        os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
