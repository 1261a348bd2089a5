"""Sharding a model over the workers: FSDP2, by transformers, while the model is loaded.

Each worker reads its own part of each weight. accelerate 1.15 ignores a request for FSDP on a CPU
without a word, so sharding is requested in this module alone, and `require_sharded` ends a run in
which it is not active. The weights of an adapter stay whole on every worker: they are small, and
the trainer averages their gradients.
"""

from __future__ import annotations

from collections import Counter

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.distributed.configuration_utils import DistributedConfig

from tuneyard.errors import StageError

WHOLE_SHARE = 0.01
"""Largest share of a sharded model's frozen or fully tuned weights that may be whole on a worker:
buffers that no plan shards."""


def over(world_size: int) -> DistributedConfig:
    """Return the config for `from_pretrained` that shards a model over all workers."""
    return DistributedConfig(fsdp_size=world_size)


def local_bytes(model: nn.Module) -> tuple[int, int]:
    """Return the bytes of a model's parameters that this worker holds, and those of all of them."""
    held = total = 0
    for parameter in model.parameters():
        tensor = parameter.data
        size = tensor.numel() * tensor.element_size()
        total += size
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        held += local.numel() * local.element_size()
    return held, total


def require_sharded(model: nn.Module, world_size: int) -> None:
    """Raise StageError NotSharded unless each worker holds about 1 / world_size of the model."""
    whole = [name for name, p in model.named_parameters() if not isinstance(p.data, DTensor)]
    held, total = local_bytes(model)
    # FSDP2 cuts dimension 0, and gives the last worker less if it is not divisible.
    if whole or held > total * (1 / world_size + WHOLE_SHARE):
        raise StageError(
            "NotSharded",
            f"compute.sharding is fsdp, and this worker holds {held:,} of {total:,} bytes of the "
            f"model; not sharded: {', '.join(whole[:3]) or 'nothing by name'}.",
            advice="Set compute.sharding to none, or model.uri to an architecture with an FSDP "
            "plan in transformers.",
        )


def require_one_copy(model: nn.Module, world_size: int) -> None:
    """Raise StageError NotSharded if a tied weight that is trained would become two weights."""
    obstacle = tied_obstacle(model, world_size)
    if obstacle:
        raise StageError(
            "NotSharded",
            f"compute.sharding is fsdp, and {obstacle}.",
            advice="Set compute.workers to a number that divides these rows, set "
            "training.freeze.embeddings or adapter.lora, or set compute.sharding to none.",
        )


def tied_obstacle(model: nn.Module, world_size: int) -> str | None:
    """Return why the trained weights that several modules share cannot be sharded over so many
    workers; None: they can.

    FSDP2 has one group for the embeddings and another for the head. Parts of equal size are the
    same memory in both. Smaller ones are padded, in a copy for each group, and the optimizer would
    update one copy alone.
    """
    modules = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters():
        rows = parameter.shape[0] if parameter.ndim else 1
        if parameter.requires_grad and modules[id(parameter)] > 1 and rows % world_size:
            return (
                f"the {rows:,} rows of {name}, a weight that several modules share, cannot be "
                f"divided evenly among {world_size} workers"
            )
    return None


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a worker holds a part of the tensor alone."""
    return isinstance(tensor, DTensor) or isinstance(getattr(tensor, "data", None), DTensor)


def whole(tensor: Tensor) -> Tensor:
    """Return a copy of the whole tensor on the CPU. All workers call it for the same tensor."""
    data = tensor.detach()
    if isinstance(data, DTensor):
        data = data.full_tensor()
    return data.to("cpu", copy=True).contiguous()


def like(tensor: Tensor, reference: Tensor) -> Tensor:
    """Return this worker's part of a whole tensor, placed as `reference` is. No communication."""
    data = reference.detach()
    if not isinstance(data, DTensor):
        return tensor.to(data.device)
    moved = tensor.to(data.device_mesh.device_type)
    return distribute_tensor(moved, data.device_mesh, data.placements, src_data_rank=None)


def from_main(tensor: Tensor, reference: Tensor) -> Tensor:
    """Return this worker's part of rank 0's whole tensor, placed as `reference` is. All workers
    call it; on others than rank 0, `tensor` gives the shape and the data type alone."""
    data = reference.detach()
    if isinstance(data, DTensor):
        moved = tensor.to(data.device_mesh.device_type)
        return distribute_tensor(moved, data.device_mesh, data.placements, src_data_rank=0)
    moved = tensor.to(data.device)
    dist.broadcast(moved, src=0)
    return moved
