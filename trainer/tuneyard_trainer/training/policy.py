"""Loading the policy that a stage trains."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from tuneyard.api.adapters import Adapter
from tuneyard.api.stage_settings import LoopSettings
from tuneyard_trainer.models import policies
from tuneyard_trainer.models.base import load_tokenizer, precision_of
from tuneyard_trainer.training.losses import Forward
from tuneyard_trainer.worker import StageContext


def load_policy(
    context: StageContext,
    settings: LoopSettings,
    adapter: Adapter | None,
    *,
    max_length: int,
    packs: Callable[[nn.Module], bool],
) -> tuple[nn.Module, Forward]:
    """Load the policy that a stage trains on its input `data`, and set up its forward passes.

    `max_length`: the longest row, in tokens. `packs`: whether rows may share a bin under a model.
    The workers share the model if the stage asks for it. Raises StageError.
    """
    worker, runtime = context.worker, context.stage.runtime
    precision = precision_of(settings, worker)
    tokenizer = load_tokenizer(context.inputs["data"] / "tokenizer")
    worker.report(message="loading the model")
    model = policies.load(
        context.inputs,
        adapter,
        settings,
        device=worker.device,
        precision=precision,
        tokenizer=tokenizer,
        gradient_checkpointing=runtime.gradient_checkpointing,
        shards=policies.shards(context, policies.bytes_per_parameter(settings, adapter, worker)),
    )
    forward = Forward.of(
        model,
        device=worker.device,
        precision=precision,
        pad=tokenizer.pad_token_id,
        pack=packs(model),
        max_length=max_length,
        max_tokens=runtime.micro_batch_tokens,
    )
    return model, forward
