"""Sharding a model over the workers: FSDP2, by transformers, while the model is loaded.

Each worker reads its own part of each weight. accelerate 1.15 ignores a request for FSDP on a CPU
without a word, so sharding is requested in this module alone, and `require_sharded` ends a run in
which it is not active. The weights of an adapter stay whole on every worker: they are small, and
the trainer averages their gradients.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig

from tuneyard.errors import StageError

T = TypeVar("T")

LAYER = re.compile(r"\.\d+$")
"""The end of the name of a layer: its place in a list of modules."""
INDEX = re.compile(r"\.\d+(?=\.|$)")
"""A place in a list of modules, for which a plan has `.*`."""


def over(world_size: int, *, bfloat16: bool) -> DistributedConfig:
    """Return the config for `from_pretrained` that shards a model over all workers.

    `bfloat16`: the workers gather weights that are stored in float32 as bfloat16, and compute with
    them. Autocast would keep a bfloat16 copy of each gathered weight until the end of the forward
    pass: a whole model on each worker.
    """
    return DistributedConfig(fsdp_size=world_size, fsdp_mixed_precision=bfloat16)


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


def require_sharded(model: PreTrainedModel, world_size: int) -> None:
    """Raise StageError NotSharded, on all workers, unless each of them holds its part of every
    weight and gathers the model layer by layer. All workers call it."""
    problem = _not_sharded(model, world_size)
    found = torch.tensor(float(problem is not None), device=model.device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)  # one worker alone would leave the others waiting
    if found:
        elsewhere = "another worker holds more than its part"
        raise StageError(
            "NotSharded",
            f"compute.sharding is fsdp, and {problem or elsewhere}.",
            advice="Set compute.sharding to none, or model.uri to an architecture with an FSDP "
            "plan in transformers.",
        )


def _not_sharded(model: PreTrainedModel, world_size: int) -> str | None:
    """Return what keeps this worker from holding its part alone; None: nothing does."""
    whole = [name for name, p in model.named_parameters() if _is_more(p.data, world_size)]
    if whole:
        held, total = local_bytes(model)
        return (
            f"this worker holds {held:,} of {total:,} bytes of the model; not sharded over "
            f"{world_size} workers: {', '.join(whole[:3])}"
        )
    layers = [m for name, m in model.named_modules() if LAYER.search(name)]
    if not any(isinstance(layer, FSDPModule) for layer in layers):
        return _no_layers(model)
    return None


def _is_more(tensor: Tensor, world_size: int) -> bool:
    """Return whether this worker holds more of a tensor than FSDP2 gives any worker: it cuts
    dimension 0 into parts of equally many rows, the last ones smaller."""
    if not isinstance(tensor, DTensor):
        return True
    rows = -(-tensor.shape[0] // world_size)
    return tensor.to_local().numel() > rows * (tensor.numel() // tensor.shape[0])


def plan_obstacle(model: PreTrainedModel) -> str | None:
    """Return why transformers cannot shard a model that is not sharded yet; None: it can."""
    names = (name for name, _ in model.named_modules() if LAYER.search(name))
    planned = any(INDEX.sub(".*", name) in (model.fsdp_plan or {}) for name in names)
    return None if planned else _no_layers(model)


def _no_layers(model: PreTrainedModel) -> str:
    return (
        f"transformers has no FSDP plan for the layers of {architecture(model)}, so that each "
        "worker would gather the whole model at once"
    )


def architecture(model: nn.Module) -> str:
    """Return the name of a model's class, of which FSDP2 makes one of its own."""
    return type(model).__name__.removeprefix("FSDP")


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


def is_shared(model: nn.Module) -> bool:
    """Return whether the workers share the model: each forward pass is then one of all workers."""
    return any(map(is_sharded, model.parameters()))


def sharding_of(model: nn.Module) -> Literal["fsdp", "none"]:
    """Return how a model is laid out over the workers, by its name in the manifest."""
    return "fsdp" if is_shared(model) else "none"


def in_step(model: nn.Module, own: Sequence[T], spare: T) -> Iterator[tuple[T, bool]]:
    """Yield the work of a worker's forward passes, and whether each is its own.

    Workers that share the model call it together. They gather its layers together, so each of them
    gets as many passes as the one with the most: `spare`, for nothing, once its own are done. With
    a whole model a worker gets its own alone.
    """
    most = len(own)
    if is_shared(model):
        count = torch.tensor(float(most), device=next(model.parameters()).device)
        dist.all_reduce(count, op=dist.ReduceOp.MAX)
        most = int(count)
    for index in range(most):
        is_own = index < len(own)
        yield (own[index] if is_own else spare), is_own


def reshard(model: nn.Module) -> None:
    """Free what this worker gathered of a shared model. After a forward pass without a backward one
    FSDP2 keeps some weights whole, and parameters that are taken then are not the shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


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
