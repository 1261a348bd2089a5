"""A policy: the base with what earlier stages trained of it, to go on training or to answer.

Whatever stage trained it, what it leaves is relative to the input `model`: one adapter over it, or
whole weights. A later stage goes on with that same adapter instead of stacking a second one, so the
last stage's weights are always all there is to export.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tuneyard.api.adapters import Adapter
from tuneyard.api.stage_settings import LoopSettings
from tuneyard_trainer.models import adapters
from tuneyard_trainer.models.base import load_base, save_model
from tuneyard_trainer.models.layers import freeze
from tuneyard_trainer.storage.files import disk_error

WEIGHTS = "weights"


def load(
    inputs: Mapping[str, Path],
    adapter: Adapter | None,
    loop: LoopSettings,
    *,
    device: torch.device,
    precision: torch.dtype,
    tokenizer: PreTrainedTokenizerBase,
    gradient_checkpointing: bool = False,
) -> nn.Module:
    """The policy, to be trained: `model`, from where `tuned` left it. Trained parameters are
    float32; the base under an adapter is in `precision`."""
    trained = _trained(inputs)
    base = load_base(
        _base(inputs),
        dtype=precision if adapter else torch.float32,
        device=device,
        quantize=adapter.qlora if adapter else None,
        dropout=loop.dropout,
    )
    model: nn.Module = base
    if adapter and trained and _is_adapter(trained):
        model = adapters.load(base, trained, trainable=True)
    elif adapter:
        model = adapters.attach(base, adapter, seed=loop.seed, tokenizer=tokenizer)
    elif loop.freeze:
        freeze(base, loop.freeze)
    if gradient_checkpointing:
        adapters.enable_gradient_checkpointing(model)
    return model


def save(model: nn.Module, adapter: Adapter | None, folder: Path) -> None:
    """The adapter alone, or the whole model where all of it was trained. Raises StageError."""
    try:
        if adapter:
            adapters.save(model, folder)
        else:
            save_model(model, folder)
    except OSError as error:
        raise disk_error(error, folder) from error


def answering(inputs: Mapping[str, Path], device: torch.device) -> nn.Module:
    """The policy, in evaluation mode: bfloat16 on GPU, float32 on CPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    base = load_base(_base(inputs), dtype=dtype, device=device)
    trained = _trained(inputs)
    if trained and _is_adapter(trained):
        return adapters.load(base, trained)
    return base.eval()


def merged(inputs: Mapping[str, Path], dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The policy as one plain model."""
    base = load_base(_base(inputs), dtype=dtype, device=device)
    trained = _trained(inputs)
    return adapters.merge(base, trained) if trained and _is_adapter(trained) else base


def _trained(inputs: Mapping[str, Path]) -> Path | None:
    """The weights that an earlier stage left; None: there was none."""
    return inputs["tuned"] / WEIGHTS if "tuned" in inputs else None


def _base(inputs: Mapping[str, Path]) -> Path:
    """Where the base's weights lie: whole weights of an earlier stage stand for `model`."""
    trained = _trained(inputs)
    return trained if trained and not _is_adapter(trained) else inputs["model"]


def _is_adapter(weights: Path) -> bool:
    return (weights / adapters.CONFIG).exists()


class Reference:
    """The policy as it was at a stage's start, without a second model: the trained tensors of that
    time, which change places with the present ones where the reference is asked.

    That is the adapter alone where there is one, and works for every kind of adapter; a fresh
    adapter's start is the base. Made before a checkpoint is restored, it is the same after a
    resume.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = dict(parameters)
        self._start = {name: p.detach().clone() for name, p in parameters.items()}

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """While active, the model is the reference. No gradient may be outstanding."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self._parameters.items():
            present = parameter.data
            parameter.data = self._start[name]
            self._start[name] = present
