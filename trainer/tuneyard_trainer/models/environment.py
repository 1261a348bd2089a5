"""How accelerate and transformers learn of the process group: by variables, as torchrun sets
them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from tuneyard_trainer.machine import environment


@contextmanager
def described(device: torch.device) -> Iterator[None]:
    """While active, the environment describes this process's group, if there is one. The group
    exists, so that nobody connects to the address."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield
        return
    size = str(dist.get_world_size())
    values = {
        "RANK": str(dist.get_rank()),
        "WORLD_SIZE": size,
        "LOCAL_RANK": str(device.index or 0),
        # Ray Train and torchrun set it; without them, all workers are on this machine.
        "LOCAL_WORLD_SIZE": os.environ.get("LOCAL_WORLD_SIZE", size),
        # Without it, accelerate sets torch's threads to a share of the machine's cores.
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }
    with environment(values):
        yield
