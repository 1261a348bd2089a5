"""The memory of one training step, as torch's own trackers see it, without a GPU and without
storage: tensors are fake, and so is the process group.

The model is transformers', the adapter PEFT's, and head, loss and activation checkpointing are
those of the trainer. A 4-bit layer is simulated: bitsandbytes does not run on fake tensors.
`torch.distributed._tools` is private to torch, so that only benchmarks and tests use it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, replace
from typing import Any, Literal
from unittest import mock

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM

from tuneyard.api.adapters import Lora
from tuneyard_trainer.models.adapters import enable_gradient_checkpointing
from tuneyard_trainer.models.layers import decoder_layers, head_at, trainable
from tuneyard_trainer.models.targets import lora_config
from tuneyard_trainer.reinforcement.actor import ValueHead
from tuneyard_trainer.reinforcement.arithmetic import token_logprobs

BF16 = torch.bfloat16
DETECTION = "transformers.masking_utils.find_packed_sequence_indices"


@dataclass(frozen=True)
class Step:
    """The forward and backward pass of one micro-batch on one of `gpus` devices."""

    config: Mapping[str, Any]
    """The model's config.json."""
    tuning: Literal["full", "lora", "qlora"]
    method: Literal["sft", "dpo", "ppo"]
    rows: int
    width: int
    """Tokens of a row."""
    gpus: int = 1
    """Devices that the model is sharded over by FSDP2. 1: it is not sharded."""
    checkpointing: bool = False
    masked: bool = False
    """Whether attention has a mask of its own, as for packed and padded rows."""
    rank: int = 16


@dataclass(frozen=True)
class Tracked:
    """Bytes on one device."""

    parameters: int
    """Parameters and buffers, sharded ones by their shard."""
    gradients: int
    """Gradients between micro-batches."""
    activations: int
    """Everything else at the peak: activations, temporary tensors, gathered parameters and
    gradients before they are scattered."""

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.activations


DEPTHS = 4, 8
"""Layers of the two models from which the memory of a deeper one follows."""


def extrapolated(step: Step) -> Tracked:
    """Return the memory of a step; of a deep model, from two models with fewer layers.

    All layers are alike, so that each part is a straight line in their number, as long as the peak
    is at the same moment. With autocast's copies of trained weights it is not: such a step is
    tracked at its own depth.
    """
    depth = int(step.config["num_hidden_layers"])
    has_copies = step.tuning == "full" and step.gpus == 1 and step.checkpointing
    if depth <= 2 * DEPTHS[1] or has_copies:
        return tracked(step)
    low, high = (
        tracked(replace(step, config={**step.config, "num_hidden_layers": layers}))
        for layers in DEPTHS
    )
    share = (depth - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])
    return Tracked(
        *(round(a + share * (b - a)) for a, b in zip(astuple(low), astuple(high), strict=True))
    )


def tracked(step: Step) -> Tracked:
    """Return the memory at the peak of a step whose gradients exist from an earlier micro-batch."""
    # transformers reads the positions to see whether rows are packed, and masks attention if it
    # cannot read them, as on fake tensors. A packed micro-batch has `masked` instead.
    packed = mock.patch(DETECTION, return_value=None)
    with _mesh(step.gpus) as mesh, packed, FakeTensorMode():
        return _measured(_model(step, mesh), step)


@contextlib.contextmanager
def _mesh(size: int) -> Iterator[DeviceMesh | None]:
    """Yield the devices to shard over; None: one device."""
    if size == 1:
        yield None
        return
    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (size,))
    finally:
        dist.destroy_process_group()


# ---- the model ----------------------------------------------------------------------------------


def _model(step: Step, mesh: DeviceMesh | None) -> nn.Module:
    fields = {name: value for name, value in step.config.items() if name != "model_type"}
    config = AutoConfig.for_model(step.config["model_type"], **fields)
    with torch.device("meta"):
        dtype = torch.float32 if step.tuning == "full" else BF16
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if step.tuning == "qlora":
            _quantize(decoder_layers(model)[1])
        if step.tuning != "full":
            settings = Lora(rank=step.rank)
            model = get_peft_model(model, lora_config(model, settings, "adapter.lora"))
    _materialize(model, frozen_as_buffers=mesh is None)
    if step.checkpointing:
        enable_gradient_checkpointing(model)
    if mesh:
        _shard(model, mesh)
    return model.train()


def _materialize(model: nn.Module, *, frozen_as_buffers: bool) -> None:
    """Replace the tensors on the meta device by fake tensors on the CPU, tied ones by one.

    `frozen_as_buffers`: torch's tracker of unsharded models takes trained parameters only.
    """
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if id(p) not in made:
                empty = torch.empty(p.shape, dtype=p.dtype)
                made[id(p)] = nn.Parameter(empty, requires_grad=p.requires_grad)
            if p.requires_grad or not frozen_as_buffers:
                module.register_parameter(name, made[id(p)])
            else:
                delattr(module, name)
                module.register_buffer(name, made[id(p)].detach())
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                module.register_buffer(name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _shard(model: Any, mesh: DeviceMesh) -> None:
    """Shard a model as the trainer does: an adapter stays whole on each device."""
    policy = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=torch.float32)
    adapted = hasattr(model, "get_base_model")
    base = model.get_base_model() if adapted else model
    whole = {p for p in model.parameters() if adapted and p.requires_grad}
    for layer in decoder_layers(base)[1]:
        fully_shard(layer, mesh=mesh, mp_policy=policy, ignored_params=whole)
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=whole)


class FourBitLinear(nn.Linear):
    """A linear layer with the memory of bitsandbytes' `Linear4bit`: NF4 in blocks of 64 weights,
    whose scales are 8-bit in blocks of 256."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(1, 1, bias=False)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        count = layer.weight.numel()
        packed = torch.empty(count // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_parameter("bias", layer.bias)
        self.register_buffer("scales", torch.empty(-(-count // 64), dtype=torch.uint8))
        self.register_buffer("scales_of_scales", torch.empty(-(-count // 16384)))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _FourBitProduct.apply(x.to(BF16), self.out_features)
        return y if self.bias is None else y + self.bias


class _FourBitProduct(torch.autograd.Function):
    """The product with a weight that is dequantized in the forward and in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, outputs: int) -> Tensor:
        ctx.shape = outputs, x.shape[-1]
        return functional.linear(x, torch.empty(ctx.shape, dtype=BF16))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].to(BF16) @ torch.empty(ctx.shape, dtype=BF16), None


def _quantize(layers: nn.Module) -> None:
    for module in list(layers.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, FourBitLinear(child))


# ---- the step -----------------------------------------------------------------------------------


def _measured(model: nn.Module, step: Step) -> Tracked:
    head = ValueHead(_width(step), torch.device("cpu")) if step.method == "ppo" else None
    for parameter in [*trainable(model).values(), *(head.parameters() if head else ())]:
        parameter.grad = torch.zeros_like(parameter)
    inputs = _inputs(step)
    tracker: Any = FSDPMemTracker(model) if step.gpus > 1 else _fast(MemTracker())
    if step.gpus > 1:
        tracker.track_inputs(tuple(inputs.values()))
    else:
        tracker.track_external(model, *inputs.values())
    if head:
        tracker.track_external(head)
    with tracker:
        _loss(model, head, inputs, step).backward()
    (peak,) = [
        snapshot
        for device, snapshot in tracker.get_tracker_snapshot("peak").items()
        if torch.device(device).type == "cpu"
    ]
    parameters, gradients = _bytes(_tensors(model)), _bytes(p.grad for p in model.parameters())
    # torch's tracker of sharded models takes what FSDP2 manages, and not an adapter.
    adapter = [p for p in model.parameters() if step.gpus > 1 and not isinstance(p, DTensor)]
    total = peak["Total"] + _bytes(adapter) + _bytes(p.grad for p in adapter)
    return Tracked(parameters, gradients, total - parameters - gradients)


def _fast(tracker: Any) -> Any:
    """Return torch's tracker without its statistics of modules: only the total is read, and they
    cost a pass over all modules for each operation."""
    modules = mock.MagicMock()
    modules.is_bw = False
    modules.parents = set()
    tracker._mod_tracker = modules
    return tracker


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _bytes(tensors: Iterable[Any]) -> int:
    """Return the bytes of the tensors on one device, each storage counted once."""
    local = [
        getattr(tensor, "to_local", lambda t=tensor: t)()
        for tensor in tensors
        if tensor is not None
    ]
    return sum({id(t.untyped_storage()): t.untyped_storage().nbytes() for t in local}.values())


def _width(step: Step) -> int:
    return int(step.config.get("hidden_size") or step.config["n_embd"])


def _inputs(step: Step) -> dict[str, Tensor]:
    shape = step.rows, step.width
    inputs = {"input_ids": torch.zeros(shape, dtype=torch.long)}
    if step.masked:
        mask = torch.zeros(step.rows, 1, step.width, step.width, dtype=torch.bool)
        inputs["attention_mask"] = mask
    return inputs


def _loss(
    model: nn.Module, head: ValueHead | None, inputs: dict[str, Tensor], step: Step
) -> Tensor:
    """Return the loss of a micro-batch in which every position is a target."""
    ids = inputs["input_ids"]
    positions = torch.zeros(ids.numel(), dtype=torch.long)
    labels = ids.flatten()
    with (
        torch.autocast("cpu", dtype=BF16),
        head_at(model, positions, positions, step.width) as hidden,
    ):
        output = model(use_cache=False, **inputs)
        if head is None:  # under autocast, as in training.losses
            reduction = "sum" if step.method == "sft" else "none"
            logits = output.logits[0].float()
            return functional.cross_entropy(logits, labels, reduction=reduction).sum()
    logits = output.logits[0].float() / 1.0
    return (token_logprobs(logits, labels) + head(hidden[-1])).sum()
